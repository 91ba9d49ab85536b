"""The same script against a relay that knows again what it has seen and one that does not: nothing may differ.

Visitor, relay and agent are in memory, so that what Hypothesis finds is found again. A script says what comes in each read, how
the agent answers each request, and what else happens meanwhile.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from portico.relay import heads
from portico.relay.access_log import AccessLog
from portico.relay.credentials import authorization
from portico.relay.door import Door
from portico.relay.exchange import Exchange
from portico.relay.http1 import Visitor
from portico.relay.rates import Rates
from portico.settings import RelaySettings, Secret
from portico.wire import frames as f
from portico.wire.session import Session
from portico.wire.stream import Stream
from tests.fuzz.http import OURS, Memory, Server, remember, run, shuttle
from tests.wire.recorder import Recorder

HOST = b"Host: web.localhost\r\n"
SECTIONS = [
    HOST + b"\r\n",
    HOST + b"Accept: text/html\r\nCookie: a=b\r\n\r\n",
    HOST + b"Connection: close\r\n\r\n",
    HOST + b"Authorization: Basic good\r\n\r\n",
    HOST + b"Authorization: Basic bad\r\n\r\n",
    HOST + b"Connection: keep-alive, X-A\r\nX-A: 1\r\nTE: trailers\r\n\r\n",
    HOST + b"Content-Length: 0\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n",
    HOST + b"Content-Length: 4\r\n\r\nbody",
    HOST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    HOST + HOST + b"\r\n",
    b"Host: nobody\r\nAccept: text/html\r\n\r\n",
    b"Host: NOBODY\r\n\r\n",
    b"\r\n",
    b"\r\n\r\n",
    b"GET /a HTTP/1.1\r\n" + HOST + b"\r\n",
]
LINES = [
    *(b"GET /a HTTP/1.1\r\n", b"GET /a HTTP/1.1\r\n", b"DELETE /b?c=d HTTP/1.1\r\n", b"OPTIONS /c HTTP/1.1\r\n"),
    *(b"OPTIONS * HTTP/1.1\r\n", b"HEAD /a HTTP/1.1\r\n", b"POST /a HTTP/1.1\r\n", b"GET /a HTTP/1.0\r\n"),
    *(b"GET /a b HTTP/1.1\r\n", b"GET http://web.localhost/a HTTP/1.1\r\n", b"\r\nGET /a HTTP/1.1\r\n", b"\r\n", b""),
]
#: How the agent answers: status, fields, body, how it is sent.
ANSWERS = [
    (200, [b"Content-Length", b"2"], b"ok", "one"),
    (200, [b"Content-Length", b"2"], b"ok", "one"),
    (200, [b"Content-Length", b"2"], b"no", "two"),
    (200, [b"X-A", b"1", b"Content-Length", b"2", b"Connection", b"X-A"], b"ok", "one"),
    (200, [b"Content-Length", b"2"], b"okay", "one"),
    (200, [b"Content-Length", b"2"], b"o", "one"),
    (200, [b"Content-Length", b"2", b"Content-Length", b"3"], b"ok", "one"),
    (200, [b"Content-Length", b"-2"], b"ok", "one"),
    (200, [b"Content-Length", b"0"], b"", "one"),
    (200, [], b"chunk", "one"),
    (200, [], b"", "one"),
    (200, [], b"chunk", "two"),
    (204, [], b"", "one"),
    (204, [b"Content-Length", b"2"], b"ok", "one"),
    (304, [b"Content-Length", b"2"], b"", "one"),
    (404, [b"Content-Length", b"2"], b"ok", "interim"),
    (502, [], b"", "reset"),
]
EVENTS = ["", "", "", "", "drain", "eof", "pause", "resume", "full", "expire", "lose"]
DIGEST = "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHRzb21lc2FsdA$" + "A" * 43
#: What the tunnel's policy becomes, as an event of its own.
POLICIES: dict[str, dict[str, Any]] = {
    "open": {},
    "headers": {
        "headers": {
            "request": {"remove": ["Accept"], "add": [{"name": "X-Added", "value": "1"}]},
            "response": {"remove": ["X-A"], "add": [{"name": "X-Frame-Options", "value": "DENY"}]},
        }
    },
    "host": {"headers": {"host": "rewrite"}},
    "barred": {"addresses": {"rules": [{"deny": "192.0.2.0/24"}]}},
    "let in": {"addresses": {"rules": [{"deny": "10.0.0.0/8"}, {"allow": "192.0.2.0/24"}]}},
    "tls only": {"plain_http": "refuse"},
    "redirect": {"plain_http": "redirect"},
    "password": {"basic_auth": {"users": [{"name": "a", "digest": DIGEST}]}},
    "rates": {"rate_limits": {"tunnel": {"requests": 1, "seconds": 86400, "burst": 3}}},
}


@dataclass
class Step:
    """One read, what the agent does with what it is asked, and what happens before (``late``: while it is asked)."""

    read: bytes
    answer: int
    event: str
    late: bool


reads = st.one_of(
    st.tuples(st.sampled_from(LINES[:2]), st.sampled_from(SECTIONS[:6])).map(b"".join),
    st.tuples(st.sampled_from(LINES), st.sampled_from(SECTIONS)).map(b"".join),
    st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from(SECTIONS)).map(b"".join), min_size=2, max_size=3).map(
        b"".join
    ),
)


def scripts(pool: list[bytes]) -> st.SearchStrategy[list[Step]]:
    """Scripts of a few different reads, which come again and again."""
    answers = st.one_of(st.just(0), st.integers(0, len(ANSWERS) - 1))
    events = st.sampled_from([*EVENTS, *POLICIES])
    step = st.builds(Step, st.sampled_from(pool), answers, events, st.booleans())
    return st.lists(step, min_size=4, max_size=16)


class Agent(Recorder):
    """Holds requests until it is told how to answer them."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Stream] = []
        self.heard: list[Any] = []

    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> Any:
        pairs = [pair for pair in zip(head[2::2], head[3::2], strict=True) if pair[0].lower() != b"x-request-id"]
        self.heard.append((bind, head[:2], pairs, flags))
        assert sum(name.lower() in OURS for name in head[2::2]) >= 1
        self.held.append(stream)
        return self.sink(stream.id)

    def answer(self, kind: int) -> None:
        status, fields, body, how = ANSWERS[kind]
        held, self.held = self.held, []
        for stream in held:
            if stream.closed:
                continue
            if how == "reset":
                stream.reset(f.TARGET_REFUSED, "no")
            elif how == "one" and stream.recv_ended:
                begin = f.encode_answer(f.encode_response(status, [b"OK", *fields]))
                stream.session.put(f.frame(f.ANSWER, stream.id, begin + body))
                stream.close()
            else:
                if how == "interim":
                    stream.send_interim(103, [b"Hints"])
                stream.send_response(status, [b"OK", *fields], end=False)
                stream.send_data(body, end=True)


