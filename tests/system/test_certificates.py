"""A domain of one's own, from added to served: two relays in two regions, a real certificate authority and its DNS.

    domain added ─► records set ─► verified ─► ordered, proved at the relay ─► sealed for each region ─► both relays switch

Then it is renewed when the authority says so, and replaced when it was revoked; what served goes on until the new one does,
also when the worker is killed before it records a step, or PostgreSQL in the middle of one.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from portico.control.domains.acme_accounts import Accounts
from portico.control.domains.acme_client import Client
from portico.control.domains.acme_errors import AcmeError
from portico.control.identity import operators
from portico.control.tunnels import relays
from portico.embedded.folders import temp_home
from portico.embedded.postgres import EmbeddedPostgres
from portico.embedded.units import portico_argv
from portico.kit import keyfiles
from portico.kit.db import Database, PoolLimits
from portico.settings import ApiSettings, Secret
from tests import pebble
from tests.ports import free_port
from tests.system.platform import Account, Child, Up, clean_environment, signal_all, tree
from tests.system.serving import Watch

pytestmark = pytest.mark.system

#: Generous: what is waited for is an event, on a machine that does other things.
PATIENCE = 90.0
ZONE = "acme.example.net"
HOOK = """#!{python}
import json, sys, urllib.request
verb, name, value = sys.argv[1:]
body = {{"host": name + "."}} | ({{"value": value}} if verb == "present" else {{}})
path = {{"present": "/set-txt", "cleanup": "/clear-txt"}}[verb]
urllib.request.urlopen(urllib.request.Request("{control}" + path, json.dumps(body).encode())).read()
"""


@dataclass
class World:
    """The platform with its second region, the authority, and an organization."""

    up: Up
    ca: pebble.Pebble
    account: Account
    ports: list[int]

    def served(self, name: str) -> list[x509.Certificate | None]:
        """What each relay shows who asks for ``name``, as far as the authority's root is behind it."""
        context = ssl.create_default_context(cadata=self.ca.root())
        return [_shown(port, name, context) for port in self.ports]

    def until(self, what: Callable[[], Any], why: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := what()):
            assert self.up.child.process.poll() is None, "the platform ended"
            assert time.monotonic() < deadline, f"{why}: not within {PATIENCE:g} s\n{self.up.child.tail(60)}"
            time.sleep(0.1)
        return found

    def everywhere(self, name: str, other_than: x509.Certificate | None = None) -> x509.Certificate:
        """The certificate that both relays serve, once they do."""

        def same() -> x509.Certificate | None:
            found = self.served(name)
            alike = found[0] is not None and all(one == found[0] for one in found)
            return found[0] if alike and found[0] != other_than else None

        return self.until(same, f"a certificate for {name} at every relay")  # type: ignore[no-any-return]

    def claim(self, name: str) -> dict[str, Any]:
        """Add a domain, and prove it."""
        return self.prove(self.account.call("POST", "/domains", {"name": name}))

    def prove(self, domain: dict[str, Any]) -> dict[str, Any]:
        """Set what the answer about a domain says, and verify it: at once, or by a look soon if there was one a moment ago."""
        for record in domain["records"]:
            if record["purpose"] == "ownership":
                self.ca.say("set-txt", host=f"{record['name']}.", value=record["value"])
            elif record["purpose"] == "delegation":
                self.ca.say("set-cname", host=f"{record['name']}.", target=f"{record['value']}.")
        self.ca.say(
            "add-a", host=domain["name"].removeprefix("*."), addresses=["127.0.0.1"]
        )  # as it answers about all others
        return self.account.call("POST", f"/domains/{domain['id']}/verify")

    def domain(self, found: dict[str, Any]) -> dict[str, Any]:
        return self.account.call("GET", f"/domains/{found['id']}")

    def sql(self, statement: str, *values: Any) -> list[Any]:
        async def act() -> list[Any]:
            db = Database(EmbeddedPostgres(self.up.home).uri, PoolLimits(size=1))
            try:
                async with db.transaction() as tx:
                    return list(await tx.raw.fetch(statement, *values))
            finally:
                await db.close()

        return asyncio.run(act())


