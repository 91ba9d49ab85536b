"""Registration, sign-in, sessions: no enumeration, no guessing, no second use of a refresh token."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.app import create_app
from portico.control.identity import jobs, passwords
from portico.control.identity.tables import refresh_tokens, sign_in_sessions, throttles, users
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import PASSWORD, Account, MovableClock
from tests.control.test_http import problem


def _register(email: str, password: str = PASSWORD, organization: str = "Acme") -> dict[str, str]:
    return {"email": email, "password": password, "organization": organization}


async def _login(client: httpx.AsyncClient, email: str, password: str = PASSWORD) -> httpx.Response:
    return await client.post("/v1/auth/login", json={"email": email, "password": password})


async def _refresh(client: httpx.AsyncClient, token: str) -> httpx.Response:
    return await client.post("/v1/auth/refresh", json={"refresh_token": token})


async def _actions(account: Account) -> list[tuple[str, str]]:
    rows = (await account.client.get("/v1/audit")).json()["data"]
    return [(row["action"], row["outcome"]) for row in rows]


class TestRegister:
    async def test_makes_a_person_who_owns_an_organization(self, owner: Account) -> None:
        me = (await owner.client.get("/v1/whoami")).json()
        assert me["kind"] == "person"
        assert me["user"] == {"id": owner.user, "email": owner.email}
        assert me["organization"] == {"id": owner.organization, "name": "Acme", "plan": "unlimited"}
        assert "keys:write" in me["permissions"]
        assert me["platform_operator"] is False
        assert ("user.register", "success") in await _actions(owner)
        assert ("organization.create", "success") in await _actions(owner)

    async def test_passwords_are_argon2id(self, owner: Account, db: Database) -> None:
        async with db.read() as reader:
            stored = await reader.scalar(sa.select(users.c.password_hash).where(users.c.id == owner.user))
        assert stored.startswith("$argon2id$")

    async def test_one_address_one_account_whatever_its_case(self, owner: Account, client: httpx.AsyncClient) -> None:
        for email in (owner.email, owner.email.upper(), f"  {owner.email} "):
            problem(await client.post("/v1/auth/register", json=_register(email)), 409, "auth.email_taken")

    @pytest.mark.parametrize(
        "alike",
        [
            "one@look-alike\uff0ecom",
            "\uff4fne@look-alike.com",
            "one@look-alike.com.",
            "one\u200b@look-alike.com",
            "one@look-alike.com\u202e",
            "\xadone@look-alike.com",
        ],
    )
    async def test_addresses_that_look_alike_are_one_or_none(self, client: httpx.AsyncClient, alike: str) -> None:
        """Nobody can register what a person, or a list of members, takes for somebody else's address."""
        first = await client.post("/v1/auth/register", json=_register("one@look-alike.com"))
        assert first.status_code in (201, 409)
        answer = await client.post("/v1/auth/register", json=_register(alike))
        assert answer.json()["code"] in ("auth.email_taken", "request.invalid")

    async def test_concurrent_registrations_make_one_account(self, client: httpx.AsyncClient, db: Database) -> None:
        body = _register("race@example.com")
        answers = await asyncio.gather(*(client.post("/v1/auth/register", json=body) for _ in range(6)))
        assert sorted(a.status_code for a in answers) == [201, 409, 409, 409, 409, 409]
        async with db.read() as reader:
            orphans = await reader.scalar(
                sa.text("SELECT count(*) FROM organizations o WHERE NOT EXISTS "
                        "(SELECT 1 FROM members m WHERE m.organization_id = o.id)")
            )  # fmt: skip
        assert orphans == 0

    @pytest.mark.parametrize(
        "password",
        ["short", "1234567890", "Password123", "aaaaaaaaaaaaaaaa", "weak@example.com", "x" * 257, "abcabcabcabc"],
    )
    async def test_weak_passwords(self, client: httpx.AsyncClient, password: str) -> None:
        answer = await client.post("/v1/auth/register", json=_register("weak@example.com", password))
        problem(answer, 400, "auth.password_weak")
        assert password not in answer.text or len(password) < 10

    @pytest.mark.parametrize("email", ["", "a", "@b", "a@", "a b@c", "a@b\n", "a" * 65 + "@b.c", "a@" + "b" * 250])
    async def test_shapes_that_are_no_address(self, client: httpx.AsyncClient, email: str) -> None:
        answer = await client.post("/v1/auth/register", json=_register(email))
        if email == "a@b\n":  # white space around is trimmed
            assert answer.status_code == 201
        else:
            problem(answer, 422, "request.invalid")

    async def test_an_operator_cannot_be_registered(self, client: httpx.AsyncClient) -> None:
        body = {**_register("op@example.com"), "platform_operator": True}
        problem(await client.post("/v1/auth/register", json=body), 422, "request.invalid")


