"""Links by mail: an address verified, a password forgotten, an address changed; replayed, raced, guessed, and squatted on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.identity.account_tables import account_tokens, passkeys, recovery_codes, totp_keys
from portico.control.identity.tables import throttles, users
from portico.errors import Problem
from portico.kit.db import Database
from portico.kit.ids import new_token
from portico.kit.outbox import messages
from portico.settings import ApiSettings
from tests.control.conftest import PASSWORD, Account, MovableClock
from tests.control.identity.mailbox import last, letters
from tests.control.test_http import problem

NEW = "short-Zebra-77"
_mine: ContextVar[bool] = ContextVar("mine", default=False)


async def _post(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    return await client.post(f"/v1/auth/{path}", json=body)


async def _login(client: httpx.AsyncClient, email: str, password: str = PASSWORD) -> httpx.Response:
    return await _post(client, "login", email=email, password=password)


async def _verified(account: Account, client: httpx.AsyncClient, app: Any) -> None:
    letter = await last(app, account.email, "account.verify")
    assert (await _post(account.client, "email/verify", token=letter.token)).status_code == 200


async def _audit(db: Database, action: str) -> list[Any]:
    async with db.read() as reader:
        query = sa.text(
            "SELECT actor_kind, target, outcome, details, organization_id FROM audit_events WHERE action = :a"
        )
        return list(await reader.fetch_all(query, {"a": action}))


class TestVerify:
    async def test_a_registration_mails_a_link_that_works_once(
        self, owner: Account, client: httpx.AsyncClient, app: Any, db: Database
    ) -> None:
        (letter,) = await letters(app, owner.email)
        assert letter.topic == "account.verify"
        assert "Acme" in letter.text
        answer = await _post(owner.client, "email/verify", token=letter.token)
        assert answer.status_code == 200
        assert answer.json() == {"email": owner.email}
        problem(await _post(owner.client, "email/verify", token=letter.token), 400, "auth.link_invalid")
        async with db.read() as reader:
            assert await reader.scalar(sa.select(users.c.email_verified_at).where(users.c.id == owner.user)) is not None
        rows = (await owner.client.get("/v1/audit", params={"action": "user.verify_email"})).json()["data"]
        assert [r["target"] for r in rows] == [owner.user]

    async def test_of_two_at_once_one_wins(self, owner: Account, client: httpx.AsyncClient, app: Any) -> None:
        token = (await last(app, owner.email, "account.verify")).token
        answers = await asyncio.gather(*(_post(owner.client, "email/verify", token=token) for _ in range(5)))
        assert sorted(a.status_code for a in answers) == [200, 400, 400, 400, 400]

    async def test_links_end(
        self, owner: Account, client: httpx.AsyncClient, app: Any, clock: MovableClock, settings: ApiSettings
    ) -> None:
        token = (await last(app, owner.email, "account.verify")).token
        clock.advance(settings.email_verification_seconds + 1)
        problem(await _post(client, "email/verify", token=token), 400, "auth.link_invalid")

    async def test_one_kind_of_token_is_no_other(self, owner: Account, client: httpx.AsyncClient, app: Any) -> None:
        token = (await last(app, owner.email, "account.verify")).token
        problem(await _post(client, "password/reset", token=token, password=NEW), 400, "auth.link_invalid")
        problem(await _post(client, "email/confirm", token=token), 400, "auth.link_invalid")
        for noise in ("x", new_token("ev"), owner.refresh):
            problem(await _post(client, "email/verify", token=noise), 400, "auth.link_invalid")

    async def test_another_link_on_demand_a_few_times(
        self, owner: Account, client: httpx.AsyncClient, app: Any, settings: ApiSettings
    ) -> None:
        for _ in range(settings.account_mails_per_window):
            assert (await _post(owner.client, "email/resend")).status_code == 202
        problem(await _post(owner.client, "email/resend"), 429, "auth.throttled")
        found = await letters(app, owner.email, "account.verify")
        assert len({letter.token for letter in found}) == settings.account_mails_per_window + 1
        assert (await _post(owner.client, "email/verify", token=found[0].token)).status_code == 200  # each of them

    async def test_no_more_links_once_it_is_done(self, owner: Account, client: httpx.AsyncClient, app: Any) -> None:
        await _verified(owner, client, app)
        problem(await _post(owner.client, "email/resend"), 409, "auth.email_verified")

    async def test_nothing_is_at_rest_in_clear(
        self, owner: Account, client: httpx.AsyncClient, app: Any, db: Any
    ) -> None:
        await _post(client, "password/forgot", email=owner.email)
        tokens = [letter.token for letter in await letters(app, owner.email)]
        assert len(tokens) == 2
        async with db.read() as reader:
            for table in (account_tokens, messages):
                rows = str([dict(row._mapping) for row in await reader.fetch_all(sa.select(table))])
                assert not any(token in rows or token.split("_")[2] in rows for token in tokens)
            log = await reader.scalar(sa.text("SELECT string_agg(details::text, ' ') FROM audit_events"))
        assert not any(token.split("_")[2] in log for token in tokens)

    async def test_addresses_that_mail_cannot_reach_are_refused(self, client: httpx.AsyncClient) -> None:
        for email in ('"a b"@example.com', "a@b@example.com", "a,b@example.com"):
            body = {"email": email, "password": PASSWORD, "organization": "Acme"}
            problem(await client.post("/v1/auth/register", json=body), 422, "request.invalid")


class TestForgot:
    async def test_sets_a_new_password_once(self, owner: Account, client: httpx.AsyncClient, app: Any) -> None:
        await _verified(owner, client, app)
        assert (await _post(client, "password/forgot", email=owner.email.upper())).status_code == 202
        token = (await last(app, owner.email, "account.reset")).token
        answer = await _post(client, "password/reset", token=token, password=NEW)
        assert (answer.status_code, answer.json()) == (200, {"email": owner.email})
        problem(await _login(client, owner.email), 401, "auth.credentials_invalid")
        assert (await _login(client, owner.email, NEW)).status_code == 200
        problem(await _post(client, "password/reset", token=token, password=PASSWORD), 400, "auth.link_invalid")
        assert (await last(app, owner.email, "account.changed")).subject == "Your password was reset"

    async def test_ends_every_session_refresh_token_device_and_link(
        self, owner: Account, client: httpx.AsyncClient, app: Any, connect: Any, db: Database
    ) -> None:
        await _verified(owner, client, app)
        second = (await _login(client, owner.email)).json()
        device = (await _post(client, "device", hostname="waiting")).json()
        assert (await _post(owner.client, "device/approve", user_code=device["user_code"])).status_code == 200
        key = await owner.key()
        for _ in range(2):
            await _post(client, "password/forgot", email=owner.email)
        first, other = await letters(app, owner.email, "account.reset")
        assert (await _post(client, "password/reset", token=first.token, password=NEW)).status_code == 200
        problem(await _post(client, "password/reset", token=other.token, password=PASSWORD), 400, "auth.link_invalid")
        for access in (owner.access, second["access_token"]):
            problem(await connect(access).get("/v1/whoami"), 401, "auth.session_ended")
        for refresh in (owner.refresh, second["refresh_token"]):
            problem(await _post(client, "refresh", refresh_token=refresh), 401, "auth.session_ended")
        problem(await _post(client, "device/token", device_code=device["device_code"]), 400, "device.denied")
        assert (await connect(key["key"]).get("/v1/whoami")).status_code == 200  # keys of a verified person stay

    async def test_of_two_at_once_one_wins(self, owner: Account, client: httpx.AsyncClient, app: Any) -> None:
        """With one link, and with two of the same account."""
        for _ in range(2):
            await _post(client, "password/forgot", email=owner.email)
        tokens = [letter.token for letter in await letters(app, owner.email, "account.reset")] * 3
        resets = (_post(client, "password/reset", token=t, password=f"{NEW}-{n}") for n, t in enumerate(tokens))
        answers = await asyncio.gather(*resets)
        assert sorted(a.status_code for a in answers) == [200, 400, 400, 400, 400, 400]
        winner = [a.status_code for a in answers].index(200)
        assert (await _login(client, owner.email, f"{NEW}-{winner}")).status_code == 200

    async def test_known_and_unknown_answer_and_write_alike(
        self, owner: Account, client: httpx.AsyncClient, app: Any, db: Database
    ) -> None:
        async with db.read() as reader:
            before = await reader.scalar(sa.select(sa.func.count()).select_from(account_tokens))
        known = await _post(client, "password/forgot", email=owner.email)
        unknown = await _post(client, "password/forgot", email="nobody@example.com")
        assert (known.status_code, known.content) == (unknown.status_code, unknown.content) == (202, b"")
        assert set(known.headers) == set(unknown.headers)
        assert len(await letters(app, owner.email, "account.reset")) == 1
        assert await letters(app, "nobody@example.com") == []
        async with db.read() as reader:
            assert await reader.scalar(sa.select(sa.func.count()).select_from(account_tokens)) == before + 1
        rows = await _audit(db, "user.forgot_password")
        assert {(r.target, r.organization_id) for r in rows} >= {(owner.user, owner.organization), (None, None)}

    async def test_the_same_statements_are_sent_for_both(
        self, owner: Account, client: httpx.AsyncClient, db: Database
    ) -> None:
        """Work, not time: a busy machine cannot make this one pass or fail."""

        async def statements(email: str) -> list[str]:
            sent: list[str] = []
            _mine.set(True)

            def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
                if _mine.get():  # and not housekeeping's
                    sent.append(statement.replace("ROLLBACK TO SAVEPOINT", "RELEASE SAVEPOINT"))

            sa.event.listen(db.engine.sync_engine, "before_cursor_execute", note)
            try:
                await _post(client, "password/forgot", email=email)
            finally:
                sa.event.remove(db.engine.sync_engine, "before_cursor_execute", note)
            return sent

        await statements("warm-up@example.com")
        known, unknown = await statements(owner.email), await statements("nobody-else@example.com")
        assert known == unknown
        assert any("outbox_messages" in statement for statement in known)

    async def test_a_stranger_cannot_use_up_the_owners_links(
        self, owner: Account, connect: Any, app: Any, settings: ApiSettings
    ) -> None:
        """Who asks again and again mails the owner some links, each of which works; the answer stays the same."""
        for n in range(settings.account_mails_per_window + 3):
            answer = await _post(connect(None, f"192.0.2.{n}"), "password/forgot", email=owner.email)
            assert answer.status_code == 202
        found = await letters(app, owner.email, "account.reset")
        assert len(found) == settings.account_mails_per_window
        answer = await _post(connect(None, "198.51.100.1"), "password/reset", token=found[0].token, password=NEW)
        assert answer.status_code == 200

    async def test_one_network_asks_only_so_often(self, app: Any, settings: ApiSettings) -> None:
        accounts = app.state.identity.accounts
        accounts._settings = replace(settings, resets_per_address=2)
        who = Caller("anonymous", "anonymous", None, address="192.0.2.200")
        for n in range(2):
            await accounts.forgot(who, f"no{n}@example.com")
        with pytest.raises(Problem, match=r"auth\.throttled"):
            await accounts.forgot(who, "more@example.com")

    async def test_a_disabled_person_gets_no_mail_and_no_way_back(
        self, owner: Account, client: httpx.AsyncClient, app: Any, db: Database
    ) -> None:
        await _post(client, "password/forgot", email=owner.email)
        token = (await last(app, owner.email, "account.reset")).token
        async with db.transaction() as tx:
            await tx.execute(sa.update(users).where(users.c.id == owner.user).values(disabled_at=sa.func.now()))
        problem(await _post(client, "password/reset", token=token, password=NEW), 400, "auth.link_invalid")
        assert (await _post(client, "password/forgot", email=owner.email)).status_code == 202
        assert len(await letters(app, owner.email, "account.reset")) == 1

    async def test_weak_passwords_use_no_link_up(self, owner: Account, client: httpx.AsyncClient, app: Any) -> None:
        await _post(client, "password/forgot", email=owner.email)
        token = (await last(app, owner.email, "account.reset")).token
        for weak in ("short", owner.email, "1234567890"):
            problem(await _post(client, "password/reset", token=token, password=weak), 400, "auth.password_weak")
        assert (await _post(client, "password/reset", token=token, password=NEW)).status_code == 200


class TestSquatting:
    """Somebody registered another's address, and waits for them to use the account."""

    async def test_a_link_alone_verifies_nothing(
        self, owner: Account, stranger: Account, client: httpx.AsyncClient, app: Any, db: Database, connect: Any
    ) -> None:
        """Else the account would count as theirs with the squatter's password, keys and passkeys in it."""
        token, key = (await last(app, owner.email, "account.verify")).token, await owner.key("agent")
        for who in (client, stranger.client, connect(key["key"])):
            problem(await _post(who, "email/verify", token=token), 403, "auth.link_unproved")
        async with db.read() as reader:
            assert await reader.scalar(sa.select(users.c.email_verified_at).where(users.c.id == owner.user)) is None
        problem(await _post(client, "email/verify", token=token, password="short"), 400, "auth.password_weak")
        assert (await _post(owner.client, "email/verify", token=token)).status_code == 200  # it was not used up
        problem(await _post(client, "email/verify", token=token, password=NEW), 400, "auth.link_invalid")

    async def test_a_spare_link_takes_no_verified_account_over(
        self, owner: Account, client: httpx.AsyncClient, app: Any
    ) -> None:
        await _post(owner.client, "email/resend")
        one, other = await letters(app, owner.email, "account.verify")
        assert (await _post(owner.client, "email/verify", token=one.token)).status_code == 200
        problem(await _post(client, "email/verify", token=other.token, password=NEW), 400, "auth.link_invalid")
        assert (await owner.client.get("/v1/whoami")).status_code == 200

    @pytest.mark.parametrize("path", ["password/reset", "email/verify"])
    async def test_the_owner_takes_the_account_over(
        self, path: str, owner: Account, client: httpx.AsyncClient, app: Any, db: Database, connect: Any
    ) -> None:
        key = await owner.key("api")
        async with db.transaction() as tx:
            row = {
                "user_id": owner.user,
                "name": "x",
                "public_key": b"",
                "sign_count": 0,
                "aaguid": "",
                "backed_up": False,
            }
            await tx.execute(
                sa.insert(passkeys).values(id=f"psk_{owner.user}", credential_id=owner.user.encode(), **row)
            )
            await tx.execute(
                sa.insert(totp_keys).values(user_id=owner.user, sealed_secret=b"", confirmed_at=sa.func.now())
            )
            await tx.execute(sa.insert(recovery_codes).values(user_id=owner.user, digest=b"x"))
        problem(await client.post("/v1/auth/register", json={"email": owner.email, "password": NEW, "organization": "X"}), 409,
                "auth.email_taken")  # fmt: skip
        await _post(client, "password/forgot", email=owner.email)
        letter = await last(app, owner.email, "account.reset" if path == "password/reset" else "account.verify")
        assert ("never verified" if path == "password/reset" else "choose a password") in letter.text
        assert (await _post(client, path, token=letter.token, password=NEW)).status_code == 200

        problem(await owner.client.get("/v1/whoami"), 401, "auth.session_ended")
        problem(await _post(client, "refresh", refresh_token=owner.refresh), 401, "auth.session_ended")
        problem(await connect(key["key"]).get("/v1/whoami"), 401, "auth.key_revoked")
        problem(await _login(client, owner.email), 401, "auth.credentials_invalid")
        signed_in = (await _login(client, owner.email, NEW)).json()
        assert "mfa_required" not in signed_in
        factors = (await connect(signed_in["access_token"]).get("/v1/auth/mfa")).json()
        assert factors == {"password": True, "totp": False, "recovery_codes": 0, "passkeys": 0}
        async with db.read() as reader:
            assert await reader.scalar(sa.select(users.c.email_verified_at).where(users.c.id == owner.user)) is not None
        (row,) = [r for r in await _audit(db, "user.reset_password") if r.target == owner.user]
        assert row.details["taken_over"] is True
        assert (row.details["keys"], row.details["passkeys"]) == (1, 1)

    async def test_links_of_the_squatters_time_are_void_after(
        self, owner: Account, client: httpx.AsyncClient, app: Any, connect: Any
    ) -> None:
        """A change of address that the squatter began does not come true when the owner has taken over."""
        assert (await _post(owner.client, "email/change", email="squatter@example.com")).status_code == 202
        trap = (await last(app, "squatter@example.com", "account.change_email")).token
        await _post(client, "password/forgot", email=owner.email)
        token = (await last(app, owner.email, "account.reset")).token
        assert (await _post(client, "password/reset", token=token, password=NEW)).status_code == 200
        problem(await _post(client, "email/confirm", token=trap), 400, "auth.link_invalid")


