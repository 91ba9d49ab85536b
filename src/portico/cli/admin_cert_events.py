"""`portico admin cert-events`: forget what a source of certificate events told, when it told too much."""

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

group = typer.Typer(help="Events about certificates, from sources that were trusted.", rich_markup_mode=None)
_MAX_REASON = 500


@group.callback()
def main() -> None:
    """Events about certificates, from sources that were trusted."""


@group.command()
def forget(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The source's id, src_….", show_default=False)],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; it is kept.", show_default=False)],
    domain: Annotated[
        str | None,
        typer.Option("--domain", metavar="DOMAIN", help="Of this domain alone: its name or id.", show_default=False),
    ] = None,
    from_revision: Annotated[
        int, typer.Option("--from-revision", metavar="N", min=0, help="Only events of this revision and later ones.")
    ] = 0,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, only show what would change.")] = False,
    data: DataOption = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Take events of a source out of the state of its domains, so that what they hid counts again.

    A revision that is far too great hides all later events of a domain. Correct or disable the source first: what it sends
    from now on counts again. Needs the database's address as the API does, or --data.
    """
    why = reason.strip()
    if not why or len(why) > _MAX_REASON or not why.isprintable():
        raise Problem("config.invalid", f"--reason: one line of up to {_MAX_REASON} characters, please")

    async def act(db: Database) -> dict[str, Any]:
        from portico.control.domains import blocking, forgetting
        from portico.control.identity.operators import INSTALLATION

        async with db.transaction() as tx:
            found = await blocking.by_name(tx, domain) if domain is not None else None
            which = forgetting.Which(source, found, from_revision)
            return await forgetting.forget(tx, INSTALLATION, which, why, datetime.now(UTC), dry_run=not yes)

    done = with_database(data, config, act)
    if as_json:
        output.print_json(done)
        return
    rows = [
        (
            each["name"],
            _revision(each["revision"]),
            _revision(each["revision_after"]),
            each["status"],
            each["status_after"],
        )
        for each in done["changed"]
    ]
    output.table(("domain", "revision", "then", "certificate", "then"), rows, empty="No domain would be another.")
    if (more := done["domains"] - len(rows)) > 0:
        output.echo(f"and {more} more")
    verb = "are forgotten" if yes else "would be forgotten; with --yes they are"
    output.echo(f"{done['events']} events of {output.printable(source)} {verb}.")


def _revision(value: int | None) -> str:
    return "-" if value is None else str(value)
