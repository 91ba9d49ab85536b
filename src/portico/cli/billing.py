"""`portico billing`: what the organization pays, its invoices, and its subscription from the first checkout to the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from portico.cli import output
from portico.cli.account import JsonOption, ServerOption, open_browser, with_api
from portico.cli.usage import allowed_text, amount_text
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.api import Api

group = typer.Typer(
    help="What your organization pays: plan, period, use and invoices; without a command, an overview.",
    invoke_without_command=True,
    rich_markup_mode=None,
    epilog="These need an API key with billing:read, and billing:write for what changes something (in PORTICO_AGENT_KEY, or by "
    "`portico login --token`); an agent key serves tunnels and sees no bills.",
)
_PAGE = 100
_PROVIDERS = ("stripe", "razorpay", "paypal")
#: Statuses of a subscription that is over.
_OVER = ("canceled", "completed", "expired")
#: Why one provider does not sell what another may.
_NOT_HERE = frozenset({"billing.provider_unconfigured", "billing.plan_not_sold"})


@group.callback()
def overview(context: typer.Context, server: ServerOption = None, json: JsonOption = False) -> None:
    """Show plan, status, period, use and what is owed, or look after the subscription."""
    if context.invoked_subcommand is not None:
        return

    async def ask(api: Api) -> tuple[dict[str, Any], dict[str, Any]]:
        return await api.call("GET", "billing/subscription"), await api.call("GET", "billing/overage")

    held, month = with_api(server, ask)
    if json:
        output.print_json({**held, "overage": month})
        return
    row = held["subscription"]
    gone = row is None or row["status"] in _OVER
    if gone:
        last = (
            "" if row is None else f" The one for {output.printable(row['plan'] or 'another plan')} is {row['status']}."
        )
        output.echo(f"Plan {output.printable(month['plan'])}. No subscription.{last}")
    else:
        _subscription(row)
    output.echo(f"\nUse of {month['month']}")
    output.table(
        ("limit", "used", "plan has", "beyond it"),
        [
            (
                each["limit"].replace("_", " "),
                amount_text(each["limit"], each["used"]),
                allowed_text(each["limit"], each["allowed"]),
                amount_text(each["limit"], each["beyond"]) if each["beyond"] else "",
            )
            for each in month["use"]
        ],
    )
    for line in month["lines"]:
        output.echo(f"{output.printable(line['description'])}: {_money(line['amount_minor'], month['currency'])}")
    if month["lines"]:
        output.echo(f"So far beyond the plan: {_money(month['total_minor'], month['currency'])}, without tax.")
    if gone:
        output.note("\nBuy a plan with: portico billing checkout PLAN")


def _subscription(row: dict[str, Any]) -> None:
    output.echo(
        f"Plan {output.printable(row['plan'] or 'of another price')}: {row['status']}, paid by {row['provider']}"
    )
    if row["period_start"] and row["period_end"]:
        then = "then it ends" if row["cancel_at_period_end"] else "then it renews"
        output.echo(f"Period {row['period_start'][:10]} to {row['period_end'][:10]}, {then}")
    for case in row["owing"]:
        output.echo(f"Owed {_money(case['amount_minor'], case['currency'])} ({case['state']})")


def _money(minor: int, currency: str | None) -> str:
    from portico.kit.money import MoneyError, decimal_text

    try:
        return f"{decimal_text(minor, currency or '')} {currency}"
    except MoneyError:  # a currency that this version does not know
        return f"{minor} {output.printable(currency or '')} (minor units)"


@group.command()
def checkout(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="The plan to buy, such as pro.", show_default=False)],
    provider: Annotated[
        str | None,
        typer.Option("--provider", help="stripe, razorpay or paypal [the first that sells it].", show_default=False),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    return_url: Annotated[
        str | None,
        typer.Option(
            "--return-url", metavar="URL", help="Where the page leads afterwards [the console].", show_default=False
        ),
    ] = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Print the address of a page on which the plan is paid."""
    if provider is not None and provider not in _PROVIDERS:
        raise Problem("config.invalid", f"--provider {provider!r}: one of {', '.join(_PROVIDERS)}, please")

    async def buy(api: Api) -> dict[str, Any]:
        back = return_url or f"{api.server}/organizations"
        refused: Problem | None = None
        for name in (provider,) if provider is not None else _PROVIDERS:
            body = {"plan": plan, "provider": name, "success_url": back, "cancel_url": back}
            try:
                made: dict[str, Any] = await api.call("POST", "billing/checkout-sessions", body)
                return made
            except Problem as problem:
                if problem.code not in _NOT_HERE:
                    raise
                # That one sells other plans says more than that another is not set up.
                refused = problem if refused is None or problem.code == "billing.plan_not_sold" else refused
        assert refused is not None, "there are providers"
        raise refused

    made = with_api(server, buy)
    if json:
        output.print_json(made)
    else:
        output.echo(output.printable(made["url"]))
        until = f" until {made['expires_at'][:16].replace('T', ' ')} UTC" if made["expires_at"] else ""
        output.note(f"Pay for {output.printable(plan)} on this page of {made['provider']}{until}.")
    if open_:
        open_browser(made["url"])


