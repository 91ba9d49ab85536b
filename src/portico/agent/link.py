"""One connection to a relay: WebSocket, HELLO, binds. What happens on it is told to its :class:`Owner`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from typing import Any, Protocol

from picows import WSCloseCode, WSError, ws_connect
from picows.url import WSParsedURL

from portico.agent import proxy as proxies
from portico.agent.api import VERSION, problem_of
from portico.agent.transport import trust
from portico.errors import Problem
from portico.kit.carrier import Carrier
from portico.kit.dial import connect_tcp, reason
from portico.settings import AgentSettings
from portico.wire import frames as f
from portico.wire.counts import Counts
from portico.wire.session import Quick, Session
from portico.wire.stream import Lazy, Sink, Stream

#: The ping whose answer says that the relay has read all that was sent before it; no time stamp is negative as this is.
GOODBYE = b"\xffgoodbye"


def _endless(stream: Stream | Lazy) -> bool:
    """Whether a stream is a connection, which has no end of its own, and not a request."""
    return isinstance(stream, Stream) and (stream.tcp or (stream.upgrade and stream.answered))


class Serves(Quick, Protocol):
    """Takes the streams of one tunnel."""

    def on_request(self, stream: Stream, head: list[bytes], flags: int) -> Sink | None: ...
    def on_open(self, stream: Stream, info: dict[str, Any]) -> Sink | None: ...


class Owner(Protocol):
    """Hears what happens on a link."""

    def link_bound(self, link: Link, bind: int, url: str) -> None: ...
    def link_refused(self, link: Link, bind: int, problem: Problem, retryable: bool) -> None: ...
    def link_unbound(self, link: Link, bind: int, problem: Problem) -> None: ...
    def link_counts(self, link: Link, bind: int, counts: Counts) -> None: ...
    def link_goaway(self, link: Link, problem: Problem, retry_after: float) -> None: ...
    def link_lost(self, link: Link, problem: Problem) -> None: ...


class _Session(Session):
    """A session that remembers why it ended itself."""

    failure: Problem | None = None

    def fail(self, code: str, detail: str, retryable: bool = False) -> None:
        self.failure = self.failure or problem_of(code, f"the relay broke the protocol: {detail}")
        super().fail(code, detail, retryable)


class Link:
    """See the module. ``connect`` orders the connections of one session (contracts/wire.md, 3.6)."""

    def __init__(self, owner: Owner, settings: AgentSettings, url: str, connect: int) -> None:
        self.url = url
        self.connect = connect
        self.relay = ""
        self.region = ""
        self.lost = False
        self.leaving = False
        self.sent_away = False  # by the relay, which serves its visitors on this link until it closes it
        self.bound: dict[int, Serves] = {}
        self.opened_at = 0.0
        self._owner = owner
        self._settings = settings
        self._error: Problem | None = None
        self._unanswered: dict[int, asyncio.TimerHandle] = {}
        self._read: asyncio.Future[None] | None = None
        self._gone = asyncio.Event()
        self._hello: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.session = _Session(
            self,
            relay=False,
            max_streams=settings.max_streams,
            max_window=settings.stream_window_max_bytes,
            growth=settings.window_growth_budget_bytes,
        )
        self.session.quick = self.bound
        self.carrier = Carrier(
            self.session,
            ping_interval=settings.ping_interval_seconds,
            ping_timeout=settings.ping_timeout_seconds,
            on_lost=self._on_lost,
        )

    async def open(self, token: str) -> None:
        """Connect and exchange HELLO; raises the relay's problem, that of a proxy, or ``edge.agent_unreachable``."""
        try:
            async with asyncio.timeout(self._settings.connect_timeout_seconds):
                await self._upgrade(token)
                self.session.control(
                    f.HELLO,
                    0,
                    versions=[f.VERSION],
                    agent=f"portico/{VERSION}",
                    connect=self.connect,
                    counts=True,
                )
                await self._hello
        except TimeoutError:
            self.close("no answer in time")
            raise self._unreachable("it did not answer in time") from None
        except Problem:
            self.close("refused")
            raise
        self.opened_at = asyncio.get_running_loop().time()

    async def _upgrade(self, token: str) -> None:
        context = trust(self._settings) if self.url.startswith("wss:") else None
        try:
            transport, _ = await ws_connect(
                lambda: self.carrier,
                self.url,
                ssl_context=context,
                websocket_handshake_timeout=self._settings.connect_timeout_seconds,
                # Above the protocol's own limit on purpose, so that a message over it is refused by name.
                max_frame_size=self._settings.websocket_message_max_bytes,
                enable_auto_pong=False,  # the carrier answers
                extra_headers={"Authorization": f"Bearer {token}", "Sec-WebSocket-Protocol": f.PROTOCOL},
                max_redirects=0,
                socket_factory=self._dial,
            )
        except WSError as err:
            raise self._refusal(err) from None
        except ssl.SSLCertVerificationError as err:
            raise self._unreachable(f"its certificate is not trusted ({err.verify_message})") from None
        except OSError as err:
            raise self._unreachable(reason(err)) from None
        if transport.response is None:  # lost in the very moment of the upgrade: a relay that is shutting down
            raise self._unreachable("it closed the connection during the upgrade")
        if transport.response.headers.get("Sec-WebSocket-Protocol") != f.PROTOCOL:
            raise Problem("wire.version_unsupported", f"{self.url} does not speak {f.PROTOCOL}")

    async def _dial(self, url: WSParsedURL) -> socket.socket:
        """The TCP connection below it all: through a proxy where there is one, else to the first address that answers."""
        through = proxies.choose(self._settings, self.url)
        if through is None:
            return await connect_tcp(url.host, url.port)
        return await proxies.connect(through, url.host, url.port, self._settings.proxy_timeout_seconds)

    def _refusal(self, err: WSError) -> Problem:
        """The problem document of a refused upgrade."""
        body = getattr(err, "raw_body", None)
        try:
            document = json.loads(body) if body else {}
            return problem_of(document["code"], str(document.get("detail", "")))
        except (ValueError, KeyError, TypeError):
            response = getattr(err, "response", None)
            return self._unreachable(f"it answered {int(response.status)}" if response is not None else str(err))

    def _unreachable(self, why: str) -> Problem:
        return Problem("edge.agent_unreachable", f"the relay at {self.url} cannot be reached: {why}")

    # ── what the agent says ───────────────────────────────────────────────────────────────────────────────────────
    def bind(self, bind: int, grant: str) -> None:
        """Ask for a tunnel, or renew its grant. A relay that does not answer in time is left: another may."""
        self.session.control(f.BIND, bind, grant=grant)
        self._answered(bind)
        limit = self._settings.bind_timeout_seconds
        self._unanswered[bind] = asyncio.get_running_loop().call_later(
            limit, self.carrier.abort, f"no answer to BIND within {limit:g} s"
        )

    def _answered(self, bind: int) -> None:
        timer = self._unanswered.pop(bind, None)
        if timer is not None:
            timer.cancel()

    def auth(self, token: str) -> None:
        """Renew the session token."""
        self.session.control(f.AUTH, 0, token=token)

    def unbind(self, bind: int) -> None:
        """Give a tunnel back; streams in flight finish."""
        self._answered(bind)
        self.session.control(f.UNBIND, bind, code="tunnel.stopped", detail="the agent ended the tunnel")

    def release(self, bind: int) -> None:
        """Give back a tunnel that is bound elsewhere now: two relays cannot have its port at once."""
        self.session.control(f.UNBIND, bind, code="tunnel.moved", detail="the tunnel moves to another connection")

    async def finish(self, limit: float, *, moved: bool = False) -> None:
        """Leave so that no request is lost: say that none is taken any more, hear that the relay has read it, answer what is
        in flight. Returns when that is done, or after ``limit`` seconds.

        ``moved``: the replacement is bound.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        code, detail = (
            ("session.moved", "the replacement is bound") if moved else ("session.ended", "the agent is stopping")
        )
        self.session.control(f.GOAWAY, 0, code=code, detail=detail, retry_after_ms=0)
        self._read = loop.create_future()
        self.session.ping(GOODBYE)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._read, min(limit, self.carrier.ping_timeout))
        await self.drained(deadline - loop.time(), None if moved else self._settings.drain_upgraded_seconds)

    async def drained(self, limit: float, endless: float | None = None) -> None:
        """Return when no stream is in flight, or after ``limit`` seconds. Upgraded and TCP connections, which have no end of
        their own, are given ``endless`` seconds where that is less."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not self.lost and loop.time() - began < limit:
            patient = endless is None or loop.time() - began < endless
            if not any(patient or not _endless(stream) for stream in self.session.streams.values()):
                return
            await asyncio.sleep(0.02)

    def close(self, reason: str) -> None:
        """End the connection."""
        if not self.lost:
            self.carrier.end(WSCloseCode.OK, reason)

    # ── session events ────────────────────────────────────────────────────────────────────────────────────────────
    def on_hello(self, body: dict[str, Any]) -> None:
        self.relay = str(body.get("relay", ""))[:64]
        self.region = str(body.get("region", ""))[:64]
        self.carrier.set_pace(body["ping_interval_ms"] / 1000, body["ping_timeout_ms"] / 1000)
        if not self._hello.done():
            self._hello.set_result(None)
        self.carrier.probe()

    def on_bound(self, bind: int, tunnel: str, name: str, url: str) -> None:
        self._answered(bind)
        self._owner.link_bound(self, bind, url)

    def on_refused(self, bind: int, code: str, detail: str, retryable: bool) -> None:
        self._answered(bind)
        self.bound.pop(bind, None)
        self._owner.link_refused(self, bind, problem_of(code, detail), retryable)

    def on_unbind(self, bind: int, code: str, detail: str) -> None:
        self._answered(bind)
        # Requests that crossed this frame are still answered: the entry stays until the link is gone.
        self._owner.link_unbound(self, bind, problem_of(code, detail))

    def on_authed(self, body: dict[str, Any]) -> None:
        """Nothing to do: the token was taken."""

    def on_goaway(self, code: str, detail: str, retry_after_ms: int) -> None:
        self.leaving = self.sent_away = True
        self._owner.link_goaway(self, problem_of(code, detail), retry_after_ms / 1000)

    def on_error(self, code: str, detail: str, retryable: bool) -> None:
        self._error = problem_of(code, detail)
        if not self._hello.done():
            self._hello.set_exception(self._error)
        self.carrier.end(WSCloseCode.OK, "")

    def on_pong(self, payload: bytes) -> None:
        if payload != GOODBYE:
            self.carrier.note_pong(payload)
        elif self._read is not None and not self._read.done():
            self._read.set_result(None)

    def on_counts(self, bind: int, counts: Counts) -> None:
        self._owner.link_counts(self, bind, counts)

    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> Sink | None:
        serves = self.bound.get(bind)
        if serves is None:
            stream.reset(f.NO_SUCH_BIND, "no such tunnel on this agent")
            return None
        return serves.on_request(stream, head, flags)

    def on_open(self, stream: Stream, bind: int, info: dict[str, Any]) -> Sink | None:
        serves = self.bound.get(bind)
        if serves is None:
            stream.reset(f.NO_SUCH_BIND, "no such tunnel on this agent")
            return None
        return serves.on_open(stream, info)

    def on_bind(self, bind: int, grant: str) -> None:
        """Not sent to agents (the session refuses it)."""

    def on_auth(self, token: str) -> None:
        """Not sent to agents (the session refuses it)."""

    async def until_lost(self) -> None:
        await self._gone.wait()

    def _on_lost(self, detail: str) -> None:
        self.lost = True
        self._gone.set()
        if self._read is not None and not self._read.done():
            self._read.set_result(None)
        for bind in list(self._unanswered):
            self._answered(bind)
        problem = self._error or self.session.failure or self._unreachable(detail)
        if not self._hello.done():
            self._hello.set_exception(problem)
            self._hello.exception()
        self._owner.link_lost(self, problem)
