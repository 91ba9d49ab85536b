"""`portico domains`: names of your own, from the record to set to the tunnel that serves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from portico.cli import output
from portico.cli.account import JsonOption, ServerOption, with_api
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.api import Api

group = typer.Typer(
    help="Domains of your own: add one, set the DNS records that it shows, verify, route it to a tunnel.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
DomainArgument = Annotated[
    str,
    typer.Argument(metavar="DOMAIN", help="Its name, such as www.example.com, or its id, dom_….", show_default=False),
]
_PAGE = 100
_MARKS = {"ok": "ok", "missing": "missing", "wrong": "wrong", "unknown": "not known", "unchecked": "not looked at"}
#: What is wrong, in words, by ``dns_error``.
_ERRORS = {
    "ownership_missing": "its TXT record is not there",
    "claimed": "another organization has this name, and its record is still there",
    "taken_over": "another organization proved that it is theirs",
    "not_pointing": "it is yours, and leads nowhere yet",
    "pointing_elsewhere": "it is yours, and leads elsewhere",
    "alias_loop": "its CNAME records lead in a circle",
    "resolvers_disagree": "resolvers do not agree yet",
    "resolvers_silent": "its name servers do not answer",
    "blocked": "the operator of this platform has blocked it",
    "blocked_upstream": "whoever has its certificates made says that it is blocked",
    "moved_upstream": "whoever has its certificates made says that it has moved",
}


async def _all(api: Api) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        more = f"&cursor={cursor}" if cursor else ""
        page = await api.call("GET", f"domains?limit={_PAGE}{more}")
        rows += page["data"]
        cursor = page.get("next_cursor")
        if not cursor:
            return rows


async def _find(api: Api, text: str) -> dict[str, Any]:
    """The domain of this name or id; of several of a name the one that is not lost. Raises ``domain.not_found``."""
    wanted = text.strip().rstrip(".").lower()
    found = [row for row in await _all(api) if text == row["id"] or wanted in (row["name"], row["display_name"])]
    if not found:
        raise Problem("domain.not_found", f"there is no domain {text}")
    return min(found, key=lambda row: row["hostname_status"] == "deleted")


def _path(row: dict[str, Any], verb: str = "") -> str:
    return f"domains/{quote(row['id'], safe='')}{verb}"


@group.command()
def add(
    domain: Annotated[
        str, typer.Argument(help="A name, or *.name for every name one label below.", show_default=False)
    ],
    tls_mode: Annotated[
        str,
        typer.Option("--tls-mode", help="terminate: the platform has the certificate; passthrough: your service has."),
    ] = "terminate",
    failure_policy: Annotated[
        str, typer.Option("--failure-policy", help="While its certificate fails: standard, strict or hold.")
    ] = "standard",
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Add a domain, and show the DNS records to set."""

    async def make(api: Api) -> dict[str, Any]:
        body = {"name": domain, "tls_mode": tls_mode, "failure_policy": failure_policy}
        made: dict[str, Any] = await api.call("POST", "domains", body)
        return made

    made = with_api(server, make)
    if json:
        output.print_json(made)
        return
    output.echo(f"{output.printable(made['display_name'])} added. Set these DNS records:\n")
    _records(made["records"])
    output.note(f"\nThen: portico domains verify {output.printable(made['name'])}")


@group.command()
def verify(domain: DomainArgument, server: ServerOption = None, json: JsonOption = False) -> None:
    """Look at a domain's records now, and say what to fix. Exit code 1 while it is not verified."""

    async def look(api: Api) -> dict[str, Any]:
        seen: dict[str, Any] = await api.call("POST", _path(await _find(api, domain), "/verify"))
        return seen

    seen = with_api(server, look)
    if json:
        output.print_json(seen)
    else:
        _show(seen)
    if seen["hostname_status"] not in ("verified", "active"):
        raise typer.Exit(output.FAILED)


