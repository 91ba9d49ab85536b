"""`portico admin domains`: domains of all organizations; block one, and let it be served again."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico.cli import output
from portico.cli.database import DataOption, with_database
from portico.cli.processes import ConfigOption
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.kit.db import Database

group = typer.Typer(
    help="Domains of all organizations: block one that does harm.", rich_markup_mode=None, invoke_without_command=True
)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DomainArgument = Annotated[
    str, typer.Argument(metavar="DOMAIN", help="A name that somebody proved, or an id, dom_….", show_default=False)
]
ReasonOption = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Why; its organization sees it.", show_default=False)
]
_MAX_REASON, _MOST = 500, 1000


@group.callback()
def listing(
    context: typer.Context, data: DataOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Domains that are blocked.

    Needs the database's address as the API does, or --data.
    """
    if context.invoked_subcommand is not None:
        context.obj = (data, config)
        return

    async def act(db: Database) -> list[dict[str, Any]]:
        from portico.control.domains import blocking

        async with db.read() as reader:
            return await blocking.blocked(reader, _MOST)

    found = with_database(data, config, act)
    if as_json:
        output.print_json([_plain(row) for row in found])
        return
    rows = [
        (row["name"], row["organization"], row["dns_error"] or "-", f"{row['updated_at']:%Y-%m-%d %H:%M}")
        for row in found
    ]
    output.table(("domain", "organization", "why", "since (UTC)"), rows, empty="None is blocked.")


@group.command()
def block(context: typer.Context, domain: DomainArgument, reason: ReasonOption, as_json: JsonOption = False) -> None:
    """Serve a domain no longer. Relays stop within 2 s; it is recorded in its organization's audit log."""
    _say(_change(context, "block", domain, reason), as_json)


@group.command()
def unblock(context: typer.Context, domain: DomainArgument, reason: ReasonOption, as_json: JsonOption = False) -> None:
    """Serve a domain again, by the tunnel that it led to; its records are looked at right afterwards."""
    _say(_change(context, "unblock", domain, reason), as_json)


def _change(context: typer.Context, verb: str, domain: str, reason: str) -> dict[str, Any]:
    why = reason.strip()
    if not why or len(why) > _MAX_REASON or not why.isprintable():
        raise Problem("config.invalid", f"--reason: one line of up to {_MAX_REASON} characters, please")

    async def act(db: Database) -> dict[str, Any]:
        from portico.control.domains import blocking
        from portico.control.identity.operators import INSTALLATION

        change = blocking.block if verb == "block" else blocking.unblock
        async with db.transaction() as tx:
            found = await blocking.by_name(tx, domain)
            return blocking.shown(await change(tx, INSTALLATION, found, why, datetime.now(UTC)))

    data, config = context.obj
    return with_database(data, config, act)


def _say(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json(_plain(row))
    else:
        output.echo(f"{output.printable(row['name'])} is {row['hostname_status']}")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in row.items()}
