"""What the control plane says of an organization: limits of live tunnels, and traffic that is refused for the month."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from portico.relay.edge_rows import SnapshotInvalid
from portico.relay.server import Relay
from portico.relay.snapshot import Change, Snapshot
from portico.relay.snapshot_store import SnapshotStore
from tests.relay.doubles import ORG, Client, ScriptedAgent, grant
from tests.relay.test_peers import agent as peers_agent
from tests.relay.test_peers import pair
from tests.relay.test_peers import visit as visit_at
from tests.relay.test_sessions import delta
from tests.relay.test_snapshot import whole

__all__ = ["pair", "peers_agent"]

Visit = Callable[..., Awaitable[Client]]
GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"


def organization(version: int, *, code: str | None = None, until: float | None = None, **limits: int) -> dict[str, Any]:
    row: dict[str, Any] = {"id": ORG, "version": version, "limits": limits}
    if code is not None:
        row["refuse"] = {"code": code} | ({"until": until} if until is not None else {})
    return {"kind": "organization", "organization": row}


class TestLimits:
    async def test_the_newer_of_grant_and_row_holds_at_once(self, relay: Relay, agent: ScriptedAgent) -> None:
        live = relay.agents.by_tunnel["tun_web"]
        assert (live.concurrency, live.rates) == (100, None)
        delta(relay, organization(2, concurrency=3, connections=9, org_requests=5, org_burst=7))
        assert live.concurrency == 3 and live.rates is not None and live.rates.organization is not None
        agent.bind(grant(limits={"concurrency": 50, "version": 1}), 1)  # made before the row, and arrives after it
        await agent.until(lambda: live.grant.limits["concurrency"] == 50)
        assert live.concurrency == 3
        agent.bind(grant(limits={"concurrency": 60, "version": 3}), 1)
        await agent.until(lambda: live.grant.limits["concurrency"] == 60)
        assert (live.concurrency, live.rates) == (60, None)
        delta(relay, organization(4, concurrency=200))
        assert live.concurrency == 200

    async def test_a_row_that_is_there_first_holds_for_who_comes(self, relay: Relay, agent: ScriptedAgent) -> None:
        delta(relay, organization(2, concurrency=3, connections=9))
        agent.bind(grant("other"), 2)
        await agent.until(lambda: 2 in agent.bound)
        assert relay.agents.by_tunnel["tun_other"].concurrency == 3

    async def test_tunnels_that_are_not_http_have_their_own(self, relay: Relay, agent: ScriptedAgent) -> None:
        delta(relay, organization(2, concurrency=3, connections=9))
        agent.bind(grant("through", protocol="tls"), 2)
        await agent.until(lambda: 2 in agent.bound)
        assert relay.agents.by_tunnel["tun_through"].concurrency == 9

    async def test_another_organization_is_left_alone(self, relay: Relay, agent: ScriptedAgent) -> None:
        change = organization(2, code="edge.quota_exceeded", concurrency=3)
        change["organization"]["id"] = "org_other"
        delta(relay, change)
        live = relay.agents.by_tunnel["tun_web"]
        assert (live.concurrency, live.barred) == (100, None)


class TestRefused:
    async def test_until_it_is_lifted_and_the_tunnel_stays(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        """Also on a connection whose requests took the short way before."""
        client = await visit()
        for _ in range(4):
            client.send(GET)
            assert (await client.response())[0] == 200
        delta(relay, organization(2, code="edge.quota_exceeded", until=time.time() + 3600, concurrency=100))
        client.send(GET)
        status, fields, body = await client.response()
        assert (status, fields[b"portico-error"]) == (429, [b"edge.quota_exceeded"])
        assert 3000 < int(fields[b"retry-after"][0]) <= 3600
        assert b"edge.quota_exceeded" in body
        client.send(GET)
        assert (await client.response())[0] == 429
        delta(relay, organization(3, concurrency=100))
        client.send(GET)
        assert (await client.response())[0] == 200
        assert not agent.unbound

    async def test_it_ends_with_its_time_without_a_word(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A month turns while the control plane is away, too."""
        now = time.time()
        delta(relay, organization(2, code="edge.quota_exceeded", until=now + 100, concurrency=100))
        client = await visit(GET)
        assert (await client.response())[0] == 429
        monkeypatch.setattr("portico.relay.decide.time.time", lambda: now + 101)
        client.send(GET)
        assert (await client.response())[0] == 200

    async def test_where_visitors_come_in_by_another_relay(
        self, pair: tuple[Relay, Relay], peers_agent: ScriptedAgent
    ) -> None:
        """The relay that they come to decides, and hears it from the control plane itself."""
        front, _ = pair
        client = await visit_at(front, GET)
        assert (await client.response())[0] == 200
        delta(front, organization(2, code="edge.quota_exceeded", until=time.time() + 60, concurrency=100))
        client.send(GET)
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (429, [b"edge.quota_exceeded"])
        delta(front, organization(3, concurrency=100))
        client.send(GET)
        assert (await client.response())[0] == 200


