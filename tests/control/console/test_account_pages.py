"""Sessions and organizations of a person, as pages."""

from __future__ import annotations

import re

import pytest
import sqlalchemy as sa

from portico.control.console import agents
from portico.kit.db import Database
from tests.control.conftest import Account
from tests.control.console.conftest import SignIn, form_token, problem_text

SESSIONS = "/account/sessions"


@pytest.fixture
async def twice(owner: Account, stranger: Account, db: Database) -> Account:
    """``owner``, a viewer in the organization of ``stranger`` too."""
    async with db.transaction() as tx:
        await tx.execute(
            sa.text("INSERT INTO members (organization_id, user_id, role) VALUES (:o, :u, 'viewer')"),
            {"o": stranger.organization, "u": owner.user},
        )
        await tx.execute(
            sa.text("UPDATE organizations SET name = 'Other & co' WHERE id = :o"), {"o": stranger.organization}
        )
    return owner


class TestSessions:
    async def test_ends_one_and_the_others(self, owner: Account, sign_in: SignIn) -> None:
        here, there, third = [await sign_in(owner) for _ in range(3)]
        page = await here.get(SESSIONS)
        # The one of registration by the API is there too.
        ids = re.findall(r'name="session" value="(ses_[0-9a-z]+)"', page.text)
        assert len(ids) == 4 and page.text.count("this browser") == 1
        newest_other = sorted(set(ids[1:]))[-1]
        form = {"form_token": form_token(page), "session": newest_other}
        answer = await here.post(SESSIONS, data=form, follow_redirects=True)
        assert "that browser is signed out" in answer.text
        assert (await third.get(SESSIONS)).status_code == 303
        assert (await there.get(SESSIONS)).status_code == 200
        again = await here.post(SESSIONS, data=form)
        assert again.headers["location"] == f"{SESSIONS}?said=ended"
        answer = await here.post(SESSIONS, data={**form, "session": "others"}, follow_redirects=True)
        assert "All other sessions have ended" in answer.text
        assert (await there.get(SESSIONS)).status_code == 303
        assert (await owner.client.get("/v1/whoami")).status_code == 401

    async def test_ending_this_one_signs_out(self, owner: Account, sign_in: SignIn) -> None:
        browser = await sign_in(owner)
        page = await browser.get(SESSIONS)
        (own,) = re.findall(r'name="session" value="(ses_[0-9a-z]+)">Sign out', page.text)
        answer = await browser.post(SESSIONS, data={"form_token": form_token(page), "session": own})
        assert answer.headers["location"] == "/sign-in?said=out"
        assert "portico_session" not in browser.cookies

    async def test_not_another_persons(self, owner: Account, stranger: Account, sign_in: SignIn) -> None:
        browser = await sign_in(owner)
        form = {"form_token": form_token(await browser.get(SESSIONS)), "session": stranger.session}
        await browser.post(SESSIONS, data=form)
        assert (await stranger.client.get("/v1/whoami")).status_code == 200

    async def test_a_session_that_ended_while_the_page_was_open(self, owner: Account, sign_in: SignIn) -> None:
        browser = await sign_in(owner)
        token = form_token(await browser.get(SESSIONS))
        await owner.client.delete("/v1/auth/sessions")
        answer = await browser.post(
            SESSIONS, data={"form_token": token, "session": "others"}, headers={"Referer": f"http://api.test{SESSIONS}"}
        )
        assert answer.headers["location"] == f"/sign-in?next={SESSIONS}"


