"""Trying again now, by the API: whose domain, in what state, within which limits; and what the settings of authorities may be."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from portico.control.domains import acme_budget, acme_cas, acme_schedule
from portico.errors import Problem
from portico.kit.db import Database
from portico.settings import ApiSettings, Secret
from tests.control.conftest import Account
from tests.control.domains.certificates import domain, rows

CA = "https://ca.example.net/dir"


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    return dataclasses.replace(settings, acme_agree_terms=True, acme_directory=CA, acme_budget_failures=2)


async def of(db: Database, account: Account, name: str, **columns: Any) -> str:
    made = await domain(db, name, account.organization)
    async with db.transaction() as tx:
        for column, value in columns.items():
            await tx.raw.execute(f"UPDATE custom_domains SET {column} = $2 WHERE id = $1", made, value)
    return made


async def retry(account: Account, domain_id: str) -> Any:
    return await account.client.post(f"/v1/domains/{domain_id}/certificate/retry")


async def test_an_order_is_due_now_once_and_audited(
    app: Any, db: Database, register: Callable[[], Awaitable[Account]]
) -> None:
    person = await register()
    made = await of(db, person, "again.example.com")
    answer = await retry(person, made)
    assert answer.status_code == 202 and answer.json()["domain"] == made
    (schedule,) = await rows(db, "SELECT * FROM certificate_schedules WHERE domain_id = $1", made)
    assert schedule["forced"] and schedule["next_at"] is not None
    cas = acme_cas.configured(app.state.settings)
    assert await acme_schedule.sweep(db, app.state.settings, cas) == 1
    answer = await retry(person, made)
    assert (answer.status_code, answer.json()["code"]) == (409, "cert.order_open")
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE certificate_orders SET state = 'failed'")
    answer = await retry(person, made)
    assert (answer.status_code, answer.json()["code"]) == (429, "cert.retry_throttled")
    assert 0 < int(answer.headers["retry-after"]) <= 60
    audited = await rows(db, "SELECT action FROM audit_events WHERE target = $1 ORDER BY id", made)
    assert [row["action"] for row in audited] == ["certificate.retry"]


async def test_what_the_authority_would_refuse_is_refused_here(
    app: Any, db: Database, register: Callable[[], Awaitable[Account]]
) -> None:
    person = await register()
    made = await of(db, person, "spent.example.com")
    claim = acme_budget.of_failure(app.state.settings, "spent.example.com", staging=False)
    async with db.transaction() as tx:
        for _ in range(2):
            await acme_budget.note(tx, CA, claim)
    answer = await retry(person, made)
    assert (answer.status_code, answer.json()["code"]) == (429, "cert.retry_throttled")
    assert 1700 < int(answer.headers["retry-after"]) <= 1800


@pytest.mark.parametrize(
    "columns", [{"tls_mode": "passthrough"}, {"hostname_status": "pending"}, {"hostname_status": "moved"}]
)
async def test_a_domain_that_wants_none(
    db: Database, register: Callable[[], Awaitable[Account]], columns: dict[str, str], app: Any
) -> None:
    person = await register()
    answer = await retry(person, await of(db, person, f"{'-'.join(columns.values())}.example.com", **columns))
    assert (answer.status_code, answer.json()["code"]) == (409, "cert.not_wanted")


async def test_another_organizations_domain_is_not_there(
    db: Database, register: Callable[[], Awaitable[Account]], app: Any
) -> None:
    mine, theirs = await register(), await register()
    made = await of(db, theirs, "theirs.example.com")
    answer = await retry(mine, made)
    assert (answer.status_code, answer.json()["code"]) == (404, "domain.not_found")
    assert await rows(db, "SELECT * FROM certificate_schedules WHERE domain_id = $1", made) == []


class TestWithoutTerms:
    @pytest.fixture
    def settings(self, settings: ApiSettings) -> ApiSettings:
        return dataclasses.replace(settings, acme_agree_terms=False)

    async def test_nothing_is_ordered(self, db: Database, register: Callable[[], Awaitable[Account]], app: Any) -> None:
        person = await register()
        answer = await retry(person, await of(db, person, "terms.example.com"))
        assert (answer.status_code, answer.json()["code"]) == (409, "cert.not_ordered_here")
        assert await acme_schedule.sweep(db, app.state.settings, acme_cas.configured(app.state.settings)) == 0


class TestAuthorities:
    def of(self, **settings: Any) -> tuple[acme_cas.Ca, ...]:
        base = ApiSettings(database_url=Secret("unused"), master_key=Secret("unused"), acme_agree_terms=True)
        return acme_cas.configured(dataclasses.replace(base, **settings))

    def test_lets_encrypt_until_something_else_is_set_and_nothing_before_the_terms(self) -> None:
        (ca,) = self.of()
        assert (ca.directory, ca.staging) == (acme_cas.LETS_ENCRYPT, acme_cas.LETS_ENCRYPT_STAGING)
        assert self.of(acme_agree_terms=False) == ()

    def test_several_with_profiles_and_external_accounts(self) -> None:
        first, second = self.of(
            acme_directory=CA, acme_fallback_directories=("https://other.example.net/acme",),
            acme_profiles=("ca.example.net=tlsserver",), acme_external_accounts=Secret("other.example.net=kid:with:colons:key"),
        )  # fmt: skip
        assert (first.profile, first.binding, first.staging) == ("tlsserver", None, None)
        assert (second.profile, second.binding, second.host) == (None, ("kid:with:colons", "key"), "other.example.net")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("acme_directory", "http://ca.example.net/dir"), ("acme_directory", "nonsense"),
            ("acme_fallback_directories", ("ftp://x/y",)), ("acme_profiles", ("tlsserver",)),
            ("acme_external_accounts", Secret("ca.example.net=onlykey")), ("acme_challenges", ("http-01", "magic")),
        ],
    )  # fmt: skip
    def test_settings_that_name_none(self, key: str, value: Any) -> None:
        with pytest.raises(Problem) as refused:
            self.of(**{key: value})
        assert refused.value.code == "config.invalid"


class TestLedger:
    async def test_a_bucket_fills_evenly_and_all_or_nothing_is_taken(self, db: Database) -> None:
        small = acme_budget.Claim("a", "k", 2, 100.0)
        full = acme_budget.Claim("b", "k", 50, 100.0)
        for _ in range(2):
            async with db.transaction() as tx:
                await acme_budget.take(tx, "ca", [full, small])
        with pytest.raises(acme_budget.Spent) as spent:
            async with db.transaction() as tx:
                await acme_budget.take(tx, "ca", [full, small])
        assert spent.value.claim == small and 95 < spent.value.seconds <= 100
        async with db.transaction() as tx:
            levels = {
                row["bucket"]: row["tokens"]
                for row in await tx.raw.fetch("SELECT * FROM acme_budget WHERE directory = 'ca'")
            }
            assert levels["b"] == pytest.approx(48, abs=0.2)
            await tx.raw.execute("UPDATE acme_budget SET at = at - interval '100 s' WHERE directory = 'ca'")
            assert await acme_budget.wait(tx, "ca", [small]) == 0
            await acme_budget.take(tx, "ca", [small])
            assert await acme_budget.wait(tx, "ca", [small]) > 90

    async def test_many_workers_take_no_more_than_there_is(self, db: Database) -> None:
        claims = [acme_budget.Claim("orders", "", 7, 1e6), acme_budget.Claim("names", "x", 100, 1e6)]

        async def one() -> bool:
            try:
                async with db.transaction() as tx:
                    await acme_budget.take(tx, "shared", claims)
            except acme_budget.Spent:
                return False
            return True

        assert sum(await asyncio.gather(*(one() for _ in range(40)))) == 7

    async def test_a_clock_that_was_set_back_takes_nothing_away(self, db: Database) -> None:
        claim = acme_budget.Claim("a", "clock", 5, 10.0)
        async with db.transaction() as tx:
            await acme_budget.take(tx, "back", [claim])
            await tx.raw.execute("UPDATE acme_budget SET at = now() + interval '1 day' WHERE directory = 'back'")
            await acme_budget.take(tx, "back", [claim])
            assert await tx.raw.fetchval("SELECT tokens FROM acme_budget WHERE directory = 'back'") == pytest.approx(
                3, abs=0.1
            )
