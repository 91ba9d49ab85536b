"""One public request and its answer: the facts that are decided on, the stream to the agent, and the answer's framing.

    visitor bytes ─► http1.Visitor ─► Exchange ─► wire.Stream ─► agent
                          ◄── answer, re-serialised ◄── on_response, on_data, on_end, on_reset

An exchange is made when a request head is complete. While an earlier request of the connection is being answered it
only collects its body (reading is paused then, so that is one buffer at most); ``start`` decides and forwards it.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Iterator
from operator import add
from time import monotonic as clock
from typing import TYPE_CHECKING, Final, cast

from portico.relay import client_address, heads
from portico.relay.decide import PASSWORD, decide
from portico.relay.heads import PASS
from portico.relay.policy import OPEN
from portico.wire import frames as f
from portico.wire.stream import Stream

if TYPE_CHECKING:
    from portico.relay.agent_connection import LiveTunnel
    from portico.relay.client_address import Told
    from portico.relay.credentials import Accounts
    from portico.relay.door import Door
    from portico.relay.http1 import Visitor
    from portico.relay.line import Line
    from portico.relay.peers import RemoteTunnel

# How an answer's body is framed towards the visitor.
NO_BODY, COUNTED, CHUNKED, UNTIL_CLOSE, RAW = range(5)

#: Bytes of a body that can be part of a whole answer.
SMALL = 16_384

#: RESET code → what the visitor is told.
RESET_CODES = {
    f.TARGET_REFUSED: "edge.target_refused",
    f.TARGET_TIMEOUT: "edge.target_timeout",
    f.IDLE_TIMEOUT: "edge.target_timeout",
    f.TARGET_INVALID: "edge.target_invalid",
    f.TARGET_RESET: "edge.target_invalid",
    f.REQUEST_INVALID: "edge.bad_request",
    f.TOO_MANY_STREAMS: "edge.concurrency_exceeded",
    f.RATE_LIMITED: "edge.rate_limited",
}

#: Refusals that may pass in a moment: see `holding.py`.
MAY_WAIT = frozenset(("edge.tunnel_offline", "edge.concurrency_exceeded"))

#: How a request ended, for the log.
ANSWERED, REFUSED, LEFT, BROKEN = "answered", "refused", "visitor_left", "broken_off"

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,3})?")


def _ids() -> Iterator[bytes]:
    """A prefix of this process and a serial number, in hexadecimal; put together in C, since every request has one."""
    prefix = b"req_" + secrets.token_hex(6).encode()
    ends = [b"%03x" % low for low in range(4096)]
    beginnings = (itertools.repeat(prefix + b"%07x" % high) for high in itertools.count())
    return itertools.chain.from_iterable(map(add, beginning, ends) for beginning in beginnings)


#: Ids of requests. Unique over processes and restarts; also what ties log lines of visitor, relay, agent and target together.
IDS: Final = _ids()


def request_id() -> bytes:
    """The next one of :data:`IDS`."""
    return next(IDS)


class Exchange:
    """See the module. ``fields`` are the visitor's, flat; ``wire`` the same as bytes of a frame, once they are known.

    Defaults stand on the class: an ordinary request sets few of them (half a microsecond).
    """

    id = b""
    tunnel: LiveTunnel | RemoteTunnel | None = None
    stream: Stream | None = None
    head_only = False
    with_body = False
    upgrade = False
    te_trailers = False  # the visitor reads trailers
    http10 = False
    keep_alive = True
    started = False
    held = False  # waits, or waited, for its tunnel to come back
    judged: Accounts | None = None  # against whom its password was, or is being, checked
    policy = OPEN  # under which it was forwarded
    told: Told | None = None  # by a trusted proxy, of whom it has the request
    told_wait = 0.0  # seconds, by the relay that has the tunnel
    queued = False  # waits, or waited, for a place in its tunnel
    line: Line | None = None  # in which it waits
    counted = False  # holds a place in the tunnel's concurrency
    received = False  # the request is here, whole
    blocked = False  # waits for credit: nothing more is read from the visitor
    sending = False  # its body is still being sent to the agent
    responded = False
    done = False
    framing = NO_BODY
    left = 0
    unconsumed = 0
    began = 0.0  # monotonic seconds, when it was first decided on
    head_at = 0.0  # and when its answer's head was written
    status = 0  # of the final answer, or of the refusal
    code: str | None = None  # of the refusal
    got = sent = 0  # bytes from the visitor, and to it
    counted_out = False
    wire: bytes | None = None
    # Lists of their own belong to requests with a body or an upgrade, see ``http1.Visitor._make``.
    pending = cast(list[bytes], ())
    trailers = cast(list[bytes], ())

    def __init__(self, conn: Visitor, host: bytes, method: bytes, target: bytes, fields: list[bytes]) -> None:
        self.conn = conn
        self.host = host
        self.method = method
        self.target = target
        self.fields = fields
        if method == b"HEAD":
            self.head_only = True

    # ── the facts of its decision ─────────────────────────────────────────────────────────────────────────────────
    @property
    def standing(self) -> str | None:
        """The state of the tunnel that the platform has for the host, live or not."""
        return self.conn.server.standing(self.host)

    @property
    def valid_until(self) -> float | None:
        """Until when its host may be served, by HTTPS alone; ``None``: there is no such rule."""
        return self.conn.server.valid_until(self.host)

    @property
    def door(self) -> Door:
        return self.conn.door

    @property
    def secure(self) -> bool:
        """Whether the visitor's side is encrypted."""
        told = self.told
        return not self.conn.plain if told is None or told.scheme is None else told.scheme == b"https"

    @property
    def address(self) -> str:
        """The client's."""
        return self.conn.address if self.told is None else self.told.client

    @property
    def certified(self) -> bool:
        return self.conn.certified

    def password(self) -> str:
        """What is known of the request's password: missing, valid, invalid, throttled, or need."""
        assert self.tunnel is not None
        return self.conn.server.password(self.tunnel, self.fields, self.address)

    def wait(self) -> float:
        """Seconds until the rates have room, here or at the relay that has the tunnel; 0 when they have it now."""
        assert self.tunnel is not None
        rates = self.tunnel.rates
        return max(self.told_wait, 0.0 if rates is None else rates.check(self.address, self.conn.server.loop.time()))

    # ── the request ───────────────────────────────────────────────────────────────────────────────────────────────
    def start(self) -> None:
        """Decide, and forward or refuse."""
        self.started = True
        told = self.told
        self.id = self.id or (told.ident if told is not None else None) or request_id()
        self.began = self.began or clock()
        conn = self.conn
        asked = conn.server.challenges
        if asked.open and (proof := asked.http(self.host, self.method, self.target)) is not None:
            conn.answer_challenge(self, proof)
            return
        self.tunnel = tunnel = conn.server.find(self.host)
        code = decide(self)
        if code is not None:
            if not self._postponed(code):
                self.refuse(code)
            return
        assert tunnel is not None
        if tunnel.rates is not None:
            tunnel.rates.take(self.address, conn.server.loop.time())
        tunnel.inflight += 1
        self.counted = True
        tunnel.counters.requests += 1
        self.policy = policy = tunnel.policy
        flags = 0 if self.with_body or self.upgrade else f.F_END
        if self.upgrade:
            flags |= f.F_UPGRADE
        if self.te_trailers:
            flags |= f.F_TRAILERS
        try:
            wire = self.wire
            if wire is None:
                wire = self.wire = heads.wire_fields(self.fields)
            if policy.request is not None:
                wire = heads.wire_fields(policy.request(self.fields))
            known_for, forwarding = conn.forwarded
            if told is not None:
                fields = client_address.told_on(told, conn.address, conn.door.scheme, self.host, conn.door.port)
                forwarding = heads.wire_fields((*fields, b"X-Request-Id", b""))
            elif known_for != self.host:
                forwarding = conn.forwarding(self.host)
            line = tunnel.bind_bytes + self.method + b"\0" + self.target
            self.stream = tunnel.session.open_encoded(line + wire + forwarding + self.id, flags, self)
        except ValueError:
            self.refuse("edge.head_too_large")
            return
        except OverflowError:
            self.refuse("edge.agent_unreachable")
            return
        if flags & f.F_END:
            return
        self.sending = True
        if self.pending:
            self.pump()
        elif self.received:
            self._maybe_end()

    def _postponed(self, code: str) -> bool:
        """Whether the request waits for what would change the answer; it hears :meth:`go_on` then."""
        server = self.conn.server
        if code is PASSWORD:
            assert self.tunnel is not None
            users = self.tunnel.policy.users
            if self.judged is users:  # and forgotten at once: there are too many of them
                return False
            self.judged = users
            server.judge(self.tunnel, self.fields, self.address, self.go_on)
        elif code == "edge.concurrency_exceeded" and self._lined_up():
            pass
        elif code in MAY_WAIT and not self.held and server.holding.take(self, code):
            self.held = True
        else:
            return False
        self.blocked = True
        self.started = False
        self.conn.update_reading()
        return True

    def _lined_up(self) -> bool:
        """Whether it waits for a place in its tunnel, for the first time and if the tunnel's policy has a line."""
        assert self.tunnel is not None
        line = self.tunnel.line
        if line is None or self.queued or not line.join(self):
            return False
        self.queued = True
        self.line = line
        return True

    def go_on(self) -> None:
        """The wait is over, one way or the other."""
        conn = self.conn
        if conn.closed or conn.current is not self or self.done:
            return
        self.blocked = False
        conn.body_at = conn.server.now
        self.start()
        conn.update_reading()

    def body(self, data: bytes) -> None:
        """A piece of the request body; kept only while there is no credit for it."""
        stream = self.stream
        if stream is None:
            if not self.started:
                self.pending.append(data)
            return
        if self.pending or stream.sendable() < len(data):
            self.pending.append(data)
            self.pump()
        elif self.sending:
            self._count_in(len(data))
            stream.send_data(data)
            if not stream.sendable():
                self._wait(stream)

    def _wait(self, stream: Stream) -> None:
        self.blocked = True
        stream.wait()
        self.conn.update_reading()

    def end(self) -> None:
        """The visitor's direction is complete (with trailers in ``trailers``), or half-closed on an upgraded connection."""
        self.received = True
        if self.blocked and not self.started:
            self.blocked = False  # it waits for its tunnel, whole: read on, to notice when the visitor goes away
            self.conn.update_reading()
        self._maybe_end()

    def _maybe_end(self) -> None:
        stream = self.stream
        if stream is None or not self.sending or self.pending or (self.upgrade and self.framing != RAW):
            return
        self.sending = False
        fields = heads.trailers(self.trailers)
        if fields and self.policy.request is not None:
            fields = self.policy.request.strip(fields)
        stream.send_end(fields)
        if self.done:
            self.conn.finished(self)

    def pump(self) -> None:
        """Send what waits, as far as there is credit; hold the visitor back for the rest."""
        stream = self.stream
        if stream is None or not self.sending:
            self.pending = []
            return
        pending = self.pending
        while pending and (room := stream.sendable()):
            data = pending[0]
            if len(data) > room:
                pending[0] = data[room:]
                data = data[:room]
            else:
                pending.pop(0)
            self._count_in(len(data))
            stream.send_data(data)
        if pending:
            self._wait(stream)
            return
        self.blocked = False
        self.conn.body_at = self.conn.server.now
        self.conn.update_reading()
        if self.received:
            self._maybe_end()

    def _count_in(self, size: int) -> None:
        assert self.tunnel is not None
        self.tunnel.counters.bytes_in += size
        self.got += size

    def _count_out(self, size: int) -> None:
        if self.tunnel is not None:
            self.tunnel.counters.bytes_out += size
        self.sent += size

    def _head_written(self, status: int) -> None:
        self.status = status
        self.head_at = now = clock()
        self.conn.server.tally.head.observe(now - self.began)

    def credit_room(self) -> int:
        """How many bytes may be read from the visitor for this request now."""
        return self.stream.sendable() if self.stream is not None else 0

    # ── the answer ────────────────────────────────────────────────────────────────────────────────────────────────
    def on_interim(self, status: int, head: list[bytes]) -> None:
        if self.http10 or self.responded or self.conn.paused:
            return  # nobody owes us credit for them: they may not pile up before a visitor that does not read
        if self.policy.response is not None:
            head = [head[0], *self.policy.response.strip(head[1:])]
        out = [heads.STATUS_LINES[status, head[0]]]
        self._fields(out, head)
        out.append(b"\r\n")
        self._write(b"".join(out))

    def on_response(self, status: int, head: list[bytes], end: bool) -> None:
        self.responded = True
        conn = self.conn
        conn.deadline = conn.NEVER
        if conn.paused:
            conn.watch_reader()
        given, edit = head, self.policy.response
        if edit is not None:
            head = [head[0], *edit(head[1:])]
        out = [heads.STATUS_LINES[status, head[0]]]
        length, upgrade = self._fields(out, head)
        if length == -2:
            self._target_invalid("its answer has two lengths or one that is not a number")
            return
        if status == 101:
            if not self.upgrade or not upgrade:
                self._target_invalid("it switched protocols without being asked")
                return
            out.append(b"Connection: Upgrade\r\n\r\n")
            self.framing = RAW
            self._write(b"".join(out))
            self._head_written(status)
            conn.become_raw()
            return
        self._frame(out, status, length, end)
        if end and self.framing == COUNTED and length:
            # The visitor would read the next answer on its connection as the rest of this one.
            self._target_invalid("it ended before the length that it announced")
            return
        if conn.draining:
            self.keep_alive = False
        if self.framing == COUNTED and self.left < SMALL and not (self.http10 or self.upgrade):
            self._learn(status, given, out)
        if not self.keep_alive:
            out.append(b"Connection: close\r\n")
        elif self.http10:
            out.append(b"Connection: keep-alive\r\n")
        out.append(b"\r\n")
        data = b"".join(out)
        self._count_out(len(data))
        if end:
            conn.write(data)
        else:
            conn.write_head(data)
        self._head_written(status)
        if self.upgrade:
            self._upgrade_declined()
        if end:
            self._answered()

    def _learn(self, status: int, head: list[bytes], out: list[bytes]) -> None:
        """Remember the head of an ordinary answer, from the second time on; ``out``: its lines, but for what the visitor's
        connection adds."""
        payload = f.encode_response(status, head)
        answers = self.policy.answers
        if answers.worth(payload):
            answers.remember(payload, heads.KnownAnswer(b"".join((*out, b"\r\n")), self.left, status // 100))

    def _fields(self, out: list[bytes], head: list[bytes]) -> tuple[int, bool]:
        """Append the fields that pass; ``(content length or -1 for none or -2 for a bad one, whether Upgrade was there)``."""
        plan = heads.RESPONSE_PLANS[tuple(head[1::2])]
        if plan is not None:
            template, length_at = plan
            out.append(template % tuple(head[2::2]))
            if not length_at:
                return -1, False
            value = head[length_at]
            return (int(value) if value.isdigit() and len(value) < 19 else -2), False
        kinds = heads.RESPONSE_KINDS
        length, upgrade = -1, False
        for at in range(1, len(head), 2):
            name = head[at]
            value = head[at + 1]
            kind = kinds[name]
            if kind == PASS:
                out += (name, b": ", value, b"\r\n")
            elif kind == heads.LENGTH:
                number = int(value) if value.isdigit() and len(value) < 19 else -2
                length = number if length in (-1, number) else -2
            elif kind == heads.UPGRADE:
                upgrade = True
                out.append(b"Upgrade: %b\r\n" % value)
        return length, upgrade

    def _frame(self, out: list[bytes], status: int, length: int, end: bool) -> None:
        """Choose the body's framing (RFC 9112, 6.3) and append the field that says so."""
        if self.head_only or status in (204, 304):
            self.framing = NO_BODY
            if length >= 0 and status != 204:
                out.append(b"Content-Length: %d\r\n" % length)
        elif length >= 0:
            self.framing, self.left = COUNTED, length
            out.append(b"Content-Length: %d\r\n" % length)
        elif end:
            self.framing = NO_BODY
            out.append(b"Content-Length: 0\r\n")
        elif self.http10:
            self.framing = UNTIL_CLOSE
            self.keep_alive = False
        else:
            self.framing = CHUNKED
            out.append(b"Transfer-Encoding: chunked\r\n")

    def _upgrade_declined(self) -> None:
        """An ordinary answer to an upgrade request: what the visitor sends next is HTTP again."""
        self.upgrade = False
        if self.sending and self.stream is not None:
            self.sending = False
            self.stream.send_end()
        self.received = True

    def on_opened(self) -> None:
        """Only TCP streams are opened."""

    def on_data(self, data: bytes, end: bool) -> None:
        conn = self.conn
        framing = self.framing
        if framing == COUNTED:
            self.left -= len(data)
            if self.left < 0:
                self._break_off("the target sent more than it announced")
                return
            conn.write(data)
        elif framing == CHUNKED:
            if data:
                conn.write_chunk(data)
        elif framing == NO_BODY:
            if data:
                self._break_off("the target sent a body where none may be")
                return
        else:
            conn.write(data)
        self._count_out(len(data))
        stream = self.stream
        assert stream is not None
        if conn.paused:
            self.unconsumed += len(data)
        else:
            stream.consumed(len(data))
        if end:
            self.on_end([])

    def drained(self) -> None:
        """The visitor took what was waiting: the agent may send as much again."""
        if self.unconsumed and self.stream is not None:
            size, self.unconsumed = self.unconsumed, 0
            self.stream.consumed(size)

    def on_end(self, trailers: list[bytes]) -> None:
        framing = self.framing
        if framing == COUNTED and self.left:
            self._break_off("the target sent less than it announced")
            return
        if framing == CHUNKED:
            fields = heads.trailers(trailers)
            if fields and self.policy.response is not None:
                fields = self.policy.response.strip(fields)
            lines = b"".join(b"%b: %b\r\n" % (fields[at], fields[at + 1]) for at in range(0, len(fields), 2))
            self.conn.write(b"0\r\n%b\r\n" % lines)
        elif framing == RAW:
            self.conn.end_writing()
        self._answered()

    def on_reset(self, code: int, detail: str) -> None:
        stream, self.stream = self.stream, None
        if self.done:  # the answer is complete; the agent wants no more of the request
            self.sending = False
            self.pending = []
            self.keep_alive = self.keep_alive and self.received
            self.conn.finished(self)
        elif stream is None or self.conn.closed:
            self.release_place()
            self.over(BROKEN)
        elif not self.responded:
            self._count_error()
            if code == f.RATE_LIMITED:
                self.told_wait, detail = float(detail) if _SECONDS.fullmatch(detail) else 1.0, ""
            self.refuse(RESET_CODES.get(code, "edge.agent_unreachable"), detail or None)
        else:
            self._count_error()
            self._abort_answer()

    def on_credit(self) -> None:
        self.pump()

    # ── endings ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _answered(self) -> None:
        """The answer is complete. An early one leaves the exchange open until the request is, or is not wanted."""
        self.done = True
        if not self.sending:
            self.conn.finished(self)

    def abandon(self) -> None:
        """The visitor is gone: tell the agent, so that the target hears of it."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.reset(f.CANCELLED, "the visitor closed the connection")
        self.release_place()
        self.over(LEFT)

    def time_out(self) -> None:
        """No answer within ``first_byte_timeout_seconds``."""
        self._count_error()
        self.break_up("edge.target_timeout", "no answer in time")

    def break_up(self, code: str, detail: str) -> None:
        """The exchange took too long: the target hears that it is over, the visitor why."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.reset(f.CANCELLED, detail)
        self.refuse(code)

    def refuse(self, code: str, detail: str | None = None) -> None:
        """Answer with a refusal page; the stream, if any, is over."""
        if code is PASSWORD:
            code = "edge.auth_throttled"
        self.code = code
        self.responded = self.done = True
        self.sending = False
        self.pending = []
        self.conn.refuse(self, code, detail)

    def _target_invalid(self, detail: str) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.reset(f.CANCELLED, detail)
        self._count_error()
        self.refuse("edge.target_invalid", f"The local app's answer was not usable: {detail}.")

    def _break_off(self, detail: str) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.reset(f.CANCELLED, detail)
        self._count_error()
        self._abort_answer()

    def _abort_answer(self) -> None:
        """The visitor must see that the answer is not whole: no last chunk, fewer bytes than announced, or a reset."""
        self.release_place()
        self.done = True
        self.over(BROKEN)
        self.conn.break_off(reset=self.framing in (UNTIL_CLOSE, RAW))

    def over(self, end: str = ANSWERED) -> None:
        """Count and log it, once, however it ended; what never had its turn is not counted."""
        if self.counted_out or not self.began:
            return
        self.counted_out = True
        conn = self.conn
        took = clock() - self.began
        server = conn.server
        server.tally.ended(b"websocket" if self.status == 101 else conn.door.scheme, self.status, took)
        if server.access is not None:
            server.access.exchange(self, end if self.code is None else REFUSED, took)

    def _count_error(self) -> None:
        if self.tunnel is not None:
            self.tunnel.counters.errors += 1

    def release_place(self) -> None:
        """Give the place in the tunnel back, once; called when the exchange has left its connection, however it ended."""
        if self.counted and self.tunnel is not None:
            self.counted = False
            self.tunnel.inflight -= 1
            if self.tunnel.line is not None:
                self.tunnel.line.freed()
        elif self.line is not None:
            self.line.leave(self)
            self.line = None

    def _write(self, data: bytes) -> None:
        self._count_out(len(data))
        self.conn.write(data)
