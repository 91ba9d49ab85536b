"""The options and keys that are short for a policy, and what is said of one on a screen.

    --basic-auth … --allow-cidr …  ──compiled──┐
                                               ├──merged──► the policy that the API is asked for
    --policy-file F                ──read_file─┘

Of nothing at all comes ``None``: the tunnel keeps the policy that it has. Of anything comes the whole policy.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from portico.kit import jwt
from portico.wire import policy, policy_check
from portico.wire.policy import Fault, PolicyInvalid

if TYPE_CHECKING:
    from portico.kit.marked import Marks

MAX_FILE_BYTES: Final = 65_536  # as the API takes it
MASK: Final = "********"


@dataclass(frozen=True, slots=True)
class Sugar:
    """What options or keys say. Names are those of the options, with ``_`` for ``-``."""

    basic_auth: Sequence[str] = ()
    deny_cidr: Sequence[str] = ()
    allow_cidr: Sequence[str] = ()
    host_header: str | None = None
    request_header_remove: Sequence[str] = ()
    request_header_add: Sequence[str] = ()
    response_header_remove: Sequence[str] = ()
    response_header_add: Sequence[str] = ()
    mutual_tls_cas: Path | None = None
    plain_http: str | None = None

    def given(self) -> bool:
        """Whether anything is said at all."""
        return any(getattr(self, part.name) not in (None, (), []) for part in fields(self))


class SugarError(ValueError):
    """A value that cannot be used; ``name`` is that of the option or key."""

    def __init__(self, name: str, message: str) -> None:
        self.name = name
        super().__init__(message)


class Contradiction(ValueError):
    """Two parts of a policy that cannot both hold; the text says which."""


def compiled(sugar: Sugar) -> dict[str, Any]:
    """The policy that options or keys stand for. Raises :class:`SugarError`."""
    document: dict[str, Any] = {}
    if sugar.basic_auth:
        document["basic_auth"] = {"users": [_worded("basic_auth", _user, text) for text in sugar.basic_auth]}
    # Denials first: the first rule that matches decides, and who keeps a network out means it.
    rules = [{"deny": str(_worded("deny_cidr", policy_check.network, text))} for text in sugar.deny_cidr]
    rules += [{"allow": str(_worded("allow_cidr", policy_check.network, text))} for text in sugar.allow_cidr]
    if rules:
        document["addresses"] = {"rules": rules}
    headers: dict[str, Any] = {}
    if sugar.host_header is not None:
        headers["host"] = _worded("host_header", policy_check.host_rule, sugar.host_header)
    for side in ("request", "response"):
        removed, added = f"{side}_header_remove", f"{side}_header_add"
        part = {
            "remove": [_worded(removed, policy_check.header_name, text) for text in getattr(sugar, removed)],
            "add": [_worded(added, _header, text) for text in getattr(sugar, added)],
        }
        if any(part.values()):
            headers[side] = {key: value for key, value in part.items() if value}
    if headers:
        document["headers"] = headers
    if sugar.mutual_tls_cas is not None:
        document["client_certificates"] = {"ca": _worded("mutual_tls_cas", _certificates, sugar.mutual_tls_cas)}
    if sugar.plain_http is not None:
        document["plain_http"] = sugar.plain_http
    try:
        return policy.canonical(document)
    except PolicyInvalid as err:  # what only shows when all is together: a user twice, too many rules
        fault = err.faults[0]
        raise SugarError(_option_of(fault.path), fault.message) from None


def _worded(name: str, read: Any, value: Any) -> Any:
    try:
        return read(value)
    except ValueError as err:
        raise SugarError(name, str(err)) from None


def _user(text: str) -> dict[str, str]:
    """``NAME:PASSWORD``. What is wrong with it is said without it."""
    name, colon, password = text.partition(":")
    if not colon or not name or not password:
        raise ValueError("must be NAME:PASSWORD")
    user = {"name": name, "password": password}
    try:
        policy.canonical({"basic_auth": {"users": [user]}})
    except PolicyInvalid as err:
        part = err.faults[0].path.rpartition(".")[2]
        raise ValueError(f"{part} {err.faults[0].message}") from None
    return user


def _header(text: str) -> dict[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise ValueError(f"{text[:80]!a} must be NAME: VALUE")
    return {"name": policy_check.header_name(name.strip()), "value": policy_check.header_value(value.strip())}


def _certificates(path: Path) -> str:
    try:
        return policy_check.ca_bundle(path.read_text("utf-8")[: 8 * MAX_FILE_BYTES])
    except OSError as err:
        raise ValueError(f"{path} cannot be read: {err.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not the text of certificates in PEM form") from None
    except ValueError as err:
        raise ValueError(f"{path} {err}") from None


def _option_of(path: str) -> str:
    for start, name in (
        ("basic_auth", "basic_auth"),
        ("addresses", "allow_cidr"),
        ("headers.request", "request_header_add"),
        ("headers.response", "response_header_add"),
    ):
        if path.startswith(start):
            return name
    return "policy"


def merged(written: Mapping[str, Any], short: Mapping[str, Any]) -> dict[str, Any]:
    """A written policy with what options add to it; both canonical. Raises :class:`Contradiction`."""
    document = copy.deepcopy(dict(written))
    for key, value in short.items():
        document[key] = _joined(key, document[key], value) if key in document else value
    return document


def _joined(key: str, written: Any, short: Any) -> Any:
    if key == "basic_auth":
        known = {user["name"] for user in written["users"]}
        if twice := [user["name"] for user in short["users"] if user["name"] in known]:
            raise Contradiction(f"the policy has the user {twice[0]} already; leave out basic_auth for it")
        return {**written, "users": [*written["users"], *short["users"]]}
    if key == "addresses":
        raise Contradiction("the policy has address rules, whose order decides; write the networks into it, too")
    if key == "headers":
        return _joined_headers(written, short)
    if written != short:
        option = {"client_certificates": "mutual_tls_cas", "plain_http": "https_only or https_redirect"}[key]
        raise Contradiction(f"the policy has {key} already, and {option} says something else")
    return written


def _joined_headers(written: Mapping[str, Any], short: Mapping[str, Any]) -> dict[str, Any]:
    if "host" in written and written["host"] != short.get("host", written["host"]):
        raise Contradiction(
            f"the policy has headers.host: {written['host']} already, and host_header says something else"
        )
    headers = {**written, **short}
    for side in ("request", "response"):
        if side in written and side in short:
            headers[side] = {
                key: [*written[side].get(key, ()), *short[side].get(key, ())]
                for key in ("remove", "add")
                if key in written[side] or key in short[side]
            }
    return headers


@dataclass(frozen=True, slots=True)
class Written:
    """A policy as a file has it. ``faults``: (line, column, path, message), sorted; 0 where there is no place."""

    document: dict[str, Any]
    faults: list[tuple[int, int, str, str]]
    text: str = ""
    marks: Mapping[str, Any] = field(default_factory=dict)


def read_file(path: Path) -> Written:
    """A policy file, YAML or JSON. Raises nothing: what is wrong is in ``faults``."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as err:
        missing = isinstance(err, FileNotFoundError)
        return Written({}, [(0, 0, "", "does not exist" if missing else f"cannot be read: {err.strerror}")])
    return read_text(data)


