"""`make bench`: run it, print tables, keep the results.

make bench                                   everything
make bench ARGS="--quick --only small-get --candidates portico,nginx,rathole --repeats 5"
make bench ARGS=--write                      everything, and docs/benchmarks.md with its chart anew
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench import about, chart, report
from bench.candidates import BUILDERS, Candidate, Ground, Missing
from bench.cases import CASES, Case
from bench.figures import Refused
from bench.load import generator
from bench.platform import MEASURES
from bench.proc import MIB, idle_memory
from bench.processes import ROOT, NotStarted, Run
from bench.results import Document, cpu

#: Cases are put on every candidate; measures are Portico's alone.
EVERYTHING = [*CASES, *MEASURES]
LAST = Path(__file__).parent / "results" / "last.json"
#: The page, and beside it its chart and the results that both are drawn from.
PAGE = ROOT / "docs" / "benchmarks.md"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.render:
        document = json.loads(LAST.read_text())
    else:
        document = measure(options)
        keep(document)
        print(report.terminal(document))
    if options.write or options.render:
        write_page(document)
        print(f"\nwritten: {PAGE.relative_to(ROOT)}, its chart and its results")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench ARGS=…", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=names(EVERYTHING), default=EVERYTHING, help=f"of {', '.join(EVERYTHING)}")
    parser.add_argument("--candidates", type=names(BUILDERS), default=list(BUILDERS), help=f"of {', '.join(BUILDERS)}")
    parser.add_argument("--repeats", type=positive(int), help="rounds [5; 3 with --quick]")
    parser.add_argument("--seconds", type=positive(float), help="of load for each sample [4; 3 with --quick]")
    parser.add_argument("--mebibytes", type=positive(int), default=256, help="of a bulk transfer [256]")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and its chart too")
    parser.add_argument("--render", action="store_true", help="measure nothing: write the page from the last run")
    options = parser.parse_args(argv)
    options.repeats = options.repeats or (3 if options.quick else 5)
    options.seconds = options.seconds or (3.0 if options.quick else 4.0)
    return options


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of ``a,b``: names that are known, in the order known."""

    def read(text: str) -> list[str]:
        wanted = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in wanted if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return [name for name in known if name in wanted]

    return read


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError("must be above 0")
        return value

    return read


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(options: argparse.Namespace) -> Document:
    """One whole run; everything that it started has ended when it returns or raises."""
    with Run() as run:
        ground = Ground(run)
        ground.start_apps()
        candidates, skipped = start(ground, options.candidates)
        document: Document = {
            "about": about.about(options.repeats, options.seconds, options.mebibytes, generator(), ground.app),
            "skipped": skipped,
            "candidates": {},
            "cases": {},
            "platform": {},
        }
        for one in candidates:
            roles = next(iter(one.roles.values()), {})
            idle = {role: round(size / MIB, 2) for role, size in idle_memory(roles).items()}
            document["candidates"][one.name] = {"title": one.title, "version": one.version, "idle_mib": idle}
        rounds(document, candidates, [CASES[name] for name in options.only if name in CASES], options)
        if any(one.name == "portico" for one in candidates):
            for name in options.only:
                if name in MEASURES:
                    take(document, name, ground, options.repeats)
    return document


def start(ground: Ground, wanted: Sequence[str]) -> tuple[list[Candidate], dict[str, str]]:
    """Every candidate that this machine can run; the others with the reason, said loudly."""
    candidates, skipped = [], {}
    for name in wanted:
        try:
            candidates.append(BUILDERS[name](ground))
        except (Missing, NotStarted) as err:
            skipped[name] = str(err)
            say(f"SKIPPED {name}: {err}")
    return candidates, skipped


def rounds(
    document: Document, candidates: Sequence[Candidate], cases: Sequence[Case], options: argparse.Namespace
) -> None:
    """All cases on all candidates in turn, round after round; the order of the candidates moves on by one each time."""
    document["cases"] = {case.name: {one.name: [] for one in candidates} for case in cases}
    for number in range(options.repeats):
        shift = number % len(candidates) if candidates else 0
        for case in cases:
            for candidate in [*candidates[shift:], *candidates[:shift]]:
                sample(document, case, candidate, number, options)


def sample(document: Document, case: Case, candidate: Candidate, number: int, options: argparse.Namespace) -> None:
    """One repeat into the document: its sample, or why it was refused."""
    rows = document["cases"][case.name][candidate.name]
    try:
        rows.append(case.run(candidate, options.seconds, options.mebibytes))
    except (Refused, OSError) as err:
        rows.append({"refused": str(err)})
        say(f"REFUSED {case.name} on {candidate.name}: {err}")
        return
    seen = cpu(document, case.name, candidate.name).get(number)
    unit = "µs/request" if case.unit == "request" else "s/GiB"
    spent = f"{seen:6.2f} {unit}" if seen is not None else ""
    parts = {role: cpu(document, case.name, candidate.name, role)[number] for role in rows[-1]["cpu"]}
    detail = " + ".join(f"{role} {value:.2f}" for role, value in parts.items()) if len(parts) > 1 else ""
    rate = rows[-1]["count"] / rows[-1]["seconds"] / (1 if case.unit == "request" else MIB)
    what = "/s" if case.unit == "request" else "MiB/s"
    clock = time.strftime("%H:%M:%S")
    say(
        f"{clock}  {number + 1}/{options.repeats}  {case.name:13} {candidate.name:19} {rate:8.0f} {what:6} {spent} {detail}"
    )


def take(document: Document, name: str, ground: Ground, repeats: int) -> None:
    """One measure of Portico alone into the document."""
    try:
        figures = MEASURES[name](ground, repeats)
    except (Refused, NotStarted, OSError) as err:
        document["skipped"][name] = str(err)
        say(f"REFUSED {name}: {err}")
        return
    document["platform"][name] = figures
    shown = ", ".join(f"{key} {_short(value)}" for key, value in figures.items())
    say(f"{time.strftime('%H:%M:%S')}  {name}: {shown}")


def _short(value: object) -> str:
    return " ".join(f"{one:.2f}" for one in value) if isinstance(value, list) else f"{value:.2f}"


def keep(document: Document) -> None:
    LAST.parent.mkdir(exist_ok=True)
    LAST.write_text(json.dumps(document, indent=1) + "\n")


def write_page(document: Document) -> None:
    PAGE.write_text(report.markdown(document))
    PAGE.with_suffix(".svg").write_text(chart.chart(document))
    PAGE.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted; everything that was started has ended")
        sys.exit(130)
