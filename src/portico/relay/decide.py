"""What happens to a public request: one tuple of steps, asked in this order. This page explains the product.

    | # | step        | question                                      | refusal                                             |
    |---|-------------|-----------------------------------------------|-----------------------------------------------------|
    | 1 | host        | is the host mapped to an active tunnel?       | 404 edge.host_unassigned, edge.tunnel_offline,      |
    |   |             |                                               | 403 edge.domain_blocked, edge.domain_frozen         |
    | 2 | tls_mode    | is the connection's TLS mode valid for it?    | 421 edge.tls_mode_mismatch, 308 edge.https_redirect |
    |   | certificate | does its owner want HTTPS with a good         | 421 edge.tls_mode_mismatch, 308 edge.https_redirect |
    |   |             | certificate alone (a domain under `strict`)?  | 503 edge.certificate_unavailable                    |
    |   | standing    | may its owner serve?                          | 403 edge.account_suspended,                         |
    |   |             |                                               | 429 edge.quota_exceeded                             |
    | 3 | credentials | are the visitor's credentials there and good? | 401 edge.auth_required, edge.auth_invalid,          |
    |   |             |                                               | 429 edge.auth_throttled                             |
    | 4 | address     | is the client's address allowed?              | 403 edge.ip_denied                                  |
    | 5 | room        | is there room, now and by the rates?          | 429 edge.concurrency_exceeded, edge.rate_limited    |
    | 6 | agent       | can it be forwarded on the agent's stream?    | 502 edge.agent_unreachable                          |

A malformed request is 400 before step 1. Each step is a pure function of the facts: it returns ``None`` to pass, the code of
the refusal, or what it needs to know first (:data:`PASSWORD`: a digest that takes a while, which the caller has computed off
the loop before it asks again). It takes no lock, waits for nothing, and changes nothing. A refusal for want of a tunnel that
was there a moment ago is not given at once: the request is asked about again when the tunnel is back, or when the wait is over
(``holding.py``).

TCP and passthrough connections go through the same steps, without 3. A step that cannot refuse under a tunnel's policy is
left out of that tunnel's chain (:func:`chain`), which is made once per policy. What a step does when its knowledge is missing
is part of its declaration: ``closed`` refuses, ``open`` passes. ``scope`` says what the answer of a step may depend on: what
is the same for all requests of one connection to one host under one policy need not be asked again for each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, Protocol

#: What is said of a domain that is somebody's and is served to nobody; its ``standing`` is that code.
CLOSED: Final = ("edge.domain_blocked", "edge.domain_frozen")
#: What a step may need: the verdict on the password of this request.
PASSWORD: Final = "need.password"  # noqa: S105 - no password


class Connection(Protocol):
    """How the visitor came in (``door.Door``)."""

    @property
    def scheme(self) -> bytes: ...
    @property
    def sni(self) -> bytes | None: ...
    @property
    def covers(self) -> Callable[[bytes], bool]: ...
    @property
    def client_ca(self) -> str | None: ...


class Addresses(Protocol):
    """Compiled address rules."""

    def allow(self, address: str) -> bool: ...


class Policy(Protocol):
    """What steps look at of a compiled policy (``policy.Compiled``)."""

    @property
    def plain_http(self) -> str: ...
    @property
    def users(self) -> object | None: ...
    @property
    def client_ca(self) -> str | None: ...
    @property
    def addresses(self) -> Addresses | None: ...


class Barred(Protocol):
    """Why the tunnels of an organization may not serve (``snapshot.Organization``), for as long as ``refuses(unix seconds)``."""

    @property
    def code(self) -> str | None: ...
    def refuses(self, now: float) -> bool: ...


class Governed(Protocol):
    """What has a policy. ``barred``: what its organization's standing says against it. ``strict``: a domain leads to it that is
    served by HTTPS with a good certificate alone."""

    @property
    def policy(self) -> Policy: ...
    @property
    def barred(self) -> Barred | None: ...
    @property
    def strict(self) -> bool: ...


class Line(Protocol):
    """Those who wait for a place in a tunnel; ``closed`` to who comes later, for as long as any does."""

    closed: bool


class Tunnel(Governed, Protocol):
    """The live tunnel of a host: its policy, counters and limits. ``rates`` is ``None`` where no rate is set, ``line`` where
    nobody may wait for a place."""

    inflight: int
    concurrency: int

    @property
    def passthrough(self) -> bool: ...
    @property
    def rates(self) -> object | None: ...
    @property
    def line(self) -> Line | None: ...
    @property
    def chain(self) -> Chain: ...
    @property
    def reachable(self) -> bool: ...


class Facts(Protocol):
    """What a decision may look at.

    ``tunnel``: the live tunnel of ``host``. ``standing``: the state of the tunnel that the platform has for the host (active,
    stopped, suspended) or one of :data:`CLOSED`, ``None`` when it knows none. ``secure``: whether the visitor's side is
    encrypted. ``address``: the client's. ``certified``: whether a client certificate was presented and verified against
    ``door.client_ca``. ``password()``: the verdict on the password (missing, valid, invalid, throttled, or need). ``wait()``:
    seconds until the rates have room.
    ``valid_until``: of a host that is served by HTTPS with a good certificate alone, until when (unix seconds) it is good.
    """

    @property
    def tunnel(self) -> Tunnel | None: ...
    @property
    def host(self) -> bytes: ...
    @property
    def standing(self) -> str | None: ...
    @property
    def door(self) -> Connection: ...
    @property
    def secure(self) -> bool: ...
    @property
    def address(self) -> str: ...
    @property
    def certified(self) -> bool: ...
    def password(self) -> str: ...
    def wait(self) -> float: ...
    @property
    def valid_until(self) -> float | None: ...


Check = Callable[[Facts], str | None]


class Step(NamedTuple):
    """One question of the chain. ``applies(tunnel)``: whether it can refuse anything there at all."""

    name: str
    check: Check
    applies: Callable[[Governed], bool]
    scope: Literal["connection", "request"]
    fails: Literal["open", "closed"]


class Chain(NamedTuple):
    """The steps of one tunnel under one policy: all of them, in order; by scope, for who asked the first part before; and
    what is left of the second for who asks the last step of all (6) by opening the stream.
    """

    checks: tuple[Check, ...]
    connection: tuple[Check, ...]
    request: tuple[Check, ...]
    opening: tuple[Check, ...]


def host_assigned(facts: Facts) -> str | None:
    """1. A host without a live tunnel is refused; one that the platform knows is said to be offline (if its owner may serve)."""
    if facts.tunnel is not None:
        return None
    standing = facts.standing
    if standing == "suspended":
        return None
    if standing in CLOSED:
        return standing
    return "edge.host_unassigned" if standing is None else "edge.tunnel_offline"


def tls_mode(facts: Facts) -> str | None:
    """2. Plain HTTP to a TLS-only host, HTTP to a passthrough host, a host that is not the one of the handshake or that the
    presented certificate is not for (RFC 9110, 7.4; RFC 6066, 3)."""
    tunnel, door = facts.tunnel, facts.door
    if tunnel is None:
        return None
    if door.scheme in (b"tcp", b"tls"):
        return None  # found by its port, or by the very name of the handshake
    if tunnel.passthrough:
        return "edge.tls_mode_mismatch"
    if door.scheme == b"https":
        host = facts.host
        if (door.sni is not None and door.sni != host) or not door.covers(host):
            return "edge.tls_mode_mismatch"
    if not facts.secure and tunnel.policy.plain_http != "allow":
        return "edge.https_redirect" if tunnel.policy.plain_http == "redirect" else "edge.tls_mode_mismatch"
    return None


def certificate_good(facts: Facts) -> str | None:
    """A domain whose owner wants it so is served by HTTPS alone, and while its certificate is good: until a time that relays know
    beforehand, so that it holds without the control plane."""
    if (tunnel := facts.tunnel) is None or (until := facts.valid_until) is None:
        return None
    if not facts.secure:
        return "edge.https_redirect" if tunnel.policy.plain_http == "redirect" else "edge.tls_mode_mismatch"
    return "edge.certificate_unavailable" if time.time() >= until else None


def standing_good(facts: Facts) -> str | None:
    """The owner's account may be suspended, or have used up what its plan has for the month: that ends with the month, also
    while the control plane is out of reach."""
    tunnel = facts.tunnel
    if tunnel is None:
        return "edge.account_suspended" if facts.standing == "suspended" else None
    barred = tunnel.barred
    return barred.code if barred is not None and barred.refuses(time.time()) else None


def credentials_valid(facts: Facts) -> str | None:
    """3. A client certificate, then a password, where the policy asks for them; both when it asks for both.

    A certificate counts only if it was checked against the authority that the policy names now: the connection may be older.
    """
    tunnel = facts.tunnel
    if tunnel is None:
        return None
    policy = tunnel.policy
    if policy.client_ca is not None and (facts.door.client_ca != policy.client_ca or not facts.certified):
        return "edge.auth_required"
    if policy.users is not None:
        return _PASSWORD_CODES[facts.password()]
    return None


_PASSWORD_CODES: Final[dict[str, str | None]] = {
    "valid": None,
    "missing": "edge.auth_required",
    "invalid": "edge.auth_invalid",
    "throttled": "edge.auth_throttled",
    "need": PASSWORD,
}


def address_allowed(facts: Facts) -> str | None:
    """4. The first rule that matches the client's address decides."""
    tunnel = facts.tunnel
    if tunnel is None or (rules := tunnel.policy.addresses) is None or rules.allow(facts.address):
        return None
    return "edge.ip_denied"


