"""A domain of one's own at live relays: where it leads, and whether it is blocked, is there within 2 s."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import Any

import asyncpg
import pytest

from portico.embedded.postgres import EmbeddedPostgres
from portico.kit import ids
from tests.system.platform import Account, Agent, Up
from tests.system.targets import app
from tests.system.visitor import Poller

pytestmark = [pytest.mark.system, pytest.mark.realtime]

REACH_SECONDS = 2.0


async def proved(up: Up, account: Account) -> dict[str, Any]:
    """A domain of the account's organization whose records were seen; no resolver here knows one."""
    made, name = ids.new_id("dom"), f"www.d{os.urandom(4).hex()}.example.com"
    right = '{"ownership": {"state": "ok"}, "routing": {"state": "ok"}}'
    connection = await asyncpg.connect(EmbeddedPostgres(up.home).uri)
    try:
        await connection.execute(
            "INSERT INTO custom_domains (id, organization_id, name, hostname_status, verification_token, dns_findings)"
            " VALUES ($1, $2, $3, 'active', 'x', $4)",
            made, account.call("GET", "/whoami")["organization"]["id"], name, right,
        )  # fmt: skip
    finally:
        await connection.close()
    return {"id": made, "name": name}


async def test_what_becomes_of_a_domain_reaches_visitors(
    up: Up, account: Account, agent: Agent, host: str, target: socket.socket
) -> None:
    domain = await proved(up, account)
    operator = up.credentials["operator_key"]
    own, theirs, why = f"/domains/{domain['id']}", f"/admin/domains/{domain['id']}", {"reason": "system test"}
    (tunnel,) = (row["id"] for row in account.tunnels().values())
    acts = [
        ("routed", True, (f"{own}/route", {"tunnel": tunnel}, "")),
        ("blocked", False, (f"{theirs}/block", why, operator)),
        ("unblocked", True, (f"{theirs}/unblock", why, operator)),
        ("unrouted", False, (f"{own}/unroute", None, "")),
    ]
    took = {}
    async with app(target), Poller(up.http_port, domain["name"], rate=20) as poller:
        await poller.until(good=False, since=time.monotonic(), limit=5)
        for what, good, (path, body, token) in acts:
            await asyncio.to_thread(account.call, "POST", path, body, token)
            at = time.monotonic()
            took[what] = await poller.until(good=good, since=at, limit=REACH_SECONDS)
            await asyncio.sleep(0.2)
            assert {visit.good for visit in poller.since(at + took[what])} <= {good}, what
    print({what: f"{seconds * 1000:.0f} ms" for what, seconds in took.items()})
