"""`portico admin ledger`: close months, check that the books are what was written, and what accounts hold."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico.cli import output
from portico.cli.database import DataOption, with_database
from portico.cli.processes import ConfigOption
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.control.finance.balances import Balance
    from portico.kit.db import Database

group = typer.Typer(
    help="The ledger: sealed periods, proof that nothing was changed, balances.", rich_markup_mode=None,
    invoke_without_command=True,
)  # fmt: skip
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OrganizationOption = Annotated[
    str | None,
    typer.Option("--organization", metavar="ORG", help="Only of this organization, org_….", show_default=False),
]
_HASH = re.compile(r"[0-9a-fA-F]{64}")


@group.callback()
def listing(
    context: typer.Context, data: DataOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Sealed periods, the oldest first, with the hashes to keep elsewhere.

    Needs the database's address as the API does, or --data.
    """
    if context.invoked_subcommand is not None:
        context.obj = (data, config)
        return

    async def act(db: Database) -> list[dict[str, Any]]:
        from portico.control.finance import seals

        async with db.read() as reader:
            return [_seal(row) for row in await seals.every(reader)]

    found = with_database(data, config, act)
    if as_json:
        output.print_json(found)
        return
    rows = [
        (each["starts_on"], each["ends_on"], str(each["transactions"]), each["sealed_by"], each["hash"])
        for each in found
    ]
    output.table(("from", "until", "transactions", "sealed by", "hash"), rows, empty="Nothing is sealed.")


@group.command()
def verify(
    context: typer.Context,
    organization: OrganizationOption = None,
    seal: Annotated[
        list[str] | None,
        typer.Option(
            "--seal",
            metavar="HASH",
            help="The hash of a seal that was kept elsewhere; again for more.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that the books are what was written.

    Every finance event and every transaction is hashed again; that nothing is outside of the chains, that the database still
    guards its tables, and that seals and invoices say what the ledger says. With --organization its two chains alone. Exit code
    1 when something is wrong: docs/runbooks/ledger-chain.md says what to do then.
    """  # fmt: skip
    kept = _hashes(seal or [])

    async def act(db: Database) -> dict[str, Any]:
        from portico.control.billing import books

        found = await books.look(db, organization, kept)
        fault = found.fault and {"place": found.fault.place, "detail": found.fault.detail}
        return {
            "valid": not fault, "chains": found.chains, "events": found.events, "transactions": found.transactions,
            "seals": found.seals, "newest_seal": found.newest_seal, "fault": fault,
        }  # fmt: skip

    data, config = context.obj
    outcome = with_database(data, config, act)
    if organization is not None and not outcome["chains"] and outcome["valid"]:
        raise Problem("request.not_found", f"nothing was ever booked for {organization}")
    if as_json:
        output.print_json(outcome)
    elif outcome["valid"]:
        output.echo(f"valid         {organization or 'all of the books'}")
        output.echo(f"events        {outcome['events']}")
        output.echo(f"transactions  {outcome['transactions']}")
        if organization is None:
            output.echo(f"seals         {outcome['seals']}{f', {len(kept)} of them kept elsewhere' if kept else ''}")
            if (newest := outcome["newest_seal"]) is not None:
                output.echo(f"newest seal   {newest['hash']}  until {newest['ends_on']}")
                if not kept:
                    output.note("Without --seal nobody can tell whether all was hashed anew.")
    if (fault := outcome["fault"]) is not None:
        raise Problem("ledger.broken", f"{fault['place']}: {fault['detail']}")


@group.command()
def seal(
    context: typer.Context,
    until: Annotated[
        str | None,
        typer.Argument(
            metavar="[DAY]", help="Close everything before it; without it, before this month.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Close a period for good: nothing is booked before that day any more. It cannot be undone.

    Its days must be over and their revenue recognized. It is recorded in the installation's audit log. Keep the hash where the
    platform cannot write.
    """  # fmt: skip
    chosen = _day(until, "DAY")

    async def act(db: Database) -> dict[str, Any]:
        from portico.control.audit import service as audit
        from portico.control.finance import seals
        from portico.control.identity import operators

        now = datetime.now(UTC)
        ends_on = chosen or seals.month_start(now.date())
        async with db.transaction() as tx:
            row = await seals.seal(tx, ends_on, operators.INSTALLATION.id, now)
            details = {"ends_on": ends_on.isoformat(), "hash": row.hash.hex()}
            await audit.record(
                tx, operators.INSTALLATION, "ledger.seal", None, details=details, organization=audit.INSTALLATION
            )
        return _seal(row)

    data, config = context.obj
    found = with_database(data, config, act)
    if as_json:
        output.print_json(found)
        return
    output.echo(f"sealed  {found['starts_on']} until {found['ends_on']}, {found['transactions']} transactions")
    output.echo(f"hash    {found['hash']}")


@group.command(name="trial-balance")
def trial_balance(
    context: typer.Context,
    organization: OrganizationOption = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="DAY", help="Booked on this day or later.", show_default=False)
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="DAY", help="Booked before this day.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What every account holds, by currency; the balances of a currency sum to zero. Exit code 1 if they do not.

    Amounts are in the currency's own unit, with --json in minor units. A balance is debits less credits.
    """
    first, end = _day(since, "--since"), _day(until, "--until")

    async def act(db: Database) -> list[Balance]:
        from portico.control.finance import balances

        async with db.read() as reader:
            return await balances.trial(reader, since=first, until=end, organization=organization)

    data, config = context.obj
    found = with_database(data, config, act)
    sums: dict[str, int] = {}
    for each in found:
        sums[each.currency] = sums.get(each.currency, 0) + each.balance_minor
    if as_json:
        output.print_json([_balance(each) for each in found])
    else:
        rows = [
            *(_shown(each) for each in found),
            *((("", "sum", name, "", "", _text(sums[name], name))) for name in sums),
        ]
        output.table(("number", "account", "currency", "debit", "credit", "balance"), rows, empty="Nothing is booked.")
    if off := {name: total for name, total in sums.items() if total}:
        raise Problem("ledger.broken", f"balances do not sum to zero: {off}")


def _shown(each: Balance) -> tuple[str, ...]:
    from portico.control.finance import accounts

    account, of = accounts.known(each.account), each.currency
    amounts = (_text(each.debit_minor, of), _text(each.credit_minor, of), _text(each.balance_minor, of))
    return (str(account.number), account.title, of, *amounts)


def _balance(each: Balance) -> dict[str, Any]:
    from portico.control.finance import accounts

    return {
        "account": each.account, "number": accounts.known(each.account).number, "currency": each.currency,
        "debit_minor": each.debit_minor, "credit_minor": each.credit_minor, "balance_minor": each.balance_minor,
    }  # fmt: skip


def _text(amount: int, currency: str) -> str:
    from portico.kit import money

    return money.decimal_text(amount, currency)


def _seal(row: Any) -> dict[str, Any]:
    return {
        "starts_on": row.starts_on.isoformat(), "ends_on": row.ends_on.isoformat(), "transactions": row.transactions,
        "sealed_by": row.sealed_by, "sealed_at": row.sealed_at.isoformat(), "hash": row.hash.hex(),
    }  # fmt: skip


def _day(text: str | None, name: str) -> date | None:
    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise Problem("config.invalid", f"{name} {text!r} is no day", hint="Example: 2026-11-01") from None


def _hashes(some: list[str]) -> list[str]:
    for each in some:
        if _HASH.fullmatch(each) is None:
            raise Problem("config.invalid", f"--seal {each!r}: 64 hexadecimal digits, please")
    return some
