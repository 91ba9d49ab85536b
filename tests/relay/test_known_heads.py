"""Requests whose bytes were seen before take a short way; nothing that can be observed may differ from the long one.

Each test makes a request known, and looks at the relay's end of the connection (``asked``) that the short way is what it tests.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from portico.relay import heads
from portico.relay.exchange import Exchange
from portico.relay.http1 import Visitor
from portico.relay.server import Relay
from portico.wire import frames as f
from tests.relay.doubles import Client, ScriptedAgent, ScriptedStream, grant, port, row, session_token
from tests.relay.known import GET, SECTION, forget, learn, visitors, whole

Visit = Callable[..., Awaitable[Client]]


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[Exchange]:
    """Every exchange that is made from here on."""
    made: list[Exchange] = []
    begin = Exchange.__init__

    def noting(self: Exchange, *args: Any) -> None:
        made.append(self)
        begin(self, *args)

    monkeypatch.setattr(Exchange, "__init__", noting)
    return made


@pytest.fixture
async def known(agent: ScriptedAgent, visit: Visit) -> Client:
    """A visitor whose request and answer are known."""
    agent.on_stream = whole
    client = await visit()
    await learn(client)
    return client


class Held:
    """A known request in flight: sent by a visitor, at the agent, not answered."""

    def __init__(self, relay: Relay, agent: ScriptedAgent, client: Client) -> None:
        self.relay, self.agent, self.client = relay, agent, client
        self.live = relay.agents.by_tunnel["tun_web"]
        self.stream: ScriptedStream
        self.visitor: Visitor

    async def ask(self, request: bytes = GET) -> Held:
        count = len(self.agent.streams)
        self.agent.on_stream = lambda s: None
        self.client.send(request)
        await self.agent.until(lambda: len(self.agent.streams) > count)
        self.stream = self.agent.streams[-1]
        (self.visitor,) = (v for v in visitors(self.relay) if v.asked is not None)
        assert self.live.inflight == 1
        return self

    async def over(self) -> None:
        """Nothing is left of it, and the agent's session is well."""
        await self.agent.until(lambda: self.live.inflight == 0 and not self.live.session.streams)
        assert not self.agent.session.streams
        assert not self.agent.session.closed

    async def goes_on(self) -> None:
        """The visitor's connection serves the next request, by the short way again."""
        self.agent.on_stream = whole
        self.client.send(GET)
        assert (await self.client.response())[::2] == (200, b"hello")
        await self.over()


@pytest.fixture
async def held(relay: Relay, agent: ScriptedAgent, known: Client) -> Held:
    return await Held(relay, agent, known).ask()


