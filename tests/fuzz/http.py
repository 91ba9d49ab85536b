"""Targets that drive the two HTTP/1.1 parsers: the relay's, for what visitors send, and the agent's, for what targets answer.

Transports and sessions are in memory; what was made of the bytes is read off the frames. The first byte of an input seeds
how the rest is cut into reads: whatever the cuts, the same must come of it. Where h11 reads a request too, both must agree.

An input is also taken as several reads (``SPLIT`` stands between them), which come again and again on one connection and on
many: once with nothing remembered, once by a process that knows again what it has seen. Nothing may differ.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

import h11

from portico.agent.connection import TargetConnection
from portico.agent.forward import Forwarder
from portico.agent.heads import KNOWN_ANSWERS
from portico.agent.recorder import Recorder as Inspected
from portico.agent.stats import Stats
from portico.agent.target import Target
from portico.relay import heads
from portico.relay.challenges import Challenges
from portico.relay.door import Door
from portico.relay.http1 import BULK_READ, Visitor
from portico.relay.listeners import PublicServer
from portico.relay.peers import RemoteTunnel
from portico.relay.snapshot import Snapshot
from portico.relay.tally import Tally
from portico.settings import AgentSettings, RelaySettings, Secret
from portico.wire import frames as f
from portico.wire.session import Session
from portico.wire.stream import HEADROOM, Stream
from tests.wire.recorder import Recorder, wire_bytes

#: Fields that the relay adds; a visitor's own are dropped.
OURS = frozenset(heads._OURS_IN_REQUEST)
ALL = 1 << 30
#: Between the reads of an input; no message has it.
SPLIT = b"\xff\xff"
#: Reads of one input that are repeated.
MOST_READS = 6
_REQUEST_ID = re.compile(rb"req_[0-9a-f]{22}")


def remember(on: bool) -> None:
    """Forget all that was seen, and remember what comes, or nothing."""
    for memo in (heads.KNOWN_HEADS, heads.KNOWN_ANSWERS, KNOWN_ANSWERS):
        memo.clear()
        memo._seen.clear()
        memo.longest_bytes = 2048 if on else -1


class Faults(logging.Handler):
    """Our own faults are caught where they would end a session; here they end the search."""

    found: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.found = f"{record.getMessage()}: {record.exc_info[1] if record.exc_info else ''}"


faults = Faults(logging.ERROR)


@functools.cache
def runner() -> asyncio.Runner:
    logging.getLogger("portico").addHandler(faults)
    return asyncio.Runner()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    faults.found = None
    result = runner().run(work)
    assert faults.found is None, faults.found
    return result


class Memory(asyncio.Transport):
    """A transport that keeps what is written, and knows whether it is read from."""

    def __init__(self) -> None:
        super().__init__()
        self.out = bytearray()
        self.closed = self.paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.out += data

    def writelines(self, list_of_data: Any) -> None:
        for part in list_of_data:
            self.write(part)

    def write_eof(self) -> None: ...

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("192.0.2.1", 1), "sockname": ("192.0.2.2", 80)}.get(name, default)


def shuttle(one: Session, other: Session) -> None:
    """Carry frames both ways until none is left."""
    while one.out or other.out:
        for sender, receiver in ((one, other), (other, one)):
            for part in wire_bytes(sender.take(), HEADROOM):
                receiver.receive(part)


async def feed(protocol: Any, wire: Memory, data: bytes, sizes: random.Random | None, between: Any) -> bool:
    """Data as reads of the given sizes, only while it is read from; whether all of it was taken."""
    at = 0
    while at < len(data):
        for _ in range(4):
            if wire.closed or not wire.paused:
                break
            between()
            await asyncio.sleep(0)
        if wire.closed or wire.paused:
            return False
        view = protocol.get_buffer(-1)
        size = min(len(view), ALL if sizes is None else sizes.choice((1, 2, 7, 40, 300)), len(data) - at)
        view[:size] = data[at : at + size]
        protocol.buffer_updated(size)
        at += size
        if sizes is not None and sizes.random() < 0.5:
            between()
            await asyncio.sleep(0)
    return True


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Request:
    """What an agent got of one request, and answered once it was whole (``one``: in one frame)."""

    def __init__(self, stream: Stream, head: list[bytes], flags: int, one: bool) -> None:
        self.stream, self.flags, self.one = stream, flags, one
        self.method, self.target = head[:2]
        pairs = zip(head[2::2], head[3::2], strict=True)
        self.fields = [(name.lower(), value) for name, value in pairs if name.lower() not in OURS]
        self.body = b""
        self.trailers: list[bytes] = []
        self.whole = flags & f.F_END != 0

    def key(self) -> tuple[Any, ...]:
        return (self.method, self.target, self.fields, self.body, self.trailers)

    def on_data(self, data: bytes, end: bool) -> None:
        self.body += data
        self.stream.consumed(len(data))
        if end:
            self.on_end([])

    def on_end(self, trailers: list[bytes]) -> None:
        self.trailers, self.whole = trailers, True
        if not self.flags & f.F_UPGRADE:
            self.answer()

    def answer(self) -> None:
        stream = self.stream
        if self.one and stream.recv_ended:
            begin = f.encode_answer(f.encode_response(200, [b"OK", b"Content-Length", b"2"]))
            stream.session.put(f.frame(f.ANSWER, stream.id, begin + b"ok"))
            stream.close()
            return
        self.stream.send_response(200, [b"OK", b"Content-Length", b"2"], end=False)
        self.stream.send_data(b"ok", end=True)

    def on_reset(self, code: int, detail: str) -> None: ...
    def on_credit(self) -> None: ...
    def on_response(self, status: int, head: list[bytes], end: bool) -> None: ...
    def on_interim(self, status: int, head: list[bytes]) -> None: ...
    def on_opened(self) -> None: ...


class AgentSide(Recorder):
    """Answers each request; an upgrade by 101 or, as seeded, by 200."""

    def __init__(self, switch: bool, one: bool) -> None:
        super().__init__()
        self.switch, self.one = switch, one
        self.requests: list[Request] = []

    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> Any:
        request = stream.sink = Request(stream, head, flags, self.one)
        self.requests.append(request)
        if flags & f.F_UPGRADE and self.switch:
            stream.send_response(101, [b"Switching", b"Upgrade", b"x"], end=False)
        elif flags & (f.F_UPGRADE | f.F_END):
            request.answer()
        return request


NO_POLICY: Mapping[str, Any] = {}
#: What a peer says of the one tunnel.
ANNOUNCED: Mapping[str, Any] = {
    "proto": "http",
    "tunnel": "tun_web",
    "organization": "org_test",
    "hosts": ["web.localhost"],
    "limits": {},
    "concurrency": 100,
    "policy_version": 0,
    "policy": NO_POLICY,
}


class Server(PublicServer):
    """A public server of one visitor and one tunnel."""

    def __init__(self, settings: RelaySettings, session: Session, policy: Mapping[str, Any] = NO_POLICY) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.buffer = memoryview(bytearray(BULK_READ))
        self.bulk_view = self.buffer_view = self.buffer[:]
        self.head_view = self.buffer_view
        self.connections, self.turned_away = set(), set()
        self.refusals: Counter[str] = Counter()
        self.tally = Tally()
        self.seconds = 0.0
        self.access = None
        self.challenges = Challenges(Snapshot())
        self.returning = 0
        self.tunnel = RemoteTunnel(session, 1, {**ANNOUNCED, "policy": policy})
        self.tunnel.settle(None)
        self._by_address: Counter[str] = Counter()
        self._held: list[Visitor] = []
        self._base = b"localhost"
        self.by_host = {}
        self.idle_seconds = settings.idle_timeout_seconds
        self.first_byte_seconds = settings.first_byte_timeout_seconds or math.inf
        self.tick(0.0)
        self._draining = False

    def find(self, host: bytes) -> Any:
        return None if host == b"nobody" else self.tunnel

    def standing(self, host: bytes) -> str | None:
        return None if host == b"nobody" else "active"


class Heard(NamedTuple):
    """What came of a visitor's bytes."""

    requests: list[Request]
    answers: bytes
    counts: tuple[Any, ...]

    def key(self) -> tuple[Any, ...]:
        """Everything that can be observed, but for ids."""
        return [request.key() for request in self.requests], _REQUEST_ID.sub(b"req", self.answers), self.counts


