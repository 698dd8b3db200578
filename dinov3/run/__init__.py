"""Starting jobs: `submit.py` (SLURM and local launcher), `init.py` (the context of a job)."""