def has_room(facts: Facts) -> str | None:
    """5. What is in flight stays within the limit of grant and policy; then the rates of tunnel, client and organization."""
    tunnel = facts.tunnel
    if tunnel is None:
        return None
    if tunnel.inflight >= tunnel.concurrency or (tunnel.line is not None and tunnel.line.closed):
        return "edge.concurrency_exceeded"
    if tunnel.rates is not None and facts.wait() > 0:
        return "edge.rate_limited"
    return None


def agent_reachable(facts: Facts) -> str | None:
    """6. The agent's connection takes another stream."""
    tunnel = facts.tunnel
    if tunnel is not None and not tunnel.reachable:
        return "edge.agent_unreachable"
    return None


def _always(tunnel: Governed) -> bool:
    return True


def _guarded(tunnel: Governed) -> bool:
    return tunnel.policy.users is not None or tunnel.policy.client_ca is not None


def _strict(tunnel: Governed) -> bool:
    return tunnel.strict


def _barred(tunnel: Governed) -> bool:
    return tunnel.barred is not None


def _ruled(tunnel: Governed) -> bool:
    return tunnel.policy.addresses is not None


STEPS: tuple[Step, ...] = (
    Step("host", host_assigned, _always, "connection", "closed"),
    Step("tls_mode", tls_mode, _always, "connection", "closed"),
    Step("certificate", certificate_good, _strict, "request", "closed"),
    Step("standing", standing_good, _barred, "request", "open"),
    Step("credentials", credentials_valid, _guarded, "request", "closed"),
    Step("address", address_allowed, _ruled, "connection", "closed"),
    Step("room", has_room, _always, "request", "closed"),
    Step("agent", agent_reachable, _always, "request", "closed"),
)

_UNKNOWN_TUNNEL: Final = tuple(step.check for step in STEPS)


def chain(tunnel: Governed, *, raw: bool = False) -> Chain:
    """The chain of a tunnel under its present policy. ``raw``: a TCP or passthrough tunnel, whose visitors bring no head."""
    steps = [step for step in STEPS if step.applies(tunnel) and not (raw and step.name == "credentials")]
    return Chain(
        tuple(step.check for step in steps),
        tuple(step.check for step in steps if step.scope == "connection"),
        tuple(step.check for step in steps if step.scope == "request"),
        tuple(step.check for step in steps if step.scope == "request" and step.check is not agent_reachable),
    )


def decide(facts: Facts) -> str | None:
    """The code of the first refusal, what has to be known first, or ``None``: forward it."""
    tunnel = facts.tunnel
    for check in _UNKNOWN_TUNNEL if tunnel is None else tunnel.chain.checks:
        if (code := check(facts)) is not None:
            return code
    return None