async def relay_reads(reads: Sequence[bytes], sizes: random.Random | None, switch: bool, one: bool) -> Heard:
    """The requests that an agent gets of a visitor's bytes; each of ``reads`` comes when all before it is answered."""
    side = AgentSide(switch, one)
    relay, agent = Session(Recorder(), relay=True), Session(side, relay=False)
    relay.greeted = agent.greeted = True
    server = Server(RelaySettings(relay_key=Secret("tnl_rly_unused")), relay)
    visitor, wire = Visitor(server, Door(b"http", 80)), Memory()
    visitor.connection_made(wire)
    for data in reads:
        await feed(visitor, wire, data, sizes, lambda: shuttle(relay, agent))
        quiet = 0
        while quiet < 3:  # each answer lets the next one go
            quiet = 0 if visitor.queue and not wire.closed else quiet + 1
            shuttle(relay, agent)
            await asyncio.sleep(0)
    assert visitor.fault != "edge.internal", reads
    done = [request for request in side.requests if request.whole]
    visitor.connection_lost(None)
    shuttle(relay, agent)
    assert not server.tunnel.inflight
    assert not relay.streams
    assert not agent.streams
    counters = server.tunnel.counters
    counts = (
        counters.requests,
        counters.bytes_in,
        counters.bytes_out,
        counters.errors,
        sorted(server.refusals.items()),
    )
    return Heard(done, bytes(wire.out), (*counts, wire.closed, wire.paused))


