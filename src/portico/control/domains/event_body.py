"""The body of a certificate event: what a sender may say, and in which form.

Members that are not named here are passed over and not stored. Names of hosts are A-labels in lower case; times have a zone.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from portico.kit import scrub

_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?"
_HOST: Final = re.compile(rf"(?:\*\.)?(?:{_LABEL}\.)+{_LABEL}")
#: The greatest number that every JSON parser reads as it was written (RFC 8259, section 6).
WHOLE: Final = 2**53 - 1
_MAX_RETRY_SECONDS: Final = 30 * 86_400


def _host(text: str) -> str:
    found = text.lower().rstrip(".")
    if len(found) > 253 or not _HOST.fullmatch(found):
        raise ValueError("is not a host name in A-labels")
    return found


def _utc(value: datetime) -> datetime:
    try:
        found = value.astimezone(UTC)
    except OverflowError:
        raise ValueError("is not a time in UTC") from None
    if not 1970 <= found.year < 9000:
        raise ValueError("is not a time that certificates know")
    return found


def _said(text: str) -> str:
    """Free text for people: one line, nothing that steers a terminal, nothing that looks like a secret."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("lone surrogates are not text")
    return scrub.text("".join(c if c.isprintable() else " " for c in text)).strip()


def _hex(text: str) -> str:
    return text.replace(":", "").lower()


def _word(most: int) -> Any:
    return StringConstraints(min_length=1, max_length=most, pattern=r"^[\x21-\x7e]+$")


Id = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[\x21-\x2d\x2f-\x7e]+$")]
Word = Annotated[str, _word(128)]
Text = Annotated[str, StringConstraints(max_length=500), AfterValidator(_said)]
Host = Annotated[str, StringConstraints(min_length=1, max_length=254), AfterValidator(_host)]
Time = Annotated[AwareDatetime, AfterValidator(_utc)]
Whole = Annotated[int, Field(ge=0, le=WHOLE, strict=True)]
Hex = Annotated[str, StringConstraints(min_length=1, max_length=191, pattern=r"^[0-9A-Fa-f:]+$"), AfterValidator(_hex)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z_]{0,31}$")]


class _Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", frozen=True)


class Subject(_Part):
    """The domain that it is about."""

    domain_id: Id | None = None
    hostname: Host
    sans: Annotated[list[Host], Field(max_length=100)] = []


class Certificate(_Part):
    """Facts of the certificate. ``chain_pem`` is looked at and not kept; ``renews_at``: when it should be renewed."""

    fingerprint_sha256: Hex | None = Field(None, alias="fingerprintSha256")
    serial: Hex | None = None
    issuer: Text | None = None
    not_before: Time | None = None
    not_after: Time | None = None
    ari_cert_id: Word | None = None
    profile: Word | None = None
    key_alg: Word | None = None
    renews_at: Time | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Certificate:
        if self.not_before is not None and self.not_after is not None and self.not_before >= self.not_after:
            raise ValueError("notAfter is not later than notBefore")
        return self


class Fault(_Part):
    """What went wrong. ``retry_after``: seconds, or a time."""

    code: Word
    detail: Annotated[str, StringConstraints(max_length=2000), AfterValidator(_said)] = ""
    retry_after: Annotated[int, Field(ge=0, le=_MAX_RETRY_SECONDS, strict=True)] | Time | None = None


class Regions(_Part):
    """Of how many regions it is live in how many."""

    active: Annotated[int, Field(ge=0, le=1000, strict=True)]
    total: Annotated[int, Field(ge=0, le=1000, strict=True)]


class Provenance(_Part):
    """What saw it, and on which object. ``revision``: the generation of the certificate, which orders events."""

    producer: Word
    producer_version: Word | None = None
    object_kind: Word | None = None
    object_uid: Annotated[str, _word(256)]
    namespace: Word | None = None
    name: Annotated[str, _word(253)] | None = None
    resource_version: Word | None = None
    revision: Whole = 0
    issuer_ref: Word | None = None
    acme_order_url: Annotated[str, _word(500)] | None = None


class CertEvent(_Part):
    """One event. What happened is (`callbackClass`, `callbackAction`); what that means is decided here, by a closed table."""

    spec_version: Literal["1", "1.0"]
    event_id: Id
    source_id: Id
    cluster_id: Id
    environment: Id
    sequence: Whole
    occurred_at: Time
    callback_class: Name
    callback_action: Name
    subject: Subject
    certificate: Certificate | None = None
    error: Fault | None = None
    regions: Regions | None = None
    provenance: Provenance

    @property
    def names(self) -> list[str]:
        """Every host that it speaks about."""
        return [self.subject.hostname, *self.subject.sans]

    @property
    def effect(self) -> str:
        """What it tells of: the same for every event that tells of the same thing. (A serial is that of one issue.)"""
        serial = self.certificate.serial if self.certificate is not None else None
        last = serial or str(self.provenance.revision)
        return f"{self.provenance.object_uid}/{self.callback_class}/{self.callback_action}/{last}"

    def facts(self) -> dict[str, Any]:
        """What the state of a certificate is made of, as ``certificate_state.Event`` names it."""
        found: dict[str, Any] = {}
        if (certificate := self.certificate) is not None:
            found |= {
                "serial": certificate.serial, "fingerprint": certificate.fingerprint_sha256, "issuer": certificate.issuer,
                "not_before": certificate.not_before, "not_after": certificate.not_after,
                "renews_at": certificate.renews_at, "ari_id": certificate.ari_cert_id, "profile": certificate.profile,
                "key_algorithm": certificate.key_alg,
            }  # fmt: skip
        if (fault := self.error) is not None:
            found |= {"error_code": fault.code, "error_detail": fault.detail or None}
            if isinstance(fault.retry_after, datetime):
                found["retry_at"] = fault.retry_after
            elif fault.retry_after is not None:
                found["retry_at"] = self.occurred_at + timedelta(seconds=fault.retry_after)
        if self.regions is not None:
            found |= {"regions_active": self.regions.active, "regions_total": self.regions.total}
        shown = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in found.items()}
        return {name: value for name, value in shown.items() if value is not None}
