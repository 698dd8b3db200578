"""The figures of the suite, printed when it has run."""

import pytest

from tests.faults import figures
from tests.faults.jobs import LENGTH, Training


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training of one process that nobody disturbed."""
    training = Training(tmp_path_factory.mktemp("undisturbed"), "out", LENGTH)
    training.run_to_the_end()
    return training


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := figures.report():
        terminalreporter.section("injected faults")
        for line in lines:
            terminalreporter.write_line(line)
