"""Readers fed with damaged and with odd input: `python -m tests.fuzz --help`."""
