"""Formats that other projects have defined, at the import paths that the published code gave them; the code is ours."""
