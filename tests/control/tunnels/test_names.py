"""Names: what is valid, what is reserved, and what is made up."""

from __future__ import annotations

import pytest

from portico.control.tunnels import names
from portico.errors import Problem


@pytest.mark.parametrize("good", ["a", "0", "web", "a-b", "a--b", "x" * 63, "1-2-3"])
def test_valid_subdomains(good: str) -> None:
    assert names.check_subdomain(good) == good == names.check_name(good)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "ab",
        "-a-",
        "a-",
        "-ab",
        "A-b",
        "a.b",
        "a_b",
        "a b",
        "x" * 64,
        "web\n",
        "ünï",
        "xn--bcher-kva",
        "а-б",
        "web\0",
    ],
)
def test_invalid_subdomains(bad: str) -> None:
    with pytest.raises(Problem) as caught:
        names.check_subdomain(bad)
    assert caught.value.code == "tunnel.name_invalid"
    assert not names.usable(bad)


def test_a_name_may_have_two_letters() -> None:
    assert names.check_name("ab") == "ab" and not names.usable("ab")


@pytest.mark.parametrize("word", ["www", "api", "admin", "portico", "mail", "localhost", "autodiscover", "login"])
def test_reserved(word: str) -> None:
    with pytest.raises(Problem) as caught:
        names.check_subdomain(word)
    assert caught.value.code == "tunnel.name_reserved"


def test_every_reserved_word_could_be_a_subdomain() -> None:
    """A word that no subdomain can be would be in the list for nothing; short host names of mail and DNS are the exception."""
    unusable = {word for word in names.RESERVED if not names._SUBDOMAIN.fullmatch(word)}
    assert unusable <= {"id", "mx", "ns"}


def test_made_up_names_are_valid_and_differ() -> None:
    made = {names.random_name() for _ in range(2000)}
    assert len(made) > 1990
    assert all(names.usable(name) for name in made)


@pytest.mark.parametrize("name", ["web", "ab", "www", "x" * 63, "xn--abc", "a-" + "b" * 57 + "-cdef"])
def test_a_suffix_makes_any_name_usable(name: str) -> None:
    made = names.with_suffix(name)
    assert names.usable(made) and made != name
