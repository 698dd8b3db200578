"""Speed and memory beside what users would pick instead: `python -m benchmarks` lists them, `make bench` runs them all.

Each module with a function `run(bench)` is a benchmark; `frame/` measures, and keeps what was found in `results.json`,
`RESULTS.md` and `plots/`. `NOTES.md` holds what was expected of each change, what came of it, and why targets are
missed.
"""
