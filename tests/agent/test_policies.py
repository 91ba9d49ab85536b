"""What is short for a policy: compiled, joined with a file, masked, and said in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from portico.agent import policies
from portico.agent.policies import Contradiction, Sugar, SugarError
from portico.kit.jwt import SigningKey
from portico.wire import policy
from tests.wire.test_policy import DIGEST, FULL, PEM


class TestCompiled:
    def test_nothing(self) -> None:
        assert policies.compiled(Sugar()) == {} and not Sugar(basic_auth=[]).given()

    def test_everything(self, tmp_path: Path) -> None:
        cas = tmp_path / "cas.pem"
        cas.write_text(PEM)
        sugar = Sugar(
            basic_auth=["alice:pass:word", "bob:b"], deny_cidr=["10.1.0.0/16"], allow_cidr=["10.0.0.0/8", "::1"],
            host_header="app.test", request_header_remove=["X-Debug"], request_header_add=["X-Env: a: b"],
            response_header_remove=["Server"], response_header_add=["X-Empty:"], mutual_tls_cas=cas, plain_http="refuse",
        )  # fmt: skip
        assert sugar.given()
        assert policies.compiled(sugar) == policy.canonical({
            "basic_auth": {"users": [{"name": "alice", "password": "pass:word"}, {"name": "bob", "password": "b"}]},
            "addresses": {"rules": [{"deny": "10.1.0.0/16"}, {"allow": "10.0.0.0/8"}, {"allow": "::1/128"}]},
            "headers": {
                "host": "app.test",
                "request": {"remove": ["x-debug"], "add": [{"name": "X-Env", "value": "a: b"}]},
                "response": {"remove": ["server"], "add": [{"name": "X-Empty", "value": ""}]},
            },
            "client_certificates": {"ca": PEM},
            "plain_http": "refuse",
        })  # fmt: skip

    def test_to_keep_the_host_is_said_and_leaves_nothing(self) -> None:
        sugar = Sugar(host_header="preserve")
        assert sugar.given() and policies.compiled(sugar) == {}

    @pytest.mark.parametrize(
        ("sugar", "name"),
        [
            (Sugar(basic_auth=["secret-word"]), "basic_auth"),
            (Sugar(basic_auth=[":secret-word"]), "basic_auth"),
            (Sugar(basic_auth=["a:secret-word" + "x" * 200]), "basic_auth"),
            (Sugar(basic_auth=["a:secret-word\x07"]), "basic_auth"),
            (Sugar(basic_auth=["a:secret-word", "a:secret-word"]), "basic_auth"),
            (Sugar(allow_cidr=["10.0.0.1/8"]), "allow_cidr"),
            (Sugar(deny_cidr=["localhost"]), "deny_cidr"),
            (Sugar(allow_cidr=["10.0.0.0/8"] * 101), "allow_cidr"),
            (Sugar(host_header="a b"), "host_header"),
            (Sugar(request_header_add=["Host: a"]), "request_header_add"),
            (Sugar(request_header_add=["no-colon"]), "request_header_add"),
            (Sugar(response_header_remove=["Portico-Error"]), "response_header_remove"),
            (Sugar(response_header_add=["A: b"] * 51), "response_header_add"),
            (Sugar(mutual_tls_cas=Path("/nowhere/ca.pem")), "mutual_tls_cas"),
            (Sugar(mutual_tls_cas=Path(__file__)), "mutual_tls_cas"),
        ],
    )
    def test_faults_name_the_option_and_no_password(self, sugar: Sugar, name: str) -> None:
        with pytest.raises(SugarError) as caught:
            policies.compiled(sugar)
        assert caught.value.name == name and "secret-word" not in str(caught.value)


class TestMerged:
    def test_what_one_side_says_is_kept(self) -> None:
        written = policy.canonical({"concurrency": 5, "headers": {"response": {"remove": ["Server"]}}})
        short = policy.canonical(
            {"plain_http": "refuse", "headers": {"response": {"remove": ["Via"]}, "host": "rewrite"}}
        )
        assert policies.merged(written, short) == {
            "concurrency": 5, "plain_http": "refuse", "headers": {"response": {"remove": ["server", "via"]}, "host": "rewrite"},
        }  # fmt: skip
        assert written["headers"]["response"] == {"remove": ["server"]}, "the written one is left alone"

    def test_users_of_both(self) -> None:
        written = {"basic_auth": {"realm": "Staging", "users": [{"name": "a", "digest": DIGEST}]}}
        both = policies.merged(written, {"basic_auth": {"users": [{"name": "b", "password": "p"}]}})
        assert both["basic_auth"]["realm"] == "Staging" and [u["name"] for u in both["basic_auth"]["users"]] == [
            "a",
            "b",
        ]

    @pytest.mark.parametrize(
        ("written", "short"),
        [
            ({"basic_auth": {"users": [{"name": "a"}]}}, {"basic_auth": {"users": [{"name": "a", "password": "p"}]}}),
            ({"addresses": {"otherwise": "deny"}}, {"addresses": {"rules": [{"allow": "10.0.0.0/8"}]}}),
            ({"plain_http": "redirect"}, {"plain_http": "refuse"}),
            ({"headers": {"host": "rewrite"}}, {"headers": {"host": "app.test"}}),
            ({"client_certificates": {"ca": "a"}}, {"client_certificates": {"ca": "b"}}),
        ],
    )
    def test_contradictions(self, written: dict[str, Any], short: dict[str, Any]) -> None:
        with pytest.raises(Contradiction):
            policies.merged(written, short)


class TestFiles:
    def test_faults_have_places_in_the_order_of_the_text(self, tmp_path: Path) -> None:
        file = tmp_path / "policy.yml"
        file.write_text("queue: {requests: 1}\nconcurrency: 0\nhedaers: {}\n")
        assert [(line, column, path) for line, column, path, _ in policies.read_file(file).faults] == [
            (1, 1, "queue"), (2, 1, "concurrency"), (3, 1, "hedaers"),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("data", "line", "column"),
        [(b"a: [1,", 1, 7), (b"concurrency: 1\nx: \xff", 2, 4), (b"#" * 70_000, 0, 0), (b"a: 1\na: 2", 2, 1)],
    )
    def test_what_cannot_be_read(self, data: bytes, line: int, column: int) -> None:
        assert policies.read_text(data).faults[0][:2] == (line, column)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        assert policies.read_file(tmp_path / "none").faults == [(0, 0, "", "does not exist")]
        assert policies.read_file(tmp_path).faults[0][3].startswith("cannot be read")


class TestShown:
    def test_masked_without_a_secret(self) -> None:
        document = {"basic_auth": {"users": [{"name": "a", "password": "word"}, {"name": "b", "digest": DIGEST}]}}
        text = policies.as_yaml(policies.masked(document))
        assert "word: word" not in text and "argon2" not in text and text.count(policies.MASK) == 2
        assert document["basic_auth"]["users"][0]["password"] == "word"

    def test_yaml_that_is_the_same_policy(self) -> None:
        clean = policy.canonical(FULL)
        text = policies.as_yaml(clean)
        assert yaml.safe_load(text) == clean and "ca: |" in text

    @pytest.mark.parametrize(
        ("document", "line"),
        [
            ({}, ""),
            (FULL, "basic auth (1 user), client certificates, 2 address rules, 100 requests/s, 10 requests/s a client, "
             "50 at once, http goes to https, the target's Host, 4 header rules"),
            ({"addresses": {"otherwise": "deny"}, "plain_http": "refuse", "headers": {"host": "app.test"}},
             "nobody let in, https only, Host app.test"),
            ({"rate_limits": {"tunnel": {"requests": 1, "seconds": 60}}}, "1 request/60 s"),
        ],
    )  # fmt: skip
    def test_in_a_line(self, document: dict[str, Any], line: str) -> None:
        assert policies.summary(policy.canonical(document)) == line

    def test_of_a_grant(self) -> None:
        token = SigningKey.generate().sign("x", {"policy": {"concurrency": 5}})
        assert policies.summary_of_grant(token) == "5 at once"
        newer = SigningKey.generate().sign("x", {"policy": {"rules": [{"if": "true"}]}})
        assert policies.summary_of_grant(newer) == "set, in a way that this version cannot read"
        assert [policies.summary_of_grant(text) for text in ("web:1.0", "a.b.c", "")] == ["", "", ""]
