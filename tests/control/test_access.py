"""Callers, permissions, tenants: deny is the default."""

from __future__ import annotations

from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI, Request

from portico.control import access
from portico.control.access import AGENT_KEY_PERMISSIONS, PERMISSIONS, ROLES, Caller, require
from portico.errors import Problem
from tests.control.conftest import Account
from tests.control.test_http import problem


class TestPermissions:
    def test_every_role_and_kind_holds_known_permissions(self) -> None:
        assert all(held <= PERMISSIONS for held in ROLES.values())
        assert AGENT_KEY_PERMISSIONS < PERMISSIONS
        assert not {"keys:write", "keys:read", "audit:read"} & AGENT_KEY_PERMISSIONS

    def test_a_route_cannot_ask_for_an_unknown_permission(self) -> None:
        with pytest.raises(ValueError, match="unknown permission"):
            require("tunnels:typo")

    def test_check_and_org(self) -> None:
        who = Caller("api_key", "key_1", None, frozenset({"audit:read"}))
        assert who.may("audit:read")
        with pytest.raises(Problem) as refused:
            who.check("keys:write")
        assert refused.value.code == "auth.forbidden"
        with pytest.raises(Problem) as refused:
            _ = who.org
        assert refused.value.code == "auth.forbidden"


class TestCredentials:
    @pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic dTpw", "Token x", "bearer"])
    async def test_none(self, client: httpx.AsyncClient, header: str | None) -> None:
        headers = {} if header is None else {"Authorization": header}
        answer = await client.get("/v1/whoami", headers=headers)
        problem(answer, 401, "auth.required")
        assert answer.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize("token", ["x", "a.b.c", "tnl_agt_" + "0" * 36, "é" * 3, "x" * 9000, "tnl_"])
    async def test_noise(self, client: httpx.AsyncClient, token: str) -> None:
        headers = {"Authorization": f"Bearer {token}".encode()}
        answer = await client.get("/v1/whoami", headers=headers)  # type: ignore[arg-type]
        code = "auth.key_invalid" if token.startswith("tnl_") else "auth.token_invalid"
        problem(answer, 401, code)

    async def test_operator_dependency(self, app: FastAPI, owner: Account) -> None:
        @app.get("/only-operators")
        async def only_operators(who: Annotated[Caller, Depends(access.require_operator())]) -> dict[str, str]:
            return {"id": who.id}

        problem(await owner.client.get("/only-operators"), 403, "auth.operator_required")


class TestTenants:
    async def test_lists_show_nothing_of_others(self, owner: Account, stranger: Account) -> None:
        await owner.key()
        assert (await stranger.client.get("/v1/api-keys")).json() == {"data": [], "next_cursor": None}
        for path in ("/v1/audit", "/v1/auth/sessions", "/v1/whoami"):
            text = (await stranger.client.get(path)).text
            assert owner.organization not in text
            assert owner.user not in text
            assert owner.session not in text


class TestClientAddress:
    @pytest.mark.parametrize(
        ("trusted", "peer", "forwarded", "expected"),
        [
            ((), "203.0.113.9", "1.1.1.1", "203.0.113.9"),
            (("10.0.0.0/8",), "10.0.0.2", "1.1.1.1", "1.1.1.1"),
            (("10.0.0.0/8",), "10.0.0.2", "6.6.6.6, 1.1.1.1, 10.0.0.7", "1.1.1.1"),
            (("10.0.0.0/8",), "203.0.113.9", "1.1.1.1", "203.0.113.9"),
            (("10.0.0.0/8",), "10.0.0.2", "", "10.0.0.2"),
            (("10.0.0.0/8",), "10.0.0.2", "<script>", "unknown"),
            (("10.0.0.0/8",), "::ffff:10.0.0.2", "6.6.6.6, 1.1.1.1:5000, ::ffff:10.0.0.7", "1.1.1.1"),
            (("fd00::/8",), "fd00::2", "[2001:db8::1]:5000, [fd00::3]", "2001:db8::1"),
            ((), "::ffff:203.0.113.9", "", "203.0.113.9"),
            (("10.0.0.0/8",), "10.0.0.2", "fe80::1%" + "x" * 60_000, "unknown"),
        ],
    )
    def test_only_trusted_proxies_speak_for_others(
        self, trusted: tuple[str, ...], peer: str, forwarded: str, expected: str
    ) -> None:
        import ipaddress

        app = FastAPI()
        app.state.trusted_proxies = tuple(ipaddress.ip_network(t) for t in trusted)
        headers = [(b"x-forwarded-for", forwarded.encode())] if forwarded else []
        scope = {"type": "http", "headers": headers, "client": (peer, 1), "app": app}
        assert access.client_address(Request(scope)) == expected

    def test_a_proxy_may_add_a_line_of_its_own_below_one_that_the_client_made_up(self) -> None:
        import ipaddress

        app = FastAPI()
        app.state.trusted_proxies = (ipaddress.ip_network("10.0.0.0/8"),)
        headers = [(b"x-forwarded-for", b"6.6.6.6"), (b"x-forwarded-for", b"1.1.1.1")]
        scope = {"type": "http", "headers": headers, "client": ("10.0.0.2", 1), "app": app}
        assert access.client_address(Request(scope)) == "1.1.1.1"
