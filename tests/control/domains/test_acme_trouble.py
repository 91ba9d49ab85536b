"""An authority behind a proxy that misbehaves in every way: what it asks for is heeded, and no limit is exceeded."""

from __future__ import annotations

import dataclasses
import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from portico.control.domains import acme_orders
from portico.kit.queue import Retry
from tests import badproxy
from tests.badproxy import answer
from tests.control.domains.issuing import LIMITS, Desk

LIMITED = json.dumps({"type": "urn:ietf:params:acme:error:rateLimited", "detail": "too many, request 17 at 12:00"})
PATIENT = dataclasses.replace(LIMITS, max_attempts=300, backoff_max_seconds=0.1)


def behind(at: Desk, script: Any) -> Any:
    return badproxy.proxy(at.ca.directory, at.ca.trust, at.ca.certificate, script)


async def test_everything_goes_wrong_and_each_name_is_ordered_once(at: Desk) -> None:
    """A quarter of all requests fails, answers are lost on the way, Retry-After is asked for: one order a name all the same."""
    draw = random.Random(20_260_115)

    def script(method: str, path: str) -> bytes | str | None:
        luck = draw.random()
        if luck < 0.02:
            return answer(503, "", "Retry-After: 1")
        if luck < 0.04:
            return answer(429, "", "Retry-After: 1")
        if luck < 0.08:
            return answer(200, '{"malformed": ')
        if luck < 0.12:
            return answer(500, "<html>oops</html>", kind="text/html")
        if luck < 0.17:
            return "drop"
        return "drop after" if luck < 0.25 else None

    async with behind(at, script) as (proxy, url):
        settings = {"acme_directory": f"{url}/dir"}
        domains = [await at.domain() for _ in range(5)]
        before = at.ca.orders()
        await at.sweep(**settings)
        await at.run(limits=PATIENT, **settings)
        for domain in domains:
            (order,) = await at.orders(domain)
            assert order["state"] == "issued", (order["error_code"], order["error_detail"], order["last_error"])
            assert len(await at.chain(domain)) == 1
        assert at.ca.orders() == before + len(domains)
        asked = proxy.passed.count("POST /order-plz")
        spent = at.control.acme_budget_orders - await at.tokens("orders")
        assert len(domains) <= asked <= spent + 0.5, "every order that the CA heard of is paid for"


async def test_a_ca_that_wants_to_be_left_alone_is(at: Desk) -> None:
    busy = True
    times: list[datetime] = []

    def script(method: str, path: str) -> bytes | None:
        times.append(datetime.now(UTC))
        return answer(503, "", "Retry-After: 600") if busy else None

    async with behind(at, script) as (_, url):
        control = dataclasses.replace(at.control, acme_directory=f"{url}/dir")
        domain, other = await at.domain(), await at.domain()
        await at.sweep(acme_directory=control.acme_directory)
        with pytest.raises(Retry) as refused:
            await acme_orders.run(at.parts(control), await at.claim())
        assert refused.value.seconds >= 600 and len(times) == 1
        # Nobody else asks meanwhile, for whatever name.
        with pytest.raises(Retry) as refused:
            await acme_orders.run(at.parts(control), await at.claim())
        assert refused.value.seconds > 590 and len(times) == 1
        busy = False
        await at.sql("UPDATE acme_accounts SET paused_until = now()")
        await at.sql("UPDATE certificate_orders SET available_at = now(), lease_token = NULL")
        await at.run(acme_directory=control.acme_directory)
        for each in (domain, other):
            assert (await at.orders(each))[0]["state"] == "issued"


async def test_a_limit_of_the_ca_ends_the_order_and_its_time_is_kept(at: Desk) -> None:
    def script(method: str, path: str) -> bytes | None:
        return answer(429, LIMITED, "Retry-After: 7200") if "order-plz" in path else None

    async with behind(at, script) as (_, url):
        settings = {"acme_directory": f"{url}/dir"}
        domain = await at.domain()
        await at.issue(**settings)
        (order,) = await at.orders(domain)
        assert (order["state"], order["error_code"]) == ("failed", "rate_limited")
        assert await at.events(domain) == ["issuance.rate_limited"]
        schedule = await at.schedule(domain)
        assert schedule["next_at"] > datetime.now(UTC) + timedelta(seconds=7000)
        assert await at.sweep(**settings) == 0


