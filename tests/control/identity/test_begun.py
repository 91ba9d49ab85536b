"""What a session began (another address, an authenticator app, a device) after its person ended it for fear of a thief; and
what it does in that moment."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.identity import people
from portico.control.identity.account_tables import totp_keys
from portico.control.identity.tables import device_codes, sign_in_sessions, users
from portico.kit.db import Database
from tests.control.conftest import PASSWORD, Account
from tests.control.identity.authenticator import Authenticator
from tests.control.identity.mailbox import last, letters
from tests.control.identity.racing import overtaken
from tests.control.test_http import problem

NEW = "short-Zebra-77"


class Thief:
    """Somebody with a session of ``owner`` that is recent."""

    def __init__(
        self, owner: Account, session: dict[str, Any], client: httpx.AsyncClient, out: httpx.AsyncClient
    ) -> None:
        self.owner, self.session, self.refresh = owner, session["session"], session["refresh_token"]
        self.client, self.out = client, out
        self.address = f"thief-of-{owner.email}"

    async def begin(self, app: Any) -> None:
        """All that takes a second step, which nobody has to be signed in for."""
        assert (await self.client.post("/v1/auth/email/change", json={"email": self.address})).status_code == 202
        self.link = (await last(app, self.address, "account.change_email")).token
        assert (await self.client.post("/v1/auth/mfa/totp")).status_code == 201
        self.device = (await self.out.post("/v1/auth/device", json={"hostname": "thief"})).json()
        answer = await self.client.post("/v1/auth/device/approve", json={"user_code": self.device["user_code"]})
        assert answer.status_code == 200

    async def finds_nothing(self, db: Database) -> None:
        """Of what was begun nothing comes true."""
        answer = await self.out.post("/v1/auth/email/confirm", json={"token": self.link})
        problem(answer, 400, "auth.link_invalid")
        answer = await self.out.post("/v1/auth/device/token", json={"device_code": self.device["device_code"]})
        problem(answer, 400, "device.denied")
        async with db.read() as reader:
            query = sa.select(sa.func.count()).select_from(totp_keys).where(totp_keys.c.user_id == self.owner.user)
            assert await reader.scalar(query) == 0


@pytest.fixture
async def thief(owner: Account, client: httpx.AsyncClient, connect: Any, app: Any) -> Thief:
    answer = await client.post("/v1/auth/login", json={"email": owner.email, "password": PASSWORD})
    session = answer.json()
    made = Thief(owner, session, connect(session["access_token"]), client)
    await made.begin(app)
    return made


async def _all(thief: Thief, app: Any) -> None:
    answer = await thief.owner.client.delete("/v1/auth/sessions", params={"keep_current": True})
    assert answer.status_code == 204


async def _that_one(thief: Thief, app: Any) -> None:
    assert (await thief.owner.client.delete(f"/v1/auth/sessions/{thief.session}")).status_code == 204


async def _password(thief: Thief, app: Any) -> None:
    body = {"current_password": PASSWORD, "password": NEW}
    assert (await thief.owner.client.post("/v1/auth/password/change", json=body)).status_code == 204


async def _reuse(thief: Thief, app: Any) -> None:
    for _ in range(2):
        await thief.out.post("/v1/auth/refresh", json={"refresh_token": thief.refresh})


async def _operator(thief: Thief, app: Any) -> None:
    caller = people.Caller("operator", "key_operator", None)
    async with app.state.db.transaction() as tx:
        await app.state.identity.people.end_sessions(tx, caller, thief.owner.user)


@pytest.mark.parametrize("end", [_all, _that_one, _password, _reuse, _operator])
async def test_ends_with_the_session(
    thief: Thief, app: Any, db: Database, end: Callable[[Thief, Any], Awaitable[None]]
) -> None:
    await end(thief, app)
    problem(await thief.client.get("/v1/whoami"), 401, "auth.session_ended")
    await thief.finds_nothing(db)


async def test_who_signs_out_may_still_follow_the_link_when_signed_in_again(thief: Thief) -> None:
    assert (await thief.client.post("/v1/auth/logout")).status_code == 204
    problem(await thief.out.post("/v1/auth/email/confirm", json={"token": thief.link}), 403, "auth.link_unproved")
    answer = await thief.owner.client.post("/v1/auth/email/confirm", json={"token": thief.link})
    assert answer.json() == {"email": thief.address}


async def test_the_old_address_hears_of_another_while_it_can_still_say_no(thief: Thief, app: Any) -> None:
    told = (await letters(app, thief.owner.email, "account.changed"))[-1]
    assert told.subject == "Another e-mail address was asked for your account"
    assert "thief-of-" in told.text
    await thief.out.post("/v1/auth/password/forgot", json={"email": thief.owner.email})
    token = (await last(app, thief.owner.email, "account.reset")).token
    answer = await thief.out.post("/v1/auth/password/reset", json={"token": token, "password": NEW})
    assert answer.status_code == 200
    problem(await thief.out.post("/v1/auth/email/confirm", json={"token": thief.link}), 400, "auth.link_invalid")


async def test_a_squatters_invitations_end_and_the_owner_hears_of_company(
    owner: Account, stranger: Account, client: httpx.AsyncClient, app: Any
) -> None:
    """A stranger registered somebody's address, and made an accomplice an owner, and invited another one."""
    found = []
    for email in (stranger.email, f"second-{owner.email}"):
        answer = await owner.client.post("/v1/org/invitations", json={"email": email, "role": "owner"})
        assert answer.status_code == 201, answer.text
        found.append((await last(app, email, "organization.invitation")).token)
    assert (await stranger.client.post("/v1/auth/invitations/accept", json={"token": found[0]})).status_code == 200

    await client.post("/v1/auth/password/forgot", json={"email": owner.email})
    token = (await last(app, owner.email, "account.reset")).token
    answer = await client.post("/v1/auth/password/reset", json={"token": token, "password": NEW})
    assert answer.status_code == 200
    body = {"token": found[1], "password": PASSWORD}
    problem(await client.post("/v1/auth/invitations/register", json=body), 404, "invitation.invalid")
    told = (await last(app, owner.email, "account.changed")).text
    assert "Others are members of its organizations" in told


