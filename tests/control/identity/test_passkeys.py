"""Passkeys, with an authenticator made of software: registered, signed in with, replayed, raced, forged, cloned, another's."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from portico.control.access import Caller
from portico.control.identity.account_tables import passkey_challenges, passkeys
from portico.control.identity.passkeys import site
from portico.control.identity.tables import users
from portico.errors import Problem
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import PASSWORD, Account, MovableClock
from tests.control.identity.authenticator import Authenticator, b64, unb64
from tests.control.identity.mailbox import last
from tests.control.identity.test_second_step import _first, _second, _set_up
from tests.control.test_http import problem


async def _post(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    return await client.post(f"/v1/auth/{path}", json=body)


async def _add(account: Account, device: Authenticator, name: str = "laptop") -> dict[str, Any]:
    options = (await _post(account.client, "passkeys/register/options")).json()
    answer = await _post(account.client, "passkeys", credential=device.create(options), name=name)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


@pytest.fixture
async def device(owner: Account) -> Authenticator:
    """The owner's device, with a passkey that is registered."""
    made = Authenticator()
    await _add(owner, made)
    return made


async def _options(client: httpx.AsyncClient) -> dict[str, Any]:
    return dict((await _post(client, "passkeys/authenticate/options")).json())


async def _sign_in(client: httpx.AsyncClient, device: Authenticator) -> httpx.Response:
    return await _post(client, "passkeys/authenticate/verify", credential=device.get(await _options(client)))


class TestRegistering:
    async def test_asks_for_a_discoverable_key_that_verifies_its_user(self, owner: Account) -> None:
        options = (await _post(owner.client, "passkeys/register/options")).json()
        assert options["rp"] == {"id": "localhost", "name": "Portico"}
        assert options["user"]["name"] == owner.email
        chosen = options["authenticatorSelection"]
        assert (chosen["residentKey"], chosen["userVerification"]) == ("required", "required")
        assert options["attestation"] == "none"

    async def test_keeps_and_lists_it(self, owner: Account, app: Any) -> None:
        device = Authenticator()
        made = await _add(owner, device)
        assert (await owner.client.get("/v1/auth/passkeys")).json()["data"] == [made]
        assert (made["name"], made["last_used_at"]) == ("laptop", None)
        told = await last(app, owner.email, "account.changed")
        assert (told.subject, "laptop" in told.text) == ("A passkey was added", True)
        rows = (await owner.client.get("/v1/audit", params={"action": "passkey.create"})).json()["data"]
        assert [r["target"] for r in rows] == [made["id"]]
        options = (await _post(owner.client, "passkeys/register/options")).json()
        assert [c["id"] for c in options["excludeCredentials"]] == [b64(device.credential_id)]

    async def test_an_answer_counts_once(self, owner: Account) -> None:
        options = (await _post(owner.client, "passkeys/register/options")).json()
        credential = Authenticator().create(options)
        answers = await asyncio.gather(*(_post(owner.client, "passkeys", credential=credential) for _ in range(4)))
        assert sorted(a.status_code for a in answers) == [201, 400, 400, 400]
        problem(await _post(owner.client, "passkeys", credential=credential), 400, "passkey.rejected")

    async def test_a_key_has_one_account(self, owner: Account, device: Authenticator, stranger: Account) -> None:
        options = (await _post(stranger.client, "passkeys/register/options")).json()
        answer = await _post(stranger.client, "passkeys", credential=device.create(options))
        problem(answer, 409, "passkey.exists")

    async def test_challenges_are_for_one_session_one_purpose_and_a_while(
        self, owner: Account, stranger: Account, client: httpx.AsyncClient, clock: MovableClock, settings: ApiSettings
    ) -> None:
        options = (await _post(stranger.client, "passkeys/register/options")).json()
        answer = await _post(owner.client, "passkeys", credential=Authenticator().create(options))
        problem(answer, 400, "passkey.rejected")
        options = {**(await _post(owner.client, "passkeys/register/options")).json(), **await _options(client)}
        answer = await _post(owner.client, "passkeys", credential=Authenticator().create(options))
        problem(answer, 400, "passkey.rejected")
        options = (await _post(owner.client, "passkeys/register/options")).json()
        clock.advance(settings.passkey_challenge_seconds + 1)
        answer = await _post(owner.client, "passkeys", credential=Authenticator().create(options))
        problem(answer, 400, "passkey.rejected")

    async def test_pages_of_others_register_nothing(self, owner: Account) -> None:
        for origin in ("https://evil.example", "http://localhost:7001", "https://localhost:7000"):
            options = (await _post(owner.client, "passkeys/register/options")).json()
            answer = await _post(owner.client, "passkeys", credential=Authenticator(origin).create(options))
            problem(answer, 400, "passkey.rejected")

    async def test_a_key_that_does_not_ask_for_a_pin_is_refused(self, owner: Account) -> None:
        device = Authenticator()
        device.verifies = False
        options = (await _post(owner.client, "passkeys/register/options")).json()
        answer = await _post(owner.client, "passkeys", credential=device.create(options))
        problem(answer, 400, "passkey.rejected")

    async def test_a_person_has_only_so_many(
        self, owner: Account, device: Authenticator, app: Any, db: Database
    ) -> None:
        limit = app.state.settings.passkeys_per_person
        rows = [
            {"id": f"psk_{n}", "user_id": owner.user, "name": "x", "credential_id": bytes([n]) * 9, "public_key": b"",
             "sign_count": 0, "aaguid": "", "backed_up": False} for n in range(limit - 1)
        ]  # fmt: skip
        async with db.transaction() as tx:
            await tx.execute(sa.insert(passkeys), rows)
        problem(await _post(owner.client, "passkeys/register/options"), 409, "passkey.limit_reached")

    async def test_needs_a_recent_sign_in(
        self, owner: Account, client: httpx.AsyncClient, clock: MovableClock, connect: Any
    ) -> None:
        clock.advance(3600)
        fresh = (await _post(client, "refresh", refresh_token=owner.refresh)).json()
        stale = connect(fresh["access_token"])
        problem(await _post(stale, "passkeys/register/options"), 403, "auth.step_up_required")


