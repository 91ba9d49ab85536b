"""The decision chain as a table: every refusal, every pair of them (so that the order is proven), and the pass."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest

from portico.errors import catalogue
from portico.relay import decide


@dataclass
class Tunnel:
    inflight: int = 0
    concurrency: int = 2
    reachable: bool = True


@dataclass
class Facts:
    tunnel: Tunnel | None = field(default_factory=Tunnel)
    known: bool = True


def full(facts: Facts) -> None:
    assert facts.tunnel is not None
    facts.tunnel.inflight = facts.tunnel.concurrency


def cut(facts: Facts) -> None:
    assert facts.tunnel is not None
    facts.tunnel.reachable = False


#: In the order in which they are asked; the first two exclude each other.
FAULTS = {"edge.concurrency_exceeded": full, "edge.agent_unreachable": cut}


def test_nothing_wrong_passes() -> None:
    assert decide.decide(Facts()) is None


@pytest.mark.parametrize(("known", "code"), [(True, "edge.tunnel_offline"), (False, "edge.host_unassigned")])
def test_no_live_tunnel(known: bool, code: str) -> None:
    assert decide.decide(Facts(tunnel=None, known=known)) == code


@pytest.mark.parametrize("code", FAULTS)
def test_each_fault_alone(code: str) -> None:
    facts = Facts()
    FAULTS[code](facts)
    assert decide.decide(facts) == code


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(FAULTS, 2)))
def test_the_earlier_question_decides(first: str, second: str) -> None:
    facts = Facts()
    FAULTS[second](facts)
    FAULTS[first](facts)
    assert decide.decide(facts) == first


@pytest.mark.parametrize(("inflight", "passes"), [(0, True), (1, True), (2, False), (3, False)])
def test_the_limit_is_a_number_of_requests(inflight: int, passes: bool) -> None:
    assert (decide.decide(Facts(Tunnel(inflight=inflight))) is None) is passes


def test_the_page_says_what_the_code_does() -> None:
    """Every code is in the catalogue, and in the table at the top of the file; every step says how it fails."""
    assert decide.__doc__ is not None
    for code in ("edge.host_unassigned", "edge.tunnel_offline", *FAULTS):
        assert code in catalogue() and code in decide.__doc__
    assert [step.name for step in decide.STEPS] == ["host", "room", "agent"]
    assert {step.fails for step in decide.STEPS} <= {"open", "closed"}
