"""wire.grants: what a relay believes, and everything that it must not."""

from __future__ import annotations

from typing import Any

import pytest

from portico.errors import Problem
from portico.kit.jwt import KeySet, SigningKey
from portico.wire import frames, grants
from portico.wire.grants import GrantHost, verify_grant, verify_session
from portico.wire.policy_check import MAX_POLICY_BYTES

NOW = 1_800_000_000
LIFE = 900


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(scope="module")
def keys(key: SigningKey) -> KeySet:
    return KeySet.of([key])


def session(**change: Any) -> dict[str, Any]:
    claims = grants.session_claims(
        key="key_1", session="ses_1", organization="org_1", agent="agt-1", region=None, generation=3, now=NOW, life=LIFE
    )
    return {**claims, **change}


def grant(**change: Any) -> dict[str, Any]:
    claims = grants.grant_claims(
        session="ses_1", organization="org_1", tunnel="tun_1", name="web", protocol="http",
        hosts=[{"host": "web.localhost", "tls": "terminate"}], limits={"concurrency": 100}, generation=2,
        policy_hash="abc", policy={}, policy_version=3, url="http://web.localhost:7080", now=NOW, life=LIFE,
    )  # fmt: skip
    return {**claims, **change}


def signed(key: SigningKey, claims: dict[str, Any]) -> str:
    return key.sign(grants.GRANT_TYP if "tun" in claims else grants.SESSION_TYP, claims)


