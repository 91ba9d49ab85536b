"""Names of tunnels: what is valid, and what is made up. Which of them may be public: ``test_name_rules.py``."""

from __future__ import annotations

import pytest

from portico.control.tunnels import names
from portico.control.tunnels.name_rules import NameRules
from portico.settings import ApiSettings, Secret


@pytest.fixture(scope="module")
def rules() -> NameRules:
    return NameRules.load(ApiSettings(Secret("postgresql://x/y"), Secret("x")))


def test_a_name_may_have_two_letters(rules: NameRules) -> None:
    assert names.check_name("ab") == "ab" and not rules.usable("ab")


def test_made_up_names_are_valid_and_differ(rules: NameRules) -> None:
    made = {names.random_name() for _ in range(2000)}
    assert len(made) > 1990
    assert sum(map(rules.usable, made)) > 1990  # who offers one looks at it first


@pytest.mark.parametrize("name", ["web", "ab", "www", "x" * 63, "xn--abc", "a-" + "b" * 57 + "-cdef"])
def test_a_suffix_makes_any_name_usable(name: str, rules: NameRules) -> None:
    made = [names.with_suffix(name) for _ in range(5)]
    assert any(map(rules.usable, made)) and name not in made
