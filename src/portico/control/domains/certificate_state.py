"""How a domain's certificate is, as a pure function of the set of verified events about it.

    registers = Registers.read(row.cert_applied).with_event(event)     # in any order, any number of times
    state = derive(registers)                                           # columns of custom_domains
    trouble(registers, now)                                             # what is wrong, by class: incidents.py

Arrival means nothing. An event has a place, (revision, sequence), and registers keep the greatest place of each pair of class
and action, what was deployed, and the failures that no later success has answered. Each of the three is a join (commutative,
associative, idempotent), so every permutation of a history, with any duplicates, ends in the same registers, and in the same
state. One register for each *pair*, not for each object or class: a failed renewal that comes early does not hide the deployment
before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final

#: Failures of one class that are told apart; beyond it they are still failures, and no further number. Deployed certificates
#: that are remembered while each later one expires earlier.
MAX_FAILURES: Final = 50
MAX_DEPLOYED: Final = 50
#: Failures after which ownership and validation are incidents.
SEVERAL: Final = 3

#: What went wrong, by class.
FAILURES: Final[Mapping[str, tuple[str, ...]]] = {
    "ownership": ("failed", "blocked", "moved"),
    "validation": ("failed",),
    "issuance": ("failed", "rate_limited", "denied"),
    "deployment": ("failed", "partial"),
    "renewal": ("failed",),
    "revocation": ("requested", "succeeded"),
    "expiry": ("reached",),
    "deletion": ("failed",),
    "replication": ("lagging", "failed"),
    "integrity": ("key_mismatch", "chain_invalid", "ct_unexpected"),
}
_LIVE: Final = "deployment.succeeded"
_ISSUED: Final = ("issuance.succeeded", "renewal.succeeded", _LIVE)
#: The successes that answer failures of a class, when they are later.
ANSWERS: Final[Mapping[str, tuple[str, ...]]] = {
    "ownership": ("ownership.succeeded",),
    "validation": ("validation.succeeded", *_ISSUED),
    "issuance": _ISSUED,
    "deployment": (_LIVE,),
    "renewal": ("renewal.succeeded", _LIVE),
    "revocation": (_LIVE,),
    "expiry": (_LIVE,),
    "deletion": ("deletion.succeeded",),
    "replication": ("replication.activated", _LIVE),
    "integrity": (_LIVE,),
}
# What each of the steps to a certificate leaves a domain in that has none yet.
_STEPS: Final[Mapping[str, str]] = {
    "validation.started": "pending_validation",
    "validation.succeeded": "pending_issuance",
    "validation.failed": "pending_validation",
    "issuance.requested": "pending_issuance",
    "issuance.succeeded": "pending_deployment",
    "issuance.failed": "pending_issuance",
    "issuance.rate_limited": "pending_issuance",
    "issuance.denied": "pending_issuance",
    "renewal.started": "pending_issuance",
    "renewal.succeeded": "pending_deployment",
    "renewal.failed": "pending_issuance",
    "deployment.failed": "pending_deployment",
    "deployment.partial": "pending_deployment",
}
_FAILED_STEPS: Final = frozenset(
    {"validation.failed", "issuance.failed", "issuance.rate_limited", "issuance.denied", "renewal.failed"}
    | {"deployment.failed"}
)
TIMED_OUT: Final = "timed_out"

Place = tuple[int, int, str, str, str]
_NOWHERE: Final[Place] = (-1, -1, "", "", "")


@dataclass(frozen=True, slots=True)
class Event:
    """A verified event. ``effect`` is the same for all that tell of one thing; times are RFC 3339 in UTC, as text."""

    source: str
    event: str
    callback_class: str
    action: str
    revision: int
    sequence: int
    occurred_at: str
    effect: str = ""
    serial: str | None = None
    fingerprint: str | None = None
    issuer: str | None = None
    not_before: str | None = None
    not_after: str | None = None
    renews_at: str | None = None
    error_code: str | None = None
    error_detail: str | None = None
    retry_at: str | None = None
    regions_active: int | None = None
    regions_total: int | None = None

    @property
    def pair(self) -> str:
        return f"{self.callback_class}.{self.action}"

    @property
    def place(self) -> Place:
        """Where it stands among all events of its domain. What follows (revision, sequence) only breaks ties, always alike."""
        return (self.revision, self.sequence, self.occurred_at, self.source, self.event)

    @property
    def content(self) -> tuple[str, ...]:
        """Everything that it says, for the tie of two events that stand at the very same place."""
        return tuple(str(getattr(self, name)) for name in self.__dataclass_fields__)

    def short(self) -> dict[str, Any]:
        """As it is stored: without what is not there."""
        return {name: value for name in self.__dataclass_fields__ if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Registers:
    """What is kept of the events of one domain: ``custom_domains.cert_applied``."""

    newest: Mapping[str, Event] = field(default_factory=dict)
    #: Deployed certificates of which none is both later and longer valid than another.
    deployed: tuple[Event, ...] = ()
    #: By class: effect → the greatest place at which it failed; those before the last answer are gone.
    failures: Mapping[str, Mapping[str, Place]] = field(default_factory=dict)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Registers:
        """From JSON."""
        return cls(
            {pair: Event(**event) for pair, event in stored.get("newest", {}).items()},
            tuple(Event(**event) for event in stored.get("deployed", ())),
            {
                name: {effect: _place(place) for effect, place in effects.items()}
                for name, effects in stored.get("failures", {}).items()
            },
        )

    def written(self) -> dict[str, Any]:
        """As JSON, in one order."""
        return {
            "newest": {pair: self.newest[pair].short() for pair in sorted(self.newest)},
            "deployed": [event.short() for event in self.deployed],
            "failures": {
                name: {effect: list(place) for effect, place in sorted(self.failures[name].items())}
                for name in sorted(self.failures)
            },
        }

    def with_event(self, event: Event) -> Registers:
        """The registers of the set with this event in it."""
        newest = dict(self.newest)
        known = newest.get(event.pair)
        if known is None or (event.place, event.content) > (known.place, known.content):
            newest[event.pair] = event
        deployed = _skyline([*self.deployed, event]) if event.pair == _LIVE else self.deployed
        failures = {name: dict(effects) for name, effects in self.failures.items()}
        if event.action in FAILURES.get(event.callback_class, ()):
            effects = failures.setdefault(event.callback_class, {})
            effect = event.effect or f"{event.source}/{event.event}"
            effects[effect] = max(effects.get(effect, _NOWHERE), event.place)
        found = replace(self, newest=newest, deployed=deployed, failures={})
        return replace(found, failures=_open(failures, found))

    def last(self, *pairs: str) -> Event | None:
        """The latest event of these pairs."""
        return max((self.newest[pair] for pair in pairs if pair in self.newest), key=_by_place, default=None)

    def answered(self, name: str) -> Place:
        """The place of the last success that answers failures of a class."""
        found = self.last(*ANSWERS[name])
        return _NOWHERE if found is None else found.place

    def failed(self, name: str) -> int:
        """Failures of a class that no later success has answered."""
        return len(self.failures.get(name, ()))

    def failure(self, name: str) -> Event | None:
        """The last of them."""
        found = self.last(*(f"{name}.{action}" for action in FAILURES[name]))
        return found if found is not None and found.place > self.answered(name) else None

    @property
    def live(self) -> Event | None:
        """What serves, with all that is known of it; ``None`` without a deployment, or when it was revoked."""
        standing = [event for event in self.deployed if not self._revoked(event)]
        best = max(standing, key=lambda event: (_end(event), event.place), default=None)
        if best is None or self._deleted(best):
            return None
        return self._completed(best)

    @property
    def revoked(self) -> bool:
        """Whether what was deployed is revoked, and nothing came after it."""
        return bool(self.deployed) and all(self._revoked(event) for event in self.deployed)

    def _revoked(self, event: Event) -> bool:
        found = self.newest.get("revocation.succeeded")
        if found is None:
            return False
        return found.serial == event.serial if found.serial and event.serial else found.place > event.place

    def _deleted(self, event: Event) -> bool:
        found = self.newest.get("deletion.succeeded")
        return found is not None and found.place > event.place

    def _completed(self, event: Event) -> Event:
        """Facts that a deployment left out, from the issue of the same certificate."""
        for pair in ("renewal.succeeded", "issuance.succeeded"):
            issue = self.newest.get(pair)
            same = issue is not None and (
                issue.serial == event.serial if issue.serial and event.serial else issue.revision == event.revision
            )
            if issue is not None and same:
                names = ("serial", "fingerprint", "issuer", "not_before", "not_after", "renews_at")
                event = replace(event, **{name: getattr(event, name) or getattr(issue, name) for name in names})
        return event


def fold(events: Iterable[Event], registers: Registers | None = None) -> Registers:
    """The registers of a set of events, in whichever order they come."""
    found = registers or Registers()
    for event in events:
        found = found.with_event(event)
    return found


def _by_place(event: Event) -> tuple[Place, tuple[str, ...]]:
    return event.place, event.content


def _place(stored: Any) -> Place:
    revision, sequence, at, source, event = stored
    return int(revision), int(sequence), str(at), str(source), str(event)


def _end(event: Event) -> str:
    """How long it is valid; one that does not say so replaces all before it."""
    return event.not_after or "~"


def _skyline(events: Iterable[Event]) -> tuple[Event, ...]:
    """Without those that another one is both later than and valid at least as long as; the latest first."""
    kept: list[Event] = []
    until = ""
    for event in sorted({_by_place(each): each for each in events}.values(), key=_by_place, reverse=True):
        if _end(event) > until:
            kept.append(event)
            until = _end(event)
    return tuple(kept[:MAX_DEPLOYED])


def _open(failures: Mapping[str, Mapping[str, Place]], registers: Registers) -> dict[str, dict[str, Place]]:
    """Those that are later than the last answer, the latest of each class."""
    found: dict[str, dict[str, Place]] = {}
    for name, effects in failures.items():
        answered = registers.answered(name)
        later = sorted(((place, effect) for effect, place in effects.items() if place > answered), reverse=True)
        if later:
            found[name] = {effect: place for place, effect in later[:MAX_FAILURES]}
    return found


# -- the state -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class State:
    """The columns ``cert_…`` of a domain."""

    status: str = "none"
    serial: str | None = None
    fingerprint: str | None = None
    issuer: str | None = None
    not_before: datetime | None = None
    not_after: datetime | None = None
    renews_at: datetime | None = None
    error_code: str | None = None
    error_detail: str | None = None
    failures: int = 0
    retry_at: datetime | None = None
    source: str | None = None
    regions_active: int = 0
    regions_total: int = 0

    def columns(self) -> dict[str, Any]:
        return {f"cert_{name}": getattr(self, name) for name in self.__dataclass_fields__}


def derive(registers: Registers) -> State:
    """The state that these events add up to."""
    live = registers.live
    last = registers.last(*_STEPS, _LIVE, "revocation.succeeded", "expiry.reached", "deletion.succeeded")
    error = _error(registers)
    regions = _regions(registers)
    certificate = live or (registers.deployed[0] if registers.revoked else None)
    hint = registers.last("renewal.ari_window_changed", "renewal.upcoming")
    renews = certificate.renews_at if certificate else None
    if hint is not None and certificate is not None and hint.renews_at and hint.place > certificate.place:
        renews = hint.renews_at
    return State(
        status=_status(registers, live, last),
        serial=certificate.serial if certificate else None,
        fingerprint=certificate.fingerprint if certificate else None,
        issuer=certificate.issuer if certificate else None,
        not_before=_time(certificate.not_before) if certificate else None,
        not_after=_time(certificate.not_after) if certificate else None,
        renews_at=_time(renews),
        error_code=None if error is None else error.error_code or error.action,
        error_detail=None if error is None else error.error_detail,
        failures=sum(registers.failed(name) for name in ("validation", "issuance", "renewal", "deployment")),
        retry_at=None if error is None else _time(error.retry_at),
        source=None if last is None else last.source,
        regions_active=regions[0],
        regions_total=regions[1],
    )


def _status(registers: Registers, live: Event | None, last: Event | None) -> str:
    if last is None or last.pair == "deletion.succeeded":
        return "none"
    if live is not None:
        if _expired(registers, live):
            return "expired"
        step = registers.last(*_STEPS)
        under_way = (
            step is not None and step.place > live.place and step.pair not in (*_FAILED_STEPS, "deployment.partial")
        )
        return "renewing" if under_way else "active"
    if registers.revoked:
        return "revoked"
    step = registers.last(*_STEPS)
    if step is None:
        return {"revocation.succeeded": "revoked", "expiry.reached": "expired"}.get(last.pair, "none")
    stage = _STEPS[step.pair]
    if step.pair in _FAILED_STEPS and step.error_code == TIMED_OUT:
        return stage.removeprefix("pending_") + "_timed_out"
    return stage


def _expired(registers: Registers, live: Event) -> bool:
    found = registers.newest.get("expiry.reached")
    if found is None:
        return False
    return found.serial == live.serial if found.serial and live.serial else found.place > live.place


def _error(registers: Registers) -> Event | None:
    """The latest failure that no later success has answered."""
    names = ("integrity", "deployment", "renewal", "issuance", "validation")
    found = [event for name in names if (event := registers.failure(name)) is not None]
    return max(found, key=_by_place, default=None)


def _regions(registers: Registers) -> tuple[int, int]:
    pairs = (_LIVE, "deployment.partial", *(f"replication.{each}" for each in ("staged", "activated", "lagging")))
    told = [registers.newest[pair] for pair in pairs if pair in registers.newest]
    found = max((event for event in told if event.regions_total is not None), key=_by_place, default=None)
    return (0, 0) if found is None else (found.regions_active or 0, found.regions_total or 0)


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


# -- what is wrong -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that people should know of: tier 1 is the worst, 3 the mildest."""

    tier: int
    code: str
    detail: str | None = None
    count: int = 1


