"""The agent's local page, ``http://127.0.0.1:4040``, and its API.

GET    /                                     the page        GET  /requests/{id}   one request, without JavaScript
GET    /api/tunnels, /api/status             what runs
GET    /api/requests?limit&before&tunnel&method&status&path   newest first
GET    /api/requests/{id}                    everything about one
GET    /api/requests/{id}/body/{request|response}             its bytes (`?as=image` for an <img>)
GET    /api/requests/{id}/curl?to=local|public                a command line that sends it
GET    /api/requests/{id}/har, /api/har      HTTP archive of one, of all (`?secrets=1` with credentials)
GET    /api/events                           server-sent events (portico.agent.live)
POST   /api/requests/{id}/replay             to the local target, as it was or edited
DELETE /api/requests                         forget them

What only an open page needs is imported when it asks: an agent starts no later for having one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from time import perf_counter
from typing import Any

from portico.agent import views
from portico.agent.api import VERSION
from portico.agent.client import Agent
from portico.agent.link import Serves
from portico.agent.live import Live
from portico.agent.recorder import Entry, Recorder
from portico.agent.stats import Stats
from portico.agent.tunnel import Tunnel
from portico.agent.web import Answer, Guard, Request, WebServer
from portico.errors import Problem
from portico.kit.sockets import bind_tcp, port_of
from portico.settings import AgentSettings

#: Values of web_addr that switch the page off.
OFF = frozenset(("", "false", "off", "no", "none"))
#: Entries between two pauses of a long search or export: visitors' requests are served on the same loop.
PAUSE_EVERY = 500
LIST_DEFAULT = 100


def listening_address(settings: AgentSettings) -> tuple[str, int] | None:
    """``web_addr`` as an address and a port, ``None`` when it is off; raises ``config.invalid``."""
    value = settings.web_addr.strip()
    if value.lower() in OFF:
        return None
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    host = "127.0.0.1" if host.lower() == "localhost" else host
    if not (port.isascii() and port.isdecimal() and 0 <= int(port[:6]) <= 65535):
        raise _bad_address(f"{value!r} is not HOST:PORT, a port or false")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise _bad_address(f"{host!r} is not an IP address or localhost") from None
    if not address.is_loopback and not settings.web_allow_remote:
        raise _bad_address(f"{host} is not of this machine alone, and the page shows every request with its secrets")
    return host, int(port[:6])


def _bad_address(why: str) -> Problem:
    return Problem(
        "config.invalid",
        f"web_addr: {why}",
        hint="Use 127.0.0.1:4040, another loopback address, or false; web_allow_remote allows the others.",
        key="web_addr",
    )


def bind(host: str, port: int, tries: int) -> socket.socket | None:
    """A listening socket on ``port`` or the first free one above it; ``None`` when ``tries`` of them are taken."""
    for candidate in range(port, min(port + max(1, tries), 65536)) if port else (0,):
        try:
            return bind_tcp(host, candidate, what="local page")
        except Problem as problem:
            if problem.code not in ("up.port_taken", "up.port_denied"):
                raise
    return None


class Inspector:
    """See the module. ``agent`` and the tunnels' taps are attached before :meth:`start`."""

    def __init__(self, settings: AgentSettings, stats: Stats) -> None:
        self.settings = settings
        self.stats = stats
        self.recorder = Recorder(settings, secrets.token_hex(3))
        self.agent: Agent | None = None
        self.url = ""
        self._started = time.time()
        self._replays = 0
        self._live = Live(settings, self.recorder, self.status)
        self._server: WebServer | None = None
        self._clock: asyncio.Task[None] | None = None
        self._routes: dict[tuple[str, ...], Callable[[Request, str], Awaitable[Answer]]] = {
            (): self._page,
            ("requests", "*"): self._plain_page,
            ("static", "*"): self._static,
            ("api", "tunnels"): self._tunnels,
            ("api", "status"): self._status,
            ("api", "events"): self._events,
            ("api", "har"): self._har_of_all,
            ("api", "requests"): self._list,
            ("api", "requests", "*"): self._detail,
            ("api", "requests", "*", "curl"): self._curl,
            ("api", "requests", "*", "har"): self._har,
            ("api", "requests", "*", "body", "request"): self._request_body,
            ("api", "requests", "*", "body", "response"): self._response_body,
            ("api", "requests", "*", "replay"): self._replay,
        }

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────
    async def start(self) -> bool:
        """Listen, as the settings say; ``False`` when no port was free. Raises ``config.invalid``."""
        address = listening_address(self.settings)
        if address is None:
            return False
        host, port = address
        sock = bind(host, port, self.settings.web_ports_tried)
        if sock is None:
            return False
        port = port_of(sock)
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        guard = Guard(host, port, self.settings.web_allow_hosts)
        self._server = WebServer(self.settings, sock, guard, self._answer)
        await self._server.start()
        self._clock = asyncio.create_task(self._watch_clock())
        return True

    async def close(self) -> None:
        """Stop serving."""
        if self._clock is not None:
            self._clock.cancel()
            await asyncio.gather(self._clock, return_exceptions=True)
        await self._live.close()
        if self._server is not None:
            await self._server.stop()

    async def _watch_clock(self) -> None:
        while True:
            await asyncio.sleep(5)
            self.recorder.note_clock()

    # ── routing ───────────────────────────────────────────────────────────────────────────────────────────────────
    async def _answer(self, request: Request) -> Answer:
        parts = tuple(part for part in request.path.split("/") if part)
        place = 2 if parts[:1] == ("api",) else 1
        ident = parts[place] if len(parts) > place else ""
        key = (*parts[:place], *(("*",) if ident else ()), *parts[place + 1 :])
        handler = self._routes.get(key)
        if handler is None:
            raise Problem("inspect.not_found", f"there is nothing at {request.path[:200]}")
        allowed = self._methods(key)
        if request.method not in allowed:
            raise Problem("request.method_not_allowed", headers={"Allow": ", ".join(allowed)})
        self._name_taps()
        return await handler(request, ident)

    @staticmethod
    def _methods(key: tuple[str, ...]) -> tuple[str, ...]:
        if key[-1:] == ("replay",):
            return ("POST",)
        return ("GET", "HEAD", "DELETE") if key == ("api", "requests") else ("GET", "HEAD")

    def _all_tunnels(self) -> list[Tunnel]:
        return list(self.agent.tunnels) if self.agent is not None else []

    def _name_taps(self) -> None:
        """Tunnels get their names from the platform, some time after they began."""
        for tunnel in self._all_tunnels():
            tap = getattr(tunnel.serves, "tap", None)
            if tap is not None and tunnel.name:
                tap.name = tunnel.name

    def _find(self, ident: str) -> Entry:
        run, _, number = ident.rpartition("-")
        entry = self.recorder.find(int(number)) if run == self.recorder.run and number[:15].isdecimal() else None
        if entry is None:
            raise Problem("inspect.not_found", f"no request {ident[:40]!r} is kept")
        return entry

    # ── what runs ─────────────────────────────────────────────────────────────────────────────────────────────────
    async def _tunnels(self, request: Request, ident: str) -> Answer:
        return _json({"tunnels": [self._tunnel(tunnel) for tunnel in self._all_tunnels()], "uri": "/api/tunnels"})

    def _tunnel(self, tunnel: Tunnel) -> dict[str, Any]:
        scheme, _, _ = tunnel.url.partition(":")
        return {
            "name": tunnel.name,
            "ID": tunnel.grant.tunnel if tunnel.grant is not None else "",
            "uri": f"/api/tunnels/{tunnel.name}",
            "public_url": tunnel.url,
            "proto": scheme or str(tunnel.spec.get("protocol", "http")),
            "config": {"addr": tunnel.target, "inspect": getattr(tunnel.serves, "tap", None) is not None},
            "state": tunnel.state,
            "edge": dataclasses.asdict(tunnel.edge),
        }

    async def _status(self, request: Request, ident: str) -> Answer:
        return _json(self.status())

    def status(self) -> dict[str, Any]:
        """The document of ``/api/status``."""
        agent, stats, recorder = self.agent, self.stats, self.recorder
        info = agent.info if agent is not None else None
        link = agent.link if agent is not None else None
        up = link is not None and not link.lost
        rtt = link.carrier.rtt if link is not None and up else None
        return {
            "status": agent.state if agent is not None else "connecting",
            "version": VERSION,
            "agent_version": VERSION,
            "uri": "/api/status",
            "started_at": views.stamp(self._started),
            "session": {
                "id": info.session if info is not None else "",
                "account": info.account if info is not None else "",
                "plan": info.plan if info is not None else "",
                "relay": link.relay if link is not None and up else "",
                "region": (link.region or "default") if link is not None and up else "",
                "rtt_ms": round(rtt * 1000, 1) if rtt is not None else None,
            },
            "tunnels": [self._tunnel(tunnel) for tunnel in self._all_tunnels()],
            "recorder": {
                "requests": len(recorder.entries),
                "bytes": recorder.bytes,
                "max_bytes": recorder.limit,
                "body_max_bytes": recorder.body_limit,
                "evicted": recorder.evicted,
            },
            "metrics": {"http": metrics(stats)},
        }

    async def _events(self, request: Request, ident: str) -> Answer:
        return Answer(200, "text/event-stream", b"" if request.method == "HEAD" else self._live.listen())

    # ── the list ──────────────────────────────────────────────────────────────────────────────────────────────────
    async def _list(self, request: Request, ident: str) -> Answer:
        if request.method == "DELETE":
            self.recorder.clear()
            return Answer(204, "application/json", b"")
        limit = self._limit(request.query)
        rows, more = await self._select(request.query, limit)
        now = perf_counter()
        return _json(
            {
                "requests": [views.summary(entry, now) for entry in rows],
                "next_before": rows[-1].id if more and rows else None,
                "uri": "/api/requests",
            }
        )

    def _limit(self, query: dict[str, str]) -> int:
        value = query.get("limit", str(LIST_DEFAULT))
        if not value[:10].isdecimal() or not 1 <= int(value[:10]) <= self.settings.web_list_max:
            raise Problem("inspect.query_invalid", f"limit must be 1 to {self.settings.web_list_max}")
        return int(value[:10])

    async def _select(self, query: dict[str, str], limit: int) -> tuple[list[Entry], bool]:
        """Up to ``limit`` entries that the filters let through, and whether there are more."""
        before = None
        if query.get("before"):
            run, _, number = query["before"].rpartition("-")
            if run != self.recorder.run or not number[:15].isdecimal():
                raise Problem("inspect.query_invalid", "before must be the id of a request of this list")
            before = int(number[:15])
        wanted = selection(query)
        rows: list[Entry] = []
        async for entry in _unhurried(self.recorder.newest(before)):
            if wanted(entry):
                if len(rows) == limit:
                    return rows, True
                rows.append(entry)
        return rows, False

    # ── one request ───────────────────────────────────────────────────────────────────────────────────────────────
    def _document(self, entry: Entry) -> dict[str, Any]:
        document = views.detail(entry, perf_counter(), self.settings.web_decoded_max_bytes)
        origin = self.recorder.find(entry.more.replay_of) if entry.more.replay_of else None
        if origin is not None:
            document["original"] = views.summary(origin, perf_counter())
        return document

    async def _detail(self, request: Request, ident: str) -> Answer:
        return _json(self._document(self._find(ident)))

    async def _request_body(self, request: Request, ident: str) -> Answer:
        entry = self._find(ident)
        return _download(request, f"{ident}-request", views.pairs(entry.head()[2:]), entry.more.request_body)

    async def _response_body(self, request: Request, ident: str) -> Answer:
        entry = self._find(ident)
        return _download(request, f"{ident}-response", views.pairs(entry.answer_head()[1:]), entry.response_body)

    async def _replay(self, request: Request, ident: str) -> Answer:
        from portico.agent.replay import parse_edit, replay

        entry = self._find(ident)
        edit = parse_edit(request.body)
        serves = self._serves(entry)
        if self._replays >= self.settings.replays_max:
            raise Problem("inspect.busy", f"{self._replays} replays are running")
        self._replays += 1
        try:
            made = await replay(entry, edit, serves, self.settings)
        finally:
            self._replays -= 1
        return _json(self._document(made), 201)

    def _tunnel_of(self, entry: Entry) -> Tunnel | None:
        """The tunnel of a request; one that was changed meanwhile is still the same by its name."""
        live = [tunnel for tunnel in self._all_tunnels() if not tunnel.over]
        same = (tunnel for tunnel in live if tunnel.serves is entry.tap.serves)
        named = (tunnel for tunnel in live if tunnel.name and tunnel.name == entry.tap.name)
        return next(same, None) or next(named, None)

    def _serves(self, entry: Entry) -> Serves:
        """Where a replay goes; raises ``inspect.tunnel_gone``."""
        if self.agent is None:
            return entry.tap.serves  # type: ignore[no-any-return]
        tunnel = self._tunnel_of(entry)
        if tunnel is None or getattr(tunnel.serves, "tap", None) is None:
            raise Problem("inspect.tunnel_gone")
        return tunnel.serves

    # ── exports ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _public_url(self, entry: Entry) -> str:
        tunnel = self._tunnel_of(entry)
        return tunnel.url if tunnel is not None else ""

    async def _curl(self, request: Request, ident: str) -> Answer:
        from portico.kit import curl

        entry = self._find(ident)
        if not entry.complete:
            raise Problem("inspect.body_incomplete")
        public = request.query.get("to") == "public"
        target = self._public_url(entry) if public else entry.tap.target
        if not target:
            raise Problem("inspect.tunnel_gone")
        command = curl.command(entry.head(), bytes(entry.more.request_body or b""), target, public=public)
        return Answer(200, "text/plain; charset=utf-8", command.encode("utf-8", "surrogateescape"))

    async def _har(self, request: Request, ident: str) -> Answer:
        entry = self._find(ident)
        name = f"portico-{ident}.har"
        return _attachment(self._archive([entry], request), name)

    async def _har_of_all(self, request: Request, ident: str) -> Answer:
        wanted = selection(request.query)
        entries = [entry async for entry in _unhurried(self.recorder.newest()) if wanted(entry)]
        return _attachment(self._archive(entries[::-1], request), "portico.har")

    async def _archive(self, entries: list[Entry], request: Request) -> AsyncIterator[bytes]:
        from portico.kit import har

        masked = request.query.get("secrets") != "1"
        yield har.opening(VERSION)
        for at, entry in enumerate(entries):
            base = self._public_url(entry) or "http://localhost"
            document = har.entry(self._document(entry), base, masked)
            yield (b"," if at else b"") + json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
            await asyncio.sleep(0)
        yield har.CLOSING

    # ── pages ─────────────────────────────────────────────────────────────────────────────────────────────────────
    async def _page(self, request: Request, ident: str) -> Answer:
        from portico.agent import pages

        rows, _ = await self._select(request.query, LIST_DEFAULT)
        now = perf_counter()
        return _html(pages.index(self.status(), [views.summary(entry, now) for entry in rows]))

    async def _plain_page(self, request: Request, ident: str) -> Answer:
        from portico.agent import pages

        return _html(pages.plain(self.status(), self._document(self._find(ident))))

    async def _static(self, request: Request, ident: str) -> Answer:
        from portico.agent import pages

        found = pages.static(ident)
        if found is None:
            raise Problem("inspect.not_found", f"there is nothing at {request.path[:200]}")
        return Answer(200, found[0], found[1], {"Cache-Control": "no-cache"})


