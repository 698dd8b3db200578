"""A small slice of the inputs for every reader; and the runner counts what goes wrong.

`python -m tests.fuzz --inputs 1000000 --state fuzz.json` gives them many.
"""

import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.core import Reader, WrongResultError, run_one
from tests.fuzz.readers import READERS

if os.name != "posix":
    pytest.skip("needs POSIX signals", allow_module_level=True)

from tests.fuzz.runner import Figures, State, alarm, run_slice

N_INPUTS = 500  # of all readers, each with its share; together with their set-up some ten seconds
_SHARES = sum(kind.share for kind in READERS.values())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", READERS)
def test_odd_input_gives_a_right_result_or_a_clear_error(name: str, tmp_path: Path) -> None:
    reader = READERS[name](tmp_path)
    taken = 0
    for seed in range(20 + round(5 * N_INPUTS * READERS[name].share / _SHARES)):
        try:
            with alarm(20):
                taken += run_one(reader, seed)
        except BaseException as error:
            error.add_note(f"python -m tests.fuzz --reader '{name}' --seed {seed}")
            raise
    assert taken, "no input was accepted: the reader is not tested"


class Odd(Reader):
    """Goes wrong in every way."""

    name, share = "odd", 1.0

    def make(self, rng: random.Random) -> int:
        self.number = getattr(self, "number", -1) + 1
        return self.number

    def read(self, given: int) -> int:
        if given == 1:
            raise ValueError("a clear error about the file it.json")
        if given == 2:
            raise ValueError("an unclear one")
        if given == 3:
            raise KeyError("x")
        if given == 4:
            time.sleep(60)
        if given == 5:
            os.kill(os.getpid(), signal.SIGSEGV)
        return given

    def check(self, given: int, result: int) -> None:
        if given == 0:
            raise WrongResultError("not this")

    def must_name(self, given: int) -> str:
        return "it.json"


def test_all_that_goes_wrong_is_counted_and_a_state_goes_on(tmp_path: Path) -> None:
    state = State(tmp_path / "state.json")
    run_slice(Odd, state.of("odd"), 3, timeout_s=0.5)
    assert (state.of("odd").wrong, state.of("odd").refused) == (2, 1)  # the wrong result, the unclear error
    state.figures["odd"] = Figures()
    run_slice(Odd, state.of("odd"), 6, timeout_s=0.5)
    figures = state.of("odd")
    assert (figures.inputs, figures.taken, figures.refused) == (6, 0, 1)
    assert (figures.wrong, figures.crashes, figures.hangs) == (2, 2, 1)
    assert figures.next_seed == 6
    assert "Segmentation fault" in str(figures.noted[-1]["message"])
    state.save()
    again = State(tmp_path / "state.json")
    assert again.of("odd") == figures
    assert any("| all | 6 | 0 | 1 | 2 | 1 | 2 |" in line for line in again.report())


def test_what_does_not_end_is_killed() -> None:
    class Deaf(Odd):
        def read(self, given: int) -> int:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)  # as code in C that never returns to Python
            time.sleep(60)
            return given

    figures = Figures()
    run_slice(Deaf, figures, 1, timeout_s=0.3)
    assert (figures.hangs, figures.inputs, figures.next_seed) == (1, 1, 1)