def _shown(port: int, name: str, context: ssl.SSLContext) -> x509.Certificate | None:
    try:
        with (
            socket.create_connection(("127.0.0.1", port), 10) as sock,
            context.wrap_socket(sock, server_hostname=name) as tls,
        ):
            return x509.load_der_x509_certificate(tls.getpeercert(True) or b"")
    except (OSError, ssl.SSLError):
        return None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("certificates")
    home = temp_home("portico-certificates-")
    http_port, https_port, second_http, second_https, control = (free_port() for _ in range(5))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        ca = stack.enter_context(pebble.running(folder, http_port, https_port))
        hook = folder / "hook"
        hook.write_text(HOOK.format(python=sys.executable, control=ca.control))
        hook.chmod(0o755)
        up = Up(
            home, folder, stack, http_port=http_port, https_port=https_port, acme_agree_terms=True, acme_ca_file=ca.trust,
            acme_directory=ca.directory, acme_http_port=http_port, acme_tls_port=https_port, dns_resolvers=ca.dns,
            dns_timeout_seconds=10, outbound_allow="127.0.0.0/8", domain_addresses="127.0.0.1", challenge_zone=ZONE,
            acme_dns="exec", acme_dns_program=hook, acme_profiles="127.0.0.1=default", acme_poll_seconds=0.2,
            acme_challenges="http-01,tls-alpn-01", sweep_certificates_seconds=1, ask_renewals_seconds=1,
            check_domains_seconds=1, acme_retry_pause_seconds=1, queue_lease_seconds=4, order_max_attempts=40,
            order_retry_seconds=0.5,
        )  # fmt: skip
        key, relay_key = _second_region(up, folder)
        signer = keyfiles.worker_keys("certificate_key_file", home / "keys" / "worker.key").public
        relay = Child("relay-west", ["relay"], folder, {
            "api_url": up.api_url, "relay_name": "relay-west", "relay_key": relay_key, "state_dir": home / "west",
            "region": "west", "region_key_files": key, "certificate_signers": signer, "public_port": second_http,
            "https_port": second_https, "control_port": control, "public_url": f"http://127.0.0.1:{second_http}",
            "connect_url": f"ws://127.0.0.1:{control}/v1/connect", "exempt_loopback": 1,
        })  # fmt: skip
        stack.callback(relay.end)
        account = Account(up.api_url)
        stack.callback(account.close)
        relay.wait_for(lambda: "relay ready" in relay.err, PATIENCE, "ready line")
        yield World(up, ca, account, [https_port, second_https])


def _second_region(up: Up, folder: Path) -> tuple[Path, str]:
    """A key of another region, which is registered, and the key of a relay there."""
    path = folder / "west.key"
    made = _portico("admin", "regions", "new-key", str(path), "--json")
    _portico("admin", "regions", "--data", str(up.home), "add", "west", json.loads(made)["public_key"])

    async def act() -> str:
        db = Database(EmbeddedPostgres(up.home).uri, PoolLimits(size=1))
        try:
            async with db.transaction() as tx:
                return (await relays.create_key(tx, operators.INSTALLATION, "west", relay="relay-west"))[1]
        finally:
            await db.close()

    return path, asyncio.run(act())


