"""The worker `notifications` as a process of its own, killed (`kill -9`) while a receiver has its message."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from portico.control.access import Caller
from portico.control.notifications import channels
from portico.control.notifications.channels import Channels, Wanted
from portico.kit import signing
from portico.kit.clock import SystemClock
from portico.kit.db import Database
from portico.kit.sealing import Sealer, new_master_key
from portico.settings import ApiSettings, Secret
from portico.simulators.webhooks import Behaviour, WebhookReceiver

_KEY = new_master_key()


async def start(database_url: str, port: int) -> asyncio.subprocess.Process:
    """A worker that delivers webhooks, with leases that end soon."""
    environment = {
        "DATABASE_URL": database_url, "MASTER_KEY": _KEY, "OUTBOUND_HTTP": "true", "OUTBOUND_PORTS": str(port),
        "OUTBOUND_ALLOW": "127.0.0.0/8,::1/128", "QUEUE_LEASE_SECONDS": "1", "TICK_SECONDS": "0.1",
    }  # fmt: skip
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "portico.cli", "worker", "outbox.webhook",
        env=os.environ | {f"PORTICO_{name}": value for name, value in environment.items()},
    )  # fmt: skip


async def test_killed_while_a_receiver_has_it(database_url: str, db: Database) -> None:
    async with WebhookReceiver() as receiver:
        settings = ApiSettings(
            database_url=Secret(database_url), master_key=Secret(_KEY), outbound_http=True,
            outbound_ports=(receiver.port,), outbound_allow=("127.0.0.0/8", "::1/128"),
        )  # fmt: skip
        sealer = Sealer(settings.master_key)
        service = Channels(settings, db, SystemClock(), sealer)
        async with db.transaction() as tx:
            await tx.raw.execute("INSERT INTO organizations (id, name) VALUES ('org_killed', 'Acme')")
            who = Caller("operator", "installation", "org_killed")
            made = await service.replace(tx, who, [Wanted(None, "webhook", "x", receiver.url, ["*"], True)])
            (message,) = await channels.notify(tx, sealer, "org_killed", "channel.test", {"name": "x"}, "once")
        receiver.secrets = [made["data"][0]["secret"]]
        receiver.plan(Behaviour(seconds=30))  # it has it all, and answers nobody who is left
        first = await start(database_url, receiver.port)
        await receiver.until(1, 30)
        first.send_signal(signal.SIGKILL)
        await first.wait()
        second = await start(database_url, receiver.port)
        try:
            await receiver.until(2, 30)
            async with asyncio.timeout(30):
                while True:
                    async with db.read() as reader:
                        row = await reader.raw.fetchrow("SELECT * FROM outbox_messages WHERE id = $1", message)
                    if row["queue_state"] == "done":
                        break
                    await asyncio.sleep(0.05)
        finally:
            second.send_signal(signal.SIGTERM)
            assert await second.wait() == 0
        assert {got.headers[signing.ID] for got in receiver.got} == {message} and len(receiver.got) == 2
        assert not receiver.refused and receiver.got[0].body == receiver.got[1].body
        assert (row["attempts"], row["status"], row["receipt"]) == (2, 200, "HTTP 200")
