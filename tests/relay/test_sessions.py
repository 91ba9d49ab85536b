"""Agent sessions at the relay: who may connect and bind, take-over, revocation, outage grace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import picows
import pytest

from portico.relay.server import Relay
from portico.wire import frames as f
from tests.relay.doubles import KEY, Client, ScriptedAgent, ScriptedStream, grant, port, row, session_token
from tests.timing import Since

Visit = Callable[..., Awaitable[Client]]
GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"
FAST = {"takeover_probe_seconds": 0.4, "ping_interval_seconds": 0.3, "ping_timeout_seconds": 0.3}


def delta(relay: Relay, *changes: dict[str, Any]) -> None:
    version = (relay.snapshot.version or 0) + 1
    relay.snapshot.apply({"type": "delta", "version": version, "changes": list(changes)})


def online(relay: Relay, state: bool = True) -> None:
    """As if the edge stream were up: the relay then believes no expired token."""
    relay.link.connected = state
    if state:
        relay.agents.stream_connected()


async def refused(relay: Relay, token: str | None, headers: dict[str, str] | None = None) -> tuple[int, str]:
    fields = {"Sec-WebSocket-Protocol": f.PROTOCOL} if headers is None else headers
    if token is not None:
        fields["Authorization"] = f"Bearer {token}"
    with pytest.raises(picows.WSHandshakeError) as caught:
        await picows.ws_connect(
            lambda: picows.WSListener(), f"ws://127.0.0.1:{port(relay, 0)}/v1/connect", extra_headers=fields
        )
    response = caught.value.response
    assert response is not None
    return int(response.status), (caught.value.raw_body or b"").decode()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("organization.suspended", "the operator of this platform suspended the organization"),
        ("organization.deleting", "an owner can still take that back"),
        ("session.revoked", "portico login"),
        ("session.ended", "start the agent again"),
    ],
)
async def test_the_end_says_what_happened_and_what_to_do(
    relay: Relay, agent: ScriptedAgent, code: str, says: str
) -> None:
    """To who is connected, and to who comes again."""
    delta(relay, {"kind": "session_ended", "session": "ses_a", "code": code, "until": time.time() + 900})
    await agent.until(lambda: agent.error is not None, 30)
    assert agent.error is not None and agent.error[0] == code and says in agent.error[1]
    status, body = await refused(relay, session_token())
    assert (status in (401, 403, 404, 410), code in body, says in body) == (True, True, True)


async def soon(stopping: asyncio.Future[None], limit: float) -> None:
    """Well before the drain's limit."""
    since = Since()
    await stopping
    assert since.waited() < limit