class TestSigningIn:
    async def test_without_name_or_password(
        self, owner: Account, device: Authenticator, client: httpx.AsyncClient, connect: Any
    ) -> None:
        options = await _options(client)
        assert (options["allowCredentials"], options["userVerification"]) == ([], "required")
        answer = await _post(client, "passkeys/authenticate/verify", credential=device.get(options))
        assert answer.status_code == 200, answer.text
        assert answer.json()["user"] == {"id": owner.user, "email": owner.email}
        session = connect(answer.json()["access_token"])
        rows = (await session.get("/v1/auth/sessions")).json()["data"]
        assert [row["methods"] for row in rows if row["current"]] == [["passkey"]]
        (row,) = (await session.get("/v1/auth/passkeys")).json()["data"]
        assert row["last_used_at"] is not None

    async def test_an_answer_counts_once(
        self, owner: Account, device: Authenticator, client: httpx.AsyncClient
    ) -> None:
        credential = device.get(await _options(client))
        answers = await asyncio.gather(
            *(_post(client, "passkeys/authenticate/verify", credential=credential) for _ in range(4))
        )
        assert sorted(a.status_code for a in answers) == [200, 401, 401, 401]
        problem(await _post(client, "passkeys/authenticate/verify", credential=credential), 401, "auth.passkey_invalid")

    async def test_what_is_wrong_has_one_answer(
        self, owner: Account, device: Authenticator, client: httpx.AsyncClient
    ) -> None:
        """A key that nobody registered, a forged signature, another site, no user verification, another's handle."""
        answers = [await _sign_in(client, Authenticator())]
        forged = device.get(await _options(client))
        forged["response"]["signature"] = Authenticator().get(await _options(client))["response"]["signature"]
        answers.append(await _post(client, "passkeys/authenticate/verify", credential=forged))
        device.origin, right = "https://evil.example", device.origin
        answers.append(await _sign_in(client, device))
        device.origin, device.verifies = right, False
        answers.append(await _sign_in(client, device))
        device.verifies, device.user_handle = True, b"usr_somebody_else"
        answers.append(await _sign_in(client, device))
        found = [{**problem(a, 401, "auth.passkey_invalid"), "request_id": ""} for a in answers]
        assert all(one == found[0] for one in found)
        rows = (await owner.client.get("/v1/audit", params={"action": "user.login"})).json()["data"]
        assert [r["details"]["reason"] for r in rows] == ["passkey"] * 4

    async def test_a_clone_is_noticed_by_its_counter(self, device: Authenticator, client: httpx.AsyncClient) -> None:
        for _ in range(3):
            assert (await _sign_in(client, device)).status_code == 200
        device.sign_count = 1  # the copy was made before
        problem(await _sign_in(client, device), 401, "auth.passkey_invalid")
        device.sign_count = 10
        assert (await _sign_in(client, device)).status_code == 200

    async def test_who_is_disabled_stays_out(
        self, owner: Account, device: Authenticator, client: httpx.AsyncClient, db: Database
    ) -> None:
        async with db.transaction() as tx:
            await tx.execute(sa.update(users).where(users.c.id == owner.user).values(disabled_at=sa.func.now()))
        problem(await _sign_in(client, device), 401, "auth.passkey_invalid")

    async def test_one_network_asks_only_so_often(self, settings: ApiSettings, db: Database, app: Any) -> None:
        own = app.state.identity.passkeys
        own._settings = replace(settings, sign_in_failures_per_address=2)
        who = Caller("anonymous", "anonymous", None, address="192.0.2.90")
        for _ in range(2):
            await own.sign_in_options(who)
        with pytest.raises(Problem, match=r"auth\.throttled"):
            await own.sign_in_options(who)