class NoWaiting:
    """A refusal is given at once."""

    def take(self, exchange: Exchange, code: str) -> bool:
        return False


class Gate(Server):
    """A server that knows which passwords are good, and governs its tunnel."""

    def govern(self, name: str) -> None:
        tunnel = self.tunnel
        tunnel.govern(tunnel.policy_version + 1, POLICIES[name])
        rate = tunnel.policy.tunnel_rate
        tunnel.settle(Rates(self.settings, self.loop.time).make("tun_web", rate, None))

    def password(self, tunnel: Any, fields: list[bytes], address: str) -> str:
        given = authorization(fields)
        return "missing" if given is None else "valid" if given == b"Basic good" else "invalid"


class Kept(AccessLog):
    """An access log in memory."""

    def __init__(self) -> None:
        self.query = True
        self.kept: list[str] = []

    def wants(self, failed: bool) -> bool:
        return True

    def put(self, fields: str) -> None:
        self.kept.append(re.sub(r'_ms":[0-9.-]+', '_ms":0', fields))


class Counted:
    """How often the short ways were taken."""

    asked = whole = 0


class Watched(Visitor):
    def _ask(self, line: bytes, known: heads.KnownHead) -> bool:
        taken = super()._ask(line, known)
        Counted.asked += taken
        return taken

    def on_whole(self, response: bytes, body: bytes) -> bool:
        taken = super().on_whole(response, body)
        Counted.whole += taken
        return taken


