"""The second step of a sign-in: an authenticator app and recovery codes, replayed, raced, guessed and kept from strangers."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.identity import totp
from portico.control.identity.account_tables import recovery_codes, totp_keys
from portico.control.identity.tables import users
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import PASSWORD, Account, MovableClock
from tests.control.identity.mailbox import last, letters
from tests.control.test_http import problem

NEW = "short-Zebra-77"


@dataclass
class App:
    """A person's authenticator app, in step with the API's clock."""

    secret: bytes
    clock: MovableClock
    recovery: list[str]

    def code(self, late: int = 0) -> str:
        return totp.code(self.secret, totp.step_at(self.clock.wall().timestamp()) + late)

    def fresh(self) -> str:
        """A code of a step that was not used before."""
        self.clock.advance(totp.STEP_SECONDS)
        return self.code()

    def wrong(self) -> str:
        """Six digits that fit no step near."""
        near = {self.code(late) for late in range(-2, 3)}
        return next(text for text in (f"{n:06}" for n in range(10)) if text not in near)


async def _post(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    return await client.post(f"/v1/auth/{path}", json=body)


async def _set_up(account: Account, clock: MovableClock) -> App:
    started = (await _post(account.client, "mfa/totp")).json()
    assert f"secret={started['secret']}" in started["uri"]
    app = App(base64.b32decode(started["secret"]), clock, [])
    answer = await _post(account.client, "mfa/totp/confirm", code=app.code())
    assert answer.status_code == 200, answer.text
    app.recovery = answer.json()["recovery_codes"]
    return app


@pytest.fixture
async def phone(owner: Account, clock: MovableClock) -> App:
    """The owner's app, set up."""
    return await _set_up(owner, clock)


async def _first(client: httpx.AsyncClient, account: Account) -> str:
    answer = await _post(client, "login", email=account.email, password=PASSWORD)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == {"mfa_required", "mfa_token", "methods", "expires_in"}
    assert body["mfa_required"] is True
    return str(body["mfa_token"])


async def _second(client: httpx.AsyncClient, token: str, **proof: Any) -> httpx.Response:
    return await _post(client, "mfa/verify", mfa_token=token, **proof)


