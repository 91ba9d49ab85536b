"""`portico start`: the tunnels of `portico.yml`, all in one session, following the file while it changes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico import settings
from portico.cli import output
from portico.cli.account import ProxyOption, ServerOption
from portico.cli.tunnel import JsonLinesOption, LogLevelOption, RegionOption
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.credentials import Credentials
    from portico.agent.tunnel_file import Config, Fault

ConfigOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The file; again for more, a later one goes before [portico.yml here, else in PORTICO_CONFIG_DIR].",
        show_default=False,
    ),
]


def start(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Tunnels of the file.", autocompletion=lambda ctx: _names_in_file(ctx)),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Start every tunnel of the file.")] = False,
    config: ConfigOption = None,
    region: RegionOption = None,
    qr: Annotated[bool, typer.Option("--qr", help="Show the URLs as QR codes.")] = False,
    json: JsonLinesOption = False,
    server: ServerOption = None,
    proxy: ProxyOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """Start tunnels of portico.yml, in one session.

    The file is followed while it changes: tunnels come, go and change their target without a moment offline for the
    others. A file with a fault changes nothing. SIGHUP reads it at once.
    """
    from portico.agent import app
    from portico.agent.follow import FileSource
    from portico.kit import loop

    typed = {"server": server, "region": region, "proxy_url": proxy, "log_level": log_level}
    limit = settings.agent_settings(typed).config_max_bytes
    source = FileSource(files(config), None if everything else names, limit)
    found = source.read()
    if found.faults:
        raise refused(found.faults)
    _check_names(found, names, everything)
    agent = settings.agent_settings(typed, own_settings(found))
    if agent.basic_auth is not None:
        hint = "Unset it, and give the tunnels of the file basic_auth or policy_file."
        raise Problem(
            "config.invalid", "PORTICO_BASIC_AUTH is for portico http, and would protect nothing here", hint=hint
        )
    mode = output.display_mode(json)
    serving = app.serve(
        agent,
        credentials_for(agent, found.settings),
        list(source.wanted(found).values()),
        mode,
        color=settings.color_wanted(sys.stdout),
        qr=qr,
        source=(source, found),
    )
    if code := loop.run(serving):
        raise typer.Exit(code)


def own_settings(found: Config) -> dict[str, Any]:
    """What the file says of the agent; its other keys are for this command."""
    from dataclasses import fields

    known = {field.name for field in fields(settings.AgentSettings)}
    return {key: value for key, value in found.settings.items() if key in known}


def _names_in_file(ctx: typer.Context) -> list[str]:
    """For the shell's completion: the file's tunnels that were not typed yet; nothing where there is no file."""
    from portico.agent.tunnel_file import read

    try:
        paths = files([Path(path) for path in ctx.params.get("config") or ()])
        found = read(paths, settings.agent_settings().config_max_bytes)
    except Problem:
        return []
    return [name for name in found.tunnels if name not in (ctx.params.get("names") or ())]


def _check_names(found: Config, names: list[str] | None, everything: bool) -> None:
    """Raise ``config.invalid`` unless the command line says which of the file's tunnels to start."""
    there = ", ".join(found.tunnels) or "none"
    if everything and names:
        raise Problem("config.invalid", "give names or --all, not both", hint=f"The file has: {there}.")
    if not everything and not names:
        raise Problem(
            "config.invalid", "say which tunnels to start", hint=f"Give --all, or names; the file has: {there}."
        )
    unknown = [name for name in names or () if name not in found.tunnels]
    if unknown:
        raise Problem("config.invalid", f"the file has no tunnel {unknown[0]!r}", hint=f"It has: {there}.")
    if not found.tunnels:
        raise Problem("config.invalid", "the file has no tunnels", hint="Add one below tunnels:.")


def files(given: list[Path] | None) -> list[Path]:
    """The files to read: those given, or the first that is found; raises ``config.invalid``."""
    from portico.agent.tunnel_keys import FILE_NAMES

    if given:
        return given
    folders = [Path(), settings.agent_settings().config_dir]
    for folder in folders:
        for name in FILE_NAMES:
            if (folder / name).is_file():
                return [folder / name]
    raise Problem(
        "config.invalid",
        f"there is no {FILE_NAMES[0]} here or in {folders[1]}",
        hint="Write one (docs/reference/portico-yml.md shows how), or name it with --config.",
    )


def refused(faults: list[Fault]) -> Problem:
    """All faults on standard error, and the problem that ends the command."""
    color = settings.color_wanted(sys.stderr)
    for fault in faults:
        output.note(fault.text(color))
    count = f"{len(faults)} faults" if len(faults) > 1 else "a fault"
    return Problem("config.invalid", f"the file has {count}", hint="Correct what is marked above.")


def credentials_for(agent: settings.AgentSettings, values: dict[str, Any]) -> Credentials:
    """The sign-in to use: the environment's key, else the one that the file refers to, else this machine's."""
    from dataclasses import replace

    from portico.agent import credentials

    if not agent.agent_key and "agent_key_env" in values:
        agent = replace(agent, agent_key=settings.secret_from_environment(values["agent_key_env"]))
    elif not agent.agent_key and "agent_key_file" in values:
        agent = replace(agent, agent_key=_key_in(values["agent_key_file"]))
    return credentials.current(agent)


def _key_in(path: Path) -> settings.Secret:
    key = settings.secret_in_file("agent_key_file", path)
    if len(key.reveal().split()) > 1:
        raise Problem("config.invalid", f"agent_key_file: {path} does not hold a key alone")
    return settings.Secret(key.reveal().strip())


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(start)
