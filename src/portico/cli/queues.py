"""`portico admin queues`: how long the queues are, which jobs are dead and why, and another try for them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from portico.cli import output
from portico.cli.database import DataOption, with_database
from portico.cli.processes import ConfigOption

if TYPE_CHECKING:
    from portico.kit.db import Database

group = typer.Typer(
    help="Background jobs: how many wait, which are dead and why.", rich_markup_mode=None, invoke_without_command=True
)
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON array.")]
KindArgument = Annotated[str, typer.Argument(metavar="KIND", help="A kind of jobs, as the list calls it.")]
IdOption = Annotated[
    list[str] | None,
    typer.Option("--id", metavar="ID", help="Only this job; again for more.", show_default=False),
]
ErrorOption = Annotated[
    str | None,
    typer.Option("--error", metavar="TEXT", help="Only jobs whose last error contains this.", show_default=False),
]


@group.callback()
def listing(
    context: typer.Context, data: DataOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Background jobs: how many wait, which are dead and why.

    Needs the database's address as the API does, or --data.
    """
    if context.invoked_subcommand is not None:
        context.obj = (data, config)
        return
    from portico.worker import queues

    found = with_database(data, config, queues.listing)
    if as_json:
        output.print_json(
            [{"kind": kind, "worker": worker, **dataclasses.asdict(counts)} for kind, worker, counts in found]
        )
        return
    rows = [
        (kind, worker, *(str(n) for n in (c.waiting, c.later, c.leased, c.dead)), _age(c.oldest_seconds))
        for kind, worker, c in found
    ]
    output.table(("kind", "worker", "waiting", "later", "at work", "dead", "oldest"), rows)


@group.command()
def dead(
    context: typer.Context,
    kind: KindArgument,
    ids: IdOption = None,
    error: ErrorOption = None,
    as_json: JsonOption = False,
) -> None:
    """List dead jobs of a kind, with their last error."""
    from portico.worker import queues

    wanted, (data, config) = queues.named(kind), context.obj
    found = with_database(data, config, lambda db: queues.dead(db, wanted, ids, error))
    if as_json:
        output.print_json([dataclasses.asdict(job) for job in found])
        return
    rows = [(job.id, str(job.attempts), f"{job.died_at:%Y-%m-%d %H:%M:%S}", job.error) for job in found]
    output.table(("job", "attempts", "died (UTC)", "last error"), rows, empty=f"No job of {kind} is dead.")


@group.command()
def replay(
    context: typer.Context,
    kind: KindArgument,
    ids: IdOption = None,
    error: ErrorOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which would be replayed.")] = False,
) -> None:
    """Give dead jobs of a kind all their attempts again; it is audited.

    All of them (1,000 at a time), or those that --id and --error select.
    """
    from portico.worker import queues

    wanted, (data, config) = queues.named(kind), context.obj

    async def act(db: Database) -> tuple[int, int]:
        found = [job.id for job in await queues.dead(db, wanted, ids, error)]
        return len(found), 0 if dry_run or not found else await queues.replay(db, wanted, found)

    found, replayed = with_database(data, config, act)
    if dry_run:
        output.echo(f"{_jobs(found)} of {kind} would be replayed")
    else:
        output.echo(f"{_jobs(replayed)} of {kind} will be tried again")


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


def _age(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f}s" if seconds >= 1 else "-"
    return f"{seconds / 60:.0f}m" if seconds < 3600 else f"{seconds / 3600:.0f}h"
