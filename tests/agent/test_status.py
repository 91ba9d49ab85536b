"""What a person or a script sees: lines, JSON, and the screen."""

from __future__ import annotations

import io
import json
import logging
import time
from typing import Any

import pytest
from rich.console import Console

from portico.agent.api import Grant
from portico.agent.stats import CONNECTION, RECORDS, Stats, connection_id, request_id
from portico.agent.status import JsonLines, Lines, Screen, make_display
from portico.agent.tunnel import Tunnel
from portico.errors import Problem
from portico.kit.clock import uptime
from portico.kit.jwt import SigningKey
from portico.settings import AgentSettings
from portico.wire.counts import Counts

SETTINGS = AgentSettings(request_lines_per_second=40, screen_redraws=4)


def tunnel(state: str = "online", problem: Problem | None = None, was_online: bool = True) -> Tunnel:
    made: Any = None
    grant = Grant("tun_1", "web", "http://web.localhost:7080", "jwt")
    return Tunnel({}, made, "http://localhost:8000", 1, grant, grant.url, state, was_online, problem)


def serve(stats: Stats, count: int = 1, path: bytes = b"/a", status: int = 200) -> None:
    for _ in range(count):
        stats.opened()
        stats.done(b"GET", path, status, time.perf_counter() - 0.0123)
        stats.closed()


class TestStats:
    def test_counts_and_percentiles(self) -> None:
        stats = Stats()
        assert stats.percentile(0.5) == 0.0
        for millis in range(1, 101):
            stats.opened()
            stats.done(b"GET", b"/", 200, time.perf_counter() - millis / 1000)
            stats.closed()
        assert (stats.total, stats.open) == (100, 0)
        assert stats.percentile(0.5) == pytest.approx(0.051, abs=0.005)
        assert stats.percentile(0.9) == pytest.approx(0.091, abs=0.005)

    def test_a_slow_reader_misses_some_and_knows_it(self) -> None:
        stats = Stats()
        serve(stats, RECORDS + 10)
        records, seen = stats.since(0)
        assert (len(records), seen) == (RECORDS, RECORDS + 10)
        assert stats.since(seen) == ([], seen)
        serve(stats, 1, b"/last")
        assert [r.path for r in stats.since(seen)[0]] == [b"/last"]

    def test_rates(self) -> None:
        stats = Stats()
        now = time.monotonic()
        for second in range(1, 121):
            serve(stats, 10)
            stats.sample(now + second)
        assert 8 < stats.rate_1 < 10.5 and 2 < stats.rate_5 < 5


class TestJson:
    def lines(self, out: io.StringIO) -> list[dict[str, Any]]:
        return [json.loads(line) for line in out.getvalue().splitlines()]

    def test_online_is_the_first_of_a_tunnel(self) -> None:
        out = io.StringIO()
        display = JsonLines(SETTINGS, Stats(), out)
        display.connection("connecting", "no relay yet")
        display.tunnel(tunnel("offline", Problem("edge.agent_unreachable"), was_online=False))
        display.tunnel(tunnel())
        display.connection("reconnecting", "cut")
        display.tunnel(tunnel("offline", Problem("edge.agent_unreachable", "cut")))
        display.tunnel(tunnel("ended", Problem("tunnel.stopped")))
        first, *rest = self.lines(out)
        assert first == {
            "event": "online", "name": "web", "url": "http://web.localhost:7080", "target": "http://localhost:8000",
            "tunnel": "tun_1",
        }  # fmt: skip
        assert [line["event"] for line in rest] == ["reconnecting", "offline", "error"]
        assert rest[2]["code"] == "tunnel.stopped"

    def test_tcp_connections(self) -> None:
        out, stats = io.StringIO(), Stats()
        display = JsonLines(SETTINGS, stats, out)
        connected(stats)
        display.tick()
        (line,) = self.lines(out)
        assert line["event"] == "connection" and line["visitor"] == "203.0.113.7:50000"
        assert line["duration_ms"] >= 0 and line["started_at"].endswith("Z") and "status" not in line

    def test_requests_are_limited(self) -> None:
        out, stats = io.StringIO(), Stats()
        display = JsonLines(SETTINGS, stats, out)
        serve(stats, 25, b"/p\xff?\x1b")
        display.tick()
        skipped, *requests = self.lines(out)
        assert skipped == {"event": "requests_skipped", "count": 15}
        assert len(requests) == 10
        assert requests[0]["method"] == "GET" and requests[0]["status"] == 200
        assert requests[0]["duration_ms"] == pytest.approx(12.3, abs=5) and requests[0]["started_at"].endswith("Z")


