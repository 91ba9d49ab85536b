"""Validations of certificate authorities, answered by the relay: by exact bytes, and by the real Pebble asking."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from portico.control.domains import acme_client
from portico.relay.edge_rows import Challenge, SnapshotInvalid
from portico.relay.server import Relay
from portico.relay.snapshot import Snapshot
from portico.relay.snapshot_store import SnapshotStore
from tests import pebble
from tests.relay.doubles import Client, ScriptedAgent, port, row
from tests.relay.test_tls_port import until

TOKEN = "evaGxfADs6pSRb2LAv9IZf17Dt3juxGJ-PCt92wr-oA"
PROOF = f"{TOKEN}.9jg46WB3rR_AHD-EBXdN7cBkH1WOu0tA3M9fm21mqTI"
ASK = f"/.well-known/acme-challenge/{TOKEN}"


def challenge(kind: str = "http-01", host: str = "web.localhost", **more: Any) -> dict[str, Any]:
    made = {
        "id": f"chl_{kind}",
        "type": kind,
        "host": host,
        "token": TOKEN,
        "authorization": PROOF,
        "until": time.time() + 600,
    }
    return {"kind": "challenge", "challenge": {**made, **more}}


def tell(relay: Relay, *changes: Any) -> None:
    version = relay.snapshot.version
    assert version is not None
    relay.snapshot.apply({"type": "delta", "version": version + 1, "changes": list(changes)})


def get(target: str, host: str = "web.localhost", *more: str) -> bytes:
    return "\r\n".join([f"GET {target} HTTP/1.1", f"Host: {host}", *more, "", ""]).encode()


class TestHttp:
    async def test_a_host_without_a_tunnel_answers_and_keeps_the_connection(
        self, relay: Relay, visit: Callable[[], Awaitable[Client]]
    ) -> None:
        tell(relay, challenge())
        client = await visit()
        for _ in range(2):
            client.send(get(ASK))
            status, fields, body = await client.response()
            assert (status, body) == (200, PROOF.encode())
            assert fields[b"cache-control"] == [b"no-store"] and b"portico-error" not in fields
        client.send(get(ASK, "web.localhost:80"))
        assert (await client.response())[0] == 200
        client.send(get("/", "web.localhost"))
        assert (await client.response())[0] == 404

    @pytest.mark.parametrize(
        "request_bytes",
        [
            get(ASK + "x"), get(ASK[:-1]), get(ASK + "?a=1"), get(ASK, "other.localhost"), get("//" + ASK[1:]),
            get("/.well-known/acme-challenge/"), get(ASK, "web.localhost", "Content-Length: 0").replace(b"GET", b"POST"),
        ],
    )  # fmt: skip
    async def test_anything_else_goes_where_the_name_leads(
        self, relay: Relay, visit: Callable[[], Awaitable[Client]], request_bytes: bytes
    ) -> None:
        tell(relay, challenge())
        client = await visit()
        client.send(request_bytes)
        status, fields, _ = await client.response()
        assert status == 404 and fields[b"portico-error"] == [b"edge.host_unassigned"]

    async def test_a_target_that_gets_its_own_certificates_still_does(
        self, relay: Relay, agent: ScriptedAgent, visit: Callable[[], Awaitable[Client]]
    ) -> None:
        await agent.online()
        client = await visit()
        for _ in range(4):  # until its head is a known one, and takes the short way
            client.send(get(ASK))
            assert (await client.response())[2] == b"hello"
        tell(relay, challenge())
        client.send(get(ASK))
        assert (await client.response())[2] == PROOF.encode()
        client.send(get(ASK + "x"))
        assert (await client.response())[2] == b"hello"
        tell(relay, {"kind": "challenge_removed", "id": "chl_http-01"})
        client.send(get(ASK))
        assert (await client.response())[2] == b"hello"

    async def test_neither_a_redirect_nor_credentials_stand_before_it(
        self, relay: Relay, agent: ScriptedAgent, visit: Callable[[], Awaitable[Client]]
    ) -> None:
        change = {"kind": "tunnel", "tunnel": row("web", policy={"plain_http": "redirect"}, policy_version=2)}
        tell(relay, change, challenge())
        client = await visit()
        client.send(get("/"))
        assert (await client.response())[0] == 308
        client.send(get(ASK))
        assert (await client.response())[2] == PROOF.encode()

    async def test_nothing_is_answered_after_its_time(
        self, relay: Relay, visit: Callable[[], Awaitable[Client]]
    ) -> None:
        tell(relay, challenge(until=time.time() - 1))
        client = await visit()
        client.send(get(ASK))
        assert (await client.response())[0] == 404


async def shake(relay: Relay, name: str, *protocols: str) -> tuple[str | None, x509.Certificate]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(list(protocols))
    reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 2), ssl=context, server_hostname=name)
    spoken = writer.get_extra_info("ssl_object")
    shown = x509.load_der_x509_certificate(spoken.getpeercert(True))
    if "acme-tls/1" in protocols:
        assert await reader.read() == b""
    writer.close()
    return spoken.selected_alpn_protocol(), shown


class TestTls:
    async def test_the_certificate_of_a_validation_is_its_own(self, relay: Relay) -> None:
        tell(relay, challenge("tls-alpn-01"))
        protocol, shown = await shake(relay, "web.localhost", "acme-tls/1")
        assert protocol == "acme-tls/1" and relay.servers[2].stats.proved == 1  # type: ignore[union-attr]
        found = shown.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31"))
        assert found.critical and found.value.value == b"\x04\x20" + hashlib.sha256(PROOF.encode()).digest()  # type: ignore[attr-defined]
        names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert list(names) == [x509.DNSName("web.localhost")]
        protocol, other = await shake(relay, "web.localhost", "http/1.1")
        assert protocol == "http/1.1" and other != shown
        await until(lambda: not relay.public.connections)

    async def test_without_a_challenge_nobody_speaks_it(self, relay: Relay) -> None:
        tell(relay, challenge("tls-alpn-01"))
        with pytest.raises(ssl.SSLError):
            await shake(relay, "other.localhost", "acme-tls/1")
        tell(relay, {"kind": "challenge_removed", "id": "chl_tls-alpn-01"})
        with pytest.raises(ssl.SSLError):
            await shake(relay, "web.localhost", "acme-tls/1")


class TestState:
    async def test_a_copy_on_disk_has_them_and_a_snapshot_replaces_them(self, tmp_path: Path) -> None:
        snapshot, told = Snapshot(), challenge()["challenge"]
        whole = {"keys": [], "tunnels": [], "ended": [], "challenges": [told], "organizations": []}
        snapshot.apply({"type": "snapshot", "version": 1, "state": whole})
        assert await SnapshotStore(snapshot, tmp_path, source="api", delay=0).save()
        other = Snapshot()
        assert SnapshotStore(other, tmp_path, source="api", delay=0).load()
        assert other.challenges == snapshot.challenges == {"chl_http-01": Challenge(**told)}
        other.apply({"type": "snapshot", "version": 2, "state": {**whole, "challenges": []}})
        assert not other.challenges

    @pytest.mark.parametrize(
        "wrong", [{"host": ""}, {"token": 7}, {"until": "x"}, {"authorization": "x" * 600}, {"id": None}]
    )
    def test_a_malformed_one_changes_nothing(self, wrong: dict[str, Any]) -> None:
        snapshot = Snapshot()
        state = {"keys": [], "tunnels": [], "ended": []}
        snapshot.apply({"type": "snapshot", "version": 1, "state": state})
        with pytest.raises(SnapshotInvalid):
            snapshot.apply({"type": "delta", "version": 2, "changes": [challenge(), challenge(**wrong)]})
        with pytest.raises(SnapshotInvalid):
            whole = {**state, "challenges": [challenge(**wrong)["challenge"]]}
            snapshot.apply({"type": "snapshot", "version": 3, "state": whole})
        assert (snapshot.version, snapshot.challenges) == (1, {})

    def test_what_is_over_is_forgotten(self) -> None:
        now = [1000.0]
        snapshot = Snapshot(wall=lambda: now[0])
        state = {"keys": [], "tunnels": [], "ended": [], "challenges": [challenge(until=2000.0)["challenge"]]}
        snapshot.apply({"type": "snapshot", "version": 1, "state": state})
        assert snapshot.challenges
        now[0] = 3000.0
        snapshot.prune()
        assert not snapshot.challenges


@pytest.mark.parametrize("kind", ["http-01", "tls-alpn-01"])
async def test_a_real_authority_is_satisfied(relay: Relay, tmp_path: Path, kind: str) -> None:
    with pebble.running(tmp_path, port(relay, 1), port(relay, 2)) as ca:
        client = acme_client.Client(ca.directory, acme_client.new_key(), context=ca.context())
        try:
            await client.register([], agree=True)
            order = await client.new_order(["proof.example.com"])
            (url,) = order.authorizations
            (wanted,) = [one for one in (await client.authorization(url)).challenges if one.kind == kind]
            tell(relay, challenge(kind, "proof.example.com", token=wanted.token,
                                  authorization=client.key_authorization(wanted.token)))  # fmt: skip
            await client.respond(wanted.url)
            async with asyncio.timeout(60):
                while (found := await client.authorization(url)).status == "pending":
                    await asyncio.sleep(0.05)
            assert found.status == "valid", found.failure
        finally:
            await client.close()
