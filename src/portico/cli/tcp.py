"""`portico tcp`: a public port for a local TCP service."""

from __future__ import annotations

from typing import Annotated

import typer

from portico.cli import policy_options
from portico.cli.account import ProxyOption, ServerOption
from portico.cli.tunnel import (
    JsonLinesOption,
    LogLevelOption,
    NameOption,
    PoolOption,
    RegionOption,
    TtlOption,
    agent_options,
    refuse_pool,
    serve,
    spec_of,
    ttl_seconds,
)

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
    name: NameOption = None,
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
    region: RegionOption = None,
    ttl: TtlOption = None,
    pool: PoolOption = False,
    json: JsonLinesOption = False,
    server: ServerOption = None,
    proxy: ProxyOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """A public port for a local TCP service: SSH, a database, anything."""
    from portico.agent.app import TunnelOptions
    from portico.agent.policies import Sugar
    from portico.agent.target import parse_tcp_target

    refuse_pool(pool)
    seconds = ttl_seconds(ttl)
    parsed = parse_tcp_target(target)
    sugar = Sugar(allow_cidr=allow_cidr or (), deny_cidr=deny_cidr or ())
    policy = policy_options.wanted(sugar, policy_file, "tcp")
    if print_policy:
        policy_options.show(policy, json)
        return
    spec = spec_of("tcp", policy, name=name, remote_port=remote_port)
    typed = agent_options(region=region, log_level=log_level, proxy=proxy)
    serve(TunnelOptions(parsed, spec, ttl=seconds, proxy_protocol=proxy_protocol or 0), typed, server, json)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(context_settings=policy_options.CONTEXT)(tcp)
