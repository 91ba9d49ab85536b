"""What happens to a public request: one tuple of steps, asked in this order. This page explains the product.

    | # | question                                   | refusal                                             |
    |---|--------------------------------------------|-----------------------------------------------------|
    | 1 | is the host mapped to an active tunnel?    | 404 edge.host_unassigned, edge.tunnel_offline       |
    | 5 | is there room?                             | 429 edge.concurrency_exceeded                       |
    | 6 | can it be forwarded on the agent's stream? | 502 edge.agent_unreachable                          |

(The numbers are those of the whole chain; TLS mode, credentials, address and rate limits join between 1 and 5.) A malformed
request is 400 before step 1. Each step is a pure function of the facts: it returns ``None`` to pass or the code of the
refusal, takes no lock, waits for nothing, and changes nothing. A refusal for want of a tunnel that was there a moment ago
is not given at once: the request is asked about again when the tunnel is back, or when the wait is over (``holding.py``).
What a step does when its knowledge is missing is part of its declaration: ``closed`` refuses, ``open`` passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol


class Tunnel(Protocol):
    """The live tunnel of a host: its counters and its limit."""

    inflight: int
    concurrency: int

    @property
    def reachable(self) -> bool: ...


class Facts(Protocol):
    """What a decision may look at. ``tunnel`` is the live tunnel of the host, ``known`` whether the platform knows the host."""

    @property
    def tunnel(self) -> Tunnel | None: ...
    @property
    def known(self) -> bool: ...


Check = Callable[[Facts], str | None]


class Step(NamedTuple):
    """One question of the chain. ``fails``: what it does when it cannot know."""

    name: str
    check: Check
    fails: Literal["open", "closed"]


def host_assigned(facts: Facts) -> str | None:
    """1. A host without a live tunnel is refused; one that the platform knows is said to be offline."""
    if facts.tunnel is not None:
        return None
    return "edge.tunnel_offline" if facts.known else "edge.host_unassigned"


def has_room(facts: Facts) -> str | None:
    """5. Requests in flight of the tunnel stay within the limit of its grant."""
    tunnel = facts.tunnel
    if tunnel is not None and tunnel.inflight >= tunnel.concurrency:
        return "edge.concurrency_exceeded"
    return None


def agent_reachable(facts: Facts) -> str | None:
    """6. The agent's connection takes another stream."""
    tunnel = facts.tunnel
    if tunnel is not None and not tunnel.reachable:
        return "edge.agent_unreachable"
    return None


STEPS: tuple[Step, ...] = (
    Step("host", host_assigned, "closed"),
    Step("room", has_room, "closed"),
    Step("agent", agent_reachable, "closed"),
)

_CHECKS = tuple(step.check for step in STEPS)


def decide(facts: Facts) -> str | None:
    """The code of the first refusal, or ``None``: forward it."""
    for check in _CHECKS:
        if (code := check(facts)) is not None:
            return code
    return None
