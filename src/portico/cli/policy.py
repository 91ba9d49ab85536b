"""`portico policy check|show|set`: policies as files, and those of tunnels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from portico.cli import output
from portico.cli.account import JsonOption, ServerOption, with_api
from portico.cli.policy_options import refused
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.api import Api
    from portico.agent.policies import Written

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="A policy, YAML or JSON; - reads standard input.")]
TunnelArgument = Annotated[str, typer.Argument(metavar="TUNNEL", help="Name or id of a tunnel.")]
ProtocolOption = Annotated[
    str,
    typer.Option("--protocol", metavar="http|tcp|tls", help="What kind of tunnel it is for."),
]


def check(file: FileArgument, protocol: ProtocolOption = "http", json: JsonOption = False) -> None:
    """Check a policy: every fault with its line and column. Exit code 0 or 2."""
    from portico.agent.policies import placed, summary
    from portico.wire.policy_check import check_protocol

    if protocol not in ("http", "tcp", "tls"):
        raise Problem("config.invalid", f"--protocol {protocol[:40]!r} is not http, tcp or tls")
    found = _read(file)
    if not found.faults:
        found.faults.extend(placed(found.marks, check_protocol(found.document, protocol)))
    if json:
        keys = ("line", "column", "path", "message")
        faults = [dict(zip(keys, fault, strict=True)) for fault in found.faults]
        output.print_json({"valid": not faults, "file": file, "faults": faults})
        if faults:
            raise typer.Exit(output.USAGE)
        return
    if found.faults:
        raise refused(file, found)
    output.echo(f"{file}: no faults. It says: {summary(found.document) or 'nothing'}")


def show(tunnel: TunnelArgument, server: ServerOption = None, json: JsonOption = False) -> None:
    """Print the policy of a tunnel as YAML. Passwords are not shown, and `set` keeps those of the users named."""
    from portico.agent import policies

    async def ask(api: Api) -> dict[str, Any]:
        return await api.find_tunnel(tunnel)

    row = with_api(server, ask)
    if json:
        output.print_json({"policy": row["policy"], "policy_version": row["policy_version"]})
        return
    output.note(f"{row['name']}: version {row['policy_version']} of its policy")
    output.echo(policies.as_yaml({"version": 1, **row["policy"]}).rstrip("\n"))


def put(
    tunnel: TunnelArgument,
    file: FileArgument,
    if_version: Annotated[
        int | None,
        typer.Option(
            "--if-version", metavar="N", help="Only if this is still the version of its policy.", show_default=False
        ),
    ] = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Give a tunnel the policy of a file. A live one has it within 2 s, and nothing that runs is cut."""
    from portico.agent.policies import summary

    found = _read(file)
    if found.faults:
        raise refused(file, found)
    body: dict[str, Any] = {"policy": found.text}
    if if_version is not None:
        body["policy_version"] = if_version

    async def act(api: Api) -> dict[str, Any]:
        row = await api.find_tunnel(tunnel)
        return await api.call("PATCH", f"tunnels/{quote(row['id'], safe='')}", body)

    try:
        row = with_api(server, act)
    except Problem as problem:
        raise _placed(problem, file, found) from None
    if json:
        output.print_json(row)
        return
    output.echo(f"{row['name']}: {summary(row['policy']) or 'no policy'} (version {row['policy_version']})")


def _read(file: str) -> Written:
    from portico.agent import policies

    if file == "-":
        return policies.read_text(sys.stdin.buffer.read(policies.MAX_FILE_BYTES + 1))
    return policies.read_file(Path(file))


def _placed(problem: Problem, file: str, found: Written) -> Problem:
    """What the API finds and this machine cannot know (a user without a password), shown in the file."""
    errors = problem.extra.get("errors")
    if problem.code != "tunnel.policy_invalid" or not isinstance(errors, list):
        return problem
    for error in errors:
        place = (int(error.get("line", 0)), int(error.get("column", 0)))
        found.faults.append((*place, str(error.get("path", "")), str(error.get("detail", ""))))
    return refused(file, found)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    group.command()(check)
    group.command()(show)
    group.command("set")(put)
    app.add_typer(group, name="policy", help="Check, show and set the policies of tunnels.")
