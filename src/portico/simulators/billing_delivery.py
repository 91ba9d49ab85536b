"""How a payment provider's simulator delivers webhooks: in order, signed, tried again; or not so, on request.

A message waits in one queue and is posted to every endpoint that wants its type. What is not answered 2xx in time is
tried again when
the simulator's clock says so. :class:`Faults` says what goes wrong instead; a count is used up by one message (or call) each, and
-1 lasts until it is changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import httpx

from portico.simulators.billing_world import Clock, Doc, World

#: Attempts that are kept for whoever asks.
_KEPT_ATTEMPTS: Final = 2000
_AGAIN: Final = "deliveries"


@dataclass(slots=True)
class Faults:
    """What goes wrong. Of webhooks: ``lose`` (never sent; the API lists the event all the same), ``duplicates``
    (copies more of each),
    ``reorder`` (so many are held, then sent last first), ``delay`` (seconds before each), ``wrong_signature``,
    ``stale`` (seconds by which
    the signed time lies in the past; negative: the future), ``other_body`` (after the event another body under its id),
    ``tamper`` (PayPal: another amount in the body, its CRC-32 and the signature kept). Of the API: ``api_status``
    answered to the next
    ``api_count`` calls with nothing done, ``api_lost`` calls that are done and then answered 500, ``api_delay`` seconds."""

    lose: int = 0
    duplicates: int = 0
    reorder: int = 0
    delay: float = 0.0
    wrong_signature: int = 0
    stale: float = 0.0
    other_body: int = 0
    tamper: int = 0
    api_status: int = 503
    api_count: int = 0
    api_lost: int = 0
    api_delay: float = 0.0

    def take(self, name: str) -> bool:
        """Whether this one goes wrong; uses one up."""
        left: int = getattr(self, name)
        if left > 0:
            setattr(self, name, left - 1)
        return left != 0

    def change(self, wanted: dict[str, Any]) -> None:
        """Set some of them by name; raises ``ValueError`` for what is none."""
        for name, value in wanted.items():
            kind = _FAULT_KINDS.get(name)
            if kind is None:
                raise ValueError(f"there is no fault {name!r}; there are {', '.join(_FAULT_KINDS)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)):
                raise ValueError(f"{name} is a number")
            setattr(self, name, kind(value))


_FAULT_KINDS: Final[dict[str, Callable[[Any], Any]]] = {
    item.name: float if item.type == "float" else int for item in dataclasses.fields(Faults)
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where webhooks go. ``secret`` is what the provider signs with; ``events`` empty: every type."""

    id: str
    url: str
    secret: str = ""
    events: frozenset[str] = frozenset()

    def wants(self, kind: str) -> bool:
        return not self.events or "*" in self.events or kind in self.events


@dataclass(frozen=True, slots=True)
class Message:
    """One event as it is sent."""

    id: str
    type: str
    body: bytes


