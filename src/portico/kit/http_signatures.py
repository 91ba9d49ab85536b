"""HTTP Message Signatures (RFC 9421) and Digest Fields (RFC 9530), as far as one request with one signature needs them.

    Content-Digest: sha-256=:…:
    Signature-Input: sig=("@method" "@authority" "@path" "content-digest" "content-type");created=…;keyid="…";tag="…"
    Signature: sig=:…:

Strict where the RFC leaves a choice: what is not in the canonical form of structured fields (RFC 8941, section 4.1) is
refused, so that the text which was signed is the text that is there; components have no parameters; a field that is covered
is there once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

#: Characters of each of the two fields, and components that one signature covers.
FIELD_CHARS: Final = 4096
MAX_COMPONENTS: Final = 20
_DIGESTS: Final = {"sha-256": hashlib.sha256, "sha-512": hashlib.sha512}
_DERIVED: Final = ("@method", "@authority", "@path")

_KEY = r"[a-z*][a-z0-9_\-.*]{0,63}"
_STRING = r'"[\x20-\x21\x23-\x5b\x5d-\x7e]{0,512}"'  # without escapes: nothing that we take needs one
_BYTES = r":[A-Za-z0-9+/=]{1,1024}:"
_NUMBER = r"-?[0-9]{1,15}"
_PARAMETERS = rf"(?:;{_KEY}=(?:{_STRING}|{_NUMBER}))*"
_INPUT = re.compile(rf"({_KEY})=\(({_STRING}(?: {_STRING})*)?\)({_PARAMETERS})")
_SIGNATURE = re.compile(rf"({_KEY})=({_BYTES})")
_PARAMETER = re.compile(rf";({_KEY})=({_STRING}|{_NUMBER})")
_MEMBER = re.compile(rf"({_KEY})=({_BYTES})(?:, ?|$)")
_FIELD_NAME = re.compile(r"[a-z0-9!#$%&'*+\-.^_`|~]+")


@dataclass(frozen=True, slots=True)
class Target:
    """The request line and the host, as they are signed: ``authority`` in lower case, without the port of its scheme."""

    method: str
    authority: str
    path: str

    def component(self, name: str) -> str:
        return {"@method": self.method, "@authority": self.authority, "@path": self.path or "/"}[name]


@dataclass(frozen=True, slots=True)
class SignatureInput:
    """What one signature covers, and its parameters in order."""

    label: str
    components: tuple[str, ...]
    parameters: tuple[tuple[str, str | int], ...]

    def __getitem__(self, name: str) -> str | int | None:
        return dict(self.parameters).get(name)

    def number(self, name: str) -> int | None:
        """A parameter that is a whole number."""
        found = self[name]
        return found if isinstance(found, int) else None

    def text(self, name: str) -> str | None:
        """A parameter that is a string."""
        found = self[name]
        return found if isinstance(found, str) else None

    @property
    def value(self) -> str:
        """The member's value in canonical form: what ``@signature-params`` says."""
        inner = " ".join(f'"{name}"' for name in self.components)
        shown = "".join(f';{name}="{v}"' if isinstance(v, str) else f";{name}={v}" for name, v in self.parameters)
        return f"({inner}){shown}"


def read_input(field: str) -> SignatureInput:
    """The one member of a Signature-Input field. Raises ``ValueError`` for several, and for what is not canonical."""
    match = _INPUT.fullmatch(field) if len(field) <= FIELD_CHARS else None
    if match is None:
        raise ValueError("Signature-Input is not one signature in canonical form")
    components = tuple(text[1:-1] for text in re.findall(_STRING, match[2] or ""))
    parameters = tuple(
        (name, value[1:-1] if value.startswith('"') else int(value)) for name, value in _PARAMETER.findall(match[3])
    )
    found = SignatureInput(match[1], components, parameters)
    if len(set(components)) != len(components) or len(components) > MAX_COMPONENTS:
        raise ValueError("a component is covered twice, or there are too many")
    if len(dict(parameters)) != len(parameters) or f"{found.label}={found.value}" != field:
        raise ValueError("Signature-Input is not in canonical form")
    return found


def read_signature(field: str, label: str) -> bytes:
    """The signature of that label. Raises ``ValueError``."""
    match = _SIGNATURE.fullmatch(field) if len(field) <= FIELD_CHARS else None
    if match is None or match[1] != label:
        raise ValueError("Signature is not the one that Signature-Input tells of")
    return _decoded(match[2])


def base(found: SignatureInput, target: Target, fields: Mapping[str, str]) -> bytes:
    """What is signed (section 2.5). ``fields`` by lower-case name, each once. Raises ``ValueError`` for one that is not there."""
    lines = []
    for name in found.components:
        if name in _DERIVED:
            value = target.component(name)
        elif _FIELD_NAME.fullmatch(name) and name in fields:
            value = fields[name].strip()
        else:
            raise ValueError(f"the component {name} is not there")
        if "\n" in value or "\r" in value:
            raise ValueError("a field has more than one line")
        lines.append(f'"{name}": {value}')
    lines.append(f'"@signature-params": {found.value}')
    return "\n".join(lines).encode()


def digest(body: bytes) -> str:
    """``Content-Digest`` of a body."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def digest_fits(field: str, body: bytes) -> bool:
    """Whether every digest in the field that we know is that of the body, and we know one."""
    known, at = 0, 0
    while at < len(field) and len(field) <= FIELD_CHARS:
        match = _MEMBER.match(field, at)
        if match is None:
            return False
        at = match.end()
        if (algorithm := _DIGESTS.get(match[1])) is None:
            continue
        known += 1
        try:
            if not hmac.compare_digest(algorithm(body).digest(), _decoded(match[2])):
                return False
        except ValueError:
            return False
    return known > 0


def authority(host: str) -> str:
    """A Host field as ``@authority`` has it (section 2.2.3)."""
    host = host.strip().lower()
    name, _, port = host.rpartition(":")
    return name if name and port in ("80", "443") else host


def headers(
    label: str,
    components: Sequence[str],
    parameters: Sequence[tuple[str, str | int]],
    target: Target,
    fields: Mapping[str, str],
) -> tuple[SignatureInput, bytes]:
    """For a sender: the input to announce and the bytes to sign."""
    made = SignatureInput(label, tuple(components), tuple(parameters))
    return made, base(made, target, fields)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text[1:-1], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None
