"""The relay's link to the control plane: the edge stream in, heartbeats out.

Two loops that share nothing but the credential. The stream loop keeps ``GET /v1/edge/stream`` open and applies what it
says to the snapshot; the heartbeat loop reports load and bound tunnels. Neither can stop the relay: whatever the other
side sends or fails to send ends in a reconnect, and visitors are served from the state held.

A revocation must apply within 2 s of the control plane's return, which is why the backoff is capped at one second.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from portico.relay.edge_rows import SnapshotInvalid, parse_json
from portico.relay.snapshot import OutOfOrder, Snapshot
from portico.settings import RelaySettings

log = logging.getLogger(__name__)

#: Seconds after the start in which a heartbeat or a stream that is not answered is no news: the API may be starting beside us.
STARTING_SECONDS = 10.0
#: Different reasons of one outage that are logged.
MAX_REASONS = 8

REFUSED = (401, 403)
LARGE = 2000  # tunnels from which hashing leaves the loop
DEBOUNCE_SHARE = 20  # a heartbeat that takes t to encode is not repeated by a poke within DEBOUNCE_SHARE × t
GOODBYE_MAX_MS = 5000  # of waiting that the control plane may ask for
REASON_CHARS = 200  # of an answer's text that is logged
ANSWER_MAX_BYTES = 65536

Load = Callable[[], Mapping[str, Any]]
Bound = Callable[[], list[dict[str, Any]]]


class LinkLost(Exception):
    """The stream ended, for a reason worth one log line; tried again after the backoff."""


class LinkRefused(LinkLost):
    """The control plane does not accept the relay's key; tried again slowly."""


def client(settings: RelaySettings) -> httpx.AsyncClient:
    """One client for all edge calls: the relay's key, no proxy or other settings from the environment, no redirects."""
    verify: ssl.SSLContext | bool = True
    if settings.api_ca_file is not None:
        verify = ssl.create_default_context(cafile=str(settings.api_ca_file))
    return httpx.AsyncClient(
        base_url=settings.api_url.rstrip("/") + "/v1/edge",
        headers={"Authorization": f"Bearer {settings.relay_key.reveal()}", "Accept-Encoding": "identity"},
        timeout=httpx.Timeout(settings.edge_answer_timeout_seconds, connect=settings.edge_connect_timeout_seconds),
        limits=httpx.Limits(max_connections=8, max_keepalive_connections=4),
        verify=verify,
        trust_env=False,
    )


async def read_start(response: httpx.Response, limit: int = ANSWER_MAX_BYTES) -> bytes:
    """The first bytes of a body: answers are small, and one that is not may not fill memory."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) >= limit:
            break
    return bytes(body[:limit])


async def post(http: httpx.AsyncClient, request: httpx.Request, timeout: float, limit: int = ANSWER_MAX_BYTES) -> bytes:
    """The body of a successful answer. Raises ``LinkRefused``, ``LinkLost``, ``httpx.HTTPError`` or ``TimeoutError``."""
    async with asyncio.timeout(timeout):
        response = await http.send(request, stream=True)
        try:
            body = await read_start(response, limit)
        finally:
            await response.aclose()
    if not response.is_success:
        raise _refusal(response.status_code, body)
    return body


def _refusal(status: int, body: bytes) -> LinkLost:
    """What the control plane said, on one short line; its problem document when it sent one."""
    try:
        problem = parse_json(body)
        said = f"{problem['code']}: {problem['detail']}"
    except (SnapshotInvalid, KeyError, TypeError):
        said = body.decode(errors="replace")
    kind = LinkRefused if status in REFUSED else LinkLost
    return kind(f"answered {status}: {said[:REASON_CHARS]}")


def why(err: BaseException) -> str:
    """A reason for a log line; time-outs have no text of their own."""
    if isinstance(err, TimeoutError | httpx.TimeoutException):
        return f"silent for too long ({type(err).__name__})"
    return str(err) or type(err).__name__


class LinkLeft(Exception):
    """The control plane's process stops and said when (seconds from now) to open the stream anew."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the control plane's process stops")
        self.retry_after = retry_after


