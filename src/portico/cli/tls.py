"""`portico tls`: a public host whose TLS goes through to a local TLS service, or ends at the agent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portico.cli import policy_options
from portico.cli.account import ProxyOption, ServerOption
from portico.cli.tcp import ProxyProtocolOption
from portico.cli.tunnel import (
    DomainOption,
    JsonLinesOption,
    LogLevelOption,
    NameOption,
    PoolOption,
    RegionOption,
    SubdomainOption,
    TtlOption,
    agent_options,
    refuse_pool,
    serve,
    spec_of,
    ttl_seconds,
)
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.tls_files import TlsFiles


def tls(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="8443, host:port, tls://host:port or unix:/path")],
    name: NameOption = None,
    subdomain: SubdomainOption = None,
    domain: DomainOption = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert",
            metavar="FILE",
            help="End TLS here, with this certificate and chain (PEM); the target gets plain bytes [TLS passes through].",
            show_default=False,
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(
            "--tls-key", metavar="FILE", help="Its private key (PEM, without passphrase).", show_default=False
        ),
    ] = None,
    tls_alpn: Annotated[
        str | None,
        typer.Option(
            "--tls-alpn",
            metavar="NAMES",
            help="Protocols offered with --tls-cert, best first, such as h2,http/1.1 [none].",
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
    """A public host for a local TLS service, which keeps its own certificate.

    The platform forwards the visitors' TLS by the name in it and cannot read it. With --tls-cert and --tls-key TLS ends in
    this command instead, and the target gets plain bytes; the files are read again when they change.
    """
    from portico.agent.app import TunnelOptions
    from portico.agent.policies import Sugar
    from portico.agent.target import parse_tcp_target, parse_tls_target

    refuse_pool(pool)
    seconds = ttl_seconds(ttl)
    files = _files(tls_cert, tls_key, tls_alpn)
    parsed = parse_tls_target(target) if files is None else parse_tcp_target(target)
    sugar = Sugar(allow_cidr=allow_cidr or (), deny_cidr=deny_cidr or ())
    policy = policy_options.wanted(sugar, policy_file, "tls")
    if print_policy:
        policy_options.show(policy, json)
        return
    spec = spec_of("tls", policy, name=name, subdomain=subdomain, domain=domain)
    typed = agent_options(region=region, log_level=log_level, proxy=proxy)
    serve(TunnelOptions(parsed, spec, ttl=seconds, proxy_protocol=proxy_protocol or 0, tls=files), typed, server, json)


def _files(certificate: Path | None, key: Path | None, alpn: str | None) -> TlsFiles | None:
    """What the agent ends TLS with, looked at; raises ``config.invalid``."""
    from portico.agent.tls_files import TlsFiles, alpn_names

    if certificate is None and key is None:
        if alpn is not None:
            raise Problem("config.invalid", "--tls-alpn needs --tls-cert: passed through, TLS is the target's")
        return None
    if certificate is None or key is None:
        missing = "--tls-cert" if certificate is None else "--tls-key"
        raise Problem("config.invalid", f"--tls-cert and --tls-key go together; {missing} is missing")
    try:
        names = alpn_names(alpn) if alpn is not None else ()
    except ValueError as err:
        raise Problem("config.invalid", f"--tls-alpn {err}") from None
    files = TlsFiles(certificate, key, names)
    files.load()
    return files


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(context_settings=policy_options.CONTEXT)(tls)
