"""Find processes that others have started (Linux)."""

from pathlib import Path


def find_process(command_holds: str, **environment: str) -> int:
    """The process whose command line holds a text and whose environment has these values.

    Raises:
        ProcessLookupError: there is none.
    """
    wanted = {f"{name}={value}".encode() for name, value in environment.items()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            present = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended, or isn't ours
            continue
        if command_holds.encode() in command and wanted <= set(present):
            return int(folder.name)
    raise ProcessLookupError(f"no process of {command_holds!r} with {environment}")


def children_of(pid: int | None) -> list[int]:
    """The processes that a process has started and that still run."""
    folder = Path(f"/proc/{pid}/task")
    return [int(child) for task in folder.iterdir() for child in (task / "children").read_text().split()]


def is_running(pid: int) -> bool:
    """Whether a process is there and not one that has ended and waits for its parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
