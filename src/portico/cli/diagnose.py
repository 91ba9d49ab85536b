"""`portico diagnose`: what is wrong between this machine and the platform."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico import settings
from portico.cli import output
from portico.cli.account import ProxyOption, ServerOption
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.diagnose import Case
    from portico.kit.findings import Finding


def diagnose(
    target: Annotated[
        str | None,
        typer.Argument(metavar="TARGET", help="A local app to look at too: 8000, host:port, a URL, unix:/path."),
    ] = None,
    server: ServerOption = None,
    proxy: ProxyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array of what was found.")] = False,
) -> None:
    """Find out why a tunnel does not work, hop by hop.

    Looks at versions, settings, sign-in, proxy, name, connection, certificate and clock, then at each relay with a real
    session and a ping, and with TARGET at the local app. Each trouble comes with its cause and a fix. Opens no tunnel,
    changes nothing, and takes 15 seconds at most.

    Exit code 0: all is well, or only worth a look; 1: something is broken.
    """
    from portico.kit import loop

    case = _case(target, {"server": server, "proxy_url": proxy})
    found = loop.run(_look(case, None if as_json else _report()))
    if as_json:
        output.print_json([finding.document() for finding in found])
    raise typer.Exit(output.FAILED if any(finding.level == "FAIL" for finding in found) else output.OK)


def _case(target: str | None, overrides: dict[str, Any]) -> Case:
    from portico.agent import credentials
    from portico.agent.diagnose import Case, server_of
    from portico.agent.target import parse_target

    parsed = parse_target(target) if target is not None else None
    config = settings.agent_settings(overrides)
    try:
        found: credentials.Credentials | Problem = credentials.current(config)
    except Problem as problem:
        found = problem
    if isinstance(found, Problem):
        stored = None if config.server or found.code == "config.invalid" else credentials.read(config.config_dir)
        address = server_of(config, stored)
    else:
        address = found.server
    return Case(config, settings.agent_sources(overrides), address, found, parsed)


def _report() -> Any:
    from portico.agent.diagnose import WIDTH
    from portico.cli.report import Report

    return Report(WIDTH)


async def _look(case: Case, report: Any) -> list[Finding]:
    from portico.agent.diagnose import Diagnosis
    from portico.kit import telemetry

    telemetry.configure("diagnose", "ERROR")
    found = []
    async for finding in Diagnosis(case).run():
        found.append(finding)
        if report is not None:
            report.show(finding)
    if report is not None:
        report.end()
    sys.stdout.flush()
    return found


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(diagnose)
