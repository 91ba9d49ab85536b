"""`portico http`, `ls`, `stop`, `rm`: tunnels."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from portico import settings
from portico.cli import output, policy_options
from portico.cli.account import JsonOption, ProxyOption, ServerOption, signed_in, with_api
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.api import Api
    from portico.agent.app import TunnelOptions

NameOption = Annotated[str | None, typer.Option("--name", help="Name of the tunnel [made up].", show_default=False)]
SubdomainOption = Annotated[
    str | None, typer.Option("--subdomain", help="Subdomain of the URL [the name].", show_default=False)
]
DomainOption = Annotated[
    str | None,
    typer.Option("--domain", help="Domain of your own that leads here (portico domains).", show_default=False),
]
RegionOption = Annotated[str | None, typer.Option("--region", help="Preferred region.", show_default=False)]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
LogLevelOption = Annotated[
    str | None, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.", show_default=False)
]
TtlOption = Annotated[
    str | None,
    typer.Option(
        "--ttl",
        metavar="DURATION",
        help="End by itself this long after it came online, such as 90s, 15m, 1h30m [stays].",
        show_default=False,
    ),
]
# Taken and refused with a code of its own, so that nobody believes that it worked; not in the help until it does.
PoolOption = Annotated[bool, typer.Option("--pool", help="Join other agents of this tunnel.", hidden=True)]
NamesArgument = Annotated[list[str], typer.Argument(metavar="NAME…", help="Names or ids of tunnels.")]


def http(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="8000, host:port, http(s)://host, unix:/path or file:///dir")
    ],
    name: NameOption = None,
    subdomain: SubdomainOption = None,
    domain: DomainOption = None,
    basic_auth: policy_options.BasicAuth = None,
    allow_cidr: policy_options.AllowCidr = None,
    deny_cidr: policy_options.DenyCidr = None,
    mutual_tls_cas: policy_options.MutualTlsCas = None,
    https_only: policy_options.HttpsOnly = False,
    https_redirect: policy_options.HttpsRedirect = False,
    host_header: policy_options.HostHeader = None,
    request_header_add: policy_options.RequestHeaderAdd = None,
    request_header_remove: policy_options.RequestHeaderRemove = None,
    response_header_add: policy_options.ResponseHeaderAdd = None,
    response_header_remove: policy_options.ResponseHeaderRemove = None,
    policy_file: policy_options.PolicyFile = None,
    print_policy: policy_options.PrintPolicy = False,
    target_tls_verify: Annotated[
        bool | None,
        typer.Option(
            "--target-tls-verify/--no-target-tls-verify",
            help="Check the certificate of an https target [yes, except on this machine].",
            show_default=False,
        ),
    ] = None,
    inspect: Annotated[
        bool | None,
        typer.Option("--inspect/--no-inspect", help="Show requests on the local page [yes].", show_default=False),
    ] = None,
    region: RegionOption = None,
    ttl: TtlOption = None,
    qr: Annotated[bool, typer.Option("--qr", help="Show the URL as a QR code.")] = False,
    pool: PoolOption = False,
    json: JsonLinesOption = False,
    server: ServerOption = None,
    proxy: ProxyOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """A public URL for a local app."""
    from portico.agent.policies import Sugar
    from portico.agent.target import parse_target

    refuse_pool(pool)
    seconds = ttl_seconds(ttl)
    parsed = parse_target(target)
    sugar = Sugar(
        basic_auth=policy_options.basic_auth(basic_auth),
        deny_cidr=deny_cidr or (),
        allow_cidr=allow_cidr or (),
        host_header=host_header,
        request_header_remove=request_header_remove or (),
        request_header_add=request_header_add or (),
        response_header_remove=response_header_remove or (),
        response_header_add=response_header_add or (),
        mutual_tls_cas=mutual_tls_cas,
        plain_http=policy_options.plain_http(https_only, https_redirect),
    )
    policy = policy_options.wanted(sugar, policy_file, "http")
    if print_policy:
        policy_options.show(policy, json)
        return
    from portico.agent.app import TunnelOptions

    spec = spec_of("http", policy, name=name, subdomain=subdomain, domain=domain)
    typed = agent_options(region=region, log_level=log_level, inspect=inspect, proxy=proxy)
    serve(TunnelOptions(parsed, spec, target_tls_verify, ttl=seconds), typed, server, json, qr=qr)


def spec_of(protocol: str, policy: dict[str, Any] | None, **wanted: str | int | None) -> dict[str, Any]:
    """What the API is asked for: a tunnel with what was said on the command line."""
    spec = {"protocol": protocol} | {key: value for key, value in wanted.items() if value}
    return spec if policy is None else spec | {"policy": policy}


def agent_options(*, proxy: str | None, **typed: Any) -> dict[str, Any]:
    """The agent's settings that were said on the command line."""
    return {**typed, "proxy_url": settings.Secret(proxy) if proxy else None}


