"""When a certificate is switched to: what relays say, in any order, from any number of connections, and what becomes of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portico.control.access import Caller
from portico.control.domains import replicas
from portico.control.domains.replicas import Rules, Said, ready, state_of
from portico.control.domains.vault import Vault, Version
from portico.control.identity.keys import issue
from portico.control.tunnels import relays as relay_service
from portico.kit.db import Database
from portico.kit.ids import new_id
from tests.control.conftest import Account, MovableClock, heartbeat_body
from tests.control.domains.certificates import Fleet, domain, rows, store, worker_vault

RULES = Rules(lease_seconds=15, share=1.0, wait_seconds=60, stale_seconds=30)


@pytest.fixture
async def operator(db: Database, clock: MovableClock, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    """A client with an operator key."""
    async with db.transaction() as tx:
        key = await issue(tx, clock.wall(), None, None, "operator", "operator", [])
    return connect(key.key)


@pytest.fixture
async def fleet(db: Database) -> Fleet:
    """Two regions of two relays, and nothing else."""
    async with db.transaction() as tx:
        for table in ("certificate_region_keys", "relays", "certificate_heads", "certificate_versions"):
            await tx.raw.execute(f"DELETE FROM {table}")
    made = Fleet(db)
    await made.region("eu", "eu-1", "eu-2")
    await made.region("us", "us-1", "us-2")
    return made


RELAYS = ("eu-1", "eu-2", "us-1", "us-2")


@pytest.fixture
def sealer(tmp_path: Path) -> Vault:
    return worker_vault(tmp_path)


async def say(
    db: Database, relay: str, version: Version, state: str = "staged", rules: Rules = RULES, **more: Any
) -> list[str]:
    """An acknowledgement; the domains that switched."""
    async with db.transaction() as tx:
        said = Said(version.id, more.pop("fingerprint", version.fingerprint), state, **more)
        return await replicas.acknowledge(tx, relay, [said], rules)


async def head(db: Database, version: Version) -> tuple[str | None, str | None]:
    """What serves, and what is being staged, of its domain."""
    found = await rows(db, "SELECT active_id, staged_id FROM certificate_heads WHERE domain_id = $1", version.domain_id)
    return found[0]["active_id"], found[0]["staged_id"]


async def states(db: Database, version: Version) -> dict[str, str]:
    found = await rows(db, "SELECT region, state FROM cert_region_replicas WHERE certificate_id = $1", version.id)
    return {row["region"]: row["state"] for row in found}


async def told(db: Database, domain_id: str) -> list[Any]:
    """Every row of the domain on the edge stream."""
    found = await rows(db, "SELECT payload::text FROM edge_changes ORDER BY version")
    changes = [change for row in found for change in json.loads(row["payload"])]
    return [c["certificate"] for c in changes if c["kind"] == "certificate" and c["certificate"]["domain"] == domain_id]


async def events(db: Database, version: Version) -> list[tuple[Any, ...]]:
    """What the lifecycle of its domain heard of a version: type, regions that serve, regions, fingerprint."""
    query = "SELECT event_type, facts::text FROM certificate_lifecycle_events WHERE domain_id = $1 AND revision = $2 ORDER BY id"
    found = [(row[0], json.loads(row[1])) for row in await rows(db, query, version.domain_id, version.version)]
    return [(kind, f["regions_active"], f["regions_total"], f.get("fingerprint")) for kind, f in found]


async def stored(db: Database, sealer: Vault, name: str, domain_id: str | None = None) -> Version:
    return await store(db, sealer, domain_id or await domain(db, name), name)


async def switched(db: Database, sealer: Vault, name: str) -> Version:
    """One that serves everywhere."""
    version = await stored(db, sealer, name)
    for relay in RELAYS:
        await say(db, relay, version)
    for relay in RELAYS:
        await say(db, relay, version, "active")
    assert await states(db, version) == {"eu": "active", "us": "active"}
    return version


class TestSwitch:
    async def test_only_when_every_healthy_relay_of_every_region_has_it(
        self, db: Database, fleet: Fleet, sealer: Vault
    ) -> None:
        first = await switched(db, sealer, "a.example.com")
        second = await stored(db, sealer, "a.example.com", first.domain_id)
        for relay in RELAYS[:3]:
            assert await say(db, relay, second) == []
            assert await head(db, second) == (first.id, second.id)
        assert await states(db, second) == {"eu": "staged", "us": "pending"}
        assert await states(db, first) == {"eu": "active", "us": "active"}
        before = len(await told(db, second.domain_id))
        assert await say(db, "us-2", second) == [second.domain_id]
        assert await head(db, second) == (second.id, None)
        changes = await told(db, second.domain_id)
        assert len(changes) == before + 1  # one change, the same for all
        assert await events(db, second) == [("cert.deployed", 2, 2, second.fingerprint)]
        assert changes[-1]["active"]["id"] == second.id and "staged" not in changes[-1]
        assert await states(db, second) == {"eu": "staged", "us": "staged"}
        # Nobody needs the key of the one before any more.
        gone = await rows(db, "SELECT state, sealed FROM certificate_versions WHERE id = $1", first.id)
        assert (gone[0]["state"], gone[0]["sealed"]) == ("retired", None)
        await say(db, "eu-1", second, "active")
        assert (await states(db, second))["eu"] == "staged"
        await say(db, "eu-2", second, "active")
        assert await states(db, second) == {"eu": "active", "us": "staged"}
        assert len(await events(db, second)) == 1
        await say(db, "us-1", second, "active")
        await say(db, "us-2", second, "active")
        assert (await events(db, second))[1:] == [("replica.activated", 2, 2, None)]

    async def test_that_nobody_was_heard_for_a_while_is_no_news(
        self, db: Database, fleet: Fleet, sealer: Vault
    ) -> None:
        """After an outage of the database each relay of each region is back with all its certificates. Trouble is news, and so is
        its end."""
        version = await switched(db, sealer, "back.example.com")
        before = await events(db, version)
        for _ in range(2):
            for relay in RELAYS:
                await fleet.alive(relay, relay[:2], seconds_ago=60)
            await replicas.sweep(db, RULES)
            assert set((await states(db, version)).values()) == {"pending"}
            for relay in RELAYS:
                await fleet.alive(relay, relay[:2])
            await replicas.sweep(db, RULES)
            assert set((await states(db, version)).values()) == {"active"}
        assert await events(db, version) == before
        for _ in range(2):
            await say(db, "us-2", version, "failed", reason="its disk is full")
            await say(db, "us-2", version, "active")
        assert [kind for kind, *_ in await events(db, version)][len(before) :] == [
            "replica.failed",
            "replica.activated",
        ] * 2

    async def test_without_any_relay_nothing_switches(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        for relay in RELAYS:
            await fleet.alive(relay, relay[:2], seconds_ago=60)
        version = await stored(db, sealer, "b.example.com")
        assert await replicas.sweep(db, RULES) == 0
        assert await head(db, version) == (None, version.id)
        assert await states(db, version) == {"eu": "pending", "us": "pending"}

    async def test_a_relay_that_dies_or_leaves_holds_nobody_up(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        version = await stored(db, sealer, "c.example.com")
        for relay in RELAYS[:2]:
            await say(db, relay, version)
        await fleet.alive("us-1", "us", seconds_ago=60)
        assert await replicas.sweep(db, RULES) == 0
        await fleet.alive("us-2", "us", draining=True)
        assert await replicas.sweep(db, RULES) == 1
        assert await head(db, version) == (version.id, None)

    async def test_a_relay_that_comes_meanwhile_counts(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        version = await stored(db, sealer, "d.example.com")
        for relay in RELAYS[:3]:
            await say(db, relay, version)
        await fleet.alive("eu-3", "eu")
        assert await say(db, "us-2", version) == []
        assert await say(db, "eu-3", version) == [version.domain_id]

    async def test_a_region_without_a_key_does_not_count(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        await fleet.alive("ap-1", "ap")
        version = await stored(db, sealer, "e.example.com")
        for relay in RELAYS[:3]:
            await say(db, relay, version)
        assert await say(db, "us-2", version) == [version.domain_id]

    async def test_a_relay_that_cannot_use_it_stops_the_switch(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        first = await switched(db, sealer, "f.example.com")
        second = await stored(db, sealer, "f.example.com", first.domain_id)
        for relay in RELAYS[:3]:
            await say(db, relay, second)
        await say(db, "us-2", second, "failed", reason="the wrap does not open")
        assert await head(db, second) == (first.id, second.id)
        assert await states(db, second) == {"eu": "staged", "us": "failed"}
        found = await rows(db, "SELECT reason FROM cert_region_replicas WHERE state = 'failed'")
        assert found[0]["reason"] == "the wrap does not open"
        assert await events(db, second) == [("replica.failed", 0, 2, None)]
        assert await say(db, "us-2", second) == [second.domain_id]  # it was mended

    async def test_another_fingerprint_is_no_acknowledgement(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        version = await stored(db, sealer, "g.example.com")
        for relay in RELAYS[:3]:
            await say(db, relay, version)
        assert await say(db, "us-2", version, fingerprint="ab" * 32) == []
        assert (await states(db, version))["us"] == "failed"

    async def test_late_and_unknown_acknowledgements_count_for_nothing(
        self, db: Database, fleet: Fleet, sealer: Vault
    ) -> None:
        first = await stored(db, sealer, "h.example.com")
        second = await stored(db, sealer, "h.example.com", first.domain_id)
        for relay in RELAYS:
            assert await say(db, relay, first) == []
        async with db.transaction() as tx:
            assert await replicas.acknowledge(tx, "eu-1", [Said("crt_none", "ab" * 32, "staged")], RULES) == []
        assert await head(db, second) == (None, second.id)

    async def test_a_relays_floor_is_never_given_out(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        """The database was restored from an older copy: relays have served more than it knows."""
        version = await stored(db, sealer, "i.example.com")
        await say(db, "eu-1", version, "failed", reason="a step back", floor=17)
        assert (await stored(db, sealer, "i.example.com", version.domain_id)).version == 18

    async def test_a_relay_that_lies_does_not_use_the_numbers_up(
        self, db: Database, fleet: Fleet, sealer: Vault
    ) -> None:
        """One above the greatest would be read by no relay, of any domain: the stream would end for all."""
        version = await stored(db, sealer, "lies.example.com")
        await say(db, "eu-1", version, "failed", reason="a step back", floor=2**53 - 1)
        assert (await stored(db, sealer, "lies.example.com", version.domain_id)).version == 2


class TestTogether:
    async def test_acknowledgements_at_once_switch_once(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        for number in range(8):
            version = await stored(db, sealer, f"at-once-{number}.example.com")
            before = len(await told(db, version.domain_id))
            said = await asyncio.gather(*(say(db, relay, version) for relay in RELAYS), replicas.sweep(db, RULES))
            assert await head(db, version) == (version.id, None)
            assert len(await told(db, version.domain_id)) == before + 1
            assert sum(1 for one in said[:4] if one) + int(said[4]) == 1

    async def test_a_newer_version_beside_the_last_acknowledgement(
        self, db: Database, fleet: Fleet, sealer: Vault
    ) -> None:
        """Whichever comes first, what serves is a version that every relay staged, and the newer one is never lost."""
        for number in range(8):
            old = await stored(db, sealer, f"race-{number}.example.com")
            for relay in RELAYS[:3]:
                await say(db, relay, old)
            _, newer = await asyncio.gather(
                say(db, "us-2", old), stored(db, sealer, f"race-{number}.example.com", old.domain_id)
            )
            active, staged = await head(db, old)
            assert staged == newer.id and active in (None, old.id)
            last = (await told(db, old.domain_id))[-1]
            assert (last.get("active") or {}).get("id") == active and last["staged"]["id"] == staged

    async def test_a_crash_before_the_commit_switches_nothing(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        version = await stored(db, sealer, "j.example.com")
        for relay in RELAYS[:3]:
            await say(db, relay, version)
        before = await told(db, version.domain_id)
        with pytest.raises(RuntimeError):
            async with db.transaction() as tx:
                assert await replicas.acknowledge(tx, "us-2", [Said(version.id, version.fingerprint, "staged")], RULES)
                raise RuntimeError
        assert await head(db, version) == (None, version.id)
        assert await told(db, version.domain_id) == before

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(order=st.permutations([(relay, n) for relay in RELAYS for n in (1, 2)]), again=st.booleans())
    async def test_any_order_ends_in_the_same_state(
        self, db: Database, fleet: Fleet, sealer: Vault, order: list[tuple[str, int]], again: bool
    ) -> None:
        name = f"{new_id('k')[2:]}.example.com"
        first = await stored(db, sealer, name)
        second = await stored(db, sealer, name, first.domain_id)
        patient = replace(RULES, lease_seconds=3600)  # heartbeats are as old as all examples before this one
        for relay, number in [*order, *(order if again else ())]:
            await say(db, relay, first if number == 1 else second, rules=patient)
        assert await head(db, second) == (second.id, None)


class TestQuorum:
    QUORUM = Rules(lease_seconds=15, share=0.5, wait_seconds=60, stale_seconds=30)

    async def test_a_share_is_enough_after_a_while(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        version = await stored(db, sealer, "q.example.com")
        await say(db, "eu-1", version, rules=self.QUORUM)
        await say(db, "us-1", version, rules=self.QUORUM)
        assert await replicas.sweep(db, self.QUORUM) == 0  # the others have time
        async with db.transaction() as tx:
            await tx.raw.execute(
                "UPDATE certificate_versions SET created_at = now() - interval '2 minutes' WHERE id = $1", version.id
            )
        assert await replicas.sweep(db, RULES) == 0
        assert await replicas.sweep(db, self.QUORUM) == 1

    @pytest.mark.parametrize(
        ("staged", "age", "share", "expected"),
        [
            ([(2, 2), (2, 2)], 0, 1.0, True),
            ([(2, 1), (2, 2)], 9999, 1.0, False),
            ([(2, 1), (2, 1)], 59, 0.5, False),
            ([(2, 1), (2, 1)], 60, 0.5, True),
            ([(3, 1), (3, 3)], 60, 0.5, False),  # of each region
            ([(0, 0), (2, 2)], 0, 1.0, True),
            ([(0, 0), (0, 0)], 9999, 0.5, False),
            ([], 9999, 0.5, False),
        ],
    )
    def test_the_rule(self, staged: list[tuple[int, int]], age: float, share: float, expected: bool) -> None:
        regions = [{"relays": all_, "staged": some, "age": age} for all_, some in staged]
        assert ready(regions, Rules(15, share, 60, 30)) is expected


class TestReplicas:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"state": "staging", "relays": 2, "staged": 1}, "pending"),
            ({"state": "staging", "relays": 2, "staged": 2}, "staged"),
            ({"state": "staging", "relays": 2, "staged": 1, "failed": 1}, "failed"),
            ({"state": "staging", "relays": 0, "age": 999}, "pending"),
            ({"state": "active", "relays": 2, "staged": 2}, "staged"),
            ({"state": "active", "relays": 2, "staged": 2, "active": 2, "age": 999}, "active"),
            ({"state": "active", "relays": 2, "staged": 2, "active": 1, "age": 31}, "stale"),
            ({"state": "active", "relays": 2, "staged": 1, "active": 1, "age": 29}, "pending"),
            ({"state": "active", "relays": 0, "age": 999}, "stale"),
            ({"state": "active", "relays": 2, "staged": 1, "active": 1, "failed": 1, "age": 999}, "failed"),
        ],
    )
    def test_states(self, row: dict[str, Any], expected: str) -> None:
        whole = {"staged": 0, "active": 0, "failed": 0, "reason": None, "age": 0.0, **row}
        assert state_of(whole, RULES)[0] == expected

    async def test_a_region_that_falls_behind_is_stale_and_its_lag_grows(
        self, db: Database, fleet: Fleet, sealer: Vault, owner: Account, operator: httpx.AsyncClient
    ) -> None:
        version = await switched(db, sealer, "lag.example.com")
        async with db.transaction() as tx:
            query = "UPDATE certificate_versions SET switched_at = now() - interval '2 minutes' WHERE id = $1"
            await tx.raw.execute(query, version.id)
        await fleet.alive("eu-3", "eu")  # comes back, with an older version
        await replicas.sweep(db, RULES)
        assert await states(db, version) == {"eu": "stale", "us": "active"}
        answer = await operator.get("/v1/admin/cert-replicas", params={"state": "stale"})
        assert answer.status_code == 200, answer.text
        (row,) = answer.json()["data"]
        assert (row["domain"], row["region"], row["hostname"]) == (version.domain_id, "eu", "lag.example.com")
        assert (row["relays"], row["relays_active"]) == (3, 2) and row["lag_seconds"] >= 0
        assert "1 of 3" in row["reason"]
        await say(db, "eu-3", version, "active")
        assert await states(db, version) == {"eu": "active", "us": "active"}
        assert (await owner.client.get("/v1/admin/cert-replicas")).status_code == 403

    async def test_pages(self, db: Database, fleet: Fleet, sealer: Vault, operator: httpx.AsyncClient) -> None:
        for number in range(3):
            await switched(db, sealer, f"p{number}.example.com")
        seen, cursor = [], None
        while True:
            params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
            page = (await operator.get("/v1/admin/cert-replicas", params=params)).json()
            seen += [(row["certificate"], row["region"]) for row in page["data"]]
            if (cursor := page["next_cursor"]) is None:
                break
        assert len(seen) == len(set(seen)) == 6

    async def test_looking_at_what_is_well_writes_nothing(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        await switched(db, sealer, "well.example.com")
        await replicas.sweep(db, RULES)
        before = await rows(db, "SELECT xmin::text, * FROM cert_region_replicas ORDER BY 2, 3")
        assert await replicas.sweep(db, RULES) == 0
        assert await rows(db, "SELECT xmin::text, * FROM cert_region_replicas ORDER BY 2, 3") == before


class TestOverHttp:
    async def test_relays_acknowledge_and_the_last_one_switches(
        self, app: Any, db: Database, fleet: Fleet, sealer: Vault, connect: Callable[..., httpx.AsyncClient]
    ) -> None:
        async with db.transaction() as tx:
            await tx.raw.execute("DELETE FROM relays")
            _, token = await relay_service.create_key(tx, Caller("operator", "installation", None), "test")
        relay = connect(token)
        for name in ("eu-1", "us-1"):
            assert (
                await relay.post("/v1/edge/heartbeat", json=heartbeat_body(name, region=name[:2]))
            ).status_code == 200
        version = await stored(db, sealer, "http.example.com")
        ack = {"certificate": version.id, "fingerprint": version.fingerprint, "state": "staged"}
        for name in ("eu-1", "us-1"):
            assert (await head(db, version))[0] is None
            answer = await relay.post("/v1/edge/acks", json={"relay": name, "version": 1, "certificates": [ack]})
            assert answer.status_code == 200, answer.text
        assert await head(db, version) == (version.id, None)

    async def test_a_key_of_another_relay_acknowledges_nothing(
        self, db: Database, fleet: Fleet, sealer: Vault, app: Any, connect: Callable[..., httpx.AsyncClient]
    ) -> None:
        async with db.transaction() as tx:
            _, token = await relay_service.create_key(tx, Caller("operator", "installation", None), "t", relay="eu-1")
        version = await stored(db, sealer, "bound.example.com")
        ack = {"certificate": version.id, "fingerprint": version.fingerprint, "state": "staged"}
        body = {"relay": "us-1", "version": 1, "certificates": [ack]}
        assert (await connect(token).post("/v1/edge/acks", json=body)).status_code == 403
        assert not await rows(db, "SELECT 1 FROM certificate_acks WHERE certificate_id = $1", version.id)
