"""`portico diagnose`: the way from this machine to the platform, hop by hop, in the order in which an agent takes it.

    versions · settings · sign-in │ proxy │ API: name, connection, certificate, answer, clock, whoami
                                  │       │ each relay: name, connection, certificate, session with a ping │ local app

A hop that fails ends its chain: what lies behind it would only fail again. Nothing stays: the session that is opened to learn
the relays is ended at once and names no tunnel.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from portico.agent import probe
from portico.agent import proxy as proxies
from portico.agent.api import VERSION, Api, SessionInfo
from portico.agent.credentials import DEFAULT_SERVER, Credentials
from portico.agent.link import Link
from portico.agent.proxy import Proxy
from portico.agent.target import Target, dial, tls_context, why_unreachable
from portico.agent.transport import Transport, trust
from portico.errors import Problem
from portico.kit.dial import authority, is_address, reason, resolve
from portico.kit.findings import Finding, clock
from portico.kit.ids import check_token, display_prefix
from portico.kit.lean import httpx
from portico.settings import AgentSettings

#: Days before its end in which a certificate is worth a look.
CERTIFICATE_WARN_DAYS = 14
#: Characters of the longest name of a check.
WIDTH = 20

_FIXES = {
    "name": "Use a name that is in the certificate, or have one made for this name.",
    "time": "Renew the certificate there; if it is new, set this machine's clock.",
    "trust": "With a private CA, name its certificate: ca_file in portico.toml, or PORTICO_CA_FILE. A proxy may have opened it.",
    "other": "The certificate has to be mended at the server.",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """What is looked at. ``sources``: where settings that are not defaults came from; ``signed_in``: or why not."""

    settings: AgentSettings
    sources: Mapping[str, str]
    server: str
    signed_in: Credentials | Problem
    target: Target | None = None


class _Silent:
    """The owner of a link that serves nothing."""

    def link_bound(self, *_: Any) -> None: ...
    def link_refused(self, *_: Any) -> None: ...
    def link_unbound(self, *_: Any) -> None: ...
    def link_counts(self, *_: Any) -> None: ...
    def link_goaway(self, *_: Any) -> None: ...
    def link_lost(self, *_: Any) -> None: ...


class _Reading(asyncio.StreamReaderProtocol):
    """A connection whose answer is read as a stream."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader()
        super().__init__(self.reader)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport = transport  # type: ignore[assignment]


