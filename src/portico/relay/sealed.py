"""One version of a certificate as relays get and keep it: sealed, and what has to be true before anything is served with it.

    stream   domain, version, fingerprint ─┐
    manifest signed by the worker ─────────┼─► all agree ─► a wrap of this region opens the data key ─► the private key
    chain, sealed key ─────────────────────┘                               └─► it is the leaf's, and OpenSSL takes both

Nothing but the region's key opens it, so it is kept on disk as it came. The opened key is not kept anywhere: ``ssl`` gets it by
memfd when a context is made, and it is opened again for the next one.

All of that was true of a copy on disk when it was written, and takes two thirds of a millisecond to see again. So a copy has a
mark of this relay's (a MAC under its region's key, over everything that it says and whom the relay trusted): with it, taking up
ten thousand costs a second or two; without it, or where anything is different by now, all is looked at as if it had just come.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import hmac
import json
import ssl
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from portico.kit import envelope
from portico.kit.envelope import Binding, EnvelopeInvalid, Keys, Manifest, Opener, Wrap
from portico.kit.jwt import KeySet
from portico.relay import certificates
from portico.relay.certificates import Certificate, CertificateInvalid
from portico.relay.edge_rows import CertificateRef

#: Bytes of a chain and of a sealed key, far above any that a CA issues.
CHAIN_MAX: Final = 262_144
SEALED_MAX: Final = 65_536
#: Wraps of one region: a key, and its successor while it rotates.
WRAPS_MAX: Final = 16
_NAMES: Final = ("names", "parents", "addresses")


class Unusable(ValueError):
    """A version that nothing may be served with here. The text says why, for the operator; it holds no secret."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What ``POST /v1/edge/certificates`` answers for one version, checked for its shape alone."""

    certificate: str
    domain: str
    version: int
    manifest: str
    chain: bytes = field(repr=False)
    sealed: bytes = field(repr=False)
    wraps: tuple[tuple[str, bytes], ...] = field(repr=False)

    def encode(self) -> dict[str, Any]:
        """As it came, for the copy on disk."""
        wraps = [{"key_id": name, "wrapped": base64.b64encode(wrapped).decode()} for name, wrapped in self.wraps]
        return {
            "certificate": self.certificate,
            "domain": self.domain,
            "version": self.version,
            "manifest": self.manifest,
            "chain": self.chain.decode("ascii"),
            "sealed": base64.b64encode(self.sealed).decode(),
            "wraps": wraps,
        }


def parse(value: Any) -> Bundle:
    """Of decoded JSON. Raises :class:`Unusable`."""
    try:
        wraps = value["wraps"]
        if not isinstance(wraps, list) or len(wraps) > WRAPS_MAX or type(value["version"]) is not int:
            raise TypeError
        found = Bundle(
            certificate=_text(value["certificate"]),
            domain=_text(value["domain"]),
            version=value["version"],
            manifest=_text(value["manifest"]),
            chain=_text(value["chain"]).encode("ascii"),
            sealed=base64.b64decode(_text(value["sealed"]), validate=True),
            wraps=tuple((_text(w["key_id"]), base64.b64decode(_text(w["wrapped"]), validate=True)) for w in wraps),
        )
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise Unusable("it is not of the form that certificates have") from None
    if len(found.chain) > CHAIN_MAX or len(found.sealed) > SEALED_MAX:
        raise Unusable("it is too large")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


@dataclass(frozen=True, slots=True)
class Held:
    """A version that was opened and checked once and can be served with. ``hostname``: the domain's, of the manifest."""

    bundle: Bundle = field(repr=False)
    certificate: Certificate
    hostname: str

    @property
    def id(self) -> str:
        return self.bundle.certificate

    @property
    def version(self) -> int:
        return self.bundle.version

    @property
    def ref(self) -> CertificateRef:
        return CertificateRef(self.bundle.certificate, self.bundle.version, self.certificate.fingerprint)


