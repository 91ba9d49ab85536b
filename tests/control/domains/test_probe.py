"""What the probe sees of real TLS servers, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from portico.control.domains import jobs_distribution, probe
from portico.control.domains.incidents import Incidents
from portico.control.domains.probe import Target
from portico.errors import Problem
from portico.kit.authority import Authority
from portico.kit.db import Database
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings, Secret, WorkerSettings
from tests.control.conftest import MovableClock
from tests.control.domains.certificates import FORM, Fleet, authority, domain, rows, store, worker_vault
from tests.ports import free_port


class Edge:
    """A TLS server that shows whatever certificate it is told to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = 0
        self.chain: ssl.SSLContext | None = None

    def show(self, *names: str, by: Authority | None = None, days_ago: int = 0) -> str:
        """Another certificate from now on; its fingerprint."""
        key = ec.generate_private_key(ec.SECP256R1())
        at = dt.datetime.now(dt.UTC) - dt.timedelta(days=days_ago)
        made = (by or authority()).issue([x509.DNSName(name) for name in names], key.public_key(), at)
        path = self._folder / "edge.pem"
        path.write_bytes(key.private_bytes(*FORM) + made.public_bytes(serialization.Encoding.PEM))
        self.show_file(path)
        return hashlib.sha256(made.public_bytes(serialization.Encoding.DER)).hexdigest()

    def show_file(self, path: Path) -> None:
        self.chain = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.chain.load_cert_chain(path)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if self.chain is None:
                writer.transport.abort()
                return
            await writer.start_tls(self.chain)
            await reader.read()
        writer.transport.abort()


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    made = Edge(tmp_path)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()


def visitors() -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority().certificate_pem.decode())


async def seen(edge: Edge, name: str, expected: str) -> probe.Seen:
    return await probe.look(Target("eu", "127.0.0.1", edge.port), name, expected, visitors(), 30)


class TestLook:
    async def test_what_should_be_there(self, edge: Edge) -> None:
        shown = edge.show("a.example.com")
        assert await seen(edge, "a.example.com", shown) == probe.Seen("good", shown)

    async def test_a_wildcard(self, edge: Edge) -> None:
        shown = edge.show("*.b.example.com")
        assert (await seen(edge, "*.b.example.com", shown)).outcome == "good"

    async def test_another_certificate(self, edge: Edge) -> None:
        shown = edge.show("a.example.com")
        found = await seen(edge, "a.example.com", "ab" * 32)
        assert (found.outcome, found.fingerprint) == ("wrong_certificate", shown)

    async def test_another_name(self, edge: Edge) -> None:
        shown = edge.show("other.example.com")
        found = await seen(edge, "a.example.com", shown)
        assert (found.outcome, found.fingerprint) == ("wrong_name", shown)

    async def test_one_that_has_ended(self, edge: Edge) -> None:
        shown = edge.show("a.example.com", days_ago=4000)
        found = await seen(edge, "a.example.com", shown)
        assert (found.outcome, found.fingerprint) == ("expired", shown)

    async def test_of_nobody_whom_visitors_trust(self, edge: Edge) -> None:
        shown = edge.show("a.example.com", by=Authority.make("example.com", dt.datetime.now(dt.UTC)))
        found = await seen(edge, "a.example.com", shown)
        assert (found.outcome, found.fingerprint) == ("untrusted", shown)

    async def test_nothing_there(self, edge: Edge) -> None:
        assert (await seen(edge, "a.example.com", "ab" * 32)).outcome in ("no_certificate", "unreachable")
        edge.port = free_port()
        assert (await seen(edge, "a.example.com", "ab" * 32)).outcome == "unreachable"

    async def test_an_edge_that_says_nothing_is_given_up(self) -> None:
        server = await asyncio.start_server(lambda r, w: asyncio.sleep(60), "127.0.0.1", 0)
        target = Target("eu", "127.0.0.1", server.sockets[0].getsockname()[1])
        assert (await probe.look(target, "a.example.com", "ab" * 32, visitors(), 0.2)).outcome == "unreachable"
        server.close()

    @pytest.mark.parametrize(
        "bad", ["eu", "eu=", "eu=host", "eu=host:0", "eu=host:99999", "=host:1", "eu=:1", "eu=host:x"]
    )
    def test_targets(self, bad: str) -> None:
        with pytest.raises(Problem, match="certificate_probe_targets"):
            probe.targets([bad])
        assert probe.targets(["eu=edge.example.com:443", "six=[::1]:443"]) == [
            Target("eu", "edge.example.com", 443),
            Target("six", "::1", 443),
        ]