class TestSecondStepAndStepUp:
    async def test_stands_in_for_the_code(
        self, owner: Account, device: Authenticator, client: httpx.AsyncClient, clock: MovableClock
    ) -> None:
        await _set_up(owner, clock)
        token, other = await _first(client, owner), await _first(client, owner)
        options = (await _post(client, "mfa/passkey/options", mfa_token=token)).json()
        assert [c["id"] for c in options["allowCredentials"]] == [b64(device.credential_id)]
        credential = device.get(options)
        problem(
            await _second(client, other, passkey=credential), 401, "auth.second_step_invalid"
        )  # asked for by the first
        answers = await asyncio.gather(*(_second(client, token, passkey=credential) for _ in range(3)))
        assert sorted(a.status_code for a in answers) == [200, 401, 401]
        problem(await _post(client, "mfa/passkey/options", mfa_token=token), 401, "auth.mfa_token_invalid")

    async def test_anothers_is_none(
        self, owner: Account, stranger: Account, client: httpx.AsyncClient, clock: MovableClock
    ) -> None:
        theirs = Authenticator()
        await _add(stranger, theirs)
        await _set_up(owner, clock)
        token = await _first(client, owner)
        options = (await _post(client, "mfa/passkey/options", mfa_token=token)).json()
        problem(await _second(client, token, passkey=theirs.get(options)), 401, "auth.second_step_invalid")

    async def test_proves_who_is_there(
        self, owner: Account, device: Authenticator, client: httpx.AsyncClient, clock: MovableClock, connect: Any
    ) -> None:
        clock.advance(3600)
        fresh = (await _post(client, "refresh", refresh_token=owner.refresh)).json()
        session = connect(fresh["access_token"])
        options = (await _post(session, "step-up/passkey/options")).json()
        credential = device.get(options)
        login = (await _post(client, "login", email=owner.email, password=PASSWORD)).json()
        answer = await _post(connect(login["access_token"]), "step-up", passkey=credential)
        problem(answer, 400, "auth.proof_invalid")  # asked for by another session
        options = (await _post(session, "step-up/passkey/options")).json()
        assert (await _post(session, "step-up", passkey=device.get(options))).json()["methods"] == ["passkey"]
        assert (await _post(session, "passkeys/register/options")).status_code == 200


class TestOnesOwn:
    async def test_renamed_and_removed(
        self, owner: Account, device: Authenticator, client: httpx.AsyncClient, app: Any
    ) -> None:
        (row,) = (await owner.client.get("/v1/auth/passkeys")).json()["data"]
        path = f"/v1/auth/passkeys/{row['id']}"
        assert (await owner.client.patch(path, json={"name": "old phone"})).json()["name"] == "old phone"
        assert (await owner.client.delete(path)).status_code == 204
        problem(await owner.client.delete(path), 404, "request.not_found")
        problem(await _sign_in(client, device), 401, "auth.passkey_invalid")
        assert (await last(app, owner.email, "account.changed")).subject == "A passkey was removed"

    async def test_anothers_are_not_there(self, owner: Account, device: Authenticator, stranger: Account) -> None:
        (row,) = (await owner.client.get("/v1/auth/passkeys")).json()["data"]
        path = f"/v1/auth/passkeys/{row['id']}"
        problem(await stranger.client.patch(path, json={"name": "mine"}), 404, "request.not_found")
        problem(await stranger.client.delete(path), 404, "request.not_found")
        assert (await owner.client.get("/v1/auth/passkeys")).json()["data"] == [row]

    async def test_not_the_last_way_in(self, owner: Account, device: Authenticator, db: Database) -> None:
        async with db.transaction() as tx:
            await tx.execute(sa.update(users).where(users.c.id == owner.user).values(password_hash=None))
        await _add(owner, Authenticator(), "second")
        rows = (await owner.client.get("/v1/auth/passkeys")).json()["data"]
        deletions = (owner.client.delete(f"/v1/auth/passkeys/{row['id']}") for row in rows)
        answers = await asyncio.gather(*deletions)  # at once: one of them stays
        assert sorted(a.status_code for a in answers) == [204, 409]
        problem(next(a for a in answers if a.status_code == 409), 409, "passkey.last_way_in")


