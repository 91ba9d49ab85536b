"""Certificates as the certificate worker seals them, made here without a database; and a control plane that hands them out."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from portico.kit import envelope, keyfiles
from portico.kit.envelope import Binding, Keys, Manifest
from portico.kit.jwt import KeySet, SigningKey
from portico.relay.certificates import Certificate
from portico.relay.sealed import Trust
from tests.relay.authorities import certificate, parts
from tests.relay.edge_api import Answer, EdgeApi

SIGNER = SigningKey.generate()
REGION_KEY = X25519PrivateKey.generate()
TRUST = Trust("eu", KeySet.of([SIGNER]), Keys([REGION_KEY]))


@dataclass
class Sealed:
    """A version: what it is, and what the control plane answers for it."""

    made: Certificate
    manifest: Manifest
    bundle: dict[str, Any]

    @property
    def ref(self) -> dict[str, Any]:
        """As the stream names it."""
        return {
            "id": self.manifest.certificate,
            "version": self.manifest.version,
            "fingerprint": self.manifest.fingerprint,
        }

    def key_pem(self) -> bytes:
        return parts(self.made)[1]


def sealed(
    hostname: str = "app.example.com",
    version: int = 1,
    *,
    domain: str = "dom_1",
    region: str = "eu",
    public: Any = None,
    signer: SigningKey = SIGNER,
    made: Certificate | None = None,
    key: bytes | None = None,
    spoilt: dict[str, Any] | None = None,
) -> Sealed:
    """``spoilt``: members of the manifest that differ from what is true; ``key``: another private key than the certificate's."""
    made = made or certificate(hostname)
    chain, own = parts(made)
    spoilt = spoilt or {}
    said = Manifest(
        domain=domain,
        certificate=f"crt_{domain}_{version}",
        version=version,
        hostname=hostname,
        fingerprint=made.fingerprint,
        chain=envelope.digest(chain),
        sealed="",
        not_before=int(made.not_before.timestamp()),
        not_after=int(made.not_after.timestamp()),
    )
    said = replace(said, **{name: value for name, value in spoilt.items() if name != "sealed"})
    binding = Binding(said.certificate, said.version, said.hostname, said.fingerprint)
    box = envelope.seal(own if key is None else key, binding)
    said = replace(said, sealed=spoilt.get("sealed", envelope.digest(box.content)))
    wrap = envelope.wrap(box.data_key, binding, region, public or REGION_KEY.public_key())
    bundle = {
        "certificate": said.certificate,
        "domain": domain,
        "version": version,
        "manifest": said.sign(signer),
        "chain": chain.decode(),
        "sealed": base64.b64encode(box.content).decode(),
        "wraps": [{"key_id": wrap.key_id, "wrapped": base64.b64encode(wrap.wrapped).decode()}],
    }
    return Sealed(made, said, bundle)


def row(active: Sealed | None = None, staged: Sealed | None = None) -> dict[str, Any]:
    """The row of a domain in the stream."""
    one = staged or active
    assert one is not None
    found: dict[str, Any] = {"domain": one.manifest.domain, "hostname": one.manifest.hostname}
    found |= {"active": active.ref} if active is not None else {}
    return found | ({"staged": staged.ref} if staged is not None else {})


def change(active: Sealed | None = None, staged: Sealed | None = None) -> dict[str, Any]:
    return {"kind": "certificate", "certificate": row(active, staged)}


def key_files(folder: Path) -> dict[str, Any]:
    """Settings of a relay that can open what is sealed here."""
    path = folder / "region.key"
    path.write_text(keyfiles._pem(REGION_KEY))
    path.chmod(0o600)
    return {"region": "eu", "region_key_files": (path,), "certificate_signers": (SIGNER.public_jwk()["x"],)}


@dataclass
class Store:
    """What the control plane has, and what it was told."""

    bundles: dict[str, dict[str, Any]] = field(default_factory=dict)
    acks: list[dict[str, Any]] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)
    down: bool = False

    def add(self, *versions: Sealed) -> None:
        for each in versions:
            self.bundles[each.manifest.certificate] = each.bundle

    def last(self, version: Sealed) -> dict[str, Any] | None:
        """What was last said of a version."""
        said = [ack for ack in self.acks if ack["certificate"] == version.manifest.certificate]
        return said[-1] if said else None

    def answer(self, path: str, message: dict[str, Any]) -> Answer:
        if self.down:
            return 503, b'{"code":"service.unavailable","detail":"away"}'
        if path == "/v1/edge/acks":
            self.acks += message["certificates"]
            return 200, b'{"ok":true}'
        self.asked.append(message["certificates"])
        given = [self.bundles[id] for id in message["certificates"] if id in self.bundles]
        return 200, json.dumps({"data": given}).encode()


def attach(api: EdgeApi) -> Store:
    """Let the small API answer about certificates."""
    store = Store()
    api.on_certificates = store.answer
    return store