class TestWhatBecomesOfIt:
    @pytest.fixture
    async def look(
        self, db: Database, settings: ApiSettings, edge: Edge, tmp_path: Path, clock: MovableClock
    ) -> AsyncIterator[Any]:
        """One round of the job."""
        ca = tmp_path / "ca.pem"
        ca.write_bytes(authority().certificate_pem)
        worker = WorkerSettings(
            database_url=Secret("unused"), certificate_probe_targets=(f"eu=127.0.0.1:{edge.port}",),
            certificate_probe_ca_file=ca, certificate_probe_settled_seconds=0,
        )  # fmt: skip
        incidents = Incidents(settings, Sealer(settings.master_key), clock)

        async def go() -> None:
            await jobs_distribution.look(db, worker, incidents)

        yield go

    async def incidents(self, db: Database, domain_id: str) -> list[tuple[Any, ...]]:
        query = "SELECT incident_class, status, conditions->'probe'->>'code' FROM certificate_incidents WHERE domain_id = $1"
        return [tuple(row) for row in await rows(db, query, domain_id)]

    async def test_wrong_twice_opens_an_incident_and_good_ends_it(
        self, db: Database, edge: Edge, look: Any, tmp_path: Path
    ) -> None:
        async with db.transaction() as tx:
            await tx.raw.execute("DELETE FROM custom_domains")
        await Fleet(db).region("eu")
        mine = await domain(db, "probe.example.com")
        version = await store(db, worker_vault(tmp_path), mine, "probe.example.com")
        async with db.transaction() as tx:
            await tx.raw.execute(
                "UPDATE certificate_heads SET active_id = staged_id, staged_id = NULL WHERE domain_id = $1", mine
            )
            await tx.raw.execute(
                "UPDATE certificate_versions SET state = 'active', switched_at = now() WHERE id = $1", version.id
            )
        before = await rows(db, "SELECT cert_status, cert_applied::text FROM custom_domains WHERE id = $1", mine)

        edge.show("probe.example.com")  # not ours
        await look()
        assert await self.incidents(db, mine) == []  # a switch takes a moment
        await look()
        assert await self.incidents(db, mine) == [("integrity", "open", "probe_wrong_certificate")]
        # The edge is out of reach: nothing is known, so nothing ends.
        edge.chain, port = None, edge.port
        await look()
        edge.port = port
        assert (await self.incidents(db, mine))[0][1] == "open"
        # What the probe sees is never an event, and changes no certificate's state.
        assert (
            await rows(db, "SELECT cert_status, cert_applied::text FROM custom_domains WHERE id = $1", mine) == before
        )
        assert not await rows(db, "SELECT 1 FROM certificate_lifecycle_events WHERE domain_id = $1", mine)

        good = edge.show("probe.example.com")
        async with db.transaction() as tx:
            await tx.raw.execute("UPDATE certificate_versions SET fingerprint = $2 WHERE id = $1", version.id, good)
        await look()
        assert (await self.incidents(db, mine))[0][1] == "resolved"
        found = await rows(
            db, "SELECT outcome, failures, fingerprint FROM certificate_probes WHERE domain_id = $1", mine
        )
        assert [tuple(row) for row in found] == [("good", 0, good)]