class TestSettingUp:
    async def test_counts_once_a_code_confirmed_it(self, owner: Account, client: httpx.AsyncClient, app: Any) -> None:
        await _post(owner.client, "mfa/totp")
        assert "access_token" in (await _post(client, "login", email=owner.email, password=PASSWORD)).json()
        phone = await _set_up(owner, app.state.clock)  # starting anew replaces what was not confirmed
        assert len(set(phone.recovery)) == 10
        assert (await owner.client.get("/v1/auth/mfa")).json() == {
            "password": True, "totp": True, "recovery_codes": 10, "passkeys": 0,
        }  # fmt: skip
        problem(await _post(owner.client, "mfa/totp"), 409, "mfa.already_on")
        problem(await _post(owner.client, "mfa/totp/confirm", code=phone.fresh()), 409, "mfa.already_on")
        assert (await last(app, owner.email, "account.changed")).subject == "An authenticator app was set up"
        rows = (await owner.client.get("/v1/audit", params={"action": "mfa.enable"})).json()["data"]
        assert [r["outcome"] for r in rows] == ["success"]

    async def test_a_wrong_code_confirms_nothing(self, owner: Account, clock: MovableClock) -> None:
        problem(await _post(owner.client, "mfa/totp/confirm", code="000000"), 409, "mfa.not_started")
        started = (await _post(owner.client, "mfa/totp")).json()
        wrong = App(base64.b32decode(started["secret"]), clock, []).wrong()
        problem(await _post(owner.client, "mfa/totp/confirm", code=wrong), 400, "auth.proof_invalid")
        assert (await owner.client.get("/v1/auth/mfa")).json()["totp"] is False

    async def test_a_key_that_was_shown_long_ago_is_confirmed_by_nobody(
        self, owner: Account, client: httpx.AsyncClient, clock: MovableClock, connect: Any, settings: ApiSettings
    ) -> None:
        """Whoever saw the screen, or the session, then has it too."""
        started = (await _post(owner.client, "mfa/totp")).json()
        clock.advance(settings.totp_setup_seconds + 1)
        fresh = (await _post(client, "refresh", refresh_token=owner.refresh)).json()
        again = connect(fresh["access_token"])
        assert (await _post(again, "step-up", password=PASSWORD)).status_code == 200
        code = App(base64.b32decode(started["secret"]), clock, []).code()
        problem(await _post(again, "mfa/totp/confirm", code=code), 409, "mfa.not_started")
        anew = (await _post(again, "mfa/totp")).json()
        assert anew["secret"] != started["secret"]
        code = App(base64.b32decode(anew["secret"]), clock, []).code()
        assert (await _post(again, "mfa/totp/confirm", code=code)).status_code == 200

    async def test_secrets_are_sealed_and_codes_digests(self, owner: Account, phone: App, db: Database) -> None:
        async with db.read() as reader:
            key = await reader.fetch_one(sa.select(totp_keys).where(totp_keys.c.user_id == owner.user))
            rows = await reader.fetch_all(sa.select(recovery_codes).where(recovery_codes.c.user_id == owner.user))
            log = await reader.scalar(sa.text("SELECT string_agg(details::text, ' ') FROM audit_events"))
        assert key is not None
        assert phone.secret not in key.sealed_secret
        assert totp.shown(phone.secret) not in log
        assert {len(row.digest) for row in rows} == {32}
        assert not any(code in str(rows) or code in log for code in phone.recovery)

    async def test_a_session_from_before_must_use_it(
        self, owner: Account, client: httpx.AsyncClient, connect: Any, clock: MovableClock
    ) -> None:
        """Who stole a session signed in by password alone cannot take away the app that was set up since."""
        old = (await _post(client, "login", email=owner.email, password=PASSWORD)).json()
        stolen = connect(old["access_token"])
        phone = await _set_up(owner, clock)
        problem(await stolen.delete("/v1/auth/mfa/totp"), 403, "auth.step_up_required")
        problem(await stolen.post("/v1/auth/mfa/recovery-codes"), 403, "auth.step_up_required")
        problem(await _post(stolen, "step-up", password=PASSWORD), 400, "auth.proof_invalid")
        answer = await _post(stolen, "password/change", current_password=PASSWORD, password=NEW)
        problem(answer, 403, "auth.step_up_required")
        answer = await _post(stolen, "step-up", code=phone.fresh())
        assert answer.json()["methods"] == ["otp"]
        assert (await stolen.delete("/v1/auth/mfa/totp")).status_code == 204

    async def test_removing_it_makes_sign_in_one_step(
        self, owner: Account, phone: App, client: httpx.AsyncClient, app: Any
    ) -> None:
        assert (await owner.client.delete("/v1/auth/mfa/totp")).status_code == 204
        problem(await owner.client.delete("/v1/auth/mfa/totp"), 409, "mfa.not_on")
        problem(await owner.client.post("/v1/auth/mfa/recovery-codes"), 409, "mfa.not_on")
        assert "access_token" in (await _post(client, "login", email=owner.email, password=PASSWORD)).json()
        assert (await owner.client.get("/v1/auth/mfa")).json()["recovery_codes"] == 0
        assert (await last(app, owner.email, "account.changed")).subject == "The authenticator app was removed"