class TestChangePassword:
    async def test_ends_the_other_sessions_alone(
        self, owner: Account, client: httpx.AsyncClient, app: Any, connect: Any
    ) -> None:
        other = (await _login(client, owner.email)).json()
        answer = await _post(owner.client, "password/change", current_password=PASSWORD, password=NEW)
        assert answer.status_code == 204
        assert (await owner.client.get("/v1/whoami")).status_code == 200
        problem(await connect(other["access_token"]).get("/v1/whoami"), 401, "auth.session_ended")
        problem(await _post(client, "refresh", refresh_token=other["refresh_token"]), 401, "auth.session_ended")
        problem(await _login(client, owner.email), 401, "auth.credentials_invalid")
        assert (await _login(client, owner.email, NEW)).status_code == 200
        assert (await last(app, owner.email, "account.changed")).subject == "Your password was changed"

    async def test_takes_the_current_one(self, owner: Account) -> None:
        answer = await _post(owner.client, "password/change", current_password="wrong-Guess-1", password=NEW)
        problem(answer, 400, "auth.proof_invalid")
        answer = await _post(owner.client, "password/change", current_password=PASSWORD, password="short")
        problem(answer, 400, "auth.password_weak")
        rows = (await owner.client.get("/v1/audit", params={"action": "user.change_password"})).json()["data"]
        assert [r["outcome"] for r in rows] == ["refused"]

    async def test_of_two_at_once_one_wins(self, owner: Account, client: httpx.AsyncClient) -> None:
        changes = (
            _post(owner.client, "password/change", current_password=PASSWORD, password=f"{NEW}-{n}") for n in range(3)
        )
        answers = await asyncio.gather(*changes)
        assert sorted(a.status_code for a in answers)[:1] == [204]
        assert [a.status_code for a in answers].count(204) == 1
        winner = [a.status_code for a in answers].index(204)
        assert (await _login(client, owner.email, f"{NEW}-{winner}")).status_code == 200

    async def test_a_link_from_before_is_void(self, owner: Account, client: httpx.AsyncClient, app: Any) -> None:
        await _post(client, "password/forgot", email=owner.email)
        token = (await last(app, owner.email, "account.reset")).token
        assert (
            await _post(owner.client, "password/change", current_password=PASSWORD, password=NEW)
        ).status_code == 204
        problem(await _post(client, "password/reset", token=token, password=PASSWORD), 400, "auth.link_invalid")