def h11_reads(data: bytes) -> list[tuple[bytes, bytes, list[tuple[bytes, bytes]], bytes, list[tuple[bytes, bytes]]]]:
    """The whole requests that h11 finds in the same bytes, up to its first refusal."""
    found: list[Any] = []
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
    connection.receive_data(data)
    try:
        while True:
            request = connection.next_event()
            if not isinstance(request, h11.Request):
                return found
            body = b""
            while isinstance(event := connection.next_event(), h11.Data):
                body += bytes(event.data)
            if not isinstance(event, h11.EndOfMessage):
                return found
            fields = [(bytes(name), bytes(value)) for name, value in request.headers]
            trailers = [(bytes(name), bytes(value)) for name, value in event.headers]
            if (b"host", b"nobody") not in ((name, value.lower()) for name, value in fields):
                found.append((bytes(request.method), bytes(request.target), fields, body, trailers))
            connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
            connection.send(h11.EndOfMessage())
            connection.start_next_cycle()
    except (h11.RemoteProtocolError, h11.LocalProtocolError):
        return found


_NOT_COMPARED = OURS | {
    *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"proxy-authenticate"),
    *(b"http2-settings", b"transfer-encoding", b"te", b"trailer", b"upgrade"),
}


def compare_with_h11(data: bytes, requests: list[Request]) -> None:
    """Whatever both accept, both read in the same way."""
    for ours, theirs in zip(requests, h11_reads(data), strict=False):
        method, target, fields, body, trailers = theirs
        if ours.flags & f.F_UPGRADE:
            return  # what follows is another protocol's, or not, as the target says
        named = {name for key, value in fields if key == b"connection" for name in heads.tokens(value)}
        passed = [pair for pair in fields if pair[0] not in _NOT_COMPARED and pair[0] not in named]
        got = [(name, value.strip()) for name, value in ours.fields if name not in _NOT_COMPARED and name not in named]
        assert (ours.method, got, ours.body) == (method, passed, body), data
        assert ours.target == target or target.endswith(ours.target) or ours.target[:2] in (b"/", b"/?"), data
        flat = [part for pair in trailers for part in pair]
        assert [part.lower() for part in ours.trailers[::2]] == heads.trailers(flat)[::2], data