class TestSigningIn:
    async def test_takes_password_and_code(
        self, owner: Account, phone: App, client: httpx.AsyncClient, connect: Any
    ) -> None:
        token = await _first(client, owner)
        problem(await connect(token).get("/v1/whoami"), 401, "auth.key_invalid")  # half a sign-in is none
        answer = await _second(client, token, code=phone.fresh())
        assert answer.status_code == 200, answer.text
        session = connect(answer.json()["access_token"])
        rows = (await session.get("/v1/auth/sessions")).json()["data"]
        assert [row["methods"] for row in rows if row["current"]] == [["pwd", "otp"]]
        assert (await session.post("/v1/auth/mfa/recovery-codes")).status_code == 200  # counts as recent
        problem(await _second(client, token, code=phone.fresh()), 401, "auth.mfa_token_invalid")

    async def test_a_code_works_once(self, owner: Account, phone: App, client: httpx.AsyncClient) -> None:
        first, second = await _first(client, owner), await _first(client, owner)
        code = phone.fresh()
        assert (await _second(client, first, code=code)).status_code == 200
        problem(await _second(client, second, code=code), 401, "auth.second_step_invalid")
        problem(await _second(client, second, code=phone.code(-1)), 401, "auth.second_step_invalid")
        assert (await _second(client, second, code=phone.fresh())).status_code == 200

    async def test_of_two_at_once_one_wins(self, owner: Account, phone: App, client: httpx.AsyncClient) -> None:
        """One code with several tokens, then several codes with one token, then one recovery code."""
        tokens, code = [await _first(client, owner) for _ in range(4)], phone.fresh()
        answers = await asyncio.gather(*(_second(client, token, code=code) for token in tokens))
        assert sorted(a.status_code for a in answers) == [200, 401, 401, 401]
        token = await _first(client, owner)
        phone.clock.advance(90)
        proofs = [{"code": phone.code(-1)}, {"code": phone.code()}, {"recovery_code": phone.recovery[1]}]
        answers = await asyncio.gather(*(_second(client, token, **proof) for proof in proofs))
        assert sorted(a.status_code for a in answers) == [200, 401, 401]
        tokens = [await _first(client, owner) for _ in range(4)]
        answers = await asyncio.gather(*(_second(client, token, recovery_code=phone.recovery[2]) for token in tokens))
        assert sorted(a.status_code for a in answers) == [200, 401, 401, 401]

    async def test_recovery_codes_work_once_each_and_are_told(
        self, owner: Account, phone: App, client: httpx.AsyncClient, app: Any, connect: Any
    ) -> None:
        typed = phone.recovery[0].lower().replace("-", " ")
        answer = await _second(client, await _first(client, owner), recovery_code=typed)
        assert answer.status_code == 200, answer.text
        told = await last(app, owner.email, "account.changed")
        assert told.subject == "A recovery code was used to sign in"
        assert "9 codes are left" in told.text
        again = await _second(client, await _first(client, owner), recovery_code=typed)
        problem(again, 401, "auth.second_step_invalid")
        session = connect(answer.json()["access_token"])
        fresh = (await session.post("/v1/auth/mfa/recovery-codes")).json()["recovery_codes"]
        assert not set(fresh) & set(phone.recovery)
        old = await _second(client, await _first(client, owner), recovery_code=phone.recovery[3])
        problem(old, 401, "auth.second_step_invalid")
        assert (await _second(client, await _first(client, owner), recovery_code=fresh[0])).status_code == 200

    async def test_anothers_codes_are_none(
        self, owner: Account, phone: App, stranger: Account, client: httpx.AsyncClient
    ) -> None:
        theirs = await _set_up(stranger, phone.clock)
        for proof in ({"code": theirs.fresh()}, {"recovery_code": theirs.recovery[0]}):
            problem(await _second(client, await _first(client, owner), **proof), 401, "auth.second_step_invalid")

    async def test_the_token_ends(
        self, owner: Account, phone: App, client: httpx.AsyncClient, settings: ApiSettings
    ) -> None:
        token = await _first(client, owner)
        phone.clock.advance(settings.second_step_seconds + 1)
        problem(await _second(client, token, code=phone.code()), 401, "auth.mfa_token_invalid")
        for noise in ("x", owner.refresh, owner.access[:100]):
            problem(await _second(client, noise, code=phone.code()), 401, "auth.mfa_token_invalid")

    async def test_the_token_is_worth_nothing_after_the_password_changed(
        self, owner: Account, phone: App, client: httpx.AsyncClient
    ) -> None:
        token = await _first(client, owner)
        answer = await _post(owner.client, "password/change", current_password=PASSWORD, password=NEW)
        assert answer.status_code == 204, answer.text
        problem(await _second(client, token, code=phone.fresh()), 401, "auth.mfa_token_invalid")

    async def test_nor_for_who_is_disabled_meanwhile(
        self, owner: Account, phone: App, client: httpx.AsyncClient, db: Database
    ) -> None:
        token = await _first(client, owner)
        async with db.transaction() as tx:
            await tx.execute(sa.update(users).where(users.c.id == owner.user).values(disabled_at=sa.func.now()))
        problem(await _second(client, token, code=phone.fresh()), 401, "auth.second_step_invalid")

    async def test_a_reset_by_mail_keeps_the_second_step(
        self, owner: Account, phone: App, client: httpx.AsyncClient, app: Any
    ) -> None:
        """Who reads somebody's mail still lacks their phone."""
        await _post(owner.client, "email/verify", token=(await last(app, owner.email, "account.verify")).token)
        await _post(client, "password/forgot", email=owner.email)
        token = (await last(app, owner.email, "account.reset")).token
        assert (await _post(client, "password/reset", token=token, password=NEW)).status_code == 200
        body = (await _post(client, "login", email=owner.email, password=NEW)).json()
        assert (body["mfa_required"], body["methods"]) == (True, ["otp", "recovery"])

    async def test_one_proof_at_a_time(self, owner: Account, phone: App, client: httpx.AsyncClient) -> None:
        token = await _first(client, owner)
        proofs: tuple[dict[str, str], ...] = ({}, {"code": "123456", "recovery_code": "x"})
        for proof in proofs:
            problem(await _second(client, token, **proof), 400, "auth.proof_invalid")


