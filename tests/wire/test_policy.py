"""The policy document: every key, every fault with its path, one spelling for equal policies."""

from __future__ import annotations

import base64
import copy
import ipaddress
import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.wire import policy, policy_check
from portico.wire.policy import Policy, PolicyInvalid

DIGEST = "$argon2id$v=19$m=65536,t=3,p=4$" + "c2FsdHNhbHRzYWx0c2FsdA" + "$" + "A" * 43
DER = b"\x30\x82\x01\x00" + bytes(256)
PEM = f"-----BEGIN CERTIFICATE-----\n{base64.b64encode(DER).decode()}\n-----END CERTIFICATE-----\n"
FULL: dict[str, Any] = {
    "version": 1,
    "concurrency": 50,
    "queue": {"requests": 10, "seconds": 2.5},
    "plain_http": "redirect",
    "basic_auth": {"realm": "Staging", "users": [{"name": "alice", "digest": DIGEST}]},
    "client_certificates": {"ca": PEM},
    "addresses": {"rules": [{"allow": "10.0.0.0/8"}, {"deny": "2001:db8::/32"}], "otherwise": "deny"},
    "rate_limits": {"tunnel": {"requests": 100, "seconds": 1, "burst": 200}, "client": {"requests": 10}},
    "headers": {
        "host": "rewrite",
        "request": {"remove": ["X-Debug", "x-debug"], "add": [{"name": "X-Env", "value": "test"}]},
        "response": {"remove": ["Server"], "add": [{"name": "X-Frame-Options", "value": "DENY"}]},
    },
}
BAD_DIGESTS = [
    "", "secret", DIGEST.replace("65536", "4194304"), DIGEST.replace("t=3", "t=99"), DIGEST.replace("2id", "2i"),
    DIGEST + "=", DIGEST + "\n",
]  # fmt: skip
BAD_CERTIFICATES = [
    "", 5, "PEM", PEM[:-20], PEM.replace("CERTIFICATE", "PRIVATE KEY"), PEM.replace("AAAA", "AA!A", 1),
    PEM.replace("MIIB", "MIID"), PEM * 9, PEM + "-----BEGIN CERTIFICATE-----",
]  # fmt: skip
BAD_NETWORKS = [
    "10.0.0.0/33", "10.0.0.0/255.0.0.0", "fe80::1%eth0", "localhost", "", "1", "10.0.0.0/-1", " 10.0.0.0/8", 167772160, ["::"],
]  # fmt: skip
BAD_NAMES = [
    "", "a b", "a:", "ä", "x" * 65, 5, "Connection", "TRANSFER-ENCODING", "content-length", "portico-error",
    "X-Forwarded-For", "x-forwarded-anything", "Forwarded", "X-Request-Id",
]  # fmt: skip


def faults(document: object) -> list[tuple[str, str]]:
    with pytest.raises(PolicyInvalid) as caught:
        policy.canonical(document)
    return [(fault.path, fault.message) for fault in caught.value.faults]


def changed(path: str, value: Any) -> dict[str, Any]:
    """FULL with the member at ``path`` replaced."""
    document: Any = copy.deepcopy(FULL)
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    inner = document
    for part in parents:
        inner = inner[part]
    inner[last] = value
    return dict(document)


class TestParse:
    def test_an_empty_document_is_a_tunnel_without_policy(self) -> None:
        assert policy.parse({}) == policy.parse({"version": 1}) == Policy()

    def test_every_key(self) -> None:
        parsed = policy.parse(FULL)
        assert parsed == Policy(
            concurrency=50,
            queue=policy.Queue(10, 2.5),
            plain_http="redirect",
            basic_auth=policy.BasicAuth("Staging", (policy.User("alice", DIGEST),)),
            client_ca=parsed.client_ca,
            addresses=policy.Addresses(
                (
                    policy.AddressRule(True, ipaddress.ip_network("10.0.0.0/8")),
                    policy.AddressRule(False, ipaddress.ip_network("2001:db8::/32")),
                ),
                False,
            ),
            tunnel_rate=policy.Rate(100, 1, 200),
            client_rate=policy.Rate(10, 1, 10),
            host="rewrite",
            request=policy.HeaderRules(frozenset({"x-debug"}), (("X-Env", "test"),)),
            response=policy.HeaderRules(frozenset({"server"}), (("X-Frame-Options", "DENY"),)),
        )
        assert parsed.client_ca is not None and base64.b64decode("".join(parsed.client_ca.split("\n")[1:-2])) == DER

    def test_a_user_needs_a_digest(self) -> None:
        for user in ({"name": "a", "password": "secret"}, {"name": "a"}):
            document = {"basic_auth": {"users": [user]}}
            assert policy.canonical(document) == document
            with pytest.raises(PolicyInvalid) as caught:
                policy.parse(document)
            assert [fault.path for fault in caught.value.faults] == ["basic_auth.users[0]"]

    def test_a_list_of_friends_keeps_others_out_and_a_list_of_foes_does_not(self) -> None:
        friends = policy.parse({"addresses": {"rules": [{"deny": "10.1.0.0/16"}, {"allow": "10.0.0.0/8"}]}}).addresses
        foes = policy.parse({"addresses": {"rules": [{"deny": "10.0.0.0/8"}]}}).addresses
        assert friends is not None and not friends.otherwise
        assert foes is not None and foes.otherwise


