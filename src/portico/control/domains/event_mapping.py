"""The closed table from what a sender says to what it means.

A sender names a class and an action and never a type: what a pair means is decided here. A pair that is not in the table is
stored (``unmapped``) and changes nothing. Types are shown to people and programs, and are never renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: (callbackClass, callbackAction) → type.
TABLE: Final[Mapping[tuple[str, str], str]] = {
    ("ownership", "succeeded"): "domain.verified",
    ("ownership", "failed"): "domain.verification_failed",
    ("ownership", "blocked"): "domain.blocked",
    ("ownership", "moved"): "domain.moved",
    ("validation", "started"): "cert.validating",
    ("validation", "succeeded"): "cert.validated",
    ("validation", "failed"): "cert.validation_failed",
    ("issuance", "requested"): "cert.requested",
    ("issuance", "succeeded"): "cert.issued",
    ("issuance", "failed"): "cert.issue_failed",
    ("issuance", "rate_limited"): "cert.rate_limited",
    ("issuance", "denied"): "cert.denied",
    ("deployment", "succeeded"): "cert.deployed",
    ("deployment", "failed"): "cert.deploy_failed",
    ("deployment", "partial"): "cert.deploy_partial",
    ("renewal", "upcoming"): "cert.expiring",
    ("renewal", "started"): "cert.renewing",
    ("renewal", "succeeded"): "cert.renewed",
    ("renewal", "failed"): "cert.renew_failed",
    ("renewal", "ari_window_changed"): "cert.renew_hint",
    ("revocation", "requested"): "cert.revoking",
    ("revocation", "succeeded"): "cert.revoked",
    ("expiry", "reached"): "cert.expired",
    ("deletion", "succeeded"): "cert.deleted",
    ("deletion", "failed"): "cert.delete_failed",
    ("replication", "staged"): "replica.staged",
    ("replication", "activated"): "replica.activated",
    ("replication", "lagging"): "replica.lagging",
    ("replication", "failed"): "replica.failed",
    ("integrity", "key_mismatch"): "cert.integrity_key_mismatch",
    ("integrity", "chain_invalid"): "cert.integrity_chain_invalid",
    ("integrity", "ct_unexpected"): "cert.integrity_ct_unexpected",
}

#: Every class, in the order of the table.
CLASSES: Final = tuple(dict.fromkeys(name for name, _ in TABLE))


def type_of(callback_class: str, action: str) -> str | None:
    """What the pair means; ``None`` when it means nothing here."""
    return TABLE.get((callback_class, action))
