"""Customers' names at the relay: they lead to tunnels by the edge stream, at once, and disturb no agent."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from portico.relay.edge_rows import SnapshotInvalid
from portico.relay.server import Relay
from portico.relay.snapshot import Change, Snapshot
from portico.relay.snapshot_store import SnapshotStore
from tests.relay.doubles import Client, ScriptedAgent, grant, port, row, session_token
from tests.relay.test_challenges import tell
from tests.relay.test_peers import agent as peers_agent
from tests.relay.test_peers import pair
from tests.relay.test_peers import visit as visit_at

__all__ = ["pair", "peers_agent"]

Visit = Callable[..., Awaitable[Client]]


def domain(host: str, tunnel: str = "tun_web", id: str | None = None, **more: Any) -> dict[str, Any]:
    made = {"id": id or f"dom_{host}", "host": host, "tunnel": tunnel, "tls": "terminate", **more}
    return {"kind": "domain", "domain": made}


def removed(host: str) -> dict[str, Any]:
    return {"kind": "domain_removed", "id": f"dom_{host}"}


def get(host: str) -> bytes:
    return f"GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


async def ask(client: Client, host: str) -> tuple[int, bytes | None]:
    """Status and code of a request for a host."""
    client.send(get(host))
    status, fields, _ = await client.response()
    return status, next(iter(fields.get(b"portico-error", [])), None)


def closed(host: str, code: str = "edge.domain_blocked", id: str | None = None) -> dict[str, Any]:
    return {"kind": "domain_closed", "domain": {"id": id or f"dom_{host}", "host": host, "code": code}}


BLOCKED = (403, b"edge.domain_blocked")
FROZEN = (403, b"edge.domain_frozen")
UNASSIGNED = (404, b"edge.host_unassigned")
OFFLINE = (404, b"edge.tunnel_offline")


class TestLeading:
    async def test_there_and_back_on_one_connection(self, relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
        """Also when its requests take the short way by then."""
        client = await visit()
        assert await ask(client, "www.example.com") == UNASSIGNED
        tell(relay, domain("www.example.com"))
        for _ in range(4):
            assert await ask(client, "www.example.com") == (200, None)
        assert await ask(client, "web.localhost") == (200, None)
        tell(relay, removed("www.example.com"))
        assert await ask(client, "www.example.com") == UNASSIGNED
        assert await ask(client, "web.localhost") == (200, None)
        assert not agent.unbound

    async def test_what_is_served_to_nobody_says_so(self, relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
        """On a connection that was served a moment ago, too; and until it leads somewhere, or is gone."""
        client = await visit()
        tell(relay, domain("www.example.com"), closed("shop.example.com", "edge.domain_frozen"))
        assert await ask(client, "www.example.com") == (200, None)
        assert await ask(client, "shop.example.com") == FROZEN
        tell(relay, removed("www.example.com"), closed("www.example.com"))
        assert await ask(client, "www.example.com") == BLOCKED
        assert await ask(client, "other.example.com") == UNASSIGNED
        assert await ask(client, "web.localhost") == (200, None)
        tell(relay, domain("www.example.com"), removed("shop.example.com"))
        assert await ask(client, "www.example.com") == (200, None)
        assert await ask(client, "shop.example.com") == UNASSIGNED
        tell(relay, closed("new.example.com", "edge.of_tomorrow"))
        assert await ask(client, "new.example.com") == BLOCKED

    async def test_a_wildcard_does_not_serve_what_is_blocked_below_it(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        tell(
            relay, domain("*.example.com"), closed("bad.example.com"), closed("*.example.org"), domain("ok.example.org")
        )
        client = await visit()
        for host, wanted in (
            ("bad.example.com", BLOCKED),
            ("good.example.com", (200, None)),
            ("any.example.org", BLOCKED),
            ("ok.example.org", (200, None)),
            ("a.any.example.org", UNASSIGNED),
            ("example.org", UNASSIGNED),
        ):
            assert await ask(client, host) == wanted, host
        # Whoever takes a blocked name's place by another claim is not ended by the end of the old one.
        tell(relay, domain("bad.example.com", id="dom_new"), removed("bad.example.com"))
        assert await ask(client, "bad.example.com") == (200, None)

    def test_the_copy_on_disk_knows_them(self, tmp_path: Path) -> None:
        held = Snapshot()
        state = {"keys": [], "tunnels": [], "ended": [], "organizations": [], "domains": []}
        shut = closed("www.example.com")["domain"]
        held.apply({"type": "snapshot", "version": 7, "state": {**state, "closed_domains": [shut]}})
        frozen = held.frozen()
        assert frozen is not None
        again = Snapshot()
        again.apply(json.loads(frozen.encode()))
        assert again.closed("www.example.com") == "edge.domain_blocked"
        # One that tells of none, and one of before, know none.
        for without in ({**state, "closed_domains": []}, state):
            again.apply({"type": "snapshot", "version": 8, "state": without})
            assert again.closed("www.example.com") is None

    async def test_what_is_known_before_the_tunnel_is_live(self, relay: Relay, visit: Visit) -> None:
        tell(relay, {"kind": "tunnel", "tunnel": row("web")}, domain("www.example.com"), domain("*.example.org"))
        client = await visit()
        for host in ("www.example.com", "x.example.org"):
            assert await ask(client, host) == OFFLINE
        agent = await (await ScriptedAgent().connect(port(relay, 0), session_token())).online()
        for host in ("www.example.com", "x.example.org"):
            assert await ask(client, host) == (200, None)
        agent.close()

    async def test_wildcards(self, relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
        other = await agent_of(relay, "other")
        tell(relay, domain("*.example.com"), domain("api.example.com", "tun_other"))
        client = await visit()
        for host, wanted in (
            ("a.example.com", (200, None)),
            ("A.Example.COM:80", (200, None)),
            ("a.b.example.com", UNASSIGNED),
            ("example.com", UNASSIGNED),
            ("com", UNASSIGNED),
        ):
            assert await ask(client, host) == wanted, host
        before = len(other.streams)
        assert await ask(client, "api.example.com") == (200, None)  # the very name wins
        assert len(other.streams) == before + 1
        tell(relay, removed("api.example.com"))
        assert await ask(client, "api.example.com") == (200, None)
        assert len(other.streams) == before + 1
        tell(relay, removed("*.example.com"))
        assert await ask(client, "a.example.com") == UNASSIGNED
        other.close()

    async def test_it_moves_between_live_tunnels(self, relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
        other = await agent_of(relay, "other")
        client = await visit()
        for tunnel, serves in (("tun_web", agent), ("tun_other", other), ("tun_web", agent)) * 2:
            tell(relay, domain("www.example.com", tunnel))
            before = len(serves.streams)
            assert await ask(client, "www.example.com") == (200, None)
            assert len(serves.streams) == before + 1
        other.close()

    async def test_a_claim_that_another_took_over(self, relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
        """The new holder's row may come before the old one's end."""
        other = await agent_of(relay, "other")
        tell(relay, domain("www.example.com", id="dom_old"))
        tell(relay, domain("www.example.com", "tun_other", id="dom_new"), {"kind": "domain_removed", "id": "dom_old"})
        client = await visit()
        before = len(other.streams)
        assert await ask(client, "www.example.com") == (200, None)
        assert len(other.streams) == before + 1
        other.close()

    async def test_at_a_peer(self, pair: tuple[Relay, Relay], peers_agent: ScriptedAgent) -> None:
        front, owner = pair
        for relay in pair:
            tell(relay, domain("www.example.com"), domain("*.example.org"))
        async with asyncio.timeout(30):
            while b"*.example.org" not in front.peers.by_host:
                await asyncio.sleep(0.01)
        client = await visit_at(front, b"")
        for host in ("www.example.com", "x.example.org"):
            assert await ask(client, host) == (200, None), host
        for relay in pair:
            tell(relay, removed("www.example.com"))
        async with asyncio.timeout(30):
            while b"www.example.com" in front.peers.by_host:
                await asyncio.sleep(0.01)
        assert await ask(client, "www.example.com") == UNASSIGNED
        assert owner.agents.by_tunnel["tun_web"].hosts == (b"web.localhost", b"*.example.org")


class TestStrict:
    async def test_plain_http_is_refused_and_the_tunnels_own_host_is_not(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        client = await visit()
        tell(relay, domain("www.example.com"))
        for _ in range(4):
            assert await ask(client, "www.example.com") == (200, None)
        tell(relay, domain("www.example.com", valid_until=time.time() + 60))
        assert await ask(client, "www.example.com") == (421, b"edge.tls_mode_mismatch")
        assert await ask(client, "web.localhost") == (200, None)
        policy = {"plain_http": "redirect"}
        tell(relay, {"kind": "tunnel", "tunnel": row("web", policy=policy, policy_version=2)})
        assert await ask(client, "www.example.com") == (308, b"edge.https_redirect")
        tell(relay, domain("www.example.com"), {"kind": "tunnel", "tunnel": row("web", policy={}, policy_version=3)})
        assert await ask(client, "www.example.com") == (200, None)

    async def test_at_a_peer_too(self, pair: tuple[Relay, Relay], peers_agent: ScriptedAgent) -> None:
        front, _ = pair
        for relay in pair:
            tell(relay, domain("www.example.com"))
        async with asyncio.timeout(30):
            while b"www.example.com" not in front.peers.by_host:
                await asyncio.sleep(0.01)
        client = await visit_at(front, b"")
        assert await ask(client, "www.example.com") == (200, None)
        tell(front, domain("www.example.com", valid_until=time.time() + 60))
        assert await ask(client, "www.example.com") == (421, b"edge.tls_mode_mismatch")


class TestExpired:
    """Behind a proxy that ends TLS, so that no certificate of ours is in play: what decides is the time alone."""

    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"trusted_proxies": ("127.0.0.0/8",)}

    async def test_it_ends_with_the_certificate_without_a_word(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = time.time()
        tell(relay, domain("www.example.com", valid_until=now + 100))
        client = await visit()

        async def secure() -> tuple[int, bytes | None]:
            client.send(get("www.example.com").replace(b"\r\n\r\n", b"\r\nX-Forwarded-Proto: https\r\n\r\n"))
            status, fields, _ = await client.response()
            return status, next(iter(fields.get(b"portico-error", [])), None)

        for _ in range(4):
            assert await secure() == (200, None)
        monkeypatch.setattr("portico.relay.decide.time.time", lambda: now + 101)
        assert await secure() == (503, b"edge.certificate_unavailable")
        tell(relay, domain("www.example.com", valid_until=now + 1000))  # renewed
        assert await secure() == (200, None)
        assert await ask(client, "www.example.com") == (421, b"edge.tls_mode_mismatch")


class TestState:
    def whole(self, version: int, *rows: dict[str, Any]) -> dict[str, Any]:
        state = {"keys": [], "tunnels": [row("web")], "ended": [], "organizations": []}
        return {"type": "snapshot", "version": version, "state": {**state, "domains": [r["domain"] for r in rows]}}

    def test_a_snapshot_replaces_them_and_says_which_tunnels(self) -> None:
        snapshot, seen = Snapshot(), list[Change]()
        snapshot.apply(self.whole(1, domain("a.example.com"), domain("*.example.org")))
        assert snapshot.complete and snapshot.wildcards == 1
        snapshot.on_change(seen.append)
        snapshot.apply(self.whole(2, domain("a.example.com", "tun_b")))
        assert {(change.id, change.tunnels) for change in seen} == {
            ("dom_*.example.org", ("tun_web",)), ("dom_a.example.com", ("tun_web", "tun_b")),
        }  # fmt: skip
        assert snapshot.wildcards == 0 and not list(snapshot.domains_of("tun_web"))
        assert snapshot.tunnel_for_host("a.example.com") is None  # a tunnel that is not known yet

    async def test_a_copy_on_disk_has_them(self, tmp_path: Path) -> None:
        before, after = Snapshot(), Snapshot()
        store = SnapshotStore(before, tmp_path, source="api", delay=0)
        before.apply(self.whole(5, domain("a.example.com", valid_until=7.0), domain("*.example.org")))
        assert await store.save() and SnapshotStore(after, tmp_path, source="api", delay=0).load()
        assert list(after.domains_of("tun_web")) == list(before.domains_of("tun_web"))
        assert after.complete and after.wildcards == 1 and after.above(b"x.example.org") == b"*.example.org"

    def test_a_state_without_them_is_asked_for_anew(self) -> None:
        snapshot, earlier = Snapshot(), self.whole(1)
        del earlier["state"]["domains"]
        snapshot.apply(earlier)
        assert not snapshot.complete

    @pytest.mark.parametrize(
        "wrong", [{"host": ""}, {"tunnel": 7}, {"id": None}, {"valid_until": "x"}, {"valid_until": -1}]
    )
    def test_a_malformed_one_changes_nothing(self, wrong: dict[str, Any]) -> None:
        snapshot = Snapshot()
        snapshot.apply(self.whole(1))
        bad = {"kind": "domain", "domain": {**domain("b.example.com")["domain"], **wrong}}
        with pytest.raises(SnapshotInvalid):
            snapshot.apply({"type": "delta", "version": 2, "changes": [domain("a.example.com"), bad]})
        assert snapshot.domain_for_host("a.example.com") is None


async def agent_of(relay: Relay, name: str) -> ScriptedAgent:
    """Another agent, with a tunnel of its own."""
    scripted = await ScriptedAgent().connect(port(relay, 0), session_token(f"ses_{name}", f"agt-{name}"))
    return await scripted.online(grant(name, f"ses_{name}"))