def read_text(data: bytes) -> Written:
    """As :func:`read_file`, of its bytes."""
    from portico.kit import marked  # with the YAML parser, which most commands do without

    if len(data) > MAX_FILE_BYTES:
        return Written({}, [(0, 0, "", f"is larger than {MAX_FILE_BYTES} bytes")])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        before = data[: err.start]
        place = (before.count(b"\n") + 1, err.start - before.rfind(b"\n"))
        return Written({}, [(*place, "", "this byte is not UTF-8 text")])
    try:
        found = marked.load(text)
    except marked.Unreadable as err:
        return Written({}, [(err.place.line, err.place.column, "", str(err))], text)
    if found.faults:
        return Written({}, placed(found.marks, [Fault(*fault) for fault in found.faults]), text)
    try:
        return Written(policy.canonical(found.value), [], text, found.marks)
    except PolicyInvalid as invalid:
        return Written({}, placed(found.marks, invalid.faults), text)


def placed(marks: Marks, faults: Sequence[Fault]) -> list[tuple[int, int, str, str]]:
    """The faults with their places, in the order of the text."""
    from portico.kit import marked

    found = []
    for fault in faults:
        place = marked.nearest(marks, fault.path)
        line, column = (place.line, place.column) if place is not None else (0, 0)
        found.append((line, column, fault.path, fault.message))
    return sorted(found)


def masked(document: Mapping[str, Any]) -> dict[str, Any]:
    """The policy for people: version first, passwords and digests as asterisks."""
    shown: dict[str, Any] = {"version": policy_check.VERSION, **copy.deepcopy(dict(document))}
    for user in shown.get("basic_auth", {}).get("users", ()):
        for key in ("password", "digest"):
            if key in user:
                user[key] = MASK
    return shown


def as_yaml(document: Mapping[str, Any]) -> str:
    """The policy as YAML; texts of several lines stay readable."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    dumped: str = yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return dumped


@functools.lru_cache(1024)
def summary_of_grant(grant: str) -> str:
    """:func:`summary` of the policy in a grant; empty where there is none to see."""
    try:
        return summary(policy.canonical(jwt.unverified(grant).get("policy", {})))
    except jwt.InvalidToken:
        return ""
    except PolicyInvalid:
        return "set, in a way that this version cannot read"


def summary(document: Mapping[str, Any]) -> str:
    """What a policy does, in a line; empty for none."""
    parts = []
    if users := document.get("basic_auth", {}).get("users"):
        parts.append(f"basic auth ({_count(len(users), 'user')})")
    if "client_certificates" in document:
        parts.append("client certificates")
    addresses = document.get("addresses", {})
    if rules := addresses.get("rules"):
        parts.append(_count(len(rules), "address rule"))
    elif addresses:
        parts.append("nobody let in")
    for key, who in (("tunnel", ""), ("client", " a client")):
        if rate := document.get("rate_limits", {}).get(key):
            seconds = rate.get("seconds", 1)
            parts.append(f"{_count(rate['requests'], 'request')}/{'' if seconds == 1 else f'{seconds:g} '}s{who}")
    if "concurrency" in document:
        parts.append(f"{document['concurrency']} at once")
    if plain := {"refuse": "https only", "redirect": "http goes to https"}.get(document.get("plain_http", "")):
        parts.append(plain)
    headers = document.get("headers", {})
    if "host" in headers:
        parts.append(
            "the target's Host" if headers["host"] == policy_check.HOST_OF_TARGET else f"Host {headers['host']}"
        )
    if rules := sum(
        len(headers.get(side, {}).get(key, ())) for side in ("request", "response") for key in ("remove", "add")
    ):
        parts.append(_count(rules, "header rule"))
    return ", ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
