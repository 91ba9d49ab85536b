"""The `portico` command: which file has which command, help in sections, and how errors end.

Only the file of the command that was typed is imported; help and completion import all of them, so none may import
anything heavy at its top (`portico --help` ≤ 0.25 s). For the same reason help is typer's plain one: its rich rendering
alone takes 0.3 s.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from portico.cli import output
from portico.errors import Problem

#: Sections of the help, each with its commands in order, and the module that registers them.
SECTIONS: dict[str, dict[str, str]] = {
    "For developers": {
        "http": "tunnel",
        "tcp": "tcp",
        "tls": "tls",
        "start": "start",
        "config": "config",
        "service": "service",
        "policy": "policy",
        "ls": "tunnel",
        "stop": "tunnel",
        "rm": "tunnel",
        "domains": "domains",
        "logs": "logs",
        "login": "account",
        "logout": "account",
        "whoami": "account",
        "usage": "usage",
        "billing": "billing",
        "keys": "keys",
        "diagnose": "diagnose",
        "completion": "completion",
    },
    "Portico on one machine": {"demo": "platform", "up": "platform", "doctor": "platform", "dev-ca": "dev_ca"},
    "For operators: one process each": {
        "api": "processes",
        "relay": "processes",
        "worker": "processes",
        "migrate": "processes",
        "admin": "admin",
        "audit": "audit",
    },
}
#: Started by `portico up` alone; not in the help.
HIDDEN = {"prepare": "processes", "simulators": "processes"}
MODULES = {name: module for section in SECTIONS.values() for name, module in section.items()} | HIDDEN


class SectionedGroup(TyperGroup):
    """The top command; its help lists the commands by section."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in MODULES if name in self.commands]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in SECTIONS.items():
            rows = [(name, self.commands[name]) for name in names if name in self.commands]
            with formatter.section(title):
                formatter.write_dl([(name, command.get_short_help_str(100)) for name, command in rows])


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        output.echo(f"portico {version('portico')}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Public URLs for local apps, on your own machines.

    Try it: `portico demo`. Then, in another terminal: `portico http 8000`.
    """


def build(modules: set[str] | None = None) -> typer.Typer:
    """The application with the commands of ``modules``, or all."""
    app = typer.Typer(
        cls=SectionedGroup,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        epilog="Exit codes: "
        + ", ".join(f"{code} {word}" for code, (word, _) in output.EXIT_CODES.items())
        + " (docs/reference/exit-codes.md).",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )
    app.callback()(_top)
    for module in sorted(set(MODULES.values()) if modules is None else modules):
        importlib.import_module(f"portico.cli.{module}").register(app)
    return app


def _needed(args: list[str]) -> set[str] | None:
    """The modules that this command line needs; ``None``: all of them."""
    first = args[0] if args else ""
    if first == "--version":
        return set()
    return {MODULES[first]} if first in MODULES else None


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: one line for every refusal, no traceback."""
    args = sys.argv[1:] if argv is None else argv
    try:
        # Not standalone: typer would print usage errors in four lines of its own. An exit code is returned then.
        code = build(_needed(args))(args=args, prog_name="portico", standalone_mode=False)
        sys.exit(code or output.OK)
    except typer.TyperException as err:
        output.usage_line(err)
        sys.exit(output.USAGE)
    except typer.Abort:
        sys.exit(output.INTERRUPTED)
    except BrokenPipeError:  # `portico ls | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush into the pipe
        sys.exit(output.FAILED)
    except Problem as problem:
        output.error_line(problem)
        sys.exit(output.exit_code(problem))
    except KeyboardInterrupt:
        sys.exit(output.INTERRUPTED)
    except Exception as err:  # the last boundary: a person reads what comes out
        output.fault(err)
        sys.exit(output.FAILED)
