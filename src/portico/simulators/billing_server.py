"""The part that is the same for every payment provider's simulator: its HTTP server, its clock, its faults, its ``/_sim/``.

    async with StripeSimulator(webhook_url="http://127.0.0.1:7000/v1/billing/webhooks/stripe") as stripe:
        stripe.url                                  # the base URL of its API
        await stripe.advance(31 * 86_400)           # renewals, retries and ends of checkouts happen, webhooks go out
        stripe.faults.lose = 1

The same over HTTP, for other processes (JSON in, JSON out):

    GET    /_sim/                       the clock, what it has, what was delivered
    POST   /_sim/clock                  {"advance": seconds} or {"to": unix seconds}
    POST   /_sim/faults                 names and values of :class:`Faults`; DELETE clears them
    GET    /_sim/deliveries             every attempt: event, type, status
    POST   /_sim/resend                 {"event": id, "times": 1}
    POST   /_sim/flush                  send what ``reorder`` holds
    POST   /_sim/pay                    {"checkout": ref, "card": "good" | "declines" | "fails_later"}
    POST   /_sim/cancel                 {"checkout": ref}: leave the page
    POST   /_sim/card                   {"subscription": ref, "card": …}: another card from now on
    POST   /_sim/dispute                {"payment": ref, "reason"?}; then {"dispute": ref, "outcome": "won" | "lost"}
    POST   /_sim/payout                 {}: pay out what was earned

It listens on a loopback address, and ``/_sim/`` takes JSON only, which a page of another origin cannot send without
being asked first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Literal, Self
from urllib.parse import parse_qsl

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from portico.simulators import billing_pages as pages
from portico.simulators.billing_delivery import Courier, Endpoint, Faults, Manner, Message
from portico.simulators.billing_world import DAY, OFFERS, Clock, Doc, Offer, World, iso, public, run_until

#: How a card behaves: charges succeed, are declined, or succeed once (at the checkout) and are declined afterwards.
Card = Literal["good", "declines", "fails_later"]
CARDS: Final[tuple[Card, ...]] = ("good", "declines", "fails_later")
_TICK_SECONDS: Final = 0.5
_BOARD_ROWS: Final = 30
_BOARD_DAYS: Final = 366
_START_SECONDS: Final = 30.0

log = logging.getLogger(__name__)
Handler = Callable[[Request], Awaitable[Response]]


class Refused(Exception):
    """A call that the provider refuses: the status and the body of its answer."""

    def __init__(self, status: int, body: Doc) -> None:
        super().__init__(str(body))
        self.status, self.body = status, body


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to whoever runs us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ProviderSimulator(ABC):
    """One provider. Enter it, or :meth:`start` and :meth:`stop`."""

    name: ClassVar[str]
    look: ClassVar[pages.Look]
    #: States of a dispute in which nothing is left to decide.
    decided: ClassVar[frozenset[str]] = frozenset({"won", "lost"})
    #: Pauses before a webhook is tried again.
    again_seconds: ClassVar[Sequence[float]]
    webhook_timeout: ClassVar[float] = 15.0

    def __init__(
        self,
        *,
        webhook_url: str = "",
        webhook_secret: str = "",
        offers: Sequence[Offer] = OFFERS,
        state: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        listener: socket.socket | None = None,
        public_url: str = "",
    ) -> None:
        self.world = World(state)
        self.offers = {offer.plan: offer for offer in offers}
        self.webhook_secret = self.world.kept("webhook_secret", webhook_secret, self.new_webhook_secret)
        self.faults = Faults()
        self.courier = Courier(
            self.world, self.sign, other_body, self.again_seconds, self.webhook_timeout, faults=self.faults
        )
        if webhook_url:
            self.courier.endpoints.append(self.endpoint(webhook_url))
        #: Whether events are stamped by the simulator's clock too; else by the machine's, since receivers refuse
        #: what comes from the
        #: future. Objects have the simulator's time either way.
        self.stamp_by_clock = False
        self._host, self._port, self._listener, self._public_url = host, port, listener, public_url
        self._server: _Server | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        #: Answers by idempotency key: the hash of what was asked, and what was answered.
        self._answers: dict[str, tuple[str, int, bytes, str]] = {}
        self.calls: list[tuple[str, str, int]] = []

    # -- what a provider is ------------------------------------------------------------------------------------------

    @abstractmethod
    def held(self) -> list[pages.Held]:
        """The subscriptions, for the board."""

    @abstractmethod
    def new_webhook_secret(self) -> str:
        """In the provider's form."""

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """The platform's settings that make it use this simulator; once it is started."""

    @abstractmethod
    def price(self, plan: str) -> str:
        """The provider's id of what one of the platform's plans costs."""

    @abstractmethod
    def routes(self) -> list[BaseRoute]:
        """The provider's API and its pages."""

    @abstractmethod
    def sign(self, endpoint: Endpoint, message: Message, at: float, manner: Manner) -> tuple[dict[str, str], bytes]:
        """Headers and body of a webhook."""

    @abstractmethod
    def endpoint(self, url: str) -> Endpoint:
        """The registration of a webhook URL."""

    @abstractmethod
    def next_due(self) -> tuple[float, Callable[[], None]] | None:
        """The next thing that happens by itself: when, and what."""

    @abstractmethod
    def pay(self, checkout: str, card: Card) -> Doc:
        """Somebody pays on the hosted page; what came of it: ``{"paid": bool, "url": where the browser goes}``."""

    @abstractmethod
    def leave(self, checkout: str) -> Doc:
        """Somebody leaves the hosted page: ``{"url": where the browser goes}``."""

    @abstractmethod
    def set_card(self, subscription: str, card: Card) -> None:
        """From now on the customer pays with another card."""

    @abstractmethod
    def dispute(self, payment: str, reason: str) -> Doc:
        """The bank takes a payment back, until it is decided."""

    def decide(self, dispute: str, won: bool) -> Doc:
        """The bank decides a dispute."""
        found = self._known("disputes", dispute)
        if found["status"] in self.decided:
            raise ValueError("it is decided")
        self.conclude(found, won)
        decided: Doc = public(found)
        return decided

    @abstractmethod
    def conclude(self, dispute: Doc, won: bool) -> None:
        """What becomes of the money of a dispute that is decided."""

    def _known(self, kind: str, ref: object) -> Doc:
        found = self.world.get(kind, ref)
        if found is None:
            raise KeyError(f"no such {kind[:-1]}: {ref}")
        return found

    @abstractmethod
    def payout(self) -> Doc | None:
        """What was earned is paid out; ``None`` when there is nothing."""

    @abstractmethod
    def message(self, event: str) -> Message | None:
        """An event that was made before, as it is sent."""

    @abstractmethod
    def problem(self, status: int, text: str) -> Doc:
        """A body of the provider's form for an error without a cause of its own."""

    def idempotency_key(self, request: Request) -> str:
        """The caller's key for doing this once; empty without one."""
        return request.headers.get("idempotency-key", "")

    # -- life --------------------------------------------------------------------------------------------------------

    @property
    def clock(self) -> Clock:
        return self.world.clock

    @property
    def stamp(self) -> int:
        """The time at which an event that is made now says it was made."""
        return self.clock.now if self.stamp_by_clock else int(time.time())

    @property
    def url(self) -> str:
        """Where its API is, without a slash at the end."""
        return self._public_url or f"http://{self._host}:{self._port}"

    async def start(self) -> Self:
        if self._listener is None:
            self._listener = socket.create_server((self._host, self._port))
        self._port = self._listener.getsockname()[1]
        self.prepare()
        config = uvicorn.Config(
            self._app(),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self.courier.start()
        self._tasks = [
            asyncio.create_task(self._server.serve(sockets=[self._listener])),
            asyncio.create_task(self._tick()),
        ]
        async with asyncio.timeout(_START_SECONDS):
            while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
        return self

    def prices(self) -> str:
        """Every plan with its price, as settings have them."""
        return ",".join(f"{plan}={self.price(plan)}" for plan in self.offers)

    @abstractmethod
    def prepare(self) -> None:
        """What has to be there before the first call; the port is known."""

    async def stop(self) -> None:
        serving, ticking = self._tasks
        ticking.cancel()
        assert self._server is not None
        self._server.should_exit = True
        await asyncio.gather(serving, ticking, return_exceptions=True)
        await self.courier.stop()
        self.world.save()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            try:
                self._happen(self.clock.exact)
                self.world.save()
            except Exception:  # the next look may find another state; without looks nothing would ever happen again
                log.exception("the simulator of %s could not go on", self.name)

    def _happen(self, until: float) -> int:
        return run_until(self.clock, until, self._due)

    def _due(self) -> tuple[float, Callable[[], None]] | None:
        found = [due for due in (self.next_due(), self.courier.next_again()) if due is not None]
        return min(found, key=lambda due: due[0]) if found else None

    async def advance(self, seconds: float) -> int:
        """Set the clock forward; returns when everything due happened and its webhooks were tried. How many things happened."""
        until = self.clock.exact + seconds
        happened = 0
        # Step by step: what a webhook leads to (a cancellation, say) comes before what is later.
        while (due := self._due()) is not None and due[0] <= until:
            happened += self._happen(due[0])
            self.clock.release(max(due[0], self.clock.exact))
            await self.courier.settled()
        self.clock.release(max(until, self.clock.exact))
        self.world.touch()
        return happened

    async def settled(self) -> None:
        """Until every webhook was tried that there is."""
        await self.courier.settled()

    def replace_secret(self, secret: str) -> None:
        """Sign with another secret from now on."""
        self.webhook_secret = self.world.kept("webhook_secret", secret, self.new_webhook_secret)
        self.courier.endpoints = [self.endpoint(found.url) for found in self.courier.endpoints]

    # -- HTTP --------------------------------------------------------------------------------------------------------

    def _app(self) -> Starlette:
        return Starlette(
            routes=[*self._sim_routes(), Route("/", self._board, methods=["GET", "POST"]), *self.routes()],
            exception_handlers={Refused: self._refused, 404: self._no_route, 405: self._no_route, 500: self._broken},
        )

    def api(self, path: str, handler: Handler, *methods: str) -> Route:
        """A route of the API: with the faults of the API, and once per idempotency key."""

        async def guarded(request: Request) -> Response:
            answer = await self._guarded(request, handler)
            self.calls.append((request.method, request.url.path, answer.status_code))
            if request.method != "GET":
                self.world.touch()
            return answer

        return Route(path, guarded, methods=list(methods))

    async def _guarded(self, request: Request, handler: Handler) -> Response:
        if self.faults.api_delay:
            await asyncio.sleep(self.faults.api_delay)
        if self.faults.api_count and self.faults.take("api_count"):
            status = self.faults.api_status
            return JSONResponse(self.problem(status, "asked for by /_sim/faults"), status_code=status)
        key = self.idempotency_key(request) if request.method in ("POST", "PATCH", "PUT", "DELETE") else ""
        asked = hashlib.sha256(f"{request.method} {request.url.path}\n".encode() + await request.body()).hexdigest()
        if key and (known := self._answers.get(key)) is not None:
            if known[0] != asked:
                raise self.key_reused(key)
            return Response(known[2], known[1], {"Idempotent-Replayed": "true"}, media_type=known[3])
        try:
            answer = await handler(request)
        except Refused as err:
            answer = JSONResponse(err.body, status_code=err.status)
        except (ValueError, KeyError) as err:
            answer = JSONResponse(self.problem(400, f"invalid request: {err}"), status_code=400)
        if key and answer.status_code < 300:
            self._answers[key] = (asked, answer.status_code, bytes(answer.body), "application/json")
        if request.method != "GET" and answer.status_code < 300 and self.faults.take("api_lost"):
            return JSONResponse(self.problem(500, "done, but you are not told"), status_code=500)
        return answer

    def key_reused(self, key: str) -> Refused:
        """The refusal of an idempotency key that came with another request before."""
        return Refused(400, self.problem(400, f"the idempotency key {key} was used with other parameters"))

    async def _refused(self, _: Request, err: Exception) -> Response:
        assert isinstance(err, Refused)
        return JSONResponse(err.body, status_code=err.status)

    async def _no_route(self, request: Request, _: Exception) -> Response:
        text = f"unrecognized request: {request.method} {request.url.path}"
        return JSONResponse(self.problem(404, text), status_code=404)

    async def _broken(self, request: Request, err: Exception) -> Response:
        return JSONResponse(self.problem(500, f"the simulator failed: {err!r}"), status_code=500)

    # -- the board -----------------------------------------------------------------------------------------------------

    async def _board(self, request: Request) -> Response:
        """What there is, for people; and what ``/_sim/`` can do that they want most."""
        if request.method == "POST":
            if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return pages.word(self.look, "Not from another page", "Open the board itself.", 403)
            form = dict(parse_qsl((await request.body()).decode()))
            act = form.get("act", "")
            if act.isdigit():
                await self.advance(min(int(act), _BOARD_DAYS) * DAY)
            elif act == "payout":
                self.payout()
            elif act in CARDS and form.get("ref"):
                with contextlib.suppress(KeyError):
                    self.set_card(form["ref"], card_of(act))
            self.world.touch()
            return RedirectResponse("/", 303)
        sent = [
            (row.type, str(row.number), "none" if row.status is None else str(row.status))
            for row in self.courier.attempts[:-_BOARD_ROWS:-1]
        ]
        return pages.board(self.look, iso(self.clock.now), self.held()[::-1][:_BOARD_ROWS], sent)

    # -- /_sim/ ------------------------------------------------------------------------------------------------------

    def _sim_routes(self) -> list[BaseRoute]:
        verbs = {
            "clock": self._sim_clock, "resend": self._sim_resend, "flush": self._sim_flush, "pay": self._sim_pay,
            "cancel": self._sim_cancel, "card": self._sim_card, "dispute": self._sim_dispute, "payout": self._sim_payout,
        }  # fmt: skip
        return [
            Route("/_sim/", self._sim_summary),
            Route("/_sim/deliveries", self._sim_deliveries),
            Route("/_sim/faults", self._sim_faults, methods=["GET", "POST", "DELETE"]),
            *(Route(f"/_sim/{verb}", self._sim(call), methods=["POST"]) for verb, call in verbs.items()),
        ]

    def _sim(self, call: Callable[[Doc], Awaitable[Doc]]) -> Handler:
        async def handler(request: Request) -> Response:
            try:
                return JSONResponse(await call(await _json(request)))
            except (KeyError, TypeError, ValueError) as err:
                return JSONResponse({"error": f"{type(err).__name__}: {err}"}, status_code=400)

        return handler

    async def _sim_summary(self, _: Request) -> Response:
        counts = {kind: len(docs) for kind, docs in self.world.kinds.items()}
        document = {"provider": self.name, "now": self.clock.now, "objects": counts, "held": self.courier.held}
        return JSONResponse(document | {"deliveries": len(self.courier.attempts)})

    async def _sim_deliveries(self, _: Request) -> Response:
        return JSONResponse({"data": [attempt.document() for attempt in self.courier.attempts]})

    async def _sim_faults(self, request: Request) -> Response:
        try:
            if request.method == "POST":
                self.faults.change(await _json(request))
        except ValueError as err:
            return JSONResponse({"error": str(err)}, status_code=400)
        if request.method == "DELETE":
            self.faults.change(_as_dict(Faults()))
            self.courier.flush()
        return JSONResponse(_as_dict(self.faults))

    async def _sim_clock(self, body: Doc) -> Doc:
        seconds = float(body["advance"]) if "advance" in body else float(body["to"]) - self.clock.exact
        if seconds < 0:
            raise ValueError("the clock goes forward only")
        return {"happened": await self.advance(seconds), "now": self.clock.now}

    async def _sim_resend(self, body: Doc) -> Doc:
        message = self.message(str(body["event"]))
        if message is None:
            raise KeyError(f"no event {body['event']}")
        for _ in range(int(body.get("times", 1))):
            self.courier.send(message)
        await self.settled()
        return {"sent": int(body.get("times", 1))}

    async def _sim_flush(self, _: Doc) -> Doc:
        sent = self.courier.flush()
        await self.settled()
        return {"sent": sent}

    async def _sim_pay(self, body: Doc) -> Doc:
        return self.pay(str(body["checkout"]), card_of(body.get("card", "good")))

    async def _sim_cancel(self, body: Doc) -> Doc:
        return self.leave(str(body["checkout"]))

    async def _sim_card(self, body: Doc) -> Doc:
        self.set_card(str(body["subscription"]), card_of(body["card"]))
        return {}

    async def _sim_dispute(self, body: Doc) -> Doc:
        if "dispute" in body:
            if body["outcome"] not in ("won", "lost"):
                raise ValueError("outcome is won or lost")
            return self.decide(str(body["dispute"]), body["outcome"] == "won")
        return self.dispute(str(body["payment"]), str(body.get("reason", "fraudulent")))

    async def _sim_payout(self, _: Doc) -> Doc:
        return self.payout() or {}


def card_of(value: object) -> Card:
    """The card of this name; raises ``ValueError``."""
    for card in CARDS:
        if card == value:
            return card
    raise ValueError(f"card is one of {', '.join(CARDS)}")


async def _json(request: Request) -> Doc:
    if "application/json" not in request.headers.get("content-type", ""):
        raise ValueError("content-type is application/json")
    found = json.loads(await request.body() or b"{}")
    if not isinstance(found, dict):
        raise ValueError("an object is expected")
    return found


def _as_dict(faults: Faults) -> Doc:
    import dataclasses

    return dataclasses.asdict(faults)


def other_body(body: bytes) -> bytes:
    """Another body of the same event: a number more, as a receiver that trusts ids alone would apply it."""
    document = json.loads(body)
    document["_changed"] = True
    return json.dumps(document, separators=(",", ":")).encode()