async def play(script: list[Step]) -> Any:
    """Everything that can be observed of a script, on as many connections as it takes."""
    agent = Agent()
    relay, far = Session(Recorder(), relay=True), Session(agent, relay=False)
    relay.greeted = far.greeted = True
    server = Gate(RelaySettings(relay_key=Secret("tnl_rly_unused")), relay)
    server.holding = NoWaiting()  # type: ignore[assignment]
    server.access = Kept()
    seen: list[Any] = []
    visitor: Visitor | None = None
    wire = Memory()

    def happen(event: str) -> None:
        assert visitor is not None
        if event == "drain":
            visitor.drain()
            visitor.close_idle()
        elif event == "eof" and not wire.closed:
            wire.closed = wire.closed or not visitor.eof_received()
        elif event == "pause":
            visitor.pause_writing()
        elif event == "resume":
            visitor.resume_writing()
        elif event == "full":
            server.tunnel.concurrency = 0 if server.tunnel.concurrency else 100
        elif event == "expire" and visitor.deadline < visitor.NEVER:
            server.tick(visitor.deadline + 1)
            visitor.expire()
        elif event == "lose":
            wire.closed = True
        elif event in POLICIES:
            server.govern(event)

    for step in script:
        if visitor is None:
            wire = Memory()
            visitor = Watched(server, Door(b"http", 80))
            visitor.connection_made(wire)
        if not step.late:
            happen(step.event)
        if not wire.closed and not wire.paused:
            view = visitor.get_buffer(-1)
            view[: len(step.read)] = step.read
            visitor.buffer_updated(len(step.read))
        shuttle(relay, far)
        if step.late:
            happen(step.event)
            shuttle(relay, far)
        if wire.closed and step.event == "lose":
            visitor.connection_lost(None)
            shuttle(relay, far)
        for number in range(4):  # pipelined ones are asked one by one
            agent.answer(step.answer if number == 0 else 0)
            shuttle(relay, far)
            await asyncio.sleep(0)
        seen.append((bytes(wire.out), wire.closed, wire.paused, server.tunnel.inflight, visitor.deadline))
        if wire.closed:
            visitor.connection_lost(None)
            shuttle(relay, far)
            visitor = None
            agent.held.clear()
    if visitor is not None:
        visitor.connection_lost(None)
        shuttle(relay, far)
    counters = server.tunnel.counters
    assert server.tunnel.inflight == 0
    assert not relay.streams
    assert not relay.closed
    text = re.sub(r"req_[0-9a-f]{22}", "req", repr((seen, agent.heard, agent.events, server.access.kept)))
    totals = (counters.requests, counters.bytes_in, counters.bytes_out, counters.errors, counters.refused)
    heads_seen, wholes = server.tally.seconds(server.seconds)
    # How long is not the same, but how many were.
    return text, totals, dict(server.refusals), server.tally.counts(), sum(heads_seen.counts), sum(wholes.counts)


def told(*reads: bytes, event: str = "") -> list[Step]:
    """A script that is answered well; ``event`` happens while the last request is under way."""
    return [Step(read, 0, event if at == len(reads) - 1 else "", late=True) for at, read in enumerate(reads)]


GET = LINES[0] + SECTIONS[0]


@example(script=told(b"\r\n" + GET, b"\r\n" + GET, b"\r\n" + GET, b"GET /b HTTP/1.1\r\n" + GET))
@example(script=told(GET, b"\r\n\r\n\r\n", GET, b"\r\n\r\n\r\n", GET, b"GET /a HTTP/1.1\r\n\r\n\r\n"))
@example(script=told(GET, GET, GET, GET, event="pause"))
@example(script=[*told(GET, GET, GET, event="headers"), *told(GET, GET, GET, event="open"), *told(GET, GET)])
@example(script=[*told(GET, GET, GET, event="barred"), *told(GET, GET, event="let in"), *told(GET, GET)])
@settings(max_examples=400, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(script=st.lists(reads, min_size=1, max_size=4).flatmap(scripts))
def test_nothing_differs(script: list[Step]) -> None:
    remember(False)
    Counted.asked = 0
    forgetful = run(play(script))
    assert Counted.asked == 0
    remember(True)
    assert run(play(script)) == forgetful


def test_scripts_do_take_the_short_way() -> None:
    remember(True)
    Counted.asked = Counted.whole = 0
    run(play([Step(b"GET /a HTTP/1.1\r\n" + SECTIONS[1], 0, "", late=False)] * 6))
    assert (Counted.asked, Counted.whole) == (4, 4)