async def again_and_again(reads: list[bytes], switch: bool, one: bool) -> list[Any]:
    """Each read on connections of its own, then all of them on one, several times over."""
    heard = [await relay_reads([read], None, switch, one) for _ in range(3) for read in reads]
    heard.append(await relay_reads(reads * 3, None, switch, one))
    return [each.key() for each in heard]


def visitor(data: bytes) -> None:
    """A hostile visitor: no fault of ours, nothing left over, and one reading of its bytes, however they are cut, and
    whether they were seen before."""
    seed, data = data[:1], data[1:]
    switch, one = bool(seed and seed[0] & 1), bool(seed and seed[0] & 2)
    reads = [read for read in data.split(SPLIT) if read][:MOST_READS]
    data = b"".join(reads)
    remember(False)
    whole = run(relay_reads([data], None, switch, one)).requests
    cut = run(relay_reads([data], random.Random(seed), switch, one)).requests
    assert [request.key() for request in whole] == [request.key() for request in cut], data
    compare_with_h11(data, whole)
    forgetful = run(again_and_again(reads, switch, one))
    remember(True)
    assert run(again_and_again(reads, switch, one)) == forgetful, data


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────
class Answer:
    """What a relay got of one answer."""

    def __init__(self) -> None:
        self.interim: list[tuple[int, list[bytes]]] = []
        self.status, self.head, self.body = 0, [b""], b""
        self.trailers: list[bytes] = []
        self.end = ""
        self.stream: Stream

    def key(self) -> tuple[Any, ...]:
        """How it broke off, once it broke off, depends on what had been read by then."""
        if self.end != "whole":
            return (self.end,)
        return (self.interim, self.status, self.head, self.body, self.trailers)

    def on_interim(self, status: int, head: list[bytes]) -> None:
        self.interim.append((status, head))

    def on_response(self, status: int, head: list[bytes], end: bool) -> None:
        self.status, self.head = status, head
        self.end = "whole" if end else ""

    def on_data(self, data: bytes, end: bool) -> None:
        self.body += data
        self.stream.consumed(len(data))
        self.end = "whole" if end else self.end

    def on_end(self, trailers: list[bytes]) -> None:
        self.trailers, self.end = trailers, "whole"

    def on_reset(self, code: int, detail: str) -> None:
        self.end = self.end or "reset"

    def on_credit(self) -> None: ...
    def on_opened(self) -> None: ...


class RelaySide(Recorder):
    """Hands its streams to a forwarder."""

    forwarder: Forwarder

    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> Any:
        return self.forwarder.on_request(stream, head, flags)


async def agent_reads(data: bytes, sizes: random.Random | None, method: bytes, flags: int) -> list[Answer]:
    """What a relay gets of a target's bytes, as answers to three requests on one connection, which then ends."""
    side = RelaySide()
    relay, agent = Session(Recorder(), relay=True), Session(side, relay=False)
    relay.greeted = agent.greeted = True
    forwarder = side.forwarder = Forwarder(Target("tcp", "127.0.0.1", 9), AgentSettings(), Stats())
    pool = forwarder.pool
    connection, wire = TargetConnection(pool), Memory()
    connection.connection_made(wire)
    pool.open.add(connection)
    pool.idle.append(connection)
    answers: list[Answer] = []
    rest = data
    for _ in range(3):
        if wire.closed or connection not in pool.idle:
            break
        answer = Answer()
        head = [method, b"/", b"Host", b"web.localhost", *((b"Upgrade", b"x") if flags & f.F_UPGRADE else ())]
        answer.stream = relay.open_request(1, head, flags, answer)
        answers.append(answer)
        shuttle(relay, agent)
        if not await feed(connection, wire, rest, sizes, lambda: shuttle(relay, agent)):
            rest = b""
        rest = b""
    shuttle(relay, agent)
    if not connection.lost:
        connection.eof_received()
        connection.connection_lost(None)
    shuttle(relay, agent)
    await forwarder.abort()
    for answer in answers:
        if not answer.end:
            answer.stream.reset(f.CANCELLED)
    shuttle(relay, agent)
    assert not relay.streams
    assert not agent.streams
    assert not forwarder.stats.open
    return answers


