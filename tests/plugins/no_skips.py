"""`PORTICO_REQUIRE_ALL=1` turns every skipped test into a failure: a machine that lacks something cannot look green.

A skip is for a developer whose machine lacks what one test needs; where everything is installed (`.ci/run`) a skip
means that the set-up is broken. The names of skipped tests are printed loudly in either case.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

REQUIRED = os.environ.get("PORTICO_REQUIRE_ALL") == "1"


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The text given to `pytest.skip` or to the mark."""
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A skipped test (not an expected failure) fails."""
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.longrepr = f"{item.nodeid} was skipped, and PORTICO_REQUIRE_ALL=1 forbids that: {reason(report)}"
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A skipped module (importorskip) fails too."""
    report = yield
    if REQUIRED and report.skipped:
        report.longrepr = f"{collector.nodeid} was skipped, and PORTICO_REQUIRE_ALL=1 forbids that: {reason(report)}"
        report.outcome = "failed"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was left out, whatever `-r` says."""
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"NOT RUN  {report.nodeid}: {reason(report)}", yellow=True, bold=True)