@dataclass(frozen=True, slots=True)
class Trust:
    """What this relay believes, and can open: its configuration's, never anything that came over the network."""

    region: str
    signers: KeySet
    opener: Opener

    def hold(self, bundle: Bundle, *, now: dt.datetime, load: bool) -> Held:
        """Check all of it and open it. ``load``: also parse the key and make a context, which a copy on disk that was held before
        does without. Raises :class:`Unusable`. Takes a millisecond or (with an RSA key) tens: for a thread."""
        try:
            manifest = self._manifest(bundle)
            certificate = _certificate(bundle, manifest)
            if certificate.not_after <= now:
                raise Unusable(f"it ended at {certificate.not_after:%Y-%m-%d %H:%M} UTC")
            material = self._open(bundle, manifest.binding)
            if load:
                _try(material)
        except (EnvelopeInvalid, CertificateInvalid) as err:
            raise Unusable(str(err)) from None
        return self._held(bundle, certificate, manifest.binding)

    def _held(self, bundle: Bundle, certificate: Certificate, binding: Binding) -> Held:
        return Held(bundle, replace(certificate, opened=lambda: self._again(bundle, binding)), binding.hostname)

    def keep(self, held: Held) -> dict[str, Any]:
        """For the copy on disk: as it came, what its certificate says, and the mark (which a KMS does not make)."""
        found, certificate = held.bundle.encode(), held.certificate
        if not isinstance(self.opener, Keys):
            return found
        found["facts"] = {
            "hostname": held.hostname,
            "fingerprint": certificate.fingerprint,
            "not_before": int(certificate.not_before.timestamp()),
            "not_after": int(certificate.not_after.timestamp()),
            **{name: sorted(each.decode() for each in getattr(certificate, name)) for name in _NAMES},
        }
        return found | {"mark": self.opener.mark(self._marked(found)).hex()}

    def recall(self, value: Any, *, now: dt.datetime) -> Held | None:
        """What :meth:`keep` wrote; ``None`` for what has no mark of it, or has ended: :meth:`hold` says what is wrong."""
        mark = value.get("mark") if isinstance(value, dict) else None
        if not isinstance(mark, str) or not mark.isascii() or not isinstance(self.opener, Keys):
            return None
        kept = {name: each for name, each in value.items() if name != "mark"}
        if not hmac.compare_digest(self.opener.mark(self._marked(kept)).hex(), mark):
            return None
        bundle, facts = parse(kept), kept["facts"]
        names, parents, addresses = (frozenset(each.encode() for each in facts[name]) for name in _NAMES)
        from_, until = (dt.datetime.fromtimestamp(facts[name], dt.UTC) for name in ("not_before", "not_after"))
        certificate = Certificate(b"", names, parents, addresses, from_, until, facts["fingerprint"])
        if certificate.not_after <= now:
            return None
        binding = Binding(bundle.certificate, bundle.version, facts["hostname"], certificate.fingerprint)
        return self._held(bundle, certificate, binding)

    def _marked(self, kept: dict[str, Any]) -> bytes:
        """What a mark is over: the copy, and what made it believable."""
        return json.dumps([self.region, sorted(self.signers), kept], separators=(",", ":"), sort_keys=True).encode()

    def _manifest(self, bundle: Bundle) -> Manifest:
        manifest = envelope.verify(bundle.manifest, self.signers)
        said = (manifest.certificate, manifest.domain, manifest.version)
        if said != (bundle.certificate, bundle.domain, bundle.version):
            raise Unusable("the manifest is of another certificate, domain or version")
        if manifest.chain != envelope.digest(bundle.chain) or manifest.sealed != envelope.digest(bundle.sealed):
            raise Unusable("chain or key are not those of the manifest")
        return manifest

    def _open(self, bundle: Bundle, binding: Binding) -> bytes:
        """Private key and chain, PEM."""
        wraps = (Wrap(self.region, name, wrapped) for name, wrapped in bundle.wraps)
        data_key = envelope.unwrap(wraps, binding, self.region, self.opener)
        return envelope.open_sealed(bundle.sealed, data_key, binding) + b"\n" + bundle.chain

    def _again(self, bundle: Bundle, binding: Binding) -> bytes:
        try:
            return self._open(bundle, binding)
        except EnvelopeInvalid as err:  # a KMS that does not answer, say
            raise ssl.SSLError(str(err)) from None


def _certificate(bundle: Bundle, manifest: Manifest) -> Certificate:
    try:
        leaf = x509.load_pem_x509_certificates(bundle.chain)[0]
    except ValueError:
        raise Unusable("the chain cannot be read") from None
    if leaf.fingerprint(hashes.SHA256()).hex() != manifest.fingerprint:
        raise Unusable("the certificate is not that of the manifest")
    found = certificates.describe(leaf, b"")
    if not found.covers(manifest.hostname.encode("ascii", "replace")):
        raise Unusable("the certificate is not for the host name of the manifest")
    return found


def _try(material: bytes) -> None:
    """As it will be served: the key is the leaf's and of a kind that is served with, and OpenSSL takes both."""
    made = certificates.read(material)
    try:
        certificates.server_context(made)
    except ssl.SSLError as err:
        raise Unusable(f"TLS cannot be spoken with it ({err.reason or 'OpenSSL refuses it'})") from None