def connected(stats: Stats) -> None:
    """One TCP connection that came and went."""
    stats.opened()
    stats.answered(CONNECTION, b"203.0.113.7:50000", 0, time.perf_counter(), time.perf_counter())


class TestLines:
    def test_url_on_stdout_and_log_lines(
        self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        stats = Stats()
        display = make_display("lines", SETTINGS, stats, color=False)
        assert isinstance(display, Lines)
        display.tunnel(tunnel())
        display.connection("reconnecting", "cut")
        display.warning("nothing listens")
        display.tunnel(tunnel("ended", Problem("tunnel.stopped")))
        serve(stats, 12, b"/x\x1b[2J")
        display.tick()
        assert capsys.readouterr().out == "http://web.localhost:7080 -> http://localhost:8000\n"
        messages = [record.getMessage() for record in caplog.records]
        assert messages[:4] == ["tunnel online", "session reconnecting", "nothing listens", "tunnel ended"]
        assert messages[4] == "requests not shown" and messages[5] == "GET /x\\x1b[2J" and len(messages) == 15

    def test_tcp_connections_and_why_there_are_none(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        stats = Stats()
        display = make_display("lines", SETTINGS, stats, color=False)
        connected(stats)
        for _ in range(3):
            stats.failed("nothing listens on localhost:22")
        display.tick()
        stats.failed("nothing listens on localhost:22")  # the same again is told only after a while
        display.tick()
        assert [r.getMessage() for r in caplog.records] == [
            "nothing listens on localhost:22 (3 times)",
            "TCP 203.0.113.7:50000",
        ]
        assert "status" not in caplog.records[1].f  # type: ignore[attr-defined]

    def test_ends(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        display = make_display("lines", SETTINGS, Stats(), color=False)
        over = tunnel("ended")
        over.ttl = 900
        display.tunnel(over)
        display.tunnel(tunnel("removed"))
        assert [r.getMessage() for r in caplog.records] == ["tunnel web ended after its 15m", "tunnel web removed"]

    def test_the_code_is_on_stderr_once_so_that_programs_can_read_the_urls(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for mode in ("lines", "json"):
            display = make_display(mode, SETTINGS, Stats(), color=False)
            display.qr = True
            display.tunnel(tunnel())
            display.tunnel(tunnel())
            told = capsys.readouterr()
            assert "█" not in told.out and told.err.count("http://web.localhost:7080") == 1
            assert sum("██" in line for line in told.err.splitlines()) > 15


class Link:
    lost, region, relay = False, "local", "relay-1"

    class carrier:
        rtt = 0.0042


class Info:
    account, plan = "a@b.c · Org", "free"


class TestScreen:
    def screen(
        self, stats: Stats, color: bool = False, height: int = 40, width: int = 100
    ) -> tuple[Screen, io.StringIO]:
        out = io.StringIO()
        console = Console(file=out, width=width, height=height, force_terminal=True, no_color=not color)
        return Screen(SETTINGS, stats, color=color, console=console), out

    def text(self, screen: Screen, width: int = 100) -> str:
        console = Console(file=io.StringIO(), width=width)
        with console.capture() as got:
            console.print(screen.render())
        return got.get()

    def many(self, *tunnels: Tunnel, height: int = 24, qr: bool = False) -> list[str]:
        """The rows of a window of 80 columns with these tunnels and ten requests."""

        class Agent:
            link, info = Link, Info

        Agent.tunnels = tunnels  # type: ignore[attr-defined]
        stats = Stats()
        screen, _ = self.screen(stats, height=height, width=80)
        screen.agent = Agent  # type: ignore[assignment]
        screen.qr = qr
        screen.connection("online", "")
        screen.warning("look here " * 20)
        serve(stats, 20, b"/a-long-path" * 20)
        screen.tick()
        lines = self.text(screen, 80).splitlines()
        screen.close()
        assert len(lines) <= height - 1 and max(map(len, lines)) <= 80, "\n".join(lines)
        return lines

    def named(self, name: str, state: str = "online", problem: Problem | None = None) -> Tunnel:
        made = tunnel(state, problem)
        made.grant = Grant("t", name, f"http://{name}.localhost:7080", "jwt")
        made.url = made.grant.url
        return made

    def test_what_protects_the_tunnels(self) -> None:
        def guarded(name: str, policy: dict[str, Any]) -> Tunnel:
            made = self.named(name)
            made.grant = Grant("t", name, made.url, SigningKey.generate().sign("x", {"policy": policy}))
            return made

        def shown(*tunnels: Tunnel) -> list[str]:
            return [line[14:].rstrip() for line in self.many(*tunnels) if line.startswith("Policy ")]

        rules = {"addresses": {"rules": [{"allow": "10.0.0.0/8"}]}}
        assert shown(guarded("web", {**rules, "concurrency": 5})) == ["1 address rule, 5 at once"]
        assert shown(guarded("web", rules), guarded("open", {})) == ["web: 1 address rule"]
        assert shown(guarded("open", {}), self.named("other")) == []

    @pytest.mark.parametrize("height", [10, 16, 24, 50])
    @pytest.mark.parametrize("count", [1, 3, 7, 8, 30, 300])
    def test_many_tunnels_fit_the_window(self, count: int, height: int) -> None:
        lines = self.many(*(self.named(f"app-{i:03}") for i in range(count)), height=height)
        urls = sum("→" in line for line in lines)
        hidden = [line for line in lines if " more: " in line]
        assert urls + (int(hidden[0].split("and ")[1].split()[0]) if hidden else 0) == count
        if height >= 24:
            assert sum("GET" in line for line in lines) >= 3

    def test_of_more_than_fit_those_with_trouble_are_shown(self) -> None:
        good = [self.named(f"app-{i:03}") for i in range(30)]
        lines = self.many(*good, self.named("broken", "offline", Problem("edge.agent_unreachable")))
        (first,) = [line for line in lines if line.startswith("Forwarding")]
        assert "broken" in first and first.rstrip().endswith("offline")
        assert any(line.strip().endswith(" online") and "more:" in line for line in lines)

    def test_how_long_a_tunnel_has(self) -> None:
        for name, arrow in (("a" * 10, True), ("a" * 30, False)):
            short = self.named(name)
            short.target = "http://a-very-long-host-name.example.com:8000"
            short.ttl, short.ends_at = 3600, uptime() + 61.4
            (line,) = [line for line in self.many(short) if line.startswith("Forwarding")]
            assert line.rstrip().endswith("ends in 1m1s") and ("→ http://a-very" in line) is arrow

    def test_the_code_and_what_there_is_room_for_beside_it(self) -> None:
        lines = self.many(self.named("web"), qr=True)
        assert sum("▀" in line or "█" in line for line in lines) >= 15 and any("http://web" in line for line in lines)
        lines = self.many(self.named("web"), qr=True, height=16)
        assert not any("█" in line for line in lines) and any("→" in line for line in lines)
        lines = self.many(self.named("web"), qr=True, height=50)
        assert any("HTTP requests" in line for line in lines) and any("Account" in line for line in lines)

    def test_tcp_connections(self) -> None:
        stats = Stats()
        screen, _ = self.screen(stats)
        connected(stats)
        screen.tick()
        text = self.text(screen)
        assert "Connections" in [line.strip() for line in text.splitlines()]
        assert "TCP" in text and "203.0.113.7:50000" in text and "closed" in text
        serve(stats, 1, b"/")
        screen.tick()
        assert "Requests and connections" in self.text(screen)

    def test_a_window_too_small_for_the_code_says_so(self) -> None:
        screen, _ = self.screen(Stats(), height=16)
        screen.qr, screen.agent = True, type("Agent", (), {"link": Link, "info": Info, "tunnels": (tunnel(),)})  # type: ignore[assignment]
        assert "the QR code needs a window of 33 × 21" in self.text(screen)

    def test_the_terminal_keeps_why_tunnels_ended(self) -> None:
        screen, out = self.screen(Stats())
        screen.tick()
        over = tunnel("ended")
        over.ttl = 90
        screen.tunnel(over)
        screen.close()
        assert out.getvalue().rstrip().endswith("tunnel web ended after its 1m30s")

    def test_shows_what_ngrok_users_look_for(self) -> None:
        class Agent:
            link, info, tunnels = Link, Info, (tunnel(),)

        stats = Stats()
        screen, _ = self.screen(stats)
        screen.agent = Agent  # type: ignore[assignment]
        screen.connection("online", "")
        serve(stats, 3, b"/hook\x1b]0;x", 502)
        stats.failed("nothing listens on localhost:8000")
        screen.tick()
        text = self.text(screen)
        screen.close()
        for part in (
            "online", "a@b.c · Org (free)", "4 ms", "local · relay-1", "http://web.localhost:7080 → http://localhost:8000",
            "ttl", "opn", "rt1", "rt5", "p50", "p90", "GET", "/hook\\x1b]0;x", "502", "nothing listens on localhost:8000",
        ):  # fmt: skip
            assert part in text, part
        assert "\x1b]0;" not in text

    def test_is_drawn_only_when_something_changed(self) -> None:
        stats = Stats()
        screen, out = self.screen(stats)
        screen.connection("online", "")
        screen.tick()
        drawn = len(out.getvalue())
        for _ in range(5):
            screen.tick()
        assert len(out.getvalue()) == drawn
        screen.warning("look")
        screen.tick()
        screen.close()
        assert len(out.getvalue()) > drawn

    def test_no_color(self) -> None:
        for color in (True, False):
            screen, out = self.screen(Stats(), color)
            screen.connection("online", "")
            screen.tick()
            screen.close()
            assert ("\x1b[1;32m" in out.getvalue()) is color


def rendered(screen: Screen, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as got:
        console.print(screen.render())
    return got.get()


def test_a_request_is_called_what_the_relay_calls_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    out, stats = io.StringIO(), Stats()
    lines, objects = Lines(SETTINGS, stats), JsonLines(SETTINGS, stats, out)
    now = time.perf_counter()
    stats.answered(b"GET", b"/", 200, now, now, request_id([b"GET", b"/", b"Host", b"a", b"X-Request-Id", b"req_1"]))
    stats.done(b"GET", b"/", 200, now, request_id([b"GET", b"/", b"X-Request-Id", b"an-evil\x1b[2J-one"]))
    stats.answered(CONNECTION, b"1.2.3.4:5", 0, now, now, connection_id({"id": "req_2\ud800"}))
    stats.answered(b"GET", b"/", 200, now, now, request_id([b"GET", b"/", b"Host", b"a"]))
    lines.tick()
    objects.tick()
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event.get("request_id") for event in events] == ["req_1", "an-evil\\x1b[2J-one", "req_2?", None]
    fields: list[Any] = [record.__dict__["f"].get("request") for record in caplog.records]
    assert fields == [event.get("request_id") for event in events]


class TestRefusals:
    def shown(self, *displays: Any) -> Tunnel:
        one = tunnel()
        agent: Any = type("A", (), {"tunnels": [one], "info": None, "link": None})()
        for display in displays:
            display.agent = agent
        return one

    def test_a_flood_is_a_line_with_a_count(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        caplog.set_level(logging.INFO)
        out = io.StringIO()
        lines, objects = Lines(SETTINGS, Stats()), JsonLines(SETTINGS, Stats(), out)
        one = self.shown(lines, objects)
        now = [100.0]
        for display in (lines, objects):
            monkeypatch.setattr(display._refusals, "_monotonic", lambda: now[0])
        one.edge.add(Counts(refused={"edge.auth_required": 2, "edge.ip_denied": 1}))
        for _ in range(3):
            lines.tick()
            objects.tick()
            one.edge.add(Counts(refused={"edge.auth_required": 5}))
            now[0] += 1
        now[0] += 5
        lines.tick()
        objects.tick()
        told = [json.loads(line) for line in out.getvalue().splitlines()]
        assert told == [
            {"event": "refused", "name": "web", "code": "edge.auth_required", "count": 2, "total": 2},
            {"event": "refused", "name": "web", "code": "edge.ip_denied", "count": 1, "total": 1},
            {"event": "refused", "name": "web", "code": "edge.auth_required", "count": 15, "total": 17},
        ]
        fields: list[Any] = [record.__dict__["f"] for record in caplog.records]
        assert fields == [{key: row[key] for key in ("name", "code", "count", "total")} for row in told]

    def test_on_the_screen(self) -> None:
        console = Console(file=io.StringIO(), width=100, height=30, force_terminal=True)
        screen = Screen(SETTINGS, Stats(), color=False, console=console)
        one = self.shown(screen)
        assert "Refused" not in rendered(screen)
        one.edge.add(Counts(refused={"edge.concurrency_exceeded": 3, "edge.tunnel_offline": 9}))
        screen._dirty = False
        drawn = screen._drawn
        screen.tick()
        assert screen._drawn != drawn, "it is drawn anew"
        assert "12 (404 edge.tunnel_offline 9, 429 edge.concurrency_exceeded 3)" in rendered(screen)
        one.edge.add(Counts(refused={"edge.of_a_newer_relay": 2, "edge.b": 1, "edge.c": 1}))
        assert "edge.of_a_newer_relay 2, 2 more codes)" in rendered(screen, 120)
        assert "…" in rendered(screen, 80)
        screen.close()
