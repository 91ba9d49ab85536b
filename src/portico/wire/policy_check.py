"""What a policy document may hold: every key is checked here, and every fault found at once, with its path.

    document (written or stored) ──check──► canonical form (defaults left out, addresses and names in one spelling)
                                  └───────► faults: (path, message), such as ``addresses.rules[2].allow``

A key that is not known is a fault: a policy that silently protects nothing is worse than an error. A new key is added
here, to :mod:`portico.wire.policy`, to ``contracts/policy.schema.json`` and to the relay's decision chain together;
``version`` changes only when the meaning of an existing key would.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from portico.kit.paths import item, member

VERSION: Final = 1
MAX_FAULTS: Final = 50  # more help nobody, and a document of faults alone must not make a long answer
MAX_POLICY_BYTES: Final = 8192  # of canonical JSON: it travels in a grant, in one BIND frame
MAX_CONCURRENCY: Final = 100_000
MAX_QUEUE_REQUESTS: Final = 1000
MAX_QUEUE_SECONDS: Final = 30.0
MAX_USERS: Final = 20
MAX_REALM_CHARS: Final = 64
MAX_USER_CHARS: Final = 64
MAX_PASSWORD_CHARS: Final = 128
MAX_ADDRESS_RULES: Final = 100
MAX_HEADER_RULES: Final = 50  # of one direction
MAX_HEADER_NAME_CHARS: Final = 64
MAX_HEADER_VALUE_CHARS: Final = 1024
MAX_CA_CERTIFICATES: Final = 8
MAX_RATE_REQUESTS: Final = 1_000_000
MAX_RATE_SECONDS: Final = 86_400.0
MAX_BURST: Final = 1_000_000
DEFAULT_REALM: Final = "Portico"
# Of a digest that was made elsewhere: what verifying it once may cost a relay.
MAX_ARGON2_KIB: Final = 65_536
MAX_ARGON2_PASSES: Final = 4
MAX_ARGON2_LANES: Final = 8

#: What a tunnel of each protocol can enforce; a relay never sees requests inside a TCP or passthrough connection.
PROTOCOL_KEYS: Final[Mapping[str, frozenset[str]]] = {
    "tcp": frozenset(("version", "concurrency", "addresses", "rate_limits")),
    "tls": frozenset(("version", "concurrency", "addresses", "rate_limits")),
}
PLAIN_HTTP: Final = ("allow", "refuse", "redirect")
HOST_KEPT: Final = "preserve"
HOST_OF_TARGET: Final = "rewrite"

#: Headers that frame a message, belong to one connection, or that the relay sets from what it saw.
PROTECTED_HEADERS: Final = frozenset((
    "connection", "content-length", "expect", "forwarded", "host", "http2-settings", "keep-alive", "portico-error",
    "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
    "x-request-id",
))  # fmt: skip
PROTECTED_PREFIX: Final = "x-forwarded-"

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_HOST = re.compile(
    r"(?=.{1,255}\Z)(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?)(:[0-9]{1,5})?"
)
_PREFIX = re.compile(r"[0-9a-fA-F.:]+(/[0-9]{1,3})?")
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_ARGON2 = re.compile(
    r"\$argon2id\$v=19\$m=([1-9][0-9]{0,6}),t=([1-9][0-9]{0,2}),p=([1-9][0-9]{0,2})\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{22,86})"
)
_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----([^-]*)-----END ([A-Z0-9 ]+)-----")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a policy. ``path`` is the key's, empty for the document as a whole."""

    path: str
    message: str