class TestClosedRegistration:
    async def test_is_refused(self, settings: ApiSettings, db: Database) -> None:
        app = create_app(replace(settings, registration_open=False, registrations_per_address=1), db=db)
        async with app.router.lifespan_context(app), _client(app) as client:
            answer = await client.post("/v1/auth/register", json=_register("closed@example.com"))
            problem(answer, 403, "auth.registration_closed")

    async def test_registrations_per_address_are_limited(self, settings: ApiSettings, db: Database) -> None:
        app = create_app(replace(settings, registrations_per_address=2), db=db)
        async with app.router.lifespan_context(app), _client(app, "192.0.2.77") as client:
            answers = [await client.post("/v1/auth/register", json=_register(f"many{n}@example.com")) for n in range(3)]
        assert [a.status_code for a in answers] == [201, 201, 429]
        problem(answers[2], 429, "auth.throttled")
        assert int(answers[2].headers["retry-after"]) > 0


def _client(app: Any, address: str = "127.0.0.1") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://api.test")


class TestLogin:
    async def test_gives_working_tokens(self, owner: Account, client: httpx.AsyncClient, connect: Any) -> None:
        answer = await _login(client, owner.email.upper())
        assert answer.status_code == 200
        body = answer.json()
        assert body["user"]["id"] == owner.user
        assert body["organization"]["id"] == owner.organization
        assert body["token_type"] == "Bearer"
        assert body["expires_in"] == 900
        assert (await connect(body["access_token"]).get("/v1/whoami")).json()["session"] == body["session"]
        assert ("user.login", "success") in await _actions(owner)

    async def test_unknown_and_wrong_answer_alike(self, owner: Account, client: httpx.AsyncClient) -> None:
        wrong, unknown = (
            await _login(client, owner.email, "wrong-Password-1"),
            await _login(client, "nobody@example.com"),
        )
        for answer in (wrong, unknown):
            problem(answer, 401, "auth.credentials_invalid")
        first, second = wrong.json(), unknown.json()
        assert first.pop("request_id") != second.pop("request_id")
        assert first == second
        assert set(wrong.headers) == set(unknown.headers)
        assert ("user.login", "refused") in await _actions(owner)

    async def test_unknown_and_wrong_take_the_same_time(self, owner: Account, client: httpx.AsyncClient) -> None:
        async def seconds(email: str) -> float:
            start = time.perf_counter()
            await _login(client, email, "wrong-Password-1")
            return time.perf_counter() - start

        known, unknown = [], []
        for n in range(8):  # in turns, so that the machine's load hits both
            known.append(await seconds(owner.email))
            unknown.append(await seconds(f"nobody{n}@example.com"))
        ratio = statistics.median(known) / statistics.median(unknown)
        assert 0.5 < ratio < 2.0, ratio

    async def test_a_disabled_person_is_a_wrong_password_and_loses_tokens(
        self, owner: Account, client: httpx.AsyncClient, connect: Any, db: Database
    ) -> None:
        key = await owner.key()
        async with db.transaction() as tx:
            await tx.execute(sa.update(users).where(users.c.id == owner.user).values(disabled_at=sa.func.now()))
        problem(await _login(client, owner.email), 401, "auth.credentials_invalid")
        problem(await owner.client.get("/v1/whoami"), 401, "auth.session_ended")
        problem(await _refresh(client, owner.refresh), 401, "auth.session_ended")
        problem(await connect(key["key"]).get("/v1/whoami"), 401, "auth.key_revoked")

    async def test_an_old_hash_is_replaced(self, owner: Account, client: httpx.AsyncClient, db: Database) -> None:
        from argon2 import PasswordHasher

        weak = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
        async with db.transaction() as tx:
            await tx.execute(sa.update(users).where(users.c.id == owner.user).values(password_hash=weak))
        assert (await _login(client, owner.email)).status_code == 200
        async with db.read() as reader:
            stored = await reader.scalar(sa.select(users.c.password_hash).where(users.c.id == owner.user))
        assert f"m={passwords.MEMORY_KIB}," in stored


