"""The options of `portico http|tcp|tls` that compile into the tunnel's policy, and `--print-policy`, which shows it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico import settings
from portico.cli import output
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.policies import Sugar, Written

#: What ngrok calls them; typed by many hands, and not in the help.
SPELLED_ELSEWHERE = {"cidr-allow": "allow-cidr", "cidr-deny": "deny-cidr", "traffic-policy-file": "policy-file"}
#: Of commands that take these options: other spellings are theirs, too.
CONTEXT = {"token_normalize_func": lambda name: SPELLED_ELSEWHERE.get(name, name)}

BasicAuth = Annotated[
    list[str] | None,
    typer.Option(
        "--basic-auth",
        metavar="NAME:PASSWORD",
        help="Visitors need this password; again for more. Better in PORTICO_BASIC_AUTH, where ps does not show it.",
        show_default=False,
    ),
]
AllowCidr = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-cidr", metavar="NETWORK", help="Let only these networks in; again for more.", show_default=False
    ),
]
DenyCidr = Annotated[
    list[str] | None,
    typer.Option(
        "--deny-cidr",
        metavar="NETWORK",
        help="Keep this network out, looked at before --allow-cidr; again for more.",
        show_default=False,
    ),
]
HostHeader = Annotated[
    str | None,
    typer.Option(
        "--host-header",
        metavar="preserve|rewrite|NAME",
        help="Host that the target sees: the visitor's, its own, or a name [preserve].",
        show_default=False,
    ),
]
RequestHeaderAdd = Annotated[
    list[str] | None,
    typer.Option("--request-header-add", metavar="'NAME: VALUE'", help="Add a header to requests.", show_default=False),
]
RequestHeaderRemove = Annotated[
    list[str] | None,
    typer.Option("--request-header-remove", metavar="NAME", help="Take a header out of requests.", show_default=False),
]
ResponseHeaderAdd = Annotated[
    list[str] | None,
    typer.Option("--response-header-add", metavar="'NAME: VALUE'", help="Add a header to answers.", show_default=False),
]
ResponseHeaderRemove = Annotated[
    list[str] | None,
    typer.Option("--response-header-remove", metavar="NAME", help="Take a header out of answers.", show_default=False),
]
MutualTlsCas = Annotated[
    Path | None,
    typer.Option(
        "--mutual-tls-cas",
        metavar="FILE",
        help="Visitors need a certificate of one of these CAs (PEM).",
        show_default=False,
    ),
]
HttpsOnly = Annotated[bool, typer.Option("--https-only", help="Refuse visitors who come without TLS.")]
HttpsRedirect = Annotated[bool, typer.Option("--https-redirect", help="Send visitors who come without TLS to https.")]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy-file",
        metavar="FILE",
        help="The tunnel's policy (YAML or JSON); the options above add to it [the one that the tunnel has].",
        show_default=False,
    ),
]
PrintPolicy = Annotated[
    bool, typer.Option("--print-policy", help="Print the policy that the options make, and do nothing else.")
]


def plain_http(only: bool, redirect: bool) -> str | None:
    """What ``--https-only`` and ``--https-redirect`` say; raises ``config.invalid`` for both."""
    if only and redirect:
        raise Problem("config.invalid", "give --https-only or --https-redirect, not both")
    return "refuse" if only else "redirect" if redirect else None


def basic_auth(typed: list[str] | None) -> list[str]:
    """The users that were typed, else those of PORTICO_BASIC_AUTH, one a line."""
    if typed:
        return typed
    found = settings.agent_settings().basic_auth
    return [line for line in found.reveal().splitlines() if line] if found is not None else []


def wanted(sugar: Sugar, file: Path | None, protocol: str) -> dict[str, Any] | None:
    """The policy that the command line says, ``None`` for none; raises ``config.invalid``."""
    from portico.agent import policies
    from portico.wire import policy, policy_check

    if file is None and not sugar.given():
        return None
    try:
        short = policies.compiled(sugar)
    except policies.SugarError as err:
        raise Problem("config.invalid", f"--{err.name.replace('_', '-')}: {err}") from None
    written: dict[str, Any] = {}
    if file is not None:
        found = policies.read_file(file)
        if found.faults:
            raise refused(str(file), found)
        written = found.document
    try:
        document = policy.canonical(policies.merged(written, short))
    except policies.Contradiction as err:
        text = str(err)
        for name in ("basic_auth", "mutual_tls_cas", "https_only", "https_redirect", "host_header"):
            text = text.replace(f" {name} ", f" --{name.replace('_', '-')} ")
        raise Problem("config.invalid", f"{file}: {text}") from None
    except policy.PolicyInvalid as err:
        raise Problem("config.invalid", f"the policy is not valid: {err}") from None
    if faults := policy_check.check_protocol(document, protocol):
        raise Problem("config.invalid", f"policy.{faults[0].path}: {faults[0].message}")
    return document


def show(document: dict[str, Any] | None, json: bool) -> None:
    """What ``--print-policy`` prints."""
    from portico.agent import policies

    if document is None:
        output.note("no option says anything of a policy: the tunnel keeps the one that it has, or has none")
        return
    shown = policies.masked(document)
    if json:
        output.print_json(shown)
    else:
        output.echo(policies.as_yaml(shown).rstrip("\n"))


def refused(name: str, found: Written) -> Problem:
    """All faults of a policy file on standard error, and the problem that ends the command."""
    from portico.agent.tunnel_file import Fault

    lines, color = found.text.splitlines(), settings.color_wanted(sys.stderr)
    for line, column, path, message in found.faults:
        text = f"{path}: {message}" if path else message
        source = lines[line - 1] if 0 < line <= len(lines) else ""
        output.note(Fault(name, line, column, text, source).text(color))
    count = f"{len(found.faults)} faults" if len(found.faults) > 1 else "a fault"
    return Problem("config.invalid", f"the policy has {count}", hint="Correct what is marked above.")
