"""`portico admin grant|revoke|list`: who is a platform operator. There is no other way to become one."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico.cli import output
from portico.cli.database import DataOption, with_database
from portico.cli.processes import ConfigOption
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.kit.db import Database

EmailArgument = Annotated[
    str, typer.Argument(metavar="EMAIL", help="The address of the person's account.", show_default=False)
]
ReasonOption = Annotated[
    str | None, typer.Option("--reason", metavar="TEXT", help="Why; it is kept in the log.", show_default=False)
]
_MAX_REASON = 500


def grant(
    email: EmailArgument,
    reason: ReasonOption = None,
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires",
            metavar="WHEN",
            help="Until when: 8h, 30d, or a time such as 2030-01-31T18:00:00Z; without it until revoked.",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a person a platform operator, or give their grant another expiry or reason.

    The person needs an account. Works with the database's address as the API does, or --data; no route of the API can
    do this. It is recorded in the installation's audit log.
    """  # fmt: skip
    until, why = _until(expires), _reason(reason)

    async def act(db: Database) -> None:
        from portico.control.identity import operators
        from portico.control.identity.service import normal_email

        async with db.transaction() as tx:
            await operators.grant(
                tx,
                operators.INSTALLATION,
                await operators.by_email(tx, normal_email(email)),
                now=datetime.now(UTC),
                expires_at=until,
                reason=why,
                details=_by(),
            )

    with_database(data, config, act)
    output.echo(f"{output.printable(email)} is a platform operator{f' until {_shown(until)}' if until else ''}")


def revoke(
    email: EmailArgument, reason: ReasonOption = None, data: DataOption = None, config: ConfigOption = None
) -> None:
    """Make a person no platform operator any more; it takes effect at once, in sessions that are open too.

    The last one whose grant does not expire stays.
    """
    why = _reason(reason)

    async def act(db: Database) -> None:
        from portico.control.identity import operators
        from portico.control.identity.service import normal_email

        async with db.transaction() as tx:
            who = await operators.by_email(tx, normal_email(email))
            await operators.revoke(tx, operators.INSTALLATION, who, now=datetime.now(UTC), reason=why, details=_by())

    with_database(data, config, act)
    output.echo(f"{output.printable(email)} is no platform operator any more")


def listing(
    data: DataOption = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the platform operators: who made them one, when, why, until when."""

    async def act(db: Database) -> list[dict[str, Any]]:
        from portico.control.identity import operators

        async with db.read() as reader:
            return [row._asdict() for row in await operators.listing(reader)]

    found = with_database(data, config, act)
    now = datetime.now(UTC)
    for row in found:
        row["state"] = "disabled" if row["disabled_at"] else "expired" if _over(row, now) else "live"
    if as_json:
        names = ("email", "user_id", "state", "granted_at", "granted_by", "reason", "expires_at")
        output.print_json([{name: _plain(row[name]) for name in names} for row in found])
        return
    rows = [
        (row["email"], row["state"], _shown(row["granted_at"]), _shown(row["expires_at"]), row["reason"] or "-")
        for row in found
    ]
    output.table(("operator", "state", "since (UTC)", "until (UTC)", "reason"), rows, empty="Nobody is one.")


def _over(row: dict[str, Any], now: datetime) -> bool:
    return row["expires_at"] is not None and row["expires_at"] <= now


def _by() -> dict[str, Any]:
    """Who ran the command, as far as the machine knows."""
    try:
        return {"system_user": getpass.getuser()}
    except (KeyError, OSError):
        return {}


def _reason(text: str | None) -> str | None:
    if text is not None and (len(text) > _MAX_REASON or not text.isprintable()):
        raise Problem("config.invalid", f"--reason: one line of at most {_MAX_REASON} characters, please")
    return text


def _until(text: str | None) -> datetime | None:
    if text is None:
        return None
    unit = {"m": "minutes", "h": "hours", "d": "days"}.get(text[-1:])
    try:
        if unit and text[:-1].isascii() and text[:-1].isdigit():
            return datetime.now(UTC) + timedelta(**{unit: int(text[:-1])})
        found = datetime.fromisoformat(text)
        if found.tzinfo is None:
            raise ValueError
        return found.astimezone(UTC)
    except (ValueError, OverflowError):
        hint = "Examples: 90m, 8h, 30d, 2030-01-31T18:00:00Z"
        raise Problem("config.invalid", f"--expires {text!r} is no time", hint=hint) from None


def _shown(at: datetime | None) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M}" if at is not None else "-"


def _plain(value: Any) -> Any:
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value


def register(group: typer.Typer) -> None:
    """Add the commands to `portico admin`."""
    group.command()(grant)
    group.command()(revoke)
    group.command(name="list")(listing)
