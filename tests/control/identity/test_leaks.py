"""Reports of leaked credentials: believed by their signature alone, acted on once, and answered with true or false."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from portico.control.app import create_app
from portico.control.identity import scanner_keys
from portico.control.identity.tables import sign_in_sessions, support_consents, support_sessions
from portico.errors import Problem
from portico.kit.db import Database
from portico.kit.ids import digest, new_token
from portico.settings import ApiSettings
from portico.simulators.secret_scanning import SecretScanner
from tests.control.conftest import Account, MovableClock
from tests.control.test_http import problem

PATH = "/v1/secret-scanning/github"
# github/docs#18776.
KNOWN_BODY = b'[{"token":"some_token","type":"some_type","url":"some_url"}]'
KNOWN_KEY = "".join(
    (
        "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE9MJJHnMfn2+H4xL4YaPDA4RpJqUqkCmRCBnYERxZa",
        "nmcpzQSXs1X/AljlKkbJ8qpVIW4clayyef9gWhFbNHWAA==",
    )
)
KNOWN_SIGNATURE = "MEUCIQDKZokqnCjrRtw0tni+2Ltvl/uiMJ1EGumEsp1BsNr32AIgQY1YXD2nlj+XNfGK4rBfkMJ1JDOQcYXxa2sY8FNkrKc="


def known_document(tmp_path: Path) -> Path:
    key = load_der_public_key(base64.b64decode(KNOWN_KEY))
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"public_keys": [{"key_identifier": "known", "key": pem, "is_current": True}]}))
    return path


@pytest.fixture
async def scanner() -> AsyncIterator[SecretScanner]:
    async with SecretScanner() as made:
        yield made


@pytest.fixture
def settings(settings: ApiSettings, scanner: SecretScanner) -> ApiSettings:
    return replace(settings, secret_scanning_keys_url=scanner.url, secret_scanning_max_matches=50)


@pytest.fixture
def post(client: httpx.AsyncClient, scanner: SecretScanner) -> Callable[..., Any]:
    """Report tokens as the scanner does."""

    async def send(*tokens: str, **more: Any) -> list[dict[str, str]]:
        body, headers = scanner.report(tokens, **more)
        answer = await client.post(PATH, content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, str]] = answer.json()
        return found

    return send


def labels(answer: list[dict[str, str]]) -> list[bool]:
    return [row["label"] == "true_positive" for row in answer]


async def mails(db: Database) -> list[str]:
    async with db.read() as reader:
        rows = await reader.raw.fetch(
            "SELECT recipient FROM outbox_messages WHERE topic = 'key.leaked' AND driver = 'mail' ORDER BY id"
        )
    return [row["recipient"] for row in rows]


async def revocations(account: Account) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (await account.client.get("/v1/audit", params={"action": "key.revoke"})).json()["data"]
    return rows


class TestSignature:
    def test_known_answer(self) -> None:
        key = load_der_public_key(base64.b64decode(KNOWN_KEY))
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert scanner_keys.fits(key, KNOWN_SIGNATURE, KNOWN_BODY)
        assert not scanner_keys.fits(key, KNOWN_SIGNATURE, KNOWN_BODY.replace(b'":"', b'": "'))
        for bad in (
            "",
            "!",
            KNOWN_SIGNATURE[:-4],
            KNOWN_SIGNATURE + "\n",
            "A" * 5000,
            base64.b64encode(b"\0" * 64).decode(),
        ):
            assert not scanner_keys.fits(key, bad, KNOWN_BODY), bad

    async def test_known_report_with_keys_of_a_file(self, settings: ApiSettings, db: Database, tmp_path: Path) -> None:
        path = known_document(tmp_path)
        app = create_app(replace(settings, secret_scanning_keys_url="", secret_scanning_keys_file=path), db=db)
        headers = {"Github-Public-Key-Identifier": "known", "Github-Public-Key-Signature": KNOWN_SIGNATURE}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api.test") as client:
            answer = await client.post(PATH, content=KNOWN_BODY, headers=headers)
            assert answer.json() == [
                {
                    "token_hash": hashlib.sha256(b"some_token").hexdigest(),
                    "token_type": "some_type",
                    "label": "false_positive",
                }
            ]
            problem(await client.post(PATH, content=KNOWN_BODY), 403, "secret_scanning.signature_invalid")

    async def test_a_forged_one_ends_nothing(
        self, owner: Account, client: httpx.AsyncClient, scanner: SecretScanner, connect: Any
    ) -> None:
        made = await owner.key("api")
        body, headers = scanner.report([made["key"]])
        forger = SecretScanner()
        forged = forger.sign(body)
        cases: list[tuple[bytes, dict[str, str]]] = [
            (body, {}),
            (body, forged),
            (body, {**forged, "Github-Public-Key-Identifier": scanner.current}),
            (body, {**headers, "Github-Public-Key-Identifier": "unknown"}),
            (body, {**headers, "Github-Public-Key-Identifier": "x" * 5000}),
            (body + b" ", headers),
            (body.replace(b"content", b"Content"), headers),
            (b"{not json", forged),
            (body, scanner.sign(b"[]")),
        ]
        for content, given in cases:
            problem(await client.post(PATH, content=content, headers=given), 403, "secret_scanning.signature_invalid")
        assert (await connect(made["key"]).get("/v1/whoami")).status_code == 200
        assert await revocations(owner) == []

    async def test_without_keys_nothing_is_believed(self, settings: ApiSettings, db: Database) -> None:
        app = create_app(replace(settings, secret_scanning_keys_url=""), db=db)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api.test") as client:
            body, headers = SecretScanner().report(["x"])
            problem(await client.post(PATH, content=body, headers=headers), 403, "secret_scanning.not_configured")


class TestKeys:
    """The scanner's public keys: fetched when they are needed, and no oftener whoever asks."""

    async def test_a_new_key_is_fetched_and_noise_is_not(
        self, post: Any, client: httpx.AsyncClient, scanner: SecretScanner, clock: MovableClock
    ) -> None:
        await asyncio.gather(*(post("noise") for _ in range(5)))
        assert scanner.fetches == 1
        body, headers = scanner.report(["noise"])
        for n in range(20):
            bad = {**headers, "Github-Public-Key-Identifier": f"other-{n}"}
            problem(await client.post(PATH, content=body, headers=bad), 403, "secret_scanning.signature_invalid")
        assert scanner.fetches == 1
        clock.advance(scanner_keys.RETRY_SECONDS + 1)
        scanner.rotate()
        assert labels(await post("noise")) == [False]
        assert scanner.fetches == 2

    @pytest.mark.parametrize("mode", ["down", "huge", "nonsense"])
    async def test_an_outage(
        self, post: Any, client: httpx.AsyncClient, scanner: SecretScanner, clock: MovableClock, mode: Any
    ) -> None:
        body, headers = scanner.report(["noise"])
        scanner.mode = mode
        problem(await client.post(PATH, content=body, headers=headers), 503, "service.unavailable")
        scanner.mode = "ok"
        problem(await client.post(PATH, content=body, headers=headers), 503, "service.unavailable")
        clock.advance(scanner_keys.RETRY_SECONDS + 1)
        await post("noise")
        scanner.mode = mode
        clock.advance(7200)
        await post("noise")  # by the keys that were fetched before
        clock.advance(86_400)
        problem(await client.post(PATH, content=body, headers=headers), 503, "service.unavailable")

    async def test_only_p256_keys_count(self) -> None:
        others = [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())]
        rows = [
            {
                "key_identifier": str(n),
                "key": key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(),
            }
            for n, key in enumerate(others)
        ]
        rows.append({"key_identifier": "x", "key": "nonsense"})
        assert scanner_keys.read_keys(json.dumps({"public_keys": rows}).encode()) == {}

    @pytest.mark.parametrize(
        "wrong", [{"secret_scanning_keys_url": "http://keys.example"}, {"secret_scanning_keys_file": Path("/nowhere")}]
    )
    def test_settings_that_cannot_be(self, wrong: dict[str, Any], settings: ApiSettings, clock: MovableClock) -> None:
        with pytest.raises(Problem) as refused:
            scanner_keys.ScannerKeys(replace(settings, **wrong), clock)
        assert refused.value.code == "config.invalid"


