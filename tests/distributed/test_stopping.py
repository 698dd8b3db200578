"""Signals that ask to stop: noted, agreed upon by all processes, turned into exit codes."""

import os
import signal
import threading
from pathlib import Path

import pytest

from dinov3 import distributed
from dinov3.distributed.stopping import PREEMPTED, Stopped, StopRequest, preemption_signal
from tests.helpers.distributed import run_distributed

USR2 = pytest.mark.skipif(preemption_signal() is None, reason="this platform has no SIGUSR2")


def exit_code_after(*signals: int) -> object:
    with StopRequest() as stop:
        assert not stop.agreed()
        for signum in signals:
            signal.raise_signal(signum)
        assert stop.agreed()
        with pytest.raises(Stopped) as caught:
            stop.leave()
    assert caught.value.preempted == (caught.value.code == PREEMPTED)
    return caught.value.code


@USR2
def test_exit_codes_tell_preemption_from_other_signals() -> None:
    assert exit_code_after(signal.SIGUSR2) == PREEMPTED == 75
    assert exit_code_after(signal.SIGTERM) == 143
    assert exit_code_after(signal.SIGINT) == 130


@USR2
@pytest.mark.parametrize("order", [(signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGTERM)])
def test_the_preemption_signal_wins(order: tuple[int, int]) -> None:
    assert exit_code_after(*order) == PREEMPTED


@USR2
def test_the_environment_names_the_preemption_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    assert preemption_signal() is signal.SIGUSR1
    assert exit_code_after(signal.SIGUSR1) == PREEMPTED
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "NONE")
    assert preemption_signal() is None


def test_a_second_interrupt_does_not_wait() -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back_also_after_errors() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    inside = []

    def fail() -> None:
        with StopRequest():
            inside.append(signal.getsignal(signal.SIGTERM))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside != before[1:]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_nobody_leaves_unasked() -> None:
    with StopRequest() as stop, pytest.raises(RuntimeError, match="nobody asked to stop"):
        stop.leave()


def test_other_threads_are_never_asked() -> None:
    answers: list[bool] = []

    def work() -> None:
        with StopRequest() as stop:
            answers.append(stop.agreed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


def _steps_until_stop(asked: int | None, at: int) -> tuple[int, object]:
    """Of 8 iterations: how many are done, and the exit code, if process `asked` gets a signal in iteration `at`."""
    done = 0
    try:
        with StopRequest() as stop:
            for iteration in range(8):
                if stop.agreed():
                    stop.leave()
                if distributed.get_rank() == asked and iteration == at:
                    os.kill(os.getpid(), signal.SIGTERM)
                done += 1
    except Stopped as stopped:
        return done, stopped.code
    return done, None


@pytest.mark.parametrize("asked", [0, 2])
def test_all_processes_stop_at_the_same_iteration_if_one_is_asked(asked: int, tmp_path: Path) -> None:
    # Asked in iteration 3: exchanged at the start of 4, known at the start of 5.
    assert run_distributed(_steps_until_stop, 3, tmp_path, asked, 3) == [(5, 143)] * 3


@pytest.mark.parametrize(("asked", "at"), [(None, 0), (1, 7)])
def test_all_processes_finish_if_nobody_is_asked_in_time(asked: int | None, at: int, tmp_path: Path) -> None:
    assert run_distributed(_steps_until_stop, 2, tmp_path, asked, at) == [(8, None)] * 2