async def test_a_long_wait_for_one_ca_is_spent_at_another(at: Desk) -> None:
    """Whether the order was placed or not, and whoever finds out; names that come later begin there."""
    busy = True

    def script(method: str, path: str) -> bytes | None:
        return answer(503, "", "Retry-After: 7200") if busy and "authZ" in path else None

    async with behind(at, script) as (proxy, url):
        settings: dict[str, Any] = {"acme_directory": f"{url}/dir", "acme_fallback_directories": (at.ca.directory,)}
        domains = [await at.domain(), await at.domain()]
        await at.issue(**settings)
        for domain in domains:
            (order,) = await at.orders(domain)
            assert (order["state"], order["error_code"], order["directory"]) == ("failed", "ca_paused", f"{url}/dir")
            assert set(await at.events(domain)) <= {"issuance.requested"}, "nobody is told of a failure"
            schedule = await at.schedule(domain)
            assert (schedule["failures"], schedule["ca"]) == (0, 0) and schedule["next_at"] <= datetime.now(UTC)
        domains.append(await at.domain())
        asked = proxy.asked
        assert await at.sweep(**settings) == 3
        await at.run(**settings)
        for domain in domains:
            order = (await at.orders(domain))[-1]
            assert (order["state"], order["directory"]) == ("issued", at.ca.directory)
        assert proxy.asked == asked, "the other one was left alone"
        # It is asked again when its time is over; until then nobody does, not even by hand.
        busy = False
        await at.sql("UPDATE acme_accounts SET paused_until = now()")
        order = await at.again(domains[0], **settings)
        assert (order["state"], order["directory"]) == ("issued", f"{url}/dir")


async def test_a_short_wait_is_waited_for_and_so_is_any_without_another_ca(at: Desk) -> None:
    for fallback, seconds in (((at.ca.directory,), 600), ((), 7200)):

        def script(method: str, path: str, seconds: int = seconds) -> bytes:
            return answer(503, "", f"Retry-After: {seconds}")

        async with behind(at, script) as (_, url):
            control = dataclasses.replace(
                at.control, acme_directory=f"{url}/dir", acme_fallback_directories=fallback, acme_wait_seconds=900.0
            )
            domain = await at.domain()
            await at.sweep(acme_directory=control.acme_directory, acme_fallback_directories=fallback)
            with pytest.raises(Retry) as refused:
                await acme_orders.run(at.parts(control), await at.claim())
            assert refused.value.seconds >= seconds
            (order,) = await at.orders(domain)
            assert order["state"] == "new"
            await at.sql("DELETE FROM custom_domains")


async def test_both_want_to_be_left_alone_and_both_are(at: Desk) -> None:
    async with behind(at, lambda method, path: answer(503, "", "Retry-After: 7200")) as (proxy, url):
        other = f"{url.replace('127.0.0.1', 'localhost')}/dir"
        control = dataclasses.replace(at.control, acme_directory=f"{url}/dir", acme_fallback_directories=(other,))
        settings: dict[str, Any] = {"acme_directory": f"{url}/dir", "acme_fallback_directories": (other,)}
        domain = await at.domain()
        await at.sweep(**settings)
        await acme_orders.run(at.parts(control), await at.claim())
        assert await at.sweep(**settings) == 1
        with pytest.raises(Retry):
            await acme_orders.run(at.parts(control), await at.claim())
        assert proxy.asked == 2
        assert [order["error_code"] for order in await at.orders(domain)] == ["ca_paused", None]


async def test_a_long_limit_of_one_name_is_answered_elsewhere_and_holds_nobody_else(at: Desk) -> None:
    limited: list[str] = []

    def script(method: str, path: str) -> bytes | None:
        if "order-plz" not in path or limited:
            return None
        limited.append(path)
        return answer(429, LIMITED, "Retry-After: 7200")

    async with behind(at, script) as (_, url):
        settings: dict[str, Any] = {"acme_directory": f"{url}/dir", "acme_fallback_directories": (at.ca.directory,)}
        domain = await at.domain()
        await at.issue(**settings)
        assert (await at.orders(domain))[0]["error_code"] == "rate_limited"
        assert await at.schedule(domain) is not None and (await at.schedule(domain))["ca"] == 1
        other = await at.domain()
        await at.issue(**settings)
        (order,) = await at.orders(other)
        assert (order["state"], order["directory"]) == ("issued", f"{url}/dir")
        order = await at.again(domain, **settings)
        assert (order["state"], order["directory"]) == ("issued", at.ca.directory)


async def test_an_account_that_the_ca_forgot_is_made_again(at: Desk) -> None:
    gone = json.dumps({"type": "urn:ietf:params:acme:error:accountDoesNotExist", "detail": "who?"})
    before: list[int] = []  # what had reached the CA when it had forgotten the account

    def script(method: str, path: str) -> bytes | None:
        if "order-plz" in path and not before:
            before.append(len(proxy.passed))
            return answer(400, gone, "Replay-Nonce: AAAA")
        return None

    async with behind(at, script) as (proxy, url):
        domain = await at.domain()
        await at.issue(acme_directory=f"{url}/dir")
        assert (await at.orders(domain))[0]["state"] == "issued"
        assert "POST /sign-me-up" in proxy.passed[: before[0]]
        assert "POST /sign-me-up" in proxy.passed[before[0] :]


async def test_a_chain_of_another_key_is_not_taken(at: Desk) -> None:
    from tests.control.domains.certificates import issued

    domain = await at.domain()
    chain = issued(domain["name"])[0].decode()

    def script(method: str, path: str) -> bytes | None:
        return answer(200, chain, kind="application/pem-certificate-chain") if "/certZ/" in path else None

    async with behind(at, script) as (_, url):
        await at.issue(acme_directory=f"{url}/dir")
        (order,) = await at.orders(domain)
        assert (order["state"], order["error_code"]) == ("failed", "bad_certificate")
        assert await at.chain(domain) == [] and order["sealed_key"] is None
