"""Calls to the control plane that the agent and the developer commands make."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlsplit

from portico.agent import proxy as proxies
from portico.agent.transport import Transport, trust
from portico.errors import Problem, catalogue
from portico.kit.dial import authority, bracketed, is_address, is_loopback
from portico.kit.lean import httpx
from portico.settings import AgentSettings, Secret

VERSION = "0.1.0"
#: Of one line of an answer that is read line by line.
MAX_LINE_BYTES = 1024 * 1024
#: What to do about a certificate that this machine does not trust.
UNTRUSTED = (
    "For a private CA give its certificate by PORTICO_CA_FILE or ca_file; else somebody on the way may pose as the API."
)


@dataclass(frozen=True, slots=True)
class Grant:
    """One tunnel of a session, and the JWT by which a relay binds it."""

    tunnel: str
    name: str
    url: str
    grant: str


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What ``POST /v1/agent/sessions`` answers. ``expires_at`` is wall time in seconds."""

    session: str
    token: str
    expires_at: float
    refresh_after: float
    edges: tuple[str, ...]
    account: str
    plan: str
    grants: tuple[Grant, ...]

    @classmethod
    def parse(cls, body: dict[str, Any]) -> SessionInfo:
        """From the response body; raises ``api.unexpected``."""
        try:
            account = body.get("account") or {}
            organization = (account.get("organization") or {}).get("name", "")
            return cls(
                session=str(body["session"]),
                token=str(body["token"]),
                expires_at=datetime.fromisoformat(body["expires_at"]).timestamp(),
                refresh_after=max(1.0, float(body["refresh_after"])),
                edges=tuple(str(url) for url in body["edges"]),
                account=account.get("user") or organization,
                plan=str(account.get("plan") or ""),
                grants=tuple(Grant(g["tunnel"], g["name"], g["url"], g["grant"]) for g in body["grants"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise Problem("api.unexpected", f"the API's answer lacks what an agent needs ({err!r})") from None


def problem_of(code: str, detail: str, hint: str | None = None) -> Problem:
    """A problem that came from another process: its own code where this version knows it."""
    if code in catalogue():
        return Problem(code, detail or None, hint=hint)
    return Problem("tunnel.refused", f"{detail or 'refused'} ({code})", hint=hint)


def server_url(text: str) -> str:
    """An API address as typed: scheme added, trailing slash and /v1 dropped; raises ``config.invalid``."""
    url = text.strip().rstrip("/").removesuffix("/v1")
    if "://" not in text:
        url = bracketed(url) if is_address(url) else url
        host = url.partition("]")[0] if url.startswith("[") else url.partition(":")[0]
        url = f"http://{url}" if is_loopback(host) else f"https://{url}"
    try:
        parts = urlsplit(url)
        valid = (
            parts.scheme in ("http", "https")
            and _is_place(parts.netloc, parts.hostname or "", parts.port)
            and url.isprintable()
            and " " not in url
        )
    except ValueError:
        valid = False
    if not valid:
        raise Problem(
            "config.invalid", f"{text!r} is not the address of an API", hint="Write it as https://host[:port]."
        )
    return url


def _is_place(netloc: str, host: str, port: int | None) -> bool:
    """Whether ``netloc`` is a host with or without a port and nothing else, such as credentials or a half bracket."""
    written = bracketed(host) if port is None else authority(host, port)
    return bool(host) and (":" not in host or is_address(host)) and port != 0 and netloc.lower() == written


class Api:
    """A client for one API and one key. Close it with :meth:`aclose`."""

    def __init__(self, server: str, key: Secret | None, settings: AgentSettings) -> None:
        self.server = server
        headers = {"User-Agent": f"portico/{VERSION}"}
        if key:
            headers["Authorization"] = f"Bearer {key.reveal()}"
        parts = urlsplit(server)
        verify: ssl.SSLContext | bool = False  # no context is built for plain http, which saves 30 ms
        if parts.scheme == "https":
            verify = trust(settings)
        #: The proxy on the way, if there is one.
        self.proxy = proxies.choose(settings, server)
        self._http = httpx.AsyncClient(
            base_url=server + "/v1/",
            headers=headers,
            timeout=settings.api_timeout_seconds,
            transport=Transport(self.proxy, verify, settings.proxy_timeout_seconds),
            trust_env=False,  # which proxy is used is decided above, for relays and API alike
            follow_redirects=False,
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """One call; raises the API's problem, ``api.unreachable``, ``api.unexpected`` or a ``proxy.…``."""
        response = await self._ask(method, path, body, timeout)
        if response.is_success:
            return self._document(response)
        raise self._refusal(response)

    async def content(self, path: str) -> bytes:
        """The bytes that a GET answers with, whatever they are; raises as :meth:`call` does."""
        response = await self._ask("GET", path)
        if response.is_success:
            return bytes(response.content)
        raise self._refusal(response)

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float | None = None
    ) -> httpx.Response:
        limit = httpx.USE_CLIENT_DEFAULT if timeout is None else httpx.Timeout(timeout)
        try:
            return await self._http.request(method, path, json=body, timeout=limit)
        except httpx.TimeoutException:
            raise Problem("api.unreachable", f"the API at {self.server} did not answer in time") from None
        except httpx.HTTPError as err:
            detail = f"the API at {self.server} cannot be reached ({_reason(err)})"
            raise Problem("api.unreachable", detail, hint=UNTRUSTED if _untrusted(err) else None) from None

    async def lines(self, path: str) -> AsyncIterator[bytes]:
        """The answer of a GET line by line, whatever its length; raises as :meth:`call` does."""
        try:
            async with self._http.stream("GET", path) as response:
                if not response.is_success:
                    await response.aread()
                    raise self._refusal(response)
                rest = b""
                async for chunk in response.aiter_bytes():
                    *whole, rest = (rest + chunk).split(b"\n")
                    for line in whole:
                        yield line
                    if len(rest) > MAX_LINE_BYTES:
                        raise Problem("api.unexpected", f"{self.server} sent a line that does not end")
                if rest:
                    yield rest
        except httpx.HTTPError as err:
            raise Problem("api.unreachable", f"the API at {self.server} broke off ({_reason(err)})") from None

    def _document(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code == 204 or not response.content:
            return {}
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise Problem("api.unexpected", f"{self.server} did not answer as a Portico API does")
        return body

    def _refusal(self, response: httpx.Response) -> Problem:
        try:
            body = response.json()
        except ValueError:
            body = {}
        code = body.get("code") if isinstance(body, dict) else None
        if isinstance(code, str) and code in catalogue():
            found = Problem(code, str(body.get("detail") or ""), hint=str(body.get("hint") or "") or None)
            if isinstance(body.get("errors"), list):
                found.extra["errors"] = body["errors"]
            return found
        if response.status_code in (502, 503, 504):
            return Problem("api.unreachable", f"the API at {self.server} answered {response.status_code}")
        what = f"{code}: {body.get('detail')}" if code else f"status {response.status_code}"
        return Problem("api.unexpected", f"{self.server} answered {what}")

    # ── agent sessions ────────────────────────────────────────────────────────────────────────────────────────────
    async def open_session(self, body: dict[str, Any], timeout: float | None = None) -> SessionInfo:
        """Start the agent's session, or take it up again."""
        return SessionInfo.parse(await self.call("POST", "agent/sessions", body, timeout))

    async def refresh_session(self, session: str, agent_id: str, timeout: float | None = None) -> SessionInfo:
        """New token and grants for a live session."""
        path = f"agent/sessions/{quote(session, safe='')}/refresh"
        return SessionInfo.parse(await self.call("POST", path, {"agent_id": agent_id}, timeout))

    async def add_tunnel(self, session: str, spec: dict[str, Any]) -> Grant:
        """One more tunnel in a live session, or a change of one that it has (by name)."""
        answer = await self.call("POST", f"agent/sessions/{quote(session, safe='')}/tunnels", spec)
        try:
            (grant,) = answer["grants"]
            return Grant(grant["tunnel"], grant["name"], grant["url"], grant["grant"])
        except (KeyError, TypeError, ValueError) as err:
            raise Problem("api.unexpected", f"the API's answer lacks what an agent needs ({err!r})") from None

    async def remove_tunnel(self, session: str, tunnel_id: str) -> None:
        """Take a tunnel out of a live session; the tunnel itself stays."""
        await self.call("DELETE", f"agent/sessions/{quote(session, safe='')}/tunnels/{quote(tunnel_id, safe='')}")

    async def close_session(self, session: str, timeout: float) -> None:
        """End a session."""
        await self.call("DELETE", f"agent/sessions/{quote(session, safe='')}", timeout=timeout)

    # ── tunnels ───────────────────────────────────────────────────────────────────────────────────────────────────
    async def tunnels(self) -> list[dict[str, Any]]:
        """Every tunnel of the organization."""
        rows: list[dict[str, Any]] = []
        cursor = ""
        while True:
            page = await self.call("GET", f"tunnels?limit=100{'&cursor=' + quote(cursor, safe='') if cursor else ''}")
            rows += page.get("data", [])
            cursor = page.get("next_cursor") or ""
            if not cursor:
                return rows

    async def find_tunnel(self, name: str) -> dict[str, Any]:
        """The tunnel of this name or id; raises ``tunnel.not_found``."""
        for row in await self.tunnels():
            if name in (row.get("name"), row.get("id")):
                return row
        raise Problem("tunnel.not_found", f"there is no tunnel {name!r}")


def _untrusted(err: BaseException | None) -> bool:
    """Whether a certificate was the reason."""
    while err is not None and not isinstance(err, ssl.SSLCertVerificationError):
        err = err.__cause__ or err.__context__
    return err is not None


def _reason(err: Exception) -> str:
    text = str(err) or type(err).__name__
    return text[:1].lower() + text[1:]
