"""Every answer has an id and a shape; no input is a 500."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from fastapi import Request

from portico.errors import Problem, catalogue
from tests.control.conftest import Account


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["code"] == code
    assert body["status"] == status
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["detail"]
    assert body["hint"]
    return body


class TestRequestId:
    async def test_is_made_echoed_or_replaced(self, client: httpx.AsyncClient) -> None:
        made = (await client.get("/healthz")).headers["x-request-id"]
        assert made.startswith("req_")
        echoed = await client.get("/healthz", headers={"X-Request-Id": "build-7.a"})
        assert echoed.headers["x-request-id"] == "build-7.a"
        for bad in ("a b", "x" * 65, "a\tb", "<script>", ""):
            answer = await client.get("/healthz", headers={"X-Request-Id": bad})
            assert answer.headers["x-request-id"].startswith("req_")


class TestHeaders:
    async def test_security_headers_and_no_banner(self, client: httpx.AsyncClient) -> None:
        answer = await client.get("/healthz", headers={"Origin": "https://evil.example"})
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "server" not in answer.headers
        assert not any(name.startswith("access-control") for name in answer.headers)


class TestRefusals:
    async def test_unknown_address(self, client: httpx.AsyncClient) -> None:
        problem(await client.get("/v1/nothing"), 404, "request.not_found")
        problem(await client.get("/v1/whoami/"), 404, "request.not_found")

    async def test_wrong_method(self, client: httpx.AsyncClient) -> None:
        answer = await client.put("/v1/whoami")
        problem(answer, 405, "request.method_not_allowed")
        assert answer.headers["allow"] == "GET"

    async def test_a_wrong_method_is_told_every_right_one(self, client: httpx.AsyncClient) -> None:
        assert (await client.put("/v1/tunnels")).headers["allow"] == "GET, POST"
        assert (await client.post("/v1/tunnels/tun_x")).headers["allow"] == "DELETE, GET, PATCH"
        assert (await client.put("/v1/api-keys/posture")).headers["allow"] == "GET"

    @pytest.mark.parametrize(
        "body",
        [b"{", b"", b"\xff\xfe\xfa", b'{"email": "\xff"}', b"[" * 100_000, b'{"a":' * 20_000, b"1" * 6000, b"nul"],
    )
    async def test_bodies_that_are_not_json(self, client: httpx.AsyncClient, body: bytes) -> None:
        answer = await client.post("/v1/auth/login", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), answer.text
        problem(answer, answer.status_code, {400: "request.malformed", 422: "request.invalid"}[answer.status_code])

    async def test_invalid_json_is_malformed(self, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/auth/login", content=b"{", headers={"Content-Type": "application/json"})
        problem(answer, 400, "request.malformed")

    @pytest.mark.parametrize("value", ['"a\\u0000b"', '"\\ud800"', '"\\uDFFF x"', "NaN", "Infinity", "-Infinity"])
    async def test_what_cannot_be_stored_is_refused_anywhere(self, owner: Account, value: str) -> None:
        for body in (f'{{"kind":"agent","name":{value}}}', f'{{"kind":"agent","name":"x","more":[{{"a":{value}}}]}}'):
            answer = await owner.client.post(
                "/v1/api-keys", content=body.encode(), headers={"Content-Type": "application/json"}
            )
            problem(answer, 422, "request.invalid")

    async def test_an_escaped_backslash_is_not_a_nul(self, owner: Account) -> None:
        answer = await owner.client.post("/v1/api-keys", json={"kind": "agent", "name": "C:\\u0000 NaN"})
        assert answer.status_code == 201, answer.text

    async def test_validation_names_fields_and_repeats_no_value(self, client: httpx.AsyncClient) -> None:
        secret = "s3cr3t-" + "x" * 2000
        answer = await client.post("/v1/auth/login", json={"email": "no", "password": secret, "other": secret})
        body = problem(answer, 422, "request.invalid")
        assert {e["field"] for e in body["errors"]} == {"body.email", "body.password", "body.other"}
        assert "s3cr3t" not in answer.text

    async def test_huge_numbers(self, owner: Account) -> None:
        for limit in ("1" * 400, "-1", "101", "1e9", "x", ""):
            problem(await owner.client.get("/v1/audit", params={"limit": limit}), 422, "request.invalid")
        key = await owner.key()
        body = f'{{"overlap_seconds": {"9" * 4000}}}'.encode()
        answer = await owner.client.post(
            f"/v1/api-keys/{key['id']}/rotate", content=body, headers={"Content-Type": "application/json"}
        )
        problem(answer, 422, "request.invalid")

    async def test_bad_cursor(self, owner: Account) -> None:
        problem(await owner.client.get("/v1/audit", params={"cursor": "!!"}), 400, "request.cursor_invalid")

    @pytest.mark.parametrize("path", ["/v1/api-keys/%00", "/v1/audit?cursor=%00", "/v1/api-keys/a%0Ab", "/%7F"])
    async def test_control_characters_in_the_address(self, owner: Account, path: str) -> None:
        answer = await owner.client.delete(path) if "api-keys" in path else await owner.client.get(path)
        problem(answer, 400, "request.malformed")

    async def test_any_id_is_a_404_never_a_500(self, owner: Account) -> None:
        for key in ("x", "key_" + "z" * 5000, "%F0%9F%92%A9", "%FF", "'; DROP TABLE users --", "..%2F"):
            answer = await owner.client.delete(f"/v1/api-keys/{key}")
            assert answer.status_code == 404, (key, answer.text)


class TestBodyLimits:
    async def test_declared_too_large(self, client: httpx.AsyncClient, app: Any) -> None:
        limit = app.state.settings.request_body_max_bytes
        answer = await client.post("/v1/auth/login", content=b"x" * (limit + 1))
        assert problem(answer, 413, "request.too_large")["limit"] == limit

    @pytest.mark.parametrize("path", ["/v1/auth/login", "/v1/api-keys", "/sign-in"])
    async def test_streamed_too_large(self, owner: Account, app: Any, path: str) -> None:
        async def chunks() -> Any:
            for _ in range(40):
                yield b" " * 65536

        kind = "application/x-www-form-urlencoded" if path == "/sign-in" else "application/json"
        answer = await owner.client.post(path, content=chunks(), headers={"Content-Type": kind})
        problem(answer, 413, "request.too_large")

    @pytest.mark.parametrize("length", ["abc", "-1", "9" * 30])
    async def test_nonsense_length(self, client: httpx.AsyncClient, length: str) -> None:
        answer = await client.post("/v1/auth/login", headers={"Content-Length": length})
        problem(answer, 413, "request.too_large")

    async def test_a_body_that_never_ends(self, app: Any) -> None:
        """Straight ASGI: a sender that stalls is cut after the limit, and holds no database connection meanwhile."""
        object.__setattr__(app.state.settings, "request_body_timeout_seconds", 0.1)
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(30)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(dict(message))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/api-keys",
            "raw_path": b"/v1/api-keys",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("api.test", 80),
        }
        await app(scope, receive, send)
        assert sent[0]["status"] == 408
        assert json.loads(sent[1]["body"])["code"] == "request.timeout"
        async with asyncio.timeout(30):  # what the process does in the background may have one for a moment
            while app.state.db.engine.pool.checkedout():
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
async def test_times_beyond_the_calendar_are_no_fault_of_ours(owner: Account, at: str) -> None:
    for answer in (
        await owner.client.get("/v1/audit", params={"since": at}),
        await owner.client.get("/v1/audit", params={"until": at}),
        await owner.client.get("/v1/events", params={"since": at}),
        await owner.client.post("/v1/api-keys", json={"kind": "api", "name": "x", "expires_at": at}),
    ):
        problem(answer, 422, "request.invalid")


class TestFaults:
    async def test_an_unexpected_error_shows_nothing_and_is_logged_with_the_id(
        self, app: Any, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def broken(request: Request) -> None:
            raise RuntimeError("the password is hunter2")

        app.add_route("/broken", broken)
        with caplog.at_level(logging.ERROR):
            answer = await client.get("/broken")
        body = problem(answer, 500, "internal.error")
        assert "hunter2" not in answer.text
        record = next(r for r in caplog.records if r.message == "request failed")
        assert record.f["request"] == body["request_id"]  # type: ignore[attr-defined]
        assert record.exc_info

    async def test_a_lost_race_is_a_conflict(self, app: Any, client: httpx.AsyncClient) -> None:
        import asyncpg

        async def deadlocked(request: Request) -> None:
            raise asyncpg.DeadlockDetectedError("deadlock detected")

        app.add_route("/deadlocked", deadlocked)
        answer = await client.get("/deadlocked")
        problem(answer, 409, "request.conflict")
        assert answer.headers["retry-after"] == "1"

    async def test_problems_carry_their_headers(self, app: Any, client: httpx.AsyncClient) -> None:
        async def busy(request: Request) -> None:
            raise Problem("auth.throttled", headers={"Retry-After": "7"})

        app.add_route("/busy", busy)
        answer = await client.get("/busy")
        problem(answer, 429, "auth.throttled")
        assert answer.headers["retry-after"] == "7"


class TestCatalogue:
    def test_only_request_and_idempotency_shapes_are_422(self) -> None:
        """422 is for what the payload is alone (system.md section 5); a private key is no part of any event's shape."""
        names = {code for code, spec in catalogue().items() if spec.status == 422}
        shapes = {"request.invalid", "idempotency.mismatch", "tunnel.name_invalid", "tunnel.policy_invalid"}
        assert names <= shapes | {"cert.key_material"}


@pytest.mark.parametrize("name", ["Authorization", "Idempotency-Key", "Content-Type"])
async def test_a_header_that_has_one_meaning_is_sent_once(owner: Account, name: str) -> None:
    headers = [(name, "Bearer x"), (name, "Bearer y")]
    problem(await owner.client.post("/v1/tunnels", json={}, headers=headers), 400, "request.malformed")
