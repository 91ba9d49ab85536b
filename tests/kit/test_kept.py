"""Requests over kept connections, against servers with bad habits: one connection for many, and nothing without a bound."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from portico.kit import kept
from tests.authority import Authority

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Talk = Callable[["Server", int, bytes, asyncio.StreamWriter], Awaitable[bool]]


@dataclass
class Server:
    """Answers as its ``talk`` does: (server, number of the connection, head, writer) → whether the connection goes on."""

    talk: Talk
    url: str = ""
    heads: list[bytes] = field(default_factory=list)
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                if b"content-length: " in head.lower():
                    await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                if not await self.talk(self, number, head, writer):
                    break
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def serving(talk: Talk, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    made = Server(talk)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=tls)
    made.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()


@pytest.fixture
async def client() -> AsyncIterator[kept.Client]:
    made = kept.Client(ssl.create_default_context(), kept.Limits(30.0, 1000))
    yield made
    await made.close()


def saying(*answers: bytes, stays: bool = True) -> Talk:
    """These answers, one a request, the last for good."""
    left = list(answers)

    async def talk(server: Server, number: int, head: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(left.pop(0) if len(left) > 1 else left[0])
        return stays

    return talk


async def test_many_requests_go_over_one_connection(client: kept.Client) -> None:
    async with serving(saying(OK)) as server:
        for _ in range(20):
            assert (await client.request("GET", f"{server.url}/x?y=1")).body == b"ok"
        answer = await client.request("POST", f"{server.url}/post", b"body", {"Content-Type": "text/plain"})
        assert (answer.status, answer.body) == (200, b"ok")
    assert server.connections == 1 and len(server.heads) == 21
    host = server.url.removeprefix("http://").encode()
    assert server.heads[0].startswith(b"GET /x?y=1 HTTP/1.1\r\nHost: " + host + b"\r\n")
    assert b"Content-Length: 4" in server.heads[-1] and b"Content-Type: text/plain" in server.heads[-1]


async def test_requests_at_once_have_a_connection_each_and_few_stay(client: kept.Client) -> None:
    everybody = asyncio.Event()

    async def talk(server: Server, number: int, head: bytes, writer: asyncio.StreamWriter) -> bool:
        if len(server.heads) == 20:
            everybody.set()
        await everybody.wait()
        writer.write(OK)
        return True

    async with serving(talk) as server:
        answers = await asyncio.gather(*(client.request("GET", server.url) for _ in range(20)))
        assert [answer.body for answer in answers] == [b"ok"] * 20 and server.connections == 20
        assert len(client._idle) == kept.IDLE


async def test_a_connection_that_was_closed_meanwhile_costs_another_one(client: kept.Client) -> None:
    """Told nothing, the server may not even have got it: what may be repeated is, and what may not is not."""

    async def talk(server: Server, number: int, head: bytes, writer: asyncio.StreamWriter) -> bool:
        if len(server.heads) % 2:  # the first of each connection is answered, the second never is
            writer.write(OK)
            return True
        return False

    async with serving(talk) as server:
        assert (await client.request("GET", server.url)).body == b"ok"
        assert (await client.request("GET", server.url)).body == b"ok"
        assert (server.connections, len(server.heads)) == (2, 3)
        with pytest.raises(kept.Broken, match="before a whole answer"):
            await client.request("POST", server.url, b"x")
        assert len(server.heads) == 4


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n", b"ok"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n", b""),
    ],
)  # fmt: skip
async def test_every_framing_leaves_the_connection_for_the_next(
    client: kept.Client, answer: bytes, body: bytes
) -> None:
    async with serving(saying(answer, OK)) as server:
        first = await client.request("GET", server.url)
        assert (first.body, first.status) == (body, int(answer.split(b"HTTP/1.1 ")[-1][:3]))
        assert (await client.request("GET", server.url)).body == b"ok"
    assert (server.connections, len(server.heads)) == (1, 2)


async def test_the_answer_to_head_has_no_body_whatever_it_says(client: kept.Client) -> None:
    headed = b"HTTP/1.1 200 OK\r\nReplay-Nonce: abc\r\nContent-Length: 500\r\n\r\n"
    async with serving(saying(headed, OK)) as server:
        found = await client.request("HEAD", server.url)
        assert (found.headers["replay-nonce"], found.body) == ("abc", b"")
        assert (await client.request("GET", server.url)).body == b"ok"
    assert server.connections == 1


async def test_a_body_may_end_with_its_connection(client: kept.Client) -> None:
    async with serving(saying(b"HTTP/1.0 200 OK\r\n\r\nall of it", stays=False)) as server:
        for _ in range(2):
            assert (await client.request("GET", server.url)).body == b"all of it"
    assert server.connections == 2


async def test_a_second_answer_answers_nothing(client: kept.Client) -> None:
    """Whoever sends more than was asked for poisons no later request, and no header of the first answer."""
    more = b"HTTP/1.1 200 OK\r\nX-First: no\r\nContent-Length: 4\r\n\r\nevil"
    async with serving(saying(OK + more, OK)) as server:
        first = await client.request("GET", server.url)
        assert first.body == b"ok" and "x-first" not in first.headers
        assert (await client.request("GET", server.url)).body == b"ok"
        assert server.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"3e8\r\n"
        + b"x" * 1000
        + b"\r\n1\r\nx\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 100_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
    ],
)
async def test_what_has_no_end_is_cut(client: kept.Client, answer: bytes) -> None:
    async with serving(saying(answer)) as server:
        with pytest.raises(kept.TooLong):
            await client.request("GET", server.url)
        assert not client._idle


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "before a whole answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "before a whole answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "before a whole answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", "switched protocols"),
    ],
)
async def test_half_an_answer_is_none(client: kept.Client, answer: bytes, why: str) -> None:
    async with serving(saying(answer, stays=False)) as server:
        with pytest.raises(kept.Broken, match=why):
            await client.request("GET", server.url)
        assert not client._idle


async def test_the_whole_exchange_has_its_time(client: kept.Client) -> None:
    """A byte now and then does not make it longer, and what comes too late is not the answer to the next request."""

    async def talk(server: Server, number: int, head: bytes, writer: asyncio.StreamWriter) -> bool:
        if number > 1:
            writer.write(OK)
            return True
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"e")
            await writer.drain()
            await asyncio.sleep(0.02)
        return False

    async with serving(talk) as server:
        client.limits = kept.Limits(0.3, 1000)
        with pytest.raises(TimeoutError):
            await client.request("GET", server.url)
        client.limits = kept.Limits()
        assert (await client.request("GET", server.url)).body == b"ok"
    assert server.connections == 2


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a b", "http://user:secret@127.0.0.1/", "ftp://127.0.0.1/", "/relative", "http:///nobody",
        "http://127.0.0.1:99999/", "http://127.0.0.1/é", "http://127.0.0.1/\x00", "http://exa mple/",
    ],
)  # fmt: skip
async def test_what_is_no_address_is_not_called(client: kept.Client, url: str) -> None:
    with pytest.raises(kept.Broken, match="no address of a server"):
        await client.request("GET", url)


async def test_a_line_break_in_an_address_adds_no_header(client: kept.Client) -> None:
    async with serving(saying(OK)) as server:
        with contextlib.suppress(kept.Broken):
            await client.request("GET", f"{server.url}/x\r\nX-Evil: yes")
    assert all(b"\r\nX-Evil" not in head for head in server.heads)


async def test_servers_are_trusted_by_the_context_alone(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "kept")
    cert, key = authority.issue("kept-server", "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    async with serving(saying(OK), context) as server:
        stranger = kept.Client(ssl.create_default_context(), kept.Limits())
        with pytest.raises(ssl.SSLCertVerificationError):
            await stranger.request("GET", server.url)
        client = kept.Client(ssl.create_default_context(cafile=str(authority.ca)), kept.Limits())
        for _ in range(3):
            assert (await client.request("GET", server.url)).body == b"ok"
        await client.close()
    assert len(server.heads) == 3