def serve(options: TunnelOptions, typed: dict[str, Any], server: str | None, json: bool, *, qr: bool = False) -> None:
    """Serve one tunnel to its end, with the settings that were ``typed``; exits with what the agent says."""
    from portico.agent import app
    from portico.kit import loop

    config, found = signed_in(server)
    config = with_options(config, **typed)
    mode = output.display_mode(json)
    code = loop.run(app.serve(config, found, [options], mode, color=settings.color_wanted(sys.stdout), qr=qr))
    if code:
        raise typer.Exit(code)


def ttl_seconds(text: str | None) -> float | None:
    """``--ttl`` in seconds; raises ``config.invalid``."""
    from portico.agent.durations import parse_duration

    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError as err:
        raise Problem("config.invalid", f"--ttl: {err}") from None


def refuse_pool(pool: bool) -> None:
    """Raise ``tunnel.pool_unavailable`` if somebody asks for a pool."""
    if pool:
        raise Problem("tunnel.pool_unavailable", "--pool: several agents behind one tunnel do not exist yet")


def with_options(config: settings.AgentSettings, **changes: Any) -> settings.AgentSettings:
    """The settings with what was said on the command line."""
    import dataclasses

    return dataclasses.replace(config, **{key: value for key, value in changes.items() if value is not None})


def ls(server: ServerOption = None, json: JsonOption = False) -> None:
    """List the tunnels of your organization."""

    async def ask(api: Api) -> list[dict[str, Any]]:
        return await api.tunnels()

    rows = with_api(server, ask)
    if json:
        output.print_json(rows)
        return
    output.table(
        ("name", "state", "url", "target", "agent"),
        [
            (r["name"], r["state"], r["url"], r.get("target") or "", (r.get("agent") or {}).get("hostname", ""))
            for r in rows
        ],
        empty="No tunnels yet. Start one with: portico http 8000",
    )


def stop(names: NamesArgument, server: ServerOption = None, json: JsonOption = False) -> None:
    """Stop tunnels: their URLs go offline until their agent is started again."""

    async def act(api: Api) -> list[dict[str, Any]]:
        return [await api.call("POST", f"tunnels/{await _id(api, name)}/stop") for name in names]

    _report(with_api(server, act), names, "stopped", json)


def rm(names: NamesArgument, server: ServerOption = None, json: JsonOption = False) -> None:
    """Delete tunnels and give their names back."""

    async def act(api: Api) -> list[dict[str, Any]]:
        done = []
        for name in names:
            row = await api.find_tunnel(name)
            await api.call("DELETE", f"tunnels/{quote(row['id'], safe='')}")
            done.append({"id": row["id"], "name": row["name"], "state": "deleted"})
        return done

    _report(with_api(server, act), names, "deleted", json)


async def _id(api: Api, name: str) -> str:
    return quote((await api.find_tunnel(name))["id"], safe="")


def _report(rows: list[dict[str, Any]], names: list[str], verb: str, json: bool) -> None:
    if json:
        output.print_json(rows)
        return
    for row, name in zip(rows, names, strict=True):
        output.echo(f"{row.get('name') or name} {verb}")


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(context_settings=policy_options.CONTEXT)(http)
    app.command()(ls)
    app.command()(stop)
    app.command()(rm)
