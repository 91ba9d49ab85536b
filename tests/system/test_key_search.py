"""Certificates on the whole platform, in two regions: who has a private key, and what serves while parts are killed.

`portico up` (API, worker, PostgreSQL, Valkey and two relays of the region `local`) and one relay more, of the region `far`, with
a key of its own. Keys are made in a process beside them, as in a worker (``sealer.py``).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from portico.embedded.folders import temp_home
from portico.embedded.postgres import EmbeddedPostgres
from portico.kit import ids, keyfiles, loop
from tests.ports import free_port
from tests.system import search
from tests.system.platform import Account, Child, Up, clean_environment, port_span, tree
from tests.system.serving import Watch

pytestmark = [pytest.mark.timeout(300)]


class Sealer:
    """The process beside the platform."""

    def __init__(self, url: str, key_file: Path, ca: Path) -> None:
        self._argv = [sys.executable, "-m", "tests.system.sealer", url, str(key_file), str(ca)]
        self.start()

    def start(self) -> None:
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=clean_environment()
        )

    def ask(self, domain: str, hostname: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"domain": domain, "hostname": hostname}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def seal(self, domain: str, hostname: str) -> dict[str, Any]:
        self.ask(domain, hostname)
        said = self.answer()
        assert "error" not in said, said
        return said

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class World:
    """See the module."""

    def __init__(self, home: Path, folder: Path, stack: ExitStack) -> None:
        self.up = Up(home, folder, stack, relays=2, tcp_ports=port_span(20))
        self.account = Account(self.up.api_url)
        stack.callback(self.account.close)
        self.url = EmbeddedPostgres(home).uri
        self.sealer = Sealer(self.url, home / "keys" / "worker.key", folder)
        stack.callback(self.sealer.end)
        self.far_port = free_port()
        self.far = self._far_relay(folder, stack)

    def sql(self, query: str, *values: Any) -> list[Any]:
        async def run() -> list[Any]:
            connection = await asyncpg.connect(self.url)
            try:
                return list(await connection.fetch(query, *values))
            finally:
                await connection.close()

        return list(loop.run(run()))

    def _far_relay(self, folder: Path, stack: ExitStack) -> Child:
        key_file = folder / "far.key"
        made = self._admin("new-key", str(key_file), "--json")
        self._admin("add", "far", json.loads(made)["public_key"])
        token = ids.new_token("rly")
        self.sql(
            "INSERT INTO relay_keys (id, name, digest, prefix) VALUES ($1, 'far', $2, $3)",
            ids.new_id("key"), ids.digest(token), ids.display_prefix(token),
        )  # fmt: skip
        assert {row["region"] for row in json.loads(self._admin("--json"))} == {"far", "local"}
        child = Child(
            "far",
            ["relay"],
            folder,
            {
                "relay_key": token, "relay_name": "far-1", "region": "far", "api_url": self.up.api_url,
                "state_dir": folder / "far", "public_port": free_port(), "https_port": self.far_port,
                "control_port": free_port(), "region_key_files": key_file, "exempt_loopback": 1,
                "certificate_signers": keyfiles.worker_keys("x", self.up.home / "keys" / "worker.key").public,
            },
        )  # fmt: skip
        stack.callback(child.end)
        child.wait_for(lambda: "relay ready" in child.err, 60, "ready")
        return child

    def _admin(self, *args: str) -> str:
        argv = [sys.executable, "-m", "portico.cli", "admin", "regions"]
        tail = ["--data", str(self.up.home)]
        words = [*argv, *tail, *args] if args[0] != "new-key" else [*argv, *args]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=clean_environment())
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def domain(self, name: str) -> str:
        made = ids.new_id("dom")
        organization = self.account.call("GET", "/whoami")["organization"]["id"]
        self.sql(
            "INSERT INTO custom_domains (id, organization_id, name, hostname_status, verification_token)"
            " VALUES ($1, $2, $3, 'active', 'x')",
            made, organization, name,
        )  # fmt: skip
        return made

    def served(self, port: int, host: str, ca: str) -> str | None:
        """The fingerprint that a client sees that verifies it; ``None`` when the relay has nothing for the name."""
        context = ssl.create_default_context(cadata=ca)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
            try:
                with context.wrap_socket(raw, server_hostname=host) as tls:
                    return hashlib.sha256(tls.getpeercert(binary_form=True) or b"").hexdigest()
            except ssl.SSLError:
                return None

    @property
    def ports(self) -> tuple[int, int]:
        return self.up.https_port, self.far_port


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = temp_home("portico-certificates-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        yield World(home, tmp_path_factory.mktemp("certificates"), stack)


def until(condition: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not {what} within {seconds} s"
        time.sleep(0.05)
    return found


def needles(key_pem: str) -> list[bytes]:
    """A private key as it may be spelt: lines of its PEM, its DER, and the number alone, raw, in hex and base64."""
    key = serialization.load_pem_private_key(key_pem.encode(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    form = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    number = key.private_numbers().private_value.to_bytes(32, "big")
    lines = [line.encode() for line in key_pem.splitlines() if line and "-----" not in line]
    return [*lines[:2], key.private_bytes(*form), number, number.hex().encode(), base64.b64encode(number)[:40]]


def everywhere(world: World, host: str, made: dict[str, Any]) -> bool:
    return all(world.served(port, host, made["ca"]) == made["fingerprint"] for port in world.ports)


def test_a_private_key_is_nowhere_but_where_it_was_made_and_is_used(world: World) -> None:
    host = f"secret-{os.urandom(3).hex()}.example.com"
    mine = world.domain(host)
    made = world.sealer.seal(mine, host)
    until(lambda: everywhere(world, host, made), "served in both regions")
    wanted = needles(made["key"])
    # The same search finds it where it has to be: as text, and as what text stands for.
    assert wanted[0] in search.in_memory(world.sealer.process.pid, wanted)
    # A renewal, so that rows were written over, and an export.
    renewed = world.sealer.seal(mine, host)
    until(lambda: everywhere(world, host, renewed), "renewed")
    wanted += needles(renewed["key"])
    world.sql("CHECKPOINT")
    export = _export(world)
    assert not search.in_stream(iter([export]), wanted), "in an export"
    rows = json.loads((world.up.home / "run" / "children").read_text())
    named = {row["name"]: int(row["pid"]) for row in rows}
    assert {"api", "worker", "postgres", "valkey"} <= set(named)
    for name in ("api", "worker", "postgres", "valkey"):
        for pid in tree(named[name]):
            try:
                assert not search.in_memory(pid, wanted), f"in the memory of {name} ({pid})"
            except (FileNotFoundError, ProcessLookupError):
                continue  # a backend that ended
    # The database's files, the log of PostgreSQL, Valkey's, relays' state, objects; logs of all processes.
    assert not search.in_files(world.up.home, wanted)
    assert not search.in_files(world.up.folder, wanted)


def _export(world: World) -> bytes:
    """What the organization's export holds, unpacked."""
    made = world.account.call("POST", "/org/exports")
    until(lambda: world.account.call("GET", f"/org/exports/{made['id']}")["state"] == "ready", "exported")
    http = world.account._http
    headers = {"Authorization": f"Bearer {world.account.token}"}
    answer = http.get(f"/org/exports/{made['id']}/download", headers=headers)
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        return b"\n".join(archive.read(name) for name in archive.namelist())