async def _passkey(owner: Account) -> dict[str, Any]:
    options = (await owner.client.post("/v1/auth/passkeys/register/options")).json()
    return {"credential": Authenticator().create(options), "name": "laptop"}


async def _nothing(owner: Account) -> None:
    return None


async def _address(owner: Account) -> dict[str, Any]:
    return {"email": f"another-{owner.email}"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("passkeys", _passkey),
        ("passkeys/register/options", _nothing),
        ("mfa/totp", _nothing),
        ("email/change", _address),
    ],
)
async def test_a_session_that_ends_in_that_moment_leaves_no_way_in(
    owner: Account, db: Database, path: str, body: Callable[[Account], Awaitable[Any]]
) -> None:
    """The request was let in before its session ended, and comes to its act after."""
    sent = await body(owner)
    held = sa.update(users).where(users.c.id == owner.user).values(password_hash=users.c.password_hash)
    session = sign_in_sessions.c.id == owner.session
    end = sa.update(sign_in_sessions).where(session).values(ended_at=sa.func.now(), end_reason="test")
    answer = await overtaken(db, held, end, act=owner.client.post(f"/v1/auth/{path}", json=sent))
    problem(answer, 401, "auth.session_ended")


async def test_a_device_that_fetches_its_key_waits_for_whoever_takes_its_approval_back(
    thief: Thief, db: Database
) -> None:
    """And holds nothing that the other waits for: each would end the other."""
    held = sa.update(users).where(users.c.id == thief.owner.user).values(password_hash=users.c.password_hash)
    mine = device_codes.c.user_id == thief.owner.user
    deny = sa.update(device_codes).where(mine).values(state="denied")
    fetch = thief.out.post("/v1/auth/device/token", json={"device_code": thief.device["device_code"]})
    problem(await overtaken(db, held, deny, act=fetch), 400, "device.denied")


async def test_an_answer_is_repeated_in_its_own_session_alone(thief: Thief) -> None:
    """It has a token of that session; of two sessions of a person neither is given the other's."""
    key, body = {"Idempotency-Key": "one-key-for-both"}, {"organization": thief.owner.organization}
    first = await thief.owner.client.post("/v1/auth/switch", json=body, headers=key)
    assert first.json()["session"] == thief.owner.session
    other = await thief.client.post("/v1/auth/switch", json=body, headers=key)
    assert (other.json()["session"], "idempotency-replayed" in other.headers) == (thief.session, False)
    again = await thief.owner.client.post("/v1/auth/switch", json=body, headers=key)
    assert (again.json(), again.headers["idempotency-replayed"]) == (first.json(), "true")