class TestSnapshot:
    def message(self, version: int, *rows: dict[str, Any]) -> Any:
        found = whole(version)
        found["state"]["organizations"] = [row["organization"] for row in rows]
        found["state"]["domains"] = []
        return found

    def test_of_an_earlier_control_plane_it_is_not_complete(self) -> None:
        snapshot = Snapshot()
        snapshot.apply(whole(1))
        assert not snapshot.complete and snapshot.organization(ORG) is None
        snapshot.apply(self.message(2))
        assert snapshot.complete

    def test_a_later_one_announces_what_differs(self) -> None:
        snapshot, seen = Snapshot(), list[Change]()
        snapshot.apply(self.message(1, organization(1, concurrency=1)))
        snapshot.on_change(seen.append)
        snapshot.apply(self.message(2, organization(1, concurrency=1)))
        assert seen == []
        snapshot.apply(self.message(3, organization(2, concurrency=2)))
        snapshot.apply(self.message(4))
        assert [(change.kind, change.id) for change in seen] == [("organization", ORG)] * 2
        assert snapshot.organization(ORG) is None

    async def test_it_is_kept_over_a_restart(self, tmp_path: Path) -> None:
        before, after = Snapshot(), Snapshot()
        store = SnapshotStore(before, tmp_path, source="http://api", delay=0.01)
        before.apply(self.message(5, organization(3, code="edge.quota_exceeded", until=2e9, concurrency=4)))
        assert await store.save()
        assert SnapshotStore(after, tmp_path, source="http://api", delay=0.01).load()
        assert after.complete and after.organization(ORG) == before.organization(ORG)
        found = after.organization(ORG)
        assert found is not None and found.refuses(2e9 - 1) and not found.refuses(2e9)

    def test_a_code_that_this_relay_does_not_know_refuses_all_the_same(self) -> None:
        snapshot = Snapshot()
        snapshot.apply(self.message(1, organization(1, code="edge.of_tomorrow")))
        found = snapshot.organization(ORG)
        assert found is not None and found.code == "edge.account_suspended" and found.refuses(1e18)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"version": "1"},
            {"id": ""},
            {"limits": {"concurrency": -1}},
            {"limits": []},
            {"refuse": "no"},
            {"refuse": {"code": 1}},
            {"refuse": {"code": "edge.quota_exceeded", "until": "later"}},
        ],
    )
    def test_a_malformed_one_changes_nothing(self, wrong: dict[str, Any]) -> None:
        snapshot = Snapshot()
        snapshot.apply(self.message(1, organization(1, concurrency=1)))
        change = organization(2, concurrency=2)
        change["organization"] |= wrong
        with pytest.raises(SnapshotInvalid):
            snapshot.apply({"type": "delta", "version": 2, "changes": [change]})
        found = snapshot.organization(ORG)
        assert found is not None and (found.version, snapshot.version) == (1, 1)
