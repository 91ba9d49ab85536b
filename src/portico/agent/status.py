"""What a person or a script sees of a running agent: a live screen, log lines, or one JSON object a line.

Nothing here runs per request: a display wakes a few times a second, reads the counters and writes what is new, at most
``request_lines_per_second`` of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from portico.agent.api import VERSION
from portico.agent.client import Agent, Events, Tunnel
from portico.agent.durations import shown_duration
from portico.agent.stats import Record, Stats
from portico.settings import AgentSettings

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

log = logging.getLogger("portico.agent")


#: Seconds before the same failure of the target is told again.
WARN_SECONDS = 10.0


def printable(text: str) -> str:
    """``text`` without anything that could drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def path_of(record: Record) -> str:
    """The path of a request, for showing."""
    return printable(record.path.decode("utf-8", "replace"))


def end_of(tunnel: Tunnel) -> str:
    """Why a tunnel without a problem is over."""
    if tunnel.state == "removed" or tunnel.ttl is None:
        return f"tunnel {tunnel.name} removed"
    return f"tunnel {tunnel.name} ended after its {shown_duration(tunnel.ttl)}"


class Display(Events):
    """What all displays do: wake, take the new requests within the limit, hand them to :meth:`requests`."""

    def __init__(self, settings: AgentSettings, stats: Stats) -> None:
        self.settings = settings
        self.stats = stats
        self.agent: Agent | None = None
        self._seen = 0
        self._failures = 0
        self._warned: tuple[str, float] = ("", -WARN_SECONDS)

    async def run(self) -> None:
        """Write what is new until cancelled."""
        while True:
            await asyncio.sleep(1 / self.settings.screen_redraws)
            self.tick()

    def tick(self) -> None:
        """One look at the counters."""
        self.stats.sample()
        self._warn_of_failures()
        before = self._seen
        if self.stats.written == before:
            return
        records, self._seen = self.stats.since(before)
        most = max(1, int(self.settings.request_lines_per_second / self.settings.screen_redraws))
        shown = records[-most:]
        self.requests(shown, self._seen - before - len(shown))

    def _warn_of_failures(self) -> None:
        """Say why the target cannot be reached: at once, and the same again only after a while."""
        new = self.stats.failures - self._failures
        if not new:
            return
        why, now = self.stats.last_failure, time.monotonic()
        if why == self._warned[0] and now - self._warned[1] < WARN_SECONDS:
            return
        self._failures += new
        self._warned = (why, now)
        self.warning(why if new == 1 else f"{why} ({new} times)")

    def requests(self, records: list[Record], skipped: int) -> None:
        """Requests that ended since the last look; ``skipped`` more are not shown."""

    def close(self) -> None:
        """Write what is left."""
        self.tick()


class Lines(Display):
    """Log lines on stderr; the URL of each tunnel on stdout too."""

    def connection(self, state: str, detail: str) -> None:
        level = logging.WARNING if detail else logging.INFO
        log.log(level, "session %s", state, extra={"f": {"detail": detail} if detail else {}})

    def tunnel(self, tunnel: Tunnel) -> None:
        if tunnel.state == "online":
            sys.stdout.write(f"{tunnel.url} -> {tunnel.target}\n")
            sys.stdout.flush()
            log.info("tunnel online", extra={"f": {"name": tunnel.name, "url": tunnel.url, "target": tunnel.target}})
        elif tunnel.problem is not None and tunnel.state != "removed":
            fields = {"name": tunnel.name, "code": tunnel.problem.code, "detail": tunnel.problem.detail}
            log.warning("tunnel %s", tunnel.state, extra={"f": fields})
        elif tunnel.over:
            log.info("%s", end_of(tunnel), extra={"f": {"url": tunnel.url}})

    def warning(self, text: str) -> None:
        log.warning("%s", text)

    def note(self, text: str) -> None:
        log.info("%s", text)

    def requests(self, records: list[Record], skipped: int) -> None:
        if skipped > 0:
            log.info("requests not shown", extra={"f": {"count": skipped}})
        for r in records:
            fields = {"status": r.status, "ms": f"{r.seconds * 1000:.1f}"}
            log.info("%s %s", r.method.decode("latin-1"), path_of(r), extra={"f": fields})


