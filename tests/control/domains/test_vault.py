"""Sealing certificates and handing them to relays: what is stored, what is told, who can open it."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from portico.control.domains import replicas, vault, vault_store
from portico.control.domains.vault import CertificateRefused, Vault
from portico.errors import Problem
from portico.kit import envelope
from portico.kit.db import Database
from portico.kit.envelope import Keys
from portico.kit.jwt import KeySet
from portico.relay.sealed import Trust, Unusable, parse
from portico.settings import Secret, WorkerSettings
from tests.control.domains.certificates import Fleet, domain, issued, rows, store, worker_vault


@pytest.fixture
async def fleet(db: Database) -> Fleet:
    async with db.transaction() as tx:
        await tx.raw.execute("DELETE FROM certificate_region_keys")
        await tx.raw.execute("DELETE FROM relays")
    return Fleet(db)


@pytest.fixture
def sealer(tmp_path: Path) -> Vault:
    return worker_vault(tmp_path)


def trust(sealer: Vault, region: str, key: X25519PrivateKey) -> Trust:
    return Trust(region, KeySet.of([sealer._keys.signer]), Keys([key]))


async def bundle(db: Database, certificate: str, region: str) -> Any:
    async with db.read() as reader:
        return (await vault.bundles(reader, [certificate], region))[0]


async def last_change(db: Database) -> list[Any]:
    found = await rows(db, "SELECT payload::text FROM edge_changes ORDER BY version DESC LIMIT 1")
    return list(json.loads(found[0]["payload"]))


NOW = dt.datetime.now(dt.UTC)


class TestStore:
    async def test_a_relay_of_each_region_opens_it(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        eu, us = await fleet.region("eu"), await fleet.region("us")
        mine = await domain(db, "a.example.com")
        chain, key = issued("a.example.com")
        async with db.transaction() as tx:
            version = await sealer.store(tx, mine, ["a.example.com"], chain, key)
        for region, private in (("eu", eu), ("us", us)):
            held = trust(sealer, region, private).hold(parse(await bundle(db, version.id, region)), now=NOW, load=True)
            assert key in held.certificate.material() and held.certificate.fingerprint == version.fingerprint
        with pytest.raises(Unusable):
            trust(sealer, "eu", us).hold(parse(await bundle(db, version.id, "eu")), now=NOW, load=True)
        ref = {"id": version.id, "version": 1, "fingerprint": version.fingerprint}
        row = {"domain": mine, "hostname": "a.example.com", "staged": ref}
        assert await last_change(db) == [{"kind": "certificate", "certificate": row}]

    async def test_no_row_holds_the_key(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        await fleet.region("eu")
        mine = await domain(db, "secret.example.com")
        chain, key = issued("secret.example.com")
        async with db.transaction() as tx:
            await sealer.store(tx, mine, ["secret.example.com"], chain, key)
        lines = [line for line in key.decode().splitlines() if "-----" not in line]
        tables = await rows(db, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
        seen = 0
        for table in tables:
            for row in await rows(db, f"SELECT t::text AS text FROM {table['table_name']} t"):
                seen += 1
                assert not any(line in row["text"] or line.encode().hex() in row["text"] for line in lines)
        assert seen > 5

    async def test_numbers_rise_and_are_never_given_out_again(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        mine = await domain(db, "b.example.com")
        assert (await store(db, sealer, mine, "b.example.com")).version == 1
        with pytest.raises(RuntimeError):
            async with db.transaction() as tx:
                await sealer.store(tx, mine, ["b.example.com"], *issued("b.example.com"))
                raise RuntimeError
        versions = await asyncio.gather(*(store(db, sealer, mine, "b.example.com") for _ in range(5)))
        assert sorted(one.version for one in versions) == [2, 3, 4, 5, 6]
        async with db.transaction() as tx:
            await vault_store.raise_floor(tx, mine, 40)
        assert (await store(db, sealer, mine, "b.example.com")).version == 41

    async def test_one_that_was_being_staged_keeps_no_key(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        await fleet.region("eu")
        mine = await domain(db, "c.example.com")
        first = await store(db, sealer, mine, "c.example.com")
        second = await store(db, sealer, mine, "c.example.com")
        found = await rows(
            db, "SELECT id, state, sealed, worker_wrap FROM certificate_versions WHERE domain_id = $1", mine
        )
        by_id = {row["id"]: row for row in found}
        assert by_id[first.id]["state"] == "superseded"
        assert by_id[first.id]["sealed"] is None and by_id[first.id]["worker_wrap"] is None
        assert by_id[second.id]["state"] == "staging"
        assert {row["certificate_id"] for row in await rows(db, "SELECT certificate_id FROM certificate_wraps")} >= {
            second.id
        }
        assert not await rows(db, "SELECT 1 FROM certificate_wraps WHERE certificate_id = $1", first.id)
        async with db.read() as reader:
            assert await vault.bundles(reader, [first.id], "eu") == []

    async def test_what_nobody_could_serve_with_is_refused(self, db: Database, sealer: Vault) -> None:
        mine = await domain(db, "d.example.com")
        chain, key = issued("d.example.com")
        other_chain, other_key = issued("d.example.com")
        cases: list[tuple[bytes, bytes, list[str], str]] = [
            (chain, other_key, ["d.example.com"], "not that of the certificate"),
            (chain, key, ["e.example.com"], "other names"),
            (chain, key, ["d.example.com", "e.example.com"], "other names"),
            (chain + other_chain, key, ["d.example.com"], "not issued by"),
            (b"", key, ["d.example.com"], "cannot be read"),
            (chain, b"canary", ["d.example.com"], "cannot be read"),
            (chain, key[:60], ["d.example.com"], "cannot be read"),
        ]
        for case_chain, case_key, names, match in cases:
            with pytest.raises(CertificateRefused, match=match) as refused:
                async with db.transaction() as tx:
                    await sealer.store(tx, mine, names, case_chain, case_key)
            assert "PRIVATE" not in str(refused.value) and "canary" not in str(refused.value)
        assert not await rows(db, "SELECT 1 FROM certificate_heads WHERE domain_id = $1", mine)
        with pytest.raises(CertificateRefused, match="gone"):
            await store(db, sealer, "dom_gone", "d.example.com")

    def test_a_worker_without_a_key_file(self) -> None:
        with pytest.raises(Problem, match="certificate_key_file") as raised:
            vault.of(WorkerSettings(database_url=Secret("unused")))
        assert raised.value.code == "config.invalid"


class TestRotation:
    async def test_a_new_key_needs_no_new_certificates(
        self, db: Database, fleet: Fleet, sealer: Vault, tmp_path: Path
    ) -> None:
        old = await fleet.region("eu")
        mine = await domain(db, "f.example.com")
        version = await store(db, sealer, mine, "f.example.com")
        before = await bundle(db, version.id, "eu")
        new = await fleet.region("eu")
        # Another process, with the same file.
        assert await worker_vault(tmp_path).rewrap(db) == 1
        assert await worker_vault(tmp_path).rewrap(db) == 0
        after = await bundle(db, version.id, "eu")
        assert [after[name] for name in ("sealed", "manifest", "chain")] == [
            before[n] for n in ("sealed", "manifest", "chain")
        ]
        assert len(after["wraps"]) == 2
        for key in (old, new):
            assert trust(sealer, "eu", key).hold(parse(after), now=NOW, load=True)
        assert (await last_change(db))[0]["certificate"]["domain"] == mine  # relays that could not open it try again

    async def test_a_region_that_comes_later(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        mine = await domain(db, "g.example.com")
        version = await store(db, sealer, mine, "g.example.com")
        assert (await bundle(db, version.id, "ap"))["wraps"] == []
        key = await fleet.region("ap")
        await sealer.rewrap(db)
        assert trust(sealer, "ap", key).hold(parse(await bundle(db, version.id, "ap")), now=NOW, load=True)

    async def test_a_worker_wraps_for_no_key_that_its_settings_do_not_allow(
        self, db: Database, fleet: Fleet, tmp_path: Path
    ) -> None:
        """Whoever can write rows, or register keys, must not get private keys wrapped for a key of its own."""
        good, forged = await fleet.region("eu"), await fleet.region("mars")
        careful = worker_vault(tmp_path, [envelope.key_id(good.public_key())])
        mine = await domain(db, "h.example.com")
        version = await store(db, careful, mine, "h.example.com")
        assert await careful.rewrap(db) == 0
        assert (await bundle(db, version.id, "mars"))["wraps"] == []
        assert trust(careful, "eu", good).hold(parse(await bundle(db, version.id, "eu")), now=NOW, load=True)
        assert forged is not good

    async def test_another_workers_file_wraps_nothing(
        self, db: Database, fleet: Fleet, sealer: Vault, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        mine = await domain(db, "i.example.com")
        version = await store(db, sealer, mine, "i.example.com")
        await fleet.region("eu")
        (tmp_path / "other").mkdir()
        await worker_vault(tmp_path / "other").rewrap(db)
        assert (await bundle(db, version.id, "eu"))["wraps"] == []
        assert "cannot be wrapped anew" in caplog.text

    async def test_versions_that_serve_no_more_are_left_alone(self, db: Database, fleet: Fleet, sealer: Vault) -> None:
        mine = await domain(db, "j.example.com")
        first = await store(db, sealer, mine, "j.example.com")
        await store(db, sealer, mine, "j.example.com")
        await fleet.region("eu")
        await sealer.rewrap(db)
        assert not await rows(db, "SELECT 1 FROM certificate_wraps WHERE certificate_id = $1", first.id)


class TestRemoval:
    async def test_a_deleted_domain_leaves_nothing_behind(
        self, db: Database, fleet: Fleet, sealer: Vault, owner: Any
    ) -> None:
        await fleet.region("eu")
        mine = await domain(db, "k.example.com", owner.organization)
        version = await store(db, sealer, mine, "k.example.com")
        answer = await owner.client.delete(f"/v1/domains/{mine}")
        assert answer.status_code == 204, answer.text
        assert {"kind": "certificate_removed", "domain": mine} in await last_change(db)
        for table in ("certificate_versions", "certificate_wraps", "certificate_heads", "cert_region_replicas"):
            column = (
                "domain_id"
                if table in ("certificate_heads",)
                else "certificate_id"
                if "wraps" in table
                else "domain_id"
            )
            value = version.id if column == "certificate_id" else mine
            assert not await rows(db, f"SELECT 1 FROM {table} WHERE {column} = $1", value)

    async def test_deleting_beside_acknowledgements_and_renewals(
        self, db: Database, fleet: Fleet, sealer: Vault, owner: Any
    ) -> None:
        """All three hold the domain and its head, in one order: nobody waits for a deadlock to be found."""
        await fleet.region("eu", "eu-1")
        rules = replicas.Rules(15, 1, 60, 30)

        async def acknowledge(version: vault.Version) -> None:
            async with db.transaction() as tx:
                said = [replicas.Said(version.id, version.fingerprint, "staged")]
                await replicas.acknowledge(tx, "eu-1", said, rules)

        for number in range(10):
            mine = await domain(db, f"beside-{number}.example.com", owner.organization)
            first = await store(db, sealer, mine, f"beside-{number}.example.com")
            done = await asyncio.gather(
                owner.client.delete(f"/v1/domains/{mine}"),
                acknowledge(first),
                store(db, sealer, mine, f"beside-{number}.example.com"),
                replicas.sweep(db, rules),
                return_exceptions=True,
            )
            assert getattr(done[0], "status_code", done[0]) == 204
            assert all(not isinstance(one, BaseException) or isinstance(one, CertificateRefused) for one in done), done
            assert not await rows(db, "SELECT 1 FROM certificate_heads WHERE domain_id = $1", mine)


class TestEdge:
    async def test_a_relay_asks_by_id(
        self, db: Database, fleet: Fleet, sealer: Vault, relay: httpx.AsyncClient, owner: Any
    ) -> None:
        key = await fleet.region("eu")
        mine = await domain(db, "l.example.com")
        version = await store(db, sealer, mine, "l.example.com")
        body = {"region": "eu", "certificates": [version.id, "crt_unknown"]}
        answer = await relay.post("/v1/edge/certificates", json=body)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == 1
        held = trust(sealer, "eu", key).hold(parse(answer.json()["data"][0]), now=NOW, load=True)
        assert held.id == version.id
        assert (await owner.client.post("/v1/edge/certificates", json=body)).status_code == 401

    async def test_a_snapshot_tells_of_it(self, app: Any, db: Database, fleet: Fleet, sealer: Vault) -> None:
        mine = await domain(db, "m.example.com")
        version = await store(db, sealer, mine, "m.example.com")
        _, line = await app.state.edge_states.line()
        told = {row["domain"]: row for row in json.loads(line)["state"]["certificates"]}
        assert told[mine]["staged"] == {"id": version.id, "version": 1, "fingerprint": version.fingerprint}