def selection(query: dict[str, str]) -> Callable[[Entry], bool]:
    """The filters of a query as one test; raises ``inspect.query_invalid``."""
    unknown = set(query) - {"limit", "before", "tunnel", "method", "status", "path", "secrets"}
    if unknown:
        raise Problem("inspect.query_invalid", f"there is no parameter {sorted(unknown)[0][:40]!r}")
    tunnel, method = query.get("tunnel", ""), query.get("method", "").upper()
    path, status = query.get("path", "").lower().encode("utf-8", "replace"), query.get("status", "").lower()
    low, high = _span(status)

    def wanted(entry: Entry) -> bool:
        if tunnel and entry.tap.name != tunnel:
            return False
        if status == "running":
            if entry.ended:
                return False
        elif status and not low <= entry.status <= high and not (status == "error" and entry.more.failure):
            return False
        if not (method or path):
            return True
        verb, target = entry.line()
        return (not method or verb.decode("latin-1").upper() == method) and path in target.lower()

    return wanted


def _span(status: str) -> tuple[int, int]:
    """``404``, ``4xx``, ``error`` (4xx, 5xx or failed) or ``running`` as a range of status codes."""
    if status in ("", "error", "running"):
        return (400 if status == "error" else 0), 999
    if len(status) == 3 and status[0] in "12345" and status[1:] == "xx":
        return int(status[0]) * 100, int(status[0]) * 100 + 99
    if len(status) == 3 and status.isascii() and status.isdecimal():
        return int(status), int(status)
    raise Problem("inspect.query_invalid", "status must be like 404, 4xx, error or running")


