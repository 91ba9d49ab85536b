"""The committed page is what its results say, and README quotes nothing else."""

from __future__ import annotations

import json
import re

from bench import chart, report
from bench.__main__ import PAGE
from bench.processes import ROOT

#: A measured figure in prose: a number with one of the benchmark's units.
FIGURE = re.compile(r"\d[\d.,]*\s?(?:µs|×|ms|s/GiB|requests/s)")


def unsupported(text: str, page: str) -> list[str]:
    """Figures of ``text`` that ``page`` does not have; ± and table cells between number and unit do not matter."""
    numbers = set(re.findall(r"\d[\d,]*(?:\.\d+)?", page))
    return [found for found in FIGURE.findall(text) if re.split(r"\s|[µ×ms/r]", found)[0] not in numbers]


def test_the_page_and_its_chart_are_drawn_from_the_committed_results() -> None:
    document = json.loads(PAGE.with_suffix(".json").read_text())
    assert PAGE.read_text() == report.markdown(document), "run: make bench ARGS=--write"
    assert PAGE.with_suffix(".svg").read_text() == chart.chart(document)


def test_readme_quotes_only_figures_of_the_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "docs/benchmarks.md" in readme
    assert unsupported(readme, PAGE.read_text()) == []


def test_a_figure_that_the_page_lacks_is_found() -> None:
    page = "| Portico | 28.4 ±3% | 1.21 ± 2% |"
    assert unsupported("takes 28.4 µs, 1.21 × rathole", page) == []
    assert unsupported("takes 12 µs, 1.5 × rathole and 0.9 s/GiB", page) == ["12 µs", "1.5 ×", "0.9 s/GiB"]
