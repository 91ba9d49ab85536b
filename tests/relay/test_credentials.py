"""Visitors' passwords: what is read, what is verified and what is not, what is remembered, and what attempts may cost."""

from __future__ import annotations

import asyncio
import base64
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from argon2 import PasswordHasher
from argon2.low_level import verify_secret

from portico.errors import Problem
from portico.relay import credentials
from portico.relay.credentials import Accounts, Credentials, authorization, cost, parse
from portico.settings import RelaySettings, Secret

QUICK = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
USUAL = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)


class User(NamedTuple):
    name: str
    digest: str


def basic(name: str, password: str, scheme: str = "Basic") -> bytes:
    return f"{scheme} ".encode() + base64.b64encode(f"{name}:{password}".encode())


ALICE = Accounts([User("alice", QUICK.hash("secret")), User("bøb", QUICK.hash("pässwörd"))])


def settings(**changes: Any) -> RelaySettings:
    return RelaySettings(relay_key=Secret("unused"), state_dir=Path("unused"), **changes)


class Rig:
    """Credentials, and the argon2 calls that they make: of which digest, in which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        self.calls: list[tuple[bytes, str]] = []
        self.gate: threading.Event | None = None
        real = verify_secret

        def verify(digest: bytes, password: bytes, kind: Any) -> bool:
            self.calls.append((digest, threading.current_thread().name))
            if self.gate is not None:
                self.gate.wait(5)
            return real(digest, password, kind)

        monkeypatch.setattr("argon2.low_level.verify_secret", verify)
        self.loop = asyncio.get_running_loop()
        self.credentials = Credentials(settings(**changes), self.loop)

    def look(
        self, value: bytes | None, accounts: Accounts = ALICE, address: str = "192.0.2.1", later: float = 0
    ) -> str:
        return self.credentials.look(accounts, value, address, self.loop.time() + later)

    def ask(self, value: bytes, accounts: Accounts = ALICE, address: str = "192.0.2.1") -> asyncio.Event:
        done = asyncio.Event()
        self.credentials.verify(accounts, value, address, done.set)
        return done

    async def settle(self, value: bytes, accounts: Accounts = ALICE, address: str = "192.0.2.1") -> str:
        """The verdict, verified if it needs to be."""
        verdict = self.look(value, accounts, address)
        if verdict == "need":
            async with asyncio.timeout(30):
                await self.ask(value, accounts, address).wait()
            verdict = self.look(value, accounts, address)
            assert verdict != "need"
        return verdict


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> Any:
    made: list[Rig] = []

    def make(**changes: Any) -> Rig:
        made.append(Rig(monkeypatch, **changes))
        return made[-1]

    yield make
    for one in made:
        if one.gate is not None:
            one.gate.set()
        one.credentials.close()


class TestParsing:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (basic("alice", "secret"), (b"alice", b"secret")),
            (basic("alice", "secret", "bAsIc"), (b"alice", b"secret")),
            (b"Basic   " + base64.b64encode(b"a:b"), (b"a", b"b")),
            (basic("alice", "a:b:c"), (b"alice", b"a:b:c")),
            (basic("", ""), (b"", b"")),
            (basic("bøb", "pässwörd"), ("bøb".encode(), "pässwörd".encode())),
            (b"Basic " + base64.b64encode(b"b\xf8b:\xff"), (b"b\xf8b", b"\xff")),  # not UTF-8: what the client sent
            (b"Basic " + base64.b64encode(b"no colon"), None),
            (b"Basic", None),
            (b"Basic ", None),
            (b"Basic\t" + base64.b64encode(b"a:b"), None),
            (b"Basic " + base64.b64encode(b"a:b") + b" ", None),
            (b"Basic " + base64.b64encode(b"a:b") + b", Basic " + base64.b64encode(b"c:d"), None),
            (b"Basic " + base64.b64encode(b"a:b").rstrip(b"="), (b"a", b"b")),  # three bytes need no padding
            (b"Basic " + base64.b64encode(b"a:bc").rstrip(b"="), None),
            (b"Basic YTpi====", None),
            (b"Basic YT*pi", None),
            (b"Basic " + base64.b64encode(b"a:b\x00c"), None),
            (b"Basic " + base64.b64encode(b"a\n:b"), None),
            (basic("a" * 257, "b"), None),
            (basic("a", "b" * 1025), None),
            (basic("a", "b" * 100_000), None),
            (b"Bearer abc", None),
            (b"BasicYTpi", None),
            (b"", None),
        ],
    )
    def test_a_value(self, value: bytes, expected: tuple[bytes, bytes] | None) -> None:
        assert parse(value) == expected

    def test_of_several_fields_none_counts(self) -> None:
        one, two = basic("alice", "secret"), basic("alice", "other")
        assert authorization([b"Host", b"x"]) is None
        assert authorization([b"Host", b"x", b"AUTHORIZATION", one]) == one
        assert authorization([b"Authorization", one, b"Host", b"x", b"authorization", two]) == b""
        assert authorization([b"Authorization", one, b"Authorization", one]) == b""

    @pytest.mark.parametrize(
        ("digest", "expected"),
        [
            (QUICK.hash("x"), "m=64,t=1,p=1"),
            (USUAL.hash("x"), "m=19456,t=2,p=1"),
            (
                "$argon2id$v=19$m=4194304,t=1,p=1$1b66LNpxS8anlqicce0d4Q$tm13RKFmRtbABv9DEyQCvvbaQ5LFGn984jZBaPcTKag",
                None,
            ),
            ("$argon2id$v=19$m=65536,t=5,p=1$1b66LNpxS8anlqicce0d4Q$tm13RKFmRtbABv9DEyQCvvbaQ5LFGn984jZBaPcTKag", None),
            ("$argon2id$v=19$m=65536,t=1,p=9$1b66LNpxS8anlqicce0d4Q$tm13RKFmRtbABv9DEyQCvvbaQ5LFGn984jZBaPcTKag", None),
            (
                "$argon2id$v=19$m=065536,t=1,p=1$1b66LNpxS8anlqicce0d4Q$tm13RKFmRtbABv9DEyQCvvbaQ5LFGn984jZBaPcTKag",
                None,
            ),
            ("$argon2id$v=19$m=7,t=1,p=1$1b66LNpxS8anlqicce0d4Q$tm13RKFmRtbABv9DEyQCvvbaQ5LFGn984jZBaPcTKag", None),
            ("$argon2i$v=19$m=64,t=1,p=1$1b66LNpxS8anlqicce0d4Q$tm13RKFmRtbABv9DEyQCvvbaQ5LFGn984jZBaPcTKag", None),
            ("$argon2id$v=16$m=64,t=1,p=1$1b66LNpxS8anlqicce0d4Q$tm13RKFmRtbABv9DEyQCvvbaQ5LFGn984jZBaPcTKag", None),
            ("$argon2id$v=19$m=64,t=1,p=1$1b66LNpxS8anlqicce0d4Q$tm13RKFmRtbABv9DEyQCvvbaQ5LFGn984jZBaPcTKag\n", None),
            ("$2b$12$abcdefghijklmnopqrstuv", None),
            ("secret", None),
            ("", None),
        ],
    )
    def test_only_digests_of_bounded_cost_are_verified(self, digest: str, expected: str | None) -> None:
        assert cost(digest) == expected


class TestVerdicts:
    async def test_each_of_several_users_has_a_password_of_its_own(self, rig: Callable[..., Rig]) -> None:
        one = rig()
        assert await one.settle(basic("alice", "secret")) == "valid"
        assert await one.settle(basic("bøb", "pässwörd")) == "valid"
        assert await one.settle(basic("alice", "pässwörd")) == "invalid"
        assert await one.settle(basic("bøb", "secret")) == "invalid"
        assert await one.settle(basic("carol", "secret")) == "invalid"
        assert await one.settle(basic("ALICE", "secret")) == "invalid"
        assert await one.settle(basic("alice", "")) == "invalid"
        assert all(thread.startswith("password") for _, thread in one.calls)
        assert (one.credentials.verified, one.credentials.wrong, one.credentials.waiting) == (7, 5, 0)

    async def test_without_a_verification(self, rig: Callable[..., Rig]) -> None:
        one = rig()
        assert one.look(None) == "missing"
        assert one.look(b"Bearer abc") == one.look(b"Digest username=x") == "missing"
        assert one.look(b"Basic !!!") == one.look(b"") == one.look(b"Basic ") == "invalid"
        assert one.calls == []

    async def test_an_unknown_user_costs_what_a_wrong_password_costs(self, rig: Callable[..., Rig]) -> None:
        one = rig()
        known = Accounts([User("alice", USUAL.hash("secret"))])
        assert await one.settle(basic("alice", "wrong"), known) == "invalid"
        assert await one.settle(basic("nobody", "wrong"), known) == "invalid"
        # Both remembered alike, too: a second look costs neither of them anything.
        assert one.look(basic("alice", "wrong"), known) == one.look(basic("nobody", "wrong"), known) == "invalid"
        first, second = (digest for digest, _ in one.calls)
        assert first.split(b"$")[:4] == second.split(b"$")[:4] and len(first) == len(second) and first != second
        assert (cost(first.decode()), cost(second.decode())) == ("m=19456,t=2,p=1",) * 2

    async def test_nobody_is_the_user_of_a_digest_that_costs_too_much(self, rig: Callable[..., Rig]) -> None:
        one = rig()
        dear = PasswordHasher(time_cost=1, memory_cost=65_537, parallelism=1).hash("secret")
        accounts = Accounts([User("greedy", dear), User("alice", QUICK.hash("secret"))])
        assert await one.settle(basic("greedy", "secret"), accounts) == "invalid"
        assert await one.settle(basic("alice", "secret"), accounts) == "valid"
        assert dear.encode() not in [digest for digest, _ in one.calls]

    async def test_a_broken_digest_fits_nothing_and_its_fault_names_nobody(
        self, rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = rig()

        def broken(*_: Any) -> bool:
            from argon2.exceptions import VerificationError

            raise VerificationError("Memory allocation error")

        monkeypatch.setattr("argon2.low_level.verify_secret", broken)
        with caplog.at_level(logging.DEBUG):
            assert await one.settle(basic("alice", "secret")) == "invalid"
        assert "could not be verified" in caplog.text
        assert "alice" not in caplog.text and "secret" not in caplog.text and "argon2id" not in caplog.text


class TestMemory:
    async def test_a_right_password_is_verified_once(self, rig: Callable[..., Rig]) -> None:
        one = rig(password_cache_seconds=100.0)
        for _ in range(50):
            assert await one.settle(basic("alice", "secret")) == "valid"
        assert await one.settle(basic("alice", "secret"), address="198.51.100.7") == "valid"
        assert len(one.calls) == 1
        assert one.look(basic("alice", "secret"), later=99) == "valid"
        assert one.look(basic("alice", "secret"), later=101) == "need"

    async def test_a_wrong_one_is_remembered_for_a_short_time(self, rig: Callable[..., Rig]) -> None:
        one = rig(password_refusal_cache_seconds=10.0)
        for _ in range(50):
            assert await one.settle(basic("alice", "wrong")) == "invalid"
        assert len(one.calls) == 1
        assert one.look(basic("alice", "wrong"), later=11) == "need"

    async def test_wrong_ones_push_out_no_right_one_and_are_bounded(self, rig: Callable[..., Rig]) -> None:
        one = rig(password_refusal_cache_max=8, password_cache_max=8, password_attempts_burst=1000)
        assert await one.settle(basic("alice", "secret")) == "valid"
        for n in range(100):
            assert await one.settle(basic("alice", f"wrong{n}")) == "invalid"
        assert len(one.credentials._invalid) == 8 and one.look(basic("alice", "secret")) == "valid"
        assert one.look(basic("alice", "wrong0")) == "need" and one.look(basic("alice", "wrong99")) == "invalid"

    async def test_right_ones_are_bounded(self, rig: Callable[..., Rig]) -> None:
        one = rig(password_cache_max=4)
        digest = QUICK.hash("secret")
        accounts = Accounts([User(f"user{n}", digest) for n in range(10)])
        for n in range(10):
            assert await one.settle(basic(f"user{n}", "secret"), accounts) == "valid"
        assert len(one.credentials._valid) == 4
        assert one.look(basic("user9", "secret"), accounts) == "valid"
        assert one.look(basic("user0", "secret"), accounts) == "need"

    async def test_a_changed_password_is_forgotten_with_its_digest(self, rig: Callable[..., Rig]) -> None:
        one = rig()
        before = Accounts([User("alice", QUICK.hash("old"))])
        after = Accounts([User("alice", QUICK.hash("new"))])
        gone = Accounts([User("bob", QUICK.hash("new"))])
        assert await one.settle(basic("alice", "old"), before) == "valid"
        assert await one.settle(basic("alice", "old"), after) == "invalid"
        assert await one.settle(basic("alice", "new"), after) == "valid"
        assert await one.settle(basic("alice", "new"), gone) == "invalid"
        # Back to the digest from before, as after an undone change: nothing to verify again.
        assert one.look(basic("alice", "old"), before) == "valid"

    async def test_what_one_policy_knows_is_worth_nothing_to_another(self, rig: Callable[..., Rig]) -> None:
        """The same name and password at two tunnels: two digests, two verifications."""
        one = rig()
        other = Accounts([User("alice", QUICK.hash("another"))])
        assert await one.settle(basic("alice", "secret")) == "valid"
        assert one.look(basic("alice", "secret"), other) == "need"
        assert await one.settle(basic("alice", "secret"), other) == "invalid"
        assert one.look(basic("alice", "secret")) == "valid"

    async def test_parts_that_read_alike_together_are_not_alike(self, rig: Callable[..., Rig]) -> None:
        one = rig()
        digest = QUICK.hash("bc")
        accounts = Accounts([User("a", digest), User("ab", digest)])
        assert await one.settle(basic("a", "bc"), accounts) == "valid"
        assert one.look(basic("ab", "c"), accounts) == "need"

    async def test_nothing_of_a_password_stays_in_memory(self, rig: Callable[..., Rig]) -> None:
        one = rig()
        password = "correct-horse-" + "battery"
        accounts = Accounts([User("alice", QUICK.hash(password))])
        assert await one.settle(basic("alice", password), accounts) == "valid"
        assert await one.settle(basic("alice", password + "2"), accounts) == "invalid"
        kept = [*one.credentials._valid, *one.credentials._invalid]
        assert len(kept) == 2 and all(len(key) == 32 for key in kept)
        gc.collect()
        needle = password.encode()
        holders = [
            found for found in gc.get_objects() if isinstance(found, credentials._Attempt) and needle in found.password
        ]
        assert holders == [] and one.credentials._attempts == {}
        text = repr(one.credentials) + repr(accounts) + str(one.credentials)
        assert password not in text and "argon2id" not in text
        # Another process, or this one after a restart, has another key: the same credential, another hash.
        again = rig()
        assert await again.settle(basic("alice", password), accounts) == "valid"
        assert set(again.credentials._valid).isdisjoint(kept)


class TestLimits:
    async def test_identical_attempts_share_one_verification(self, rig: Callable[..., Rig]) -> None:
        one = rig(password_attempts_burst=1, password_attempts_per_address=1)
        one.gate = threading.Event()
        waiters = []
        for n in range(100):
            address = f"192.0.2.{n}"
            assert one.look(basic("alice", "secret"), address=address) == "need"
            waiters.append(one.ask(basic("alice", "secret"), address=address))
        assert one.credentials.waiting == 100
        one.gate.set()
        async with asyncio.timeout(30):
            for waiter in waiters:
                await waiter.wait()
        assert len(one.calls) == 1 and one.credentials.waiting == 0
        # Only the first of them was on anybody's account.
        assert list(one.credentials._budgets._full_at) == ["192.0.2.0"]

    async def test_a_failing_waiter_is_no_matter_of_the_others(self, rig: Callable[..., Rig]) -> None:
        one = rig()
        failures: list[dict[str, Any]] = []
        one.loop.set_exception_handler(lambda _, context: failures.append(context))

        def fail() -> None:
            raise ZeroDivisionError

        one.credentials.verify(ALICE, basic("alice", "secret"), "192.0.2.1", fail)
        async with asyncio.timeout(30):
            await one.ask(basic("alice", "secret")).wait()
        assert [type(context["exception"]) for context in failures] == [ZeroDivisionError]
        assert one.look(basic("alice", "secret")) == "valid"

    async def test_the_budget_of_a_client_network(self, rig: Callable[..., Rig]) -> None:
        one = rig(password_attempts_burst=3, password_attempts_per_address=6)
        verdicts = [await one.settle(basic("alice", f"wrong{n}"), address="2001:db8::1") for n in range(5)]
        assert verdicts == ["invalid"] * 3 + ["throttled"] * 2 and len(one.calls) == 3
        # The same network by another address of it, also with the right password; another network has its own.
        assert one.look(basic("alice", "secret"), address="2001:db8::2") == "throttled"
        assert 8.0 < one.credentials.retry_after("2001:db8::2") <= 10.0
        assert one.look(basic("alice", "secret"), address="2001:db8:0:1::1") == "need"
        assert one.credentials.retry_after("2001:db8:0:1::1") == 0
        # What is known needs no attempt; nor does what can be told without.
        assert one.look(basic("alice", "wrong0"), address="2001:db8::1") == "invalid"
        assert one.look(None, address="2001:db8::1") == "missing"
        # Six a minute: one more after ten seconds.
        assert one.look(basic("alice", "wrong9"), address="2001:db8::1", later=10.5) == "need"

    async def test_loopback_has_a_budget_like_everybody(self, rig: Callable[..., Rig]) -> None:
        one = rig(password_attempts_burst=2, password_attempts_per_address=1, exempt_loopback=True)
        verdicts = [await one.settle(basic("alice", f"wrong{n}"), address="127.0.0.1") for n in range(3)]
        assert verdicts == ["invalid", "invalid", "throttled"]

    async def test_right_passwords_are_given_back(self, rig: Callable[..., Rig]) -> None:
        """An office behind one address: everybody signs in for the first time within a second."""
        one = rig(password_attempts_burst=3, password_attempts_per_address=1)
        digest = QUICK.hash("secret")
        accounts = Accounts([User(f"user{n}", digest) for n in range(10)])
        verdicts = [await one.settle(basic(f"user{n}", "secret"), accounts) for n in range(10)]
        assert verdicts == ["valid"] * 10

    async def test_networks_that_are_remembered_are_bounded(
        self, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(credentials, "MAX_NETWORKS", 16)
        one = rig(password_attempts_burst=1, password_attempts_per_address=1)
        for n in range(40):
            verdict = await one.settle(basic("alice", f"wrong{n}"), address=f"192.0.2.{n}")
            assert verdict == "invalid" or n >= 16  # later ones share what is left
        assert len(one.credentials._budgets) == 16
        # Neither who is remembered nor who came later can begin anew.
        assert {one.look(basic("alice", "x"), address=f"192.0.2.{n}") for n in (0, 15, 39)} == {"throttled"}

    async def test_what_waits_is_bounded_for_all_and_for_each_policy(self, rig: Callable[..., Rig]) -> None:
        one = rig(password_verify_waiting=5, password_verify_waiting_per_policy=3, password_verify_threads=1)
        one.gate = threading.Event()
        other = Accounts([User("alice", QUICK.hash("secret"))])
        waiters = [one.ask(basic("alice", f"wrong{n}")) for n in range(3)]
        assert one.look(basic("alice", "wrong3")) == one.look(basic("alice", "wrong0")) == "throttled"
        assert one.look(basic("alice", "wrong0"), other) == "need"
        waiters += [one.ask(basic("alice", f"wrong{n}"), other) for n in range(2)]
        third = Accounts([User("alice", QUICK.hash("secret"))])
        assert one.look(basic("alice", "wrong0"), third) == "throttled"
        one.gate.set()
        async with asyncio.timeout(30):
            for waiter in waiters:
                await waiter.wait()
        assert one.credentials.waiting == 0 and one.credentials._waiting == {} and one.credentials._queues == {}
        assert one.look(basic("alice", "wrong9")) == "need"

    async def test_policies_take_turns(self, rig: Callable[..., Rig]) -> None:
        """A tunnel whose passwords are guessed at from everywhere holds up another's visitors by one verification."""
        one = rig(password_verify_threads=1)
        one.gate = threading.Event()
        attacked = [one.ask(basic("alice", f"wrong{n}"), address=f"192.0.2.{n}") for n in range(20)]
        digest = QUICK.hash("secret")
        other = Accounts([User("alice", digest)])
        quiet = one.ask(basic("alice", "secret"), other, address="198.51.100.1")
        one.gate.set()
        async with asyncio.timeout(30):
            await quiet.wait()
            for waiter in attacked:
                await waiter.wait()
        assert [known for known, _ in one.calls].index(digest.encode()) <= 2

    async def test_nothing_is_called_after_the_end(self, rig: Callable[..., Rig]) -> None:
        one = rig(password_verify_threads=1)
        one.gate = threading.Event()
        waiters = [one.ask(basic("alice", f"wrong{n}")) for n in range(3)]
        one.credentials.close()
        one.gate.set()
        await asyncio.sleep(0.05)
        assert not any(waiter.is_set() for waiter in waiters)


