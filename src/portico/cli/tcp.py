"""`portico tcp`: a public port for a local TCP service."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from portico import settings
from portico.cli import output, policy_options
from portico.cli.account import ProxyOption, ServerOption, signed_in
from portico.cli.tunnel import PoolOption, TtlOption, refuse_pool, ttl_seconds, with_options

ProxyProtocolOption = Annotated[
    int | None,
    typer.Option(
        "--proxy-protocol",
        help="Tell the target each visitor's address by a PROXY protocol header of this version [no header].",
        min=1,
        max=2,
        metavar="1|2",
        show_default=False,
    ),
]


def tcp(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="22, host:port, tcp://host:port or unix:/path")],
    name: Annotated[str | None, typer.Option(help="Name of the tunnel [made up].", show_default=False)] = None,
    remote_port: Annotated[
        int | None,
        typer.Option(
            help="Public port, of the platform's range [a free one].",
            min=1,
            max=65_535,
            metavar="PORT",
            show_default=False,
        ),
    ] = None,
    proxy_protocol: ProxyProtocolOption = None,
    allow_cidr: policy_options.AllowCidr = None,
    deny_cidr: policy_options.DenyCidr = None,
    policy_file: policy_options.PolicyFile = None,
    print_policy: policy_options.PrintPolicy = False,
    region: Annotated[str | None, typer.Option(help="Preferred region.", show_default=False)] = None,
    ttl: TtlOption = None,
    pool: PoolOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    server: ServerOption = None,
    proxy: ProxyOption = None,
    log_level: Annotated[
        str | None, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.", show_default=False)
    ] = None,
) -> None:
    """A public port for a local TCP service: SSH, a database, anything."""
    from portico.agent import app
    from portico.agent.policies import Sugar
    from portico.agent.target import parse_tcp_target
    from portico.kit import loop

    refuse_pool(pool)
    seconds = ttl_seconds(ttl)
    parsed = parse_tcp_target(target)
    sugar = Sugar(allow_cidr=allow_cidr or (), deny_cidr=deny_cidr or ())
    policy = policy_options.wanted(sugar, policy_file, "tcp")
    if print_policy:
        policy_options.show(policy, json)
        return
    config, found = signed_in(server)
    config = with_options(
        config, region=region, log_level=log_level, proxy_url=settings.Secret(proxy) if proxy else None
    )
    spec: dict[str, Any] = {"protocol": "tcp"}
    if name:
        spec["name"] = name
    if remote_port:
        spec["remote_port"] = remote_port
    if policy is not None:
        spec["policy"] = policy
    options = app.TunnelOptions(parsed, spec, ttl=seconds, proxy_protocol=proxy_protocol or 0)
    mode = output.display_mode(json)
    code = loop.run(app.serve(config, found, [options], mode, color=settings.color_wanted(sys.stdout)))
    if code:
        raise typer.Exit(code)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(context_settings=policy_options.CONTEXT)(tcp)
