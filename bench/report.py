"""Results as tables: for a terminal, and as Markdown. Everything is read off the JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench import results
from bench.cases import CASES
from bench.figures import Median
from bench.results import Document
from bench.targets import PACE_US, TARGETS, pace

Row = Sequence[str]


def number(value: float) -> str:
    """Three figures: enough for a median, and nothing that noise alone decides."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def figure(found: Median | None, unit: str = "") -> str:
    """A median; with its spread where there were repeats."""
    if found is None:
        return "–"
    spread = f" ±{found.spread:.0%}" if found.count > 1 else ""
    return f"{number(found.value)}{' ' + unit if unit else ''}{spread}"


def case_names(document: Document) -> list[str]:
    return [name for name in CASES if name in document["cases"]]


def case_title(document: Document, case: str) -> str:
    title = CASES[case].title
    return f"{title}, {document['about']['mebibytes']} MiB" if results.is_bulk(case) else title


def case_head(case: str) -> Row:
    if results.is_bulk(case):
        return ("", "CPU s/GiB", "relay", "agent", "MiB above idle", "× nginx", "× rathole", "MiB/s")
    return ("", "CPU µs/request", "relay", "agent", "× nginx", "× rathole", "p50 µs", "requests/s")


def case_rows(document: Document, case: str) -> list[Row]:
    return [_row(document, case, name) for name in document["candidates"] if name in document["cases"][case]]


def _row(document: Document, case: str, name: str) -> Row:
    title = document["candidates"][name]["title"]
    if not results.samples(document, case, name):
        why = results.refusals(document, case, name)
        return (title, f"refused: {why[0] if why else 'no sample'}", *[""] * 6)
    roles = [figure(results.cpu_median(document, case, name, role)) for role in ("relay", "agent")]
    if name in ("direct", "nginx"):
        roles = ["–", "–"]
    ratios = [
        "–" if name in (other, "direct") else figure(results.cpu_ratio(document, case, name, other))
        for other in ("nginx", "rathole")
    ]
    total = figure(results.cpu_median(document, case, name))
    rate = figure(results.rate(document, case, name))
    if results.is_bulk(case):
        return (title, total, *roles, _memory(document, case, name), *ratios, rate)
    return (title, total, *roles, *ratios, figure(results.value(document, case, name, "p50_us")), rate)


def _memory(document: Document, case: str, name: str) -> str:
    """MiB above idle of each process."""
    found = [results.above_idle(document, case, name, role) for role in ("relay", "agent", "proxy")]
    return " + ".join(number(one.value) for one in found if one is not None) or "–"


def target_rows(document: Document) -> list[Row]:
    rows: list[Row] = []
    for target in TARGETS:
        sign = "≥" if target.least else "≤"
        limit = f"{sign} {number(target.limit)} {target.unit}"
        paced = target.paced(document)
        at_pace = "" if paced is None else f"{number(paced)} {target.unit}"
        measured = figure(target.measure(document), target.unit)
        rows.append((target.title, measured, at_pace, limit, target.verdict(document)))
    return rows


def memory_rows(document: Document) -> list[Row]:
    """Resident memory by process: idle before any load, at the peak of the small GETs, and of the download."""
    rows: list[Row] = []
    for name, about in document["candidates"].items():
        for role, idle in about["idle_mib"].items():
            busy = [results.peak(document, case, name, role) for case in ("small-get", "download", "upload")]
            rows.append((about["title"], role, number(idle), *(figure(one).split(" ±")[0] for one in busy)))
    return rows


MEMORY_HEAD: Row = ("", "process", "idle", "small GET", "download", "upload")
TARGET_HEAD: Row = ("what", "measured", "at the pace", "target", "")


