"""Accounts at certificate authorities (CAs): one a CA for the whole installation, made when it is first needed.

Its key is stored, sealed, before the CA hears of it, and registering the same key again gives the same account (RFC 8555, 7.3):
so a worker that dies in between, or two that begin at once, make one account.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa

from portico.control.domains import acme_cas, acme_client, acme_store
from portico.control.domains.acme_client import Client
from portico.kit.db import Database, refuse_in_transaction
from portico.kit.ids import new_id
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

_PURPOSE = "acme account"


class Accounts:
    """Clients of CAs, each as our account there."""

    def __init__(self, settings: ApiSettings, db: Database) -> None:
        self._settings = settings
        self._db = db
        self._sealer = Sealer(settings.master_key)

    @asynccontextmanager
    async def client(self, directory: str) -> AsyncIterator[Client]:
        """A client with an account that the CA knows. Raises ``AcmeError``."""
        async with self.anonymous(directory) as client:
            if client.account is None:
                await self._register(client)
            yield client

    @asynccontextmanager
    async def anonymous(self, directory: str) -> AsyncIterator[Client]:
        """A client for what needs no account; its key is that of the account that there is or will be."""
        refuse_in_transaction()
        row = await self._row(directory)
        key = acme_client.read_key(self._sealer.open(_PURPOSE, row.id, row.sealed_key))
        client = acme_cas.client(self._settings, directory, key, row.url)
        try:
            yield client
        finally:
            await client.close()

    async def orders_url(self, directory: str) -> str | None:
        """The account's list of orders, where the CA has one."""
        url: str | None = (await self._row(directory)).orders_url
        return url

    async def _row(self, directory: str) -> sa.Row[Any]:
        """The account's row, with a key that is made before the CA hears of it."""
        async with self._db.read() as reader:
            row = await acme_store.account(reader, directory)
        if row is not None:
            return row
        made = new_id("aca")
        sealed = self._sealer.seal(_PURPOSE, made, acme_client.key_pem(acme_client.new_key()))
        async with self._db.transaction() as tx:
            await acme_store.add_account(tx, {"id": made, "directory": directory, "sealed_key": sealed})
        async with self._db.read() as reader:
            row = await acme_store.account(reader, directory)
        assert row is not None
        return row

    async def _register(self, client: Client) -> None:
        ca = next((one for one in acme_cas.configured(self._settings) if one.directory == client.directory_url), None)
        binding = ca.binding if ca is not None else None
        url, orders = await client.register(self._settings.acme_contacts, agree=True, binding=binding)
        async with self._db.transaction() as tx:
            await acme_store.registered(tx, client.directory_url, url, orders)
        log.info("account at a certificate authority", extra={"f": {"ca": client.directory_url, "account": url}})
