"""`portico up`, `demo`, `doctor`: everything on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico import settings
from portico.cli import output
from portico.cli.processes import ConfigOption, require_server_parts

if TYPE_CHECKING:
    from portico.embedded.platform import Platform

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of everything that outlives a restart.", metavar="DIR", show_default=False),
]
LogLevelOption = Annotated[
    str | None, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.", show_default=False, metavar="LEVEL")
]


def _port(what: str) -> Any:
    return typer.Option(help=f"TCP port of {what}; 0 takes a free one.", show_default=False, metavar="PORT")


def up(
    data: DataOption = None,
    base_domain: Annotated[
        str | None, typer.Option(help="Tunnels are names below it [localhost].", metavar="NAME", show_default=False)
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on [127.0.0.1]; 0.0.0.0 for all, :: for all of IPv6 too.",
            metavar="ADDRESS",
            show_default=False,
        ),
    ] = None,
    http_port: Annotated[int | None, _port("the public HTTP listener [7080]")] = None,
    https_port: Annotated[int | None, _port("the public HTTPS listener [7443]")] = None,
    control_port: Annotated[int | None, _port("the listener for agents [7081]")] = None,
    api_port: Annotated[int | None, _port("the API and console [7000]")] = None,
    tcp_ports: Annotated[
        str | None,
        typer.Option(
            help="Public ports of TCP tunnels [7100-7199].",
            metavar="FIRST-LAST",
            show_default=False,
        ),
    ] = None,
    demo_billing: Annotated[
        bool,
        typer.Option("--demo-billing", help="Sell plans through simulated payment providers; no money moves."),
    ] = False,
    pg_bin: Annotated[
        Path | None, typer.Option(help="Folder of PostgreSQL's programs.", metavar="DIR", show_default=False)
    ] = None,
    config: ConfigOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """Run everything on this machine.

    Relay, API and console, workers, PostgreSQL and Valkey, kept running until Ctrl-C.
    """
    require_server_parts()
    chosen = settings.load(
        settings.PlatformSettings,
        table="platform",
        file=config,
        overrides={
            "data_dir": data,
            "base_domain": base_domain,
            "host": host,
            "http_port": http_port,
            "https_port": https_port,
            "control_port": control_port,
            "tcp_ports": tcp_ports,
            "api_port": api_port,
            "demo_billing": demo_billing or None,
            "pg_bin": pg_bin,
            "log_level": log_level,
        },
    )
    raise typer.Exit(_supervise(chosen, chosen.data_dir or settings.default_data_dir(), _stay))


async def _stay(platform: Platform) -> int:
    """Say that everything is ready, then do nothing until a signal comes."""
    import asyncio
    import sys

    from portico.embedded.summary import summary
    from portico.kit.paint import Paint

    platform.logs.write(summary(platform, Paint(settings.color_wanted(sys.stderr)), sys.stderr.isatty()))
    await asyncio.to_thread(platform.logs.flush)
    output.echo("ready")
    await asyncio.Event().wait()
    return output.OK


def _supervise(chosen: settings.PlatformSettings, data: Path, body: Any) -> int:
    """Run the platform with its log stream; the exit code."""
    import asyncio
    import sys

    from portico.embedded import platform
    from portico.embedded.logs import LogStream

    logs = LogStream(sys.stderr.fileno(), level=chosen.log_level, color=settings.color_wanted(sys.stderr))
    try:
        return asyncio.run(platform.run(platform.Platform(chosen, data, logs), body))
    finally:
        logs.close()


def demo(
    once: Annotated[bool, typer.Option("--once", help="Make the request, check the answer, exit 0 or 1.")] = False,
    data: DataOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """See it work: a sample app, a tunnel to it, one real request.

    Starts the whole platform on free ports, in a data folder of its own, and stays until Ctrl-C.
    """
    require_server_parts()
    chosen = settings.load(
        settings.PlatformSettings,
        overrides={
            "log_level": log_level or "WARNING",
            "standby": False,  # it lives for a moment
            **dict.fromkeys(("http_port", "https_port", "control_port", "api_port"), 0),
        },
    )
    folder = data or chosen.data_dir
    if folder is not None or not once:
        raise typer.Exit(_demo(chosen, folder or settings.default_demo_dir(), once))
    import shutil

    from portico.embedded.folders import temp_home

    home = temp_home("portico-demo-")
    try:
        code = _demo(chosen, home, once)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    raise typer.Exit(code)


def _demo(chosen: settings.PlatformSettings, home: Path, once: bool) -> int:
    import asyncio
    import sys

    from portico.embedded.demo import Demo
    from portico.kit.paint import Paint

    async def body(platform: Platform) -> int:
        demo = Demo(Paint(settings.color_wanted(sys.stdout)), output.echo)
        try:
            good = await demo(platform)
            if not once:
                demo.goodbye(platform, sys.stdout.isatty())
                await asyncio.Event().wait()
            return output.OK if good else output.FAILED
        finally:
            await demo.close()

    output.echo("Starting Portico: PostgreSQL, Valkey, API, relay, worker; a sample app; a tunnel to it …")
    return _supervise(chosen, home, body)


def doctor(
    data: DataOption = None,
    server: Annotated[
        str | None,
        typer.Option(help="API to ask, instead of the one in the data folder.", metavar="URL", show_default=False),
    ] = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")] = False,
) -> None:
    """Check what usually goes wrong, and what to do about it.

    Installation, data folder, ports, API, clock, relay. Starts and changes nothing.
    """
    import asyncio

    from portico.cli.report import Report
    from portico.embedded import doctor as checks

    chosen = settings.load(settings.PlatformSettings, table="platform", file=config, overrides={"data_dir": data})
    home = chosen.data_dir or settings.default_data_dir()
    findings = asyncio.run(checks.examine(chosen, home, server))
    if as_json:
        output.print_json([finding.document() for finding in findings])
    else:
        report = Report(max(len(finding.check) for finding in findings))
        for finding in findings:
            report.show(finding)
        report.end()
    raise typer.Exit(output.FAILED if any(finding.level == "FAIL" for finding in findings) else output.OK)


def register(app: typer.Typer) -> None:
    for command in (up, demo, doctor):
        app.command()(command)
