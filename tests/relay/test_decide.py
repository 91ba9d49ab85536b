"""The decision chain as a table: every refusal, every pair of them (so that the order is proven), on every kind of connection."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from portico.errors import catalogue
from portico.relay import decide
from portico.relay.door import Door
from portico.relay.edge_rows import Organization

HOST = b"web.localhost"
DOORS = {
    "http": Door(b"http", 80),
    "https": Door(b"https", 443, HOST, lambda host: host == HOST, "ca"),
    "websocket": Door(b"https", 443, HOST, lambda host: host == HOST, "ca"),
    "tcp": Door(b"tcp", 7100),
    "passthrough": Door(b"tls", 443, HOST),
}
RAW = ("tcp", "passthrough")


class Rules:
    """Address rules of which the answer is known."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer

    def allow(self, address: str) -> bool:
        return self.answer


@dataclass
class Policy:
    plain_http: str = "allow"
    users: object | None = None
    client_ca: str | None = None
    addresses: Any = None


@dataclass
class Tunnel:
    inflight: int = 0
    concurrency: int = 2
    reachable: bool = True
    passthrough: bool = False
    raw: bool = False
    rates: object | None = None
    line: Any = None
    barred: Any = None
    strict: bool = False
    policy: Policy = field(default_factory=Policy)

    @property
    def chain(self) -> decide.Chain:
        return decide.chain(self, raw=self.raw)


@dataclass
class Facts:
    tunnel: Any = field(default_factory=Tunnel)
    host: bytes = HOST
    standing: str | None = "active"
    door: Any = DOORS["http"]
    address: str = "192.0.2.1"
    certified: bool = False
    verdict: str = "valid"
    waits: float = 0.0
    valid_until: float | None = None

    @property
    def secure(self) -> bool:
        return bool(self.door.scheme in (b"https", b"tls"))

    def password(self) -> str:
        return self.verdict

    def wait(self) -> float:
        return self.waits


def facts_of(kind: str) -> Facts:
    """Facts of a connection of this kind that passes."""
    return Facts(Tunnel(raw=kind in RAW, passthrough=kind == "passthrough"), door=DOORS[kind])


def unassigned(facts: Facts) -> None:
    facts.tunnel, facts.standing = None, None


def offline(facts: Facts) -> None:
    facts.tunnel, facts.standing = None, "active"


def closed(code: str) -> Callable[[Facts], None]:
    """A domain that is served to nobody."""

    def fault(facts: Facts) -> None:
        facts.tunnel, facts.standing = None, code

    return fault


BLOCKED, FROZEN = closed("edge.domain_blocked"), closed("edge.domain_frozen")


def suspended(facts: Facts) -> None:
    facts.tunnel, facts.standing = None, "suspended"


def used_up(facts: Facts) -> None:
    facts.tunnel.barred = Organization("org_1", 1, {}, "edge.quota_exceeded", time.time() + 60)


def misdirected(facts: Facts) -> None:
    """What a TLS mode can be wrong by depends on the door: a plain one, or one that was opened for another host."""
    if facts.door.scheme == b"http":
        facts.tunnel.policy.plain_http = "refuse"
    else:
        facts.door = dataclasses.replace(facts.door, sni=b"other.localhost")


def redirected(facts: Facts) -> None:
    facts.tunnel.policy.plain_http = "redirect"


def strictly(seconds: float) -> Callable[[Facts], None]:
    """A host that is served by HTTPS alone, with a certificate that is good for so long."""

    def fault(facts: Facts) -> None:
        facts.tunnel.strict = True
        facts.valid_until = time.time() + seconds

    return fault


def password(verdict: str) -> Callable[[Facts], None]:
    def fault(facts: Facts) -> None:
        facts.tunnel.policy.users = ("alice",)
        facts.verdict = verdict

    return fault


def uncertified(facts: Facts) -> None:
    facts.tunnel.policy.client_ca = "ca"


def barred(facts: Facts) -> None:
    facts.tunnel.policy.addresses = Rules(False)


def full(facts: Facts) -> None:
    facts.tunnel.inflight = facts.tunnel.concurrency


def fast(facts: Facts) -> None:
    facts.tunnel.rates = object()
    facts.waits = 0.5


