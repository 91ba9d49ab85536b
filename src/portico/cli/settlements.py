"""`portico admin settlements`: what sinks and providers say was settled, and whether it is what we have."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico import settings
from portico.cli import output
from portico.cli.database import DataOption, with_database
from portico.cli.processes import ConfigOption
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.kit.db import Database

group = typer.Typer(
    help="Settlements: receipts of what was settled outside, compared with the books.", rich_markup_mode=None,
    invoke_without_command=True,
)  # fmt: skip
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StateOption = Annotated[
    str | None,
    typer.Option("--state", help="received, verified, matched, delta, failed or resolved.", show_default=False),
]
ReceiptArgument = Annotated[str, typer.Argument(metavar="RECEIPT", help="Its id, stl_….", show_default=False)]
ReasonOption = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Why; it is kept in the audit log.", show_default=False)
]
_STATES = ("received", "verified", "matched", "delta", "failed", "resolved")
_MAX_REASON = 500


@group.callback()
def listing(
    context: typer.Context,
    state: StateOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000)] = 50,
    data: DataOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Receipts, the newest first.

    Needs the database's address as the API does, or --data.
    """
    if context.invoked_subcommand is not None:
        context.obj = (data, config)
        return

    async def act(db: Database) -> list[dict[str, Any]]:
        from portico.control.billing import settlement

        async with db.read() as reader:
            return await settlement.newest(reader, {"state": _state(state)}, limit)

    found = with_database(data, config, act)
    if as_json:
        output.print_json(_plain(found))
        return
    rows = [
        (
            each["id"],
            each["batch_id"],
            each["provider"],
            _period(each),
            each["resolution"] or each["state"],
            _deltas(each),
        )
        for each in found
    ]
    output.table(("receipt", "batch", "provider", "period", "state", "delta"), rows, empty="There are none.")


@group.command()
def show(context: typer.Context, receipt: ReceiptArgument, as_json: JsonOption = False) -> None:
    """One receipt: what its latest comparison came to, currency by currency, and the lines that differ."""

    async def act(db: Database) -> dict[str, Any]:
        from portico.control.billing import settlement

        async with db.read() as reader:
            return await settlement.document(reader, receipt)

    data, config = context.obj
    found = with_database(data, config, act)
    if as_json:
        output.print_json(_plain(found))
        return
    output.echo(f"receipt  {found['id']}  batch {output.printable(found['batch_id'])}, version {found['revision']}")
    output.echo(f"period   {_period(found)}  {found['provider']} {output.printable(found['account'])}")
    output.echo(f"state    {found['resolution'] or found['state']}{': ' + found['reason'] if found['reason'] else ''}")
    report = found["report"] or {"currencies": [], "findings": []}
    for each in report["currencies"]:
        bps = "-" if each["delta_bps"] is None else f"{each['delta_bps']} bp"
        output.echo(
            f"{each['currency']}      net {each['ours']['net']}, theirs less ours {each['delta_minor']} ({bps})"
        )
    rows = [
        (each["found"], each["kind"], each["ref"], each["currency"], str(each["ours_minor"]), str(each["theirs_minor"]))
        for each in report["findings"]
    ]
    if rows:
        output.table(("found", "kind", "reference", "currency", "ours", "theirs"), rows)


@group.command()
def reconcile(
    context: typer.Context,
    reason: ReasonOption,
    receipt: Annotated[
        str | None, typer.Argument(metavar="[RECEIPT]", help="One of them; else those that fit.", show_default=False)
    ] = None,
    state: StateOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000)] = 100,
    as_json: JsonOption = False,
) -> None:
    """Compare a receipt again, or those in a state (by default delta); the worker `billing` does it.

    Harmless: a comparison that comes to the same as before adds nothing to the history.
    """
    why = _reason(reason)
    wanted = _state(state) or "delta"

    def act(chosen: settings.ApiSettings) -> Any:
        async def run(db: Database) -> list[str]:
            from portico.control.identity import operators

            service = _service(chosen, db)
            async with db.transaction() as tx:
                if receipt is None:
                    found: list[str] = await service.again_many(
                        tx, operators.INSTALLATION, {"state": wanted}, why, limit
                    )
                    return found
                await service.again(tx, operators.INSTALLATION, receipt, why)
                return [receipt]

        return run

    data, config = context.obj
    ids = with_database(data, config, act(_control(data, config)))
    if as_json:
        output.print_json({"receipts": ids})
        return
    output.echo(f"{len(ids)} {'receipt is' if len(ids) == 1 else 'receipts are'} compared again")