class PolicyInvalid(ValueError):
    """A policy that cannot be used; ``faults`` are all of them, in the order of the document."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__(
            "; ".join(f"{fault.path}: {fault.message}" if fault.path else fault.message for fault in faults)
        )


def check(document: object) -> tuple[dict[str, Any], list[Fault]]:
    """The canonical form of ``document`` and what is wrong with it; the form holds only if nothing is."""
    walk = _Walk()
    clean = _document(walk, document)
    return clean, walk.faults


def check_protocol(document: Mapping[str, Any], protocol: str) -> list[Fault]:
    """A fault for each key that a tunnel of this protocol cannot enforce."""
    known = PROTOCOL_KEYS.get(protocol)
    if known is None:
        return []
    return [
        Fault(key, f"a {protocol} tunnel cannot enforce it: its relay does not see requests; leave it out")
        for key in document
        if key not in known
    ]


def network(text: str) -> Network:
    """The network that ``text`` names, a mapped IPv6 one as IPv4; raises ``ValueError`` with a sentence."""
    if not _PREFIX.fullmatch(text):
        raise ValueError(f"{_shown(text)} is not an address or network such as 10.0.0.0/8 or 2001:db8::/32")
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{_shown(text)} is not an address or network such as 10.0.0.0/8 or 2001:db8::/32") from None
    if "/" in text and found.network_address != ipaddress.ip_address(text.partition("/")[0]):
        raise ValueError(f"{_shown(text)} has bits set beyond its prefix; the network is {found}")
    if isinstance(found, ipaddress.IPv6Network) and found.subnet_of(_MAPPED):
        return ipaddress.IPv4Network((int(found.network_address) & 0xFFFF_FFFF, found.prefixlen - 96))
    return found


def header_name(text: object) -> str:
    """A header name that a policy may touch, as written; raises ``ValueError`` with a sentence."""
    if not isinstance(text, str) or not _TOKEN.fullmatch(text):
        raise ValueError(f"{_shown(text)} is not a header name")
    if len(text) > MAX_HEADER_NAME_CHARS:
        raise ValueError(f"a header name has at most {MAX_HEADER_NAME_CHARS} characters")
    if text.lower() in PROTECTED_HEADERS or text.lower().startswith(PROTECTED_PREFIX):
        raise ValueError(f"{text} frames the message or is set by the relay; a policy cannot change it")
    return text


def header_value(text: object) -> str:
    """A header value: printable ASCII without outer spaces; raises ``ValueError`` with a sentence."""
    if not isinstance(text, str):
        raise ValueError("must be text; write it in quotes")
    if len(text) > MAX_HEADER_VALUE_CHARS:
        raise ValueError(f"has {len(text)} characters; at most {MAX_HEADER_VALUE_CHARS}")
    if not text.isascii() or not text.isprintable() or text != text.strip():
        raise ValueError("must be printable ASCII without control characters or outer spaces")
    return text


def _shown(value: object) -> str:
    """A short name of any value. Never its whole text: that of a deep list needs as deep a stack."""
    if isinstance(value, str):
        return ascii(value[:80])
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 10**18):
        return "nothing" if value is None else str(value).lower()
    kinds = {"int": "so large a number", "list": "a list", "dict": "a map"}
    return kinds.get(type(value).__name__, "what stands there")


class _Walk:
    """Collects faults; each method checks one kind of value and gives it back, or ``None`` and a fault."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def refuse(self, path: str, message: str) -> None:
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(Fault(path, message))

    def mapping(
        self, path: str, value: object, known: tuple[str, ...], required: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """The known members of a map; unknown and missing ones are faults."""
        if not isinstance(value, Mapping):
            what = f"must be a map with {_listed(known)}"
            self.refuse(path, what if path else f"a policy {what}")
            return {}
        found = {}
        for key, inner in value.items():
            if key in known:
                found[key] = inner
                continue
            near = difflib.get_close_matches(key[:40] if isinstance(key, str) else "", known, 1)
            hint = f"; do you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"
            self.refuse(member(path, key), f"unknown key{hint}")
        for key in required:
            if key not in value:
                self.refuse(path, f"{key} is missing")
        return found

    def items(self, path: str, value: object, most: int) -> list[tuple[str, Any]]:
        """(path, element) of each element of a list."""
        if not isinstance(value, list):
            self.refuse(path, "must be a list")
            return []
        if len(value) > most:
            self.refuse(path, f"has {len(value)} elements; at most {most}")
            return []
        return [(item(path, index), inner) for index, inner in enumerate(value)]

    def whole(self, path: str, value: object, most: int) -> int | None:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON has one kind of number
        if type(value) is not int or not 1 <= value <= most:  # bool is an int to isinstance
            self.refuse(path, f"must be a whole number from 1 to {most}, not {_shown(value)}")
            return None
        return value

    def seconds(self, path: str, value: object, most: float) -> int | float | None:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0.001 <= value <= most:  # NaN is not
            return int(value) if value == int(value) else value
        self.refuse(path, f"must be a number of seconds from 0.001 to {most:g}, not {_shown(value)}")
        return None

    def text(self, path: str, value: object, most: int) -> str | None:
        """Text without control characters, that UTF-8 can carry."""
        if not isinstance(value, str):
            self.refuse(path, "must be text; write it in quotes")  # what stands there may be a password
        elif not 0 < len(value) <= most:
            self.refuse(path, f"must have 1 to {most} characters, not {len(value)}")
        elif any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in value):
            self.refuse(path, "must not hold control characters")
        else:
            return value
        return None

    def choice(self, path: str, value: object, choices: tuple[str, ...]) -> str | None:
        if isinstance(value, str) and value in choices:
            return value
        self.refuse(path, f"must be {_listed(choices)}, not {_shown(value)}")
        return None

    def worded(self, path: str, value: object, read: Callable[[Any], Any]) -> Any:
        """What ``read`` makes of the value; its ``ValueError`` is a fault."""
        try:
            return read(value)
        except ValueError as err:
            self.refuse(path, str(err))
            return None