class TestGuessing:
    async def test_parallel_guesses_are_counted_before_they_are_tried(self, owner: Account, connect: Any) -> None:
        client = connect(None, "192.0.2.1")
        answers = await asyncio.gather(*(_login(client, owner.email, f"wrong-Guess-{n}") for n in range(30)))
        codes = [a.json()["code"] for a in answers]
        assert codes.count("auth.credentials_invalid") == 10
        assert codes.count("auth.throttled") == 20
        problem(await _login(client, owner.email), 429, "auth.throttled")  # the right password too
        assert (await _login(connect(None, "192.0.2.2"), owner.email)).status_code == 200  # the owner, elsewhere

    async def test_one_address_cannot_keep_the_owner_out(self, owner: Account, connect: Any) -> None:
        """However often it asks: what its own limit refuses is not counted against the account."""
        client = connect(None, "192.0.2.10")
        await asyncio.gather(*(_login(client, owner.email, f"wrong-Guess-{n}") for n in range(130)))
        assert (await _login(connect(None, "192.0.2.11"), owner.email)).status_code == 200

    async def test_many_addresses_cannot_keep_the_owner_out_of_a_known_place(
        self, owner: Account, connect: Any, settings: ApiSettings, db: Database
    ) -> None:
        home = connect(None, "198.51.100.20")
        assert (await _login(home, owner.email)).status_code == 200
        for guesser in [connect(None, f"203.0.113.{n}") for n in range(11)]:
            await asyncio.gather(*(_login(guesser, owner.email, f"wrong-Guess-{n}") for n in range(10)))
        problem(await _login(connect(None, "203.0.113.99"), owner.email), 429, "auth.throttled")
        assert (await _login(home, owner.email)).status_code == 200
        problem(await _login(home, owner.email, "wrong-Guess-0"), 401, "auth.credentials_invalid")

    async def test_one_ipv6_customer_is_one_address(self, owner: Account, connect: Any) -> None:
        codes = []
        for n in range(12):
            answer = await _login(connect(None, f"2001:db8:1:2::{n:x}"), owner.email, "wrong-Guess-0")
            codes.append(answer.json()["code"])
        assert codes == ["auth.credentials_invalid"] * 10 + ["auth.throttled"] * 2
        assert (await _login(connect(None, "2001:db8:1:3::1"), owner.email)).status_code == 200

    async def test_success_takes_its_count_back(self, owner: Account, connect: Any) -> None:
        client = connect(None, "192.0.2.3")
        for _ in range(15):
            assert (await _login(client, owner.email)).status_code == 200

    async def test_windows_end(self, owner: Account, connect: Any, db: Database) -> None:
        client = connect(None, "192.0.2.4")
        for _ in range(11):
            answer = await _login(client, owner.email, "wrong-Guess-0")
        assert 0 < int(answer.headers["retry-after"]) <= 900
        async with db.transaction() as tx:
            await tx.execute(sa.update(throttles).values(window_ends_at=sa.func.now() - sa.text("interval '1 second'")))
        assert (await _login(client, owner.email)).status_code == 200

    async def test_buckets_hold_no_address_in_clear(
        self, owner: Account, client: httpx.AsyncClient, db: Database
    ) -> None:
        await _login(client, owner.email, "wrong-Guess-0")
        async with db.read() as reader:
            rows = await reader.fetch_all(sa.select(throttles.c.bucket))
        assert all(len(row.bucket) == 32 for row in rows)


