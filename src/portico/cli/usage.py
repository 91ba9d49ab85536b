"""`portico usage`: what the plan allows, and how much of it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from portico.cli import output
from portico.cli.account import JsonOption, ServerOption, with_api

if TYPE_CHECKING:
    from portico.agent.api import Api

#: Limits in bytes, shown in larger units.
_BYTES = "bytes_per_month"


def usage(server: ServerOption = None, json: JsonOption = False) -> None:
    """Show what the plan of this organization allows, and how much of it is used."""

    async def ask(api: Api) -> tuple[dict[str, Any], dict[str, Any]]:
        return await api.call("GET", "org/plan"), await api.call("GET", "usage")

    plan, used = with_api(server, ask)
    if json:
        output.print_json({**plan, "usage": used})
        return
    month = used["month"]
    monthly = {limit["name"]: limit for limit in month["limits"]}
    rows = []
    for limit in plan["limits"]:
        name = limit["name"]
        count = monthly[name]["used"] if name in monthly else limit["used"]
        if count is not None:
            rows.append(
                (
                    name.replace("_", " "),
                    amount_text(name, count),
                    allowed_text(name, limit["allowed"]),
                    _bar(limit, count),
                )
            )
    output.echo(f"Plan {plan['plan']['name']}, {month['month']}")
    output.table(("limit", "used", "allowed", ""), rows)
    missing = [feature["about"] for feature in plan["features"] if not feature["has"]]
    if missing:
        output.echo(f"Not in this plan: {', '.join(missing)}.")
    if month["refused"]:
        output.echo(
            f"This month's traffic is used up: visitors are refused until {month['resets_at']}, or a larger plan."
        )


def amount_text(name: str, count: int) -> str:
    """A count of a limit as people read it."""
    if name != _BYTES:
        return f"{count:,}"
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def allowed_text(name: str, most: int | None) -> str:
    """The same of what is allowed."""
    return "no limit" if most is None else amount_text(name, most)


def _bar(limit: dict[str, Any], count: int) -> str:
    most = limit["allowed"]
    if most is None:
        return ""
    return f"{count * 100 // most} %" if most else ("full" if count else "")


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command()(usage)
