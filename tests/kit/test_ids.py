"""Ids sort by time; tokens follow the published format."""

from __future__ import annotations

import time
import uuid

import pytest

from portico.kit import ids


class TestUuid7:
    def test_version_variant_and_time(self) -> None:
        before = time.time_ns() // 1_000_000
        value = ids.uuid7()
        assert value.version == 7
        assert value.variant == "specified in RFC 4122"
        assert before <= value.int >> 80 <= time.time_ns() // 1_000_000

    def test_ids_sort_by_creation(self) -> None:
        made = []
        for _ in range(20):
            made.append(ids.new_id("tun"))
            time.sleep(0.0002)
        assert made == sorted(made)
        assert len(set(made)) == 20

    def test_id_is_prefix_and_26_crockford_characters(self) -> None:
        prefix, _, body = ids.new_id("org").partition("_")
        assert prefix == "org"
        assert len(body) == 26
        assert set(body) <= set("0123456789abcdefghjkmnpqrstvwxyz")

    def test_the_characters_are_the_bits_five_by_five(self, monkeypatch: pytest.MonkeyPatch) -> None:
        alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
        for value in (ids.uuid7(), uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)):
            monkeypatch.setattr(ids, "uuid7", lambda value=value: value)
            body = ids.new_id("org").removeprefix("org_")
            assert sum(alphabet.index(char) << 5 * place for place, char in enumerate(reversed(body))) == value.int

    def test_nothing_was_made_before_1970(self) -> None:
        assert ids.first_id("evt", -5.0) == "evt_" + 26 * "0"
        assert ids.first_id("evt", time.time() - 1) < ids.new_id("evt") < ids.first_id("evt", time.time() + 1)


class TestTokens:
    @pytest.mark.parametrize(
        ("body", "check"),
        [("0123456789ABCDEFGHIJKLMNOPQRST", "4PMbyp"), ("zQWBuTSOoRi4A9spHcVY5ncnsDkxkJ", "0mLq17")],
    )
    def test_known_checksums(self, body: str, check: str) -> None:
        assert ids.checksum(body) == check
        assert ids.check_token(f"tnl_agt_{body}{check}") == "agt"

    @pytest.mark.parametrize("kind", sorted(ids.TOKEN_KINDS))
    def test_made_tokens_check(self, kind: str) -> None:
        token = ids.new_token(kind)
        assert ids.check_token(token) == kind
        assert token.startswith(f"tnl_{kind}_")
        assert ids.display_prefix(token) == token[: len(f"tnl_{kind}_") + 4]

    def test_every_single_changed_character_is_noticed(self) -> None:
        token = ids.new_token("sk")
        start = len("tnl_sk_")
        for at in range(start, len(token)):
            other = "0" if token[at] != "0" else "1"
            assert ids.check_token(token[:at] + other + token[at + 1 :]) is None

    @pytest.mark.parametrize(
        "text", ["", "tnl_", "tnl_agt_", "tnl_agt_" + "é" * 36, "tnl_xxx_" + "0" * 36, "tnl_agt_" + "0" * 37, "_" * 80]
    )
    def test_noise_is_none(self, text: str) -> None:
        assert ids.check_token(text) is None

    def test_unknown_kind_is_a_programming_error(self) -> None:
        with pytest.raises(ValueError, match="kind"):
            ids.new_token("nope")

    def test_digest_is_sha256(self) -> None:
        assert ids.digest("abc").hex().startswith("ba7816bf8f01cfea")
