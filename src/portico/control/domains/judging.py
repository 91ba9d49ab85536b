"""What looks at the DNS mean for a domain. Pure: answers of resolvers and the row in, verdicts, findings and next state out.

    owner    the TXT record of this claim is there                    what makes a name somebody's
    points   visitors of the name come here                           what makes it worth a certificate

    pending ──owner──► verified ──points──► active ──points elsewhere for 7 days──► moved ──7 days──► deleted
                          └──no TXT for 7 days───────────────────────────────────────►│
    moved comes back when both are right again, or by `verify` when the name is still its owner's

The ladder of looks is Cloudflare's for custom hostnames: pauses of floor(60·1.05ⁿ) s for the first ten, then of
floor(60·1.15ⁿ) s, at most 4 h. A look that learned nothing, since resolvers were silent or disagree, is made again sooner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from portico.control.domains.caa import Policy
from portico.control.domains.dns import Answer, Verdict, common, verdict
from portico.control.domains.records import TOKEN_PREFIX, Record
from portico.settings import ApiSettings

_EARLY: Final = 10
_LONGEST_SECONDS: Final = 14_400
#: Values of a record that are kept to be shown.
_SHOWN: Final = 8

Pair = tuple[Answer, Answer]
State = Literal["ok", "missing", "wrong", "unknown"]


def pause(attempts: int) -> int:
    """Seconds to the next look after ``attempts`` in vain."""
    if attempts < _EARLY:
        return math.floor(60 * 1.05**attempts)
    return min(math.floor(60 * 1.15 ** min(attempts, 100)), _LONGEST_SECONDS)


@dataclass(frozen=True, slots=True)
class Looked:
    """What the resolvers said about a name at ``at``: one element for each resolver. ``addresses``: A and AAAA of the name,
    ``own``: of the edge."""

    at: datetime
    ownership: Sequence[Answer]
    addresses: Sequence[Pair]
    own: frozenset[str]
    delegation: Sequence[Answer] = ()
    caa: Policy | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of a record, and what to do about it."""

    state: State
    found: Sequence[str] = ()
    fix: str | None = None

    def stored(self) -> dict[str, Any]:
        """As the row keeps it."""
        return {"state": self.state, "found": list(self.found[:_SHOWN]), "fix": self.fix}


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdicts with their findings. ``error``: one word for the worst of them."""

    owner: Verdict
    points: Verdict
    findings: dict[str, Finding] = field(default_factory=dict)
    error: str | None = None

    def stored(self) -> dict[str, Any]:
        return {name: finding.stored() for name, finding in self.findings.items()}


def claimed(judged: Judged) -> Judged:
    """The same for a claim that is proved while somebody else still has the name, and the record for it."""
    fix = "Another organization has this name, and its record is still there. Remove that one, and verify again"
    ownership = replace(judged.findings["ownership"], state="wrong", fix=fix)
    return Judged("no", judged.points, {**judged.findings, "ownership": ownership}, "claimed")


def proves(answers: Sequence[Answer], token: str) -> Verdict:
    """Whether the record of a claim is there."""
    wanted = TOKEN_PREFIX + token
    return verdict(answers, lambda answer: wanted in (value.strip() for value in answer.values))


def judge(looked: Looked, token: str, wanted: Sequence[Record], target: str) -> Judged:
    """The verdicts on a claim with ``token``, whose owner should set the records ``wanted``."""
    owner = proves(looked.ownership, token)
    per_resolver = [_points(pair, target, looked.own) for pair in looked.addresses]
    points = _majority(per_resolver)
    by_purpose: dict[str, list[Record]] = {}
    for record in wanted:
        by_purpose.setdefault(record.purpose, []).append(record)
    findings = {
        "ownership": _ownership(owner, looked.ownership, by_purpose["ownership"][0]),
        "routing": _routing(points, looked.addresses, by_purpose["routing"], looked.own),
    }
    if "delegation" in by_purpose:
        findings["delegation"] = _delegation(looked.delegation, by_purpose["delegation"][0])
    return Judged(owner, points, findings, _error(owner, points, looked))


def _points(pair: Pair, target: str, own: frozenset[str]) -> Verdict:
    """Whether a name leads here, as one resolver sees it: by the alias, or to no address but ours."""
    if any(target in answer.chain or target in answer.values for answer in pair):
        return "yes"
    if not all(answer.sure for answer in pair):
        return "unknown"
    found = {value for answer in pair for value in answer.values}
    if found and not own:
        return "unknown"
    return "yes" if found and found <= own else "no"


def _majority(verdicts: Sequence[Verdict]) -> Verdict:
    for word in ("yes", "no"):
        if 2 * sum(each == word for each in verdicts) > len(verdicts):
            return "yes" if word == "yes" else "no"
    return "unknown"


def _ownership(owner: Verdict, answers: Sequence[Answer], record: Record) -> Finding:
    found = [value for value in common(answers).values if value.strip().startswith(TOKEN_PREFIX)]
    if owner == "yes":
        return Finding("ok", found)
    if owner == "unknown":
        return Finding("unknown", found, _unsure(answers))
    if found:
        return Finding("wrong", found, f"Add a TXT record {record.name} with the value {record.value}; others may stay")
    return Finding("missing", (), f"Set a TXT record {record.name} with the value {record.value}")


def _routing(points: Verdict, pairs: Sequence[Pair], wanted: Sequence[Record], own: frozenset[str]) -> Finding:
    if not pairs:
        return Finding("unknown")
    four, six = common([pair[0] for pair in pairs]), common([pair[1] for pair in pairs])
    chain = four.chain or six.chain
    found = [*chain[:1], *(value for answer in (four, six) for value in answer.values)]
    set_ = " and ".join(f"{record.type} {record.name} → {record.value}" for record in wanted)
    if points == "yes":
        return Finding("ok", found)
    if points == "unknown":
        return Finding("unknown", found, _unsure([answer for pair in pairs for answer in pair]))
    if "loop" in (four.status, six.status):
        return Finding("wrong", found, f"Its CNAME records lead in a circle ({' → '.join(chain[:4])}). Set {set_}")
    if not found:
        return Finding("missing", (), f"Set {set_}")
    ours = own.intersection(found)
    if ours:
        others = ", ".join(value for value in found if value not in own and value not in chain)
        return Finding("wrong", found, f"Some visitors still go elsewhere: remove {others}")
    return Finding("wrong", found, f"It leads elsewhere. Set {set_}, and remove what is there now")


def _delegation(answers: Sequence[Answer], record: Record) -> Finding:
    right = verdict(answers, lambda answer: record.value in answer.values)
    found = list(common(answers).values)
    if right == "yes":
        return Finding("ok", found)
    if right == "unknown":
        return Finding("unknown", found, _unsure(answers))
    set_ = f"Set a CNAME record {record.name} with the value {record.value}"
    return Finding("wrong" if found else "missing", found, set_ if record.required or found else None)


def _unsure(answers: Sequence[Answer]) -> str:
    silent = sum(not answer.sure for answer in answers)
    if 2 * silent >= len(answers):
        why = next((answer.why for answer in answers if answer.why), "no answer")
        return f"Most resolvers did not answer ({why}). Check the name servers of the domain, and try again"
    return "Resolvers do not agree yet. A record that was just changed takes its old time to live to be seen everywhere"


def _error(owner: Verdict, points: Verdict, looked: Looked) -> str | None:
    if owner == "no":
        return "ownership_missing"
    answers = [*looked.ownership, *(answer for pair in looked.addresses for answer in pair)]
    if "unknown" in (owner, points):
        silent = sum(not answer.sure for answer in answers)
        return "resolvers_silent" if 2 * silent >= len(answers) else "resolvers_disagree"
    if points == "yes":
        return None
    if any(answer.status == "loop" for pair in looked.addresses for answer in pair):
        return "alias_loop"
    leads = any(answer.values or answer.chain for pair in looked.addresses for answer in pair)
    return "pointing_elsewhere" if leads else "not_pointing"


def settle(settings: ApiSettings, row: Any, judged: Judged, now: datetime, *, manual: bool) -> dict[str, Any]:
    """The columns of a domain after a look at ``now``. Whether a name may go from ``pending`` to its owner is decided before.

    ``manual``: its owner asked for it, which begins the ladder anew.
    """
    status = row.hostname_status
    after = _after(status, judged.owner, judged.points, manual=manual)
    failing = after == status and _failing(status, judged)
    since = row.failing_since
    if failing:
        since = now if since is None or (manual and status == "pending") else since
    elif after != status or "unknown" not in (judged.owner, judged.points):
        since = None
    long = timedelta(days=settings.domain_moved_days if status == "moved" else settings.domain_failing_days)
    over = failing and since is not None and now - since >= long
    if over and status == "moved" and _gone(judged):
        return {"hostname_status": "deleted", "next_check_at": None, "tunnel_id": None, **_noted(judged, now)}
    if over and status in ("verified", "active"):
        after, since = "moved", now
    right = after == "active" and judged.owner == judged.points == "yes"
    attempts = 0 if manual or after != status or right else row.check_attempts
    wait: float = settings.domain_recheck_seconds if right else pause(attempts)
    if "unknown" in (judged.owner, judged.points):
        wait = min(wait, settings.domain_unsure_seconds * 2 ** min(attempts, _EARLY))
    values = {
        "hostname_status": after,
        "check_attempts": 0 if right else attempts + 1,
        "failing_since": since,
        "next_check_at": None if over and after == "pending" else now + timedelta(seconds=wait),
        **_noted(judged, now),
    }
    return {**values, "verified_at": now} if status == "pending" and after != "pending" else values


def _failing(status: str, judged: Judged) -> bool:
    """Whether what the state stands on is not there; for a claim, and for what has moved, nothing is there yet."""
    if status == "active":
        return judged.points == "no"
    return judged.owner == "no" if status == "verified" else True


def _after(status: str, owner: Verdict, points: Verdict, *, manual: bool) -> str:
    """The state by this look alone; how long something has been wrong is not asked here."""
    if status == "pending":
        return "pending" if owner != "yes" else "active" if points == "yes" else "verified"
    if status == "verified":
        return "active" if owner == points == "yes" else "verified"
    if status == "moved" and owner == "yes":
        return "active" if points == "yes" else "verified" if manual else "moved"
    return status


def _gone(judged: Judged) -> bool:
    """Whether this look says so for sure: nothing is deleted because nobody answered."""
    return "no" in (judged.owner, judged.points)


def _noted(judged: Judged, now: datetime) -> dict[str, Any]:
    return {"checked_at": now, "dns_error": judged.error, "dns_findings": judged.stored()}