def _listed(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _document(walk: _Walk, document: object) -> dict[str, Any]:
    clean: dict[str, Any] = {}
    for key, value in walk.mapping("", document, ("version", *_SECTIONS)).items():
        if key == "version":
            if isinstance(value, bool) or value != VERSION:
                walk.refuse("version", f"only version {VERSION} is known, not {_shown(value)}")
            continue
        found = _SECTIONS[key](walk, key, value)
        if found:
            clean[key] = found
    return clean


def _concurrency(walk: _Walk, path: str, value: object) -> int | None:
    return walk.whole(path, value, MAX_CONCURRENCY)


def _queue(walk: _Walk, path: str, value: object) -> dict[str, Any]:
    found = walk.mapping(path, value, ("requests", "seconds"), ("requests", "seconds"))
    if "requests" in found:
        found["requests"] = walk.whole(f"{path}.requests", found["requests"], MAX_QUEUE_REQUESTS)
    if "seconds" in found:
        found["seconds"] = walk.seconds(f"{path}.seconds", found["seconds"], MAX_QUEUE_SECONDS)
    return found


def _plain_http(walk: _Walk, path: str, value: object) -> str | None:
    found = walk.choice(path, value, PLAIN_HTTP)
    return None if found == PLAIN_HTTP[0] else found


def _basic_auth(walk: _Walk, path: str, value: object) -> dict[str, Any]:
    found = walk.mapping(path, value, ("realm", "users"), ("users",))
    clean: dict[str, Any] = {}
    if "realm" in found:
        realm = walk.text(f"{path}.realm", found["realm"], MAX_REALM_CHARS)
        if realm is not None and (not realm.isascii() or '"' in realm or "\\" in realm):
            walk.refuse(f"{path}.realm", "must be ASCII without quotes and backslashes: browsers read no other")
        elif realm != DEFAULT_REALM:
            clean["realm"] = realm
    if "users" in found:
        if found["users"] == []:
            walk.refuse(f"{path}.users", "needs at least one user; to let everybody in, leave basic_auth out")
        users = [_user(walk, at, user) for at, user in walk.items(f"{path}.users", found["users"], MAX_USERS)]
        names: set[str] = set()
        for index, user in enumerate(users):
            name = user.get("name") or ""
            if name in names:
                walk.refuse(f"{path}.users[{index}].name", f"the user {_shown(name)} is there twice")
            names.update([name] if name else [])
        clean["users"] = users
    return clean


def _user(walk: _Walk, path: str, value: object) -> dict[str, Any]:
    """A user as written ({name, password}), as stored ({name, digest}), or as shown ({name}: the digest is kept)."""
    found = walk.mapping(path, value, ("name", "password", "digest"), ("name",))
    clean: dict[str, Any] = {}
    if "name" in found:
        clean["name"] = walk.text(f"{path}.name", found["name"], MAX_USER_CHARS)
        if clean["name"] is not None and ":" in clean["name"]:
            walk.refuse(f"{path}.name", "must not hold a colon: it ends the name where a visitor sends it (RFC 7617)")
    if "password" in found and "digest" in found:
        walk.refuse(path, "give password or digest, not both")
    elif "password" in found:
        clean["password"] = walk.text(f"{path}.password", found["password"], MAX_PASSWORD_CHARS)
    elif "digest" in found:
        clean["digest"] = walk.worded(f"{path}.digest", found["digest"], password_digest)
    return clean


def password_digest(value: object) -> str:
    """An argon2id digest that a relay may verify; raises ``ValueError`` with a sentence."""
    match = _ARGON2.fullmatch(value) if isinstance(value, str) else None
    if match is None or not isinstance(value, str):
        raise ValueError("is not an argon2id digest ($argon2id$v=19$m=…,t=…,p=…$salt$hash); give password instead")
    memory, passes, lanes = (int(part) for part in match.groups()[:3])
    if not 8 * lanes <= memory <= MAX_ARGON2_KIB or passes > MAX_ARGON2_PASSES or lanes > MAX_ARGON2_LANES:
        raise ValueError(
            f"costs too much or too little: at most m={MAX_ARGON2_KIB}, t={MAX_ARGON2_PASSES} and p={MAX_ARGON2_LANES},"
            " and m at least 8 times p"
        )
    if any(len(part) % 4 == 1 for part in match.groups()[3:]):
        raise ValueError("is not an argon2id digest: its salt or hash is not base64")
    return value


def _client_certificates(walk: _Walk, path: str, value: object) -> dict[str, Any]:
    found = walk.mapping(path, value, ("ca",), ("ca",))
    return {"ca": walk.worded(f"{path}.ca", found["ca"], ca_bundle)} if "ca" in found else {}


def ca_bundle(value: object) -> str:
    """Certificates in PEM in one spelling, text around them left out; raises ``ValueError`` with a sentence.

    Each must be base64 of one DER sequence of the length that it states. Whether that is a certificate is checked by those
    who have a parser: the API before it stores a policy, and a relay before it uses one.
    """
    if not isinstance(value, str):
        raise ValueError("must be the text of CA certificates in PEM form")
    if len(value) > 8 * MAX_POLICY_BYTES:
        raise ValueError(f"has {len(value)} characters; a policy has at most {MAX_POLICY_BYTES} bytes")
    blocks: list[str] = []
    for kind, body, end in _PEM.findall(value):
        if "PRIVATE KEY" in kind:
            raise ValueError("holds a private key, which has no place in a policy; give the certificate alone")
        if kind != "CERTIFICATE" or end != kind:
            raise ValueError(f"holds a block {_shown(kind)}; only CERTIFICATE blocks belong here")
        blocks.append(_certificate(body))
    if not blocks or value.count("-----BEGIN") != len(blocks):
        raise ValueError("is not the text of CA certificates in PEM form (-----BEGIN CERTIFICATE-----)")
    if len(blocks) > MAX_CA_CERTIFICATES:
        raise ValueError(f"holds {len(blocks)} certificates; at most {MAX_CA_CERTIFICATES}")
    return "\n".join(blocks) + "\n"


def _certificate(body: str) -> str:
    try:
        der = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("holds a certificate that is not base64") from None
    size = int.from_bytes(der[2 : 2 + (der[1] & 0x7F)], "big") if len(der) > 4 and der[1] in (0x81, 0x82) else -1
    if der[:1] != b"\x30" or len(der) != 2 + (der[1] & 0x7F) + size:
        raise ValueError("holds a certificate that is cut off or no certificate")
    text = base64.b64encode(der).decode()
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return "\n".join(("-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----"))


def _addresses(walk: _Walk, path: str, value: object) -> dict[str, Any]:
    found = walk.mapping(path, value, ("rules", "otherwise"))
    if isinstance(value, Mapping) and not value.keys() & {"rules", "otherwise"}:
        walk.refuse(path, "needs rules or otherwise")
    rules = []
    if "rules" in found:
        for at, rule in walk.items(f"{path}.rules", found["rules"], MAX_ADDRESS_RULES):
            rules.append(_address_rule(walk, at, rule))
    clean: dict[str, Any] = {"rules": rules} if rules else {}
    if "otherwise" in found:
        otherwise = walk.choice(f"{path}.otherwise", found["otherwise"], ("allow", "deny"))
        if otherwise != otherwise_of(rules):
            clean["otherwise"] = otherwise
    return clean


def otherwise_of(rules: list[dict[str, Any]]) -> str:
    """What happens to an address that no rule names, where the policy does not say: who lists friends wants no others."""
    return "deny" if any("allow" in rule for rule in rules) else "allow"


def _address_rule(walk: _Walk, path: str, value: object) -> dict[str, str]:
    found = walk.mapping(path, value, ("allow", "deny"))
    if isinstance(value, Mapping) and len(found) != 1:
        walk.refuse(path, "must have either allow or deny, with one network")
    clean = {}
    for key, text in found.items():
        at = f"{path}.{key}"
        if not isinstance(text, str):
            walk.refuse(at, "must be one network as text; write it in quotes")
        elif (net := walk.worded(at, text, network)) is not None:
            clean[key] = str(net)
    return clean


def _rate_limits(walk: _Walk, path: str, value: object) -> dict[str, Any]:
    found = walk.mapping(path, value, ("tunnel", "client"))
    return {key: _rate(walk, f"{path}.{key}", inner) for key, inner in found.items()}


def _rate(walk: _Walk, path: str, value: object) -> dict[str, Any]:
    found = walk.mapping(path, value, ("requests", "seconds", "burst"), ("requests",))
    clean: dict[str, Any] = {}
    if "requests" in found:
        clean["requests"] = walk.whole(f"{path}.requests", found["requests"], MAX_RATE_REQUESTS)
    if "seconds" in found and (seconds := walk.seconds(f"{path}.seconds", found["seconds"], MAX_RATE_SECONDS)) != 1:
        clean["seconds"] = seconds
    if "burst" in found and (burst := walk.whole(f"{path}.burst", found["burst"], MAX_BURST)) != clean.get("requests"):
        clean["burst"] = burst
    return clean


def _headers(walk: _Walk, path: str, value: object) -> dict[str, Any]:
    found = walk.mapping(path, value, ("host", "request", "response"))
    clean: dict[str, Any] = {}
    if "host" in found and (host := walk.worded(f"{path}.host", found["host"], host_rule)) != HOST_KEPT:
        clean["host"] = host
    for key in ("request", "response"):
        if key in found and (rules := _header_rules(walk, f"{path}.{key}", found[key])):
            clean[key] = rules
    return clean


def host_rule(value: object) -> str:
    """``preserve``, ``rewrite`` or a host with or without port; raises ``ValueError`` with a sentence."""
    if isinstance(value, str) and (match := _HOST.fullmatch(value)) and int((match[3] or ":1")[1:]) <= 65_535:
        return value
    raise ValueError(f"{_shown(value)} is not a host name; give preserve, rewrite or a name")


def _header_rules(walk: _Walk, path: str, value: object) -> dict[str, Any]:
    found = walk.mapping(path, value, ("remove", "add"))
    remove = walk.items(f"{path}.remove", found["remove"], MAX_HEADER_RULES) if "remove" in found else []
    add = walk.items(f"{path}.add", found["add"], MAX_HEADER_RULES) if "add" in found else []
    if len(remove) + len(add) > MAX_HEADER_RULES:
        walk.refuse(path, f"has {len(remove) + len(add)} header rules; at most {MAX_HEADER_RULES}")
    clean: dict[str, Any] = {}
    if names := [name for at, text in remove if (name := walk.worded(at, text, header_name)) is not None]:
        clean["remove"] = sorted({name.lower() for name in names})
    if added := [_added(walk, at, inner) for at, inner in add]:
        clean["add"] = added
    return clean


def _added(walk: _Walk, path: str, value: object) -> dict[str, Any]:
    found = walk.mapping(path, value, ("name", "value"), ("name", "value"))
    read: dict[str, Callable[[Any], str]] = {"name": header_name, "value": header_value}
    return {key: walk.worded(f"{path}.{key}", inner, read[key]) for key, inner in found.items()}


_SECTIONS: Final[Mapping[str, Callable[[_Walk, str, object], Any]]] = {
    "concurrency": _concurrency,
    "queue": _queue,
    "plain_http": _plain_http,
    "basic_auth": _basic_auth,
    "client_certificates": _client_certificates,
    "addresses": _addresses,
    "rate_limits": _rate_limits,
    "headers": _headers,
}