@group.command()
def resolve(
    context: typer.Context,
    receipt: ReceiptArgument,
    resolution: Annotated[
        str, typer.Argument(metavar="accepted|disputed", help="How the delta is closed.", show_default=False)
    ],
    reason: ReasonOption,
) -> None:
    """Close a delta: `accepted` writes what is left of it into the ledger, `disputed` writes nothing."""
    why = _reason(reason)
    if resolution not in ("accepted", "disputed"):
        raise Problem("config.invalid", f"{resolution!r} is neither accepted nor disputed")
    data, config = context.obj
    chosen = _control(data, config)

    async def act(db: Database) -> dict[str, Any]:
        from portico.control.identity import operators

        async with db.transaction() as tx:
            found: dict[str, Any] = await _service(chosen, db).resolve(
                tx, operators.INSTALLATION, receipt, resolution, why
            )
            return found

    found = with_database(data, config, act)
    output.echo(f"{found['id']} is resolved ({found['resolution']})")


@group.command(name="import")
def import_rows(
    context: typer.Context,
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON: rows as the provider's API gives them.", show_default=False)
    ],
    provider: Annotated[str, typer.Option("--provider", help="stripe or razorpay.", show_default=False)],
    account: Annotated[str, typer.Option("--account", help="The account at the provider.", show_default=False)],
    batch: Annotated[
        str, typer.Option("--batch", help="The payout or settlement; names the batch.", show_default=False)
    ],
    start: Annotated[datetime, typer.Option("--from", help="Begin of the period, UTC.", show_default=False)],
    end: Annotated[datetime, typer.Option("--until", help="Its end, not included.", show_default=False)],
    live: Annotated[bool, typer.Option("--live/--test", help="The mode of the account.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Take a provider's own rows as a receipt: balance transactions of Stripe, settlement recon rows of Razorpay.

    FILE holds a list, or an answer of the API with a list in `data` or `items`.
    """
    from datetime import UTC

    rows = _rows(path)
    data, config = context.obj
    chosen = _control(data, config)

    async def act(db: Database) -> dict[str, str]:
        from portico.control.identity import operators

        taken = await _service(chosen, db).imported(
            operators.INSTALLATION, provider, rows, batch_id=batch, account=account, livemode=live,
            period_start=start.replace(tzinfo=start.tzinfo or UTC), period_end=end.replace(tzinfo=end.tzinfo or UTC),
        )  # fmt: skip
        return {"receipt": taken.receipt, "status": taken.status}

    found = with_database(data, config, act)
    if as_json:
        output.print_json(found)
        return
    output.echo(f"{found['receipt']} {found['status']}")


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise Problem("config.invalid", f"{path}: {err.strerror}") from None
    except ValueError:
        raise Problem("config.invalid", f"{path} is not JSON") from None
    if isinstance(document, dict):
        document = document.get("data", document.get("items"))
    if not isinstance(document, list) or not all(isinstance(each, dict) for each in document):
        raise Problem("config.invalid", f"{path} holds no list of rows")
    return document


def _control(data: Path | None, config: Path | None) -> settings.ApiSettings:
    """The API's settings: receipts are sealed under its master key."""
    if data is None:
        return settings.load(settings.ApiSettings, table="api", file=config)
    from portico.embedded.secretfiles import MASTER_KEY

    url = settings.Secret("postgresql:///unused")
    overrides = {"database_url": url, "master_key": settings.secret_in_file("--data", data / MASTER_KEY)}
    return settings.load(settings.ApiSettings, table="api", file=config, overrides=overrides)


def _service(chosen: settings.ApiSettings, db: Database) -> Any:
    from portico.control.billing.settlement import Settlements
    from portico.kit.clock import SystemClock
    from portico.kit.sealing import Sealer

    return Settlements(chosen, db, SystemClock(), Sealer(chosen.master_key))


def _state(state: str | None) -> str | None:
    if state is not None and state not in _STATES:
        raise Problem("config.invalid", f"--state {state!r}: one of {', '.join(_STATES)}, please")
    return state


def _reason(text: str) -> str:
    if not 0 < len(text.strip()) <= _MAX_REASON:
        raise Problem("config.invalid", f"--reason: 1 to {_MAX_REASON} characters, please")
    return text.strip()


def _period(found: dict[str, Any]) -> str:
    return f"{found['period_start']:%Y-%m-%d}..{found['period_end']:%Y-%m-%d}"


def _deltas(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {each['delta_minor']}" for name, each in sorted(found["deltas"].items())) or "-"


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.isoformat() if isinstance(value, datetime) else value