#: How a signature is to be: right, by somebody else's secret, or over a body whose CRC-32 stays (PayPal).
Manner = Literal["right", "wrong", "tampered"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One POST. ``status`` is ``None`` without an answer."""

    event: str
    type: str
    url: str
    number: int
    status: int | None
    manner: Manner
    at: float

    def document(self) -> Doc:
        return dataclasses.asdict(self)


#: Headers and body of a POST at a time (seconds since 1970): endpoint, message, time, manner.
Signer = Callable[[Endpoint, Message, float, Manner], tuple[dict[str, str], bytes]]


@dataclass(slots=True)
class Courier:
    """Delivers. ``again_seconds``: the pauses before each further attempt, by the simulator's clock; after the last
    it is over."""

    world: World
    sign: Signer
    other_body: Callable[[bytes], bytes]
    again_seconds: Sequence[float]
    timeout_seconds: float = 15.0
    faults: Faults = field(default_factory=Faults)
    endpoints: list[Endpoint] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    _queue: asyncio.Queue[tuple[Endpoint, Message, int, float]] = field(default_factory=asyncio.Queue)
    _held: list[tuple[Endpoint, Message]] = field(default_factory=list)
    _client: httpx.AsyncClient | None = None
    _worker: asyncio.Task[None] | None = None

    @property
    def clock(self) -> Clock:
        return self.world.clock

    @property
    def held(self) -> int:
        return len(self._held)

    def start(self) -> None:
        # Answers of a receiver are not followed anywhere, and a proxy of the environment is not asked.
        self._client = httpx.AsyncClient(timeout=self.timeout_seconds, trust_env=False)
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        if self._client is not None:
            await self._client.aclose()

    def send(self, message: Message) -> None:
        """Have it delivered to whoever wants it, or let it suffer what is planned."""
        for endpoint in self.endpoints:
            if not endpoint.wants(message.type) or self.faults.take("lose"):
                continue
            if self.faults.reorder:
                self._held.append((endpoint, message))
                if self.faults.reorder > 0 and len(self._held) >= self.faults.reorder:
                    self.flush()
                continue
            self._enqueue(endpoint, message)

    def flush(self) -> int:
        """Send what is held, last first; how many there were."""
        held, self._held = self._held[::-1], []
        for endpoint, message in held:
            self._enqueue(endpoint, message)
        return len(held)

    def _enqueue(self, endpoint: Endpoint, message: Message) -> None:
        for _ in range(1 + max(0, self.faults.duplicates)):
            self._queue.put_nowait((endpoint, message, 1, self.faults.delay))
        if self.faults.take("other_body"):
            forged = dataclasses.replace(message, body=self.other_body(message.body))
            self._queue.put_nowait((endpoint, forged, 1, self.faults.delay))

    async def settled(self) -> None:
        """Until everything that is queued was tried."""
        await self._queue.join()

    # -- later attempts ----------------------------------------------------------------------------------------------

    def next_again(self) -> tuple[float, Callable[[], None]] | None:
        """When the next further attempt is due, and what makes it."""
        waiting = self.world.all(_AGAIN)
        if not waiting:
            return None
        first = min(waiting, key=lambda doc: float(doc["at"]))
        return first["at"], lambda: self._again(first)

    def _again(self, doc: Doc) -> None:
        self.world.drop(_AGAIN, doc["id"])
        endpoint = next((found for found in self.endpoints if found.id == doc["endpoint"]), None)
        if endpoint is not None:
            message = Message(doc["event"], doc["type"], doc["body"].encode())
            self._queue.put_nowait((endpoint, message, doc["number"], 0.0))

    def _plan_again(self, endpoint: Endpoint, message: Message, number: int) -> None:
        if number > len(self.again_seconds):
            return
        ref = f"{endpoint.id}:{message.id}:{self.world.count('again')}"
        at = self.clock.exact + self.again_seconds[number - 1]
        again = {"id": ref, "endpoint": endpoint.id, "event": message.id, "type": message.type, "number": number + 1}
        self.world.put(_AGAIN, again | {"body": message.body.decode(), "at": at})

    # -- the wire ----------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            endpoint, message, number, delay = await self._queue.get()
            try:
                if delay:
                    await asyncio.sleep(delay)
                await self._post(endpoint, message, number)
            finally:
                self._queue.task_done()

    async def _post(self, endpoint: Endpoint, message: Message, number: int) -> None:
        assert self._client is not None
        manner: Manner = "right"
        if self.faults.take("tamper"):
            manner = "tampered"
        elif self.faults.take("wrong_signature"):
            manner = "wrong"
        headers, body = self.sign(endpoint, message, time.time() - self.faults.stale, manner)
        status: int | None = None
        with contextlib.suppress(httpx.HTTPError):
            status = (await self._client.post(endpoint.url, content=body, headers=headers)).status_code
        self.attempts.append(Attempt(message.id, message.type, endpoint.url, number, status, manner, self.clock.exact))
        del self.attempts[:-_KEPT_ATTEMPTS]
        if status is None or not 200 <= status < 300:
            self._plan_again(endpoint, message, number)
