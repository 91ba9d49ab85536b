"""A failed drill shows what the processes said last, and a run ends with what its drills measured."""

from __future__ import annotations

import pytest

from tests.drills.drill import FIGURES
from tests.system.conftest import show_ends

pytest_runtest_makereport = show_ends(__file__)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each figure beside its target. A miss is no failure here: `make soak` judges."""
    if FIGURES:
        terminalreporter.section("figures of the drills")
    for figure in FIGURES:
        terminalreporter.line(str(figure))