class JsonLines(Display):
    """One JSON object a line on stdout. The first of each tunnel is its ``online`` (or an ``error`` if it never was).

    An ``online`` that comes again says that the tunnel is back, or what its target or URL is now; the last of a tunnel is
    ``error`` (by the platform), ``ended`` (its ttl) or ``removed`` (from the file).
    """

    def __init__(self, settings: AgentSettings, stats: Stats, out: TextIO | None = None) -> None:
        super().__init__(settings, stats)
        self._out = out or sys.stdout

    def _put(self, event: str, **members: Any) -> None:
        self._out.write(json.dumps({"event": event, **members}, ensure_ascii=False) + "\n")

    def connection(self, state: str, detail: str) -> None:
        if state == "reconnecting":
            self._put("reconnecting", detail=detail)
            self._out.flush()
        elif state == "connecting":
            log.warning("%s", detail)

    def tunnel(self, tunnel: Tunnel) -> None:
        members: dict[str, Any] = {"name": tunnel.name, "url": tunnel.url, "target": tunnel.target}
        if tunnel.grant is not None:
            members["tunnel"] = tunnel.grant.tunnel
        if tunnel.problem is not None and tunnel.state in ("offline", "ended"):
            members |= {"code": tunnel.problem.code, "detail": tunnel.problem.detail}
        event = {"ended": "error" if tunnel.problem is not None else "ended"}.get(tunnel.state, tunnel.state)
        if event == "starting" or (event == "offline" and not tunnel.was_online):
            return
        if event == "ended":
            members["reason"] = "ttl"
        self._put(event, **members)
        self._out.flush()

    def warning(self, text: str) -> None:
        log.warning("%s", text)

    def note(self, text: str) -> None:
        log.info("%s", text)

    def requests(self, records: list[Record], skipped: int) -> None:
        if skipped > 0:
            self._put("requests_skipped", count=skipped)
        for r in records:
            started = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(r.ended - r.seconds))
            millis = int((r.ended - r.seconds) % 1 * 1000)
            self._put(
                "request",
                method=r.method.decode("latin-1"),
                path=r.path.decode("utf-8", "replace"),
                status=r.status,
                duration_ms=round(r.seconds * 1000, 3),
                started_at=f"{started}.{millis:03d}Z",
            )
        self._out.flush()


