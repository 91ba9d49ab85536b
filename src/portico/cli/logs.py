"""`portico logs`: what happened to tunnels."""

from __future__ import annotations

import json as jsonlib
import select
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico import settings
from portico.cli import output
from portico.cli.account import ServerOption, signed_in
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.events import Event, History
    from portico.kit.paint import Paint

SHOWN = 20


def logs(
    tunnels: Annotated[
        list[str] | None,
        typer.Argument(metavar="TUNNEL", help="Names or ids [all tunnels of your organization].", show_default=False),
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Wait for what happens next, until Ctrl-C.")] = False,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="TIME",
            help="Nothing older: 10m, 2h, 7d, or a time (2026-05-01, 2026-05-01T12:00:00Z).",
            show_default=False,
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            "-n", "--number", min=0, help=f"How many of the newest [{SHOWN}, with --since all].", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    server: ServerOption = None,
) -> None:
    """What happened to tunnels: online, offline and why, stopped, changed.

    Oldest first. For the requests that visitors make, look at the screen of `portico http` or at its local page. With -f it
    goes on over outages of the API, says so on standard error, and misses nothing meanwhile.
    """
    from portico.kit import loop

    config, found = signed_in(server)
    moment = _moment(since) if since is not None else None
    count = number if number is not None else None if moment is not None else SHOWN
    loop.run(_show(config, found, tunnels or [], follow, moment, count, _Printer(json)))


async def _show(
    config: settings.AgentSettings,
    found: Any,
    names: list[str],
    follow: bool,
    since: datetime | None,
    count: int | None,
    printer: _Printer,
) -> None:
    from portico.agent.api import Api
    from portico.agent.events import History

    api = Api(found.server, found.agent_key, config)
    try:
        ids = [(await api.find_tunnel(name))["id"] for name in names]
        history = History(api, ids)
        if follow:
            await history.mark(config.logs_overlap_seconds)
        events = await history.latest(count, since)
        for event in events:
            printer(event)
        if follow:
            await _follow(history, config, printer)
        elif not events and not printer.json:
            output.note("Nothing happened." if since is not None else "Nothing happened yet.")
    finally:
        await api.aclose()


async def _follow(history: History, config: settings.AgentSettings, printer: _Printer) -> None:
    import asyncio

    closed = asyncio.create_task(_reader_gone(config.logs_poll_seconds))
    news = asyncio.create_task(_print_news(history, config, printer))
    try:
        done, _ = await asyncio.wait((closed, news), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        closed.cancel()
        news.cancel()
        await asyncio.gather(closed, news, return_exceptions=True)


async def _print_news(history: History, config: settings.AgentSettings, printer: _Printer) -> None:
    events = history.follow(
        poll=config.logs_poll_seconds,
        retry_max=config.logs_retry_max_seconds,
        overlap=config.logs_overlap_seconds,
        waiting=_say_outage,
    )
    async for event in events:
        printer(event)


async def _reader_gone(every: float) -> None:
    """Raise ``BrokenPipeError`` when nobody reads standard output any more: without news a write would not find out."""
    import asyncio

    if sys.stdout.isatty() or not hasattr(select, "poll"):
        await asyncio.Event().wait()
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    while True:
        await asyncio.sleep(every)
        if any(happened & (select.POLLERR | select.POLLNVAL) for _, happened in poll.poll(0)):
            raise BrokenPipeError


def _say_outage(problem: Problem | None) -> None:
    output.note(f"portico: {problem.detail}; trying again …" if problem is not None else "portico: the API is back")


def _moment(text: str) -> datetime:
    """A time, or how long ago; raises ``config.invalid``."""
    from portico.agent.durations import parse_duration

    try:
        return datetime.now(UTC) - timedelta(seconds=parse_duration(text.strip()))
    except (ValueError, OverflowError):
        pass  # then it is a time
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.astimezone(UTC)  # without a zone it is meant as this machine's time
    except (ValueError, OverflowError):
        raise Problem(
            "config.invalid", f"--since {text!r} is no time", hint="Write 10m, 2h, 7d or 2026-05-01T12:00:00Z."
        ) from None


class _Printer:
    """One event a line, for people or for programs."""

    def __init__(self, json: bool) -> None:
        from portico.kit.paint import Paint

        self.json = json
        self._paint = Paint(settings.color_wanted(sys.stdout))
        self._width = 0

    def __call__(self, event: Event) -> None:
        if self.json:
            row = {"id": event.id, "at": event.at.isoformat().replace("+00:00", "Z"), "tunnel": event.tunnel}
            output.echo(
                jsonlib.dumps(
                    {**row, "name": event.name, "kind": event.kind, "details": event.details}, ensure_ascii=False
                )
            )
            return
        self._width = max(self._width, len(event.name))
        when = self._paint.dim(f"{event.at.astimezone():%Y-%m-%d %H:%M:%S}")
        kind = _style(self._paint, event.kind)
        line = f"{when}  {output.printable(event.name):<{self._width}}  {kind}  {output.printable(described(event))}"
        output.echo(line.rstrip())


def _style(paint: Paint, kind: str) -> str:
    text = f"{output.printable(kind):<8}"
    return {
        "online": paint.good,
        "started": paint.good,
        "offline": paint.warn,
        "stopped": paint.bad,
        "frozen": paint.bad,
    }.get(kind, str)(text)


def described(event: Event) -> str:
    """The details of an event in a few words."""
    details = event.details
    agent = f" from {details['agent']}" if details.get("agent") else ""
    match event.kind:
        case "online":
            return f"at {details.get('relay', '?')}{agent}"
        case "offline":
            return f"{details.get('reason') or 'the agent is gone'} (at {details.get('relay', '?')}{agent})"
        case "created":
            return f"subdomain {details['subdomain']}" if details.get("subdomain") else ""
        case "session":
            return f"asked for by an agent ({details.get('session', '?')})"
        case "stopped":
            return "by its owner"
        case "started":
            return ""
        case "frozen" | "thawed":
            plan = f"the plan {_plain(details.get('plan', '?'))}"
            why = _plain(details.get("for", "?")).replace("_", " ")
            return f"{plan} has no room ({why})" if event.kind == "frozen" else f"{plan} has room again"
        case _:
            return ", ".join(f"{key}={_plain(value)}" for key, value in details.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(logs)