@group.command()
def invoices(
    pdf: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            "--pdf", metavar="NUMBER FILE", help="Write the invoice of this number as PDF.", show_default=False
        ),
    ] = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """List invoices, newest first, or write one as PDF."""
    if pdf is not None:
        _pdf(pdf[0], pdf[1], server)
        return

    async def ask(api: Api) -> list[dict[str, Any]]:
        return await _all(api)

    rows = with_api(server, ask)
    if json:
        output.print_json(rows)
        return
    output.table(
        ("number", "issued", "period", "total", "tax", "status"),
        [
            (
                row["number"],
                row["issued_at"][:10],
                _period(row),
                _money(row["gross_minor"], row["currency"]),
                _money(row["tax_minor"], row["currency"]),
                _status(row),
            )
            for row in rows
        ],
        empty="No invoices yet.",
    )


def _period(row: dict[str, Any]) -> str:
    return f"{row['period_start'][:10]}..{row['period_end'][:10]}" if row["period_start"] and row["period_end"] else ""


def _status(row: dict[str, Any]) -> str:
    back = f", {_money(row['credited_minor'], row['currency'])} given back" if row["credited_minor"] else ""
    return f"{row['status']}{back}"


def _pdf(number: str, path: Path, server: str | None) -> None:
    async def fetch(api: Api) -> bytes:
        found = [row for row in await _all(api) if number in (row["number"], row["id"])]
        if not found:
            raise Problem("billing.invoice_not_found", f"there is no invoice {number}")
        return await api.content(f"billing/invoices/{quote(found[0]['id'], safe='')}/pdf")

    content = with_api(server, fetch)
    try:
        path.write_bytes(content)
    except OSError as err:
        raise Problem("config.invalid", f"{path}: {err.strerror}") from None
    output.echo(f"{output.printable(number)} is in {path}")


async def _all(api: Api) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        more = f"&cursor={quote(cursor, safe='')}" if cursor else ""
        page = await api.call("GET", f"billing/invoices?limit={_PAGE}{more}")
        rows += page["data"]
        cursor = page.get("next_cursor")
        if not cursor:
            return rows


@group.command()
def cancel(
    now: Annotated[bool, typer.Option("--now", help="At once, not with the period that is paid.")] = False,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="TEXT", help="Why, if you like.", show_default=False)
    ] = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """End the subscription with the period that is paid, or at once. Nothing is given back by this alone."""

    async def end(api: Api) -> dict[str, Any]:
        body = {"at_period_end": not now, **({"reason": reason} if reason else {})}
        done: dict[str, Any] = await api.call("POST", "billing/subscription/cancel", body)
        return done

    done = with_api(server, end)
    if json:
        output.print_json(done)
        return
    row = done["subscription"]
    if now:
        output.echo("The subscription ends now.")
    else:
        output.echo(f"The subscription ends{f' on {_day(row)}' if _day(row) else ' with its period'}.")
        output.note("Take it back with: portico billing resume")


@group.command()
def resume(server: ServerOption = None, json: JsonOption = False) -> None:
    """Take back a cancellation, or go on with a subscription that is paused or suspended."""

    async def on(api: Api) -> dict[str, Any]:
        done: dict[str, Any] = await api.call("POST", "billing/subscription/resume")
        return done

    done = with_api(server, on)
    if json:
        output.print_json(done)
        return
    row = done["subscription"]
    output.echo(f"The subscription goes on{f'; it renews on {_day(row)}' if _day(row) else ''}.")


def _day(row: dict[str, Any] | None) -> str:
    return str(row["period_end"])[:10] if row is not None and row["period_end"] else ""


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.add_typer(group, name="billing")