class LineReader:
    """Lines of a byte stream with a limit on their length and on the time that one may take."""

    def __init__(self, max_bytes: int, max_seconds: float) -> None:
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._parts: list[bytes] = []
        self._size = 0
        self._since = 0.0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that ``chunk`` completes; raises ``LinkLost`` when the open one is too long or too slow."""
        *lines, rest = chunk.split(b"\n")
        if lines and self._parts:
            lines[0] = b"".join([*self._parts, lines[0]])
        if lines:
            self._parts, self._size = [], 0
        self._keep(rest)
        return [line for line in lines if line.strip()]

    def _keep(self, rest: bytes) -> None:
        now = time.monotonic()
        if not rest:
            return
        if not self._parts:
            self._since = now
        self._parts.append(rest)
        self._size += len(rest)
        if self._size > self._max_bytes:
            raise LinkLost(f"a line is longer than {self._max_bytes} bytes (edge_line_max_bytes)")
        if now - self._since > self._max_seconds:
            raise LinkLost(f"a line takes longer than {self._max_seconds:g} s (edge_line_timeout_seconds)")


class Backoff:
    """Full jitter: each wait is drawn between the minimum and a ceiling that doubles up to the maximum."""

    def __init__(self, minimum: float, maximum: float, draw: Callable[[float, float], float] = random.uniform) -> None:
        self._minimum, self._maximum, self._draw = minimum, maximum, draw
        self._ceiling = 2 * minimum

    def next(self) -> float:
        wait = self._draw(self._minimum, min(self._maximum, self._ceiling))
        self._ceiling = min(self._maximum, 2 * self._ceiling)
        return wait

    def reset(self) -> None:
        self._ceiling = 2 * self._minimum


class ControlLink:
    """Owns both loops. ``connected`` is true from the first sound line of a stream until that stream is lost.

    ``load()`` and ``bound()`` are called for every heartbeat and must be quick. ``disconnected_since`` is monotonic
    time, of the start when there was no connection yet, and ``None`` while connected. ``left``: why tunnels went, by id; what a
    heartbeat has told is taken out of it.
    """

    def __init__(
        self,
        settings: RelaySettings,
        snapshot: Snapshot,
        *,
        load: Load,
        bound: Bound,
        http: httpx.AsyncClient,
        monotonic: Callable[[], float] = time.monotonic,
        left: dict[str, str] | None = None,
    ) -> None:
        self._settings = settings
        self._snapshot = snapshot
        self._load, self._bound = load, bound
        self._left = left if left is not None else {}
        self._http = http
        self._monotonic = monotonic
        self._resync = False
        self._poked = asyncio.Event()
        self._began = time.monotonic()
        self._heard = False  # a heartbeat was answered
        self._streamed = False  # a stream was sound
        self._said: dict[str, set[str]] = {}  # reasons logged in the present outage, per loop
        self._unknown_types: set[str] = set()
        self.connected = False
        self.disconnected_since: float | None = monotonic()
        self.refused = False
        #: Whether the last attempt at the stream came to nothing.
        self.failed = False
        self.draining = False
        self.silent = False
        self.resyncs = 0
        #: The newest version that a line of the stream named.
        self.heard_version = 0
        self.on_connected: list[Callable[[], None]] = []

    async def run(self) -> None:
        """Both loops until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._stream_loop())
            group.create_task(self._heartbeat_loop())

    def leave(self, *, successor: bool) -> None:
        """This relay drains. Heartbeats say so; or they end, where a successor speaks for the same name."""
        self.draining = True
        self.silent = successor
        self.poke()

    def poke(self) -> None:
        """The set of bound tunnels changed (or ``draining``): report it within 50 ms."""
        self._poked.set()

    # -- the stream

    async def _stream_loop(self) -> None:
        limits = self._settings
        backoff = Backoff(limits.edge_backoff_min_seconds, limits.edge_backoff_max_seconds)
        while True:
            try:
                await self._stream_once(backoff)
            except LinkLeft as left:
                self._parted()
                await asyncio.sleep(left.retry_after)
            except LinkRefused as err:
                self._lost("the control plane refuses this relay's key (relay_key)", why(err))
                self.refused = True
                await asyncio.sleep(limits.edge_refused_seconds)
            except (TimeoutError, httpx.TimeoutException) as err:
                news = not self._starting(self._streamed)
                self._lost("edge stream is down, serving from the state held", why(err), news=news)
                await asyncio.sleep(backoff.next())
            except (LinkLost, SnapshotInvalid, httpx.HTTPError, OSError) as err:
                self._lost("edge stream is down, serving from the state held", why(err))
                await asyncio.sleep(backoff.next())
            except Exception as err:
                log.exception("fault in the edge stream")
                self._lost("edge stream is down, serving from the state held", repr(err))
                await asyncio.sleep(backoff.next())

    async def _stream_once(self, backoff: Backoff) -> None:
        """One connection, until it is lost; always ends in an exception."""
        reader = LineReader(self._settings.edge_line_max_bytes, self._settings.edge_line_timeout_seconds)
        async with self._open_stream() as response:
            async for chunk in response.aiter_raw():
                for line in reader.feed(chunk):
                    await self._line(line)
                    self._sound_line()
                    backoff.reset()
        raise LinkLost("the control plane ended the stream")

    @asynccontextmanager
    async def _open_stream(self) -> AsyncIterator[httpx.Response]:
        version = None if self._resync or not self._snapshot.complete else self._snapshot.version
        limits = self._settings
        request = self._http.build_request(
            "GET",
            "/stream",
            params={} if version is None else {"version": version},
            timeout=httpx.Timeout(limits.edge_silence_seconds, connect=limits.edge_connect_timeout_seconds),
        )
        async with asyncio.timeout(limits.edge_connect_timeout_seconds + limits.edge_answer_timeout_seconds):
            response = await self._http.send(request, stream=True)
        try:
            await self._check(response)
            yield response
        finally:
            await response.aclose()

    async def _check(self, response: httpx.Response) -> None:
        if response.status_code == 200:
            if "content-encoding" in response.headers:
                raise LinkLost("the stream is compressed, which was not asked for")
            return
        async with asyncio.timeout(self._settings.edge_answer_timeout_seconds):
            body = await read_start(response)
        raise _refusal(response.status_code, body)

    async def _line(self, line: bytes) -> None:
        """One message. A malformed one, or one out of order, ends the stream and asks for a whole snapshot."""
        try:
            message = parse_json(line)
            if not isinstance(message, dict):
                raise SnapshotInvalid("a line is not an object")
            await self._message(message)
        except SnapshotInvalid as err:
            self._ask_snapshot("out of order" if isinstance(err, OutOfOrder) else "malformed line")
            raise

    async def _message(self, message: dict[str, Any]) -> None:
        if type(named := message.get("version")) is int:
            self.heard_version = named
        match kind := message.get("type"):
            case "snapshot":
                await self._snapshot.apply_gently(message)
                self._resync = False
                if not await self._same_hash(message):
                    log.error("the hash of a fresh snapshot differs: relay and API do not agree how to take it")
            case "delta":
                if self._resync:
                    raise OutOfOrder("a delta where a snapshot was asked for")
                self._snapshot.apply(message)
            case "heartbeat":
                await self._stream_heartbeat(message)
            case "goodbye":
                after = message.get("retry_after_ms")
                raise LinkLeft(min(max(after, 0), GOODBYE_MAX_MS) / 1000 if isinstance(after, int) else 0.0)
            case str():
                self._unknown(kind[:64])
            case _:
                raise SnapshotInvalid("a line has no type")

    def _unknown(self, kind: str) -> None:
        """A newer control plane may say more than this relay understands; named once each, a bounded number of them."""
        if kind not in self._unknown_types and len(self._unknown_types) < 16:
            self._unknown_types.add(kind)
            log.warning("edge message of an unknown type is left out", extra={"f": {"type": kind}})

    async def _stream_heartbeat(self, message: dict[str, Any]) -> None:
        version, held = message.get("version"), self._snapshot.version
        self._snapshot.prune()
        if type(version) is not int:
            raise SnapshotInvalid("a heartbeat has no version")
        if message.get("hash") is None or held is None or version < held:
            return
        if not await self._same_hash(message):
            log.error("edge state differs from the control plane's", extra={"f": {"version": version, "held": held}})
            self._ask_snapshot("hash mismatch")
            raise LinkLost(f"the hash at version {version} differs: asking for a whole snapshot")
        self._snapshot.advance(version)

    async def _same_hash(self, message: dict[str, Any]) -> bool:
        """Whether the message's hash is ours. Ended sessions leave the two states at their own pace, so both are tried:
        all that are held, and those not over yet at the time that the message names."""
        frozen, expected = self._snapshot.frozen(), message.get("hash")
        if frozen is None or expected is None:
            return True
        said_of = message.get("organizations_hash")  # an earlier control plane has none
        if said_of is not None and frozen.organizations_digest() not in (None, said_of):
            return False
        said = message.get("time")
        times = [0.0, float(said) if isinstance(said, int | float) else time.time()]
        for at in times:
            digest = await asyncio.to_thread(frozen.digest, at) if len(frozen.tunnels) > LARGE else frozen.digest(at)
            if digest == expected:
                return True
        return False

    def _ask_snapshot(self, reason: str) -> None:
        self._resync = True
        self.resyncs += 1
        log.warning("asking the control plane for a whole snapshot", extra={"f": {"why": reason}})

    def _sound_line(self) -> None:
        if self.connected:
            return
        away = self._monotonic() - (self.disconnected_since or self._monotonic())
        log.info("edge stream is up", extra={"f": {"version": self._snapshot.version, "after_seconds": round(away, 1)}})
        self.connected, self.refused, self.disconnected_since = True, False, None
        self._streamed = True
        self.failed = False
        self._said.pop("stream", None)
        for callback in self.on_connected:
            callback()

    def _parted(self) -> None:
        if self.connected:
            self.disconnected_since = self._monotonic()
            log.info("edge stream ends: the API process stops; opening another")
        self.connected = False

    def _starting(self, answered: bool) -> bool:
        """Whether silence is no news: nothing was answered yet, and we have just started."""
        return not answered and time.monotonic() - self._began <= STARTING_SECONDS

    def _lost(self, what: str, reason: str, *, news: bool = True) -> None:
        if self.connected or self.disconnected_since is None:
            self.disconnected_since = self._monotonic()
        self.connected, self.failed = False, True
        if news:
            self._say("stream", what, reason)

    def _say(self, loop: str, what: str, reason: str) -> None:
        """Once per reason and outage: an hour of it is a line or two, not an hour of lines."""
        said = self._said.setdefault(loop, set())
        if reason not in said and len(said) < MAX_REASONS:
            said.add(reason)
            log.warning(what, extra={"f": {"why": reason, "api": self._settings.api_url}})

    # -- heartbeats

    async def _heartbeat_loop(self) -> None:
        limits = self._settings
        backoff = Backoff(limits.edge_backoff_min_seconds, limits.edge_backoff_max_seconds)
        while not self.silent:
            self._poked.clear()
            started = time.monotonic()
            try:
                spent = await self._heartbeat()
            except LinkRefused as err:
                self._say("heartbeat", "the control plane refuses this relay's key (relay_key)", why(err))
                await asyncio.sleep(limits.edge_refused_seconds)
                continue
            except (LinkLost, httpx.HTTPError, OSError, TimeoutError) as err:
                if not self._starting(self._heard):
                    self._say("heartbeat", "heartbeat failed", why(err))
                await asyncio.sleep(backoff.next())
                continue
            except Exception as err:
                log.exception("fault in the heartbeat")
                self._say("heartbeat", "heartbeat failed", repr(err))
                await asyncio.sleep(limits.edge_backoff_max_seconds)
                continue
            backoff.reset()
            self._heard = True
            self._said.pop("heartbeat", None)
            await self._pause(started, spent)

    async def _pause(self, started: float, spent: float) -> None:
        """Until the next heartbeat is due, or a poke and the moment in which more of them are collected."""
        due = started + self._settings.heartbeat_interval_seconds
        try:
            async with asyncio.timeout(max(0.0, due - time.monotonic())):
                await self._poked.wait()
        except TimeoutError:
            return
        crowded = started + DEBOUNCE_SHARE * spent - time.monotonic()
        await asyncio.sleep(max(self._settings.heartbeat_debounce_seconds, min(crowded, due - time.monotonic())))

    async def _heartbeat(self) -> float:
        """One report; the seconds of CPU that building it took (a relay with 10,000 tunnels sends a megabyte)."""
        limits = self._settings
        began = time.perf_counter()
        told = dict(self._left)
        request = self._http.build_request("POST", "/heartbeat", json=self._report(told))
        spent = time.perf_counter() - began
        await post(self._http, request, limits.heartbeat_timeout_seconds)
        for tunnel, why in told.items():
            if self._left.get(tunnel) is why:
                del self._left[tunnel]
        return spent

    def _report(self, left: dict[str, str]) -> dict[str, Any]:
        limits = self._settings
        return {
            "relay": limits.relay_name,
            "region": limits.region,
            "connect_url": limits.connect_url,
            "public_url": limits.public_url,
            "version": self._snapshot.version or 0,
            "load": dict(self._load()),
            "draining": self.draining,
            "bound": self._bound(),
            "left": [{"tunnel": tunnel, "reason": why} for tunnel, why in left.items()],
        }
