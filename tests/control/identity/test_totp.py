"""One-time passwords against the vectors of RFC 6238, and what is refused."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from portico.control.identity import totp
from portico.control.identity.factors import new_recovery_code

SECRET = b"12345678901234567890"


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [(59, "94287082"), (1111111109, "07081804"), (1111111111, "14050471"), (1234567890, "89005924"),
     (2000000000, "69279037"), (20000000000, "65353130")],
)  # fmt: skip
def test_vectors_of_the_rfc(seconds: int, wanted: str) -> None:
    """Appendix B, SHA-1."""
    assert totp.code(SECRET, totp.step_at(seconds), digits=8) == wanted
    assert totp.code(SECRET, totp.step_at(seconds)) == wanted[-6:]


@pytest.mark.parametrize(("late", "fits"), [(-2, False), (-1, True), (0, True), (1, True), (2, False)])
def test_one_step_of_drift(late: int, fits: bool) -> None:
    now = 1_800_000_000.0
    step = totp.step_at(now) + late
    assert totp.fitting_step(SECRET, totp.code(SECRET, step), now, 0) == (step if fits else None)


def test_no_step_counts_twice_nor_backwards() -> None:
    now = 1_800_000_000.0
    step = totp.step_at(now)
    assert totp.fitting_step(SECRET, totp.code(SECRET, step), now, step) is None
    assert totp.fitting_step(SECRET, totp.code(SECRET, step - 1), now, step) is None
    assert totp.fitting_step(SECRET, totp.code(SECRET, step + 1), now, step) == step + 1


@pytest.mark.parametrize("typed", ["", "12345", "1234567", "abcdef", "１２３４５６", "\ud800"])
def test_noise_fits_nothing(typed: str) -> None:
    assert totp.fitting_step(SECRET, typed, 59.0, 0) is None


def test_spaces_do_not_matter() -> None:
    assert totp.fitting_step(SECRET, " 287 082 ", 59.0, 0) == 1


def test_the_uri_is_what_apps_read() -> None:
    made = urlsplit(totp.uri(SECRET, "a+b@example.com", "My Company: tunnels"))
    assert (made.scheme, made.netloc) == ("otpauth", "totp")
    assert made.path == "/My%20Company%3A%20tunnels:a%2Bb@example.com"
    facts = parse_qs(made.query)
    assert facts["secret"] == ["GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"]
    assert (facts["issuer"], facts["digits"], facts["period"]) == (["My Company: tunnels"], ["6"], ["30"])


def test_recovery_codes_are_as_people_write_them() -> None:
    codes = {new_recovery_code() for _ in range(200)}
    assert len(codes) == 200
    assert all(len(code) == 19 and set(code) <= set("23456789ABCDEFGHJKLMNPQRSTUVWXYZ-") for code in codes)