async def _unhurried(entries: Iterator[Entry]) -> AsyncIterator[Entry]:
    """``entries``, letting others run now and then."""
    for at, entry in enumerate(entries, 1):
        yield entry
        if at % PAUSE_EVERY == 0:
            await asyncio.sleep(0)


def metrics(stats: Stats) -> dict[str, Any]:
    """Counts and rates (requests a second), percentiles in milliseconds."""
    stats.sample()
    return {
        "count": stats.total,
        "gauge": stats.open,
        "rate1": round(stats.rate_1, 4),
        "rate5": round(stats.rate_5, 4),
        **{f"p{n}": round(stats.percentile(n / 100) * 1000, 3) for n in (50, 90, 95, 99)},
    }


def _json(document: Any, status: int = 200) -> Answer:
    return Answer(status, "application/json", json.dumps(document, separators=(",", ":")).encode())


def _html(text: str) -> Answer:
    return Answer(200, "text/html; charset=utf-8", text.encode("utf-8", "replace"))


def _attachment(body: AsyncIterator[bytes], name: str) -> Answer:
    disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Answer(200, "application/json", body, disposition)


def _download(request: Request, name: str, fields: views.Pairs, kept: bytes | bytearray | None) -> Answer:
    """The kept bytes of a body. Only an <img> gets a type that a browser would show; nothing in it can run."""
    kind, disposition = "application/octet-stream", f'attachment; filename="{name}.bin"'
    media = views.value_of(fields, "content-type").partition(";")[0].strip().lower()
    if request.query.get("as") == "image" and media in views.IMAGES:
        kind, disposition = media, "inline"
    headers = {"Content-Disposition": disposition, "Content-Security-Policy": "sandbox; default-src 'none'"}
    return Answer(200, kind, bytes(kept or b""), headers)