class TestGuessing:
    async def test_few_guesses_and_the_person_hears_of_them(
        self, owner: Account, phone: App, connect: Any, app: Any, settings: ApiSettings
    ) -> None:
        thief = connect(None, "192.0.2.30")
        token = await _first(thief, owner)
        answers = await asyncio.gather(*(_second(thief, token, code=phone.wrong()) for _ in range(12)))
        codes = [a.json()["code"] for a in answers]
        assert codes.count("auth.second_step_invalid") == settings.code_failures_per_pair
        assert codes.count("auth.throttled") == 12 - settings.code_failures_per_pair
        problem(await _second(thief, token, code=phone.fresh()), 429, "auth.throttled")  # the right one, too
        told = await letters(app, owner.email, "account.changed")
        assert [m.subject for m in told].count("Somebody who knows your password is guessing codes") == 1
        rows = (await owner.client.get("/v1/audit", params={"action": "user.login"})).json()["data"]
        assert [r["details"].get("reason") for r in rows if r["outcome"] == "refused"] == ["second step"] * 5

    async def test_many_addresses_have_a_days_guesses_together(
        self, owner: Account, phone: App, connect: Any, settings: ApiSettings
    ) -> None:
        """At 30 a day, of which three in a million fit, a year of guessing finds a code once in thirty."""
        token = await _first(connect(None, "192.0.2.31"), owner)
        tried = 0
        for n in range(settings.code_failures_per_day // settings.code_failures_per_pair + 1):
            thief = connect(None, f"203.0.113.{n}")
            for _ in range(settings.code_failures_per_pair):
                answer = await _second(thief, token, code=phone.wrong())
                tried += answer.json()["code"] == "auth.second_step_invalid"
        assert tried == settings.code_failures_per_day
        # The owner signs in where they were before, and elsewhere by what nobody can guess.
        elsewhere = connect(None, "198.51.100.9")
        token = await _first(elsewhere, owner)
        problem(await _second(elsewhere, token, code=phone.fresh()), 429, "auth.throttled")
        assert (await _second(elsewhere, token, recovery_code=phone.recovery[0])).status_code == 200
        home = connect(None, "127.0.0.1")
        assert (await _second(home, await _first(home, owner), code=phone.fresh())).status_code == 200

    async def test_a_stranger_without_the_password_fills_nothing(
        self, owner: Account, phone: App, connect: Any
    ) -> None:
        thief = connect(None, "192.0.2.32")
        for _ in range(8):
            answer = await _post(thief, "login", email=owner.email, password="wrong-Guess-1")
            problem(answer, 401, "auth.credentials_invalid")
        client = connect(None, "192.0.2.33")
        assert (await _second(client, await _first(client, owner), code=phone.fresh())).status_code == 200