class TestConnect:
    async def test_refusals_come_before_the_upgrade(self, relay: Relay) -> None:
        for token, code in (
            (None, "session.token_invalid"),
            ("nonsense", "session.token_invalid"),
            (grant(), "session.token_invalid"),
            (session_token(age=5000) + "x", "session.token_invalid"),
        ):
            status, body = await refused(relay, token)
            assert (status, code in body) == (401, True)
        assert (await refused(relay, session_token(), headers={}))[0] == 400
        online(relay)
        relay.agents._connected_since = time.time() - 3600
        status, body = await refused(relay, session_token(age=5000))
        assert (status, "session.token_expired" in body) == (401, True)

    async def test_a_token_in_the_url_is_not_read(self, relay: Relay) -> None:
        with pytest.raises(picows.WSHandshakeError):
            await picows.ws_connect(
                lambda: picows.WSListener(), f"ws://127.0.0.1:{port(relay, 0)}/v1/connect?token={session_token()}",
                extra_headers={"Sec-WebSocket-Protocol": f.PROTOCOL},
            )  # fmt: skip

    async def test_a_relay_that_knows_nothing_says_so(self, relay: Relay) -> None:
        relay.snapshot.version = None
        status, body = await refused(relay, session_token())
        assert (status, "session.relay_not_ready" in body) == (503, True)

    @pytest.mark.parametrize("relay_settings", [{"max_sessions": 1}])
    async def test_a_full_relay_says_so(self, relay: Relay, agent: ScriptedAgent) -> None:
        status, body = await refused(relay, session_token("ses_b"))
        assert (status, "session.relay_full" in body) == (503, True)

    async def test_health_is_on_the_control_port_only(self, relay: Relay, visit: Visit) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 0))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        client = await visit(b"GET /healthz HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
        assert (await client.response())[0] == 404

    @pytest.mark.parametrize("relay_settings", [{"hello_timeout_seconds": 0.3}])
    async def test_a_silent_connection_is_ended(self, relay: Relay) -> None:
        scripted = ScriptedAgent()
        await picows.ws_connect(
            lambda: scripted.carrier, f"ws://127.0.0.1:{port(relay, 0)}/v1/connect",
            extra_headers={"Authorization": f"Bearer {session_token()}", "Sec-WebSocket-Protocol": f.PROTOCOL},
        )  # fmt: skip
        await scripted.until(lambda: scripted.lost is not None)
        assert relay.agents.connections == set()

    async def test_a_protocol_error_names_itself_and_ends(self, relay: Relay, agent: ScriptedAgent) -> None:
        agent.session.put(f.frame(f.RESPONSE, 77, b"\x00\xc8OK"))
        await agent.until(lambda: agent.error is not None and agent.lost is not None)
        assert agent.error is not None and agent.error[0] == "wire.protocol_error"
        assert relay.agents.by_host == {}


class TestBind:
    async def test_grants_of_others_are_refused(self, relay: Relay, agent: ScriptedAgent) -> None:
        wrong = {
            2: (grant("a", session="ses_other"), "tunnel.grant_invalid"),
            3: (session_token(), "tunnel.grant_invalid"),
            4: ("x.y.z", "tunnel.grant_invalid"),
        }
        for bind, (token, code) in wrong.items():
            agent.bind(token, bind)
            await agent.until(lambda bind=bind: bind in agent.refused)
            assert agent.refused[bind][0] == code
        assert relay.agents.by_host.keys() == {b"web.localhost"}  # one refusal does not end the session

    @pytest.mark.parametrize("relay_settings", [{"max_tunnels_per_session": 1}])
    async def test_too_many_binds(self, relay: Relay, agent: ScriptedAgent) -> None:
        agent.bind(grant("b"), 2)
        await agent.until(lambda: 2 in agent.refused)
        assert agent.refused[2][0] == "tunnel.too_many_binds"

    async def test_renewal_and_another_tunnel_on_the_same_id(self, relay: Relay, agent: ScriptedAgent) -> None:
        agent.bound.clear()
        agent.bind(grant(concurrency=7))
        await agent.until(lambda: 1 in agent.bound)
        assert relay.agents.by_tunnel["tun_web"].concurrency == 7
        agent.bind(grant("other"))
        await agent.until(lambda: 1 in agent.refused)
        assert agent.refused[1][0] == "tunnel.grant_invalid"

    async def test_unbind_takes_the_host_away(self, relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
        agent.session.control(f.UNBIND, 1, code="agent.stopped", detail="")
        await agent.until(lambda: not relay.agents.by_host)
        assert (await (await visit(GET)).response())[0] == 404

    async def test_states_of_the_platform(self, relay: Relay, agent: ScriptedAgent) -> None:
        delta(
            relay,
            {"kind": "tunnel", "tunnel": row("stopped", "stopped", 2)},
            {"kind": "tunnel", "tunnel": row("held", "suspended", 2)},
            {"kind": "tunnel", "tunnel": row("changed", "active", 2)},
        )
        expected = {"stopped": "tunnel.stopped", "held": "edge.account_suspended", "changed": "tunnel.grant_stale"}
        for bind, (name, code) in enumerate(expected.items(), start=10):
            agent.bind(grant(name), bind)
            await agent.until(lambda bind=bind: bind in agent.refused)
            assert agent.refused[bind][0] == code
        online(relay)
        agent.bind(grant("gone", age=200), 20)
        agent.bind(grant("new"), 21)
        await agent.until(lambda: 20 in agent.refused and 21 in agent.bound)
        assert agent.refused[20][0] == "tunnel.deleted"

    async def test_auth_renews_and_refuses(self, relay: Relay, agent: ScriptedAgent) -> None:
        agent.session.control(f.AUTH, 0, token=session_token(life=2000))
        await agent.until(lambda: agent.authed is not None)
        assert next(iter(relay.agents.connections)).claims.exp > time.time() + 1900
        agent.session.control(f.AUTH, 0, token=session_token("ses_other"))
        await agent.until(lambda: agent.error is not None)
        assert agent.error is not None and agent.error[0] == "session.token_invalid"


class TestTakeOver:
    @pytest.mark.parametrize("relay_settings", [FAST])
    async def test_another_agent_is_refused_while_the_holder_answers(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        other = await ScriptedAgent().connect(port(relay, 0), session_token("ses_b", "agt-b"))
        for attempt in range(1, 6):
            other.bind(grant(session="ses_b"), attempt)
            await other.until(lambda attempt=attempt: attempt in other.refused)
            assert other.refused[attempt][0] == "tunnel.in_use" and other.refused[attempt][2]
            assert (await (await visit(GET)).response())[2] == b"hello"
        assert agent.unbound == {} and agent.lost is None
        other.close()

    @pytest.mark.parametrize("relay_settings", [{**FAST, "ping_interval_seconds": 60.0}])
    async def test_another_agent_takes_over_from_a_dead_one(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        agent.session.handler = agent
        agent.session._on_ping = lambda *a: None  # type: ignore[method-assign]  # answers no ping, keeps its socket open
        other = await ScriptedAgent().connect(port(relay, 0), session_token("ses_b", "agt-b"))
        other.on_stream = lambda s: s.answer(body=b"other")
        other.bind(grant(session="ses_b"))
        await other.until(lambda: 1 in other.bound)
        assert (await (await visit(GET)).response())[2] == b"other"
        await agent.until(lambda: agent.lost is not None)
        other.close()

    async def test_the_same_instance_takes_over_at_once_and_only_forwards(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        newer = await ScriptedAgent().connect(port(relay, 0), session_token(), connect=2)
        newer.on_stream = lambda s: s.answer(body=b"newer")
        await newer.online()
        assert (await (await visit(GET)).response())[2] == b"newer"
        await agent.until(lambda: agent.unbound == {1: "tunnel.moved"})
        late = await ScriptedAgent().connect(port(relay, 0), session_token(), connect=1)
        await late.until(lambda: late.error is not None)
        assert late.error is not None and late.error[0] == "session.superseded"
        agent.bind(grant())  # the old connection cannot take the name back either
        await agent.until(lambda: 1 in agent.refused)
        assert agent.refused[1][0] == "session.superseded"
        again = await ScriptedAgent().connect(port(relay, 0), session_token(generation=2), connect=1)
        await again.online()
        newer.close()
        again.close()

    async def test_requests_in_flight_finish_on_the_old_connection(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        agent.on_stream = lambda s: None
        client = await visit(GET)
        await agent.until(lambda: agent.streams)
        newer = await (await ScriptedAgent().connect(port(relay, 0), session_token(), connect=2)).online()
        await asyncio.sleep(0.1)
        agent.streams[0].answer(body=b"old")
        assert (await client.response())[2] == b"old"
        newer.close()


class TestPlatform:
    async def test_stop_delete_and_revocation_reach_live_sessions(self, relay: Relay, agent: ScriptedAgent) -> None:
        for bind, name in ((2, "b"), (3, "c")):
            agent.bind(grant(name), bind)
            await agent.until(lambda bind=bind: bind in agent.bound)
        delta(relay, {"kind": "tunnel", "tunnel": row("web", "stopped", 2)})
        delta(relay, {"kind": "tunnel_removed", "id": "tun_b", "code": "tunnel.deleted"})
        delta(relay, {"kind": "tunnel", "tunnel": row("c", "active", 2)})
        await agent.until(lambda: len(agent.unbound) == 3)
        assert agent.unbound == {1: "tunnel.stopped", 2: "tunnel.deleted", 3: "tunnel.grant_stale"}
        assert relay.agents.by_host == relay.agents.by_tunnel == {}
        assert relay.agents.left == {
            "tun_web": "the tunnel is stopped",
            "tun_b": "the tunnel was deleted",
            "tun_c": "the tunnel changed; ask for a new grant",
        }
        end = {"kind": "session_ended", "session": "ses_a", "code": "session.revoked", "until": time.time() + 90}
        delta(relay, end)
        await agent.until(lambda: agent.error is not None and agent.lost is not None)
        assert agent.error is not None and agent.error[0] == "session.revoked"
        status, body = await refused(relay, session_token())
        assert "session.revoked" in body and status in (401, 403)

    async def test_expired_tokens_live_through_an_outage_and_not_longer(self, relay: Relay, visit: Visit) -> None:
        scripted = await ScriptedAgent().connect(
            port(relay, 0), session_token(age=5000)
        )  # expired, but nobody can renew
        await scripted.online(grant(age=5000))
        relay.agents.sweep()
        assert (await (await visit(GET)).response())[0] == 200
        online(relay)  # the stream is back: 60 s to refresh
        relay.agents.sweep()
        assert scripted.error is None and relay.agents.by_host
        relay.agents._connected_since = time.time() - 61
        relay.agents.sweep()
        await scripted.until(lambda: scripted.error is not None)
        assert scripted.unbound == {1: "tunnel.grant_expired"}
        assert scripted.error is not None and scripted.error[0] == "session.token_expired"

    async def test_the_outage_grace_ends(self, relay: Relay) -> None:
        status, body = await refused(relay, session_token(age=900 + 86400 + 120))
        assert (status, "session.token_expired" in body) == (401, True)

    async def test_a_key_of_nobody(self, relay: Relay) -> None:
        relay.snapshot.apply({"type": "delta", "version": 9, "changes": [{"kind": "keys", "keys": []}]})
        assert (await refused(relay, session_token()))[0] == 401
        delta(relay, {"kind": "keys", "keys": [KEY.public_jwk()]})
        (await ScriptedAgent().connect(port(relay, 0), session_token())).close()


class TestDrain:
    async def test_agents_are_asked_to_leave_and_requests_finish(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        agent.on_stream = lambda s: None
        client, idle = await visit(GET), await visit()
        await agent.until(lambda: agent.streams)
        stopping = asyncio.ensure_future(relay.stop())
        await agent.until(lambda: agent.goaway is not None)
        assert agent.goaway == "session.relay_draining"
        assert await idle.rest() == b""  # after drain_idle_seconds
        agent.streams[0].answer(body=b"last")
        status, fields, body = await client.response()
        assert (status, body, fields[b"connection"]) == (200, b"last", [b"close"])
        await soon(stopping, 3)

    async def test_a_kept_connection_is_still_answered_and_told_to_close(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        client = await visit(GET)
        assert b"connection" not in (await client.response())[1]
        stopping = asyncio.ensure_future(relay.stop())
        await agent.until(lambda: agent.goaway is not None)
        client.send(GET)
        status, fields, _ = await client.response()
        assert (status, fields[b"connection"]) == (200, [b"close"])
        assert await client.rest() == b""
        await soon(stopping, 1)

    @pytest.mark.parametrize("relay_settings", [{"drain_idle_seconds": 0.1}])
    async def test_agents_have_until_the_limit_to_move_and_answer_until_we_close(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        agent.on_stream = lambda s: None
        client = await visit(GET)
        await agent.until(lambda: agent.streams)
        stopping = asyncio.ensure_future(relay.stop(moving=True))
        await agent.until(lambda: agent.goaway is not None)
        agent.streams[0].answer(body=b"one")
        assert (await client.response())[2] == b"one"
        await asyncio.sleep(0.5)
        assert not stopping.done()  # no visitor is left, but the agent has no other place yet
        agent.session.control(f.GOAWAY, 0, code="session.moved", detail="", retry_after_ms=0)
        await soon(stopping, 2)
        await agent.until(lambda: agent.lost is not None)

    @pytest.mark.parametrize("relay_settings", [{"drain_idle_seconds": 0.1, "drain_seconds": 0.5}])
    async def test_at_the_limit_what_is_left_ends_and_that_is_said(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit, caplog: pytest.LogCaptureFixture
    ) -> None:
        def switch(stream: ScriptedStream) -> None:
            stream.stream.send_response(101, [b"Switching Protocols", b"Upgrade", b"websocket"], False)

        agent.on_stream = switch
        client = await visit(
            b"GET / HTTP/1.1\r\nHost: web.localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        assert b"101" in await client.read_head()
        await asyncio.wait_for(relay.stop(), 30)
        assert await client.rest() == b""
        await agent.until(lambda: agent.streams[0].reset is not None)
        cut = next(record for record in caplog.records if "cut at the drain limit" in record.message)
        assert cut.f == {"connections": 1}  # type: ignore[attr-defined]

    @pytest.mark.parametrize("relay_settings", [{"drain_agents_per_second": 10}])
    async def test_many_agents_are_asked_one_after_the_other(self, relay: Relay) -> None:
        agents = [
            await ScriptedAgent().connect(port(relay, 0), session_token(f"ses_{n}", f"agt-{n}")) for n in range(20)
        ]
        for agent in agents:
            await agent.until(lambda agent=agent: agent.hello is not None)
        relay.agents.go_away()
        for agent in agents:
            await agent.until(lambda agent=agent: agent.goaway is not None)
        hints = sorted(agent.goaway_hint for agent in agents)
        assert hints[-1] <= 2000 and hints[-1] - hints[0] > 500  # twenty agents at ten a second: over two seconds
        for agent in agents:
            agent.close()


class TestLiveness:
    @pytest.mark.parametrize("relay_settings", [FAST])
    async def test_a_half_open_connection_is_noticed(self, relay: Relay, agent: ScriptedAgent) -> None:
        agent.session.put = lambda part: None  # type: ignore[method-assign]  # hears everything, says nothing
        since = Since()
        await agent.until(lambda: not relay.agents.connections)
        assert since.waited() < 2
        assert relay.agents.by_host == {}
