"""TLS tunnels: a subdomain as HTTP has one, and hosts whose TLS is passed through, in grants and on the edge stream."""

from __future__ import annotations

import dataclasses
from typing import Any

import httpx
import pytest

from portico.control.tunnels.addresses import Addresses
from portico.kit.db import Database
from portico.kit.jwt import KeySet
from portico.settings import ApiSettings, Secret
from portico.wire import grants
from portico.wire.policy import digest
from tests.control.conftest import Account, MovableClock
from tests.control.tunnels.test_sessions import actions, body, code, keys, opened, payloads
from tests.control.tunnels.test_tunnels import made

__all__ = ["keys"]

SPEC = {"protocol": "tls", "target": "tls://localhost:8443"}


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    """A limit of connections that differs from that of requests."""
    return dataclasses.replace(settings, tunnel_connections=7)


class TestCreate:
    async def test_says_what_was_made(self, owner: Account, db: Database) -> None:
        got = await made(owner.client, protocol="tls", name="vault", target="tls://localhost:8443")
        assert (got["url"], got["subdomain"], got["remote_port"]) == ("tls://vault.localhost:7443", "vault", None)
        assert (got["protocol"], got["state"]) == ("tls", "offline")
        assert (await payloads(db))[-1]["tunnel"] == {
            "id": got["id"], "organization": owner.organization, "protocol": "tls", "hosts": ["vault.localhost"],
            "state": "active", "generation": 1, "policy": {}, "policy_hash": digest({}), "policy_version": 1,
        }  # fmt: skip
        assert "tunnel.create" in await actions(db, owner.organization)

    async def test_one_subdomain_has_one_tunnel_of_either_kind(self, owner: Account, stranger: Account) -> None:
        await made(owner.client, protocol="tls", subdomain="of-one-kind")
        wish = {"name": "other", "subdomain": "of-one-kind"}
        for client, protocol in ((owner.client, "http"), (stranger.client, "tls")):
            answer = await client.post("/v1/tunnels", json={"protocol": protocol, **wish})
            assert code(answer, 409) == "tunnel.subdomain_taken"

    async def test_it_has_no_port(self, owner: Account) -> None:
        answer = await owner.client.post("/v1/tunnels", json={"protocol": "tls", "remote_port": 7100})
        assert code(answer, 400) == "tunnel.port_invalid"
        assert answer.json()["detail"] == "a TLS tunnel has a subdomain and no port"

    async def test_it_moves_to_another_host(self, owner: Account, db: Database) -> None:
        got = await made(owner.client, protocol="tls", name="moves")
        changed = (await owner.client.patch(f"/v1/tunnels/{got['id']}", json={"subdomain": "moved-tls"})).json()
        assert changed["url"] == "tls://moved-tls.localhost:7443"
        row = (await payloads(db))[-1]["tunnel"]
        assert (row["protocol"], row["hosts"], row["generation"]) == ("tls", ["moved-tls.localhost"], 2)


class TestSessions:
    async def test_its_grant_says_that_tls_passes(
        self, agent: httpx.AsyncClient, keys: KeySet, clock: MovableClock
    ) -> None:
        (row,) = (await opened(agent, {**SPEC, "name": "granted"}))["grants"]
        grant = grants.verify_grant(row["grant"], keys, clock.wall().timestamp())
        assert (grant.proto, grant.port) == ("tls", None)
        assert grant.hosts == (grants.GrantHost("granted.localhost", "passthrough"),)
        assert grant.limits["concurrency"] == 7
        assert row["url"] == grant.url == "tls://granted.localhost:7443"

    async def test_a_restarted_agent_finds_its_tunnel(self, agent: httpx.AsyncClient) -> None:
        first = (await opened(agent, SPEC))["grants"][0]
        again = (await opened(agent, SPEC, agent_id="agt-9876543210"))["grants"][0]
        assert again["name"] != first["name"]  # the first one is about to bind
        same = (await opened(agent, SPEC))["grants"][0]
        assert (same["tunnel"], same["url"]) == (first["tunnel"], first["url"])

    async def test_protocols_do_not_mix(self, agent: httpx.AsyncClient) -> None:
        await opened(agent, {"protocol": "http", "name": "web-only"})
        answer = await agent.post("/v1/agent/sessions", json=body({**SPEC, "name": "web-only"}))
        assert code(answer, 409) == "tunnel.protocol_mismatch"
        target = {"target": "unix:/run/both.sock"}
        both = await opened(agent, {"protocol": "tcp", **target}, {"protocol": "tls", **target})
        assert [g["url"].split(":")[0] for g in both["grants"]] == ["tcp", "tls"]


@pytest.mark.parametrize(
    ("public", "port", "shown"),
    [
        ("http://localhost:7080", 0, 7443),
        ("https://tunnels.example.com", 0, 443),
        ("https://tunnels.example.com:8443", 0, 8443),
        ("http://localhost:7080", 10443, 10443),
        ("https://tunnels.example.com", 10443, 10443),
    ],
)
def test_the_port_that_visitors_use(public: str, port: int, shown: int) -> None:
    settings = ApiSettings(
        database_url=Secret("x"), master_key=Secret("x"), public_url=public, public_https_port=port,
        base_domain="tunnels.example.com",
    )  # fmt: skip
    row: dict[str, Any] = {"protocol": "tls", "port": None, "subdomain": "vault"}
    assert Addresses(settings).url(row) == f"tls://vault.tunnels.example.com:{shown}"
    assert Addresses(settings).url({**row, "protocol": "http"}).startswith(public.split(":")[0] + "://vault.")