class TestCanonical:
    def test_defaults_are_left_out(self) -> None:
        document = {
            "version": 1, "plain_http": "allow", "headers": {"host": "preserve", "request": {}, "response": {"add": []}},
            "addresses": {"rules": [{"allow": "10.0.0.0/8"}], "otherwise": "deny"},
            "basic_auth": {"realm": "Portico", "users": [{"name": "a", "digest": DIGEST}]},
            "rate_limits": {"tunnel": {"requests": 5, "seconds": 1.0, "burst": 5}},
        }  # fmt: skip
        assert policy.canonical(document) == {
            "addresses": {"rules": [{"allow": "10.0.0.0/8"}]},
            "basic_auth": {"users": [{"name": "a", "digest": DIGEST}]},
            "rate_limits": {"tunnel": {"requests": 5}},
        }
        assert policy.canonical({"addresses": {"rules": [], "otherwise": "allow"}}) == {}
        assert policy.canonical({"addresses": {"otherwise": "deny"}}) == {"addresses": {"otherwise": "deny"}}

    @pytest.mark.parametrize(
        ("written", "stored"),
        [
            ("10.1.2.3", "10.1.2.3/32"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:192.0.2.1", "192.0.2.1/32"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("2001:DB8:0::/48", "2001:db8::/48"),
            ("::/0", "::/0"),
        ],
    )
    def test_one_spelling_of_networks(self, written: str, stored: str) -> None:
        assert policy.canonical({"addresses": {"rules": [{"deny": written}]}})["addresses"]["rules"] == [
            {"deny": stored}
        ]

    def test_ca_certificates_in_one_spelling(self) -> None:
        text = "subject=/CN=test\n" + PEM.replace("\n", "\r\n") * 2 + "trailing text"
        stored = policy.canonical({"client_certificates": {"ca": text}})
        assert stored["client_certificates"]["ca"].count("BEGIN CERTIFICATE") == 2
        assert max(map(len, stored["client_certificates"]["ca"].splitlines())) == 64
        assert policy.canonical(stored) == stored

    def test_equal_documents_equal_hashes(self) -> None:
        turned = dict(reversed(policy.canonical(FULL).items()))
        assert policy.digest(turned) == policy.digest(policy.canonical(FULL))
        assert policy.digest({}) == "44136fa355b3678a1146ad16f7e8649e"  # as rows made by earlier versions have it
        assert policy.digest(policy.canonical(changed("concurrency", 51))) != policy.digest(turned)


class TestFaults:
    def test_all_of_them_at_once(self) -> None:
        document = {
            "concurency": 1,
            "queue": {"requests": 0},
            "basic_auth": {
                "users": [{"name": "a:b", "password": 1234}, {"name": "x", "password": "p", "digest": DIGEST}]
            },
            "addresses": {"rules": [{"allow": "10.0.0.1/8"}, {"deny": "x", "allow": "::"}, {"deny": 10}]},
            "headers": {"request": {"remove": ["Host"], "add": [{"name": "A b", "value": "c\r\nd"}]}},
        }
        assert [path for path, _ in faults(document)] == [
            "concurency", "queue", "queue.requests", "basic_auth.users[0].name", "basic_auth.users[0].password",
            "basic_auth.users[1]", "addresses.rules[0].allow", "addresses.rules[1]", "addresses.rules[1].deny",
            "addresses.rules[2].deny", "headers.request.remove[0]", "headers.request.add[0].name",
            "headers.request.add[0].value",
        ]  # fmt: skip

    def test_they_say_what_to_write(self) -> None:
        assert faults({"addresses": {"rules": [{"allow": "10.1.2.3/8"}]}}) == [
            ("addresses.rules[0].allow", "'10.1.2.3/8' has bits set beyond its prefix; the network is 10.0.0.0/8")
        ]
        assert "do you mean concurrency?" in faults({"concurency": 1})[0][1]
        assert "in quotes" in faults({"basic_auth": {"users": [{"name": "a", "password": 1234}]}})[0][1]

    @pytest.mark.parametrize("document", [None, [], "text", 5, True])
    def test_what_is_no_map(self, document: object) -> None:
        assert [path for path, _ in faults(document)] == [""]

    @pytest.mark.parametrize(
        ("path", "values"),
        [
            ("version", [2, 0, True, "1", None]),
            ("concurrency", [0, -1, 1.5, True, "5", None, 100_001]),
            ("queue.requests", [0, 1001, "5"]),
            ("queue.seconds", [0, -1, 31, True, "1", float("nan"), float("inf")]),
            ("plain_http", ["Allow", "", None, True, ["allow"]]),
            ("basic_auth.realm", ["", "x" * 65, 'a"b', "a\\b", "ä", "a\nb", 5]),
            ("basic_auth.users", [[], {}, "alice", [{"name": "a", "digest": DIGEST}] * 2, [{"name": str(i)} for i in range(21)]]),
            ("basic_auth.users.0.name", ["", "a:b", "a\x00b", "\ud800", "x" * 65, 5]),
            ("basic_auth.users.0.digest", BAD_DIGESTS),
            ("client_certificates.ca", BAD_CERTIFICATES),
            ("addresses.rules.0.allow", BAD_NETWORKS),
            ("addresses.rules", [{}, [{}], [{"allow": "::", "deny": "::"}], [["::"]], [{"deny": "::"}] * 101]),
            ("addresses.otherwise", ["maybe", True, None]),
            ("rate_limits.tunnel", [{}, 5, {"seconds": 1}, {"requests": 0}, {"requests": 1, "per": 1}]),
            ("rate_limits.client.burst", [0, 1_000_001, "5"]),
            ("headers.host", ["", "a b", "a/b", "http://a", "a:99999", "ä", "a\n", 5]),
            ("headers.request.remove.0", BAD_NAMES),
            ("headers.response.add.0.name", ["Portico-Error", "Transfer-Encoding", "Upgrade", ":status"]),
            ("headers.response.add.0.value", ["a\nb", "a\x00", " a", "ä", 5, None, "x" * 1025, "a\tb"]),
            ("headers.request.add", [[{"name": "A"}], ["A: b"], {"A": "b"}, [{"name": "A", "value": "b", "if": "c"}]]),
        ],
    )  # fmt: skip
    def test_values(self, path: str, values: list[Any]) -> None:
        for value in values:
            found = faults(changed(path, value))
            assert found, value
            dotted = policy_path(path)
            assert all(at.startswith(dotted) or dotted.startswith(at) for at, _ in found), (value, found)

    def test_rules_of_one_direction_together(self) -> None:
        names = [f"X-{index}" for index in range(30)]
        document = {"headers": {"request": {"remove": names, "add": [{"name": n, "value": ""} for n in names]}}}
        assert faults(document) == [("headers.request", "has 60 header rules; at most 50")]

    def test_a_policy_fits_a_grant(self) -> None:
        names = [{"name": f"X-{index}", "value": "x" * 1000} for index in range(10)]
        ((path, message),) = faults({"headers": {"response": {"add": names}}})
        assert path == "" and str(policy_check.MAX_POLICY_BYTES) in message

    def test_they_are_bounded(self) -> None:
        assert len(faults({f"key{index}": 1 for index in range(1000)})) == policy_check.MAX_FAULTS
        deep: Any = []
        for _ in range(5000):
            deep = [deep]
        assert len(faults({"concurrency": deep, "plain_http": 10**5000, "\x1b[2J": 1})) == 3

    def test_what_a_terminal_would_obey_is_escaped(self) -> None:
        ((path, message),) = faults({"\x1b[2J\ud800": 1})
        assert (path + message).isprintable() and path.isascii()


def policy_path(dotted: str) -> str:
    return "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in dotted.split("."))[1:]


class TestProtocols:
    def test_what_a_connection_cannot_enforce(self) -> None:
        found = policy_check.check_protocol(policy.canonical(FULL), "tcp")
        assert [fault.path for fault in found] == [
            "queue",
            "plain_http",
            "basic_auth",
            "client_certificates",
            "headers",
        ]
        assert policy_check.check_protocol(FULL, "http") == []
        allowed = {key: FULL[key] for key in ("version", "concurrency", "addresses", "rate_limits")}
        assert policy_check.check_protocol(allowed, "tls") == []


# ── properties ────────────────────────────────────────────────────────────────────────────────────────────────────────
token = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=20).map(lambda text: "X-" + text)


