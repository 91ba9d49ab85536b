"""The way to providers: what is sent again and what never is, how long a call lasts, when a provider is left alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from portico.control.billing.provider_http import Limits, Wire
from portico.errors import Problem
from tests.control.billing.providers import Told, script, serving

_QUICK: dict[str, Any] = {"retry_min_seconds": 0.001, "retry_max_seconds": 0.01}


def _wire(url: str, **limits: Any) -> Wire:
    return Wire("stripe", url, Limits(**{**_QUICK, **limits}))


async def _code(wire: Wire, *, again: bool = True, path: str = "/v1/x") -> str:
    try:
        await wire.send("POST", path, headers={}, body=b"{}", again=again)
    except Problem as problem:
        return problem.code
    return "answered"


@pytest.mark.parametrize("first", [Told(503), Told(429), Told(500), Told(502), Told(drop=True)])
async def test_a_keyed_request_is_made_again_and_is_the_same(first: Told) -> None:
    async with serving(script(first, first, Told(200, {"id": "x"}))) as server:
        wire = _wire(server.url)
        answer = await wire.send("POST", "/v1/x", headers={"Idempotency-Key": "k"}, body=b"a=1", again=True)
        assert answer.document("stripe") == {"id": "x"}
        assert [(one.headers["idempotency-key"], one.body) for one in server.asked] == [("k", b"a=1")] * 3
        assert wire.circuit.state == "closed"
        await wire.close()


@pytest.mark.parametrize(
    ("first", "code"), [(Told(503), "billing.provider_busy"), (Told(drop=True), "billing.provider_unreachable")]
)
async def test_a_request_without_a_key_is_made_once(first: Told, code: str) -> None:
    async with serving(script(first, Told(200))) as server:
        wire = _wire(server.url)
        assert await _code(wire, again=False) == code
        assert len(server.asked) == 1
        await wire.close()


async def test_a_refusal_is_an_answer_and_is_not_asked_again() -> None:
    async with serving(script(Told(402, {"error": {"code": "card_declined"}}))) as server:
        wire = _wire(server.url)
        answer = await wire.send("POST", "/v1/x", headers={}, body=b"", again=True)
        assert (answer.status, len(server.asked), wire.circuit.state) == (402, 1, "closed")
        await wire.close()


async def test_retries_end_and_say_what_stood_in_the_way() -> None:
    async with serving(script(Told(429))) as server:
        wire = _wire(server.url, retries=2)
        assert await _code(wire) == "billing.provider_busy"
        assert len(server.asked) == 3
        assert wire.circuit.state == "closed", "asking too much is no outage"
        await wire.close()


async def test_stripes_own_word_on_retries_goes_before_the_status() -> None:
    async with serving(script(Told(500, headers={"stripe-should-retry": "false"}))) as server:
        wire = _wire(server.url)
        assert await _code(wire) == "billing.provider_busy"
        assert len(server.asked) == 1
        await wire.close()
    async with serving(script(Told(409, headers={"stripe-should-retry": "true"}), Told(200))) as server:
        wire = _wire(server.url)
        assert await _code(wire) == "answered"
        assert len(server.asked) == 2
        await wire.close()


async def test_a_retry_after_that_is_too_long_is_not_waited_for() -> None:
    async with serving(script(Told(429, headers={"retry-after": "3600"}), Told(200))) as server:
        wire = _wire(server.url)
        assert await _code(wire) == "billing.provider_busy"
        assert len(server.asked) == 1
        await wire.close()


async def test_a_call_ends_in_time_although_the_provider_is_silent() -> None:
    async with serving(script(Told(hang=True))) as server:
        wire = _wire(server.url, call_seconds=0.3, timeout_seconds=20)
        async with asyncio.timeout(30):
            assert await _code(wire) == "billing.provider_unreachable"
        await wire.close()


async def test_a_provider_that_fails_is_left_alone_then_tried_once() -> None:
    async with serving(script(Told(503))) as server:
        wire = _wire(server.url, retries=0, circuit_failures=3, circuit_seconds=60)
        codes = [await _code(wire) for _ in range(5)]
        assert codes == ["billing.provider_busy"] * 3 + ["billing.provider_circuit_open"] * 2
        assert len(server.asked) == 3
        with pytest.raises(Problem) as caught:
            await wire.send("GET", "/v1/x", headers={}, again=True)
        assert 1 <= int(caught.value.headers["Retry-After"]) <= 60
        await wire.close()


async def test_a_call_that_is_cancelled_says_nothing_of_the_provider() -> None:
    async with serving(script(Told(hang=True))) as server:
        wire = _wire(server.url, circuit_failures=1)
        task = asyncio.create_task(wire.send("GET", "/v1/x", headers={}, again=True))
        async with asyncio.timeout(30):
            while not server.asked:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert wire.circuit.state == "closed"
        await wire.close()


async def test_nobody_there_is_said_without_an_address_of_ours() -> None:
    async with serving(script(Told())) as server:
        url = server.url
    wire = _wire(url, retries=1)
    assert await _code(wire) == "billing.provider_unreachable"
    await wire.close()


async def test_an_answer_without_end_is_cut() -> None:
    async with serving(script(Told(200, b"x" * 5000))) as server:
        wire = _wire(server.url, answer_max_bytes=4096)
        assert await _code(wire) == "billing.provider_unreadable"
        await wire.close()


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"\xff", b"[" * 100_000])
async def test_an_answer_that_is_no_object_is_said_to_be_unreadable(body: bytes) -> None:
    async with serving(script(Told(200, body))) as server:
        wire = _wire(server.url)
        answer = await wire.send("GET", "/v1/x", headers={}, again=True)
        with pytest.raises(Problem) as caught:
            answer.document("stripe")
        assert caught.value.code == "billing.provider_unreadable"
        await wire.close()


async def test_keys_go_to_no_other_address_and_redirects_are_not_followed() -> None:
    async with serving(script(Told(302, headers={"location": "http://127.0.0.1:1/"}))) as server:
        wire = _wire(server.url)
        for path in ("http://127.0.0.1:1/v1/x", f"{server.url}.example.com/v1", f"{server.url}@evil/v1"):
            assert await _code(wire, path=path) == "billing.provider_unreadable"
        assert server.asked == []
        answer = await wire.send("GET", f"{server.url}/v1/x", headers={}, again=True)
        assert (answer.status, len(server.asked)) == (302, 1)
        await wire.close()