# ── terminal ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def text_table(head: Row, rows: Iterable[Row]) -> str:
    """Columns as wide as they need, the first to the left, the others to the right."""
    table = [list(head), *(list(row) for row in rows)]
    whole = [row for row in table if len(row) == len(head) and not row[1].startswith("refused:")]
    # A refusal is one long cell: it may not widen its column.
    table = [row if row in whole else row[:2] for row in table]
    widths = [max(len(row[i]) for row in whole) for i in range(len(head))]
    widths[0] = max(len(row[0]) for row in table)
    lines = []
    for row in table:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "─" * max(map(len, lines[:1] + lines[2:])), *lines[1:]])


def terminal(document: Document) -> str:
    parts = []
    for case in case_names(document):
        parts += [f"\n{case}: {case_title(document, case)}", text_table(case_head(case), case_rows(document, case))]
    if any(row for row in memory_rows(document)):
        parts += ["\nresident memory, MiB", text_table(MEMORY_HEAD, memory_rows(document))]
    if extra := platform_rows(document):
        parts += ["\nthe platform", text_table(("", "measured"), extra)]
    measured = [row for row in target_rows(document) if row[3] != "not measured"]
    parts += ["\ntargets", text_table(TARGET_HEAD, measured)]
    if document["skipped"]:
        parts += ["\nskipped", *(f"  {name}: {why}" for name, why in document["skipped"].items())]
    return "\n".join(parts)


# ── Markdown ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def markdown_table(head: Row, rows: Iterable[Row]) -> str:
    """The first column to the left, the others to the right."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *rows))


INTRO = """# Benchmarks

What Portico costs, measured beside others on the same machine, in the same minutes, on the same work. This page is written by
`make bench ARGS=--write` from [benchmarks.json](benchmarks.json); do not edit it.

![CPU per request and per GiB, by candidate](benchmarks.svg)

"""

METHOD = """
## How it is measured

- Every candidate stands in front of the same two local apps. Rounds are interleaved: each round puts every case on every
  candidate in turn, in an order that changes from round to round, so that whatever else the machine does happens to all.
