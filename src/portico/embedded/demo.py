"""`portico demo`: the whole platform on free ports, a sample app, a tunnel to it, and one real request, shown."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from portico.embedded.platform import Platform
from portico.embedded.sample_app import SampleApp
from portico.embedded.summary import key_text
from portico.embedded.units import ProcessUnit
from portico.errors import Problem
from portico.kit.paint import Paint

#: Patience for a machine that has much else to do: nothing here is waited for when it is not under way.
REQUEST_TIMEOUT_SECONDS = 30.0
API_TIMEOUT_SECONDS = 30
ANSWER_MAX_BYTES = 256 * 1024
TUNNEL = "hello"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a visitor got."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


async def fetch(host: str, port: int, authority: str, path: str) -> Answer:
    """GET as a visitor would. By address with a Host header: ``*.localhost`` resolves in browsers, not in libc."""
    began = time.perf_counter()
    async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            request = (
                f"GET {path} HTTP/1.1\r\nHost: {authority}\r\nAccept: application/json\r\nConnection: close\r\n\r\n"
            )
            writer.write(request.encode())
            head, _, body = (await _read_all(reader)).partition(b"\r\n\r\n")
        finally:
            writer.close()
    first, *lines = head.decode("latin-1").split("\r\n")
    if len(first.split()) < 2:
        raise ValueError("the connection ended without an answer")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = _unchunk(body)
    return Answer(int(first.split()[1]), headers, body, time.perf_counter() - began)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    data = b""
    while chunk := await reader.read(65536):
        data += chunk
        if len(data) > ANSWER_MAX_BYTES:
            raise ValueError("the answer is longer than the sample app's")
    return data


def _unchunk(body: bytes) -> bytes:
    out = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        if length == 0:
            break
        out, body = out + body[:length], body[length + 2 :]
    return out


class Demo:
    """The body of a demo run on a started platform."""

    def __init__(self, paint: Paint, say: Callable[[str], None]) -> None:
        self._paint, self._say = paint, say
        self._app = SampleApp()
        self._online: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __call__(self, platform: Platform) -> bool:
        """App, agent, request; True when the answer is the app's own."""
        await self._app.start()
        await platform.supervisor.start(_AgentUnit(self._agent(platform), self._online))
        return await self.request(platform)

    def url(self, platform: Platform, scheme: str = "http") -> str:
        """The tunnel's public URL, as the agent was told it."""
        given = urlsplit(self._online.result())
        return given.geturl() if scheme == "http" else f"https://{given.hostname}:{platform.relay(1).https}"

    def _agent(self, platform: Platform) -> ProcessUnit:
        env = platform.environment(
            server=platform.api_url,
            agent_key=platform.credentials["agent_key"],
            config_dir=str(platform.home / "agent"),
            api_timeout_seconds=API_TIMEOUT_SECONDS,
            connect_timeout_seconds=API_TIMEOUT_SECONDS,
        )
        return ProcessUnit(
            "agent",
            ["http", str(self._app.port), "--name", TUNNEL, "--json"],
            env,
            stdout=lambda: platform.logs.pipe("agent", self._heard),
        )

    def _heard(self, line: str) -> None:
        """The agent's events, one JSON object a line; the first "online" has the URL."""
        try:
            event = json.loads(line)
        except ValueError:
            return
        if isinstance(event, dict) and event.get("event") == "online" and not self._online.done():
            self._online.set_result(str(event["url"]))

    async def request(self, platform: Platform) -> bool:
        """One request with a number that only its answer can know, and the way it took."""
        nonce = secrets.token_hex(8)
        path = f"/api/hello?nonce={nonce}"
        before = self._app.requests
        try:
            answer = await fetch(platform.host, platform.relay(1).http, urlsplit(self.url(platform)).netloc, path)
        except (OSError, TimeoutError, ValueError) as err:
            raise Problem("up.demo_failed", f"the request through the tunnel failed: {err!r}") from None
        seen = _seen(answer)
        good = answer.status == 200 and seen.get("nonce") == nonce and self._app.requests == before + 1
        self._show(platform, path, answer, seen, good)
        return good

    def _show(self, platform: Platform, path: str, answer: Answer, seen: dict[str, object], good: bool) -> None:
        p, say = self._paint, self._say
        request = seen.get("request")
        headers = request.get("headers", {}) if isinstance(request, dict) else {}
        main = platform.relay(1)
        mark = p.good("✓") if good else p.bad("✗")
        stem = p.dim("     │")
        steps = [
            ("visitor", f"GET {self.url(platform)}{path}"),
            (
                "relay",
                f"{platform.host}:{main.http} finds tunnel “{TUNNEL}”, request {headers.get('x-request-id', '?')}",
            ),
            ("agent", "gets it as frames on the one connection that it opened itself: no port is open here"),
            ("app", f"127.0.0.1:{self._app.port} receives it for {headers.get('host', '?')}"),
            ("app", f"answers “{seen.get('message', 'nothing')}”"),
            ("visitor", f"{mark} {answer.status}, {len(answer.body)} bytes, {answer.seconds * 1000:.1f} ms"),
        ]
        say("")
        say(p.bold("  One request through the tunnel"))
        say("")
        for number, (who, what) in enumerate(steps):
            if number and who != steps[number - 1][0]:
                say(stem)
            say(f"  {p.bold(f'{who:<8}')} {what}")
        say("")
        if not good:
            code = answer.headers.get("portico-error", "no code")
            say(p.bad(f"  The answer is not the app's: {answer.status} ({code}) {answer.body[:200]!r}"))

    def goodbye(self, platform: Platform, show_key: bool) -> None:
        """What a person can do while the demo stays."""
        p, say = self._paint, self._say
        say(f"  {p.bold('Open it')}        {p.link(self.url(platform))}")
        say(
            f"                 {p.link(self.url(platform, 'https'))} {p.dim('(your browser does not know its CA yet)')}"
        )
        say(f"  {p.bold('With curl')}      curl {self.url(platform)}/api/hello")
        say(f"  {p.bold('API, console')}   {p.link(platform.api_url)}")
        say(f"  {p.bold('Credentials')}    {platform.home}/credentials.json")
        say("")
        say(f"  {p.bold('Your own app')}   in another terminal:")
        say(f"                 export PORTICO_SERVER={platform.api_url}")
        say(f"                 export PORTICO_AGENT_KEY={key_text(platform, show_key)}")
        say("                 portico http 3000")
        say("")
        say(p.dim("  Ctrl-C ends the demo."))
        say("")

    async def close(self) -> None:
        await self._app.stop()


class _AgentUnit:
    """The agent: ready once it said that its tunnel is online."""

    def __init__(self, unit: ProcessUnit, online: asyncio.Future[str]) -> None:
        self.name, self.signals, self.launch = unit.name, unit.signals, unit.launch
        self.ended, self.release = unit.ended, unit.release
        self._online = online

    async def ready(self) -> bool:
        return self._online.done()


def _seen(answer: Answer) -> dict[str, object]:
    try:
        found = json.loads(answer.body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