def network(address: tuple[int, int] | tuple[bytes, int]) -> str:
    return str(ipaddress.ip_network(address, strict=False))


ipv4 = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(network)
ipv6 = st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 128)).map(network)
rule = st.dictionaries(st.sampled_from(["allow", "deny"]), ipv4 | ipv6, min_size=1, max_size=1)
rate = st.fixed_dictionaries(
    {"requests": st.integers(1, 1000)}, optional={"seconds": st.floats(0.5, 60), "burst": st.integers(1, 1000)}
)
value = st.text(string.ascii_letters + " ;=", max_size=20).map(str.strip)
header_rules = st.fixed_dictionaries(
    {}, optional={
        "remove": st.lists(token, max_size=5),
        "add": st.lists(st.fixed_dictionaries({"name": token, "value": value}), max_size=5),
    },
)  # fmt: skip
names = st.lists(st.text(string.ascii_letters + "äß ", min_size=1, max_size=8), min_size=1, max_size=4, unique=True)
valid = st.fixed_dictionaries(
    {}, optional={
        "version": st.just(1),
        "concurrency": st.integers(1, 100_000),
        "queue": st.fixed_dictionaries({"requests": st.integers(1, 1000), "seconds": st.floats(0.001, 30)}),
        "plain_http": st.sampled_from(policy_check.PLAIN_HTTP),
        "basic_auth": st.fixed_dictionaries(
            {"users": names.map(lambda found: [{"name": name, "digest": DIGEST} for name in found])},
            optional={"realm": st.text(string.ascii_letters, min_size=1, max_size=8)},
        ),
        "client_certificates": st.just({"ca": PEM}),
        "addresses": st.fixed_dictionaries(
            {"rules": st.lists(rule, max_size=6)},
            optional={"otherwise": st.sampled_from(["allow", "deny"])},
        ),
        "rate_limits": st.fixed_dictionaries({}, optional={"tunnel": rate, "client": rate}),
        "headers": st.fixed_dictionaries(
            {}, optional={"host": st.sampled_from(["preserve", "rewrite", "app.test:8080"]),
                          "request": header_rules, "response": header_rules},
        ),
    },
)  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
known_keys = st.sampled_from([
    "version", "concurrency", "queue", "basic_auth", "users", "name", "password", "digest", "addresses", "rules", "allow", "deny",
    "headers", "request", "add", "remove", "value", "client_certificates", "ca", "rate_limits", "tunnel", "requests", "seconds",
])  # fmt: skip
shaped = st.recursive(
    anything, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(known_keys, inner, max_size=5), max_leaves=20
)


class TestProperties:
    @given(valid)
    def test_canonical_is_idempotent_and_means_the_same(self, document: dict[str, Any]) -> None:
        clean = policy.canonical(document)
        assert policy.canonical(clean) == clean
        assert policy.canonical(json.loads(json.dumps(clean))) == clean
        assert policy.parse(document) == policy.parse(clean)

    @given(st.one_of(anything, shaped))
    def test_whatever_is_written_is_a_policy_or_faults_with_paths(self, document: object) -> None:
        try:
            clean = policy.canonical(document)
        except PolicyInvalid as err:
            assert err.faults and all(fault.message for fault in err.faults)
            assert all(fault.path.isprintable() and fault.message.isprintable() for fault in err.faults)
        else:
            json.dumps(clean).encode()
            assert policy.canonical(clean) == clean
