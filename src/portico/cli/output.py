"""What every command prints alike: the error line, JSON, tables; and its exit codes."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from portico import settings
from portico.errors import Problem

if TYPE_CHECKING:
    from rich.console import Console

OK, FAILED, USAGE, REFUSED, UNREACHABLE, TUNNEL_REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
#: What each exit code says to a script (docs/reference/exit-codes.md): in a word, and when.
EXIT_CODES: dict[int, tuple[str, str]] = {
    OK: ("done", "The command did what it says. Tunnels: they were stopped by SIGTERM, or every one's `--ttl` was over."),
    FAILED: ("failed", "Something else went wrong; `diagnose` and `doctor` found a fault, `demo --once` got no right answer."),
    USAGE: ("wrong usage", "A command line, setting, target or `portico.yml` that cannot be used. Nothing was started."),
    REFUSED: ("credential refused", "This machine is not signed in, or its key was refused or revoked."),
    UNREACHABLE: ("not reachable", "The API, its database, or the proxy on the way does not answer; trying later can help."),
    TUNNEL_REFUSED: ("tunnel refused", "The platform refused the tunnel, or ended it (stopped, deleted, its session revoked)."),
    INTERRUPTED: ("interrupted", "Ctrl-C; requests in flight finished within `drain_seconds`."),
}  # fmt: skip
FAULT_LOG_MAX_BYTES = 1024 * 1024

#: Error codes, then areas of them, that have an exit code of their own; all others end with FAILED.
EXIT_BY_CODE = {
    "config.invalid": USAGE,
    "target.invalid": USAGE,
    "api.unreachable": UNREACHABLE,
    "service.unavailable": UNREACHABLE,
}
EXIT_BY_AREA = {
    "auth": REFUSED,
    "device": REFUSED,
    "proxy": UNREACHABLE,
    "quota": TUNNEL_REFUSED,
    "session": TUNNEL_REFUSED,
    "tunnel": TUNNEL_REFUSED,
}


def exit_code(problem: Problem) -> int:
    """The exit code that a script sees for ``problem``."""
    return EXIT_BY_CODE.get(problem.code) or EXIT_BY_AREA.get(problem.code.split(".")[0], FAILED)


def echo(text: str = "") -> None:
    """A line on standard output, at once: scripts read it from a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A line for people, on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def error_line(problem: Problem) -> None:
    """``portico: what happened. What to do. (code)`` on standard error."""
    label = "\x1b[1;31mportico:\x1b[0m" if settings.color_wanted(sys.stderr) else "portico:"
    note(f"{label} {problem.line()}")


def usage_line(err: Any) -> None:
    """What is wrong with a command line, and where its help is; or the help itself, when nothing was typed."""
    message = str(err.format_message()).strip()
    if "\n" in message:  # a command that cannot do anything without arguments shows its help
        note(message)
        return
    context = getattr(err, "ctx", None)
    command = context.command_path if context is not None else "portico"
    end = "" if message.endswith(("?", "!", ".")) else "."
    label = "\x1b[1;31mportico:\x1b[0m" if settings.color_wanted(sys.stderr) else "portico:"
    note(f"{label} {message[:1].lower()}{message[1:]}{end} See: {command} --help")


def fault(err: BaseException) -> None:
    """An error that nobody foresaw: one line, the rest into a file; with PORTICO_DEBUG=1 all of it here."""
    text = "".join(traceback.format_exception(err))
    if settings.debug_enabled():
        note(text)
        return
    path = settings.default_state_dir() / "faults.log"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = not path.exists() or path.stat().st_size > FAULT_LOG_MAX_BYTES
        with path.open("w" if fresh else "a", encoding="utf-8") as file:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            file.write(f"{stamp} portico {' '.join(sys.argv[1:2])}\n{text}\n")
        where = f"The traceback is in {path}"
    except OSError:
        where = "PORTICO_DEBUG=1 shows the traceback"
    note(
        f"portico: unexpected error: {type(err).__name__}: {' '.join(str(err).split())[:300]}. {where}; please report it."
    )


def display_mode(json: bool) -> str:
    """How a running agent shows itself: ``json`` lines, the live ``screen`` of a terminal that can draw one, or ``lines``."""
    if json:
        return "json"
    return "screen" if settings.screen_wanted(sys.stdout, sys.stderr) else "lines"


def print_json(value: Any) -> None:
    """One JSON value on standard output, indented for a terminal and on one line for a pipe."""
    echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None, default=str, ensure_ascii=False))


def console(*, stderr: bool = False) -> Console:
    """A rich console (its import costs 50 ms: only where something is drawn)."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str = "Nothing here.") -> None:
    """Rows under headings, as wide as they need; ``empty`` (on standard error) when there is none.

    Cells are shown as text: nothing in them is markup, and control characters are made visible.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if not cells:
        note(empty)
        return
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    bold = ("\x1b[1m", "\x1b[0m") if settings.color_wanted(sys.stdout) else ("", "")
    for number, row in enumerate([[c.upper() for c in columns], *cells]):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        echo(f"{bold[0]}{line}{bold[1]}" if number == 0 else line)


def printable(text: str) -> str:
    """``text`` with control characters made visible: nothing that came from elsewhere drives the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