def test_kills_in_the_middle_of_a_switch(world: World) -> None:
    """`kill -9` of PostgreSQL, of the worker and of the process that seals, at any moment from sealing to serving: what served
    goes on at every handshake, and in the end both regions serve the newest."""
    host = f"drill-{os.urandom(3).hex()}.example.com"
    mine = world.domain(host)
    first = world.sealer.seal(mine, host)
    until(lambda: everywhere(world, host, first), "served in both regions")
    with Watch(world.ports, lambda port: world.served(port, host, first["ca"])) as watch:
        for round_ in range(6):
            victim = ("postgres", "worker", "sealer")[round_ % 3]
            world.sealer.ask(mine, host)
            time.sleep(random.uniform(0, 0.15))
            if victim == "sealer":
                world.sealer.end()
                world.sealer.start()
            else:
                os.kill(world.up.pid(victim), signal.SIGKILL)
                world.sealer.answer()  # done, or an error: a worker's job would be tried again

            def sealed() -> dict[str, Any] | None:
                try:
                    said = world.sealer.seal(mine, host)
                except AssertionError:
                    return None
                return said

            made = until(sealed, "sealed again")
            until(lambda made=made: _active(world, mine) == made["fingerprint"], f"switched after {victim} was killed")
            until(lambda made=made: everywhere(world, host, made), "served in both regions")
    assert not watch.failed, watch.failed[:5]
    known = {row["fingerprint"]: row["version"] for row in world.sql(
        "SELECT fingerprint, version FROM certificate_versions WHERE domain_id = $1", mine
    )}  # fmt: skip
    for port, seen in watch.seen.items():
        versions = [known[fingerprint] for fingerprint in seen]
        assert versions == sorted(versions), f"{port} went back: {versions}"


def _active(world: World, domain: str) -> str | None:
    try:
        found = world.sql(
            "SELECT v.fingerprint FROM certificate_heads h JOIN certificate_versions v ON v.id = h.active_id"
            " WHERE h.domain_id = $1",
            domain,
        )
    except (OSError, asyncpg.PostgresError):
        return None
    return str(found[0][0]) if found else None
