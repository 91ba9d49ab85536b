"""Signatures of Standard Webhooks: the specification's known answer, and what must not be believed."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.kit import signing
from portico.kit.signing import SignatureError, headers, sign, verify

# The example that the specification's own libraries are tested with.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ID, AT, BODY = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
OTHER = signing.new_secret()


def fault(given: dict[str, str], body: bytes = BODY, now: float = AT, secrets: tuple[str, ...] = (SECRET,)) -> str:
    with pytest.raises(SignatureError) as refused:
        verify(secrets, given, body, now)
    assert SECRET not in str(refused.value)
    return refused.value.fault


def test_the_known_answer() -> None:
    assert sign(SECRET, ID, AT, BODY) == SIGNATURE
    assert verify([SECRET], headers([SECRET], ID, AT, BODY), BODY, AT) == (ID, AT)


def test_any_secret_in_use_is_enough_on_either_side() -> None:
    both = headers([OTHER, SECRET], ID, AT, BODY)
    assert both[signing.SIGNATURE].split(" ") == [sign(OTHER, ID, AT, BODY), SIGNATURE]
    assert verify([SECRET], both, BODY, AT) == verify([OTHER], both, BODY, AT) == (ID, AT)
    assert verify([OTHER, SECRET], headers([SECRET], ID, AT, BODY), BODY, AT) == (ID, AT)
    assert fault(headers([OTHER], ID, AT, BODY)) == "mismatch", "a retired secret"


def test_freshness_has_two_sides() -> None:
    good = headers([SECRET], ID, AT, BODY)
    for off in (-300, 0, 300):
        verify([SECRET], good, BODY, AT + off)
    for off in (-301, 301, -(10**9), float("nan")):
        assert fault(good, now=AT + off) == "stale"


def test_nothing_is_believed_without_a_secret() -> None:
    assert fault(headers([SECRET], ID, AT, BODY), secrets=()) == "no_secret"
    with pytest.raises(ValueError, match="unsigned"):
        headers([], ID, AT, BODY)


def test_each_part_is_signed() -> None:
    good = headers([SECRET], ID, AT, BODY)
    assert fault(good, BODY + b" ") == "mismatch"
    assert fault(good | {signing.ID: "msg_other"}) == "mismatch"
    assert fault(good | {signing.TIMESTAMP: str(AT + 1)}) == "mismatch"
    assert fault(good | {signing.TIMESTAMP: f"0{AT}"}) == "mismatch", "the same number in another text"


@pytest.mark.parametrize("name", [signing.ID, signing.TIMESTAMP, signing.SIGNATURE])
def test_each_header_is_needed(name: str) -> None:
    good = headers([SECRET], ID, AT, BODY)
    assert fault({key: value for key, value in good.items() if key != name}) == "missing"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (signing.TIMESTAMP, "1614265330.0", "malformed"), (signing.TIMESTAMP, "+1614265330", "malformed"),
        (signing.TIMESTAMP, " 1614265330", "malformed"), (signing.TIMESTAMP, "١٦١٤٢٦٥٣٣٠", "malformed"),
        (signing.TIMESTAMP, "9" * 5000, "malformed"), (signing.ID, "a.b", "malformed"), (signing.ID, "a b", "malformed"),
        (signing.ID, "i" * 256, "malformed"), (signing.ID, "ü", "malformed"),
        (signing.SIGNATURE, SIGNATURE[3:], "mismatch"), (signing.SIGNATURE, "v1a," + SIGNATURE[3:], "mismatch"),
        (signing.SIGNATURE, SIGNATURE.replace(",", "="), "mismatch"), (signing.SIGNATURE, "v1,", "mismatch"),
        (signing.SIGNATURE, SIGNATURE + ",x", "mismatch"), (signing.SIGNATURE, "v1,ü\udce9", "mismatch"),
        (signing.SIGNATURE, " ".join([SIGNATURE] * 21), "malformed"),
    ],
)  # fmt: skip
def test_nothing_else_is_believed(name: str, value: str, expected: str) -> None:
    assert fault(headers([SECRET], ID, AT, BODY) | {name: value}) == expected


@pytest.mark.parametrize(
    "secret",
    ["", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_", "whsec_***", "whsec_" + base64.b64encode(b"x" * 23).decode(),
     "whsec_" + base64.b64encode(b"x" * 65).decode(), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSü"],
)  # fmt: skip
def test_secrets_have_a_form(secret: str) -> None:
    with pytest.raises(ValueError, match="a secret"):
        signing.key_of(secret)


def test_new_secrets_differ() -> None:
    assert len({signing.new_secret() for _ in range(100)}) == 100
    assert all(len(signing.key_of(signing.new_secret())) == 32 for _ in range(10))


@given(st.binary(max_size=200), st.integers(0, 10**11), st.text("abcXYZ019_-", min_size=1, max_size=40))
def test_what_is_signed_is_believed(body: bytes, at: int, message_id: str) -> None:
    assert verify([OTHER], headers([OTHER], message_id, at, body), body, at) == (message_id, at)