class Diagnosis:
    """One run over a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.settings = case.settings
        self._until = time.monotonic() + case.settings.diagnose_seconds
        self._session: SessionInfo | None = None
        self._failed = False

    # ── order and deadlines ───────────────────────────────────────────────────────────────────────────────────────
    async def run(self) -> AsyncIterator[Finding]:
        """Every finding, as it is made. Never raises."""
        local = None
        if self.case.target is not None:
            local = asyncio.create_task(Diagnosis(self.case)._guarded("Local app", self._target(self.case.target)))
        yield Finding("Version", "OK", f"portico {VERSION}")
        yield self._configuration()
        yield self._credentials()
        async for finding in self._platform():
            yield finding
        if local is not None:
            yield await local

    async def _platform(self) -> AsyncIterator[Finding]:
        try:
            proxy = proxies.choose(self.settings, self.case.server)
        except Problem as problem:
            yield _failure("Proxy", problem)
            return
        yield (found := await self._guarded("Proxy", self._proxy(proxy)))
        if found.level == "FAIL":
            return
        async for found in self._hops("API", urlsplit(self.case.server), proxy):
            yield found
        if self._failed:
            return
        answers = await self._several("API", self._api(proxy))
        for found in answers:
            yield found
        if isinstance(self.case.signed_in, Problem) or any(found.level == "FAIL" for found in answers):
            return
        yield (found := await self._guarded("Sign-in", self._whoami(self.case.signed_in)))
        if found.level == "FAIL":
            return
        async for found in self._relays(self.case.signed_in):
            yield found

    def _limit(self) -> float:
        """Seconds for the next step: its own limit, or what is left of the whole."""
        return max(0.05, min(self.settings.diagnose_step_seconds, self._until - time.monotonic()))

    async def _guarded(self, check: str, work: Coroutine[Any, Any, Finding]) -> Finding:
        return (await self._several(check, _one(work)))[0]

    async def _several(self, check: str, work: Coroutine[Any, Any, list[Finding]]) -> list[Finding]:
        """What ``work`` finds; its failure, of whatever kind, is a finding too."""
        limit = self._limit()
        try:
            async with asyncio.timeout(limit):
                found = await work
        except Problem as problem:
            found = [_failure(check, problem)]
        except TimeoutError:
            found = [Finding(check, "FAIL", f"no answer within {limit:.1f} s", _late(check))]
        except OSError as err:
            found = [Finding(check, "FAIL", reason(err))]
        except Exception as err:  # what a stranger's answer can do is not foreseeable
            found = [Finding(check, "FAIL", f"{type(err).__name__}: {' '.join(str(err).split())[:200]}")]
        self._failed = any(finding.level == "FAIL" for finding in found)
        return found

    # ── this machine ──────────────────────────────────────────────────────────────────────────────────────────────
    def _configuration(self) -> Finding:
        """Which settings are not as they come, and where each was said; secrets stay masked."""
        said = [
            f"{key}={self._shown(key)} ({source})" for key, source in self.case.sources.items() if key != "config_dir"
        ]
        folder = self.settings.config_dir
        return Finding("Configuration", "OK", f"{folder}: {', '.join(said) if said else 'all defaults'}")

    def _shown(self, key: str) -> str:
        value = getattr(self.settings, key)
        if key == "proxy_url" and value:
            text = value.reveal().strip()
            return text if text.lower() in proxies.OFF else _masked(text)
        return str(value)

    def _credentials(self) -> Finding:
        found = self.case.signed_in
        if isinstance(found, Problem):
            return _failure("Credentials", found)
        whose = f", {found.account}" if found.account else ""
        return Finding("Credentials", "OK", f"key {_key(found.agent_key.reveal())} for {found.server}{whose}")

    async def _target(self, target: Target) -> Finding:
        """Whether the local app takes a connection, and what it answers to GET /."""
        if target.kind == "file":
            return Finding("Local app", "OK", f"{target.path} is a folder")
        limit, began = self._limit(), time.monotonic()
        fix = "Start the app, or correct the address."
        try:
            app = await dial(target, _Reading, tls_context(target, None), limit * 0.8)
        except OSError as err:
            return Finding("Local app", "FAIL", why_unreachable(target, err, limit * 0.8), fix)
        try:
            return await self._ask_target(target, app, time.monotonic() - began)
        finally:
            app.transport.abort()

    async def _ask_target(self, target: Target, app: _Reading, took: float) -> Finding:
        app.transport.write(
            f"GET / HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: portico-diagnose\r\nConnection: close\r\n\r\n".encode()
        )
        try:
            async with asyncio.timeout(self._limit() * 0.8):
                line = (await app.reader.readline()).decode("latin-1").strip()[:80]
        except (TimeoutError, ValueError):
            line = ""
        if line.startswith("HTTP/"):
            return Finding(
                "Local app", "OK", f"{target.url} answers {line.partition(' ')[2]} (connected in {_ms(took)})"
            )
        says = f"speaks no HTTP ({line!r})" if line else "accepts connections and answers nothing to GET /"
        return Finding(
            "Local app",
            "WARN",
            f"{target.place} {says}",
            "`portico http` needs an HTTP server there; `portico tcp` takes anything.",
        )

    # ── the way to a host ─────────────────────────────────────────────────────────────────────────────────────────
    async def _proxy(self, proxy: Proxy | None) -> Finding:
        if proxy is None:
            return Finding("Proxy", "OK", "none")
        began = time.monotonic()
        (await proxies.reach(proxy, self._limit())).close()
        return Finding("Proxy", "OK", f"{proxy} ({proxy.source}), reached in {_ms(time.monotonic() - began)}")

    async def _hops(self, whose: str, url: SplitResult, proxy: Proxy | None) -> AsyncIterator[Finding]:
        """Name, connection and certificate of one host; ends after the first that fails."""
        host, secure = url.hostname or "", url.scheme in ("https", "wss")
        port = url.port or (443 if secure else 80)
        if proxy is None and not is_address(host):
            yield await self._guarded(f"{whose} name", _name(whose, host, port))
            if self._failed:
                return
        through = self._through(whose, proxy, host, port) if proxy else self._direct(whose, host, port)
        yield await self._guarded(f"{whose} connection", through)
        if self._failed or not secure:
            return
        yield await self._guarded(f"{whose} certificate", self._certificate(whose, proxy, host, port))

    async def _direct(self, whose: str, host: str, port: int) -> Finding:
        attempts = await probe.each_address(await resolve(host, port), self._limit() * 0.9)
        good = [attempt for attempt in attempts if not attempt.problem]
        says = ", ".join(f"{a.place} {a.problem or 'in ' + _ms(a.seconds)}" for a in attempts)
        place = f"port {port}: {says}"
        check = f"{whose} connection"
        if not good:
            return Finding(check, "FAIL", place, f"Is it running there, and does a firewall let port {port} out?")
        if len(good) < len(attempts) and host != "localhost" and not host.endswith(".localhost"):
            return Finding(
                check, "WARN", place, "Agents pass the dead address by; mend it, or take it out of the name."
            )
        return Finding(check, "OK", place)

    async def _through(self, whose: str, proxy: Proxy, host: str, port: int) -> Finding:
        began = time.monotonic()
        (await proxies.connect(proxy, host, port, self._limit() * 0.9)).close()
        return Finding(
            f"{whose} connection", "OK", f"{authority(host, port)} through the proxy in {_ms(time.monotonic() - began)}"
        )

    async def _open(self, proxy: Proxy | None, host: str, port: int) -> socket.socket:
        from portico.kit.dial import connect_tcp

        return await (proxies.connect(proxy, host, port, self._limit()) if proxy else connect_tcp(host, port))

    async def _certificate(self, whose: str, proxy: Proxy | None, host: str, port: int) -> Finding:
        check = f"{whose} certificate"
        try:
            found = await probe.certificate(await self._open(proxy, host, port), host, trust(self.settings))
            if isinstance(found, ssl.SSLCertVerificationError):
                found = await probe.refused(await self._open(proxy, host, port), host, found)
        except ssl.SSLError as err:
            return Finding(
                check, "FAIL", f"no TLS on port {port} ({err.reason or err})", "Is it a plain port (http://, ws://)?"
            )
        if found.fault:
            return Finding(check, "FAIL", found.fault, _FIXES[found.kind])
        by = " (ca_file)" if self.settings.ca_file else ""
        says = f"for {host}, by {found.issuer}{by}, {found.days_left:.0f} days left"
        if found.days_left < CERTIFICATE_WARN_DAYS:
            return Finding(check, "WARN", says, "It ends soon: see that it is renewed.")
        return Finding(check, "OK", says)

    # ── the API ───────────────────────────────────────────────────────────────────────────────────────────────────
    async def _api(self, proxy: Proxy | None) -> list[Finding]:
        server, limit = self.case.server, self._limit() * 0.9
        verify = trust(self.settings) if server.startswith("https:") else False
        through = Transport(proxy, verify, limit)
        async with httpx.AsyncClient(base_url=server, transport=through, timeout=limit, trust_env=False) as client:
            began = time.time()
            try:
                answer = await client.get("/readyz")
            except httpx.HTTPError as err:
                why = "it did not answer in time" if isinstance(err, httpx.TimeoutException) else str(err)
                return [Finding("API", "FAIL", f"{server}: {why}", "Is a Portico API at this address?")]
            middle = (began + time.time()) / 2
            if answer.status_code != 200:
                return [_not_ready(server, answer)]
            version = await _version(client)
        return [_api_finding(server, version), clock(answer.headers, middle)]

    async def _whoami(self, credentials: Credentials) -> Finding:
        api = Api(self.case.server, credentials.agent_key, self.settings)
        try:
            who = await api.call("GET", "whoami", timeout=self._limit() * 0.9)
        finally:
            await api.aclose()
        names = [(who.get("user") or {}).get("email"), (who.get("organization") or {}).get("name")]
        return Finding("Sign-in", "OK", "the key is accepted: " + " · ".join(str(name) for name in names if name))

    # ── relays ────────────────────────────────────────────────────────────────────────────────────────────────────
    async def _relays(self, credentials: Credentials) -> AsyncIterator[Finding]:
        api = Api(self.case.server, credentials.agent_key, self.settings)
        try:
            yield (found := await self._guarded("Relays", self._assignment(api)))
            if found.level == "FAIL":
                return
            assert self._session is not None
            chains = [self._relay(number, url) for number, url in enumerate(self._session.edges, 1)]
            for chain in await asyncio.gather(*chains):
                for found in chain:
                    yield found
        finally:
            await self._end_session(api)
            await api.aclose()

    async def _assignment(self, api: Api) -> Finding:
        body: dict[str, Any] = {
            "agent_id": "diagnose-" + secrets.token_hex(8),
            "hostname": socket.gethostname()[:200] or "unknown",
            "version": VERSION,
            "region": self.settings.region or None,
            "tunnels": [],
        }
        self._session = await api.open_session(body, self._limit() * 0.9)
        edges = self._session.edges
        if not edges:
            return Finding("Relays", "FAIL", "the platform names no relay", "Start one: portico relay")
        return Finding("Relays", "OK", f"{len(edges)} assigned: {', '.join(urlsplit(url).netloc for url in edges)}")

    async def _end_session(self, api: Api) -> None:
        if self._session is not None:
            try:
                await api.close_session(self._session.session, self.settings.goodbye_timeout_seconds)
            except Problem:
                pass  # it ends by itself when its token does

    async def _relay(self, number: int, url: str) -> list[Finding]:
        """One relay's chain, on a diagnosis of its own so that relays fail apart from each other."""
        apart = Diagnosis(self.case)
        apart._until, apart._session = self._until, self._session
        return [finding async for finding in apart._relay_hops(f"Relay {number}", url)]

    async def _relay_hops(self, whose: str, url: str) -> AsyncIterator[Finding]:
        async for finding in self._hops(whose, urlsplit(url), proxies.choose(self.settings, url)):
            yield finding
        if not self._failed:
            yield await self._guarded(f"{whose} session", self._greet(whose, url))

    async def _greet(self, whose: str, url: str) -> Finding:
        """WebSocket, HELLO and one ping, exactly as an agent does it."""
        assert self._session is not None
        limit, began = self._limit(), time.monotonic()
        link = Link(_Silent(), dataclasses.replace(self.settings, connect_timeout_seconds=limit * 0.9), url, 1)
        try:
            await link.open(self._session.token)
            took = time.monotonic() - began
            while link.carrier.rtt is None:  # bounded by the step; a pong sets no event
                if link.lost:
                    return Finding(f"{whose} session", "FAIL", "the connection ended before a ping was answered")
                await asyncio.sleep(0.005)
            says = f"{link.relay} ({link.region}) in {_ms(took)}, ping {_ms(link.carrier.rtt)}"
            return Finding(f"{whose} session", "OK", says)
        finally:
            link.close("diagnosed")