def life_tier(not_before: datetime | None, not_after: datetime | None, now: datetime) -> int | None:
    """How urgent it is that a certificate ends, by the share of its life that is left; ``None``: it is not.

    Shares, not days, so that a certificate of six days is judged as one of a year: under a quarter, a tenth, a twentieth; and
    always the worst in the last day, as long as that day is not most of its life.
    """
    if not_after is None:
        return None
    left = (not_after - now).total_seconds()
    whole = (not_after - not_before).total_seconds() if not_before is not None else 90 * 86_400
    if left <= 0:
        return 1
    share = left / whole if whole > 0 else 0.0
    if share < 0.05 or (left < 86_400 and share < 0.25):
        return 1
    return 2 if share < 0.10 else 3 if share < 0.25 else None


def trouble(registers: Registers, now: datetime) -> dict[str, Trouble]:
    """What is wrong now, by class of incident."""
    state = derive(registers)
    urgency = life_tier(state.not_before, state.not_after, now) if registers.live is not None else None
    found: dict[str, Trouble] = {}
    for name in FAILURES:
        event, count = registers.failure(name), registers.failed(name)
        tier = None if event is None else _tier(event, count, urgency, now)
        if event is not None and tier is not None:
            found[name] = Trouble(tier, event.error_code or event.action, event.error_detail, count)
    if "expiry" not in found and urgency is not None and state.not_after is not None:
        gone = state.not_after <= now
        found["expiry"] = Trouble(urgency, "expired" if gone else "expiring")
    return found


def _tier(event: Event, count: int, urgency: int | None, now: datetime) -> int | None:
    match event.callback_class:
        case "ownership":
            return 2 if event.action != "failed" else 3 if count >= SEVERAL else None
        case "validation":
            return 3 if count >= SEVERAL else None
        case "issuance" if event.action == "rate_limited":
            waits = event.retry_at is not None and datetime.fromisoformat(event.retry_at) > now
            return 3 if waits else 2
        case "renewal":
            return urgency or 3
        case "revocation" | "expiry" | "integrity":
            return 1
        case "deletion":
            return 3
    return 2


def sla(state: State, now: datetime, warning_share: float, breach_share: float) -> str | None:
    """Whether a renewal is late: ``warning`` or ``breach``, by the share of the certificate's life that has passed since it was
    due; without a time at which it is due, that is when a third of its life is left."""
    if state.not_after is None or state.not_before is None or state.status in ("none", "revoked"):
        return None
    whole = state.not_after - state.not_before
    due = state.renews_at or state.not_after - whole / 3
    late = now - due
    if whole <= timedelta() or late < whole * warning_share:
        return None
    return "breach" if late >= whole * breach_share else "warning"
