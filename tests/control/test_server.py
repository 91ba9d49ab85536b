"""The API as a process: readiness, an end that is bounded, and a start without a database."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from portico.kit.sealing import new_master_key
from tests.authority import Authority
from tests.timing import PATIENCE_SECONDS

PROGRAM = """
import sys
from portico import settings
from portico.control import bootstrap, server
from portico.kit import loop, telemetry
telemetry.configure("api", "INFO")
chosen = settings.load(settings.ApiSettings)
if "first" in sys.argv:
    import json
    print(json.dumps(bootstrap.document(loop.run(bootstrap.ensure_first(chosen, relays=["relay-1"])))), flush=True)
import socket, os
loop.run(server.serve(chosen, socket.socket(fileno=int(os.environ["FD"]))))
"""


class Api:
    """A child process that serves the API on an inherited socket."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, first: dict[str, Any]) -> None:
        self.process, self.port, self.first = process, port, first
        self.url = f"http://127.0.0.1:{port}"

    async def ready(self, status: int = 200, path: str = "/readyz") -> None:
        async with httpx.AsyncClient(base_url=self.url) as client:
            for _ in range(1600):
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(path)).status_code == status:
                        return
                await asyncio.sleep(0.025)
        raise AssertionError(f"{path} never answered {status}")

    async def stop(self) -> float:
        """Seconds from SIGTERM to the end."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(self.process.wait(), 2 * PATIENCE_SECONDS)
        return time.monotonic() - start


@contextlib.asynccontextmanager
async def api(database_url: str, *arguments: str, **settings: object) -> AsyncIterator[Api]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    listener.set_inheritable(True)
    env = os.environ | {
        "PORTICO_DATABASE_URL": database_url,
        "PORTICO_MASTER_KEY": MASTER_KEY,
        "PORTICO_SHUTDOWN_SECONDS": "3",
        "FD": str(listener.fileno()),
    }
    env |= {f"PORTICO_{name.upper()}": str(value) for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        *arguments,
        env=env,
        pass_fds=(listener.fileno(),),
        stdout=asyncio.subprocess.PIPE,
    )
    port = listener.getsockname()[1]
    listener.close()
    assert process.stdout is not None
    try:
        first = json.loads(await process.stdout.readline()) if "first" in arguments else {}
        yield Api(process, port, first)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


MASTER_KEY = new_master_key()
#: A patience at the end that nobody needs: what would wait for its limit, waits too long for every test.
UNHURRIED = {"shutdown_seconds": 600}


async def test_serves_and_ends_cleanly(database_url: str) -> None:
    async with api(database_url, "first", **UNHURRIED) as running:
        await running.ready()
        async with httpx.AsyncClient(base_url=running.url) as client:
            answer = await client.get("/healthz")
            assert "server" not in answer.headers
            me = await client.get("/v1/whoami", headers={"Authorization": f"Bearer {running.first['agent_key']}"})
            assert me.status_code == 200
            assert await running.stop() < PATIENCE_SECONDS
        assert running.process.returncode == 0


async def test_an_open_event_stream_does_not_hold_up_the_end(database_url: str) -> None:
    async with api(database_url, "first", **UNHURRIED) as running:
        await running.ready()
        headers = {"Authorization": f"Bearer {running.first['relay_keys']['relay-1']}"}
        async with (
            httpx.AsyncClient(base_url=running.url, timeout=20) as client,
            client.stream("GET", "/v1/edge/stream", headers=headers) as stream,
        ):
            lines = stream.aiter_lines()
            assert json.loads(await anext(lines))["type"] == "snapshot"
            ended = asyncio.create_task(running.stop())
            async for _ in lines:
                pass
            assert await ended < PATIENCE_SECONDS
        assert running.process.returncode == 0


async def test_a_half_sent_request_is_answered_at_the_end(database_url: str, capfd: pytest.CaptureFixture[str]) -> None:
    async with api(database_url, "first") as running:
        await running.ready()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"POST /v1/auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.1)
        assert await running.stop() < PATIENCE_SECONDS
        _problem(await reader.read(), 503, "service.unavailable")
        writer.close()
    assert "Traceback" not in capfd.readouterr().err


async def test_a_client_that_leaves_in_its_body_is_no_fault(
    database_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else anybody could fill the log with tracebacks."""
    async with api(database_url, "first") as running:
        await running.ready()
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"POST /v1/auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
        await asyncio.sleep(0.1)
        await running.stop()
    assert "Traceback" not in capfd.readouterr().err


async def test_starts_without_a_database_and_is_not_ready() -> None:
    async with api("postgresql://nobody@127.0.0.1:1/none", **UNHURRIED) as running:
        await running.ready(200, "/healthz")
        await running.ready(503, "/readyz")
        assert await running.stop() < PATIENCE_SECONDS