def _portico(*args: str) -> str:
    done = subprocess.run(
        portico_argv(*args), env=clean_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_by_a_handshake(world: World) -> None:
    """TLS-ALPN-01, which is next where HTTP-01 has failed once."""
    name = f"alpn.d{free_port()}.example.com"
    domain = world.account.call("POST", "/domains", {"name": name})
    world.sql(
        "INSERT INTO certificate_schedules (domain_id, organization_id, next_at, failures)"
        " SELECT id, organization_id, now(), 1 FROM custom_domains WHERE id = $1",
        domain["id"],
    )
    world.prove(domain)
    assert _names(world.everywhere(name)) == [name]
    assert _orders(world, domain) == [("tls-alpn-01", "issued")]
    world.until(lambda: _active(world, domain), "an active certificate")


def test_a_wildcard_by_a_record(world: World) -> None:
    """DNS-01: `_acme-challenge` leads into the installation's own zone, where a program writes."""
    base = f"d{free_port()}.example.com"
    domain = world.claim(f"*.{base}")
    assert _names(world.everywhere(f"any.{base}")) == [f"*.{base}"]
    assert _orders(world, domain) == [("dns-01", "issued")]
    standing = world.until(lambda: _active(world, domain), "an active certificate")
    assert standing["regions_active"] == standing["regions_total"] == 2
    assert world.served(base) == [None, None], "a wildcard is one label below its name"


def _names(certificate: x509.Certificate) -> list[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return list(found.get_values_for_type(x509.DNSName))


def _orders(world: World, domain: dict[str, Any]) -> list[tuple[str, str]]:
    rows = world.sql(
        "SELECT challenge, state FROM certificate_orders WHERE domain_id = $1 ORDER BY created_at", domain["id"]
    )
    return [(row["challenge"], row["state"]) for row in rows]


def test_from_added_to_served_renewed_and_replaced(world: World) -> None:
    name = f"www.d{free_port()}.example.com"
    domain = world.claim(name)
    first = world.everywhere(name)
    assert _names(first) == [name]
    standing = world.until(lambda: _active(world, domain), "an active certificate")
    assert standing["serial"] and standing["error_code"] is None
    assert standing["regions_active"] == standing["regions_total"] == 2

    # The authority wants it renewed now.
    (version,) = world.sql("SELECT chain_pem FROM certificate_versions WHERE domain_id = $1", domain["id"])
    now = datetime.now(UTC).replace(microsecond=0)
    window = {"start": (now - timedelta(hours=1)).isoformat(), "end": (now + timedelta(seconds=2)).isoformat()}
    world.ca.suggest(version["chain_pem"], json.dumps({"suggestedWindow": window}))
    ask = "UPDATE certificate_schedules SET ari_next_at = now() WHERE domain_id = $1 AND ari_next_at IS NOT NULL RETURNING 1"
    assert world.sql(ask, domain["id"])
    second = world.everywhere(name, other_than=first)
    orders = world.sql(
        "SELECT replaces, state FROM certificate_orders WHERE domain_id = $1 ORDER BY created_at", domain["id"]
    )
    assert [order["state"] for order in orders] == ["issued", "issued"]

    # It is revoked: the answer about its renewal says so, and another one takes its place.
    _revoke(world, second)
    assert world.sql(ask, domain["id"])
    third = world.everywhere(name, other_than=second)
    assert third.serial_number not in (first.serial_number, second.serial_number)


def _active(world: World, domain: dict[str, Any]) -> Any:
    found = world.domain(domain)["certificate"]
    return found if found["status"] == "active" else None


def _revoke(world: World, certificate: x509.Certificate) -> None:
    """As its owner at the authority does: with the account of the installation."""

    async def act(client: Client) -> None:
        await client.revoke(certificate.public_bytes(serialization.Encoding.DER), 1)

    _as_installation(world, act)


def _as_installation(world: World, act: Callable[[Client], Awaitable[None]]) -> None:
    """Something that is done at the authority with the account of the installation."""
    master = Secret((world.up.home / "master.key").read_text().strip())

    async def run() -> None:
        uri = EmbeddedPostgres(world.up.home).uri
        settings = ApiSettings(
            database_url=Secret(uri), master_key=master, acme_agree_terms=True, acme_directory=world.ca.directory,
            acme_ca_file=world.ca.trust,
        )  # fmt: skip
        db = Database(uri, PoolLimits(size=2))
        try:
            async with Accounts(settings, db).client(world.ca.directory) as client:
                await act(client)
        finally:
            await db.close()

    asyncio.run(run())


# -- kills ---------------------------------------------------------------------------------------------------------------

#: Every step of an order in its order; `asked`: that the authority is about to be asked for it.
STEPS = (
    "probing", "ordering", "asked", "authorizing", "publishing", "validating", "ready", "finalizing", "downloading", "issued",
)  # fmt: skip
#: Who writes a step, or a switch, waits inside of that transaction for as long as a drill holds its lock.
_DRILL = """
CREATE OR REPLACE FUNCTION drill_order() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_advisory_xact_lock_shared(815, hashtext(CASE WHEN OLD.state <> NEW.state THEN NEW.state ELSE 'asked' END));
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION drill_switch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_advisory_xact_lock_shared(815, hashtext('switch'));
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER drill AFTER UPDATE ON certificate_orders FOR EACH ROW
    WHEN (OLD.state <> NEW.state OR OLD.asked <> NEW.asked) EXECUTE FUNCTION drill_order();
CREATE OR REPLACE TRIGGER drill AFTER UPDATE ON certificate_heads FOR EACH ROW
    WHEN (OLD.active_id <> NEW.active_id) EXECUTE FUNCTION drill_switch();
"""
_WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 815 AND NOT granted"


class Drill:
    """Holds steps, and says when somebody stands at one with its work done and nothing recorded."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def at(cls, world: World) -> AsyncIterator[Drill]:
        connection = await asyncpg.connect(EmbeddedPostgres(world.up.home).uri)
        try:
            await connection.execute(_DRILL)
            yield cls(connection)
        finally:
            connection.terminate()  # what it held is free; that it lives is not said

    async def hold(self, step: str) -> None:
        await self._connection.fetchval("SELECT pg_advisory_lock(815, hashtext($1))", step)

    async def free(self, step: str) -> None:
        await self._connection.fetchval("SELECT pg_advisory_unlock(815, hashtext($1))", step)

    async def reached(self, step: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while not await self._connection.fetchval(_WAITING):
                await asyncio.sleep(0.02)


@pytest.fixture
def drilled(world: World) -> Iterator[tuple[str, dict[str, Any], x509.Certificate]]:
    """A name with its domain and the certificate that serves; both relays are watched until the end of the test."""
    name = f"kill.d{free_port()}.example.com"
    domain = world.claim(name)
    first = world.everywhere(name)
    context = ssl.create_default_context(cadata=world.ca.root())
    world.until(lambda: _active(world, domain), "an active certificate")

    def look(port: int) -> str | None:
        found = _shown(port, name, context)
        return None if found is None else f"{found.serial_number:x}"

    with Watch(world.ports, look) as watch:
        yield name, domain, first
    assert not watch.failed, watch.failed[:5]
    versions = world.sql("SELECT serial FROM certificate_versions WHERE domain_id = $1 ORDER BY version", domain["id"])
    serials = [row["serial"].lstrip("0") for row in versions]
    for port, seen in watch.seen.items():
        assert seen == serials, f"{port} served {seen} of {serials}"


def _retry(world: World, domain: dict[str, Any]) -> None:
    """Ask for another order, in which the name is to be proved anew: Pebble takes the proof of before once in a hundred times,
    although it is told never to."""
    proofs = world.sql("SELECT proofs FROM certificate_orders WHERE domain_id = $1", domain["id"])
    used = [proof["authorization_url"] for row in proofs for proof in row["proofs"]]

    async def act(client: Client) -> None:
        for url in used:
            try:
                await client._post(url, {"status": "deactivated"})
            except AcmeError as err:
                assert err.status < 500, err  # it is already

    _as_installation(world, act)
    world.account.call("POST", f"/domains/{domain['id']}/certificate/retry")


def _check_whole(world: World, domain: dict[str, Any], revision: int) -> None:
    """The certificate of this revision is the result of one order, each of whose events is there and was applied, once. (What
    relays do after the switch, and an outage, is told as it happens: `replication`.)"""
    rows = world.until(lambda: _events(world, domain, revision), "every event applied")
    assert set(rows) >= {
        "renewal.started", "validation.started", "validation.succeeded", "renewal.succeeded", "deployment.succeeded",
    }  # fmt: skip
    assert set(rows.values()) == {1}, rows
    assert _orders(world, domain) == [("http-01", "issued")] * revision
    versions = world.sql(
        "SELECT version, state, sealed IS NULL AS keyless FROM certificate_versions WHERE domain_id = $1 ORDER BY version",
        domain["id"],
    )
    assert [(row["version"], row["state"]) for row in versions] == [
        *((number, "retired") for number in range(1, revision)), (revision, "active"),
    ]  # fmt: skip
    assert [row["keyless"] for row in versions] == [True] * (revision - 1) + [False], "one key, of what serves"


def _events(world: World, domain: dict[str, Any], revision: int) -> dict[str, int]:
    rows = world.sql(
        "SELECT callback_class || '.' || callback_action AS what, status, count(*) AS count"
        " FROM certificate_lifecycle_events WHERE domain_id = $1 AND revision = $2 AND callback_class <> 'replication'"
        " GROUP BY 1, 2",
        domain["id"], revision,
    )  # fmt: skip
    whole = "deployment.succeeded" in {row["what"] for row in rows}
    settled = all(row["status"] in ("applied", "superseded") for row in rows)
    return {row["what"]: row["count"] for row in rows} if whole and settled else {}


async def test_the_worker_is_killed_at_every_step_of_an_order(
    world: World, drilled: tuple[str, dict[str, Any], x509.Certificate]
) -> None:
    """Each time what the step does outside is done, and nothing of it recorded: the next worker finds what there is."""
    name, domain, first = drilled
    before = world.ca.orders()
    async with Drill.at(world) as drill:
        await drill.hold(STEPS[0])
        await asyncio.to_thread(_retry, world, domain)
        for step, following in zip(STEPS, (*STEPS[1:], None), strict=True):
            await drill.reached(step)
            os.kill(world.up.pid("worker"), signal.SIGKILL)
            if following is not None:
                await drill.hold(following)
            await drill.free(step)
        await asyncio.to_thread(world.everywhere, name, first)
    assert world.ca.orders() == before + 1, "one order at the authority"
    await asyncio.to_thread(_check_whole, world, domain, 2)


async def test_postgresql_is_killed_in_the_middle(
    world: World, drilled: tuple[str, dict[str, Any], x509.Certificate]
) -> None:
    """In the transaction of a switch, then in that of an order's step: neither happened, and both happen."""
    name, domain, serves = drilled
    before = world.ca.orders()
    for revision, step in ((2, "switch"), (3, "validating")):
        async with Drill.at(world) as drill:
            await drill.hold(step)
            await asyncio.to_thread(_retry, world, domain)
            await drill.reached(step)
            assert world.served(name) == [serves, serves]
            signal_all(tree(world.up.pid("postgres")), signal.SIGKILL)
        serves = await asyncio.to_thread(world.everywhere, name, serves)
        await asyncio.to_thread(_check_whole, world, domain, revision)
    assert world.ca.orders() == before + 2
