"""A domain of one's own, from added to served: two relays in two regions, a real certificate authority and its DNS.

    domain added ─► records set ─► verified ─► ordered, proved at the relay ─► sealed for each region ─► both relays switch

Then it is renewed when the authority says so, and replaced when it was revoked; what served goes on until the new one does.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from portico.control.domains.acme_accounts import Accounts
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
from tests.system.platform import Account, Child, Up, clean_environment

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
        """Add a domain, set what the answer says, and verify it."""
        domain = self.account.call("POST", "/domains", {"name": name})
        for record in domain["records"]:
            if record["purpose"] == "ownership":
                self.ca.say("set-txt", host=f"{record['name']}.", value=record["value"])
            elif record["purpose"] == "delegation":
                self.ca.say("set-cname", host=f"{record['name']}.", target=f"{record['value']}.")
        self.ca.say("add-a", host=name, addresses=["127.0.0.1"])
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
            check_domains_seconds=1,
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


def test_from_added_to_served_renewed_and_replaced(world: World) -> None:
    name = f"www.d{free_port()}.example.com"
    domain = world.claim(name)
    first = world.everywhere(name)
    names = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [name]
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
    master = Secret((world.up.home / "master.key").read_text().strip())

    async def act() -> None:
        uri = EmbeddedPostgres(world.up.home).uri
        settings = ApiSettings(
            database_url=Secret(uri), master_key=master, acme_agree_terms=True, acme_directory=world.ca.directory,
            acme_ca_file=world.ca.trust,
        )  # fmt: skip
        db = Database(uri, PoolLimits(size=2))
        try:
            async with Accounts(settings, db).client(world.ca.directory) as client:
                await client.revoke(certificate.public_bytes(serialization.Encoding.DER), 1)
        finally:
            await db.close()

    asyncio.run(act())
