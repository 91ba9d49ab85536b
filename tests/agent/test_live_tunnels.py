"""Tunnels that come, go and change in a running session, over real API and relay sockets."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from portico.agent.tunnel import Tunnel
from portico.wire import frames as f
from tests.agent.api_server import problem
from tests.agent.harness import RelayConnection
from tests.agent.world import FAST, Hello, World

HERE = "http://localhost:8000"


def spec(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "protocol": "http", **more}


def named(world: World, name: str) -> Tunnel:
    return next(t for t in world.agent.tunnels if t.name == name)


async def body_of(connection: RelayConnection, bind: int) -> bytes:
    visit = await connection.request([b"GET", b"/", b"Host", b"x"], bind=bind).over()
    assert visit.status == 200, visit.reset
    return bytes(visit.body)


class TestAdd:
    async def test_it_is_bound_on_the_running_connection(self, world: World) -> None:
        await world.start().online()
        world.agent.add(spec("api"), Hello(), HERE)
        await world.online(2)
        (connection,) = world.relay.connections
        assert [bind for bind, _ in connection.grants] == [1, 2]
        assert await body_of(connection, 2) == b"hello"
        method, path, body, _ = world.api.calls[-1]
        assert (method, path) == ("POST", "/v1/agent/sessions/ses_1/tunnels")
        assert body == {"name": "api", "protocol": "http", "target": HERE}
        assert world.api.count("POST /v1/agent/sessions") == 1

    async def test_a_refused_one_does_not_disturb_the_others(self, world: World) -> None:
        await world.start().online()
        world.api.refuse_names["api"] = problem(409, "tunnel.subdomain_taken")
        world.agent.add(spec("api"), Hello(), HERE)
        await world.seen.until(lambda: ("api", "ended", "tunnel.subdomain_taken") in world.seen.tunnels)
        assert await world.get() == b"hello" and not world.task.done()

    async def test_it_waits_for_an_api_that_is_away(self, world: World) -> None:
        await world.start().online()
        world.api.refuse = problem(503, "service.unavailable")
        world.agent.add(spec("api"), Hello(), HERE)
        await world.seen.until(lambda: world.seen.warnings)
        assert "api waits for the API" in world.seen.warnings[0]
        world.api.refuse = None
        await world.online(2)

    async def test_a_session_that_ended_meanwhile_is_opened_anew_with_it(self, world: World) -> None:
        await world.start().online()
        gone = problem(404, "session.not_found")
        world.api.routes["POST /v1/agent/sessions/ses_1/tunnels"] = lambda body: gone
        world.api.routes["POST /v1/agent/sessions/ses_1/refresh"] = lambda body: gone
        world.agent.add(spec("api"), Hello(), HERE)
        await world.online(2)
        opened = [c for c in world.api.calls if c[1] == "/v1/agent/sessions"]
        assert [s["name"] for s in opened[-1][2]["tunnels"]] == ["web", "api"]

    async def test_one_that_is_added_before_the_session_is_open(self, world: World) -> None:
        world.start()
        world.agent.add(spec("api"), Hello(), HERE)
        await world.online(2)
        late: list[Tunnel] = []
        really = world.api.routes["POST /v1/agent/sessions"]

        def slow(body: dict[str, Any]) -> Any:
            late.append(world.agent.add(spec("late"), Hello(), HERE))
            return really(body)

        world.api.routes["POST /v1/agent/sessions"] = slow
        world.api.routes["POST /v1/agent/sessions/ses_1/tunnels"] = lambda body: problem(404, "session.not_found")
        world.relay.connections[-1].end("session.token_expired")
        await world.seen.until(lambda: late)
        world.api.routes["POST /v1/agent/sessions/ses_1/tunnels"] = world.api.add
        await world.seen.until(lambda: ("late", "online", "") in world.seen.tunnels)

    async def test_it_is_there_after_a_reconnect(self, world: World) -> None:
        await world.start().online()
        world.agent.add(spec("api"), Hello(), HERE)
        await world.online(2)
        world.relay.connections[-1].carrier.abort("cut")
        await world.online(4)
        assert [bind for bind, _ in world.relay.connections[-1].grants] == [1, 2]


class TestRemove:
    async def test_its_requests_in_flight_finish(self, world: World) -> None:
        await world.start(names=("web", "api")).online(2)
        world.serves.wait = asyncio.Event()
        (connection,) = world.relay.connections
        visit = connection.request([b"GET", b"/", b"Host", b"x"], bind=2)
        await asyncio.sleep(0.05)
        world.agent.remove(named(world, "api"))
        await world.relay.until(lambda: connection.unbinds == [2])
        world.serves.wait.set()
        assert bytes((await visit.over()).body) == b"hello"
        await world.relay.until(
            lambda: world.api.calls[-1][:2] == ("DELETE", "/v1/agent/sessions/ses_1/tunnels/tun_api")
        )
        assert world.seen.tunnels[-1] == ("api", "removed", "")
        assert await body_of(connection, 1) == b"hello"

    async def test_nothing_holds_it_after_the_drain_limit(self, world: World) -> None:
        await world.start(dataclasses.replace(FAST, drain_seconds=0.1), names=("web", "api")).online(2)
        link = world.agent.link
        assert link is not None
        world.agent.remove(named(world, "api"))
        assert set(link.bound) == {1, 2}  # requests that cross the UNBIND are still answered
        await world.seen.until(lambda: set(link.bound) == {1})

    async def test_without_any_the_session_stays(self, world: World) -> None:
        await world.start().online()
        world.agent.remove(named(world, "web"))
        await asyncio.sleep(0.1)
        assert not world.task.done()
        world.agent.add(spec("api"), Hello(), HERE)
        await world.seen.until(lambda: ("api", "online", "") in world.seen.tunnels)

    async def test_a_bound_that_crosses_the_removal_is_given_back(self, world: World) -> None:
        await world.start().online()
        world.relay.on_bind = lambda connection, bind, grant: "" if grant.startswith("slow") else None
        tunnel = world.agent.add(spec("slow"), Hello(), HERE)
        (connection,) = world.relay.connections
        await world.relay.until(lambda: len(connection.grants) == 2)
        world.agent.remove(tunnel)
        connection.session.control(f.BOUND, 2, tunnel="tun_slow", name="slow", url="http://slow")
        await world.relay.until(lambda: connection.unbinds == [2, 2])
        assert ("slow", "online", "") not in world.seen.tunnels


class TestChange:
    async def test_a_new_target_takes_over_without_a_moment_offline(self, world: World) -> None:
        await world.start().online()
        (connection,) = world.relay.connections
        world.serves.wait = asyncio.Event()
        before = connection.get()
        await asyncio.sleep(0.05)
        new = Hello()
        world.agent.change(named(world, "web"), spec("web"), new, "http://localhost:9000")
        assert await world.get() == b"hello" and new.task.done()
        world.serves.wait.set()
        assert bytes((await before.over()).body) == b"hello"
        await world.relay.until(lambda: world.api.calls[-1][1].endswith("/tunnels"))
        assert world.api.calls[-1][2]["target"] == "http://localhost:9000"
        assert connection.unbinds == [] and ("web", "offline", "") not in world.seen.tunnels

    async def test_another_address_is_bound_under_the_same_id(self, world: World) -> None:
        await world.start().online()
        tunnel = named(world, "web")
        world.agent.change(tunnel, spec("web", subdomain="shop"), world.serves, HERE)
        (connection,) = world.relay.connections
        await world.relay.until(lambda: len(connection.grants) == 2)
        assert [bind for bind, _ in connection.grants] == [1, 1] and world.api.calls[-1][2]["subdomain"] == "shop"

    async def test_the_last_wish_wins(self, world: World) -> None:
        await world.start().online()
        tunnel = named(world, "web")
        for port in (1, 2, 3):
            world.agent.change(tunnel, spec("web"), world.serves, f"http://localhost:{port}")
        await world.relay.until(lambda: world.api.calls[-1][2].get("target") == "http://localhost:3")
        await asyncio.sleep(0.05)
        assert world.api.calls[-1][2]["target"] == "http://localhost:3"

    async def test_a_refused_change_leaves_the_tunnel_as_it_was(self, world: World) -> None:
        await world.start().online()
        world.api.refuse_names["web"] = problem(409, "tunnel.subdomain_taken", "taken by others")
        world.agent.change(named(world, "web"), spec("web", subdomain="shop"), world.serves, HERE)
        await world.seen.until(lambda: world.seen.warnings)
        assert "web: the change was refused: taken by others" in world.seen.warnings
        assert await world.get() == b"hello" and named(world, "web").state == "online"

    async def test_a_refused_change_does_not_end_the_tunnel_at_the_next_session(self, world: World) -> None:
        await world.start(names=("web", "api")).online(2)
        world.api.refuse_names["web"] = problem(409, "tunnel.subdomain_taken", "taken by others")
        world.agent.change(named(world, "web"), spec("web", subdomain="shop"), world.serves, HERE)
        await world.seen.until(lambda: world.seen.warnings)
        world.api.refuse_names.clear()
        world.relay.connections[-1].end("session.token_expired")
        await world.seen.until(lambda: world.api.count("POST /v1/agent/sessions") == 2)
        opened = [c for c in world.api.calls if c[1] == "/v1/agent/sessions"][-1][2]["tunnels"]
        assert [s.get("subdomain") for s in opened] == [None, None]
        await world.online(4)


class TestRefusedAtTheStart:
    async def test_the_others_start(self, world: World) -> None:
        world.api.refuse_names["b"] = problem(409, "tunnel.subdomain_taken")
        await world.start(names=("a", "b", "c")).online(2)
        assert ("b", "ended", "tunnel.subdomain_taken") in world.seen.tunnels
        (connection,) = world.relay.connections
        assert [bind for bind, _ in connection.grants] == [1, 3]

    async def test_all_refused_end_the_agent(self, world: World) -> None:
        for name in ("a", "b"):
            world.api.refuse_names[name] = problem(409, "tunnel.subdomain_taken")
        err = await world.start(names=("a", "b")).ended()
        assert err is not None and err.code == "tunnel.subdomain_taken"
        assert {t[:2] for t in world.seen.tunnels} == {("a", "ended"), ("b", "ended")}

    async def test_an_api_that_goes_away_in_the_middle_of_asking_for_each(self, world: World) -> None:
        await world.start(names=("a", "b", "c")).online(3)
        world.api.refuse_names["a"] = problem(409, "tunnel.suspended")
        add, away = world.api.add, [True]
        world.api.routes["POST /v1/agent/sessions/ses_1/tunnels"] = lambda body: (
            problem(503, "service.unavailable") if body["name"] == "c" and away else add(body)
        )
        world.relay.connections[-1].end("session.token_expired")
        await world.seen.until(lambda: ("a", "ended", "tunnel.suspended") in world.seen.tunnels)
        await world.seen.until(lambda: any("c waits for the API" in text for text in world.seen.warnings))
        away.clear()
        await world.relay.until(lambda: len(world.relay.connections) == 2)  # the one before had three
        connection = await world.relay.bound(2)
        assert {grant.split(":")[0] for _, grant in connection.grants} == {"b", "c"}

    @pytest.mark.parametrize("code", ["auth.key_revoked", "edge.no_relay"])
    async def test_what_is_not_about_a_tunnel_ends_it_or_is_said(self, world: World, code: str) -> None:
        world.api.refuse = problem(403 if code.startswith("auth") else 503, code)
        err = await world.start(dataclasses.replace(FAST, first_relay_seconds=0), names=("a", "b")).ended()
        assert err is not None and err.code == code
        assert len(world.api.calls) == 1


class TestFinish:
    async def test_the_last_one_ends_the_agent_without_a_problem(self, world: World) -> None:
        await world.start(names=("a", "b")).online(2)
        world.agent.finish(named(world, "a"))
        assert not world.task.done()
        world.agent.finish(named(world, "b"))
        assert await world.ended() is None
        assert world.api.calls[-1][:2] == ("DELETE", "/v1/agent/sessions/ses_1")

    async def test_a_refusal_before_it_is_what_the_agent_ends_with(self, world: World) -> None:
        await world.start(names=("a", "b")).online(2)
        world.relay.connections[0].unbind(1, "tunnel.stopped")
        await world.seen.until(lambda: named(world, "a").over)
        world.agent.finish(named(world, "b"))
        err = await world.ended()
        assert err is not None and err.code == "tunnel.stopped"