class TestOrganizations:
    async def test_switch(self, twice: Account, stranger: Account, sign_in: SignIn) -> None:
        browser = await sign_in(twice)
        page = await browser.get("/organizations?next=/device?code=BCDF-GHJK")
        assert "you are owner" in page.text and "you are viewer" in page.text and "Other &amp; co" in page.text
        form = {"form_token": form_token(page), "organization": stranger.organization, "next": "/device?code=BCDF-GHJK"}
        answer = await browser.post("/organizations", data=form)
        assert answer.headers["location"] == "/device?code=BCDF-GHJK"
        assert (
            'href="/organizations"><span class="unseen">Organization: </span>Other &amp; co'
            in (await browser.get("/organizations")).text
        )
        again = await browser.post("/organizations", data=form)
        assert again.status_code == 303

    async def test_what_a_person_may_do_is_the_new_role_s(
        self, twice: Account, stranger: Account, sign_in: SignIn
    ) -> None:
        started = (await stranger.client.post("/v1/auth/device", json={"hostname": "x"})).json()
        browser = await sign_in(twice)
        token = form_token(await browser.get("/organizations"))
        await browser.post("/organizations", data={"form_token": token, "organization": stranger.organization})
        form = {"form_token": token, "code": started["user_code"], "answer": "approve"}
        answer = await browser.post("/device", data=form)
        assert answer.status_code == 403
        assert "lacks" in problem_text(answer)

    async def test_a_device_is_approved_for_the_organization_that_the_page_showed(
        self, twice: Account, stranger: Account, sign_in: SignIn, db: Database
    ) -> None:
        """Another tab turned the browser elsewhere meanwhile: nothing is approved, and the page shows where the key would be."""
        async with db.transaction() as tx:
            await tx.execute(sa.text("UPDATE members SET role = 'owner' WHERE user_id = :u"), {"u": twice.user})
        started = (await stranger.client.post("/v1/auth/device", json={"hostname": "x"})).json()
        browser = await sign_in(twice)
        page = await browser.get("/device", params={"code": started["user_code"]})
        (shown,) = re.findall(r'name="organization" value="(org_[0-9a-z]+)"', page.text)
        assert shown == twice.organization
        token = form_token(page)
        await browser.post("/organizations", data={"form_token": token, "organization": stranger.organization})
        form = {"form_token": token, "code": started["user_code"], "answer": "approve", "organization": shown}
        again = await browser.post("/device", data=form)
        assert "Approve this device?" in again.text and "Other &amp; co" in again.text
        form["organization"] = stranger.organization
        assert "Device approved" in (await browser.post("/device", data=form)).text

    async def test_another_one_is_made(self, owner: Account, sign_in: SignIn) -> None:
        browser = await sign_in(owner)
        token = form_token(await browser.get("/organizations"))
        wrong = await browser.post("/organizations/new", data={"form_token": token, "name": " "})
        assert wrong.status_code == 422 and 'aria-invalid="true"' in wrong.text
        form = {"form_token": token, "name": "Second <b>"}
        done = await browser.post("/organizations/new", data=form, follow_redirects=True)
        assert "</span>Second &lt;b&gt;</a>" in done.text and done.text.count("you are owner") == 2

    async def test_a_session_outlives_its_organization(self, owner: Account, sign_in: SignIn, db: Database) -> None:
        """As when it was deleted: every page says so, and there is a way on."""
        browser = await sign_in(owner)
        async with db.transaction() as tx:
            await tx.execute(
                sa.text("UPDATE sign_in_sessions SET organization_id = NULL WHERE user_id = :u"), {"u": owner.user}
            )
            await tx.execute(sa.text("DELETE FROM members WHERE user_id = :u"), {"u": owner.user})
        for path in ("/account/security", SESSIONS, "/device", "/check-mail", "/organizations"):
            assert (await browser.get(path)).status_code == 200, path
        page = await browser.get("/organizations")
        assert "You belong to no organization now" in page.text
        form = {"form_token": form_token(page), "name": "A new start"}
        done = await browser.post("/organizations/new", data=form, follow_redirects=True)
        assert "</span>A new start</a>" in done.text

    async def test_only_to_one_s_own(self, owner: Account, stranger: Account, sign_in: SignIn, db: Database) -> None:
        browser = await sign_in(owner)
        token = form_token(await browser.get("/organizations"))
        for organization in (stranger.organization, "org_x", "", "'; --"):
            form = {"form_token": token, "organization": organization}
            answer = await browser.post("/organizations", data=form)
            assert answer.status_code == 404
            assert problem_text(answer).startswith("You belong to no such")
        async with db.read() as reader:
            query = sa.text("SELECT DISTINCT organization_id FROM sign_in_sessions WHERE user_id = :u")
            assert await reader.fetch_all(query, {"u": owner.user}) == [(owner.organization,)]

    async def test_a_member_who_was_removed_is_signed_out_there(
        self, twice: Account, stranger: Account, sign_in: SignIn
    ) -> None:
        browser = await sign_in(twice)
        token = form_token(await browser.get("/organizations"))
        await browser.post("/organizations", data={"form_token": token, "organization": stranger.organization})
        await stranger.client.delete(f"/v1/org/members/{twice.user}")
        assert (await browser.get("/organizations")).status_code == 303


@pytest.mark.parametrize(
    ("agent", "shown"),
    [
        ("Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0", "Firefox on Linux"),
        (
            "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/126.0 Safari/537.36 Edg/126.0",
            "Edge on Windows",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Version/17.5 Safari/604.1",
            "Safari on iPhone",
        ),
        ("portico/0.1", "Portico command line"),
        ("something/1", "something/1"),
        (None, "Unknown program"),
    ],
)
def test_programs_are_named(agent: str | None, shown: str) -> None:
    assert agents.named(agent) == shown
