"""Passwords of visitors from end to end: who comes in, what is seen of a password where, changes, order, attempts."""

from __future__ import annotations

import asyncio
import base64
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from argon2 import PasswordHasher
from argon2.low_level import verify_secret

from portico.relay import heads
from portico.relay.server import Relay
from tests.relay.edge import Edge, ask, online
from tests.relay.known import visitors

QUICK = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
PASSWORD = "hunter2-of-alice"
ALICE = {"name": "alice", "digest": QUICK.hash(PASSWORD)}
BOB = {"name": "bøb", "digest": QUICK.hash("pässwörd: with colon")}
PROTECTED: dict[str, Any] = {"basic_auth": {"users": [ALICE, BOB]}}

DENY: dict[str, Any] = {"addresses": {"rules": [{"deny": "127.0.0.0/8"}]}}
FULL: dict[str, Any] = {"concurrency": 1}

Visit = Callable[..., Any]


def basic(name: str = "alice", password: str = PASSWORD) -> bytes:
    return b"Basic " + base64.b64encode(f"{name}:{password}".encode())


def get(authorization: bytes | None, more: bytes = b"", host: bytes = b"web.localhost") -> bytes:
    given = b"" if authorization is None else b"Authorization: %b\r\n" % authorization
    return b"GET /a HTTP/1.1\r\nHost: %b\r\n%b%b\r\n" % (host, given, more)


@pytest.fixture
def policy() -> dict[str, Any]:
    """Overridden by tests of another one."""
    return PROTECTED


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The passwords that were verified, none of them on the loop."""
    found: list[bytes] = []

    def verify(digest: bytes, password: bytes, kind: Any) -> bool:
        found.append(password)
        assert threading.current_thread() is not threading.main_thread()
        return verify_secret(digest, password, kind)

    monkeypatch.setattr("argon2.low_level.verify_secret", verify)
    return found


@pytest.fixture
async def edge(relay: Relay, policy: dict[str, Any], verified: list[bytes]) -> AsyncIterator[Edge]:
    async with online(relay, policy) as tunnel:
        yield tunnel


class Gate:
    """Verifications go on once it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self._entered = threading.Event(), threading.Event()

        def verify(digest: bytes, password: bytes, kind: Any) -> bool:
            self._entered.set()
            self.open.wait(5)
            return verify_secret(digest, password, kind)

        monkeypatch.setattr("argon2.low_level.verify_secret", verify)

    async def entered(self) -> None:
        """Until one has begun."""
        assert await asyncio.to_thread(self._entered.wait, 5)


