"""What happens to certificates outside of this platform, as events for `POST /v1/domains/cert-events`: pure, without any I/O.

cert-manager says how things *are*, again and again; an event is made where that differs from what was known (``Known``, kept
on disk). Its own Kubernetes events are not looked at: the reason ``Issuing`` means a start, a temporary certificate and a
success. What counts is ``status.revision`` together with the condition ``Ready``: the certificate is in its Secret then, from
which servers take it, so that it is issued and deployed. What it is (serial, fingerprint) stands in the CertificateRequest of
that revision. certmagic (Caddy) says what happened, once; the server that obtained a certificate serves with it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

#: Bytes of one JSON document of a feed, and characters of a message that are told on.
MAX_DOCUMENT_BYTES: Final = 4_194_304
_DETAIL_CHARS: Final = 1000
_ISSUER_CHARS: Final = 500
_FAILED: Final = {"Failed": "failed", "Denied": "denied", "InvalidRequest": "failed"}
_DEAD_STATES: Final = ("errored", "invalid", "expired")
#: Reads the chain at a path of certmagic's storage; ``None``: there is none, or no storage is known.
Chains = Callable[[str], str | None]
_REVISION: Final = "cert-manager.io/certificate-revision"
_LEAF: Final = re.compile(r"-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----")
_PEM: Final = re.compile(r"-----BEGIN [^-]*-----.*?(?:-----END [^-]*-----|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Happening:
    """One thing that happened to the certificate of one name."""

    pair: str
    hostname: str
    uid: str
    kind: str
    revision: int
    occurred_at: str | None = None
    certificate: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, str] | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Known:
    """What was told already: marks by object, and the number of the last event."""

    marks: dict[str, str] = field(default_factory=dict)
    revisions: dict[str, int] = field(default_factory=dict)
    sequence: int = 0
    #: By the uid of a Certificate: the revision that was requested last, and facts of what was issued for it.
    issued: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)

    def new(self, key: str, mark: str) -> bool:
        """Whether ``mark`` is another one than was known of ``key``; it is known then."""
        if self.marks.get(key) == mark:
            return False
        self.marks[key] = mark
        return True


def documents(buffer: str) -> tuple[list[Any], str]:
    """The whole JSON documents at the beginning of a stream (one a line, or laid out as kubectl does), and the rest.

    Raises ``ValueError`` for what is no JSON, or has no end.
    """
    found: list[Any] = []
    at, decoder = 0, json.JSONDecoder()
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n":
            at += 1
        if at == len(buffer):
            return found, ""
        if buffer[at] not in "{[":
            raise ValueError(f"the feed is not JSON: {buffer[at : at + 40]!r}")
        try:
            document, at = decoder.raw_decode(buffer, at)
        except json.JSONDecodeError:
            if len(buffer) - at > MAX_DOCUMENT_BYTES:
                raise ValueError("a document of the feed has no end") from None
            return found, buffer[at:]
        found.append(document)


def read(document: Any, known: Known, chains: Chains = lambda _: None) -> Iterator[Happening]:
    """What a document of a feed tells that is new. Documents that tell of nothing here are passed over."""
    if not isinstance(document, dict):
        return
    if isinstance(document.get("object"), dict) and "type" in document:  # kubectl --output-watch-events
        if document["type"] in ("DELETED", "BOOKMARK", "ERROR"):
            return
        document = document["object"]
    kind = document.get("kind")
    if kind in ("List", "CertificateList", "CertificateRequestList", "OrderList", "ChallengeList"):
        for item in document.get("items") or ():
            yield from read(item, known)
    elif kind in _KINDS:
        yield from _KINDS[kind](document, known)
    elif "name" in document and str(document["name"]) in _CERTMAGIC:
        yield from _certmagic(document, known, chains)


def facts_of(chain: str) -> dict[str, str]:
    """What the first certificate of a PEM chain says of itself, as an event tells it; nothing for what is none."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    found = _LEAF.search(chain)
    try:
        leaf = x509.load_pem_x509_certificate(found[0].encode()) if found else None
    except ValueError:
        leaf = None
    if leaf is None:
        return {}
    return {
        "serial": f"{leaf.serial_number:x}", "fingerprintSha256": leaf.fingerprint(hashes.SHA256()).hex(),
        "issuer": leaf.issuer.rfc4514_string()[:_ISSUER_CHARS], "notBefore": leaf.not_valid_before_utc.isoformat(),
        "notAfter": leaf.not_valid_after_utc.isoformat(),
    }  # fmt: skip


