"""How findings are shown to a person: a line each as it comes, what to do below it, a count at the end."""

from __future__ import annotations

import sys

from portico import settings
from portico.cli import output
from portico.kit.findings import Finding
from portico.kit.paint import Paint


class Report:
    """Findings on standard output; ``width``: characters of the longest name of a check."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._paint = Paint(settings.color_wanted(sys.stdout))
        self._count = {"OK": 0, "WARN": 0, "FAIL": 0}

    def show(self, finding: Finding) -> None:
        """One finding."""
        paint, width = self._paint, self._width
        style = {"OK": paint.good, "WARN": paint.warn, "FAIL": paint.bad}[finding.level]
        says = output.printable(finding.says)
        self._count[finding.level] += 1
        output.echo(f"{style(f'{finding.level:<4}')}  {finding.check:<{width}}  {says}")
        if finding.advice:
            output.echo(f"      {'':<{width}}  {paint.dim('→ ' + output.printable(finding.advice))}")

    def end(self) -> None:
        """How many of each."""
        output.echo()
        output.echo(f"{self._count['OK']} fine, {self._count['WARN']} to look at, {self._count['FAIL']} broken")
