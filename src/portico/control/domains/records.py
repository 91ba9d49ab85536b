"""What the owner of a domain sets in the DNS.

    TXT    _portico-challenge.example.com   portico-verification=<token of this claim>   proves that the name is theirs
    CNAME  www.example.com                  edge.<base domain>                           sends visitors here
    A/AAAA example.com                      addresses of the edge                        the same at an apex (RFC 1034, 3.6.2)
    CNAME  _acme-challenge.example.com      <label>.<challenge zone>                     lets us answer DNS-01; wildcards need it

The TXT record stays: it is what keeps the name with its owner when somebody else claims it.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any, Final, Literal

from portico.control.domains import names
from portico.control.domains.names import Name
from portico.settings import ApiSettings

CHALLENGE_LABEL: Final = "_portico-challenge"
ACME_LABEL: Final = "_acme-challenge"
TOKEN_PREFIX: Final = "portico-verification="  # noqa: S105 - public: it is published in the DNS
Purpose = Literal["ownership", "routing", "delegation"]


@dataclass(frozen=True, slots=True)
class Record:
    """A record to set. ``type`` ALIAS: whatever a DNS host calls a CNAME that may stand at an apex."""

    purpose: Purpose
    type: Literal["TXT", "CNAME", "A", "AAAA", "ALIAS"]
    name: str
    value: str
    required: bool


def ownership(row: Any, name: Name) -> Record:
    """The record that proves a claim."""
    return Record("ownership", "TXT", f"{CHALLENGE_LABEL}.{name.base}", TOKEN_PREFIX + row.verification_token, True)


def routing(settings: ApiSettings, name: Name) -> list[Record]:
    """The records that send visitors here; at an apex without known addresses, one that some DNS hosts offer."""
    if not name.apex or name.wildcard:
        return [Record("routing", "CNAME", name.name, names.target(settings), True)]
    if not settings.domain_addresses:
        return [Record("routing", "ALIAS", name.name, names.target(settings), True)]
    found = [ipaddress.ip_address(text) for text in settings.domain_addresses]
    return [Record("routing", "A" if each.version == 4 else "AAAA", name.name, str(each), True) for each in found]


def delegation(settings: ApiSettings, row: Any, name: Name) -> Record | None:
    """The record by which we may answer DNS-01 for the name, where this installation can."""
    if not settings.challenge_zone or not row.challenge_delegation:
        return None
    value = f"{row.challenge_delegation}.{settings.challenge_zone.lower().strip('.')}"
    return Record("delegation", "CNAME", f"{ACME_LABEL}.{name.base}", value, name.wildcard)


def wanted(settings: ApiSettings, row: Any, name: Name) -> list[Record]:
    """Everything to set for a domain."""
    optional = delegation(settings, row, name)
    return [ownership(row, name), *routing(settings, name), *([optional] if optional is not None else [])]


def shown(record: Record, findings: dict[str, Any]) -> dict[str, Any]:
    """A record as the API shows it, with what the last look found there."""
    found = findings.get(record.purpose, {})
    return {
        "purpose": record.purpose,
        "type": record.type,
        "name": record.name,
        "value": record.value,
        "required": record.required,
        "state": found.get("state", "unchecked"),
        "found": found.get("found", []),
        "fix": found.get("fix"),
    }
