"""One process of the local launcher: `python -m dinov3.run.worker MODULE CALLABLE OUTPUT_DIR [arguments]`."""

import os
import signal
import sys
import threading

from dinov3.run.job import CheckpointableSubmitter


def main(argv: list[str]) -> int:
    """Run the job, and return the exit code: what the script's function returned, if that is a number."""
    module_path, callable_name, output_dir, *args = argv
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    result = CheckpointableSubmitter(module_path, callable_name, args, output_dir)()
    return result if isinstance(result, int) else 0


def _end_with_the_launcher() -> None:
    """Standard input is a pipe that nobody writes to: it ends when the launcher does."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves its state first


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