async def agent_answers(parts: list[bytes], quick: bool) -> list[Any]:
    """What a relay gets of a target's reads, each the answer to a request; ``quick``: of an agent that knows requests again."""
    side = RelaySide()
    relay, agent = Session(Recorder(), relay=True), Session(side, relay=False)
    relay.greeted = agent.greeted = True
    settings = AgentSettings()
    forwarder = side.forwarder = Forwarder(Target("tcp", "127.0.0.1", 9), settings, Stats())
    tap = forwarder.tap = Inspected(settings, "run").tap(forwarder, "target")
    if quick:
        agent.quick = lambda ident, payload: forwarder.quick(agent, ident, payload)
    pool = forwarder.pool
    answers: list[Answer] = []
    written: list[bytes] = []
    for number, part in enumerate(parts):
        if not pool.idle:
            connection, wire = TargetConnection(pool), Memory()
            connection.connection_made(wire)
            pool.open.add(connection)
            pool.idle.append(connection)
        answer = Answer()
        head = [b"GET", b"/", b"Host", b"web.localhost", b"X-Request-Id", b"%d" % number]
        answer.stream = relay.open_request(1, head, f.F_END, answer)
        answers.append(answer)
        shuttle(relay, agent)
        written.append(bytes(wire.out))
        wire.out.clear()
        await feed(connection, wire, part, None, lambda: shuttle(relay, agent))
        shuttle(relay, agent)
        if connection not in pool.idle and not connection.lost:
            connection.eof_received()
            connection.connection_lost(None)
            shuttle(relay, agent)
    seen: list[Any] = [(a.end, a.interim, a.status, a.head, a.body, a.trailers) for a in answers]
    entries = list(tap.recorder.newest())
    seen += [
        (e.line(), e.head(), e.status, e.answer_head(), e.received, bytes(e.response_body or b"")) for e in entries
    ]
    seen += [row[:3] for row in forwarder.stats.records]
    for connection in list(pool.open):
        connection.lost = True
        pool.forget(connection)
    await forwarder.abort()
    for answer in answers:
        if not answer.end:
            answer.stream.reset(f.CANCELLED)
    shuttle(relay, agent)
    assert not agent.streams
    assert not relay.streams
    stats = forwarder.stats
    return [*seen, written, (stats.total, stats.open, stats.failures), agent.send_credit, relay.recv_credit]


def target(data: bytes) -> None:
    """A strange target: each answer is whole or broken off, and is the same however its bytes are cut, and whether they
    were seen before."""
    seed, data = data[:1], data[1:]
    parts = [part for part in data.split(SPLIT) if part][:MOST_READS]
    data = b"".join(parts)
    remember(True)
    forgetful = run(agent_answers(parts * 5, quick=False))
    assert run(agent_answers(parts * 5, quick=True)) == forgetful, data
    kind = seed[0] if seed else 0
    method = (b"GET", b"HEAD", b"GET", b"GET")[kind & 3]
    flags = f.F_UPGRADE if kind & 3 == 3 else f.F_END
    whole = run(agent_reads(data, None, method, flags))
    cut = run(agent_reads(data, random.Random(seed), method, flags))
    assert whole[0].key() == cut[0].key() or whole[0].end == "" == cut[0].end, data