class TestTheShortWay:
    async def test_it_is_taken(
        self, relay: Relay, agent: ScriptedAgent, known: Client, exchanges: list[Exchange]
    ) -> None:
        before = len(agent.streams)
        for _ in range(20):
            known.send(GET)
            assert (await known.response())[::2] == (200, b"hello")
        assert exchanges == []
        assert len(agent.streams) == before + 20
        assert relay.agents.by_tunnel["tun_web"].inflight == 0

    async def test_the_agent_gets_the_same_head_with_an_id_of_its_own(
        self, agent: ScriptedAgent, known: Client
    ) -> None:
        for _ in range(4):
            known.send(GET)
            await known.response()
        seen = [[pair for pair in s.fields if pair[0] != b"X-Request-Id"] for s in agent.streams]
        assert all(fields == seen[0] for fields in seen)
        assert {(s.method, s.target, s.flags, s.bind) for s in agent.streams} == {(b"GET", b"/a", f.F_END, 1)}
        ids = [s.get(b"X-Request-Id")[0] for s in agent.streams]
        assert len(set(ids)) == len(ids) == 7

    async def test_counters_are_those_of_the_long_way(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit, known: Client
    ) -> None:
        counters = relay.agents.by_tunnel["tun_web"].counters

        async def cost(request: bytes) -> tuple[int, int, int, int]:
            before = (counters.requests, counters.bytes_in, counters.bytes_out, counters.errors)
            known.send(request)
            await known.response()
            after = (counters.requests, counters.bytes_in, counters.bytes_out, counters.errors)
            return tuple(b - a for a, b in zip(before, after, strict=True))  # type: ignore[return-value]

        fast = await cost(GET)
        forget()
        assert await cost(GET) == fast == (1, 0, len(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"), 0)

    async def test_another_connection_has_its_own_forwarding_fields(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit, known: Client, tmp_path: Any
    ) -> None:
        """The same section from another address, and on a host with another name, is known; what is ours is not taken along."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port(relay, 1), local_addr=("127.0.0.77", 0)
        )  # fmt: skip
        other = Client(reader, writer)
        asked: list[bool] = []

        def answer(s: ScriptedStream) -> None:
            asked.append(any(v.asked is not None for v in visitors(relay)))
            whole(s)

        agent.on_stream = answer
        for client, address in ((other, b"127.0.0.77"), (known, b"127.0.0.1"), (other, b"127.0.0.77")):
            client.send(GET)
            await client.response()
            last = agent.streams[-1]
            assert last.get(b"X-Forwarded-For") == [address]
            assert last.get(b"Forwarded") == [b"for=%b;host=web.localhost;proto=http" % address]
            assert last.get(b"X-Forwarded-Port") == [b"%d" % port(relay, 1)]
        assert asked == [True] * 3
        writer.close()

    async def test_the_listener_says_the_scheme(self, relay: Relay, agent: ScriptedAgent, known: Client) -> None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        secure = Client(*await asyncio.open_connection("127.0.0.1", port(relay, 2), ssl=context))
        asked: list[bool] = []

        def answer(s: ScriptedStream) -> None:
            asked.append(any(v.asked is not None for v in visitors(relay)))
            whole(s)

        agent.on_stream = answer
        for client, scheme, number in ((secure, b"https", 2), (known, b"http", 1), (secure, b"https", 2)):
            client.send(GET)
            assert (await client.response())[::2] == (200, b"hello")
            last = agent.streams[-1]
            assert last.get(b"X-Forwarded-Proto") == [scheme]
            assert last.get(b"X-Forwarded-Port") == [b"%d" % port(relay, number)]
            assert last.get(b"Forwarded")[0].endswith(b"proto=" + scheme)
        assert asked == [True] * 3
        secure.writer.close()

    async def test_two_hosts_on_one_connection(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit, known: Client
    ) -> None:
        await agent.online(grant("api"), bind=2)
        other = GET.replace(b"web.localhost", b"api.localhost")
        for request, host, bind in ((GET, b"web", 1), (other, b"api", 2)) * 4:
            known.send(request)
            await known.response()
            last = agent.streams[-1]
            assert (last.bind, last.get(b"Host"), last.get(b"X-Forwarded-Host")) == (
                bind, [host + b".localhost"], [host + b".localhost"],
            )  # fmt: skip
        assert other.partition(b"\r\n")[2] in heads.KNOWN_HEADS

    async def test_the_first_request_of_a_connection(
        self, relay: Relay, agent: ScriptedAgent, known: Client, visit: Visit, exchanges: list[Exchange]
    ) -> None:
        for _ in range(3):
            client = await visit(GET)
            assert (await client.response())[::2] == (200, b"hello")
            client.send(GET.replace(b"/a", b"/b") + b"\r\nGET /c HTTP/1.1\r\n" + SECTION)  # the parser begins here
            assert [(await client.response())[2] for _ in range(2)] == [b"hello"] * 2
        assert len(exchanges) == 6
        assert [s.target for s in agent.streams[3:]] == [b"/a", b"/b", b"/c"] * 3

    async def test_a_connection_that_is_to_end(
        self, agent: ScriptedAgent, known: Client, visit: Visit, exchanges: list[Exchange]
    ) -> None:
        """It gets the known answer, is told, and closed; what it sends behind its last request is not heard."""
        close = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        wanted = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
        for number in range(5):
            assert await (await visit(close)).rest() == wanted
            assert len(exchanges) == min(number + 1, 2)
        agent.on_stream = lambda s: None
        count = len(agent.streams)
        client = await visit(close)
        await agent.until(lambda: len(agent.streams) > count)
        client.send(GET)
        await asyncio.sleep(0.02)
        whole(agent.streams[-1])
        assert await client.rest() == wanted
        assert len(agent.streams) == count + 1

    async def test_connections_that_bring_one_request_each_teach_too(
        self, agent: ScriptedAgent, visit: Visit, exchanges: list[Exchange]
    ) -> None:
        agent.on_stream = whole
        close = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        answers = {await (await visit(close)).rest() for _ in range(6)}
        assert answers == {b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"}
        assert len(exchanges) == 2  # the second one was remembered

    async def test_full_and_emptied_memos(self, agent: ScriptedAgent, known: Client) -> None:
        for number in range(3 * heads.KNOWN_HEADS._most):
            heads.KNOWN_HEADS.remember(b"%d" % number, heads.KNOWN_HEADS[SECTION] if not number else None)  # type: ignore[arg-type]
        assert SECTION not in heads.KNOWN_HEADS
        assert len(heads.KNOWN_HEADS) <= heads.KNOWN_HEADS._most
        await learn(known)
        heads.KNOWN_ANSWERS.clear()
        await learn(known)
        forget()
        await learn(known)

    async def test_what_is_long_is_not_remembered(self, agent: ScriptedAgent, known: Client) -> None:
        long = GET.replace(b"a=b", b"a" * 2100)
        line = b"GET /" + b"a" * 600 + b" HTTP/1.1"
        entries = len(heads.KNOWN_HEADS)
        for _ in range(3):
            for request in (long, line + b"\r\n" + SECTION):
                known.send(request)
                assert (await known.response())[0] == 200
        assert len(heads.KNOWN_HEADS) == entries
        assert line not in heads.PLAIN_LINES
        assert agent.streams[-2].get(b"Cookie") == [b"a" * 2100]


class TestNotTaken:
    """Special requests go to the parser, whatever is known; each is sent to a connection on which the section is known."""

    @pytest.fixture(autouse=True)
    def parsed(self, relay: Relay, agent: ScriptedAgent, known: Client) -> None:
        agent.on_stream = self.answer
        self.relay = relay
        self.asked: list[bool] = []

    def answer(self, s: ScriptedStream) -> None:
        self.asked.append(any(v.asked is not None for v in visitors(self.relay)))
        s.answer(body=b"" if s.method == b"HEAD" else b"hello")

    @pytest.mark.parametrize(
        ("request_", "statuses"),
        [
            pytest.param(b"HEAD /a HTTP/1.1\r\n" + SECTION, [200], id="HEAD"),
            pytest.param(b"POST /a HTTP/1.1\r\n" + SECTION, [200], id="POST"),
            pytest.param(b"GET http://web.localhost/a HTTP/1.1\r\n" + SECTION, [200], id="absolute form"),
            pytest.param(b"GET http://other.localhost/a HTTP/1.1\r\n" + SECTION, [400], id="absolute form, other host"),
            pytest.param(b"GET /a HTTP/1.0\r\n" + SECTION, [200], id="HTTP/1.0"),
            pytest.param(b"GET /a HTTP/1.2\r\n" + SECTION, [400], id="HTTP/1.2"),
            pytest.param(b"GET /a HTTP/1.1 \r\n" + SECTION, [400], id="a space behind"),
            pytest.param(b"GET  /a HTTP/1.1\r\n" + SECTION, [200, 400], id="two spaces"),
            pytest.param(b"GET /a b HTTP/1.1\r\n" + SECTION, [400], id="a space in the target"),
            pytest.param(b"GET /a\tb HTTP/1.1\r\n" + SECTION, [400], id="a tab"),
            pytest.param(b"GET /a\x00b HTTP/1.1\r\n" + SECTION, [400], id="a NUL"),
            pytest.param(b"GET /a#b HTTP/1.1\r\n" + SECTION, [200, 400], id="a fragment"),
            pytest.param(b"GET /a HTTP/1.1\n" + SECTION, [400], id="no CR"),
            pytest.param(b"GET a HTTP/1.1\r\n" + SECTION, [400], id="no slash"),
            pytest.param(b"GET * HTTP/1.1\r\n" + SECTION, [400], id="an asterisk"),
            pytest.param(b"get /a HTTP/1.1\r\n" + SECTION, [400], id="small letters"),
            pytest.param(b"CONNECT /a HTTP/1.1\r\n" + SECTION, [400], id="CONNECT"),
            pytest.param(b"GET /a HTTP/1.1\r\nX: 1\r\n" + SECTION, [200], id="one more field"),
            pytest.param(GET + b"body", [200, 400], id="an illegal body"),
            pytest.param(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), [200], id="Connection: close"),
            pytest.param(GET.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"), [200], id="Expect"),
            pytest.param(b"\r\n" + GET, [200], id="an empty line before"),
            pytest.param(b"\r\n\r\n" + SECTION, [400], id="no line at all"),
        ],
    )
    async def test_as_on_a_relay_that_knows_nothing(
        self, agent: ScriptedAgent, visit: Visit, request_: bytes, statuses: list[int]
    ) -> None:
        seen = []
        for warm in (True, False):
            if not warm:
                forget()
            client = await visit(request_)
            count = len(agent.streams)
            head = await client.read_head()
            client.writer.write_eof()
            rest = await client.rest()
            requests = [(s.method, s.target, [n for n, _ in s.fields]) for s in agent.streams[count:]]
            seen.append((head[:12], head.count(b"Connection: close"), len(rest), requests))
            assert int(head[9:12]) in statuses
        assert seen[0] == seen[1]
        assert True not in self.asked

    async def test_a_known_section_cut_over_two_reads(self, agent: ScriptedAgent, known: Client) -> None:
        for cut in (1, 10, 17, len(GET) - 4, len(GET) - 1):
            known.send(GET[:cut])
            await asyncio.sleep(0.02)
            known.send(GET[cut:])
            assert (await known.response())[::2] == (200, b"hello")
        assert self.asked == [False] * 5
        known.send(GET)
        await known.response()
        assert self.asked[-1] is True

    async def test_two_requests_in_one_read(self, agent: ScriptedAgent, known: Client) -> None:
        known.send(GET + GET.replace(b"/a", b"/b"))
        assert [(await known.response())[2] for _ in range(2)] == [b"hello"] * 2
        assert [s.target for s in agent.streams[-2:]] == [b"/a", b"/b"]

    async def test_never_head(self, agent: ScriptedAgent, known: Client, visit: Visit) -> None:
        client = await visit()
        for _ in range(4):
            client.send(b"HEAD /a HTTP/1.1\r\n" + SECTION)
            assert (await client.read_head()).startswith(b"HTTP/1.1 200")
        assert True not in self.asked


class TestNotLearned:
    """What the parser skips or joins may not become the meaning of other bytes."""

    async def test_an_empty_line_before_the_request(self, agent: ScriptedAgent, visit: Visit) -> None:
        """The section of the read then begins with the request line: no header section, though the request is valid."""
        agent.on_stream = whole
        client = await visit()
        for _ in range(3):
            client.send(b"\r\n" + GET)
            assert (await client.response())[0] == 200
        assert not heads.KNOWN_HEADS
        other = await visit(b"GET /b HTTP/1.1\r\n" + GET)
        assert (await other.response())[0] == 400
        assert len(agent.streams) == 3

    async def test_empty_lines_alone(self, agent: ScriptedAgent, visit: Visit) -> None:
        """They begin no request: what they are taken for must not be the request before them."""
        agent.on_stream = whole
        client = await visit()
        for _ in range(3):
            client.send(GET)
            await client.response()
            client.send(b"\r\n\r\n\r\n")
            await asyncio.sleep(0.02)
        assert b"\r\n\r\n" not in heads.KNOWN_HEADS
        stranger = await visit(b"GET /a HTTP/1.1\r\n\r\n\r\n")
        assert (await stranger.response())[0] == 400
        assert len(agent.streams) == 3

    async def test_an_early_answer_and_the_next_request_behind_the_body(
        self, relay: Relay, agent: ScriptedAgent, known: Client
    ) -> None:
        """The end of a body that nobody waited for brings the next request along: the connection does not rest then."""
        agent.on_stream = lambda s: s.answer(body=b"early") if s.method == b"POST" else None
        known.send(b"POST /up HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: 4\r\n\r\nab")
        assert (await known.response())[2] == b"early"
        count = len(agent.streams)
        known.send(b"cd" + GET.replace(b"/a", b"/first"))
        await agent.until(lambda: len(agent.streams) == count + 1)
        known.send(GET.replace(b"/a", b"/second"))
        await asyncio.sleep(0.05)
        assert len(agent.streams) == count + 1  # one at a time
        agent.streams[-1].answer(body=b"first")
        await agent.until(lambda: len(agent.streams) == count + 2)
        agent.streams[-1].answer(body=b"second")
        assert [(await known.response())[2] for _ in range(2)] == [b"first", b"second"]
        assert [s.target for s in agent.streams[-2:]] == [b"/first", b"/second"]

    async def test_half_a_request_behind_a_body_stays_half(self, agent: ScriptedAgent, known: Client) -> None:
        agent.on_stream = lambda s: s.answer(body=b"early")
        known.send(b"POST /up HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: 4\r\n\r\nab")
        assert (await known.response())[2] == b"early"
        count = len(agent.streams)
        known.send(b"cdGET /first HTTP/1.1\r\nX-A: b")
        await asyncio.sleep(0.05)
        known.send(GET.replace(b"/a", b"/second"))
        assert (await known.response())[2] == b"early"
        await agent.until(lambda: len(agent.streams) > count)
        assert [s.target for s in agent.streams[count:]] == [b"/first"]
        assert agent.streams[-1].get(b"X-A") == [b"bGET /second HTTP/1.1"]


class TestSmallLimits:
    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"max_head_bytes": 256}

    async def test_the_limit_of_a_head_holds(self, agent: ScriptedAgent, visit: Visit) -> None:
        client = await visit()
        for _ in range(4):
            client.send(GET)
            assert (await client.response())[0] == 200
        client.send(GET.replace(b"/a", b"/" + b"a" * 300))
        assert (await client.response())[0] == 431


class TestInFlight:
    async def test_the_visitor_leaves(self, held: Held) -> None:
        held.client.writer.close()
        await held.agent.until(lambda: held.stream.reset)
        assert held.stream.reset == (f.CANCELLED, "the visitor closed the connection")
        await held.over()

    async def test_the_visitor_closes_its_direction(self, held: Held) -> None:
        held.client.writer.write_eof()
        await asyncio.sleep(0.05)
        whole(held.stream)
        assert (await held.client.response())[2] == b"hello"
        assert await held.client.rest() == b""
        await held.over()

    async def test_a_pipelined_request_is_answered_after_it(self, held: Held) -> None:
        held.client.send(GET.replace(b"/a", b"/b"))
        await held.agent.until(lambda: held.visitor.asked is None)
        await asyncio.sleep(0.02)
        assert held.agent.streams[-1] is held.stream
        whole(held.stream, b"first")
        assert (await held.client.response())[2] == b"first"
        await held.agent.until(lambda: held.agent.streams[-1] is not held.stream)
        assert held.agent.streams[-1].target == b"/b"
        whole(held.agent.streams[-1], b"second")
        assert (await held.client.response())[2] == b"second"
        await held.goes_on()

    async def test_rubbish_behind_it_is_refused_after_the_answer(self, held: Held) -> None:
        held.client.send(b"\x00\x01\x02\r\n\r\n")
        await asyncio.sleep(0.02)
        whole(held.stream)
        assert (await held.client.response())[::2] == (200, b"hello")
        assert (await held.client.response())[0] == 400
        await held.over()

    async def test_response_and_data(self, held: Held) -> None:
        held.stream.answer(body=b"apart")
        assert (await held.client.response())[::2] == (200, b"apart")
        await held.goes_on()

    async def test_an_unknown_head(self, held: Held) -> None:
        whole(held.stream, b"new", 203, (b"X-New", b"1"))
        status, fields, body = await held.client.response()
        assert (status, fields[b"x-new"], body) == (203, [b"1"], b"new")
        await held.goes_on()

    async def test_a_chunked_answer(self, held: Held) -> None:
        held.stream.stream.send_response(200, [b"OK"], end=False)
        held.stream.stream.send_data(b"one")
        held.stream.stream.send_end([b"X-Sum", b"3"])
        head = await held.client.read_head()
        assert b"Transfer-Encoding: chunked" in head
        assert await held.client.read(len(b"3\r\none\r\n0\r\nX-Sum: 3\r\n\r\n")) == b"3\r\none\r\n0\r\nX-Sum: 3\r\n\r\n"
        await held.goes_on()

    async def test_an_answer_without_a_length_is_chunked(self, held: Held) -> None:
        whole(held.stream, b"abc", length=None)
        assert b"Transfer-Encoding: chunked" in await held.client.read_head()
        assert await held.client.read(13) == b"3\r\nabc\r\n0\r\n\r\n"
        await held.goes_on()

    async def test_an_interim_answer_first(self, held: Held) -> None:
        held.stream.stream.send_interim(103, [b"Early Hints", b"Link", b"</a>"])
        whole(held.stream)
        assert await held.client.read_head() == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        assert (await held.client.response())[2] == b"hello"
        await held.goes_on()

    @pytest.mark.parametrize(("body", "length"), [(b"longer", 5), (b"hello!", 5), (b"", 0)])
    async def test_a_body_that_is_not_as_announced(self, held: Held, body: bytes, length: int) -> None:
        """Too long: the visitor must see that the answer is broken. (An empty one is a proper answer.)"""
        whole(held.stream, body, length=length)
        if not body:
            assert (await held.client.response())[::2] == (200, b"")
            return
        text = await held.client.rest()
        assert not text.endswith(body)
        assert text in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        await held.over()

    async def test_a_body_that_is_too_short(self, held: Held) -> None:
        """Its head is a known one."""
        whole(held.stream, b"hel", length=5)
        assert await held.client.rest() == b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel"
        await held.over()

    @pytest.mark.parametrize("status", [204, 304])
    async def test_statuses_without_a_body(self, held: Held, status: int) -> None:
        whole(held.stream, b"", status, length=None)
        head = await held.client.read_head()
        assert head == b"HTTP/1.1 %d OK\r\n\r\n" % status
        await held.goes_on()

    @pytest.mark.parametrize("status", [204, 304])
    async def test_statuses_that_may_have_no_body_with_one(self, held: Held, status: int) -> None:
        whole(held.stream, b"body", status)
        assert b"body" not in await held.client.rest()
        await held.over()

    @pytest.mark.parametrize("status", [101, 103])
    async def test_an_interim_status_ends_the_session(self, held: Held, status: int) -> None:
        whole(held.stream, b"", status, length=None)
        got, fields, _ = await held.client.response()
        assert (got, fields[b"portico-error"]) == (502, [b"edge.agent_unreachable"])
        await held.agent.until(lambda: held.agent.error is not None)
        assert held.agent.error is not None and held.agent.error[0] == "wire.protocol_error"
        assert held.live.inflight == 0

    async def test_two_lengths(self, held: Held) -> None:
        whole(held.stream, fields=(b"Content-Length", b"4"))
        status, fields, _ = await held.client.response()
        assert (status, fields[b"portico-error"]) == (502, [b"edge.target_invalid"])
        await held.goes_on()

    async def test_hop_by_hop_fields_do_not_pass(self, held: Held) -> None:
        for _ in range(3):
            whole(
                held.stream,
                fields=(b"Connection", b"close", b"Keep-Alive", b"5", b"Transfer-Encoding", b"chunked", b"Portico-Error", b"x"),
            )  # fmt: skip
            assert (await held.client.read_head()) == b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
            assert await held.client.read(5) == b"hello"
            await held.ask()
        whole(held.stream)
        await held.client.response()
        await held.goes_on()

    @pytest.mark.parametrize(
        ("code", "status", "error"),
        [
            (f.TARGET_REFUSED, 502, b"edge.target_refused"),
            (f.TARGET_TIMEOUT, 504, b"edge.target_timeout"),
            (f.INTERNAL, 502, b"edge.agent_unreachable"),
            (f.TOO_MANY_STREAMS, 429, b"edge.concurrency_exceeded"),
        ],
    )
    async def test_reset(self, held: Held, code: int, status: int, error: bytes) -> None:
        errors = held.live.counters.errors
        held.stream.stream.reset(code, "no")
        got, fields, body = await held.client.response()
        assert (got, fields[b"portico-error"]) == (status, [error])
        assert fields[b"content-type"][0].startswith(b"text/html")  # as the known Accept asks for
        assert held.stream.get(b"X-Request-Id")[0] in body
        assert held.live.counters.errors == errors + 1
        await held.goes_on()

    async def test_the_agents_connection_dies(self, held: Held) -> None:
        held.agent.close()
        status, fields, body = await held.client.response()
        assert (status, fields[b"portico-error"]) == (502, [b"edge.agent_unreachable"])
        assert held.stream.get(b"X-Request-Id")[0] in body
        held.client.send(GET)
        assert (await held.client.response())[1][b"portico-error"] == [b"edge.host_unassigned"]
        assert held.live.inflight == 0

    async def test_draining_says_so(self, held: Held) -> None:
        held.relay.public.drain()
        held.relay.public.close_idle()
        whole(held.stream)
        status, fields, body = await held.client.response()
        assert (status, fields[b"connection"], body) == (200, [b"close"], b"hello")
        assert await held.client.rest() == b""
        await held.over()

    async def test_unbound_meanwhile(self, held: Held) -> None:
        held.relay.snapshot.apply(
            {"type": "delta", "version": 2, "changes": [{"kind": "tunnel", "tunnel": row("web", "stopped", 2)}]}
        )
        await held.agent.until(lambda: held.agent.unbound)
        whole(held.stream)
        assert (await held.client.response())[2] == b"hello"
        assert held.live.inflight == 0
        held.client.send(GET)
        assert (await held.client.response())[1][b"portico-error"] == [b"edge.tunnel_offline"]

    async def test_the_next_one_over_the_concurrency_is_refused(self, held: Held, visit: Visit) -> None:
        held.live.concurrency = 1
        other = await visit(GET)
        status, fields, _ = await other.response()
        assert (status, fields[b"portico-error"]) == (429, [b"edge.concurrency_exceeded"])
        whole(held.stream)
        await held.client.response()
        other.send(GET)
        await held.agent.until(lambda: held.agent.streams[-1] is not held.stream)
        whole(held.agent.streams[-1])
        assert (await other.response())[0] == 200


class TestFirstByte:
    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"first_byte_timeout_seconds": 0.3}

    async def test_a_silent_agent(self, held: Held) -> None:
        status, fields, _ = await held.client.response()
        assert (status, fields[b"portico-error"]) == (504, [b"edge.target_timeout"])
        await held.agent.until(lambda: held.stream.reset)
        assert held.stream.reset == (f.CANCELLED, "no answer in time")
        await held.goes_on()


class TestIdle:
    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"idle_timeout_seconds": 0.4, "max_connections": 2}

    async def test_a_connection_that_rests_is_closed(self, agent: ScriptedAgent, known: Client) -> None:
        known.send(GET)
        await known.response()
        assert await known.rest() == b""

    async def test_connections_are_counted(self, agent: ScriptedAgent, known: Client, visit: Visit) -> None:
        await learn(await visit())
        status, fields, _ = await (await visit(GET)).response()
        assert (status, fields[b"portico-error"]) == (429, [b"edge.too_many_connections"])


class TestElsewhere:
    async def test_a_host_that_is_unknown_after_it_was_known(
        self, relay: Relay, agent: ScriptedAgent, known: Client
    ) -> None:
        agent.close()
        await agent.until(lambda: not relay.agents.by_host)
        for _ in range(2):
            known.send(GET)
            status, fields, body = await known.response()
            assert (status, fields[b"portico-error"]) == (404, [b"edge.host_unassigned"])
            assert body.startswith(b"<!doctype html>") or b"<html" in body

    async def test_the_tunnel_moves_to_another_agent(self, relay: Relay, agent: ScriptedAgent, known: Client) -> None:
        other = ScriptedAgent()
        other.on_stream = lambda s: whole(s, b"other")
        await other.connect(port(relay, 0), session_token(), connect=2)
        await other.online()
        for _ in range(3):
            known.send(GET)
            assert (await known.response())[2] == b"other"
        assert len(other.streams) == 3
        other.close()


class TestReading:
    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"visitor_write_buffer_bytes": 65_536}

    async def test_a_visitor_that_asks_and_does_not_read(
        self, relay: Relay, agent: ScriptedAgent, known: Client
    ) -> None:
        """Its requests wait in its own kernel, not here, and nothing is lost when it reads."""
        body = b"x" * 16_000
        agent.on_stream = lambda s: whole(s, body)
        await learn(known)
        (visitor,) = visitors(relay)
        known.writer.transport.pause_reading()  # type: ignore[attr-defined]
        sent = 0
        while visitor.reading and sent < 2000:
            before = len(agent.streams)
            known.send(GET)  # one at a time, so that each is a read of its own
            sent += 1
            await agent.until(lambda before=before: len(agent.streams) > before)
            await agent.until(lambda: visitor.resting)
        assert sent < 2000, "the relay never stopped reading"
        count = len(agent.streams)
        for _ in range(50):
            known.send(GET)
        await asyncio.sleep(0.1)
        assert len(agent.streams) == count
        assert visitor.transport.get_write_buffer_size() < 65_536 + 3 * len(body)
        known.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(sent + 50):
            assert (await known.response())[2] == body
        known.send(GET)
        assert (await known.response())[2] == body