async def _one(work: Coroutine[Any, Any, Finding]) -> list[Finding]:
    return [await work]


async def _name(whose: str, host: str, port: int) -> Finding:
    check = f"{whose} name"
    try:
        addresses = await resolve(host, port)
    except socket.gaierror as err:
        return Finding(check, "FAIL", f"{host}: {reason(err)}", "Check the spelling, the name server, and any VPN.")
    places = [str(address[4][0]) for address in addresses]
    six = sum(":" in place for place in places)
    return Finding(check, "OK", f"{host}: {', '.join(places)} ({len(places) - six} × IPv4, {six} × IPv6)")


def _failure(check: str, problem: Problem) -> Finding:
    return Finding(check, "FAIL", f"{problem.detail} ({problem.code})", problem.hint)


def _late(check: str) -> str:
    if check.endswith(" name"):
        return "The name server does not answer: check the network and any VPN."
    if check.endswith(" certificate"):
        return "It takes connections and speaks no TLS: is it a plain port (http://, ws://)?"
    return "Something on the way drops packets: a firewall?"


def _key(text: str) -> str:
    """The part of a key that lists show; nothing of what is no key."""
    return f"{display_prefix(text)}…" if check_token(text) else "(not a whole key)"


def _masked(text: str) -> str:
    try:
        return str(proxies.parse(text))
    except Problem:
        return "***"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _not_ready(server: str, answer: httpx.Response) -> Finding:
    try:
        detail = str(json.loads(answer.content)["detail"])[:200]
    except (ValueError, KeyError, TypeError):
        detail = "not as a Portico API does"
    return Finding(
        "API",
        "FAIL",
        f"{server} answers {answer.status_code}: {detail}",
        "Check the address (--server); on the server: portico doctor",
    )


async def _version(client: httpx.AsyncClient) -> str:
    try:
        answer = await client.get("/openapi.json")
        return str(answer.json()["info"]["version"])[:40]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return ""


def _api_finding(server: str, version: str) -> Finding:
    """Ready, and whether its version goes with ours: below 1.0 a minor version may break things."""
    if not version:
        return Finding("API", "WARN", f"{server} is ready, but says no version", "Is it a Portico API?")
    ours, theirs = VERSION.split(".")[:2], version.split(".")[:2]
    if ours == theirs:
        return Finding("API", "OK", f"{server} is ready, version {version}")
    older = "agent" if _order(ours) < _order(theirs) else "platform"
    fix = "pip install --upgrade portico" if older == "agent" else "Ask its operator to upgrade the platform."
    return Finding("API", "WARN", f"{server} is ready, version {version}: the {older} is older", fix)


def _order(parts: list[str]) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in parts]


def server_of(settings: AgentSettings, stored: Credentials | None) -> str:
    """The API that is looked at when nobody is signed in; raises ``config.invalid``."""
    from portico.agent.api import server_url

    return server_url(settings.server or (stored.server if stored is not None else DEFAULT_SERVER))