@pytest.mark.parametrize(
    "name", ["password_verify_threads", "password_attempts_per_address", "password_attempts_burst"]
)
async def test_settings_that_let_nobody_in_are_refused_by_name(rig: Callable[..., Rig], name: str) -> None:
    with pytest.raises(Problem, match=name):
        rig(**{name: 0})


@pytest.fixture
def lag() -> Iterator[Callable[[], Any]]:
    """Measures the longest time that the loop did not come round, until it is asked for."""

    class Lag:
        def __init__(self) -> None:
            self.worst = 0.0
            self.task = asyncio.get_running_loop().create_task(self.run())

        async def run(self) -> None:
            while True:
                began = time.thread_time()
                await asyncio.sleep(0.001)
                self.worst = max(self.worst, time.thread_time() - began)

    yield Lag


async def test_ten_thousand_wrong_attempts_from_one_address_hold_up_nobody(
    rig: Callable[..., Rig], lag: Callable[[], Any]
) -> None:
    """With digests of the usual cost: the budget is all that the attacker gets, and others' passwords are verified meanwhile."""
    one = rig()
    accounts = Accounts([User("alice", USUAL.hash("secret"))])
    measured = lag()
    verdicts = {"need": 0, "throttled": 0}
    waiting: list[asyncio.Event] = []
    others: list[float] = []
    for n in range(10_000):
        value = basic("alice", f"guess{n}")
        verdict = one.look(value, accounts, "203.0.113.5")
        verdicts[verdict] += 1
        if verdict == "need":
            waiting.append(one.ask(value, accounts, "203.0.113.5"))
        if n % 50 == 0:
            await asyncio.sleep(0)
        if n % 2000 == 1000:
            began = time.perf_counter()
            good = Accounts([User("alice", USUAL.hash("secret"))])
            hashed = time.perf_counter()
            assert await one.settle(basic("alice", "secret"), good, address=f"192.0.2.{n % 251}") == "valid"
            others.append((time.perf_counter() - hashed) / (hashed - began))
    async with asyncio.timeout(30):
        for event in waiting:
            await event.wait()
    measured.task.cancel()
    limits = settings()
    assert limits.password_attempts_burst <= verdicts["need"] <= limits.password_attempts_burst + 10
    assert len(one.calls) == verdicts["need"] + len(others)
    # Another's visitor waits for a thread and for its own turn, not for thirty of the attacker's; a few digests' time.
    assert min(others) < 8
    # Verifications are not on the loop: it comes round in much less than one takes, but for what the machine does to it.
    assert measured.worst < 0.5