class _LastLine(logging.Handler):
    """Keeps the newest warning for the screen, where a log line would tear it."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.WARNING)
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.message = record.getMessage()


class Screen(Display):
    """The live screen of a terminal; drawn only when something changed."""

    def __init__(self, settings: AgentSettings, stats: Stats, *, color: bool, console: Console | None = None) -> None:
        super().__init__(settings, stats)
        from rich.console import Console as RichConsole
        from rich.live import Live

        self.message = ""
        self.state = "connecting"
        self.detail = ""
        self._recent: deque[Record] = deque(maxlen=settings.screen_requests)
        self._dirty = True
        self._drawn_latency = ""
        self._console = console or RichConsole(highlight=False, no_color=not color)
        self._live = Live(console=self._console, auto_refresh=False, screen=True, transient=True)
        self._handler = _LastLine(self)
        self._open = self._gone = False

    def _start(self) -> None:
        root = logging.getLogger()
        root.handlers[:] = [self._handler]
        self._live.start()
        self._open = True

    def connection(self, state: str, detail: str) -> None:
        self.state, self.detail, self._dirty = state, detail, True

    def tunnel(self, tunnel: Tunnel) -> None:
        self._dirty = True
        if tunnel.state == "ended" and tunnel.problem is not None:
            self.message = f"{tunnel.name}: {tunnel.problem.detail}"
        elif tunnel.over:
            self.message = end_of(tunnel)

    def warning(self, text: str) -> None:
        self.message, self._dirty = text, True

    def note(self, text: str) -> None:
        self.message, self._dirty = text, True

    def requests(self, records: list[Record], skipped: int) -> None:
        self._recent.extend(records)
        self._dirty = True

    def tick(self) -> None:
        super().tick()
        latency = self._latency()
        if self._gone or (not self._dirty and latency == self._drawn_latency):
            return
        self._dirty, self._drawn_latency = False, latency
        with self._terminal():
            if not self._open:
                self._start()
            self._live.update(self.render(), refresh=True)

    @contextlib.contextmanager
    def _terminal(self) -> Iterator[None]:
        """Around what is written: a terminal that went away (its window was closed) is no fault, and is left alone then."""
        try:
            yield
        except OSError:
            self._gone = True
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):
                os.dup2(null, stream.fileno())

    def _latency(self) -> str:
        link = self.agent.link if self.agent is not None else None
        rtt = link.carrier.rtt if link is not None and not link.lost else None
        return f"{rtt * 1000:.0f} ms" if rtt is not None else "–"

    def render(self) -> RenderableType:
        """The screen's content."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        stats, agent = self.stats, self.agent
        info = agent.info if agent is not None else None
        link = agent.link if agent is not None else None
        facts = Table.grid(padding=(0, 3))
        style = {"online": "bold green", "ended": "bold red"}.get(self.state, "bold yellow")
        facts.add_row("Session", Text(f"{self.state}{' · ' + self.detail if self.detail else ''}", style))
        if info is not None:
            facts.add_row("Account", Text(printable(info.account) + (f" ({info.plan})" if info.plan else "")))
        facts.add_row("Version", VERSION)
        if link is not None and not link.lost:
            facts.add_row("Region", Text(printable(f"{link.region or 'default'} · {link.relay}")))
        facts.add_row("Latency", self._drawn_latency or "–")
        for tunnel in agent.tunnels if agent is not None else ():
            arrow = Text(printable(tunnel.url or tunnel.name or "…"), "bold cyan").append(" → ", "default")
            arrow.append(printable(tunnel.target), "default")
            if tunnel.state != "online":
                arrow.append(f"  {tunnel.state}", "yellow")
            facts.add_row("Forwarding", arrow)
        counts = Table.grid(padding=(0, 3))
        for heading in ("ttl", "opn", "rt1", "rt5", "p50", "p90"):
            counts.add_column(heading, justify="right", min_width=6)
        counts.add_row("ttl", "opn", "rt1", "rt5", "p50", "p90", style="dim")
        counts.add_row(
            str(stats.total), str(stats.open), f"{stats.rate_1:.2f}", f"{stats.rate_5:.2f}",
            f"{stats.percentile(0.5) * 1000:.1f}", f"{stats.percentile(0.9) * 1000:.1f}",
        )  # fmt: skip
        facts.add_row("Connections", counts)
        parts: list[RenderableType] = [Text("portico", "bold").append("  (Ctrl-C ends)", "dim"), "", facts]
        if self.message or stats.last_failure:
            parts += [
                "",
                Text(printable(self.message or stats.last_failure), "yellow", overflow="ellipsis", no_wrap=True),
            ]
        if self._recent:
            parts += ["", Text("HTTP requests", "bold"), self._request_table()]
        return Group(*parts)

    def _request_table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for r in reversed(self._recent):
            at = r.ended - r.seconds
            stamp = time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1000):03d}"
            style = "green" if r.status < 400 else "yellow" if r.status < 500 else "red"
            path = Text(path_of(r)[:200], no_wrap=True, overflow="ellipsis")
            took = f"{r.seconds * 1000:.1f} ms"
            table.add_row(Text(stamp, "dim"), r.method.decode("latin-1")[:12], path, Text(str(r.status), style), took)
        return table

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._open and not self._gone:
            self._open = False
            with self._terminal():
                self._live.stop()


def make_display(mode: str, settings: AgentSettings, stats: Stats, *, color: bool) -> Display:
    """The display for ``screen``, ``lines`` or ``json``."""
    if mode == "json":
        return JsonLines(settings, stats)
    return Screen(settings, stats, color=color) if mode == "screen" else Lines(settings, stats)