class TestReports:
    async def test_a_live_key_ends_and_its_people_are_told(
        self, owner: Account, post: Any, connect: Any, db: Database
    ) -> None:
        made = await owner.key("agent", name="laptop")
        answer = await post(made["key"])
        assert answer == [
            {
                "token_hash": hashlib.sha256(made["key"].encode()).hexdigest(),
                "token_type": "portico_key",
                "label": "true_positive",
            }
        ]
        problem(await connect(made["key"]).get("/v1/whoami"), 401, "auth.key_revoked")
        (row,) = await revocations(owner)
        assert (row["target"], row["actor"]["id"]) == (made["id"], "github-secret-scanning")
        assert row["details"]["reason"] == "leaked" and row["details"]["url"].startswith("https://github.com/")
        assert (await mails(db))[-1] == owner.email
        assert made["key"] not in json.dumps(row)

    async def test_again_changes_nothing(self, owner: Account, post: Any, db: Database) -> None:
        made = await owner.key()
        before = len(await mails(db))
        first = await post(made["key"], made["key"])
        again = await asyncio.gather(*(post(made["key"], made["key"]) for _ in range(4)))
        assert all(answer == first for answer in again)
        assert len(await revocations(owner)) == 1
        assert len(await mails(db)) == before + 1

    async def test_two_at_once_of_one_key(self, owner: Account, post: Any) -> None:
        made = await owner.key()
        await asyncio.gather(*(post(made["key"]) for _ in range(5)))
        assert len(await revocations(owner)) == 1

    async def test_what_is_none_of_ours(self, owner: Account, post: Any, stranger: Account) -> None:
        ours = await owner.key()
        cut = ours["key"][:-1]
        swapped = ours["key"][:-1] + ("0" if ours["key"][-1] != "0" else "1")
        other_kind = ours["key"].replace("tnl_agt_", "tnl_sk_")
        never = new_token("sk")
        answer = await post(cut, swapped, other_kind.upper(), never, "ghp_x", "\ud800", ours["key"] + "\n", ours["key"])
        assert labels(answer) == [False] * 7 + [True]
        assert len(await revocations(owner)) == 1 and await revocations(stranger) == []

    async def test_a_key_that_has_ended_was_one_all_the_same(self, owner: Account, post: Any, db: Database) -> None:
        """Nobody learns by a report whether a key still works."""
        made = await owner.key()
        await owner.client.delete(f"/v1/api-keys/{made['id']}")
        before = await mails(db)
        assert labels(await post(made["key"])) == [True]
        assert await mails(db) == before

    async def test_keys_of_two_organizations_in_one_report(self, owner: Account, stranger: Account, post: Any) -> None:
        mine, theirs = await owner.key(), await stranger.key()
        assert labels(await post(mine["key"], theirs["key"])) == [True, True]
        assert [row["target"] for row in await revocations(owner)] == [mine["id"]]
        assert [row["target"] for row in await revocations(stranger)] == [theirs["id"]]

    async def test_agent_sessions_end_in_the_same_transaction(
        self, owner: Account, relay: httpx.AsyncClient, connect: Any, post: Any, db: Database
    ) -> None:
        made = await owner.key()
        body = {"agent_id": "agt-0123456789", "tunnels": []}
        session = (await connect(made["key"]).post("/v1/agent/sessions", json=body)).json()["session"]
        await post(made["key"])
        async with db.read() as reader:
            code = await reader.raw.fetchval("SELECT ended_code FROM agent_sessions WHERE id = $1", session)
            told = await reader.raw.fetchval(
                "SELECT count(*) FROM edge_changes WHERE payload::text LIKE $1", f"%{session}%"
            )
        assert (code, told) == ("session.revoked", 1)

    async def test_other_credentials(
        self, owner: Account, post: Any, client: httpx.AsyncClient, relay_key: str, connect: Any
    ) -> None:
        """A refresh token ends its sign-in session, a relay key is refused."""
        assert labels(await post(owner.refresh, relay_key, new_token("rt"), new_token("rly"))) == [
            True,
            True,
            False,
            False,
        ]
        answer = await client.post("/v1/auth/refresh", json={"refresh_token": owner.refresh})
        problem(answer, 401, "auth.session_ended")
        answer = await connect(relay_key).post("/v1/edge/heartbeat", json={})
        problem(answer, 401, "edge.relay_key_revoked")

    async def test_of_browsers_and_of_support(self, owner: Account, app: Any, post: Any, db: Database) -> None:
        cookie, text, now = new_token("bs"), new_token("sup"), app.state.clock.wall()
        later = now + timedelta(hours=1)
        async with db.transaction() as tx:
            session = sign_in_sessions.c.id == owner.session
            await tx.execute(sa.update(sign_in_sessions).where(session).values(cookie_digest=digest(cookie)))
            consent = {"id": "sac_leak", "organization_id": owner.organization, "scope": "read", "given_by": owner.user}
            await tx.execute(sa.insert(support_consents).values(**consent, expires_at=later))
            begun = {"id": "sup_leak", "consent_id": "sac_leak", "organization_id": owner.organization}
            begun |= {"operator_id": "usr_x", "sign_in_session": "ses_x", "digest": digest(text), "reason": "asked"}
            await tx.execute(sa.insert(support_sessions).values(**begun, expires_at=later))
        assert labels(await post(text, new_token("bs"), new_token("sup"))) == [True, False, False]
        rows = (await owner.client.get("/v1/audit", params={"action": "support_access.end"})).json()["data"]
        assert [row["target"] for row in rows] == ["sup_leak"]
        assert labels(await post(cookie, text)) == [True, True]
        problem(await owner.client.get("/v1/whoami"), 401, "auth.session_ended")

    async def test_malformed(self, client: httpx.AsyncClient, scanner: SecretScanner) -> None:
        for body in (
            b"",
            b"{}",
            b"null",
            b"[1]",
            b"[" * 100_000,
            b'[{"token": 1, "type": "x"}]',
            b'[{"token": "", "type": "x"}]',
            b'[{"token": "x"}]',
            b'[{"token": "x", "type": "\\ud800"}]',
            b"\xff\xfe",
            json.dumps([{"token": "x", "type": "y" * 201}]).encode(),
        ):
            answer = await client.post(PATH, content=body, headers=scanner.sign(body))
            problem(answer, 400, "request.malformed")
        assert (await client.post(PATH, content=b"[]", headers=scanner.sign(b"[]"))).json() == []

    async def test_too_many(self, client: httpx.AsyncClient, scanner: SecretScanner, settings: ApiSettings) -> None:
        body, headers = scanner.report(["x"] * (settings.secret_scanning_max_matches + 1))
        problem(await client.post(PATH, content=body, headers=headers), 413, "request.too_large")
        body, headers = scanner.report(["x" * settings.request_body_max_bytes])
        problem(await client.post(PATH, content=body, headers=headers), 413, "request.too_large")

    async def test_an_address_with_a_secret_or_a_script_is_not_passed_on(self, owner: Account, post: Any) -> None:
        urls = (
            "javascript:alert(1)",
            "https://x.example/" + "y" * 600,
            "https://x.example/\u202e",
            "http://x.example/",
        )
        for url in urls:
            await post((await owner.key())["key"], url=url)
        made = await owner.key()
        await post(made["key"], url=f"https://x.example/?key={made['key']}")
        shown = [row["details"]["url"] for row in await revocations(owner)]
        assert shown[1:] == [None] * len(urls)
        assert shown[0].startswith("https://x.example/?key=") and made["key"] not in shown[0]
