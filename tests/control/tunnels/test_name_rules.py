"""Which names may be public hosts: the platform's own, those that imitate others, and what looks like either."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from portico.control.tunnels import name_rules
from portico.control.tunnels.name_rules import NameRules
from portico.errors import Problem
from portico.kit.lookalikes import decoded, drawn, skeleton
from portico.settings import ApiSettings, Secret

SETTINGS = ApiSettings(Secret("postgresql://x/y"), Secret("x"))


@pytest.fixture(scope="module")
def rules() -> NameRules:
    return NameRules.load(SETTINGS)


def code(rules: NameRules, name: str) -> str | None:
    try:
        assert rules.check(name) == name
    except Problem as problem:
        return problem.code
    return None


def coded(text: str) -> str:
    return "xn--" + text.encode("punycode").decode()


GOOD = """
    a 0 web a-b a--b 1-2-3 bold-fox-ab12 my-app myapi api-v2 dev-server test-app admin-panel login-service status-page
    stripe-webhooks stripe github-app slack-bot discord-bot-2 paypal-webhook apple-callback amazon-sync
    purchase-api pineapple modern-art cloudy metadata node1 app1 demo2 staging frontend web1 wwwroot mailing
""".replace("stripe github", "github")
BLOCKED = """
    www api admin portico mail localhost autodiscover login ns1 ns01 mail-2 mx3 www-1
    adm1n admln web-mail vvww wvvw 1ogin loc4lhost portic0 log-in ap1 auto-config w-w-w a-d-m-i-n cl0ud-api
""".replace("cl0ud-api", "")
BRANDS = """
    paypal paypa1 pay-pal p-a-y-p-a-l paypal-login securepaypal paypal-7k2m paypal--webhook-login my-paypal-shop paypai
    rnicrosoft micr0soft-update microsoftonline-webhook arnazon amaz0n-webhook apple-id app1e-callback netf1ix whatsapp2
    github g1thub-webhook github-login s1ack-bot stripe-verify phishing-kit ph1shing
"""


@pytest.mark.parametrize("name", [*GOOD.split(), "x" * 63])
def test_let_in(rules: NameRules, name: str) -> None:
    assert code(rules, name) is None
    assert rules.usable(name)


@pytest.mark.parametrize("name", [*BLOCKED.split(), *BRANDS.split()])
def test_reserved(rules: NameRules, name: str) -> None:
    assert code(rules, name) == "tunnel.name_reserved"
    assert not rules.usable(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "ab",
            "-a-",
            "a-",
            "-ab",
            "A-b",
            "a.b",
            "a_b",
            "_dmarc",
            "a b",
            "x" * 64,
            "x" * 100_000,
            "web\n",
            "ünï",
            "а-б",
            "web\0",
        ),
        *("xn--", "xn--a", "xn--abc-", "xn--\ud800", "xn--99999999", "XN--BCHER-KVA", "xn--bcher-kvA"),
    ],
)
def test_invalid(rules: NameRules, name: str) -> None:
    assert code(rules, name) == "tunnel.name_invalid"
    assert not rules.usable(name)


class TestOtherLetters:
    """``xn--`` is what it shows, or it is refused."""

    @pytest.mark.parametrize(
        "text", ["bücher", "café", "привет", "почта", "日本語", "ひらがな漢字", "한국어", "ελλάδα", "straße1"]
    )
    def test_one_script(self, rules: NameRules, text: str) -> None:
        assert code(rules, coded(text)) is None

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ("pаypal", "tunnel.name_invalid"),  # Cyrillic а
            ("gοοgle", "tunnel.name_invalid"),  # Greek ο
            ("日本a", "tunnel.name_invalid"),
            ("ɢoogle", "tunnel.name_invalid"),  # small capital
            ("e\u0301a", "tunnel.name_invalid"),  # not composed
            ("\u0301abc", "tunnel.name_invalid"),
            ("Ünï", "tunnel.name_invalid"),
            ("☃snow", "tunnel.name_invalid"),
            ("a\u200db", "tunnel.name_invalid"),
            ("a\u202eb", "tunnel.name_invalid"),
            ("abс", "tunnel.name_invalid"),
            ("аррӏе", "tunnel.name_reserved"),  # all Cyrillic
            ("осо", "tunnel.name_reserved"),  # no word of ours, but it shows as Latin letters
            ("paypál", "tunnel.name_reserved"),
            ("gööglé", "tunnel.name_reserved"),
            ("ádmin", "tunnel.name_reserved"),
            ("màil", "tunnel.name_reserved"),
            ("ṁicrosoft", "tunnel.name_reserved"),
        ],
    )
    def test_disguises(self, rules: NameRules, text: str, what: str) -> None:
        assert code(rules, coded(text)) == what

    def test_ascii_in_disguise(self) -> None:
        assert decoded("xn--admin-") is None
        assert decoded("web") == "web" and decoded("a--b") == "a--b"

    def test_skeletons(self) -> None:
        for one, other in (
            ("paypa1", "paypal"),
            ("rnail", "mail"),
            ("vvww", "www"),
            ("g00gle", "google"),
            ("clhl", "dhi"),
        ):
            assert skeleton(one) == skeleton(other)
        assert skeleton("web") != skeleton("wed")
        assert (drawn("bücher"), drawn("日本"), drawn("аррӏе")) == ("bucher", None, "apple")


class TestWords:
    def test_every_word_is_refused_itself(self, rules: NameRules) -> None:
        words = name_rules._read(Path(name_rules.__file__).with_name("reserved_names.toml"))
        for name in ("blocked", "guarded", "distinct", "known", "abuse"):
            assert words[name] == sorted(set(words[name]), key=words[name].index)
            for word in words[name]:
                if len(word) != 2:
                    assert not rules.usable(word), word
        assert set(words["distinct"]) <= set(words["guarded"])

    def test_an_installations_own(self, tmp_path: Path) -> None:
        path = tmp_path / "names.toml"
        path.write_text('blocked = ["intranet"]\nguarded = ["acmebank"]\nallowed = ["portal", "paypal"]\n')
        own = NameRules.load(replace(SETTINGS, reserved_names_file=path))
        assert [code(own, name) for name in ("1ntranet", "acmebank-login", "acmebank-webhook")] == [
            "tunnel.name_reserved",
            "tunnel.name_reserved",
            None,
        ]
        assert own.usable("portal") and own.usable("paypal") and not own.usable("paypa1") and not own.usable("www")

    @pytest.mark.parametrize(
        "text", ["blocked = 1", "blokked = []", 'blocked = ["A"]', 'blocked = ["a b"]', "not toml", "\xff"]
    )
    def test_a_file_that_is_none(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "names.toml"
        path.write_bytes(text.encode("latin-1"))
        for wrong in (path, tmp_path / "missing"):
            with pytest.raises(Problem) as refused:
                NameRules.load(replace(SETTINGS, reserved_names_file=wrong))
            assert refused.value.code == "config.invalid" and "reserved_names_file" in refused.value.detail


def test_what_is_remembered_is_bounded(rules: NameRules) -> None:
    fresh: Any = NameRules.load(SETTINGS)
    for n in range(10_010):
        fresh.usable(f"name-{n}")
    assert len(fresh._answers) <= 10_000