- **CPU is what is compared**: the time of the forwarding processes (relay and agent, server and client, the proxy's worker)
  from `/proc`, divided by the requests or bytes that were moved. The app and the load generator count for nobody. Requests a
  second depend on how many processes share the cores, and vary twice as much.
- A figure is the median of the rounds; ± is half the distance between the smallest and the largest. A ratio is taken within
  each round, then its median.
- No figure is believed unless every answer was right: one answer is compared byte by byte before and after each sample, the
  load generator must have seen no error and no status but 2xx, and the bytes that it read must add up. Bulk bodies are checked
  by CRC-32 at the receiving end. What fails this is printed as refused, with the reason.
- Portico is the real thing: `portico up` and `portico http` as child processes, default policy, metering on. rathole, bore and
  frp's TCP mode carry bytes and know neither hosts nor requests: they are what a tunnel costs at least.
- frp is measured when `frps` and `frpc` are on `PATH`, nginx and wrk when they are installed, rathole and bore when cargo is
  there to build them (once, into the user's cache folder). What was skipped is named above with its reason.

```sh
make bench                                                        # everything; some twenty minutes
make bench ARGS="--quick --only small-get --candidates portico,nginx,rathole --repeats 5"
make bench ARGS=--write                                           # everything, and this page and its chart anew
```
"""


def markdown(document: Document) -> str:
    about = document["about"]
    machine = about["machine"]
    parts = [INTRO]
    parts.append(
        f"Measured on {about['date']} at commit `{about['commit']}`: {machine['cores']} cores ({machine['cpu']}), "
        f"{machine['memory_gib']:g} GiB, Linux {machine['kernel']}, Python {machine['python']}; {about['repeats']} rounds of "
        f"{about['seconds']:g} s. Load by {about['generator']}; the app is {about['app']}.{_busy(document)}\n\n"
    )
    parts += ["## Targets\n\n", _pace(document), markdown_table(TARGET_HEAD, target_rows(document)), "\n\n"]
    for case in case_names(document):
        title = case_title(document, case)
        table = markdown_table(case_head(case), case_rows(document, case))
        parts += [f"## {title[0].upper()}{title[1:]}\n\n", table, "\n\n"]
    parts += ["## Resident memory, MiB\n\n", markdown_table(MEMORY_HEAD, memory_rows(document)), "\n\n"]
    if extra := platform_rows(document):
        parts += ["## The platform\n\n", markdown_table(("", "measured"), extra), "\n\n"]
    versions = [(entry["title"], entry["version"]) for entry in document["candidates"].values()]
    parts += ["## Versions\n\n", markdown_table(("", "version"), versions), "\n"]
    if document["skipped"]:
        parts += ["\nSkipped: ", "; ".join(f"{name} ({why})" for name, why in document["skipped"].items()), ".\n"]
    parts.append(METHOD)
    return "".join(parts)


def _busy(document: Document) -> str:
    """A warning when others used the machine before the run began."""
    about = document["about"]
    if about["load"] <= about["machine"]["cores"] / 4:
        return ""
    return f" **The machine was busy with other work (load {about['load']:g}): only the ratios mean much.**"


def _pace(document: Document) -> str:
    """What the second column of figures means."""
    factor = pace(document)
    if factor is None:
        return ""
    return (
        f"Ratios decide. The limits in time of a processor were set on a machine where one proxy hop of nginx costs "
        f"{PACE_US:g} µs; here it cost {PACE_US / factor:.1f} µs. The second column is what was measured, at that "
        f"machine's pace: times {factor:.2f}.\n\n"
    )


PLATFORM: tuple[tuple[str, str, str, str], ...] = (
    ("first-request", "seconds", "from the start of `portico http` to the first 200", "s"),
    ("idle-tunnels", "tunnels", "idle tunnels on one session", ""),
    ("idle-tunnels", "online_seconds", "until all were online", "s"),
    ("idle-tunnels", "relay_mib", "memory that they add at the relay", "MiB"),
    ("idle-tunnels", "relay_cpu_percent", "CPU of the relay while they are idle", "%"),
    ("agents", "agents", "agents on one relay, a session each", ""),
    ("agents", "online_seconds", "until all were online", "s"),
    ("agents", "relay_mib", "memory that they add at the relay", "MiB"),
    ("agents", "relay_cpu_percent", "CPU of the relay while they are idle", "%"),
    ("agents", "first_request_ms", "a request through each of 50 of them, p50", "ms"),
    ("grants", "per_second", "sessions with one grant, one API process", "/s"),
    ("grants", "cpu_us", "CPU of the API process for each", "µs"),
    ("queue", "per_second", "jobs that do nothing, one worker process", "/s"),
    ("cert-ingest", "per_second", "certificate events stored, one API process", "/s"),
    ("cert-ingest", "cpu_ms", "CPU of the API process for each", "ms"),
    ("webhook-ingest", "per_second", "payment providers' webhooks stored, one API process", "/s"),
    ("webhook-ingest", "cpu_ms", "CPU of the API process for each", "ms"),
    ("webhook-ingest", "p99_ms", "answer to each, p99, while nothing is applied", "ms"),
    ("reports", "rows", "finance events in a report", ""),
    ("reports", "csv_seconds", "made as CSV, by the worker's job", "s"),
    ("reports", "jsonl_seconds", "made as JSON Lines", "s"),
    ("reports", "parquet_seconds", "made as Parquet", "s"),
    ("reports", "peak_mb", "memory of the worker meanwhile, at most", "MB"),
    ("settlement", "lines", "lines of a settlement receipt", ""),
    ("settlement", "take_in_seconds", "taken in", "s"),
    ("settlement", "compare_seconds", "compared with the books", "s"),
    ("settlement", "peak_mb", "memory of the process meanwhile", "MB"),
)


def platform_rows(document: Document) -> list[Row]:
    rows: list[Row] = []
    for name, member, title, unit in PLATFORM:
        found = results.platform(document, name, member)
        if found is not None:
            rows.append((title, figure(found, unit)))
    return rows
