"""Policy at the API: read from a document or a text, completed from what is stored, every fault with its place."""

from __future__ import annotations

from typing import Any

import pytest

from portico.control.identity.plans import Entitlements
from portico.control.tunnels import policy
from portico.control.tunnels.policy import Wanted
from portico.errors import Problem
from portico.settings import ApiSettings, Secret
from tests.wire.test_policy import DIGEST, PEM

ALICE = {"basic_auth": {"users": [{"name": "alice", "digest": DIGEST}]}}


def errors(written: dict[str, Any] | str) -> list[dict[str, Any]]:
    with pytest.raises(Problem) as caught:
        policy.read(written)
    assert caught.value.code == "tunnel.policy_invalid"
    assert caught.value.extra["path"] == caught.value.extra["errors"][0]["path"]
    return list(caught.value.extra["errors"])


class TestRead:
    def test_a_document_and_its_text_are_the_same(self) -> None:
        document = {"concurrency": 5, "addresses": {"rules": [{"allow": "10.0.0.0/8"}]}}
        yaml = "version: 1\nconcurrency: 5\naddresses:\n  rules:\n    - allow: 10.0.0.0/8\n"
        assert policy.read(document).document == policy.read(yaml).document == document
        assert (
            policy.read('{"concurrency": 5,\n\t"addresses": {"rules": [{"allow": "10.0.0.0/8"}]}}').document == document
        )
        assert policy.read("") == policy.read("# nothing") == Wanted({})

    def test_every_fault_of_a_text_has_its_place(self) -> None:
        text = "concurrency: 0\naddresses:\n  rules:\n    - allow: 10.0.0.0/8\n    - deny: 10.0.0.1/8\nqueue:\n  requests: 5\n"
        assert [(e["path"], e["line"], e["column"]) for e in errors(text)] == [
            ("concurrency", 1, 1),
            ("addresses.rules[1].deny", 5, 7),
            ("queue", 6, 1),  # what is missing stands nowhere: the place is that of its map
        ]
        common = {"field", "message", "type"}  # of every fault of a request
        assert all(set(e) == common | {"path", "line", "column", "detail"} for e in errors(text))
        assert [set(e) for e in errors({"concurrency": 0})] == [common | {"path", "detail"}]

    @pytest.mark.parametrize(
        ("text", "line", "column"),
        [
            ("a: [1,\nb: 2", 2, 5),
            ("concurrency: 5\nconcurrency: 6\n", 2, 1),
            ("a: &x [1]\nb: *x\n", 2, 4),
            ("[" * 50, 1, 21),
            ("a\x07: 1", 1, 2),
        ],
    )
    def test_text_that_is_no_policy(self, text: str, line: int, column: int) -> None:
        first = errors(text)[0]
        assert (first["line"], first["column"]) == (line, column), first

    def test_a_long_text(self) -> None:
        assert "65536" in errors("#" * 65_537)[0]["detail"]

    def test_certificates_are_certificates(self) -> None:
        assert [e["path"] for e in errors({"client_certificates": {"ca": PEM}})] == ["client_certificates.ca"]


class TestSettle:
    def test_a_user_by_name_alone_keeps_the_password(self) -> None:
        shown = policy.shown(ALICE | {"concurrency": 5})
        assert shown == {"basic_auth": {"users": [{"name": "alice"}]}, "concurrency": 5}
        settled, mark = policy.read(shown).settle("http", ALICE)
        assert settled == ALICE | {"concurrency": 5} and mark == policy.digest(settled)

    def test_a_user_without_any_password(self) -> None:
        wanted = policy.read("basic_auth:\n  users:\n    - name: bob\n")
        with pytest.raises(Problem) as caught:
            wanted.settle("http", ALICE)
        ((error),) = caught.value.extra["errors"]
        assert (error["path"], error["line"]) == ("basic_auth.users[0]", 3)

    def test_what_a_tcp_tunnel_cannot_enforce(self) -> None:
        with pytest.raises(Problem) as caught:
            policy.read(ALICE).settle("tcp", {})
        assert [error["path"] for error in caught.value.extra["errors"]] == ["basic_auth"]

    def test_digests_take_the_place_of_passwords(self) -> None:
        wanted = policy.read(
            {"basic_auth": {"users": [{"name": "a", "password": "one"}, {"name": "b", "digest": DIGEST}]}}
        )
        assert wanted.passwords() == [("a", "one")]
        made = wanted.with_digests({("a", "one"): DIGEST})
        assert made.passwords() == [] and "one" not in str(made.settle("http", {}))

    def test_a_policy_that_digests_make_too_large(self) -> None:
        users = [{"name": f"{index:02}" + "n" * 60, "password": "p"} for index in range(20)]
        headers = {"response": {"add": [{"name": "X-Long", "value": "x" * 1000}] * 5}}
        wanted = policy.read({"basic_auth": {"users": users}, "headers": headers})
        made = wanted.with_digests(dict.fromkeys(wanted.passwords(), DIGEST))
        with pytest.raises(Problem) as caught:
            made.settle("http", {})
        assert caught.value.extra["path"] == "" and "8192" in caught.value.detail


def entitled(**limits: int | None) -> Entitlements:
    return Entitlements("org_1", "mine", 1, "Mine", False, limits, frozenset(), 0)


class TestLimits:
    def test_are_the_plans(self) -> None:
        settings = ApiSettings(database_url=Secret("postgresql://x"), master_key=Secret("x"))
        held = entitled(concurrency=None, connections=5000)
        assert policy.limits(settings, "http", held) == {"concurrency": 100}
        assert policy.limits(settings, "tcp", held) == policy.limits(settings, "tls", held) == {"concurrency": 1000}
        held = entitled(concurrency=9, connections=8, requests_per_second=7)
        rates = {"org_requests": 7, "org_burst": 14}
        assert policy.limits(settings, "http", held) == {"concurrency": 9, **rates}
        assert policy.limits(settings, "tcp", held) == {"concurrency": 8, **rates}

    def test_of_an_organization(self) -> None:
        settings = ApiSettings(
            database_url=Secret("postgresql://x"), master_key=Secret("x"), organization_requests_per_second=50
        )
        rates = {"org_requests": 50, "org_burst": 100}
        assert policy.limits(settings, "http", entitled()) == {"concurrency": 100, **rates}
        assert policy.limits(settings, "http", entitled(requests_per_second=500)) == {"concurrency": 100, **rates}