# -- cert-manager --------------------------------------------------------------------------------------------------------


def _certificate(document: Mapping[str, Any], known: Known) -> Iterator[Happening]:
    status, spec = document.get("status") or {}, document.get("spec") or {}
    uid = str((document.get("metadata") or {}).get("uid", ""))
    revision = int(status.get("revision") or 0)
    names = list(dict.fromkeys([*(spec.get("dnsNames") or ()), *filter(None, [spec.get("commonName")])]))
    conditions = {each.get("type"): each for each in status.get("conditions") or ()}
    ready, issuing = conditions.get("Ready") or {}, conditions.get("Issuing") or {}
    if ready.get("status") == "True" and revision > 0 and known.new(f"{uid}/ready", str(revision)):
        facts = {"notBefore": status.get("notBefore"), "notAfter": status.get("notAfter")}
        facts["renewsAt"] = status.get("renewalTime")
        requested, issued = known.issued.get(uid, (0, {}))
        facts = {**(issued if requested == revision else {}), **{name: value for name, value in facts.items() if value}}
        for pair in ("renewal.succeeded" if revision > 1 else "issuance.succeeded", "deployment.succeeded"):
            for name in names:
                yield _made(document, pair, name, revision, ready.get("lastTransitionTime"), facts)
    action = _FAILED.get(str(issuing.get("reason")))
    mark = f"{issuing.get('reason')}/{issuing.get('lastTransitionTime')}"
    if issuing.get("status") == "False" and action and known.new(f"{uid}/issuing", mark):
        error = _error(str(issuing.get("reason")), issuing.get("message"))
        # A renewal is failed and never denied: the table has no such pair.
        pair = "renewal.failed" if revision > 0 else f"issuance.{action}"
        for name in names:
            yield _made(document, pair, name, revision + 1, issuing.get("lastTransitionTime"), {}, error)


def _request(document: Mapping[str, Any], known: Known) -> Iterator[Happening]:
    """Tells of nothing by itself: the certificate is not in use before its Certificate is ready with that revision."""
    about, text = document.get("metadata") or {}, (document.get("status") or {}).get("certificate")
    owner = next(
        (str(each.get("uid")) for each in about.get("ownerReferences") or () if each.get("kind") == "Certificate"), ""
    )
    if not owner or not isinstance(text, str):
        return
    revision = _revision(document)
    try:
        facts = facts_of(base64.b64decode(text, validate=True).decode("ascii"))
    except (binascii.Error, UnicodeDecodeError):
        return
    if facts and revision >= known.issued.get(owner, (0, {}))[0]:
        known.issued[owner] = (revision, facts)
    yield from ()


def _order(document: Mapping[str, Any], known: Known) -> Iterator[Happening]:
    status = document.get("status") or {}
    state = status.get("state")
    uid = str((document.get("metadata") or {}).get("uid", ""))
    if state in _DEAD_STATES and known.new(f"{uid}/order", str(state)):
        error = _error(f"order_{state}", status.get("reason"))
        for name in (document.get("spec") or {}).get("dnsNames") or ():
            yield _made(
                document, "issuance.failed", str(name), _revision(document), status.get("failureTime"), {}, error
            )


def _challenge(document: Mapping[str, Any], known: Known) -> Iterator[Happening]:
    status, spec = document.get("status") or {}, document.get("spec") or {}
    state, name = status.get("state"), str(spec.get("dnsName", ""))
    uid = str((document.get("metadata") or {}).get("uid", ""))
    if spec.get("wildcard"):
        name = f"*.{name}"
    if state in ("valid", *_DEAD_STATES) and known.new(f"{uid}/challenge", str(state)):
        if state == "valid":
            yield _made(document, "validation.succeeded", name, _revision(document), None, {})
        else:
            error = _error(f"challenge_{state}", status.get("reason"))
            yield _made(document, "validation.failed", name, _revision(document), None, {}, error)


_KINDS: Final = {
    "Certificate": _certificate, "CertificateRequest": _request, "Order": _order, "Challenge": _challenge,
}  # fmt: skip


def _revision(document: Mapping[str, Any]) -> int:
    """The certificate's revision that an order is for, where cert-manager says so."""
    notes = (document.get("metadata") or {}).get("annotations") or {}
    text = str(notes.get(_REVISION, "1"))
    return int(text) if text.isdigit() and len(text) < 10 else 1