def _problem(answer: bytes, status: int, code: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == str(status).encode(), head
    head = head.lower()
    assert b"content-type: application/problem+json" in head
    document = json.loads(body)
    assert document["code"] == code
    assert f"x-request-id: {document['request_id']}".encode() in head


async def _ask(running: Api, sent: bytes, limit: float = 30.0) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    with contextlib.suppress(ConnectionError):
        writer.write(sent)
        await writer.drain()
    answer = b""
    with contextlib.suppress(ConnectionError):
        answer = await asyncio.wait_for(reader.read(), limit)
    writer.close()
    return answer


async def test_what_never_reaches_the_application_is_answered_in_its_words(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORTICO_REQUEST_HEAD_TIMEOUT_SECONDS", "0.5")
    monkeypatch.setenv("PORTICO_MAX_CONCURRENCY", "4")
    async with api(database_url) as running:
        await running.ready(200, "/healthz")
        begin = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
        assert b" 200 " in await _ask(running, begin + b"X: " + b"a" * 30_000 + b"\r\nConnection: close\r\n\r\n")
        for broken in (b"BREW / HTTP/1.1\r\n\r\n", begin + b"Content-Length: -1\r\n\r\n", begin + b"X: a\0b\r\n\r\n"):
            _problem(await _ask(running, broken), 400, "request.malformed")
        for large in (b"X: " + b"a" * 33_000, b"\r\n".join(b"X: " + b"a" * 100 for _ in range(400))):
            _problem(await _ask(running, begin + large + b"\r\n\r\n"), 431, "request.head_too_large")
        _problem(await _ask(running, begin + b"X: a"), 408, "request.timeout")
        assert await _ask(running, b"") == b""  # one that says nothing is closed, too
        others = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(4)]
        await asyncio.sleep(0.1)
        _problem(await _ask(running, begin + b"\r\n"), 503, "service.unavailable")
        for _, writer in others:
            writer.close()


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /healthz HTTP/1.1\r\nX: ",
        b"POST /v1/auth/login HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: ",
        b"POST /v1/auth/login HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;",
    ],
)
async def test_a_head_without_end_does_not_fill_the_memory(database_url: str, begin: bytes) -> None:
    async with api(database_url) as running:
        await running.ready(200, "/healthz")
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        sent = 0
        with contextlib.suppress(ConnectionError):
            writer.write(begin)
            while sent < 32 * 1024 * 1024 and not reader.at_eof():
                writer.write(b"a" * 65536)
                await writer.drain()
                sent += 65536
        writer.close()
        assert sent < 16 * 1024 * 1024


@pytest.mark.parametrize(
    "request_head", [b"\x16\x03\x01\x02", b"GET / HTTP/9\r\n\r\n", b"GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n"]
)
async def test_noise_on_the_socket_hurts_nobody(database_url: str, request_head: bytes) -> None:
    async with api(database_url) as running:
        await running.ready(200, "/healthz")
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(request_head + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            answer = await asyncio.wait_for(reader.read(4096), 2)
            assert b" 500 " not in answer.split(b"\r\n")[0]
        writer.close()
        await running.ready(200, "/healthz")


async def test_https_with_a_certificate_that_is_renewed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is read again on SIGHUP, which ends no connection; a handshake that does not end is cut."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("api", "127.0.0.1")
    files = {"api_tls_cert_file": cert, "api_tls_key_file": key, "request_head_timeout_seconds": 1}
    async with api("postgresql://nobody@127.0.0.1:1/none", **files) as running:
        async with httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{running.port}", verify=authority.client(), timeout=30
        ) as client:
            for _ in range(1200):
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/healthz")).status_code == 200:
                        break
                await asyncio.sleep(0.025)
            first = ssl.get_server_certificate(("127.0.0.1", running.port))
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            assert await asyncio.wait_for(reader.read(), 30) == b"", "a visitor who never speaks"
            writer.close()
            cert.write_text("broken")
            running.process.send_signal(signal.SIGHUP)
            said = ""
            async with asyncio.timeout(PATIENCE_SECONDS):
                while "the certificate stays as it was" not in (said := said + capfd.readouterr().err):
                    await asyncio.sleep(0.02)
            assert ssl.get_server_certificate(("127.0.0.1", running.port)) == first
            authority.issue("api", "127.0.0.1")
            running.process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while ssl.get_server_certificate(("127.0.0.1", running.port)) == first:
                    await asyncio.sleep(0.02)
            assert (await client.get("/healthz")).status_code == 200
    assert "Traceback" not in said + capfd.readouterr().err
