"""The hash chain over audit rows: what is hashed, and how a reader proves that nothing was changed.

    hash(n) = SHA-256( hash(n-1) as 32 raw bytes || RFC 8785 form of record(n) )        hash(0) = 32 zero bytes

Pure functions of an *entry*, the JSON object that the export writes for a row, so that one verifier serves the API, the
command line and anybody's own program. Personal values stand beside the record, not in it: the record has a commitment of
each, HMAC-SHA256 under the row's own random salt. Erasing value and salt leaves the record, and so the hash, as it was;
without the salt the commitment says nothing, not even about an IPv4 address.
docs/reference/audit-log.md has the format with a worked example, which a test runs.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from portico.kit import canonical

#: What stands before the first record.
ZERO: Final = bytes(32)
#: The chain of acts outside every organization.
INSTALLATION: Final = "installation"
SALT_BYTES: Final = 32
#: Members of ``details`` that are personal data and can be erased.
PERSONAL: Final = frozenset({"address", "email", "hostname", "user_agent"})

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """The first thing that is wrong: at which number, and one of the kinds of docs/reference/audit-log.md."""

    seq: int
    kind: str
    detail: str


def link(previous: bytes, record: Mapping[str, Any]) -> bytes:
    """The hash of ``record`` after ``previous`` (32 bytes)."""
    return hashlib.sha256(previous + canonical.encode(dict(record))).digest()


def instant(at: datetime) -> str:
    """A time as records have it: UTC, milliseconds, cut off."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"


def commitment(salt: bytes, name: str, value: Any) -> str:
    """What the record holds of a personal value, in hex."""
    return hmac.digest(salt, canonical.encode([name, value]), "sha256").hex()


def record_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is hashed of an entry."""
    return {
        "action": entry["action"],
        "actor": {"id": entry["actor"]["id"], "kind": entry["actor"]["kind"]},
        "details": entry["details"],
        "id": entry["id"],
        "outcome": entry["outcome"],
        "personal": entry["commitments"],
        "request_id": entry["request_id"],
        "seq": entry["seq"],
        "target": entry["target"],
        "tenant": entry["chain"],
        "ts": entry["ts"],
    }


def check(entry: Mapping[str, Any], chain: str, seq: int, previous: bytes) -> Fault | None:
    """What is wrong with the entry that should be number ``seq`` of ``chain`` after ``previous``, or ``None``."""
    try:
        found = entry["seq"]
        if found != seq:
            return Fault(seq, "missing", f"number {seq} is missing, {found} follows")
        if entry["chain"] != chain:
            return Fault(seq, "chain", "the row belongs to another chain")
        if entry.get("prev", previous.hex()) != previous.hex():
            return Fault(seq, "hash", "prev is not the hash of the row before")
        if link(previous, record_of(entry)).hex() != entry["hash"]:
            return Fault(seq, "hash", "the record or its predecessor is not what was hashed")
        return _check_personal(entry, seq)
    except (KeyError, TypeError, ValueError, AttributeError):
        return Fault(seq, "unreadable", "the entry does not have the form of docs/reference/audit-log.md")


def _check_personal(entry: Mapping[str, Any], seq: int) -> Fault | None:
    """Values that are still there must be the ones that were committed to; a row is erased as a whole or not at all."""
    personal, commitments = entry["personal"], entry["commitments"]
    if entry["salt"] is None:
        return Fault(seq, "personal", "personal values without their salt") if personal else None
    salt = bytes.fromhex(entry["salt"])
    if personal.keys() != commitments.keys():
        return Fault(seq, "personal", "a personal value is missing or was added")
    wrong = [name for name, value in personal.items() if commitment(salt, name, value) != commitments[name]]
    return Fault(seq, "personal", f"{wrong[0]} is not the value that was recorded") if wrong else None


@dataclass(slots=True)
class Walk:
    """A walk along one chain: feed entries in order; ``fault`` stays at the first."""

    chain: str
    seq: int  # of the last entry that was found right (or the anchor)
    last: bytes  # its hash
    fault: Fault | None = None
    checked: int = 0

    def feed(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Check entries until one is wrong."""
        for entry in entries:
            self.fault = check(entry, self.chain, self.seq + 1, self.last)
            if self.fault is not None:
                return
            self.seq += 1
            self.last = bytes.fromhex(entry["hash"])
            self.checked += 1

    def end_at(self, seq: int, hash_: str) -> None:
        """The chain must end where its head says."""
        if self.fault is not None:
            return
        if self.seq < seq:
            self.fault = Fault(self.seq + 1, "missing", f"the log ends at {self.seq}, its head says {seq}")
        elif self.seq > seq or self.last.hex() != hash_:
            self.fault = Fault(self.seq, "head", f"the head of the chain says {seq} and another hash")


def begin(entry: Mapping[str, Any]) -> tuple[Walk, bool]:
    """A walk for an export whose first entry is ``entry``, and whether that entry is still to be fed to it.

    An export that begins later than number 1 (retention, or a piece) stands on the ``prev`` of its first entry; one without
    ``prev``, from before exports had it, on that entry's own hash.
    """
    seq, chain, hash_ = entry.get("seq"), entry.get("chain"), entry.get("hash")
    if not (isinstance(seq, int) and isinstance(chain, str) and isinstance(hash_, str)) or seq <= 1:
        return Walk(str(chain), 0, ZERO), True
    try:
        if isinstance(before := entry.get("prev"), str):
            return Walk(chain, seq - 1, bytes.fromhex(before)), True
        return Walk(chain, seq, bytes.fromhex(hash_)), False
    except ValueError:
        return Walk(chain, seq - 1, ZERO, Fault(seq, "unreadable", "the hash is not hex")), False