def cut(facts: Facts) -> None:
    facts.tunnel.reachable = False


class Fault:
    """One thing that is wrong: which step it is for, what it answers, and on which kinds of connection it can be."""

    def __init__(self, step: str, code: str, make: Callable[[Facts], None], *kinds: str) -> None:
        self.step, self.code, self.make, self.kinds = step, code, make, kinds or tuple(DOORS)

    def __repr__(self) -> str:
        return f"{self.step}:{self.code}"


HEADS = ("http", "https", "websocket")
#: In the order in which they are asked.
FAULTS = [
    Fault("host", "edge.host_unassigned", unassigned),
    Fault("host", "edge.tunnel_offline", offline),
    Fault("host", "edge.domain_blocked", BLOCKED),
    Fault("host", "edge.domain_frozen", FROZEN),
    Fault("tls_mode", "edge.tls_mode_mismatch", misdirected, *HEADS),
    Fault("tls_mode", "edge.https_redirect", redirected, "http"),
    Fault("certificate", "edge.tls_mode_mismatch", strictly(60), "http"),
    Fault("certificate", "edge.certificate_unavailable", strictly(-1), "https", "websocket"),
    Fault("standing", "edge.account_suspended", suspended),
    Fault("standing", "edge.quota_exceeded", used_up),
    Fault("credentials", "edge.auth_required", uncertified, *HEADS),
    Fault("credentials", "edge.auth_required", password("missing"), *HEADS),
    Fault("credentials", "edge.auth_invalid", password("invalid"), *HEADS),
    Fault("credentials", "edge.auth_throttled", password("throttled"), *HEADS),
    Fault("credentials", decide.PASSWORD, password("need"), *HEADS),
    Fault("address", "edge.ip_denied", barred),
    Fault("room", "edge.concurrency_exceeded", full),
    Fault("room", "edge.rate_limited", fast),
    Fault("agent", "edge.agent_unreachable", cut),
]


def cases() -> list[Any]:
    """Every pair of faults of different steps on every kind of connection that can have both.

    A tunnel that is not there has nothing to be at fault, and a suspended one is not there: those pairs cannot be made.
    """
    absent = (unassigned, offline, BLOCKED, FROZEN, suspended)
    made = []
    for kind, (first, second) in itertools.product(DOORS, itertools.combinations(FAULTS, 2)):
        without_tunnel = first.make in absent or second.make in absent
        if first.step != second.step and kind in first.kinds and kind in second.kinds and not without_tunnel:
            made.append(pytest.param(kind, first, second, id=f"{kind}-{first}-{second}"))
    return made


@pytest.mark.parametrize("kind", DOORS)
def test_nothing_wrong_passes(kind: str) -> None:
    assert decide.decide(facts_of(kind)) is None


@pytest.mark.parametrize(("kind", "fault"), [(kind, fault) for fault in FAULTS for kind in fault.kinds], ids=str)
def test_each_fault_alone(kind: str, fault: Fault) -> None:
    facts = facts_of(kind)
    fault.make(facts)
    assert decide.decide(facts) == fault.code


@pytest.mark.parametrize(("kind", "first", "second"), cases())
def test_the_earlier_question_decides(kind: str, first: Fault, second: Fault) -> None:
    facts = facts_of(kind)
    second.make(facts)
    first.make(facts)
    assert decide.decide(facts) == first.code


def test_all_pairs_of_steps_are_in_the_table() -> None:
    """But for those that a missing tunnel leaves out: they have nothing else to be wrong."""
    shown = {(case.values[1].step, case.values[2].step) for case in cases()}
    names = [step.name for step in decide.STEPS if step.name != "host"]
    assert shown == set(itertools.combinations(names, 2))
    assert {fault.step for fault in FAULTS} == {step.name for step in decide.STEPS}


@pytest.mark.parametrize("kind", RAW)
def test_raw_connections_are_asked_for_no_credentials(kind: str) -> None:
    facts = facts_of(kind)
    password("missing")(facts)
    uncertified(facts)
    assert decide.decide(facts) is None


