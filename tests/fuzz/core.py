"""What a test of a reader consists of, and what counts as a fault, for one input, which an integer stands for."""

import random
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar


class WrongResultError(AssertionError):
    """An input that should have been refused, or a result that isn't the right one."""


class Reader(ABC):
    """Makes inputs for something that reads, and knows what may come of them.

    Args:
        folder: an empty folder of its own.

    Attributes:
        name: on the command line and in reports.
        share: how many of a number of inputs it gets, relative to the others.
        errors: what it may raise: all else is a crash.
    """

    name: ClassVar[str]
    share: ClassVar[float]
    errors: ClassVar[tuple[type[Exception], ...]] = (ValueError, FileNotFoundError)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def make(self, rng: random.Random) -> Any:
        """An input; files are written."""

    @abstractmethod
    def read(self, given: Any) -> Any:
        """What the reader makes of it."""

    def check(self, given: Any, result: Any) -> None:
        """Raise `WrongResultError` unless the result is right, as far as one can know."""
        return

    def must_name(self, given: Any) -> str | None:
        """What the message of an error has to hold, such as the name of the file."""
        return None

    def file(self, name: str, data: bytes) -> Path:
        """A new file in the folder: readers may still have the one before mapped into memory."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return path


def run_one(reader: Reader, seed: int) -> bool:
    """Make the input of a seed and read it: whether it was taken, not refused with a clear error.

    Raises:
        WrongResultError: see `Reader.check`, or the error doesn't say which file it is about.
        BaseException: whatever a reader raises that it shouldn't.
    """
    rng = random.Random(f"{reader.name} {seed}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = reader.make(rng)
        try:
            result = reader.read(given)
        except reader.errors as error:
            message = "\n".join([str(error), *getattr(error, "__notes__", [])])
            named = reader.must_name(given)
            if not message.strip() or (named is not None and named not in message):
                raise WrongResultError(f"the error does not name {named!r}: {message!r}") from error
            return False
        reader.check(given, result)
        return True


def require(condition: Any, message: str) -> None:
    """Raise `WrongResultError` unless the condition holds."""
    if not condition:
        raise WrongResultError(message)
