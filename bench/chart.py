"""The chart of docs/benchmarks.md: horizontal bars as hand-written SVG, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from bench import results
from bench.report import case_title, number
from bench.results import Document

WIDTH, LABEL, VALUE, BAR, GAP, HEAD = 760, 210, 120, 18, 7, 44
#: The cases that are drawn, in this order.
DRAWN = ("small-get", "small-get-4", "close", "download", "upload")
STYLE = """<style>
  text { font: 13px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #24292f }
  .title { font-weight: 600; font-size: 14px }
  .quiet { fill: #57606a } .ours { fill: #4051b5 } .tls { fill: #7986cb } .others { fill: #8c959f }
  .name-ours { font-weight: 600 }
  .page { fill: #ffffff }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .quiet { fill: #9da7b3 } .ours { fill: #8c9eff } .tls { fill: #5c6bc0 } .others { fill: #6e7681 }
    .page { fill: #0d1117 }
  }
</style>"""


@dataclass(frozen=True, slots=True)
class Bar:
    name: str
    title: str
    value: float


def bars(document: Document, case: str) -> list[Bar]:
    """What forwards in this case, the cheapest first."""
    found = []
    for name, about in document["candidates"].items():
        median = results.cpu_median(document, case, name)
        if median is not None:
            found.append(Bar(name, about["title"], median.value))
    return sorted(found, key=lambda bar: bar.value)


def chart(document: Document) -> str:
    """The whole drawing; cases without a figure are left out."""
    parts: list[str] = []
    y = 12
    for case in DRAWN:
        if drawn := bars(document, case):
            unit = "s/GiB" if results.is_bulk(case) else "µs"
            parts += _panel(case_title(document, case), unit, drawn, y)
            y += HEAD + len(drawn) * (BAR + GAP) + 14
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img" '
        'aria-label="CPU of the forwarding processes by case and candidate; shorter is better">'
    )
    return "\n".join([head, STYLE, f'<rect class="page" width="{WIDTH}" height="{y}" rx="6"/>', *parts, "</svg>\n"])


def _panel(title: str, unit: str, drawn: Sequence[Bar], top: int) -> list[str]:
    most = max(bar.value for bar in drawn)
    room = WIDTH - LABEL - VALUE
    per = "per GiB" if unit == "s/GiB" else "per request"
    parts = [
        f'<text class="title" x="16" y="{top + 16}">{escape(title[0].upper() + title[1:])}</text>',
        f'<text class="quiet" x="16" y="{top + 33}">CPU {per} of what forwards; shorter is better</text>',
    ]
    y = top + HEAD
    for bar in drawn:
        kind = "ours" if bar.name == "portico" else "tls" if bar.name.startswith("portico") else "others"
        strong = ' class="name-ours"' if kind == "ours" else ""
        length = max(2.0, bar.value / most * room)
        parts += [
            f'<text{strong} x="{LABEL - 10}" y="{y + 14}" text-anchor="end">{escape(bar.title)}</text>',
            f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" rx="3"/>',
            f'<text x="{LABEL + length + 8:.1f}" y="{y + 14}">{number(bar.value)} {unit}</text>',
        ]
        y += BAR + GAP
    return parts
