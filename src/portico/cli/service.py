"""`portico service`: the tunnels of portico.yml as a service of the operating system."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portico import settings
from portico.cli import output
from portico.cli.start import credentials_for, files, own_settings, refused
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.service import Launchd, Systemd
    from portico.agent.service_files import Service
    from portico.agent.tunnel_file import Config

group = typer.Typer(
    help="Keep the tunnels of portico.yml up: a service of systemd or launchd.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
#: Where a machine's own configuration is.
SYSTEM_FOLDER = Path("/etc/portico")

WhereOption = Annotated[
    bool | None,
    typer.Option(
        "--system/--user", help="For the machine, or for you alone [for the machine as root].", show_default=False
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="For more than one: portico-agent-NAME.", show_default=False),
]


@group.command()
def install(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="The tunnels [portico.yml here, else in PORTICO_CONFIG_DIR].",
            show_default=False,
        ),
    ] = None,
    where: WhereOption = None,
    name: NameOption = None,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", metavar="FILE", help="File with the agent key [your sign-in].", show_default=False),
    ] = None,
    run_as: Annotated[
        str | None,
        typer.Option(
            "--run-as", metavar="USER", help="Account of a service of the machine [one of its own].", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Log one JSON object a line.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Show what would be written, and change nothing.")] = False,
) -> None:
    """Install and start it; again to change it.

    It runs `portico start --all`, comes back after a crash and after a reboot, and logs to the journal. The file is followed
    while it changes. Nothing secret is written into the unit: a key stays in a file that only its owner reads.
    """
    system = _is_system(where)
    manager, found = _manager(system), _checked(config)
    service, key = _plan(found, _unit(name), system, key_file, run_as, json)
    if show:
        output.echo(manager.render(service).decode().rstrip())
        return
    try:
        manager.check()
    except Problem as problem:
        raise _by_hand(problem, service) from None
    _check_reach(service)
    new_key = False
    if key is not None and service.key_file is not None:
        from portico.agent.service import write_if_changed

        new_key = write_if_changed(service.key_file, key.reveal().encode() + b"\n", 0o600)
    changed = manager.install(service, new_key=new_key)
    output.echo(f"{service.name}: {'installed and started' if changed else 'already installed; it runs'}")
    output.echo(f"  unit  {manager.path(service.name)}")
    output.echo(f"  log   {manager.logs(service.name)}")
    if advice := manager.advice():
        output.note(advice)


def _command(verb: str, past: str) -> None:
    def act(where: WhereOption = None, name: NameOption = None) -> None:
        manager = _manager(_is_system(where))
        manager.check()
        manager.act(verb, _unit(name))
        output.echo(f"{_unit(name)}: {past}")

    act.__doc__ = f"{verb.capitalize()} it."
    group.command(verb)(act)


for _verb, _past in (("start", "started"), ("stop", "stopped"), ("restart", "restarted")):
    _command(_verb, _past)


@group.command()
def status(where: WhereOption = None, name: NameOption = None) -> None:
    """Say whether it runs, with the end of its log. Exit code 0 when it does, else 1."""
    manager = _manager(_is_system(where))
    manager.check()
    state, text = manager.status(_unit(name))
    output.echo(text.rstrip() or state)
    if state != "active":
        raise typer.Exit(output.FAILED)


@group.command()
def uninstall(where: WhereOption = None, name: NameOption = None) -> None:
    """Stop it and remove its unit. Tunnels, portico.yml and keys stay."""
    manager = _manager(_is_system(where))
    manager.check()
    there = manager.uninstall(_unit(name))
    output.echo(f"{_unit(name)}: {'stopped and removed' if there else 'was not installed'}")


def _is_system(where: bool | None) -> bool:
    return where if where is not None else hasattr(os, "geteuid") and os.geteuid() == 0


def _manager(system: bool) -> Systemd | Launchd:
    from portico.agent.service import manager_for

    return manager_for(system)


def _unit(name: str | None) -> str:
    from portico.agent.tunnel_keys import check_name

    try:
        return f"portico-agent-{check_name(name)}" if name else "portico-agent"
    except ValueError as err:
        raise Problem("config.invalid", f"--name {err}") from None


def _checked(config: Path | None) -> tuple[Path, Config]:
    """The file, and what it says; raises ``config.invalid`` for faults that would end the service at once."""
    from portico.agent.tunnel_file import read

    path = files([config] if config else None)[0].absolute()
    found = read([path], settings.agent_settings().config_max_bytes)
    if found.faults:
        raise refused(found.faults)
    if not found.tunnels:
        raise Problem("config.invalid", f"{path} has no tunnels", hint="Add one below tunnels:.")
    return path, found


def _plan(
    checked: tuple[Path, Config], unit: str, system: bool, key_file: Path | None, run_as: str | None, json: bool
) -> tuple[Service, settings.Secret | None]:
    """The service, and the key that has to be stored for it."""
    from portico.agent.service import program
    from portico.agent.service_files import Service

    path, found = checked
    if run_as is not None and not system:
        raise Problem("config.invalid", "--run-as is for a service of the machine", hint="Add --system.")
    agent = settings.agent_settings(None, own_settings(found))
    environment, key = settings.agent_environment(), None
    if key_file is not None:
        key_file = key_file.absolute()
        settings.secret_in_file("--key-file", key_file)
        environment["PORTICO_SERVER"] = agent.server or _stored_server(agent)
    elif agent.agent_key or not {"agent_key_file", "agent_key_env"} & found.settings.keys():
        held = credentials_for(agent, found.settings)
        if agent.agent_key or system:  # a service of the user who signed in reads the sign-in itself
            key_file, key = (SYSTEM_FOLDER if system else agent.config_dir) / f"{unit}.key", held.agent_key
            environment["PORTICO_SERVER"] = held.server
    elif "agent_key_env" in found.settings:
        detail = f"{path} names a variable for the key (agent_key_env), which a service does not have"
        raise Problem("config.invalid", detail, hint="Use agent_key_file there, or give --key-file.")
    argv = (*program(), "start", "--all", "--config", str(path), *(["--json"] if json else []))
    return Service(unit, argv, path, system, environment, key_file, run_as), key


def _stored_server(agent: settings.AgentSettings) -> str:
    from portico.agent import credentials

    stored = credentials.read(agent.config_dir)
    return stored.server if stored is not None else credentials.DEFAULT_SERVER


def _check_reach(service: Service) -> None:
    """A service with an account of its own cannot read what only we can; raises ``config.invalid`` with the place."""
    from portico.agent.service import blocked

    if not service.system or service.account is not None or sys.platform != "linux":
        return
    for path in (service.config, Path(service.argv[0])):
        if place := blocked(path):
            hint = (
                f"Put portico.yml into {SYSTEM_FOLDER} and let every user read it, with Portico installed below /opt or /usr, "
                "or name an account that can: --run-as USER."
            )
            raise Problem(
                "config.invalid", f"the service's account cannot read {path} ({place} keeps it out)", hint=hint
            )


def _by_hand(problem: Problem, service: Service) -> Problem:
    """What to run where there is no service manager."""
    command = shlex.join(service.argv)
    hint = f"Run it yourself, or by the supervisor that you have: {command}"
    return Problem(
        problem.code, problem.detail, hint=hint if "takes no commands" not in problem.detail else problem.hint
    )


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.add_typer(group, name="service")