def _made(
    document: Mapping[str, Any], pair: str, name: str, revision: int, at: Any, facts: Mapping[str, Any],
    error: Mapping[str, str] | None = None,
) -> Happening:  # fmt: skip
    about = document.get("metadata") or {}
    provenance = {
        "producer": "cert-manager", "namespace": about.get("namespace"), "name": about.get("name"),
        "resourceVersion": about.get("resourceVersion"),
        "issuerRef": ((document.get("spec") or {}).get("issuerRef") or {}).get("name"),
    }  # fmt: skip
    return Happening(
        pair, name.lower(), f"{about.get('uid')}/{name.lower()}", str(document.get("kind")), revision,
        str(at) if at else None, {key: value for key, value in facts.items() if value}, error,
        {key: str(value) for key, value in provenance.items() if value},
    )  # fmt: skip


def _error(code: str, text: Any) -> dict[str, str]:
    """Without anything that looks like a key: it must not leave here, and would be refused there."""
    detail = _PEM.sub("[removed]", str(text or "")).replace("PRIVATE KEY", "private key")
    return {"code": code, "detail": detail[:_DETAIL_CHARS]}


# -- certmagic -----------------------------------------------------------------------------------------------------------

_CERTMAGIC: Final = ("cert_obtaining", "cert_obtained", "cert_failed", "cert_ocsp_revoked", "cached_managed_cert")


def _certmagic(document: Mapping[str, Any], known: Known, chains: Chains) -> Iterator[Happening]:
    data = document.get("data")
    if not isinstance(data, dict):
        return
    what = str(document["name"])
    if what == "cached_managed_cert":  # loaded, at a start too, and told of once
        names = data.get("sans")
        for each in names if isinstance(names, list) else ():
            yield from _in_use(document, known, str(each).lower(), {})
        return
    name = str(data.get("identifier", "")).lower()
    if not name:
        return
    before = known.revisions.get(name, 0)
    renewal = bool(data.get("renewal", before > 0))
    revision, facts, error = before + 1, {}, None
    if what == "cert_obtained":
        known.revisions[name] = revision
        pair = "renewal.succeeded" if renewal else "issuance.succeeded"
        facts = facts_of(chains(str(data.get("certificate_path", ""))) or "")
    elif what == "cert_obtaining":
        pair = "renewal.started" if renewal else "issuance.requested"
    elif what == "cert_failed":
        pair = "renewal.failed" if renewal else "issuance.failed"
        error = _error("certmagic_failed", data.get("error"))
    else:
        pair, revision = "revocation.succeeded", max(before, 1)
    yield _by_certmagic(document, pair, name, revision, facts, error)
    if what == "cert_obtained":
        yield from _in_use(document, known, name, facts)


def _in_use(document: Mapping[str, Any], known: Known, name: str, facts: Mapping[str, str]) -> Iterator[Happening]:
    revision = max(known.revisions.get(name, 0), 1)
    if known.new(f"certmagic/{name}/deployed", str(revision)):
        yield _by_certmagic(document, "deployment.succeeded", name, revision, facts)


def _by_certmagic(
    document: Mapping[str, Any], pair: str, name: str, revision: int, facts: Mapping[str, str],
    error: Mapping[str, str] | None = None,
) -> Happening:  # fmt: skip
    issuer = (document.get("data") or {}).get("issuer")
    uid = str(document.get("id") or f"{name}/{revision}")
    return Happening(
        pair, name, f"certmagic/{uid}", "certmagic", revision, document.get("timestamp"), facts, error,
        {"producer": "certmagic"} | ({"issuerRef": str(issuer)} if issuer else {}),
    )  # fmt: skip


# -- as bodies -----------------------------------------------------------------------------------------------------------


def body(
    happening: Happening, event: str, source: str, cluster: str, environment: str, sequence: int, now: str
) -> bytes:
    """The body of an event."""
    name, _, action = happening.pair.partition(".")
    document: dict[str, Any] = {
        "specVersion": "1", "eventId": event, "sourceId": source, "clusterId": cluster, "environment": environment,
        "sequence": sequence, "occurredAt": happening.occurred_at or now, "callbackClass": name, "callbackAction": action,
        "subject": {"hostname": happening.hostname},
        "provenance": {
            **happening.provenance, "objectUid": happening.uid, "objectKind": happening.kind, "revision": happening.revision,
        },
    }  # fmt: skip
    if happening.certificate:
        document["certificate"] = dict(happening.certificate)
    if happening.error:
        document["error"] = dict(happening.error)
    return json.dumps(document, separators=(",", ":")).encode()
