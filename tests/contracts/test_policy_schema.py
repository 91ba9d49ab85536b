"""contracts/policy.schema.json and the parser of policies agree, on documents of every kind."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from portico.wire import policy, policy_check
from portico.wire.policy import Fault, PolicyInvalid
from tests.wire.test_policy import DIGEST, FULL, shaped, valid

SCHEMA = json.loads((Path(__file__).parents[2] / "contracts" / "policy.schema.json").read_text())
CHECK = jsonschema.Draft202012Validator(SCHEMA)
#: What the schema cannot say: the parser alone refuses it.
BEYOND = re.compile(
    "has bits set beyond|is not an address or network|there twice|protected|frames the message or is set by the relay"
    "|certificate|costs too much or too little|salt or hash is not base64|header rules; at most|bytes as JSON|half a character"
    "|has [0-9]+ characters; a policy|is not a host name"
)


def faults_of(document: object) -> list[Fault]:
    try:
        policy.canonical(document)
    except PolicyInvalid as err:
        return err.faults
    return []


def agree(document: object) -> None:
    """Whatever the parser takes fits the schema, and what the parser refuses does not, except for what is beyond it."""
    faults = faults_of(document)
    if not faults:
        CHECK.validate(document)
    elif not all(BEYOND.search(fault.message) for fault in faults):
        assert not CHECK.is_valid(document), faults


def test_the_schema_is_sound_and_every_key_is_explained() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def explained(part: Any, path: str) -> None:
        for name, inner in part.get("properties", {}).items():
            assert inner.get("description"), f"{path}.{name}"
            explained(inner, f"{path}.{name}")
        if isinstance(part.get("items"), dict):
            explained(part["items"], f"{path}[]")

    explained(SCHEMA, "")
    for name, part in SCHEMA["$defs"].items():
        explained(part, name)


def test_both_know_the_same_keys() -> None:
    def refused(document: Any) -> str:
        (fault,) = faults_of(document)
        return fault.message

    assert set(SCHEMA["properties"]) == set(re.findall(r"\w+", refused({"zzzzzzzz": 1}).partition("known keys:")[2]))
    for path in (("queue",), ("basic_auth",), ("addresses",), ("rate_limits",), ("headers",), ("client_certificates",)):
        known = refused({path[0]: {**FULL[path[0]], "zzzzzzzz": 1}}).partition("known keys:")[2]
        assert set(SCHEMA["properties"][path[0]]["properties"]) == set(re.findall(r"\w+", known))


def test_both_have_the_same_limits() -> None:
    properties, parts = SCHEMA["properties"], SCHEMA["$defs"]
    assert properties["concurrency"]["maximum"] == policy_check.MAX_CONCURRENCY
    assert properties["queue"]["properties"]["requests"]["maximum"] == policy_check.MAX_QUEUE_REQUESTS
    assert properties["queue"]["properties"]["seconds"]["maximum"] == policy_check.MAX_QUEUE_SECONDS
    assert properties["basic_auth"]["properties"]["users"]["maxItems"] == policy_check.MAX_USERS
    assert properties["basic_auth"]["properties"]["realm"]["maxLength"] == policy_check.MAX_REALM_CHARS
    assert properties["basic_auth"]["properties"]["realm"]["default"] == policy_check.DEFAULT_REALM
    assert properties["addresses"]["properties"]["rules"]["maxItems"] == policy_check.MAX_ADDRESS_RULES
    assert tuple(properties["plain_http"]["enum"]) == policy_check.PLAIN_HTTP
    assert parts["user"]["properties"]["name"]["maxLength"] == policy_check.MAX_USER_CHARS
    assert parts["user"]["properties"]["password"]["maxLength"] == policy_check.MAX_PASSWORD_CHARS
    assert parts["rate"]["properties"]["requests"]["maximum"] == policy_check.MAX_RATE_REQUESTS
    assert parts["rate"]["properties"]["seconds"]["maximum"] == policy_check.MAX_RATE_SECONDS
    assert parts["rate"]["properties"]["burst"]["maximum"] == policy_check.MAX_BURST
    assert parts["header_rules"]["properties"]["remove"]["maxItems"] == policy_check.MAX_HEADER_RULES
    assert parts["header_name"]["maxLength"] == policy_check.MAX_HEADER_NAME_CHARS
    value = parts["header_rules"]["properties"]["add"]["items"]["properties"]["value"]
    assert value["maxLength"] == policy_check.MAX_HEADER_VALUE_CHARS
    assert str(policy_check.MAX_POLICY_BYTES) in SCHEMA["description"]
    for limit in (policy_check.MAX_ARGON2_KIB, policy_check.MAX_ARGON2_PASSES, policy_check.MAX_ARGON2_LANES):
        assert f"={limit}" in parts["user"]["properties"]["digest"]["description"]


@given(valid)
def test_what_is_valid(document: dict[str, Any]) -> None:
    assert faults_of(document) == []
    CHECK.validate(document)
    CHECK.validate(policy.canonical(document))


@given(shaped)
@example({"version": 1.0, "concurrency": 5.0, "queue": {"requests": 2.0, "seconds": 0.5}})
@example({"basic_auth": {"users": [{"name": "a", "password": "b", "digest": DIGEST}]}})
def test_anything(document: object) -> None:
    agree(document)


def _places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [at, *(place for key, value in inner for place in _places(value, (*at, key)))]


VALUES = [
    None, True, 0, 1, -1, 1.5, 5.0, 10**9, "", "a", "a:b", "a b", "a\x01", "10.0.0.0/8", "rewrite", "x" * 300, "ä", DIGEST,
    [], ["X-A"], [{"name": "a"}], [{"deny": "::"}], {}, {"name": "a", "value": "b"}, {"requests": 1}, {"unknown": 1},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_good_policy_with_another_value_in_each_place(value: Any) -> None:
    for place in _places(FULL):
        document: Any = {"all": copy.deepcopy(FULL)}
        inner = document
        for key in ("all", *place)[:-1]:
            inner = inner[key]
        inner[("all", *place)[-1]] = copy.deepcopy(value)
        agree(document["all"])


@pytest.mark.parametrize("place", [place for place in _places(FULL) if place and isinstance(place[-1], str)], ids=repr)
def test_a_good_policy_with_a_key_less(place: tuple[Any, ...]) -> None:
    document = copy.deepcopy(FULL)
    inner: Any = document
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    agree(document)


@given(st.sampled_from(_places(FULL)[1:]), st.text(max_size=4))
def test_a_good_policy_with_any_text_in_a_place(place: tuple[Any, ...], text: str) -> None:
    document: Any = copy.deepcopy(FULL)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = text
    if not text.endswith("\n"):  # Python's $ matches before the last line's end, that of JSON Schema does not
        agree(document)
