"""The report of `make soak`, in Markdown."""

from __future__ import annotations

from collections import Counter
from typing import Any


def faults(result: dict[str, Any]) -> list[str]:
    """Everything that was not as it must be."""
    return [fault for part in ("soak", "drills") for fault in result.get(part, {}).get("faults", [])]


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "<!-- Written by make soak; do not edit. -->",
        "",
        "# The last long run",
        "",
        f"{result['date']}, {machine['cores']} cores ({machine['cpu']}), Linux {machine['kernel']}, Python {machine['python']}. "
        "`make soak` writes this page; [testing-and-ci.md](testing-and-ci.md) says what it does and what is allowed.",
        "",
        *_verdict(result),
    ]
    if "soak" in result:
        lines += _soak(result["soak"])
    if "drills" in result:
        lines += _drills(result["drills"])
    return "\n".join(lines) + "\n"


def _verdict(result: dict[str, Any]) -> list[str]:
    found = faults(result)
    if not found:
        return ["**Everything was as it must be.**", ""]
    return ["**Not as it must be:**", "", *(f"- {fault.splitlines()[0][:300]}" for fault in found), ""]


def _causes(failed: dict[str, int]) -> str:
    return ", ".join(f"{count} × {what}" for what, count in sorted(failed.items())) or "none"


def _table(head: list[str], rows: list[list[object]]) -> list[str]:
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*out, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def _soak(soak: dict[str, Any]) -> list[str]:
    kept = soak["kept"]
    return [
        f"## {soak['seconds'] / 60:.0f} minutes under load",
        "",
        f"{soak['requests']:,} requests through one HTTP and one TCP tunnel of `portico start` while one part after the "
        "other was restarted. A failure counts as explained when the request was in flight in a part that was killed.",
        "",
        "### Requests by kind",
        "",
        *_table(
            ["kind", "made", "failed, all within a restart"],
            [[name.replace("_", " "), f"{row['made']:,}", _causes(row["failed"])] for name, row in soak["kinds"].items()],
        ),
        f"A WebSocket and a TCP connection were kept open throughout ({kept['messages']:,} messages) and cut "
        f"{len(kept['cuts'])} times, each time by a restart of relay or agent.",
        "",
        "### Restarts",
        "",
        *_table(
            ["minute", "part", "signal", "back after", "failed requests"],
            [
                [f"{r['at'] / 60:.1f}", r["part"], r["signal"], f"{r['recovery']} s", _causes(r["failed"])]
                for r in soak["restarts"]
            ],
        ),
        "### Memory and descriptors",
        "",
        "The longest-lived process of each part, once it was warm.",
        "",
        *_table(
            ["part", "processes seen", "minutes", "MiB first → last (most)", "MiB a minute", "descriptors first → last (most)",
             "descriptors a minute"],
            [
                [
                    row["part"], row["lives"], row["minutes"],
                    f"{row['memory_first']} → {row['memory_last']} ({row['memory_most']})", row["memory_per_minute"],
                    f"{row['descriptors_first']} → {row['descriptors_last']} ({row['descriptors_most']})",
                    row["descriptors_per_minute"],
                ]
                for row in soak["processes"]
            ],
        ),
    ]  # fmt: skip


def _drills(drills: dict[str, Any]) -> list[str]:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in drills["rows"]:
        by_name.setdefault(row["drill"], []).append(row)
    return [
        f"## Drills, {drills['repeats']} times each",
        "",
        "Under 200 requests a second, half of them on kept connections. *Back* is the longest time without "
        "an answer to anybody; *waited* the longest that one request took.",
        "",
        *_table(
            ["drill", "runs", "requests", "failed", "back: median / most", "waited", "usage counted / answered"],
            [_drill(name, rows) for name, rows in by_name.items()],
        ),
    ]


def _drill(name: str, rows: list[dict[str, Any]]) -> list[object]:
    failed: Counter[str] = Counter()
    for row in rows:
        failed.update(row["failed"])
    requests = sum(row["requests"] for row in rows)
    back = sorted(row["recovery"] for row in rows)
    answered = requests - sum(failed.values())
    return [
        name, len(rows), f"{requests:,}", _causes(failed), f"{back[len(back) // 2]} / {back[-1]} s",
        f"{max(row['slowest'] for row in rows)} s", f"{sum(row['counted'] for row in rows):,} / {answered:,}",
    ]  # fmt: skip
