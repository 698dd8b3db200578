"""Run benchmarks and write what they find.

    python -m benchmarks                          # lists them
    python -m benchmarks linear_sweep knn         # these
    python -m benchmarks all --quick              # all, small points and few rounds
    python -m benchmarks backbones --only "vits16, 224" --threads 2

Rows are merged into results.json of the output folder after each point (a row of the same name, device and machine is
replaced), so that a run can be stopped and taken up again (`--new`); RESULTS.md and the plots are made from that file.
"""

import argparse
import ast
import importlib
import logging
import sys
from pathlib import Path

import torch

from benchmarks.frame.bench import Bench
from benchmarks.frame.report import write_report
from dinov3.utils.device import default_device


def find_benchmarks() -> dict[str, str]:
    """The modules of this package that have a function `run`, and what each says of itself; none is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in module.body):
            found[path.stem] = (ast.get_docstring(module) or "").split("\n\n")[0].replace("\n", " ")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="benchmarks, or all")
    parser.add_argument("--quick", action="store_true", help="small points, few rounds: to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results")
    parser.add_argument(
        "--only", action="append", default=[], help="points whose name holds this text (may be given more than once)"
    )
    parser.add_argument("--new", action="store_true", help="leave out points that results.json has for this machine")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each point and side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default=str(default_device()))
    args = parser.parse_args(argv)

    known = find_benchmarks()
    if not args.names:
        for name, summary in known.items():
            print(f"{name:22} {summary}")
        print("report                 RESULTS.md and plots from results.json, nothing is measured")
        return
    names = list(known) if args.names == ["all"] else [name for name in args.names if name != "report"]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")

    torch.set_num_threads(args.threads)
    for name in names:
        command = f"python -m benchmarks {name} --threads {args.threads}"
        bench = Bench(
            args.out,
            command,
            device=torch.device(args.device),
            threads=args.threads,
            seconds=args.seconds,
            quick=args.quick,
            only=args.only,
            new=args.new,
        )
        print(f"\n{name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").run(bench)
    write_report(args.out)


if __name__ == "__main__":
    logging.getLogger("dinov3").setLevel(logging.WARNING)
    main(sys.argv[1:])
