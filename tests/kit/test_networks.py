"""Whom an address stands for."""

from __future__ import annotations

import pytest

from portico.kit.networks import allows, canonical, covers, is_loopback, network, plain


@pytest.mark.parametrize(
    ("address", "whom"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("", ""),
        ("not an address", "not an address"),
    ],
)
def test_an_ipv6_customer_is_a_64(address: str, whom: str) -> None:
    assert network(address) == whom


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("", True), ("::1234", False), ("12.7.0.1", False)],
)
def test_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7:443", "192.0.2.7"),
        ("2001:DB8::1", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("unknown", "unknown"),
        ("[nonsense", "[nonsense"),
        ("", ""),
    ],
)
def test_an_address_as_proxies_write_it(text: str, address: str) -> None:
    assert plain(text) == address


class TestLists:
    @pytest.mark.parametrize(
        ("text", "stored"),
        [
            ("192.0.2.7", "192.0.2.7/32"),
            ("192.0.2.7/24", "192.0.2.0/24"),
            ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::/95", "::/95"),
            ("2001:DB8::/32", "2001:db8::/32"),
        ],
    )
    def test_canonical(self, text: str, stored: str) -> None:
        assert canonical(text) == stored == canonical(stored)

    @pytest.mark.parametrize("text", ["", "x", "10.0.0.0/33", "010.0.0.1", "fe80::1%1", "10.0.0.0/255.0.0.x", "::/129"])
    def test_not_a_network(self, text: str) -> None:
        with pytest.raises(ValueError):
            canonical(text)

    def test_allows(self) -> None:
        assert allows([], None) and allows([], "unknown")
        allowed = ["192.0.2.0/24", "2001:db8::/32"]
        assert all(allows(allowed, text) for text in ("192.0.2.255", "::ffff:192.0.2.1", "2001:db8::1"))
        assert not any(allows(allowed, text) for text in ("192.0.3.0", "::1", "::192.0.2.1", "", None, "unknown"))
        assert not allows(["::/0"], "192.0.2.1") and not allows(["0.0.0.0/0"], "::1")

    def test_covers(self) -> None:
        assert covers([], []) and covers([], ["0.0.0.0/0"])
        assert covers(["10.0.0.0/8", "::/0"], ["10.1.0.0/16", "2001:db8::/32"])
        assert not covers(["10.0.0.0/8"], [])
        assert not covers(["10.0.0.0/8"], ["10.0.0.0/7"])
        assert not covers(["10.0.0.0/8"], ["10.0.0.0/8", "::/0"])
