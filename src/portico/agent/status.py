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
from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from portico.agent import policies
from portico.agent.api import VERSION
from portico.agent.client import Agent
from portico.agent.durations import shown_duration
from portico.agent.refusals import News, Refusals, summary
from portico.agent.stats import CONNECTIONS, Record, Stats
from portico.agent.tunnel import Events, Tunnel
from portico.kit.clock import uptime
from portico.settings import AgentSettings, color_wanted

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

log = logging.getLogger("portico.agent")

#: Rows that requests get before tunnels beyond the first ones do: an empty one, a heading, three requests.
REQUEST_ROWS = 5
#: Columns before the values: the longest label and the space behind it.
LABEL_COLUMNS = 14


#: Seconds before the same failure of the target is told again.
WARN_SECONDS = 10.0


def printable(text: str) -> str:
    """``text`` without anything that could drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def path_of(record: Record) -> str:
    """The path of a request, for showing."""
    return printable(record.path.decode("utf-8", "replace"))


def id_of(record: Record) -> str:
    """The id of a request, for showing."""
    return printable(record.id.decode("utf-8", "replace"))


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
        #: Whether URLs are shown as QR codes too.
        self.qr = False
        self._shown: set[str] = set()
        #: URL of the local page, when there is one.
        self.inspector = ""
        self._seen = 0
        self._failures = 0
        self._refusals = Refusals()
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
        self._tell_refusals()
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

    def _tell_refusals(self) -> None:
        """Say whom the edge refused; they never came here."""
        for news in self._refusals.news(self.agent.tunnels if self.agent is not None else ()):
            self.refused(news)

    def refused(self, news: News) -> None:
        """Visitors of a tunnel were refused at the edge."""

    def show_qr(self, tunnel: Tunnel) -> None:
        """The URL of a tunnel that is online for the first time as a QR code on stderr: stdout belongs to programs."""
        if not self.qr or tunnel.name in self._shown or not tunnel.url.startswith("http"):
            return
        self._shown.add(tunnel.name)
        from portico.kit.qr import qr_lines

        sys.stderr.write("\n".join(["", *qr_lines(tunnel.url, color=color_wanted(sys.stderr)), tunnel.url, ""]) + "\n")
        sys.stderr.flush()

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
            fields = {"name": tunnel.name, "url": tunnel.url, "target": tunnel.target}
            if self.inspector:
                fields["inspector"] = self.inspector
            log.info("tunnel online", extra={"f": fields})
            self.show_qr(tunnel)
        elif tunnel.problem is not None and tunnel.state != "removed":
            fields = {"name": tunnel.name, "code": tunnel.problem.code, "detail": tunnel.problem.detail}
            log.warning("tunnel %s", tunnel.state, extra={"f": fields})
        elif tunnel.over:
            log.info("%s", end_of(tunnel), extra={"f": {"url": tunnel.url}})

    def warning(self, text: str) -> None:
        log.warning("%s", text)

    def note(self, text: str) -> None:
        log.info("%s", text)

    def refused(self, news: News) -> None:
        fields = {"name": news.tunnel.name, "code": news.code, "count": news.more, "total": news.total}
        log.info("visitors refused at the edge", extra={"f": fields})

    def requests(self, records: list[Record], skipped: int) -> None:
        if skipped > 0:
            log.info("requests not shown", extra={"f": {"count": skipped}})
        for r in records:
            fields: dict[str, Any] = {"status": r.status} if r.status else {}
            fields["ms"] = f"{r.seconds * 1000:.1f}"
            fields |= {"request": id_of(r)} if r.id else {}
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
        if event == "offline" and not tunnel.was_online and tunnel.problem is not None:
            self.warning(f"{tunnel.name} is not online yet, trying again: {tunnel.problem.detail}")
        if event == "starting" or (event == "offline" and not tunnel.was_online):
            return
        if event == "ended":
            members["reason"] = "ttl"
        if event == "online" and self.inspector:
            members["inspector"] = self.inspector
        self._put(event, **members)
        self._out.flush()
        if event == "online":
            self.show_qr(tunnel)

    def warning(self, text: str) -> None:
        log.warning("%s", text)

    def note(self, text: str) -> None:
        log.info("%s", text)

    def refused(self, news: News) -> None:
        self._put("refused", name=news.tunnel.name, code=news.code, count=news.more, total=news.total)
        self._out.flush()

    def requests(self, records: list[Record], skipped: int) -> None:
        if skipped > 0:
            self._put("requests_skipped", count=skipped)
        for r in records:
            started = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(r.ended - r.seconds))
            millis = int((r.ended - r.seconds) % 1 * 1000)
            times = {"duration_ms": round(r.seconds * 1000, 3), "started_at": f"{started}.{millis:03d}Z"}
            path = r.path.decode("utf-8", "replace")
            ident = {"request_id": id_of(r)} if r.id else {}
            if r.method in CONNECTIONS:
                self._put("connection", visitor=path, **times, **ident)
            else:
                self._put("request", method=r.method.decode("latin-1"), path=path, status=r.status, **times, **ident)
        self._out.flush()


def _address(tunnel: Tunnel) -> str:
    return printable(tunnel.url or tunnel.name or "…")


def _policies(tunnels: list[Tunnel]) -> str:
    """What stands before the tunnels, as their grants say; with a name where there are several."""
    found = [(tunnel.name, policies.summary_of_grant(tunnel.grant.grant)) for tunnel in tunnels if tunnel.grant]
    if len(tunnels) == 1:
        return found[0][1] if found else ""
    return " · ".join(f"{name}: {text}" for name, text in found if text)


def _time_left(tunnel: Tunnel) -> str:
    return shown_duration((tunnel.ends_at or 0) - uptime())


def _counted(tunnels: list[Tunnel], shown: list[Tunnel]) -> str:
    """What is not shown: `and 12 more: 11 online, 1 offline`."""
    rest = Counter(tunnel.state for tunnel in tunnels if tunnel not in shown)
    return f"and {rest.total()} more: " + ", ".join(f"{count} {state}" for state, count in rest.most_common())


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
        self._drawn: tuple[Any, ...] = ()
        self._console = console or RichConsole(highlight=False, no_color=not color)
        self._live = Live(console=self._console, auto_refresh=False, screen=True, transient=True)
        self._handler = _LastLine(self)
        self._open = self._gone = False
        #: What the terminal keeps when the screen is gone: why tunnels ended.
        self._last_words: list[str] = []

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
        if tunnel.state == "ended":
            self._last_words.append(self.message)

    def warning(self, text: str) -> None:
        self.message, self._dirty = text, True

    def note(self, text: str) -> None:
        self.message, self._dirty = text, True

    def requests(self, records: list[Record], skipped: int) -> None:
        self._recent.extend(records)
        self._dirty = True

    def tick(self) -> None:
        super().tick()
        drawn = (self._latency(), self._times_left(), self._refused(), self._console.size)
        if self._gone or (not self._dirty and drawn == self._drawn):
            return
        self._dirty, self._drawn = False, drawn
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

    def _refused(self) -> str:
        return summary(self.agent.tunnels) if self.agent is not None else ""

    def _times_left(self) -> list[str]:
        return [_time_left(tunnel) for tunnel in self.agent.tunnels if tunnel.ends_at] if self.agent is not None else []

    def render(self) -> RenderableType:
        """The screen's content; as much of it as the window has room for, what is most wanted first."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        tunnels = list(self.agent.tunnels) if self.agent is not None else []
        coded, code = self._qr(tunnels)
        message = self.message or self.stats.last_failure
        room = self._console.size.height - 3 - (2 if message else 0) - (len(code) + 1 if code else 0)
        facts = Table.grid(padding=(0, 3))
        about = self._about()
        tight = coded is not None and room < len(about) + 4
        if room < len(about) + 4:
            about = about[:1]
        for label, text in about:
            facts.add_row(label, text)
        room -= len(about) + 2
        for label, text in self._forwarding(
            [coded] if coded is not None and tight else tunnels, max(1, room - REQUEST_ROWS)
        ):
            facts.add_row(label, text)
            room -= 1
        if (policy := _policies(tunnels)) and room > 0:
            facts.add_row("Policy", Text(printable(policy), "green", no_wrap=True, overflow="ellipsis"))
            room -= 1
        if room >= 0:
            facts.add_row("Connections", self._counts())
        if (refused := self._refused()) and room > 0:
            facts.add_row("Refused", Text(printable(refused), "yellow", no_wrap=True, overflow="ellipsis"))
            room -= 1
        gap = [] if tight else [""]
        used = facts.row_count + len(code) + (1 if message else 0)
        parts: list[RenderableType] = []
        if not tight or used + 2 < self._console.size.height:
            parts = [Text("portico", "bold").append("  (Ctrl-C ends)", "dim"), ""]
        parts.append(facts)
        if message:
            parts += [*gap, Text(printable(message), "yellow", overflow="ellipsis", no_wrap=True)]
        if code:
            parts += [*gap, *(Text(row, "" if self._console.no_color else "color(16) on color(231)") for row in code)]
        if self._recent and room > 2:
            parts += ["", Text(self._title(), "bold"), self._request_table(room - 2)]
        return Group(*parts)

    def _about(self) -> list[tuple[str, RenderableType]]:
        """What is said of the session; its state first."""
        from rich.text import Text

        style = {"online": "bold green", "ended": "bold red"}.get(self.state, "bold yellow")
        state = Text(
            f"{self.state}{' · ' + self.detail if self.detail else ''}", style, no_wrap=True, overflow="ellipsis"
        )
        rows: list[tuple[str, RenderableType]] = [("Session", state)]
        info = self.agent.info if self.agent is not None else None
        link = self.agent.link if self.agent is not None else None
        if info is not None:
            rows.append(("Account", Text(printable(info.account) + (f" ({info.plan})" if info.plan else ""))))
        rows.append(("Version", VERSION))
        if link is not None and not link.lost:
            rows.append(("Region", Text(printable(f"{link.region or 'default'} · {link.relay}"))))
        rows.append(("Latency", self._latency()))
        if self.inspector:
            rows.append(("Inspector", Text(self.inspector, "cyan")))
        return rows

    def _forwarding(self, tunnels: list[Tunnel], most: int) -> Iterator[tuple[str, Text]]:
        """A row for each tunnel; of more than fit those that are not online go first, and the last row counts the rest."""
        from rich.text import Text

        shown = tunnels
        if len(tunnels) > most:
            shown = sorted(tunnels, key=lambda tunnel: tunnel.state == "online")[: most - 1]
        width = max((len(_address(tunnel)) for tunnel in shown), default=0) if len(shown) > 1 else 0
        for number, tunnel in enumerate(shown):
            row = Text(_address(tunnel).ljust(width), "bold cyan", no_wrap=True, overflow="ellipsis")
            note, style = "", "red" if tunnel.over else "yellow"
            if tunnel.state != "online":
                note = f"  {tunnel.state}"
            elif tunnel.ends_at is not None:
                note, style = f"  ends in {_time_left(tunnel)}", "dim"
            target = printable(tunnel.target)
            left = self._console.width - LABEL_COLUMNS - len(row) - len(note) - 3
            if left >= min(8, len(target)):  # else the address and its state are all there is room for
                row.append(" → ", "default")
                row.append(target if len(target) <= left else target[: left - 1] + "…", "default")
            row.append(note, style)
            yield ("Forwarding" if number == 0 else "", row)
        if len(shown) < len(tunnels):
            yield ("" if shown else "Forwarding", Text(_counted(tunnels, shown), "dim"))

    def _counts(self) -> RenderableType:
        from rich.table import Table

        stats = self.stats
        counts = Table.grid(padding=(0, 3))
        for heading in ("ttl", "opn", "rt1", "rt5", "p50", "p90"):
            counts.add_column(heading, justify="right", min_width=6)
        counts.add_row("ttl", "opn", "rt1", "rt5", "p50", "p90", style="dim")
        counts.add_row(
            str(stats.total), str(stats.open), f"{stats.rate_1:.2f}", f"{stats.rate_5:.2f}",
            f"{stats.percentile(0.5) * 1000:.1f}", f"{stats.percentile(0.9) * 1000:.1f}",
        )  # fmt: skip
        return counts

    def _qr(self, tunnels: list[Tunnel]) -> tuple[Tunnel | None, list[str]]:
        """The first tunnel that is online and its code, if that was asked for and the window has room for it."""
        online = (tunnel for tunnel in tunnels if tunnel.state == "online" and tunnel.url.startswith("http"))
        coded = next(online, None) if self.qr else None
        if coded is None:
            return None, []
        from portico.kit.qr import qr_rows

        rows = qr_rows(coded.url, inverse=self._console.no_color)
        width, height = self._console.size
        if len(rows) + 4 > height or len(rows[0]) > width:
            self.message = self.message or f"the QR code needs a window of {len(rows[0])} × {len(rows) + 4}"
            return None, []
        return coded, rows

    def _title(self) -> str:
        connections = sum(record.method in CONNECTIONS for record in self._recent)
        if not connections:
            return "HTTP requests"
        return "Connections" if connections == len(self._recent) else "Requests and connections"

    def _request_table(self, most: int) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for r in list(reversed(self._recent))[:most]:
            at = r.ended - r.seconds
            stamp = time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1000):03d}"
            style = "green" if r.status < 400 else "yellow" if r.status < 500 else "red"
            path = Text(path_of(r)[:200], no_wrap=True, overflow="ellipsis")
            took = f"{r.seconds * 1000:.1f} ms"
            status = Text(str(r.status), style) if r.status else Text("closed", "dim")
            table.add_row(Text(stamp, "dim"), r.method.decode("latin-1")[:12], path, status, took)
        return table

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._open and not self._gone:
            self._open = False
            with self._terminal():
                self._live.stop()
                for line in self._last_words:
                    self._console.print(line, markup=False)


def make_display(mode: str, settings: AgentSettings, stats: Stats, *, color: bool) -> Display:
    """The display for ``screen``, ``lines`` or ``json``."""
    if mode == "json":
        return JsonLines(settings, stats)
    return Screen(settings, stats, color=color) if mode == "screen" else Lines(settings, stats)
