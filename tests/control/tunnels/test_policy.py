"""Policy: one validated document, canonical, hashed, and never wider than the plan."""

from __future__ import annotations

from typing import Any

import pytest

from portico.control.tunnels import policy
from portico.errors import Problem


def test_the_empty_policy() -> None:
    assert policy.check({}) == {} == policy.check({"version": 1})


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        ({"basic_auth": ["a:b"]}, "basic_auth"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": 100_001}, "concurrency"),
        ({"concurrency": "5"}, "concurrency"),
        ({"concurrency": 1.0}, "concurrency"),
        ({"concurrency": True}, "concurrency"),
        ({"concurrency": None}, "concurrency"),
        ({"version": 2}, "version"),
        ({"version": "1"}, "version"),
        ({"x" * 500: 1}, "x" * 80),
    ],
)
def test_refusals_name_the_path(bad: dict[str, Any], path: str) -> None:
    with pytest.raises(Problem) as caught:
        policy.check(bad)
    assert caught.value.code == "tunnel.policy_invalid" and caught.value.extra == {"path": path}


def test_equal_documents_have_equal_hashes() -> None:
    one = policy.digest(policy.check({"concurrency": 5, "version": 1}))
    assert one == policy.digest(policy.check({"version": 1, "concurrency": 5})) == policy.digest({"concurrency": 5})
    assert one != policy.digest({"concurrency": 6}) != policy.digest({})


@pytest.mark.parametrize(("document", "limit"), [({}, 100), ({"concurrency": 7}, 7), ({"concurrency": 5000}, 100)])
def test_a_policy_lowers_the_plans_limit_and_never_raises_it(document: dict[str, Any], limit: int) -> None:
    assert policy.limits(document, concurrency=100) == {"concurrency": limit}
