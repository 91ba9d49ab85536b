"""What an organization's channels can hear of: every event with what it means and the facts that it carries.

docs/reference/notifications.md is made from this table. An event is here when something in the platform raises it
(``channels.notify``); names are ``noun.verb`` in the past, and are never renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Event:
    """``about`` is for the list of events, ``sentence`` for people who get one, with facts in braces; ``example`` has all."""

    about: str
    sentence: str
    example: Mapping[str, Any]

    def said(self, facts: Mapping[str, Any]) -> str:
        """The sentence. A fact that is not there leaves a gap instead of a failure: the event has happened all the same."""
        return self.sentence.format_map(_Facts({name: str(value) for name, value in facts.items()}))


class _Facts(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "…"


#: What a channel that wants everything names.
EVERYTHING: Final = "*"
TEST: Final = "channel.test"
DISABLED: Final = "channel.disabled"
#: Topic of the mail with a code, which is no event.
CODE: Final = "channel.confirm"


def _domain(status: str, error: str | None) -> dict[str, Any]:
    tunnel, domain = "tun_01jd2x8k3nf0v4q5w6e7r8t9ya", "dom_01jd2x8k3nf0v4q5w6e7r8t9ya"
    return {
        "domain": domain,
        "name": "www.example.com",
        "hostname_status": status,
        "error": error,
        "tunnel": tunnel,
    }


_INCIDENT: Final = {
    "incident": "cin_01jd2x8k3nf0v4q5w6e7r8t9ya",
    "domain": "dom_01jd2x8k3nf0v4q5w6e7r8t9ya",
    "hostname": "www.example.com",
    "class": "renewal",
    "tier": 3,
    "status": "open",
    "code": "dns",
    "detail": "the challenge's record was not found",
    "reopened": 0,
}

_DUNNING: Final = {
    "case": "dun_01jd2x8k3nf0v4q5w6e7r8t9ya",
    "subscription": "sub_01jd2x8k3nf0v4q5w6e7r8t9ya",
    "state": "retrying",
    "stage": "D3",
    "amount_minor": 1900,
    "currency": "EUR",
    "amount": "19.00 EUR",
    "attempts": 2,
    "next_attempt_at": "2030-01-15T00:00:00+00:00",
    "opened_at": "2030-01-12T00:00:00+00:00",
}

EVENTS: Final[dict[str, Event]] = {
    TEST: Event(
        "Somebody pressed the button to test a channel. It goes to that channel, whatever that wants.",
        "This is a test of the channel “{name}”. Nothing happened, and nothing has to be done.",
        {"channel": "chn_01jd2x8k3nf0v4q5w6e7r8t9ya", "name": "Deployments"},
    ),
    DISABLED: Event(
        "A channel was switched off because its receiver is gone, or has failed for days. The owners get a mail, too.",
        "The channel “{name}” ({target}) was switched off: {reason}.",
        {
            "channel": "chn_01jd2x8k3nf0v4q5w6e7r8t9ya",
            "kind": "webhook",
            "name": "Deployments",
            "target": "https://hooks.example.com/portico",
            "reason": "the receiver says that it is gone (410)",
        },
    ),
    "domain.verified": Event(
        "A domain was proved to be the organization's, and can be routed to a tunnel.",
        "The domain {name} is verified ({hostname_status}).",
        _domain("active", None),
    ),
    "domain.failing": Event(
        "The DNS records of a domain that was verified are not there any more. Nothing changes for some days (7, unless the "
        "operator set another number); `error` says what is wrong.",
        "The DNS records of the domain {name} are not right any more: {error}.",
        _domain("active", "pointing_elsewhere"),
    ),
    "domain.moved": Event(
        "The records of a domain have been wrong for days. It is still served where its visitors come here, and is deleted after "
        "some more days (7, unless the operator set another number).",
        "The domain {name} has moved away: {error}.",
        _domain("moved", "pointing_elsewhere"),
    ),
    "domain.lost": Event(
        "A domain is not the organization's any more: its records stayed wrong, or somebody else proved that it is theirs "
        "(`error` is `taken_over`).",
        "The domain {name} was lost: {error}.",
        _domain("deleted", "taken_over"),
    ),
    "certificate.renewal_late": Event(
        "A certificate was not renewed when it was due: once as `warning`, once as `breach` of the objective.",
        "The renewal of the certificate of {hostname} is late ({level}); it ends at {not_after}.",
        {
            "domain": "dom_01jd2x8k3nf0v4q5w6e7r8t9ya",
            "hostname": "www.example.com",
            "level": "warning",
            "due_at": "2030-01-10T00:00:00+00:00",
            "not_after": "2030-02-10T00:00:00+00:00",
        },
    ),
    "certificate_incident.opened": Event(
        "Something is wrong with a domain's certificate. Tier 1 is the worst; `reopened` counts how often it came back.",
        "Incident (tier {tier}) with the certificate of {hostname}, {class}: {code}. {detail}",
        _INCIDENT,
    ),
    "certificate_incident.escalated": Event(
        "An incident with a domain's certificate became worse, whether or not somebody has acknowledged it.",
        "The incident with the certificate of {hostname}, {class}, is of tier {tier} now: {code}. {detail}",
        {**_INCIDENT, "tier": 1, "status": "acknowledged"},
    ),
    "certificate_incident.resolved": Event(
        "An incident with a domain's certificate is over, by a later success or by hand.",
        "The incident with the certificate of {hostname}, {class}, is over.",
        {**_INCIDENT, "status": "resolved"},
    ),
    "key.leaked": Event(
        "A key was found in public by a secret scanner and revoked. Whoever made it and the owners get a mail, too.",
        "The key “{name}” (begins with {prefix}) was found in public and revoked.",
        {
            "key": "key_01jd2x8k3nf0v4q5w6e7r8t9ya",
            "name": "laptop",
            "prefix": "tnl_agt_0123",
            "kind": "agent",
            "url": None,
        },
    ),
    "organization.deletion": Event(
        "An owner asked for the organization to be deleted; until `delete_after` it can be taken back. Owners get a mail, too.",
        "The organization “{organization}” is going to be deleted at {delete_after}.",
        {"organization": "Acme", "delete_after": "2030-01-15T00:00:00+00:00"},
    ),
    "usage.threshold": Event(
        "50, 80 or 100 % of what the plan allows in a month (requests, bytes) are used: once each a month. Of several that are "
        "passed at once, the highest. `hard_cap`: traffic stops at 100 %.",
        "{percent} % of {limit} are used: {used} of {allowed} in {month} (plan {plan}).",
        {
            "limit": "requests_per_month",
            "percent": 80,
            "used": 80012,
            "allowed": 100000,
            "month": "2026-02",
            "plan": "free",
            "hard_cap": True,
        },
    ),
    "dunning.advanced": Event(
        "A payment failed and is still owed: once for each day of the schedule (`stage`) that the case reaches. `state` says "
        "what holds from then on: `restricted` is a slow pace and no more tunnels, `suspended` the default plan. Who pays gets a "
        "mail, too.",
        "{amount} are owed on the subscription ({stage}, {state}); payment has failed {attempts} times.",
        _DUNNING,
    ),
    "dunning.recovered": Event(
        "Everything that was owed is paid, and what was taken away is given back. Who pays gets a mail, too.",
        "What was owed on the subscription since {opened_at} is paid.",
        {**_DUNNING, "state": "recovered"},
    ),
    "subscription.double": Event(
        "A second checkout page was paid although the organization had a subscription. The second subscription was ended at "
        "once, and what was paid for it goes back; `first` is the one that stays. Who pays gets a mail, too.",
        "A second subscription was paid at {provider}; it was ended, and the money goes back.",
        {
            "subscription": "sub_01jd2x8k3nf0v4q5w6e7r8t9yb",
            "first": "sub_01jd2x8k3nf0v4q5w6e7r8t9ya",
            "provider": "stripe",
        },
    ),
}