def refusal(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(Problem) as caught:
        call(*args, **kwargs)
    return caught.value.code


class TestSession:
    def test_valid(self, key: SigningKey, keys: KeySet) -> None:
        claims = verify_session(signed(key, session(region="eu")), keys, NOW)
        assert (claims.sid, claims.org, claims.agent, claims.gen, claims.region) == ("ses_1", "org_1", "agt-1", 3, "eu")
        assert claims.exp == NOW + LIFE

    def test_a_grant_is_not_a_session(self, key: SigningKey, keys: KeySet) -> None:
        token = key.sign(grants.GRANT_TYP, session())
        assert refusal(verify_session, token, keys, NOW) == "session.token_invalid"

    def test_unknown_key(self, keys: KeySet) -> None:
        assert refusal(verify_session, signed(SigningKey.generate(), session()), keys, NOW) == "session.token_invalid"

    def test_a_retired_key_ends_its_tokens(self, key: SigningKey) -> None:
        rotated = KeySet.of([SigningKey.generate()])
        assert refusal(verify_session, signed(key, session()), rotated, NOW) == "session.token_invalid"

    @pytest.mark.parametrize("late", [0, LIFE, LIFE + 60])
    def test_valid_until_expiry_and_leeway(self, key: SigningKey, keys: KeySet, late: int) -> None:
        assert verify_session(signed(key, session()), keys, NOW + late)

    def test_expired(self, key: SigningKey, keys: KeySet) -> None:
        token = signed(key, session())
        assert refusal(verify_session, token, keys, NOW + LIFE + 60.5) == "session.token_expired"
        assert refusal(verify_session, token, keys, NOW + LIFE + 1, leeway=0) == "session.token_expired"

    def test_grace_extends_expiry_and_nothing_else(self, key: SigningKey, keys: KeySet) -> None:
        token = signed(key, session())
        assert verify_session(token, keys, NOW + LIFE + 86_000, grace=86_400)
        assert refusal(verify_session, token, keys, NOW + LIFE + 86_500, grace=86_400) == "session.token_expired"
        assert refusal(verify_session, token, keys, NOW - 61, grace=86_400) == "session.token_invalid"

    @pytest.mark.parametrize("claim", ["nbf", "iat"])
    def test_from_the_future(self, key: SigningKey, keys: KeySet, claim: str) -> None:
        assert verify_session(signed(key, session(**{claim: NOW + 60})), keys, NOW)
        token = signed(key, session(**{claim: NOW + 61}))
        assert refusal(verify_session, token, keys, NOW) == "session.token_invalid"

    def test_a_life_that_ends_before_it_begins(self, key: SigningKey, keys: KeySet) -> None:
        assert refusal(verify_session, signed(key, session(exp=NOW)), keys, NOW) == "session.token_invalid"

    def test_oversize(self, keys: KeySet) -> None:
        assert refusal(verify_session, "a" * 5000, keys, NOW) == "session.token_invalid"


class TestGrant:
    def test_valid(self, key: SigningKey, keys: KeySet) -> None:
        claims = verify_grant(signed(key, grant(policy={"concurrency": 5})), keys, NOW)
        assert claims.hosts == (GrantHost("web.localhost", "terminate"),)
        assert (claims.tun, claims.name, claims.proto, claims.gen) == ("tun_1", "web", "http", 2)
        assert claims.limits == {"concurrency": 100} and claims.policy == {"concurrency": 5}
        assert claims.policy_version == 3

    def test_a_grant_of_an_earlier_version_has_no_policy_version(self, key: SigningKey, keys: KeySet) -> None:
        claims = grant()
        del claims["policy_version"]
        assert verify_grant(signed(key, claims), keys, NOW).policy_version == 0

    def test_the_largest_policy_fits_a_grant_and_a_frame(self, key: SigningKey, keys: KeySet) -> None:
        policy = {"client_certificates": {"ca": "x" * (MAX_POLICY_BYTES - 40)}}
        hosts = [{"host": f"{index:02}." + "a" * 60 + ".localhost", "tls": "terminate"} for index in range(16)]
        token = key.sign(grants.GRANT_TYP, grant(policy=policy, hosts=hosts), limit=grants.MAX_GRANT_BYTES)
        assert verify_grant(token, keys, NOW).policy == policy
        assert len(token) + 100 < frames.MAX_JSON

    def test_oversize(self, keys: KeySet) -> None:
        assert refusal(verify_grant, "a" * (grants.MAX_GRANT_BYTES + 1), keys, NOW) == "tunnel.grant_invalid"

    def test_a_session_is_not_a_grant(self, key: SigningKey, keys: KeySet) -> None:
        token = key.sign(grants.SESSION_TYP, grant())
        assert refusal(verify_grant, token, keys, NOW) == "tunnel.grant_invalid"

    def test_bound_to_its_session(self, key: SigningKey, keys: KeySet) -> None:
        mine = verify_session(signed(key, session()), keys, NOW)
        assert verify_grant(signed(key, grant()), keys, NOW, session=mine)
        for change in ({"sid": "ses_2"}, {"org": "org_2"}):
            assert (
                refusal(verify_grant, signed(key, grant(**change)), keys, NOW, session=mine) == "tunnel.grant_invalid"
            )

    def test_expired_and_grace(self, key: SigningKey, keys: KeySet) -> None:
        token = signed(key, grant())
        assert refusal(verify_grant, token, keys, NOW + LIFE + 61) == "tunnel.grant_expired"
        assert verify_grant(token, keys, NOW + LIFE + 61, grace=3600)

    def test_from_the_future(self, key: SigningKey, keys: KeySet) -> None:
        assert refusal(verify_grant, signed(key, grant(nbf=NOW + 61)), keys, NOW) == "tunnel.grant_invalid"


TEXTS = (None, "", "x" * 400, 5, True, ["x"], {"x": 1})
NUMBERS = (None, "5", 1.5, True, -1, 2**60, [1], {})
SESSION_TIMES = [(name, bad) for name in ("iat", "nbf", "exp", "gen") for bad in NUMBERS]
SESSION_TEXTS = [(name, bad) for name in ("sub", "sid", "org", "agent") for bad in TEXTS]
GRANT_TEXTS = [(name, bad) for name in ("sid", "org", "tun", "name", "policy_hash", "url") for bad in TEXTS]
FIXED = [(name, bad) for name in ("iss", "aud") for bad in (None, "other", ["portico", "relay"], 1)]


class TestMalformedClaims:
    """A right signature does not make a claim right: each is a refusal and never another exception."""

    @pytest.mark.parametrize(
        ("name", "bad"), [*SESSION_TEXTS, *SESSION_TIMES, *FIXED, ("region", ""), ("region", 5), ("region", ["eu"])]
    )
    def test_session(self, key: SigningKey, keys: KeySet, name: str, bad: Any) -> None:
        assert refusal(verify_session, signed(key, session(**{name: bad})), keys, NOW) == "session.token_invalid"

    @pytest.mark.parametrize("name", [name for name in session() if name != "region"])
    def test_session_without(self, key: SigningKey, keys: KeySet, name: str) -> None:
        claims = session()
        del claims[name]
        assert refusal(verify_session, signed(key, claims), keys, NOW) == "session.token_invalid"

    @pytest.mark.parametrize(
        ("name", "bad"),
        [
            *GRANT_TEXTS, *SESSION_TIMES, *FIXED,
            *[("proto", bad) for bad in (None, "udp", "HTTP", 1, ["http"], {})],
            *[("hosts", bad) for bad in (None, {}, "web.localhost", ["web.localhost"], [None])],
            *[("hosts", [{"host": "web.localhost", "tls": "terminate"}] * n) for n in (17,)],
            *[("hosts", [{"host": host, "tls": "terminate"}])
              for host in (None, 1, "", "Web.localhost", "web.localhost:80", "a..b", "a b", "a/b", "é", "a\n", ".a",
                           "a.", "x" * 64, "*a.b", ".".join(["a" * 60] * 5))],
            *[("hosts", [{"host": "web.localhost", "tls": tls}]) for tls in (None, "", "none", 1, ["terminate"])],
            *[("limits", bad) for bad in (None, [], 1, {"concurrency": "5"}, {"concurrency": -1}, {"concurrency": True},
                                          {"concurrency": None}, {str(n): 1 for n in range(33)})],
            *[("policy", bad) for bad in (None, [], "x", 1)],
            *[("policy_version", bad) for bad in NUMBERS],
        ],
    )  # fmt: skip
    def test_grant(self, key: SigningKey, keys: KeySet, name: str, bad: Any) -> None:
        assert refusal(verify_grant, signed(key, grant(**{name: bad})), keys, NOW) == "tunnel.grant_invalid"

    @pytest.mark.parametrize("name", [name for name in grant() if name != "policy_version"])
    def test_grant_without(self, key: SigningKey, keys: KeySet, name: str) -> None:
        claims = grant()
        del claims[name]
        token = key.sign(grants.GRANT_TYP, claims)
        assert refusal(verify_grant, token, keys, NOW) == "tunnel.grant_invalid"


def test_imports_stay_light() -> None:
    """Relays and agents import this module; it must not drag in the server's libraries."""
    import subprocess
    import sys

    program = (
        "import sys, portico.wire.grants\n"
        "heavy = {'sqlalchemy', 'asyncpg', 'fastapi', 'redis', 'pydantic', 'httpx', 'joserfc'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