@pytest.fixture
def gate(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


class TestWhoComesIn:
    @pytest.mark.parametrize(
        ("given", "status", "code"),
        [
            (None, 401, b"edge.auth_required"),
            (b"Bearer abc", 401, b"edge.auth_required"),
            (basic("alice", "wrong"), 401, b"edge.auth_invalid"),
            (basic("nobody"), 401, b"edge.auth_invalid"),
            (basic("bøb", "pässwörd"), 401, b"edge.auth_invalid"),
            (b"Basic !!", 401, b"edge.auth_invalid"),
            (b"Basic", 401, b"edge.auth_required"),
            (basic() + b"\r\nAuthorization: " + basic(), 401, b"edge.auth_invalid"),
            (basic(), 200, None),
            (basic("bøb", "pässwörd: with colon"), 200, None),
            (basic().replace(b"Basic ", b"bASIC   "), 200, None),
        ],
    )
    async def test_each_time_the_same(
        self, edge: Edge, visit: Visit, verified: list[bytes], given: bytes | None, status: int, code: bytes | None
    ) -> None:
        """First verified, then remembered, on one connection and on another; also when the request itself is a known one."""
        client = await visit()
        for _ in range(4):
            got, error, fields = await ask(client, get(given))
            assert (got, error) == (status, code)
            challenge = fields.get(b"www-authenticate")
            assert challenge == ([b'Basic realm="Portico", charset="UTF-8"'] if status == 401 else None)
            assert status == 200 or fields[b"cache-control"] == [b"no-store"]
        assert (await ask(await visit(), get(given)))[:2] == (status, code)
        assert len(verified) <= 1
        assert edge.target.requests == (5 if status == 200 else 0)

    async def test_after_any_wrong_one_the_right_one_and_the_other_way_round(
        self, edge: Edge, visit: Visit, verified: list[bytes]
    ) -> None:
        client = await visit()
        for _ in range(3):
            assert (await ask(client, get(basic("alice", "wrong"))))[0] == 401
            assert (await ask(client, get(basic())))[0] == 200
            assert (await ask(client, get(None)))[0] == 401
        assert sorted(verified) == sorted((b"wrong", PASSWORD.encode()))

    async def test_a_body_waits_for_the_verdict(self, edge: Edge, visit: Visit) -> None:
        head = b"POST /a HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: 100000\r\nAuthorization: %b\r\n\r\n"
        client = await visit()
        got, code, _ = await ask(client, head % basic("alice", "wrong") + b"x" * 100_000)
        assert (got, code) == (401, b"edge.auth_invalid")
        client = await visit()
        client.send(head.replace(b"100000", b"5") % basic() + b"x" * 5)
        assert (await client.response())[0] == 200
        assert edge.target.sent.endswith(b"\r\n\r\n") and edge.target.requests == 1

    async def test_pipelined_requests_are_decided_each_on_its_own(self, edge: Edge, visit: Visit) -> None:
        client = await visit(
            get(basic()) + get(None) + get(basic("alice", "wrong")) + get(basic("bøb", "x")) + get(basic())
        )
        assert [(await client.response())[0] for _ in range(5)] == [200, 401, 401, 401, 200]

    async def test_a_visitor_that_leaves_meanwhile(self, edge: Edge, visit: Visit, gate: Gate) -> None:
        client = await visit(get(basic()))
        await gate.entered()
        client.writer.transport.abort()
        while edge.relay.public.connections:
            await asyncio.sleep(0.005)
        other = await visit(get(basic()))
        gate.open.set()
        assert (await other.response())[0] == 200
        assert edge.relay.agents.by_tunnel["tun_web"].inflight == 0
        assert edge.target.requests == 1

    async def test_a_password_that_is_renewed_meanwhile(self, edge: Edge, visit: Visit, gate: Gate) -> None:
        """The digest that was being checked is another now: it is checked again, and not one too many."""
        client = await visit(get(basic()))
        await gate.entered()
        edge.change({"basic_auth": {"users": [{"name": "alice", "digest": QUICK.hash(PASSWORD)}]}})
        gate.open.set()
        assert (await client.response())[0] == 200

    async def test_an_upgrade_is_refused_before_its_101(self, edge: Edge, visit: Visit) -> None:
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        for given, code in ((None, b"edge.auth_required"), (basic("alice", "x"), b"edge.auth_invalid")):
            client = await visit()
            got, error, _ = await ask(client, get(given, upgrade))
            assert (got, error) == (401, code)
        assert edge.target.requests == 0
        client = await visit(get(basic(), upgrade))
        assert (await client.read_head()).startswith(b"HTTP/1.1 101 ")
        client.send(b"ping")
        assert await client.read(4) == b"ping"
        assert b"uthorization" not in edge.target.sent

    @pytest.mark.parametrize("policy", [{"basic_auth": {"realm": "Shop preview", "users": [ALICE]}}])
    async def test_the_realm_is_the_owners(self, edge: Edge, visit: Visit) -> None:
        fields = (await ask(await visit(), get(None)))[2]
        assert fields[b"www-authenticate"] == [b'Basic realm="Shop preview", charset="UTF-8"']


class TestWhereItGoes:
    async def test_nobody_behind_the_edge_sees_it(
        self, edge: Edge, visit: Visit, caplog: pytest.LogCaptureFixture
    ) -> None:
        given = basic()
        with caplog.at_level(logging.DEBUG):
            client = await visit()
            for name in (b"Authorization", b"AUTHORIZATION", b"authorization"):
                for _ in range(3):
                    assert (await ask(client, get(None, b"%b: %b\r\nX-Kept: 1\r\n" % (name, given))))[0] == 200
            assert (await ask(client, get(basic("alice", "a wrong one"))))[0] == 401
            assert (await ask(client, get(b"Basic " + b"*" * 50)))[0] == 401
        secrets = (given[6:], PASSWORD.encode(), basic("alice", "a wrong one")[6:], b"a wrong one")
        assert edge.target.requests == 9 and edge.target.sent.count(b"X-Kept: 1") == 9
        assert b"uthorization" not in edge.target.sent.replace(b"AUTHORIZATION", b"Authorization")
        listed = (await edge.page.get("/api/requests")).json()
        shown = (await edge.page.get("/")).text + (await edge.page.get("/api/requests")).text
        for entry in listed["requests"]:
            shown += (await edge.page.get(f"/api/requests/{entry['id']}")).text
        assert shown.count("X-Kept") >= 9 and "uthorization" not in shown
        for secret in secrets:
            assert (
                secret not in edge.target.sent and secret.decode() not in shown and secret.decode() not in caplog.text
            )

    async def test_its_head_is_remembered_by_its_connection_alone(self, edge: Edge, visit: Visit) -> None:
        for given, status in ((basic(), 200), (basic("alice", "wrong"), 401)):
            client = await visit()
            for _ in range(5):
                assert (await ask(client, get(given)))[0] == status
        assert not [section for section in heads.KNOWN_HEADS if b"asic" in section]
        owned = [visitor.own for visitor in visitors(edge.relay) if visitor.own is not None]
        assert [basic() in section for section, _ in owned] == [True], "a wrong one by nobody"

    async def test_a_connection_of_several_people_asks_each(self, edge: Edge, visit: Visit) -> None:
        client = await visit()
        people = (basic(), basic("bøb", "pässwörd: with colon"))
        for given in [*people * 4, *[people[0]] * 4, *[people[1]] * 4]:
            assert (await ask(client, get(given)))[0] == 200
            assert (await ask(client, get(given[:-4] + b"AAAA")))[0] == 401
            assert (await ask(client, get(None)))[0] == 401
        assert edge.target.requests == 16 and b"uthorization" not in edge.target.sent

    @pytest.mark.parametrize("policy", [{}])
    async def test_without_basic_auth_it_is_the_targets(self, edge: Edge, visit: Visit, verified: list[bytes]) -> None:
        client = await visit()
        for _ in range(4):
            assert (await ask(client, get(basic("any", "thing"))))[0] == 200
            assert (await ask(client, get(b"Bearer abc")))[0] == 200
        assert edge.target.sent.count(b"\r\nAuthorization: %b\r\n" % basic("any", "thing")) == 4
        assert edge.target.sent.count(b"\r\nAuthorization: Bearer abc\r\n") == 4
        assert verified == []


class TestChanges:
    async def test_a_password_that_is_taken_away_on_an_open_connection(self, edge: Edge, visit: Visit) -> None:
        client = await visit()
        for _ in range(4):
            assert (await ask(client, get(basic())))[0] == 200
        edge.change({"basic_auth": {"users": [BOB]}})
        assert (await ask(client, get(basic())))[:2] == (401, b"edge.auth_invalid")
        edge.change({"basic_auth": {"users": [{"name": "alice", "digest": QUICK.hash("another")}]}})
        assert (await ask(client, get(basic())))[:2] == (401, b"edge.auth_invalid")
        assert (await ask(client, get(basic("alice", "another"))))[0] == 200
        edge.change({})
        sent = edge.target.sent.count(b"uthorization")
        assert (await ask(client, get(basic())))[0] == 200
        assert edge.target.sent.count(b"uthorization") == sent + 1, "it is the target's again"
        edge.change(PROTECTED)
        assert (await ask(client, get(None)))[:2] == (401, b"edge.auth_required")
        assert (await ask(client, get(basic())))[0] == 200
        assert edge.target.sent.count(b"uthorization") == sent + 1

    async def test_a_change_while_a_password_is_verified(
        self, edge: Edge, visit: Visit, verified: list[bytes], gate: Gate
    ) -> None:
        client = await visit(get(basic()))
        await gate.entered()
        edge.change({"basic_auth": {"users": [BOB]}})
        gate.open.set()
        status, _, _ = await client.response()
        assert status in (401, 429) and edge.target.requests == 0
        assert (await ask(client, get(basic())))[:2] == (401, b"edge.auth_invalid")


class TestOrder:
    """Bad host before TLS mode before credentials before address before capacity, by what comes back."""

    async def test_bad_host_beats_everything(self, edge: Edge, visit: Visit, verified: list[bytes]) -> None:
        edge.change(PROTECTED | DENY | FULL | {"plain_http": "refuse"})
        got = await ask(await visit(), get(basic("alice", "x"), host=b"nobody.localhost"))
        assert got[:2] == (404, b"edge.host_unassigned") and verified == []

    async def test_tls_mode_beats_credentials(self, edge: Edge, visit: Visit, verified: list[bytes]) -> None:
        edge.change(PROTECTED | DENY | {"plain_http": "refuse"})
        for given in (None, basic("alice", "x"), basic()):
            assert (await ask(await visit(), get(given)))[:2] == (421, b"edge.tls_mode_mismatch")
        assert verified == []

    async def test_credentials_beat_address_beats_capacity(self, edge: Edge, visit: Visit) -> None:
        edge.change(PROTECTED | DENY | FULL)
        edge.relay.agents.by_tunnel["tun_web"].inflight += 1
        client = await visit()
        assert (await ask(client, get(None)))[:2] == (401, b"edge.auth_required")
        assert (await ask(client, get(basic("alice", "x"))))[:2] == (401, b"edge.auth_invalid")
        assert (await ask(client, get(basic())))[:2] == (403, b"edge.ip_denied")
        edge.change(PROTECTED | FULL)
        assert (await ask(client, get(basic("alice", "x"))))[:2] == (401, b"edge.auth_invalid")
        assert (await ask(client, get(basic())))[:2] == (429, b"edge.concurrency_exceeded")
        edge.relay.agents.by_tunnel["tun_web"].inflight -= 1
        assert (await ask(client, get(basic())))[0] == 200


class TestAttempts:
    @pytest.mark.parametrize(
        "relay_settings", [{"password_attempts_per_address": 2, "password_attempts_burst": 3, "exempt_loopback": True}]
    )
    async def test_a_barred_address_cannot_spend_our_time(
        self, edge: Edge, visit: Visit, verified: list[bytes]
    ) -> None:
        """Although its address is looked at after its password."""
        edge.change(PROTECTED | DENY)
        client = await visit()
        got = [await ask(client, get(basic("alice", f"wrong{n}"))) for n in range(20)]
        assert [(status, code) for status, code, _ in got] == (
            [(401, b"edge.auth_invalid")] * 3 + [(429, b"edge.auth_throttled")] * 17
        )
        assert 1 <= int(got[-1][2][b"retry-after"][0]) <= 30
        assert len(verified) == 3
        # Also with the right password, until there is an attempt again: a guesser must not learn that it guessed it.
        assert (await ask(client, get(basic())))[:2] == (429, b"edge.auth_throttled")
        assert (await ask(client, get(None)))[:2] == (401, b"edge.auth_required")

    @pytest.mark.parametrize("relay_settings", [{"password_attempts_per_address": 1, "password_attempts_burst": 1}])
    async def test_who_was_let_in_before_is_let_in_while_a_neighbour_guesses(self, edge: Edge, visit: Visit) -> None:
        good, bad = await visit(), await visit()
        assert (await ask(good, get(basic())))[0] == 200
        codes = {(await ask(bad, get(basic("alice", f"wrong{n}"))))[1] for n in range(10)}
        assert codes == {b"edge.auth_invalid", b"edge.auth_throttled"}
        for _ in range(5):
            assert (await ask(good, get(basic())))[0] == 200

    async def test_many_connections_at_once_cost_one_verification(
        self, edge: Edge, visit: Visit, verified: list[bytes]
    ) -> None:
        clients = [await visit(get(basic())) for _ in range(50)]
        assert [(await client.response())[0] for client in clients] == [200] * 50
        assert verified == [PASSWORD.encode()]
