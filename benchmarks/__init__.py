"""Speed beside what users would pick instead. Each module prints a Markdown table: `make bench`."""