_MEMBERS = (
    "id", "rawId", "type", "clientDataJSON", "attestationObject", "authenticatorData", "signature", "userHandle",
    "transports", "authenticatorAttachment",
)  # fmt: skip


class TestHostileAnswers:
    async def test_shapes_that_are_none(self, owner: Account, client: httpx.AsyncClient) -> None:
        hostile: list[dict[str, Any]] = [
            {}, {"response": None}, {"response": []}, {"response": {"clientDataJSON": 7}},
            {"rawId": "A", "response": {"clientDataJSON": "!!!"}}, {"response": {"clientDataJSON": b64(b"[" * 5000)}},
            {"rawId": "AAAA", "response": {"clientDataJSON": b64(b'{"challenge": "AAAA"}')}},
            {"rawId": "AAAA", "response": {"clientDataJSON": b64(b"\xff")}},
        ]  # fmt: skip
        for credential in hostile:
            answer = await _post(client, "passkeys/authenticate/verify", credential=credential)
            problem(answer, 401, "auth.passkey_invalid")
            problem(await _post(owner.client, "passkeys", credential=credential), 400, "passkey.rejected")
            problem(await _post(owner.client, "step-up", passkey=credential), 400, "auth.proof_invalid")

    async def test_right_challenges_in_wrong_wrapping(
        self, owner: Account, device: Authenticator, client: httpx.AsyncClient, app: Any, db: Database
    ) -> None:
        """Whatever else an answer holds, it is refused and not a fault: changed members, missing ones, other types."""
        own, who = app.state.identity.passkeys, Caller("person", owner.user, owner.organization, user_id=owner.user,
                                                       session_id=owner.session)  # fmt: skip
        junk = st.one_of(st.none(), st.integers(), st.text(max_size=8), st.lists(st.integers(), max_size=2),
                         st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))  # fmt: skip
        cases: list[tuple[str, Any]] = []

        @given(name=st.sampled_from(_MEMBERS), value=junk)
        @hypothesis_settings(max_examples=25, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def collect(name: str, value: Any) -> None:
            cases.append((name, value))

        collect()
        for name, value in cases:
            async with db.transaction() as tx:
                create, get = await own.registration(tx, who), await own.options(tx, "sign_in", None, None)
            for credential, act in (
                (Authenticator().create(create), lambda c: own.register(who, c, "x")),
                (device.get(get), lambda c: own.sign_in(replace(who, kind="anonymous"), c, None)),
            ):
                changed = json.loads(json.dumps(credential))
                part = changed if name in changed else changed["response"]
                part[name] = value
                try:
                    await act(changed)
                except Problem as err:
                    assert err.code in ("passkey.rejected", "auth.passkey_invalid")
                except AttributeError as err:  # it was taken: sign_in came to the client, which is None here
                    assert "NoneType" in str(err)

    async def test_used_challenges_are_gone(
        self, device: Authenticator, client: httpx.AsyncClient, db: Database
    ) -> None:
        options = await _options(client)
        await _post(client, "passkeys/authenticate/verify", credential=Authenticator().get(options))
        async with db.read() as reader:
            where = passkey_challenges.c.challenge == unb64(options["challenge"])
            assert await reader.fetch_one(sa.select(passkey_challenges).where(where)) is None


class TestSite:
    @pytest.mark.parametrize(
        ("api_url", "rp_id", "origin"),
        [
            ("https://console.example.com", "console.example.com", "https://console.example.com"),
            ("https://console.example.com:8443/", "console.example.com", "https://console.example.com:8443"),
            ("http://127.0.0.1:7000", "localhost", "http://localhost:7000"),
            ("http://[::1]:7000", "localhost", "http://localhost:7000"),
        ],
    )
    def test_is_that_of_the_api(self, settings: ApiSettings, api_url: str, rp_id: str, origin: str) -> None:
        found = site(replace(settings, api_url=api_url))
        assert (found.rp_id, found.origins) == (rp_id, (origin,))

    def test_an_address_has_none(self, settings: ApiSettings) -> None:
        with pytest.raises(Problem) as refused:
            site(replace(settings, api_url="https://192.0.2.1"))
        assert refused.value.code == "passkey.unavailable"
