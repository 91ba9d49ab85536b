"""A sender of certificate events, and the worker that applies them, for tests."""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import sqlalchemy as sa

from portico.control.domains import lifecycle, service
from portico.control.domains.store import custom_domains
from portico.control.identity.keys import issue
from portico.kit import queue
from portico.kit.http_signatures import Target
from portico.kit.ids import new_id
from portico.kit.queue import Limits
from portico.kit.signed_requests import Codec, SigningKey, headers

PATH = "/v1/domains/cert-events"
TARGET = Target("POST", "api.test", PATH)
_numbers = itertools.count(1)


def body_of(source: str, event: str, pair: str, hostname: str, **more: Any) -> dict[str, Any]:
    """The body of an event; ``more`` replaces members."""
    name, _, action = pair.partition(".")
    number = next(_numbers)
    made: dict[str, Any] = {
        "specVersion": "1",
        "eventId": event,
        "sourceId": source,
        "clusterId": "eu-1",
        "environment": "production",
        "sequence": number,
        "occurredAt": datetime.now(UTC).isoformat(),
        "callbackClass": name,
        "callbackAction": action,
        "subject": {"hostname": hostname},
        "provenance": {"producer": "test", "objectUid": f"uid-{number}", "revision": 1},
    }
    return made | more


async def operator_client(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    """A client with an operator key."""
    async with app.state.db.transaction() as tx:
        made = await issue(tx, app.state.clock.wall(), None, None, "operator", "test", [])
    return connect(made.key)


@dataclass
class Sender:
    """A source with its key."""

    client: httpx.AsyncClient
    source: str
    key: SigningKey
    clock: Any
    cluster: str = "eu-1"
    more: dict[str, str] = field(default_factory=dict)

    def body(self, pair: str, hostname: str, **more: Any) -> dict[str, Any]:
        return body_of(self.source, f"evt_{secrets.token_hex(8)}", pair, hostname, **more)

    def fields(self, raw: bytes, event: str, codec: Codec = "standard", shift: int = 0) -> dict[str, str]:
        at = int(self.clock.wall().timestamp()) + shift
        return headers(codec, self.key, self.source, self.cluster, event, at, TARGET, raw)

    async def send(
        self, document: Mapping[str, Any] | bytes, *, event: str | None = None, codec: Codec = "standard", shift: int = 0,
        change: Mapping[str, str | None] | None = None,
    ) -> httpx.Response:  # fmt: skip
        """Sign and post; ``change`` replaces or (None) drops header fields after that."""
        raw = document if isinstance(document, bytes) else json.dumps(document).encode()
        named = event or ("cev_none" if isinstance(document, bytes) else str(document["eventId"]))
        given = {**self.fields(raw, named, codec, shift), **(change or {})}
        return await self.client.post(
            PATH, content=raw, headers={name: value for name, value in given.items() if value is not None}
        )

    async def tell(self, pair: str, hostname: str, **more: Any) -> str:
        """Send an event that must be taken; its id."""
        answer = await self.send(self.body(pair, hostname, **more))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["event"])


async def make_source(operator: httpx.AsyncClient, client: httpx.AsyncClient, clock: Any, **more: Any) -> Sender:
    """A new source, and somebody who has its key."""
    wanted = {"name": f"source {next(_numbers)}", "environment": "production", "clusters": ["eu-1"], "hostnames": ["*"]}
    answer = await operator.post("/v1/admin/cert-sources", json=wanted | more)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    return Sender(client, made["id"], SigningKey.of(made["key"]["id"], made["key"]["secret"]), clock)


async def apply_all(db: Any, follow: Any = None, now: datetime | None = None) -> int:
    """Apply everything that waits, as the worker does; how many events it were."""
    count = 0
    while True:
        found, _ = await queue.claim(db, lifecycle.KIND, Limits(), 100)
        if not found:
            return count
        for work in found:
            await lifecycle.apply(work, now or datetime.now(UTC), follow)
            count += 1


async def hold(db: Any, organization: str, name: str, **more: Any) -> str:
    """A domain that the organization has proved; its id."""
    made = new_id("dom")
    row = {"id": made, "organization_id": organization, "name": name, "verification_token": "x"}
    async with db.transaction() as tx:
        await tx.execute(sa.insert(custom_domains).values(**row | {"hostname_status": "active"} | more))
    return made


async def domain(db: Any, domain_id: str) -> Any:
    """Its row."""
    async with db.read() as reader:
        return await service.find(reader, domain_id)
