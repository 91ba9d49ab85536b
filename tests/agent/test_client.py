"""The agent's session: first start, refresh, reconnecting, draining, and what ends it. Real API and relay sockets."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from portico.agent import client
from portico.agent.api import Api
from portico.agent.client import Agent
from portico.agent.tunnel import public_url
from portico.settings import AgentSettings, Secret
from portico.wire import frames as f
from tests.agent.api_server import KEY, problem
from tests.agent.harness import Relay
from tests.agent.world import FAST, World
from tests.timing import Since


@pytest.mark.parametrize(
    ("domain", "url", "shown"),
    [
        (None, "https://web.localhost:7443", "https://web.localhost:7443"),
        ("WWW.Example.com.", "https://web.localhost:7443", "https://www.example.com:7443"),
        ("www.example.com", "tls://web.portico.test:443", "tls://www.example.com:443"),
        ("www.example.com", "https://web.portico.test", "https://www.example.com"),
        ("www.example.com", "", ""),
    ],
)
def test_a_tunnel_is_shown_by_its_own_domain(domain: str | None, url: str, shown: str) -> None:
    assert public_url({"protocol": "http", "domain": domain}, url) == shown


class TestStart:
    async def test_online(self, world: World) -> None:
        await world.start().online()
        (_, _, body, authorization) = world.api.calls[0]
        assert authorization == f"Bearer {KEY}"
        assert body["tunnels"] == [{"protocol": "http", "name": "web", "target": "http://localhost:8000"}]
        assert body["agent_id"].startswith("agt-") and body["hostname"] and body["version"]
        connection = world.relay.connections[0]
        assert connection.token == "token 1.0"
        assert connection.hello["connect"] == 1 and connection.hello["versions"] == [1]
        assert connection.grants == [(1, "web:1.0")]
        assert world.seen.tunnels == [("web", "online", "")] and world.seen.states[-1] == "online"
        assert await world.get() == b"hello"

    async def test_stop_lets_requests_finish_and_says_goodbye(self, world: World) -> None:
        await world.start().online()
        world.serves.wait = asyncio.Event()
        visit = world.relay.connections[0].get()
        await asyncio.sleep(0.05)
        world.agent.stop()
        await world.relay.until(lambda: world.relay.connections[0].goaway == "session.ended")
        assert not world.task.done()
        world.serves.wait.set()
        assert bytes((await visit.over()).body) == b"hello"
        assert await world.ended() is None
        assert world.api.calls[-1][:2] == ("DELETE", "/v1/agent/sessions/ses_1")
        assert world.seen.states[-1] == "ended"

    async def test_stop_answers_what_crossed_the_goodbye(self, world: World) -> None:
        await world.start().online()
        connection = world.relay.connections[0]
        crossed = []
        connection.on_goaway = lambda *_: crossed.append(connection.get())  # type: ignore[method-assign]
        world.agent.stop()
        assert await world.ended() is None
        assert bytes((await crossed[0].over()).body) == b"hello"

    async def test_stop_does_not_wait_for_ever(self, world: World) -> None:
        await world.start(AgentSettings(drain_seconds=0.2, goodbye_timeout_seconds=0.2)).online()
        world.serves.wait = asyncio.Event()
        visit = world.relay.connections[0].get()
        await asyncio.sleep(0.05)
        await world.api.stop()
        world.agent.stop()
        assert await world.ended(3) is None
        await visit.until(lambda: visit.reset)

    async def test_a_dead_api_is_said_at_once(self, world: World) -> None:
        await world.api.stop()
        err = await world.start().ended()
        assert err is not None and err.code == "api.unreachable"

    async def test_a_platform_that_does_not_know_its_relays_yet(self, world: World) -> None:
        """It has just started: the first heartbeat of its relay is still on its way."""
        world.api.refuse = problem(503, "edge.no_relay")
        world.start()
        await world.seen.until(lambda: "connecting" in world.seen.states)
        assert len(world.api.calls) >= 3
        world.api.refuse = None
        await world.online()

    async def test_one_without_relays_is_said_after_a_while(self, world: World) -> None:
        world.api.refuse = problem(503, "edge.no_relay")
        err = await world.start(dataclasses.replace(FAST, first_relay_seconds=0.3)).ended()
        assert err is not None and err.code == "edge.no_relay"
        assert len(world.api.calls) > 1

    async def test_stop_while_it_waits_for_a_relay(self, world: World) -> None:
        world.api.refuse = problem(503, "edge.no_relay")
        world.start()
        await world.seen.until(lambda: "connecting" in world.seen.states)
        world.agent.stop()
        assert await world.ended() is None
        assert world.seen.states[-1] == "ended"

    @pytest.mark.parametrize("code", ["auth.key_invalid", "auth.key_revoked"])
    async def test_a_refused_key(self, world: World, code: str) -> None:
        world.api.refuse = problem(401, code)
        err = await world.start().ended()
        assert err is not None and (err.code, err.hint) == (code, f"hint of {code}")

    async def test_an_answer_of_something_else(self, world: World) -> None:
        world.api.refuse = (200, {"hello": "world"})
        err = await world.start().ended()
        assert err is not None and err.code == "api.unexpected"

    async def test_a_tunnel_in_use(self, world: World) -> None:
        world.relay.on_bind = lambda *_: "tunnel.in_use"
        err = await world.start().ended()
        assert err is not None and err.code == "tunnel.in_use"

    async def test_a_refusal_of_a_newer_relay_keeps_its_words(self, world: World) -> None:
        world.relay.on_bind = lambda *_: "tunnel.invented_later"
        await world.start().seen.until(lambda: world.seen.tunnels)
        assert world.seen.tunnels[0] == ("web", "offline", "tunnel.refused")  # retryable: it tries on
        world.relay.on_bind = lambda *_: None
        await world.online()

    async def test_one_refused_tunnel_does_not_end_the_others(self, world: World) -> None:
        world.relay.on_bind = lambda c, bind, grant: "tunnel.in_use" if bind == 1 else None
        await world.start(names=("a", "b")).online()
        await world.seen.until(lambda: len(world.seen.tunnels) == 2)
        assert world.seen.tunnels == [("a", "ended", "tunnel.in_use"), ("b", "online", "")]

    async def test_a_relay_that_comes_later(self, world: World) -> None:
        port = world.relay.port
        await world.relay.stop()
        world.start()
        await world.seen.until(lambda: world.seen.states.count("connecting") >= 2)
        await world.relay.start(port)
        await world.online()

    async def test_the_second_edge_when_the_first_is_dead(self, world: World) -> None:
        world.api.edges = ["ws://127.0.0.1:1/v1/connect", world.relay.url]
        await world.start().online()

    async def test_a_relay_that_says_nothing(self, world: World) -> None:
        world.relay.mute = True
        settings = AgentSettings(connect_timeout_seconds=0.2, reconnect_first_seconds=0.05)
        world.start(settings)
        await world.seen.until(lambda: "connecting" in world.seen.states)
        world.relay.mute = False
        await world.online()


class TestReconnect:
    async def test_a_cut_connection_is_back_at_once(self, world: World) -> None:
        await world.start().online()
        for number in range(2, 5):
            since = Since()
            world.relay.connections[-1].carrier.abort("cut")
            await world.relay.until(lambda number=number: len(world.relay.connections) == number)  # type: ignore[misc]
            await world.online(number)
            assert since.waited() < 1.0
            connection = world.relay.connections[-1]
            assert connection.hello["connect"] == number and connection.grants[0] == (1, "web:1.0")
        assert await world.get() == b"hello"
        assert world.api.count("POST /v1/agent/sessions") == 1  # the tokens were good: nobody was asked
        assert ("web", "offline", "edge.agent_unreachable") in world.seen.tunnels

    async def test_back_off_doubles_with_full_jitter(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        ceilings: list[float] = []
        monkeypatch.setattr(client.random, "uniform", lambda low, high: ceilings.append(high) or 0.0)
        world.http = Api(world.api.url, Secret(KEY), AgentSettings())
        agent = Agent(AgentSettings(), world.http, [])
        for attempt in (0, 1, 2, 5, 9, 1000):
            await agent._pause(attempt)
        assert ceilings == [0.2, 0.4, 0.8, 6.4, 30.0, 30.0]

    async def test_api_and_relay_away_then_back(self, world: World) -> None:
        world.api.life = -10.0  # expired already: the relay decides
        await world.start().online()
        ports = world.api.port, world.relay.port
        token = world.relay.connections[-1].token
        await world.api.stop()
        await world.relay.stop()
        await world.seen.until(lambda: world.seen.states.count("reconnecting") >= 3)
        await world.relay.start(ports[1])
        await world.online(2)  # with the tokens it has
        assert world.relay.connections[-1].token == token
        await world.api.start(ports[0])
        world.relay.connections[-1].carrier.abort("cut")
        await world.online(3)
        assert world.relay.connections[-1].token != token

    @pytest.mark.parametrize("code", ["session.token_expired", "session.token_invalid", "session.not_found"])
    async def test_a_refused_token_asks_for_a_new_session(self, world: World, code: str) -> None:
        await world.start().online()
        agent_id = world.agent.agent_id
        world.relay.refuse = {"status": 401, "code": code, "detail": "old"}
        world.relay.connections[-1].carrier.abort("cut")
        await world.relay.until(lambda: world.relay.refused)
        world.relay.refuse = None
        await world.online(2)
        assert world.relay.connections[-1].token != "token 1.0"
        opened = [body for method, path, body, _ in world.api.calls if path == "/v1/agent/sessions"]
        assert len(opened) >= 2 and {body["agent_id"] for body in opened} == {agent_id}

    async def test_an_error_frame_about_the_token_asks_too(self, world: World) -> None:
        await world.start().online()
        world.relay.connections[-1].end("session.token_expired")
        await world.online(2)
        assert world.relay.connections[-1].token == "token 2.0"

    async def test_in_use_later_is_tried_again(self, world: World) -> None:
        await world.start().online()
        world.relay.on_bind = lambda *_: "tunnel.in_use"
        world.relay.connections[-1].carrier.abort("cut")
        await world.seen.until(lambda: world.seen.tunnels.count(("web", "offline", "tunnel.in_use")) >= 2)
        world.relay.on_bind = lambda *_: None
        await world.online(2)

    async def test_a_made_up_name_is_kept(self, world: World) -> None:
        world.http = Api(world.api.url, Secret(KEY), FAST)
        world.agent = Agent(FAST, world.http, [({}, world.serves, "x")], world.seen)
        world.task = asyncio.create_task(world.agent.run())
        await world.online()
        world.relay.connections[-1].end("session.token_expired")
        await world.online(2)
        assert world.api.calls[0][2]["tunnels"][0].get("name") is None
        assert world.api.calls[1][2]["tunnels"][0]["name"] == "made-up"

    async def test_a_half_open_connection_is_noticed(self, world: World) -> None:
        world.relay.pings = {"ping_interval_ms": 100, "ping_timeout_ms": 100}
        await world.start().online()
        old = world.relay.connections[-1]
        assert old.carrier.transport is not None
        old.carrier.transport.underlying_transport.pause_reading()
        await world.relay.until(lambda: len(world.relay.connections) == 2)
        await world.online(2)

    async def test_a_relay_that_does_not_answer_a_bind_is_left(self, world: World) -> None:
        world.relay.on_bind = lambda *_: "" if len(world.relay.connections) == 1 else None
        await world.start(dataclasses.replace(FAST, bind_timeout_seconds=0.2)).online()
        assert len(world.relay.connections) == 2
        await asyncio.sleep(0.4)  # and one that answered is kept
        assert len(world.relay.connections) == 2 and not world.relay.connections[1].lost


class TestDrain:
    async def test_the_replacement_comes_first(self, world: World) -> None:
        other = await Relay().start()
        try:
            world.api.edges = [world.relay.url, other.url]
            await world.start().online()
            world.serves.wait = asyncio.Event()
            old = world.relay.connections[0]
            visit = old.get()
            old.session.control(f.GOAWAY, 0, code="session.relay_draining", detail="bye", retry_after_ms=100)
            new = await other.bound()
            assert not old.lost and new.hello["connect"] == 2
            assert ("web", "offline", "") not in world.seen.tunnels and "reconnecting" not in world.seen.states
            await world.relay.until(lambda: old.goaway == "session.moved")
            world.serves.wait.set()
            assert bytes((await visit.over()).body) == b"hello"
            # Visitors who are still connected to the old relay are served until it closes the link.
            assert (await old.get().over()).status == 200
            old.carrier.end(1001, "relay shut down")  # type: ignore[arg-type]
            await world.relay.until(lambda: old.lost)
            assert not new.lost
            assert (await new.get().over()).status == 200
        finally:
            await other.stop()

    async def test_ports_are_given_back_when_there_is_a_replacement(self, world: World) -> None:
        """Two relays cannot have the port of a TCP tunnel at once; a host they can."""
        other = await Relay().start()
        try:
            world.api.edges = [world.relay.url, other.url]
            world.start(names=("web", "ssh"))
            world.agent.tunnels[1].spec["protocol"] = "tcp"
            await world.online(2)
            old = world.relay.connections[0]
            refusal = {"status": 503, "code": "session.relay_draining", "detail": "not yet"}
            world.relay.refuse = other.refuse = refusal
            old.session.control(f.GOAWAY, 0, code="session.relay_draining", detail="bye", retry_after_ms=0)
            await other.until(lambda: other.refused >= 2)
            assert old.unbinds == []
            other.refuse = None
            await other.bound(2)
            await world.relay.until(lambda: old.unbinds)
            assert old.unbinds == [2]
        finally:
            await other.stop()

    async def test_the_old_one_serves_until_there_is_a_new_one(self, world: World) -> None:
        await world.start().online()
        old = world.relay.connections[0]
        world.relay.refuse = {"status": 503, "code": "session.relay_draining", "detail": "stopping"}
        old.session.control(f.GOAWAY, 0, code="session.relay_draining", detail="bye", retry_after_ms=0)
        await world.relay.until(lambda: world.relay.refused >= 3)
        assert bytes((await old.get().over()).body) == b"hello"
        world.relay.refuse = None
        await world.relay.until(lambda: len(world.relay.connections) == 2)


class TestRefresh:
    async def test_before_expiry(self, world: World) -> None:
        world.api.refresh_after = 1.0
        await world.start().online()
        connection = world.relay.connections[0]
        await world.relay.until(lambda: connection.auths)
        await world.relay.until(lambda: len(connection.grants) == 2)
        assert connection.auths == ["token 1.1"] and connection.grants[1] == (1, "web:1.1")
        assert len(world.relay.connections) == 1 and world.seen.tunnels == [("web", "online", "")]

    async def test_an_api_that_is_away_is_asked_again_and_the_session_stays(self, world: World) -> None:
        world.api.refresh_after = 1.0
        world.api.refuse = None
        await world.start().online()
        world.api.refuse = problem(503, "service.unavailable")
        await world.seen.until(lambda: len(world.seen.warnings) >= 1)
        assert await world.get() == b"hello"
        world.api.refuse = None
        await world.relay.until(lambda: world.relay.connections[0].auths, 10)

    async def test_a_session_that_is_gone_is_opened_anew(self, world: World) -> None:
        world.api.refresh_after = 1.0
        world.api.routes["POST /v1/agent/sessions/ses_1/refresh"] = lambda body: problem(404, "session.not_found")
        await world.start().online()
        await world.relay.until(lambda: world.relay.connections[0].auths)
        assert world.relay.connections[0].auths[0] == "token 2.0"

    async def test_another_session_gets_a_connection_of_its_own(self, world: World) -> None:
        world.api.refresh_after = 1.0
        await world.start().online()
        world.api.routes["POST /v1/agent/sessions/ses_1/refresh"] = lambda body: problem(404, "session.not_found")
        world.api.session = "ses_2"
        await world.relay.until(lambda: len(world.relay.connections) >= 2)
        await world.relay.bound()

    async def test_a_revoked_key_ends_it(self, world: World) -> None:
        world.api.refresh_after = 1.0
        await world.start().online()
        world.api.refuse = problem(401, "auth.key_revoked")
        err = await world.ended()
        assert err is not None and err.code == "auth.key_revoked"

    @pytest.mark.parametrize("code", ["tunnel.grant_expired", "tunnel.grant_stale"])
    async def test_an_unbound_old_grant_is_renewed(self, world: World, code: str) -> None:
        await world.start().online()
        world.relay.connections[0].unbind(1, code)
        await world.online(2)
        assert world.relay.connections[0].grants[-1] == (1, "web:1.1")


class TestEnd:
    @pytest.mark.parametrize("code", ["tunnel.stopped", "tunnel.deleted", "tunnel.suspended"])
    async def test_the_platform_ends_the_tunnel(self, world: World, code: str) -> None:
        await world.start().online()
        world.relay.connections[0].unbind(1, code)
        err = await world.ended()
        assert err is not None and err.code == code
        assert world.seen.tunnels[-1] == ("web", "ended", code)

    async def test_the_others_go_on(self, world: World) -> None:
        await world.start(names=("a", "b")).online(2)
        world.relay.connections[0].unbind(1, "tunnel.stopped")
        await world.seen.until(lambda: ("a", "ended", "tunnel.stopped") in world.seen.tunnels)
        visit = await world.relay.connections[0].request([b"GET", b"/"], bind=2).over()
        assert visit.status == 200
        world.relay.connections[0].carrier.abort("cut")
        await world.online(3)
        assert [bind for bind, _ in world.relay.connections[1].grants] == [2]

    async def test_a_revoked_session(self, world: World) -> None:
        await world.start().online()
        world.relay.connections[0].end("session.revoked")
        err = await world.ended()
        assert err is not None and err.code == "session.revoked"

    async def test_revoked_while_away(self, world: World) -> None:
        await world.start().online()
        world.relay.refuse = {"status": 403, "code": "session.revoked", "detail": "over"}
        world.relay.connections[0].carrier.abort("cut")
        err = await world.ended()
        assert err is not None and err.code == "session.revoked"

    async def test_a_relay_of_another_version(self, world: World) -> None:
        await world.start().online()
        world.relay.connections[0].end("wire.version_unsupported")
        err = await world.ended()
        assert err is not None and err.code == "wire.version_unsupported"