def _show(row: dict[str, Any]) -> None:
    why = _ERRORS.get(row["dns_error"] or "", "")
    output.echo(f"{output.printable(row['display_name'])}: {row['hostname_status']}{f' ({why})' if why else ''}")
    for record in row["records"]:
        state = _MARKS.get(record["state"], record["state"])
        output.echo(f"  {record['type']:<5} {output.printable(record['name'])}  {state}")
        if record["fix"]:
            output.echo(f"        {output.printable(record['fix'])}")
            if record["found"]:
                output.echo(f"        found: {output.printable(', '.join(record['found']))}")
    if row["hostname_status"] in ("verified", "active") and row["tunnel"] is None:
        output.note(f"Serve it: portico domains route {output.printable(row['name'])} TUNNEL")


def _records(records: list[dict[str, Any]]) -> None:
    output.table(
        ("type", "name", "value", ""),
        [(r["type"], r["name"], r["value"], "" if r["required"] else "optional") for r in records],
    )


@group.command()
def route(
    domain: DomainArgument,
    tunnel: Annotated[str, typer.Argument(help="The tunnel's name or id.", show_default=False)],
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Serve a domain by a tunnel, from now on; from another tunnel it moves over."""

    async def lead(api: Api) -> dict[str, Any]:
        row: dict[str, Any] = await api.call("POST", _path(await _find(api, domain), "/route"), {"tunnel": tunnel})
        return row

    _done(with_api(server, lead), f"leads to {tunnel}", json)


@group.command()
def unroute(domain: DomainArgument, server: ServerOption = None, json: JsonOption = False) -> None:
    """Serve a domain no longer. It stays yours."""

    async def end(api: Api) -> dict[str, Any]:
        row: dict[str, Any] = await api.call("POST", _path(await _find(api, domain), "/unroute"))
        return row

    _done(with_api(server, end), "leads nowhere", json)


def _done(row: dict[str, Any], what: str, json: bool) -> None:
    if json:
        output.print_json(row)
    else:
        output.echo(f"{output.printable(row['display_name'])} {output.printable(what)}")


@group.command(name="ls")
def list_domains(server: ServerOption = None, json: JsonOption = False) -> None:
    """List the domains of your organization, with what is wrong and how their certificates are."""

    async def ask(api: Api) -> tuple[list[dict[str, Any]], dict[str, str]]:
        rows = await _all(api)
        names = {row["id"]: row["name"] for row in await api.tunnels()} if any(row["tunnel"] for row in rows) else {}
        return rows, names

    rows, names = with_api(server, ask)
    if json:
        output.print_json(rows)
        return
    output.table(
        ("domain", "status", "tunnel", "certificate", "until", "what is wrong"),
        [
            (
                row["display_name"],
                row["hostname_status"],
                names.get(row["tunnel"] or "", row["tunnel"] or ""),
                row["certificate"]["status"] if row["tls_mode"] == "terminate" else "your service's",
                (row["certificate"]["not_after"] or "")[:10],
                _wrong(row),
            )
            for row in rows
        ],
        empty="No domains yet. Add one with: portico domains add www.example.com",
    )


def _wrong(row: dict[str, Any]) -> str:
    certificate = row["certificate"]
    if row.get("frozen"):  # a server of before does not say
        return "frozen: the plan has no room for it"
    if row["dns_error"]:
        return _ERRORS.get(row["dns_error"], str(row["dns_error"]))
    if certificate["held_at"]:
        return f"held: {certificate['error_detail'] or certificate['error_code'] or 'its certificate failed'}"
    return str(certificate["error_detail"] or certificate["error_code"] or "")


@group.command()
def rm(domain: DomainArgument, server: ServerOption = None) -> None:
    """Remove a domain: it is served no longer, and its name is free."""

    async def drop(api: Api) -> dict[str, Any]:
        row = await _find(api, domain)
        await api.call("DELETE", _path(row))
        return row

    output.echo(f"{output.printable(with_api(server, drop)['display_name'])} removed")


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.add_typer(group, name="domains")
