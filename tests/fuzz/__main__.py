"""Give readers many damaged and odd inputs, and print what became of them.

    python -m tests.fuzz --inputs 100000                          all readers, each its share
    python -m tests.fuzz --inputs 1000000 --state fuzz.json       goes on where it was stopped
    python -m tests.fuzz --inputs 1000000 --state fuzz.json --seconds 600
    python -m tests.fuzz --reader weights --seed 175              one input, with the traceback

An input is made from its number alone, so that a failure can be looked at again. The exit code is 1 if any failed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.core import run_one
from tests.fuzz.readers import READERS
from tests.fuzz.runner import State, run_slice


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", default="all", choices=("all", *READERS))
    parser.add_argument("--inputs", type=int, default=10_000, help="in all, with those of the state")
    parser.add_argument("--state", type=Path, help="file that keeps the figures")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", type=int, help="this input only, in this process")
    args = parser.parse_args(argv)
    names = list(READERS) if args.reader == "all" else [args.reader]
    if args.seed is not None:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                taken = run_one(READERS[name](Path(folder)), args.seed)
                print(f"{name}: {'a right result' if taken else 'a clear error'}")
        return 0
    state, deadline = State(args.state), time.monotonic() + args.seconds
    shares = sum(READERS[name].share for name in names)
    wanted = {name: round(args.inputs * READERS[name].share / shares) for name in names}
    while (rest := deadline - time.monotonic()) > 0:
        name = min(names, key=lambda name: state.of(name).inputs / max(wanted[name], 1))
        missing = wanted[name] - state.of(name).inputs
        if missing <= 0:
            break
        run_slice(READERS[name], state.of(name), min(missing, max(wanted[name] // 20, 200)), seconds=rest)
        state.save()
    print("\n".join(state.report()))
    return 1 if any(state.of(name).failed for name in names) else 0


if __name__ == "__main__":
    sys.exit(main())
