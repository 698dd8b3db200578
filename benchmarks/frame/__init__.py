"""What every benchmark shares: measuring in turns, rows of results, the report."""