class TestTlsMode:
    @pytest.mark.parametrize(
        ("sni", "covered", "passes"),
        [
            (HOST, True, True),
            (None, True, True),
            (None, False, False),
            (HOST, False, False),
            (b"other.localhost", True, False),
            (b"", True, False),
        ],
    )
    def test_name_and_certificate(self, sni: bytes | None, covered: bool, passes: bool) -> None:
        facts = Facts(door=Door(b"https", 443, sni, lambda host: covered))
        assert (decide.decide(facts) is None) is passes

    @pytest.mark.parametrize("kind", HEADS)
    def test_http_to_a_passthrough_host(self, kind: str) -> None:
        facts = facts_of(kind)
        facts.tunnel.passthrough = True
        assert decide.decide(facts) == "edge.tls_mode_mismatch"

    @pytest.mark.parametrize("rule", ["allow", "refuse", "redirect"])
    def test_rules_for_plain_http_say_nothing_about_tls(self, rule: str) -> None:
        facts = facts_of("https")
        facts.tunnel.policy.plain_http = rule
        assert decide.decide(facts) is None


class TestClientCertificates:
    @pytest.mark.parametrize(
        ("checked_against", "certified", "passes"),
        [("ca", True, True), ("ca", False, False), ("older ca", True, False), (None, True, False)],
    )
    def test_one_counts_only_for_the_authority_that_checked_it(
        self, checked_against: str | None, certified: bool, passes: bool
    ) -> None:
        facts = facts_of("https")
        facts.door = dataclasses.replace(facts.door, client_ca=checked_against)
        facts.tunnel.policy.client_ca = "ca"
        facts.certified = certified
        assert (decide.decide(facts) is None) is passes

    def test_a_password_does_not_stand_in_for_it(self) -> None:
        facts = facts_of("https")
        password("valid")(facts)
        uncertified(facts)
        assert decide.decide(facts) == "edge.auth_required"


@pytest.mark.parametrize(("inflight", "passes"), [(0, True), (1, True), (2, False), (3, False)])
def test_the_limit_is_a_number_of_requests(inflight: int, passes: bool) -> None:
    assert (decide.decide(Facts(Tunnel(inflight=inflight))) is None) is passes


def test_what_cannot_refuse_is_left_out_of_a_chain() -> None:
    open_tunnel, ruled = Tunnel(), Tunnel(policy=Policy(users=("alice",), addresses=Rules(True)))
    used_up(Facts(ruled))
    strictly(60)(Facts(ruled))
    assert len(open_tunnel.chain.checks) == len(decide.STEPS) - 4
    assert ruled.chain.checks == tuple(step.check for step in decide.STEPS)


def test_what_is_used_up_ends_with_its_time() -> None:
    facts = facts_of("http")
    facts.tunnel.barred = Organization("org_1", 1, {}, "edge.quota_exceeded", time.time() - 1)
    assert decide.decide(facts) is None


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("policy", [Policy(), Policy(users=("alice",), client_ca="ca", addresses=Rules(True))])
def test_the_parts_of_a_chain_are_the_whole(policy: Policy, raw: bool) -> None:
    chain = decide.chain(Tunnel(policy=policy), raw=raw)
    assert set(chain.checks) == set(chain.connection) | set(chain.request)
    assert len(chain.checks) == len(chain.connection) + len(chain.request)


def test_the_page_says_what_the_code_does() -> None:
    """Every code is in the catalogue with the status of the table at the top of the file; every step says how it fails."""
    page = decide.__doc__
    assert page is not None
    for fault in FAULTS:
        if fault.code != decide.PASSWORD:
            assert f"{catalogue()[fault.code].status} " in page
            assert fault.code in page
    assert [step.name for step in decide.STEPS] == [
        *("host", "tls_mode", "certificate", "standing", "credentials", "address", "room", "agent")
    ]
    for step in decide.STEPS:
        assert step.name in page
    assert {step.fails for step in decide.STEPS} <= {"open", "closed"}


@pytest.mark.parametrize(("closed", "code"), [(True, "edge.concurrency_exceeded"), (False, None)])
def test_nobody_overtakes_who_waits_for_a_place(closed: bool, code: str | None) -> None:
    facts = Facts()
    facts.tunnel.line = SimpleNamespace(closed=closed)
    assert decide.decide(facts) == code
