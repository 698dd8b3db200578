"""`python -m dinov3`: the command `dinov3`."""

from dinov3.run.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