class TestRefresh:
    async def test_rotates(self, owner: Account, client: httpx.AsyncClient, connect: Any) -> None:
        answer = await _refresh(client, owner.refresh)
        assert answer.status_code == 200
        body = answer.json()
        assert body["refresh_token"] != owner.refresh
        assert body["session"] == owner.session
        assert body["user"]["email"] == owner.email
        assert (await connect(body["access_token"]).get("/v1/whoami")).status_code == 200
        assert (await _refresh(client, body["refresh_token"])).status_code == 200

    async def test_reuse_ends_the_family(self, owner: Account, client: httpx.AsyncClient, connect: Any) -> None:
        newer = (await _refresh(client, owner.refresh)).json()
        problem(await _refresh(client, owner.refresh), 401, "auth.refresh_reused")
        problem(await _refresh(client, newer["refresh_token"]), 401, "auth.session_ended")
        problem(await connect(newer["access_token"]).get("/v1/whoami"), 401, "auth.session_ended")
        problem(await owner.client.get("/v1/whoami"), 401, "auth.session_ended")

        again = connect((await _login(client, owner.email)).json()["access_token"])
        rows = (await again.get("/v1/audit", params={"action": "session.refresh"})).json()["data"]
        assert [(r["target"], r["outcome"]) for r in rows] == [(owner.session, "refused")]

    async def test_two_at_once_give_tokens_to_one_at_most(
        self, owner: Account, client: httpx.AsyncClient, db: Database
    ) -> None:
        answers = await asyncio.gather(*(_refresh(client, owner.refresh) for _ in range(5)))
        codes = sorted(a.json().get("code", "ok") for a in answers)
        assert codes.count("ok") == 1
        assert codes.count("auth.refresh_reused") == 1  # the first of the others ended the family
        assert codes.count("auth.session_ended") == 3
        async with db.read() as reader:
            query = sa.select(sign_in_sessions.c.end_reason).where(sign_in_sessions.c.id == owner.session)
            assert await reader.scalar(query) == "refresh token reused"

    @pytest.mark.parametrize("token", ["x", "tnl_rt_" + "0" * 36, "tnl_agt_0123456789ABCDEFGHIJKLMNOPQRST4PMbyp"])
    async def test_noise(self, client: httpx.AsyncClient, token: str) -> None:
        problem(await _refresh(client, token), 401, "auth.token_invalid")

    async def test_a_well_formed_unknown_token(self, client: httpx.AsyncClient) -> None:
        problem(await _refresh(client, "tnl_rt_0123456789ABCDEFGHIJKLMNOPQRST4PMbyp"), 401, "auth.token_invalid")

    async def test_expires_when_unused(self, owner: Account, client: httpx.AsyncClient, clock: MovableClock) -> None:
        clock.advance(2_592_001)
        problem(await _refresh(client, owner.refresh), 401, "auth.token_expired")

    async def test_no_session_outlives_its_end(
        self, owner: Account, client: httpx.AsyncClient, connect: Any, clock: MovableClock
    ) -> None:
        token, access = owner.refresh, owner.access
        for _ in range(4):
            clock.advance(2_000_000)
            answer = await _refresh(client, token)
            if answer.status_code != 200:
                break
            token, access = answer.json()["refresh_token"], answer.json()["access_token"]
        problem(answer, 401, "auth.token_expired")
        problem(await connect(access).get("/v1/whoami"), 401, "auth.token_expired")

    async def test_is_stored_as_a_digest(self, owner: Account, db: Database) -> None:
        async with db.read() as reader:
            rows = await reader.fetch_all(sa.select(refresh_tokens.c.digest))
        assert all(len(row.digest) == 32 and owner.refresh.encode() not in row.digest for row in rows)


class TestAccessTokens:
    async def test_expire_with_two_sided_tolerance(self, owner: Account, clock: MovableClock) -> None:
        clock.advance(900 + 55)
        assert (await owner.client.get("/v1/whoami")).status_code == 200
        clock.advance(10)
        problem(await owner.client.get("/v1/whoami"), 401, "auth.token_expired")

    async def test_tokens_from_the_future(self, owner: Account, clock: MovableClock) -> None:
        clock.advance(-55)
        assert (await owner.client.get("/v1/whoami")).status_code == 200
        clock.advance(-10)
        problem(await owner.client.get("/v1/whoami"), 401, "auth.token_invalid")

    async def test_a_refresh_token_or_grant_is_not_an_access_token(
        self, owner: Account, app: Any, connect: Any
    ) -> None:
        problem(await connect(owner.refresh).get("/v1/whoami"), 401, "auth.key_invalid")
        now = int(app.state.clock.wall().timestamp())
        claims = {"iss": "portico", "aud": "relay", "sub": owner.user, "sid": owner.session, "org": owner.organization}
        async with app.state.db.read() as reader:
            signer = await app.state.signing_keys.current_signer(reader)
        times = {"iat": now, "nbf": now, "exp": now + 900}
        for typ, audience in (("portico-session+jwt", "api"), ("portico-access+jwt", "relay")):
            token = signer.sign(typ, {**claims, **times, "aud": audience})
            problem(await connect(token).get("/v1/whoami"), 401, "auth.token_invalid")

    async def test_a_token_whose_parts_disagree(
        self, owner: Account, stranger: Account, app: Any, connect: Any
    ) -> None:
        """Signed by us, but the session is another person's: the database decides."""
        now = int(app.state.clock.wall().timestamp())
        async with app.state.db.read() as reader:
            signer = await app.state.signing_keys.current_signer(reader)
        base = {"iss": "portico", "aud": "api", "iat": now, "nbf": now, "exp": now + 900}
        mixed = {**base, "sub": owner.user, "sid": stranger.session, "org": owner.organization}
        problem(await connect(signer.sign("portico-access+jwt", mixed)).get("/v1/whoami"), 401, "auth.token_invalid")
        for gone in ("sub", "sid", "org", "exp", "nbf", "iat"):
            whole = {**base, "sub": owner.user, "sid": owner.session, "org": owner.organization}
            del whole[gone]
            token = signer.sign("portico-access+jwt", whole)
            problem(await connect(token).get("/v1/whoami"), 401, "auth.token_invalid")