class TestChangeAddress:
    async def test_counts_once_the_new_address_says_so(
        self, owner: Account, client: httpx.AsyncClient, app: Any
    ) -> None:
        new = f"new-{owner.email}"
        old_link = (await last(app, owner.email, "account.verify")).token
        assert (await _post(owner.client, "email/change", email=new)).status_code == 202
        assert (await _login(client, new)).status_code == 401
        token = (await last(app, new, "account.change_email")).token
        problem(await _post(client, "email/confirm", token=token), 403, "auth.link_unproved")
        answer = await _post(owner.client, "email/confirm", token=token)
        assert answer.json() == {"email": new}
        assert (await _login(client, new)).status_code == 200
        problem(await _login(client, owner.email), 401, "auth.credentials_invalid")
        told = (await last(app, owner.email, "account.changed")).text
        assert new.partition("@")[0] in told
        problem(await _post(client, "email/verify", token=old_link), 400, "auth.link_invalid")
        problem(await _post(client, "email/confirm", token=token), 400, "auth.link_invalid")

    async def test_another_accounts_address_shows_only_to_who_reads_its_mail(
        self, owner: Account, stranger: Account, client: httpx.AsyncClient, app: Any
    ) -> None:
        assert (await _post(owner.client, "email/change", email=stranger.email)).status_code == 202
        assert (await _post(owner.client, "email/change", email="nobody-yet@example.com")).status_code == 202
        # The second took the first's place.
        token = (await last(app, stranger.email, "account.change_email")).token
        problem(await _post(client, "email/confirm", token=token), 400, "auth.link_invalid")
        await _post(owner.client, "email/change", email=stranger.email)
        token = (await last(app, stranger.email, "account.change_email")).token
        # Whoever reads that mail adds no address to somebody else's account, in which others' ways in are.
        problem(await _post(stranger.client, "email/confirm", token=token), 403, "auth.link_unproved")
        problem(await _post(owner.client, "email/confirm", token=token), 409, "auth.email_taken")
        assert (await _login(client, owner.email)).status_code == 200

    async def test_needs_a_recent_sign_in(
        self, owner: Account, client: httpx.AsyncClient, clock: MovableClock, connect: Any
    ) -> None:
        clock.advance(3600)
        fresh = (await _post(client, "refresh", refresh_token=owner.refresh)).json()
        answer = await _post(connect(fresh["access_token"]), "email/change", email="new@example.com")
        problem(answer, 403, "auth.step_up_required")

    async def test_nobody_uses_up_the_mails_to_an_address_that_another_wants(
        self, owner: Account, register: Callable[[], Awaitable[Account]], app: Any, connect: Any, settings: ApiSettings
    ) -> None:
        codes = []
        for _ in range(settings.account_mails_per_window + 1):  # each an account of its own
            thief = await register()
            there = connect(thief.access, address="198.51.100.7")
            codes.append((await _post(there, "email/change", email="wanted@example.com")).status_code)
        assert codes == [202] * settings.account_mails_per_window + [429]
        assert (await _post(owner.client, "email/change", email="wanted@example.com")).status_code == 202


async def test_buckets_hold_no_address_in_clear(owner: Account, client: httpx.AsyncClient, db: Database) -> None:
    await _post(client, "password/forgot", email=owner.email)
    async with db.read() as reader:
        rows = await reader.fetch_all(sa.select(throttles.c.bucket))
    assert rows
    assert all(len(row.bucket) == 32 for row in rows)


class TestVerificationRequired:
    @pytest.fixture
    def settings(self, settings: ApiSettings) -> ApiSettings:
        return replace(settings, require_verified_email=True)

    async def test_the_link_opens_the_rest(
        self, register: Callable[[], Awaitable[Account]], client: httpx.AsyncClient, app: Any
    ) -> None:
        account = await register()
        body = {"kind": "agent", "name": "x"}
        problem(await account.client.post("/v1/api-keys", json=body), 403, "auth.email_unverified")
        await _verified(account, client, app)
        assert (await account.client.post("/v1/api-keys", json=body)).status_code == 201
