"""The launcher: run a script on SLURM or on this machine, with the same arguments.

    python -m dinov3.run.submit dinov3/train/train.py --nodes 4 --config-file C.yaml --output-dir OUT key=value ...

Arguments that the launcher doesn't know go to the script, in order. A script that defines `check_arguments(argv,
n_processes)` is asked whether it can work with them before anything starts. `slurm.py` and `local.py` do the work,
`job.py` is what runs in each process.
"""

import argparse
import ast
import contextlib
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dinov3.run.job import CheckpointableSubmitter
from dinov3.run.slurm import get_shared_folder, submit_jobs
from dinov3.utils.custom_callable import load_custom_callable

__all__ = [
    "CheckpointableSubmitter",
    "get_run_parser",
    "get_shared_folder",
    "get_submitit_parser",
    "main",
    "submit_jobs",
]

logger = logging.getLogger("dinov3")


class _Default(int):
    """A default that can be told from the same number given by the user."""


def get_submitit_parser() -> argparse.ArgumentParser:
    """The flags that say where and how to run, without help: a parent for other parsers."""
    parser = argparse.ArgumentParser("dinov3 launcher", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--cluster", choices=("slurm", "local"), help="where to run; default: slurm if there is `sbatch`, else local"
    )
    parser.add_argument("--local", dest="cluster", action="store_const", const="local", help="same as --cluster local")
    parser.add_argument(
        "--ngpus",
        type=int,
        default=_Default(8),
        metavar="N",
        help="processes per node, each with a GPU; default: 8, and locally the visible accelerators, or 1 on a CPU",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--timeout", type=int, default=2800, metavar="MIN", help="time limit in minutes; default: 2800")
    parser.add_argument("--slurm-partition", metavar="NAME", help="default: DINOV3_SLURM_PARTITION, or the cluster's")
    parser.add_argument("--slurm-qos", metavar="NAME", help="default: DINOV3_SLURM_QOS, or the cluster's")
    parser.add_argument("--slurm-account", metavar="NAME", help="default: DINOV3_SLURM_ACCOUNT, or the user's")
    parser.add_argument("--slurm-array-parallelism", type=int, default=256, metavar="N", help="for arrays of jobs")
    parser.add_argument("--slurm-nice", type=int, default=0, metavar="N", help="lowers the priority; default: 0")
    parser.add_argument("--comment", default="", help="passed to SLURM")
    parser.add_argument("--exclude", default="", metavar="NODES", help="nodes that SLURM shall not use")
    return parser


_EXAMPLES = """examples:
  dinov3 submit dinov3/train/train.py --config-file CONFIG.yaml --output-dir OUT train.dataset_path=DATASET
  dinov3 submit dinov3/train/train.py --nodes 4 --config-file CONFIG.yaml --output-dir OUT
  dinov3 submit dinov3/eval/knn.py --local model.config_file=OUT/config.yaml output_dir=OUT/knn key=value ...
"""


def get_run_parser() -> argparse.ArgumentParser:
    """The launcher's whole command line."""
    parser = argparse.ArgumentParser(
        "dinov3.run.submit",
        description="Run a script on SLURM or on this machine. Other arguments go to the script, in order.",
        parents=[get_submitit_parser()],
        allow_abbrev=False,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("module_path", help="Python file of the script")
    parser.add_argument("--callable-name", default="main", help="function in it; called with the list of arguments")
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="folder of the job, also given to the script; %%j is the job's number. Default: the script's output_dir=, "
        "else a folder per job in DINOV3_CHECKPOINT_PATH/$USER/experiments or ~/experiments",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Launch as the command line says (None: the process's own); returns the exit code.

    With SLURM that is 0 once the job is queued, locally what the script ended with (`dinov3.distributed.stopping`).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = get_run_parser()
    args, script_args = parser.parse_known_args(argv)
    if not Path(args.module_path).is_file():
        parser.error(f"there is no file {args.module_path} (working directory: {os.getcwd()})")
    cluster = args.cluster or ("slurm" if shutil.which("sbatch") else "local")
    output_dir = os.path.abspath(args.output_dir or _script_output_dir(script_args) or get_shared_folder() / "%j")
    module_path = os.path.abspath(args.module_path)
    call = CheckpointableSubmitter(module_path, args.callable_name, script_args, output_dir)
    n_processes = args.nodes * args.ngpus if cluster == "slurm" else _n_local_processes(parser, args)
    _check_arguments(parser, call, n_processes)
    with _messages_on_stdout():
        if cluster == "slurm":
            return _submit(args, call, argv)
        return _run_here(call, n_processes, argv)


def _check_arguments(parser: argparse.ArgumentParser, call: CheckpointableSubmitter, n_processes: int) -> None:
    """Ask the script, if it knows how to: a wrong key shouldn't wait in a queue for its error."""
    if call.callable_name != "main" or not _defines(call.module_path, "check_arguments"):
        return
    try:
        load_custom_callable(call.module_path, "check_arguments")(call.script_args(), n_processes)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _defines(module_path: str, name: str) -> bool:
    """Whether a script has such a name at its top level. It isn't run: importing it may need a GPU."""
    nodes = ast.parse(Path(module_path).read_bytes(), module_path).body
    functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    return name in functions or any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _submit(args: argparse.Namespace, call: CheckpointableSubmitter, argv: Sequence[str]) -> int:
    name, output_dir = f"{Path(call.module_path).stem}:{call.callable_name}", call.output_dir
    try:
        job = submit_jobs(call, output_dir, args, name)
    except RuntimeError as error:
        logger.error("%s", error)
        return 1
    folder = output_dir.replace("%j", str(job.job_id))
    logger.info("job %s (%s) is queued on SLURM: squeue -j %s; scancel %s", job.job_id, name, job.job_id, job.job_id)
    logger.info("folder: %s", folder)
    logger.info("logs: %s/logs/log.txt; output of the tasks: %s/%s_<task>_log.{out,err}", folder, folder, job.job_id)
    logger.info("to resume: %s", resume_command(argv, folder))
    return 0


def _n_local_processes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from dinov3.run.local import check_n_processes

    if args.nodes != 1:
        parser.error(f"--nodes {args.nodes} needs SLURM, and this is one machine (is `sbatch` on PATH?): --nodes 1")
    try:
        return check_n_processes(None if isinstance(args.ngpus, _Default) else args.ngpus)
    except ValueError as error:
        parser.error(str(error))


def _run_here(call: CheckpointableSubmitter, n_processes: int, argv: Sequence[str]) -> int:
    from dinov3.run.local import local_job_id, run_local

    folder = Path(call.output_dir.replace("%j", local_job_id()))
    logger.info("%d process(es) on this machine", n_processes)
    logger.info("folder: %s", folder)
    logger.info("logs: %s", folder / "logs")
    logger.info("to resume: %s", resume_command(argv, folder))
    code = run_local(call.module_path, call.callable_name, call.args, folder, n_processes)
    if code:
        logger.error("exit code %d; to resume: %s", code, resume_command(argv, folder))
    return code


def resume_command(argv: Sequence[str], output_dir: str | os.PathLike[str]) -> str:
    """The command line that goes on in the folder of this job, for a shell."""
    kept = []
    rest = iter(argv)
    for arg in rest:
        if arg == "--output-dir":
            next(rest, None)
        elif not arg.startswith("--output-dir="):
            kept.append(arg)
    words = [sys.executable, "-m", "dinov3.run.submit", f"--output-dir={os.fspath(output_dir)}", *kept]
    return shlex.join(words)


def _script_output_dir(script_args: Sequence[str]) -> str | None:
    """The folder that evaluations are given as `output_dir=`: one folder for the job and its results."""
    values = [arg.partition("=") for arg in script_args]
    return next((value for key, _, value in reversed(values) if key in ("output_dir", "output-dir") and value), None)


@contextlib.contextmanager
def _messages_on_stdout() -> Iterator[None]:
    """Show the launcher's own messages, as they are; the processes it starts have logs of their own."""
    handler = logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
