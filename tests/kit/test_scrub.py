"""What looks like a secret does not pass."""

from __future__ import annotations

import pytest

from portico.kit import ids, scrub
from portico.kit.jwt import SigningKey

SECRETS = [
    *(ids.new_token(kind) for kind in sorted(ids.TOKEN_KINDS)),
    SigningKey.generate().sign("at+jwt", {"sub": "usr_1"}),
    "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$RdescudvJCsgt3ub+b4dWRWJTmaaJObG",
    "$2b$12$abcdefghijklmnopqrstuuOq1PzQ3xkL8mWn0v7cJd5rT9sYbE2aG",
    "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END PRIVATE KEY-----",
    "-----BEGIN EC PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBC",  # cut off
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
]


@pytest.mark.parametrize("secret", SECRETS, ids=map(str, range(len(SECRETS))))  # the same in every process
def test_secrets_are_masked_wherever_they_stand(secret: str) -> None:
    found = scrub.value({"a": [f"before {secret} after", {"b": secret}], secret: 1, "c": (secret,)})
    assert secret not in str(found)
    assert found["a"][0] == f"before {scrub.MASK} after" or "BEGIN EC" in secret
    assert found["a"][1] == {"b": scrub.MASK}


def test_a_password_in_a_url_is_masked() -> None:
    assert scrub.text("http://me:hunter2@proxy.example:3128/") == "http://[masked]@proxy.example:3128/"


@pytest.mark.parametrize(
    "text", ["tun_01jd2x8k3nf0v4q5w6e7r8t9ya", "tnl_agt_Ab3d", "eyJhIjox", "a@b.example", "$5 a day"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert scrub.text(text) == text
