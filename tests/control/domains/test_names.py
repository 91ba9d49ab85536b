"""Names of domains: what is taken, how it is written, and what is nobody's or ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.control.domains.names import MAX_NAME_CHARS, NameRules
from portico.errors import Problem
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret

SETTINGS = ApiSettings(
    database_url=Secret("postgresql://none"),
    master_key=Secret(new_master_key()),
    base_domain="tunnels.portico.example",
    public_url="https://tunnels.portico.example",
    tcp_url_host="tcp.portico.example",
)
RULES = NameRules(SETTINGS)


@pytest.mark.parametrize(
    ("text", "name", "display"),
    [
        ("www.example.com", "www.example.com", "www.example.com"),
        ("  WWW.Example.COM. ", "www.example.com", "www.example.com"),
        ("*.example.com", "*.example.com", "*.example.com"),
        ("bücher.example", "xn--bcher-kva.example", "bücher.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example", "bücher.example"),
        ("*.Bücher。example", "*.xn--bcher-kva.example", "*.bücher.example"),
        ("straße.example", "xn--strae-oqa.example", "straße.example"),  # non-transitional: ß stays
        ("пример.рф", "xn--e1afmkfd.xn--p1ai", "пример.рф"),
        ("日本語.jp", "xn--wgv71a119e.jp", "日本語.jp"),
    ],
)
def test_what_is_written(text: str, name: str, display: str) -> None:
    found = RULES.parse(text)
    assert (found.name, found.display) == (name, display)
    assert RULES.parse(found.name) == RULES.known(found.name) == found


@pytest.mark.parametrize(
    ("text", "apex", "registrable"),
    [
        ("example.com", True, "example.com"),
        ("www.example.com", False, "example.com"),
        ("example.co.uk", True, "example.co.uk"),
        ("*.example.co.uk", True, "example.co.uk"),
        ("me.github.io", True, "me.github.io"),
    ],
)
def test_an_apex_is_what_was_registered(text: str, apex: bool, registrable: str) -> None:
    found = RULES.parse(text)
    assert (found.apex, found.registrable) == (apex, registrable)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "domain.name_invalid"),
        (".", "domain.name_invalid"),
        ("*.", "domain.name_invalid"),
        ("localhost", "domain.name_invalid"),
        ("127.0.0.1", "domain.name_invalid"),
        ("1.2.3.0x7f", "domain.name_invalid"),
        ("https://www.example.com", "domain.name_invalid"),
        ("www.example.com/x", "domain.name_invalid"),
        ("www.example.com:443", "domain.name_invalid"),
        ("you@example.com", "domain.name_invalid"),
        ("a_b.example.com", "domain.name_invalid"),
        ("a b.example.com", "domain.name_invalid"),
        ("-a.example.com", "domain.name_invalid"),
        ("a..example.com", "domain.name_invalid"),
        ("*.*.example.com", "domain.name_invalid"),
        ("www.*.example.com", "domain.name_invalid"),
        (f"{'a' * 64}.example.com", "domain.name_invalid"),
        (".".join(["a" * 60] * 4) + ".example.com", "domain.name_invalid"),
        ("www.example.com\x00", "domain.name_invalid"),
        ("xn--a.example.com", "domain.name_invalid"),
        ("pаypal.com", "domain.name_invalid"),  # a Cyrillic а among Latin letters
        ("аррӏе.com", "domain.name_invalid"),  # all Cyrillic, in the shapes of Latin
        ("com", "domain.name_invalid"),
        ("co.uk", "domain.public_suffix"),
        ("*.co.uk", "domain.public_suffix"),
        ("github.io", "domain.public_suffix"),
        ("tunnels.portico.example", "domain.reserved"),
        ("a.b.tunnels.portico.example", "domain.reserved"),
        ("*.tunnels.portico.example", "domain.reserved"),
        ("tcp.portico.example", "domain.reserved"),
        ("*.portico.example", "domain.reserved"),  # covers the base domain
    ],
)
def test_what_is_refused(text: str, code: str) -> None:
    with pytest.raises(Problem) as refused:
        RULES.parse(text)
    assert refused.value.code == code


def test_a_cyrillic_word_is_good_where_everything_is_cyrillic() -> None:
    assert RULES.parse("аррӏе.рф").wildcard is False


def test_a_list_of_suffixes_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "suffixes.dat"
    own.write_text("com\napps.example.com\n")
    rules = NameRules(dataclasses.replace(SETTINGS, public_suffix_file=own))
    with pytest.raises(Problem) as refused:
        rules.parse("apps.example.com")
    assert refused.value.code == "domain.public_suffix"
    for text in ("", None):
        wrong = tmp_path / f"wrong-{text is None}.dat"
        if text is not None:
            wrong.write_text(text)
        with pytest.raises(Problem) as refused:
            NameRules(dataclasses.replace(SETTINGS, public_suffix_file=wrong))
        assert refused.value.code == "config.invalid"


@given(st.text(max_size=80) | st.from_regex(r"(\*\.)?[a-zäöüßæ0-9.\-]{1,70}\.(com|de|рф)", fullmatch=True))
def test_any_text_is_a_name_or_a_problem(text: str) -> None:
    try:
        found = RULES.parse(text)
    except Problem as problem:
        assert problem.code in ("domain.name_invalid", "domain.public_suffix", "domain.reserved")
        return
    assert found.name.isascii()
    assert found.name == found.name.lower()
    assert len(found.base) <= MAX_NAME_CHARS
    assert RULES.parse(found.name) == found
