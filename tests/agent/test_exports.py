"""curl commands, run by a real shell against the real target, and HTTP archives."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from portico.agent.target import Target
from portico.kit import curl
from portico.wire import frames as f
from tests.agent.harness import answering, target_server
from tests.agent.inspecting import inspected
from tests.agent.test_forward import OK, local, read_request
from tests.agent.test_replay import Seen, noting

SHELLS = [shell for shell in ("bash", "dash") if shutil.which(shell)]


async def run(shell: str, command: str) -> bytes:
    """What a shell prints of a command."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}
    process = await asyncio.create_subprocess_exec(
        shell, "-c", command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, (command, err)
    return out


def fields_of(head: bytes) -> tuple[bytes, list[bytes]]:
    """Request line, and the fields that matter: sorted, names in lower case, without the body's framing."""
    line, *fields = head.rstrip(b"\r\n").split(b"\r\n")
    pairs = [field.partition(b":") for field in fields]
    kept = [name.lower() + b":" + value.strip() for name, _, value in pairs]
    return line, sorted(field for field in kept if not field.startswith((b"content-length:", b"transfer-encoding:")))


REQUESTS: list[tuple[list[bytes], bytes]] = [
    ([b"GET", b"/"], b""),
    ([b"GET", b"/a'b;c&d=$HOME`id`!*?x=[1-3]{a,b}&y=\"z\"\\"], b""),
    ([b"GET", b"/a/../b/./c"], b""),
    ([b"GET", b"/frag#ment"], b""),
    ([b"DELETE", b"/x", b"X-Quote", b"it's \"quoted\" \\ $HOME `id` !!"], b""),
    ([b"POST", b"/", b"Content-Type", b"application/json"], '{"a": "it\'s ü\n\t€"}\n\n'.encode()),
    ([b"POST", b"/"], b"@/etc/passwd"),
    ([b"POST", b"/", b"Content-Type", b"application/octet-stream"], bytes(range(256)) * 3),
    ([b"PUT", b"/%00"], b"%d %s \\n ' \\0 %%\r\n"),
    ([b"POST", b"/"], b"\xff"),
    ([b"GET", b"/with-body"], b"body"),
    ([b"POST", b"/empty"], b""),
    ([b"QUERY", b"/", b"Accept", b"*/*", b"User-Agent", b"app/1", b"X-Empty", b"", b"X-A", b"1", b"X-A", b"2"], b""),
    ([b"GET", b"/", b"X-Latin", b"caf\xe9", b"X-Utf8", "grüße".encode(), b"X-Semi", b"a;b", b"Cookie", b"a=b; c=d"], b""),
    ([b"POST", b"/long", b"X-Dash", b"-d @file"], b"x" * 60_000),
]  # fmt: skip


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("number", range(len(REQUESTS)))
async def test_a_pasted_command_sends_the_same_request(shell: str, number: int) -> None:
    head, body = REQUESTS[number]
    seen: Seen = []
    async with target_server(noting(seen)) as port, inspected(local(port)) as tunnel:
        sent = [*head[:2], b"Host", b"web.test", *head[2:]]
        length = [b"Content-Length", b"%d" % len(body)] if body else []
        visit = tunnel.request([*sent, *length], end=not body)
        if body:
            await visit.send(body, end=True)
        await visit.over()
        entry = await tunnel.ended()
        command = (await tunnel.web.get(f"/api/requests/{entry.id}/curl")).text
        assert await run(shell, command) == b"ok"
        assert fields_of(seen[1][0]) == fields_of(seen[0][0])
        assert seen[1][1] == body


async def test_head_and_a_unix_socket(tmp_path: Path) -> None:
    seen: list[bytes] = []
    path = str(tmp_path / "it's a socket")
    server = await asyncio.start_unix_server(answering(OK.removesuffix(b"ok"), seen=seen), path)
    async with inspected(Target("unix", path=path)) as tunnel:
        await tunnel.get(b"/h", method=b"HEAD").over()
        entry = await tunnel.ended()
        await run("bash", (await tunnel.web.get(f"/api/requests/{entry.id}/curl")).text)
        assert [line.split(b"\r\n")[0] for line in seen] == [b"HEAD /h HTTP/1.1"] * 2
    server.close()


def test_the_public_address_gets_what_the_visitor_sent() -> None:
    head = [
        b"GET", b"/a", b"Host", b"web.test", b"X-Forwarded-For", b"1.2.3.4", b"X-Forwarded-Proto", b"https", b"X-Request-Id",
        b"1", b"Accept-Encoding", b"gzip", b"X-Own", b"1",
    ]  # fmt: skip
    command = curl.command(head, b"", "https://web.tunnel.test", public=True)
    assert "'https://web.tunnel.test/a'" in command or "https://web.tunnel.test/a" in command
    assert "Forwarded" not in command and "X-Request-Id" not in command and "Host" not in command
    assert "X-Own: 1" in command and "--compressed" in command and "--insecure" not in command
    assert "--insecure" in curl.command(head, b"", "https://localhost:8443")


async def archive(tunnel: Any, query: str = "") -> list[dict[str, Any]]:
    document = await tunnel.json(f"/api/har{query}")
    assert document["log"]["version"] == "1.2" and document["log"]["creator"]["name"] == "Portico"
    return document["log"]["entries"]  # type: ignore[no-any-return]


async def test_archives() -> None:
    answer = (
        b"HTTP/1.1 302 Found\r\nLocation: /n\r\nContent-Type: image/png\r\nSet-Cookie: s=secret\r\nContent-Length: 3\r\n\r\n"
        b"\x00\xff\x01"
    )
    async with target_server(answering(answer)) as port, inspected(local(port)) as tunnel:
        await tunnel.get(b"/first?a=1&b=%20", b"Authorization", b"Bearer secret", b"X-Forwarded-For", b"1.2.3.4").over()
        await tunnel.get(b"/second").over()
        await tunnel.ended()
        first, second = await archive(tunnel)
        assert first["request"]["url"] == "http://localhost/first?a=1&b=%20" and second["request"]["method"] == "GET"
        assert first["request"]["queryString"] == [{"name": "a", "value": "1"}, {"name": "b", "value": " "}]
        assert first["response"]["status"] == 302 and first["response"]["redirectURL"] == "/n"
        assert first["response"]["content"] == {
            "size": 3,
            "mimeType": "image/png",
            "text": "AP8B",
            "encoding": "base64",
        }
        assert first["_clientAddress"] == "1.2.3.4" and first["time"] >= first["timings"]["wait"] >= 0
        assert "secret" not in json.dumps(first) and first["request"]["headers"][1]["value"] == "(masked)"
        assert "secret" in json.dumps((await archive(tunnel, "?secrets=1"))[0])
        assert [e["request"]["url"][-7:] for e in await archive(tunnel, "?path=second")] == ["/second"]
        one = await tunnel.web.get(f"/api/requests/{tunnel.entry().id}/har")
        assert "attachment" in one.headers["content-disposition"] and len(one.json()["log"]["entries"]) == 1


async def test_an_archive_of_bad_ends_and_bodies() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)

    async with target_server(handler) as port, inspected(local(port)) as tunnel:
        visit = tunnel.request([b"POST", b"/", b"Host", b"h", b"Content-Length", b"4"], end=False)
        await visit.send(b"body", end=True)
        await visit.over()
        await tunnel.ended()
        upgrade = tunnel.request(
            [b"GET", b"/ws", b"Host", b"h", b"Upgrade", b"websocket"], flags=f.F_UPGRADE, end=False
        )
        await upgrade.over()
        failed = (await archive(tunnel))[0]
        assert failed["response"]["status"] == 502 and "without an answer" in failed["_error"]
        assert failed["request"]["postData"] == {"mimeType": "", "text": "body"}
