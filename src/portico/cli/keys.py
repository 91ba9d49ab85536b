"""`portico keys`: the keys of an organization, from the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico.cli import output
from portico.cli.account import JsonOption, ServerOption, with_api
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.api import Api

group = typer.Typer(
    help="Agent keys and API keys of your organization.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog="These need an API key with keys:own or keys:write (in PORTICO_AGENT_KEY, or by `portico login --token`); an agent "
    "key serves tunnels and manages no keys.",
)
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="The key's id, key_….", show_default=False)]
_PAGE = 100


async def _pages(api: Api, path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        more = f"&cursor={cursor}" if cursor else ""
        page = await api.call("GET", f"{path}?limit={_PAGE}{more}")
        rows += page["data"]
        cursor = page.get("next_cursor")
        if not cursor:
            return rows


def _day(text: str | None, otherwise: str) -> str:
    return text[:10] if text else otherwise


@group.command(name="list")
def list_keys(server: ServerOption = None, json: JsonOption = False) -> None:
    """List live keys, newest first: what they may do, from where, until when, and when they were last used."""

    async def ask(api: Api) -> list[dict[str, Any]]:
        return await _pages(api, "api-keys")

    rows = with_api(server, ask)
    if json:
        output.print_json({"data": rows})
        return
    output.table(
        ["id", "kind", "name", "prefix", "from", "expires", "last used"],
        (
            [
                row["id"],
                row["kind"],
                row["name"],
                row["prefix"],
                _short(row["allowed_cidrs"]),
                _day(row["expires_at"], "never"),
                _day(row["last_used_at"], "never"),
            ]
            for row in rows
        ),
        empty="No keys.",
    )


def _short(cidrs: list[str]) -> str:
    if not cidrs:
        return "anywhere"
    return cidrs[0] if len(cidrs) == 1 else f"{cidrs[0]} +{len(cidrs) - 1}"


@group.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for, such as the machine or program.", show_default=False)],
    kind: Annotated[str, typer.Option("--kind", help="agent, to serve tunnels; api, for programs.")] = "agent",
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="Permission of an API key; again for more [all of yours].", show_default=False),
    ] = None,
    allow_cidr: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-cidr",
            metavar="CIDR",
            help="Network that it may be used from; again for more [anywhere].",
            show_default=False,
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option("--expires", metavar="IN", help="Life, such as 12h or 90d [unlimited].", show_default=False),
    ] = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Make a key. Its text is printed this once, alone on standard output."""
    if kind not in ("agent", "api"):
        raise Problem("config.invalid", f"--kind {kind}: agent or api, please")
    body: dict[str, Any] = {"kind": kind, "name": name}
    if scope:
        body["scopes"] = scope
    if allow_cidr:
        body["allowed_cidrs"] = allow_cidr
    if expires:
        body["expires_at"] = (datetime.now(UTC) + _life(expires)).isoformat()

    async def make(api: Api) -> dict[str, Any]:
        made: dict[str, Any] = await api.call("POST", "api-keys", body)
        return made

    _show_new(with_api(server, make), json)


_UNITS = {"m": 60, "h": 3600, "d": 86_400}
_LONGEST = timedelta(days=3650)


def _life(text: str) -> timedelta:
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdigit() and len(number) < 8 and unit in _UNITS):
        raise Problem("config.invalid", f"--expires {text}: a number with m, h or d, such as 12h or 90d")
    life = timedelta(seconds=int(number) * _UNITS[unit])
    if not timedelta() < life <= _LONGEST:
        raise Problem("config.invalid", f"--expires {text}: between 1m and {_LONGEST.days}d")
    return life


def _show_new(made: dict[str, Any], json: bool) -> None:
    if json:
        output.print_json(made)
        return
    output.echo(made["key"])
    until = f", until {_day(made['expires_at'], '')}" if made["expires_at"] else ""
    where = f", from {', '.join(made['allowed_cidrs'])}" if made["allowed_cidrs"] else ""
    output.note(f"{made['id']}  {output.printable(made['name'])}{where}{until}. The key is shown this once.")


@group.command()
def rotate(
    key: KeyArgument,
    overlap: Annotated[
        str | None,
        typer.Option("--overlap", metavar="FOR", help="How long the old one still works, such as 1h [not at all]."),
    ] = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Replace a key by a new one with the same rights. Its text is printed this once."""
    seconds = int(_life(overlap).total_seconds()) if overlap else 0

    async def turn(api: Api) -> dict[str, Any]:
        made: dict[str, Any] = await api.call("POST", f"api-keys/{_id(key)}/rotate", {"overlap_seconds": seconds})
        return made

    _show_new(with_api(server, turn), json)


@group.command()
def revoke(key: KeyArgument, server: ServerOption = None) -> None:
    """End a key now, with the tunnels that agents serve with it."""

    async def end(api: Api) -> None:
        await api.call("DELETE", f"api-keys/{_id(key)}")

    with_api(server, end)
    output.echo(f"revoked {key}")


@group.command()
def posture(server: ServerOption = None, json: JsonOption = False) -> None:
    """Show what is wrong with keys: too old, not used, too mighty, usable from anywhere; and what to do.

    Exit code 1 when something is severe.
    """

    async def ask(api: Api) -> dict[str, Any]:
        found: dict[str, Any] = await api.call("GET", "api-keys/posture")
        return found

    report = with_api(server, ask)
    if json:
        output.print_json(report)
    else:
        _show_posture(report)
    if report["findings"]["high"]:
        raise typer.Exit(output.FAILED)


def _show_posture(report: dict[str, Any]) -> None:
    for row in report["data"]:
        used = f"last used {_day(row['last_used_at'], '')}" if row["last_used_at"] else "never used"
        maker = output.printable(row["maker"] or "nobody")
        output.echo(
            f"{row['id']}  {output.printable(row['name'])}  ({row['kind']}, {row['age_days']} d old, {used}, {maker})"
        )
        for finding in row["findings"]:
            output.echo(f"  {finding['severity']:<7} {finding['code']:<13} {finding['advice']}")
    counts, keys = report["findings"], report["keys"]
    summary = ", ".join(f"{counts[name]} {name}" for name in ("high", "medium", "low"))
    output.echo(f"{keys} {'key' if keys == 1 else 'keys'}; findings: {summary}")


def _id(key: str) -> str:
    if not (key.startswith("key_") and key.isascii() and key.replace("_", "").isalnum()):
        raise Problem(
            "config.invalid", "this is not a key's id", hint="Ids begin with key_; `portico keys list` shows them."
        )
    return key


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.add_typer(group, name="keys")