class TestSessions:
    async def test_list_and_end(self, owner: Account, client: httpx.AsyncClient, connect: Any) -> None:
        other = (await _login(client, owner.email)).json()
        rows = (await owner.client.get("/v1/auth/sessions")).json()["data"]
        assert [r["id"] for r in rows] == [other["session"], owner.session]
        assert [r["current"] for r in rows] == [False, True]
        assert rows[0]["address"] == "127.0.0.1"
        answer = await owner.client.delete(f"/v1/auth/sessions/{other['session']}")
        assert answer.status_code == 204
        problem(await connect(other["access_token"]).get("/v1/whoami"), 401, "auth.session_ended")
        problem(await _refresh(client, other["refresh_token"]), 401, "auth.session_ended")
        again = await owner.client.delete(f"/v1/auth/sessions/{other['session']}")
        problem(again, 404, "request.not_found")
        assert ("session.end", "success") in await _actions(owner)

    async def test_end_all(self, owner: Account, client: httpx.AsyncClient, connect: Any) -> None:
        other = (await _login(client, owner.email)).json()
        assert (await owner.client.delete("/v1/auth/sessions")).status_code == 204
        for token in (owner.access, other["access_token"]):
            problem(await connect(token).get("/v1/whoami"), 401, "auth.session_ended")
        fresh = connect((await _login(client, owner.email)).json()["access_token"])
        rows = (await fresh.get("/v1/audit", params={"action": "session.end_all"})).json()["data"]
        assert rows[0]["details"] == {"sessions": 2}

    async def test_pages(self, owner: Account, client: httpx.AsyncClient) -> None:
        for _ in range(4):
            await _login(client, owner.email)
        seen: list[str] = []
        cursor: str | None = None
        while True:
            params = {"limit": "2"} | ({"cursor": cursor} if cursor else {})
            page = (await owner.client.get("/v1/auth/sessions", params=params)).json()
            assert len(page["data"]) <= 2
            seen += [row["id"] for row in page["data"]]
            if (cursor := page["next_cursor"]) is None:
                break
        assert len(seen) == len(set(seen)) == 5

    async def test_keys_have_no_sessions(self, owner: Account, connect: Any) -> None:
        client = connect((await owner.key("api"))["key"])
        problem(await client.get("/v1/auth/sessions"), 403, "auth.forbidden")
        problem(await client.delete("/v1/auth/sessions"), 403, "auth.forbidden")

    async def test_user_agents_are_cut_and_printable(self, client: httpx.AsyncClient, owner: Account) -> None:
        body = {"email": owner.email, "password": PASSWORD}
        await client.post("/v1/auth/login", json=body, headers={"User-Agent": "curl/8 " + "x" * 500})
        rows = (await owner.client.get("/v1/auth/sessions")).json()["data"]
        assert rows[0]["user_agent"].startswith("curl/8 x")
        assert len(rows[0]["user_agent"]) == 200


class TestLogout:
    async def test_ends_the_session(self, owner: Account, client: httpx.AsyncClient) -> None:
        assert (await owner.client.post("/v1/auth/logout")).status_code == 204
        problem(await owner.client.get("/v1/whoami"), 401, "auth.session_ended")
        problem(await _refresh(client, owner.refresh), 401, "auth.session_ended")

    async def test_of_an_agent_key_revokes_it(self, owner: Account, connect: Any) -> None:
        client = connect((await owner.key())["key"])
        assert (await client.post("/v1/auth/logout")).status_code == 204
        problem(await client.get("/v1/whoami"), 401, "auth.key_revoked")

    async def test_of_an_api_key_is_refused(self, owner: Account, connect: Any) -> None:
        client = connect((await owner.key("api"))["key"])
        problem(await client.post("/v1/auth/logout"), 403, "auth.forbidden")


class TestHousekeeping:
    async def test_deletes_what_is_long_over(
        self, register: Callable[[], Awaitable[Account]], app: Any, db: Database, clock: MovableClock
    ) -> None:
        gone, kept = await register(), await register()
        await gone.client.post("/v1/auth/logout")
        clock.advance(86_400 * 2)
        await jobs.housekeeping(app.state.identity)
        async with db.read() as reader:
            ids = {row.id for row in await reader.fetch_all(sa.select(sign_in_sessions.c.id))}
        assert gone.session not in ids
        assert kept.session in ids
