"""`portico config check`: what is wrong with a `portico.yml`, all of it at once."""

from __future__ import annotations

from typing import Annotated

import typer

from portico import settings
from portico.cli import output
from portico.cli.account import JsonOption
from portico.cli.start import ConfigOption, files, refused


def check(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Check portico.yml: every fault with its line and column. Exit code 0 or 2."""
    from portico.agent.tunnel_file import read

    paths = files(config)
    found = read(paths, settings.agent_settings().config_max_bytes)
    if json:
        output.print_json(
            {
                "valid": not found.faults,
                "files": [str(path) for path in paths],
                "tunnels": list(found.tunnels),
                "faults": [fault.document() for fault in found.faults],
            }
        )
        if found.faults:
            raise typer.Exit(output.USAGE)
        return
    if found.faults:
        raise refused(found.faults)
    tunnels = ", ".join(found.tunnels) or "none"
    output.echo(f"{' and '.join(map(str, paths))}: no faults. Tunnels: {tunnels}")


def add_authtoken(
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="An agent key.")],
) -> None:
    """What ngrok calls it; here: portico login --token TOKEN."""
    del token  # never repeated: a terminal may be recorded
    output.note("portico: an agent key is stored by: portico login --token KEY   (- reads it from standard input)")
    raise typer.Exit(output.USAGE)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    group.command()(check)
    group.command("add-authtoken", hidden=True)(add_authtoken)
    app.add_typer(group, name="config", help="Check portico.yml.")
