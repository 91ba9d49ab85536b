"""Every operation of the OpenAPI document, called as everybody: ``Walk(app, world).run()`` says which cells are wrong.

What each caller may do is derived from what the operation declares (``x-callers``, ``x-permission``) and from the tables of
``access.py``; nothing is written down twice. A new endpoint is walked as it is. It needs a line here only when its path
names a kind of object that no path named before (``World.object``), or its body a value that cannot be made from its
schema (``EXAMPLES``).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sqlalchemy.dialects import postgresql as pg

from portico.control.access import AGENT_KEY_PERMISSIONS, PERMISSIONS, ROLES, SUPPORT_PERMISSIONS, Caller, CallerKind
from portico.control.billing import (
    billing_store,
    dunning_store,
    export_store,
    exports,
    invoices,
    overage_store,
    settlement_store,
    webhook_body,
    webhook_store,
    webhooks,
)
from portico.control.billing.billing_store import Source
from portico.control.domains import incident_store, lifecycle, sources
from portico.control.identity import operators, tables, tokens
from portico.control.identity.account_tables import passkeys
from portico.control.identity.keys import issue
from portico.control.notifications.channels import Wanted
from portico.control.tunnels import relays
from portico.kit import envelope
from portico.kit.ids import digest, new_id, new_token
from tests.control.conftest import PASSWORD, Account, heartbeat_body
from tests.control.finance.making import event

METHODS = ("get", "post", "put", "patch", "delete")

# Values of body members whose schema alone does not say what fits. Members that are not required are sent when named here.
EXAMPLES: dict[str, Any] = {
    "agent_id": "agt-0123456789",
    "connect_url": heartbeat_body()["connect_url"],
    "email": "somebody@example.com",
    "country": "DE",
    "ends_on": "2026-01-01",
    "kind": "api",
    "password": PASSWORD,
    "permissions": ["tunnels:read"],
    "plan": "unlimited",
    "public_key": "Y13l6wOfwSagF7nnieHbchzdUfftP1UV0Y4vTi3XhRo",
    "public_url": heartbeat_body()["public_url"],
    "relay": "relay-1",
    "role": "viewer",
    "scopes": [],
    "sha256": "0" * 64,
    "target": "127.0.0.1:8000",
}
_JANUARY, _FEBRUARY = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
TEXTS = ("name-%d", "agt-0123456789", "local", "2030-01-01T00:00:00Z")


@dataclass(frozen=True)
class Operation:
    """One operation and whom it admits."""

    method: str
    path: str
    callers: frozenset[str]
    permissions: frozenset[str]
    body: dict[str, Any] | None
    step_up: bool = False

    @property
    def parameters(self) -> list[str]:
        return re.findall(r"{(\w+)}", self.path)

    def __str__(self) -> str:
        return f"{self.method.upper()} {self.path}"


def operations(document: dict[str, Any]) -> list[Operation]:
    """All of them. Raises ``AssertionError`` for one that does not say whom it admits."""
    found, undeclared = [], []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method not in METHODS or not operation.get("x-callers"):
                undeclared.append(f"{method.upper()} {path}")
                continue
            content = operation.get("requestBody", {}).get("content", {})
            schema = next(iter(content.values()))["schema"] if content else None
            callers, permissions = operation["x-callers"], operation.get("x-permission", [])
            step_up = bool(operation.get("x-step-up"))
            found.append(Operation(method, path, frozenset(callers), frozenset(permissions), schema, step_up))
    assert not undeclared, f"these say nothing about who may call them (access.require, access.PUBLIC, …): {undeclared}"
    return found


class Bodies:
    """The smallest bodies that fit a schema of the document, plus what ``EXAMPLES`` names."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._count = 0

    def make(self, schema: dict[str, Any], name: str = "") -> Any:
        if name in EXAMPLES:
            return EXAMPLES[name]
        while "$ref" in schema:
            schema = self._document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        if "const" in schema or "enum" in schema:
            return schema.get("const", schema.get("enum", [None])[0])
        if options := schema.get("anyOf") or schema.get("oneOf"):
            return self.make(options[0], name)
        kind = schema.get("type")
        if kind == "object":
            wanted = {*schema.get("required", ()), *(EXAMPLES.keys() | {"name"}) & schema.get("properties", {}).keys()}
            return {key: self.make(schema["properties"][key], key) for key in sorted(wanted)}
        if kind == "array":
            return [self.make(schema["items"])] * schema.get("minItems", 0)
        if kind in ("integer", "number"):
            return max(schema.get("minimum", 0), 0)
        return False if kind == "boolean" else self._text(schema)

    def _text(self, schema: dict[str, Any]) -> str:
        self._count += 1
        if schema.get("format") == "idn-hostname":
            return f"www{self._count}.example.net"
        for text in TEXTS:
            text = text % self._count if "%" in text else text
            long_enough = schema.get("minLength", 0) <= len(text) <= schema.get("maxLength", 1000)
            fits = schema.get("format") != "date-time" or text.endswith("Z")
            if long_enough and fits and re.search(schema.get("pattern", ""), text):
                return text
        raise AssertionError(f"no text fits {schema}: add an example to tests/control/matrix.py")


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        with suppress(ValueError):
            document = json.loads(self.body)
            if self.status >= 400 and isinstance(document, dict):
                return document
        return {}


async def call(app: Any, method: str, path: str, credential: str | None, body: Any) -> Answer:
    """One request, without a network. Of an answer that does not end by itself (a stream) the head is enough."""
    headers = [(b"host", b"api.test"), (b"content-type", b"application/json")]
    if credential is not None:
        headers.append((b"authorization", f"Bearer {credential}".encode()))
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method.upper(), "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 4711), "server": ("api.test", 80),
    }  # fmt: skip
    told = [{"type": "http.request", "body": b"" if body is None else json.dumps(body).encode(), "more_body": False}]
    left, begun = asyncio.Event(), asyncio.Event()
    status, parts, streams = 0, bytearray(), False

    async def receive() -> dict[str, Any]:
        if told:
            return told.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, streams
        if message["type"] == "http.response.start":
            status = message["status"]
            streams = any(value.startswith(b"application/x-ndjson") for _, value in message["headers"])
            begun.set()
        else:
            parts.extend(message.get("body", b""))

    task = asyncio.create_task(app(scope, receive, send))
    waiting = asyncio.create_task(begun.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if streams and not task.done():
        left.set()
        task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return Answer(status, bytes(parts))


@dataclass
class World:
    """Two tenants with everything that paths name, and credentials of every kind."""

    app: Any
    owner: Account
    stranger: Account
    relay_key: str
    operator_key: str
    operator: str = ""  # a person with a grant, who is a viewer of the owner's organization
    support: tuple[str, str] = ("", "")  # tokens of support access: one that is good, and one without consent
    people: dict[str, str] = field(default_factory=dict)  # role -> user id
    joined: dict[str, str] = field(default_factory=dict)  # user id -> role, of those whom `member` made
    _count: int = 0

    @property
    def db(self) -> Any:
        return self.app.state.db

    async def person(self, organization: str, user: str, *, expired: bool = False, stale: bool = False) -> str:
        """An access token of a fresh sign-in session; ``stale``: its person proved long ago who they are.

        Whom a call took out of the owner's organization is in it again.
        """
        now = self.app.state.clock.wall()
        session = new_id("ses")
        row = {"id": session, "user_id": user, "organization_id": organization, "last_used_at": now}
        row["authenticated_at"] = now - timedelta(
            seconds=2 * self.app.state.settings.operator_step_up_seconds if stale else 0
        )
        async with self.db.transaction() as tx:
            if user in self.joined:
                again = {"organization_id": self.owner.organization, "user_id": user, "role": self.joined[user]}
                await tx.execute(pg.insert(tables.members).values(**again).on_conflict_do_nothing())
            await tx.execute(sa.insert(tables.sign_in_sessions).values(**row, expires_at=now + timedelta(hours=1)))
            signer = await self.app.state.signing_keys.current_signer(tx)
        then = now.timestamp() - (7200 if expired else 0)
        return tokens.issue(signer, tokens.AccessClaims(user, session, organization), then, 3600)

    async def role(self, role: str) -> str:
        """An access token of a member of the owner's organization in this role."""
        return await self.person(self.owner.organization, self.people[role])

    async def key(self, account: Account, kind: str, scopes: list[str], state: str = "live") -> str:
        """The text of a fresh key that the account's person made."""
        now = self.app.state.clock.wall()
        async with self.db.transaction() as tx:
            made = await issue(tx, now, account.organization, account.user, kind, "matrix", scopes)
            if state != "live":
                values = {"revoked_at" if state == "revoked" else "expires_at": now - timedelta(seconds=1)}
                await tx.execute(sa.update(tables.api_keys).where(tables.api_keys.c.id == made.id).values(**values))
        return made.key

    async def member(self, role: str) -> str:
        """A new member of the owner's organization; returns the user id."""
        user = new_id("usr")
        async with self.db.transaction() as tx:
            await tx.execute(sa.insert(tables.users).values(id=user, email=f"{user}@example.com"))
            row = {"organization_id": self.owner.organization, "user_id": user, "role": role}
            await tx.execute(sa.insert(tables.members).values(**row))
        self.joined[user] = role
        return user

    async def object(self, name: str) -> str:
        """A new object of the owner's organization, by the name that paths have for it."""
        self._count += 1
        client = self.owner.client
        made: Callable[[], Awaitable[str]] = {
            "export": self._export,
            "invitation": lambda: self._made(
                "/v1/org/invitations", {"email": f"{new_id('inv')}@example.com", "role": "viewer"}
            ),
            "organization": lambda: self._text(self.owner.organization),
            "plan": lambda: self._text("enterprise"),
            "key": lambda: self._made("/v1/api-keys", {"kind": "api", "name": "x", "scopes": []}),
            "passkey": self._passkey,
            "role": lambda: self._made("/v1/org/roles", {"name": f"role {self._count}", "permissions": []}),
            "region": self._region,
            "region_key": lambda: self._text(self._region_key),
            "reserved_name": self._reserved_name,
            "cert_source": self._cert_source,
            "cert_event": self._cert_event,
            "billing_webhook": self._billing_webhook,
            "cert_incident": self._cert_incident,
            "dunning_case": self._dunning_case,
            "overage_charge": self._overage_charge,
            "report": self._report,
            "report_schedule": self._report_schedule,
            "settlement": self._settlement,
            "settlement_sink": self._settlement_sink,
            "credit_note": lambda: self._invoice("credit_note"),
            "invoice": lambda: self._invoice("invoice"),
            "domain": lambda: self._made("/v1/domains", {"name": f"w{self._count}.example.com"}),
            "session": self._sign_in_session,
            "session_id": self._agent_session,
            "tunnel_id": lambda: self._made("/v1/tunnels", {"name": f"tunnel-{self._count}"}),
            "user": lambda: self.member("viewer"),
            "channel": self._channel,
            "delivery": self._delivery,
            "tenant": self._tenant,
            "consent": self._consent,
            "mfa_reset": self._mfa_reset,
            "support_session": self._support_session,
        }.get(name) or self._unknown(name)
        assert client is not None
        return await made()

    @staticmethod
    def _unknown(name: str) -> Any:
        raise AssertionError(f"paths name a new kind of object {{{name}}}: add it to World.object of {__name__}")

    @staticmethod
    async def _text(text: str) -> str:
        return text

    async def _made(self, path: str, body: dict[str, Any]) -> str:
        answer = await self.owner.client.post(path, json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    async def _export(self) -> str:
        export, now = new_id("exp"), self.app.state.clock.wall()
        row = {"id": export, "organization_id": self.owner.organization, "requested_by": self.owner.user}
        async with self.db.transaction() as tx:
            statement = sa.insert(tables.organization_exports).values(**row, queue_state="done")
            await tx.execute(statement.values(expires_at=now + timedelta(days=1), file="none.zip"))
        return export

    async def _report(self) -> str:
        wanted = exports.Wanted(self.owner.organization, "usage", "csv", _JANUARY, _FEBRUARY, {"kind": "download"})
        row = exports.new_row(self.app.state.sealer, wanted, self.owner.user, self.app.state.clock.wall())
        async with self.db.transaction() as tx:
            await export_store.add(tx, row)
        return str(row["id"])

    async def _report_schedule(self) -> str:
        row = {"id": new_id("rsc"), "organization_id": self.owner.organization, "created_by": self.owner.user}
        row |= {"dataset": "usage", "format": "csv", "every": "month", "destination": {"kind": "download"}}
        async with self.db.transaction() as tx:
            statement = sa.insert(export_store.schedules).values(**row)
            await tx.execute(statement.values(next_start=_JANUARY, next_end=_FEBRUARY))
        return str(row["id"])

    async def _settlement(self) -> str:
        made = new_id("stl")
        row = {"id": made, "origin": "import", "message_id": made, "batch_id": made, "revision": 1, "sealed_body": b""}
        row |= {"body_digest": b"", "provider": "stripe", "account": "acct_1", "livemode": True, "state": "delta"}
        row |= {"issued_at": _FEBRUARY, "period_start": _JANUARY, "period_end": _FEBRUARY, "queue_state": "done"}
        async with self.db.transaction() as tx:
            await settlement_store.add(tx, row)
        return made

    async def _settlement_sink(self) -> str:
        async with self.db.transaction() as tx:
            caller = Caller("operator", "installation", None)
            made = await self.app.state.settlements.sinks.create(tx, caller, f"sink {self._count}", None)
        return str(made["id"])

    async def _cert_source(self) -> str:
        wanted = sources.Wanted(f"source {self._count}", "test", ["one"], [], ["*"])
        async with self.db.transaction() as tx:
            made = await self.app.state.cert_sources.create(tx, Caller("operator", "installation", None), wanted, None)
        return str(made["id"])

    async def _cert_incident(self) -> str:
        domain, now = await self.object("domain"), self.app.state.clock.wall()
        row = {
            "id": new_id("cin"),
            "domain_id": domain,
            "organization_id": self.owner.organization,
            "hostname": "x.example",
        }
        row |= {"incident_class": "issuance", "tier": 2, "status": "open", "opened_at": now, "changed_at": now}
        row["conditions"] = {"state": {"tier": 2, "code": "x", "detail": None, "mark": "x"}}
        async with self.db.transaction() as tx:
            await incident_store.add(tx, row)
        return str(row["id"])

    async def _dunning_case(self) -> str:
        now, source = self.app.state.clock.wall(), Source("stripe", "acct_1", False)
        async with self.db.transaction() as tx:
            row = await billing_store.add_subscription(tx, self.owner.organization, source, new_id("x"), None)
            facts = {"organization_id": self.owner.organization, "subscription_id": row.id, "currency": "EUR"}
            facts |= {"state": "notified", "amount_minor": 100, "attempts": 1, "opened_at": now}
            return str((await dunning_store.add(tx, facts)).id)

    async def _overage_charge(self) -> str:
        """One that the provider refused."""
        source, month = Source("stripe", "acct_1", False), datetime(2026, 1, 1, tzinfo=UTC).date()
        async with self.db.transaction() as tx:
            row = await billing_store.add_subscription(tx, self.owner.organization, source, new_id("x"), None)
            facts: dict[str, Any] = {"organization_id": self.owner.organization, "subscription_id": row.id}
            facts |= {"provider": "stripe", "plan": "pro", "metric": "bytes_per_month", "month": month}
            facts |= {"billed_month": month, "description": "1 × 1 GiB", "used": 2, "allowed": 1, "quantity": 1}
            facts |= {"unit_minor": 50, "amount_minor": 50, "currency": "EUR", "state": "failed"}
            return str((await overage_store.add(tx, facts)).id)

    async def _invoice(self, kind: str) -> str:
        """An invoice, or the credit note of its refund."""
        ref = new_id("in")
        common = {
            "organization_id": self.owner.organization,
            "invoice_ref": ref,
            "payment_ref": ref,
            "amount_minor": 119,
        }
        async with self.db.transaction() as tx:
            made = await invoices.issue(tx, event("invoice.issued", tax_minor=19, **common))
            note = await invoices.credit(tx, event("refund.succeeded", refund_ref=ref, **common))
        return str(made if kind == "invoice" else note)

    async def _cert_event(self) -> str:
        event = lifecycle.NewEvent(await self.object("domain"), "validation", "started", 1)
        async with self.db.transaction() as tx:
            made = await lifecycle.record(tx, event)
            await tx.raw.execute("UPDATE certificate_lifecycle_events SET queue_state = 'dead' WHERE id = $1", made)
        return made

    async def _billing_webhook(self) -> str:
        now = self.app.state.clock.wall()
        facts = webhook_body.Facts(f"evt_{self._count}", "invoice.paid", None, None, now, None)
        row = webhooks.new_row("stripe", facts, new_id("x").encode(), self.app.state.sealer) | {
            "account": "acct_1", "livemode": False, "received_at": now, "proven": True, "proof": "current",
            "status": "verified", "reason": None, "queue_state": "pending",
        }  # fmt: skip
        async with self.db.transaction() as tx:
            await webhook_store.insert(tx, [row])
            await tx.raw.execute("UPDATE billing_webhook_events SET queue_state = 'dead' WHERE id = $1", row["id"])
        return str(row["id"])

    async def _channel(self) -> str:
        """One more webhook, beside those that there are: the route replaces them all."""
        wanted = Wanted(None, "webhook", f"channel {self._count}", "https://hooks.example.com/", ["*"], True)
        caller = Caller("person", self.owner.user, self.owner.organization)
        async with self.db.transaction() as tx:
            made, _ = await self.app.state.channels._create(tx, caller, wanted)
        return str(made)

    async def _delivery(self) -> str:
        channel = await self._channel()
        tested = await self.owner.client.post(f"/v1/org/notification-channels/{channel}/test")
        assert tested.status_code == 202, tested.text
        async with self.db.transaction() as tx:
            await tx.raw.execute(
                "UPDATE outbox_messages SET queue_state = 'dead', finished_at = now() WHERE id = $1",
                tested.json()["delivery"],
            )
        return str(tested.json()["delivery"])

    async def _tenant(self) -> str:
        """Another organization, since operators can do harm to it, which lets them in."""
        tenant = new_id("org")
        async with self.db.transaction() as tx:
            await tx.execute(sa.insert(tables.organizations).values(id=tenant, name=f"tenant {self._count}"))
        await self._consent(tenant)
        return tenant

    async def _consent(self, organization: str | None = None, *, withdrawn: bool = False) -> str:
        now = self.app.state.clock.wall()
        row = {"id": new_id("sac"), "organization_id": organization or self.owner.organization, "scope": "write"}
        row |= {"given_by": self.owner.user, "expires_at": now + timedelta(hours=1)}
        row["withdrawn_at"] = now if withdrawn else None
        async with self.db.transaction() as tx:
            await tx.execute(sa.insert(tables.support_consents).values(**row))
        return str(row["id"])

    async def _mfa_reset(self) -> str:
        path = f"/v1/admin/users/{await self.member('viewer')}/mfa-reset"
        asked = await call(self.app, "post", path, await self._operator(self.operator), {"reason": "lost"})
        return str(json.loads(asked.body)["id"])

    async def _support_session(self) -> str:
        return (await self.begin_support(self.operator))[0]

    async def begin_support(self, operator: str, *, withdrawn: bool = False) -> tuple[str, str]:
        """A session of support access to the owner's organization: its id and its token."""
        now, session, token = self.app.state.clock.wall(), new_id("sup"), new_token("sup")
        signed_in = json.loads((await call(self.app, "get", "/v1/whoami", await self._operator(operator), None)).body)
        row = {"id": session, "consent_id": await self._consent(withdrawn=withdrawn), "operator_id": operator}
        row |= {
            "organization_id": self.owner.organization,
            "sign_in_session": signed_in["session"],
            "reason": "asked to",
        }
        async with self.db.transaction() as tx:
            statement = sa.insert(tables.support_sessions).values(**row, digest=digest(token))
            await tx.execute(statement.values(expires_at=now + timedelta(hours=1)))
        return session, token

    async def _operator(self, operator: str) -> str:
        return await self.person(self.owner.organization, operator)

    async def _reserved_name(self) -> str:
        name = f"kept-{self._count}"
        answer = await self.owner.client.post("/v1/reserved-names", json={"name": name})
        assert answer.status_code == 201, answer.text
        return name

    async def _region(self) -> str:
        """One without relays, so that its only key can go; the next ``region_key`` is that."""
        public = X25519PrivateKey.generate().public_key()
        region, self._region_key = f"region-{self._count}", envelope.key_id(public)
        async with self.db.transaction() as tx:
            row = (region, self._region_key, public.public_bytes_raw())
            await tx.raw.execute(
                "INSERT INTO certificate_region_keys (region, key_id, public_key) VALUES ($1, $2, $3)", *row
            )
        return region

    async def _passkey(self) -> str:
        made = new_id("psk")
        row = {"id": made, "user_id": self.owner.user, "name": "x", "credential_id": made.encode(), "public_key": b""}
        async with self.db.transaction() as tx:
            await tx.execute(sa.insert(passkeys).values(**row, sign_count=0, aaguid="", backed_up=False))
        return made

    async def _sign_in_session(self) -> str:
        token = await self.person(self.owner.organization, self.owner.user)
        answer = await call(self.app, "get", "/v1/whoami", token, None)
        return str(json.loads(answer.body)["session"])

    async def _agent_session(self) -> str:
        # A walk takes longer than a relay's heartbeat is believed.
        beat = await call(self.app, "post", "/v1/edge/heartbeat", self.relay_key, heartbeat_body("matrix"))
        assert beat.status == 200, beat.body
        key = await self.key(self.owner, "agent", [])
        answer = await call(self.app, "post", "/v1/agent/sessions", key, {"agent_id": "agt-0123456789"})
        assert answer.status == 201, answer.body
        return str(json.loads(answer.body)["session"])

    async def fingerprint(self, *, audit: bool) -> str:
        """A hash of everything that is the owner's organization's, without when keys were last used."""
        async with self.db.read() as reader:
            rows = await reader.raw.fetch(
                "SELECT table_name FROM information_schema.columns WHERE column_name = 'organization_id'"
                " AND table_schema = 'public' ORDER BY table_name"
            )
            names = [row["table_name"] for row in rows if audit or not row["table_name"].startswith("audit")]
            parts = [f"SELECT '{n}', to_jsonb(t) - 'last_used_at' FROM {n} t WHERE organization_id = $1" for n in names]
            parts.append("SELECT 'organizations', to_jsonb(t) FROM organizations t WHERE id = $1")
            query = f"SELECT md5(string_agg(x::text, '' ORDER BY x::text)) FROM ({' UNION ALL '.join(parts)}) x"
            return str(await reader.raw.fetchval(query, self.owner.organization))


async def build_world(app: Any, owner: Account, stranger: Account, relay_key: str) -> World:
    """Everything a walk needs."""
    async with app.state.db.transaction() as tx:
        operator = await issue(tx, app.state.clock.wall(), None, None, "operator", "operator", [])
        _, other = await relays.create_key(tx, Caller("operator", "installation", None), "matrix")
    world = World(app, owner, stranger, other, operator.key)
    world.operator, helper = await world.member("viewer"), await world.member("viewer")
    async with app.state.db.transaction() as tx:
        for person in (world.operator, helper):
            await operators.grant(tx, operators.INSTALLATION, person, now=app.state.clock.wall())
    _, good = await world.begin_support(helper)
    _, over = await world.begin_support(helper, withdrawn=True)
    world.support = good, over
    for role in ROLES:
        world.people[role] = await world.member(role)
    body = heartbeat_body()
    assert (await call(app, "post", "/v1/edge/heartbeat", relay_key, body)).status == 200
    return world


@dataclass(frozen=True)
class Cell:
    """One caller of one operation, and what should come of it."""

    who: str
    kind: CallerKind | None  # None: nobody that the API knows
    held: frozenset[str]
    credential: Callable[[], Awaitable[str | None]]
    fits: bool = False  # the body must be taken, too
    operator: bool = False  # a person with a grant
    recent: bool = True  # who proved a moment ago who they are

    def admitted(self, operation: Operation) -> bool:
        if "anonymous" in operation.callers:
            return True
        if self.operator and "operator" in operation.callers:
            return self.recent or not operation.step_up
        needed = operation.permissions
        return self.kind in operation.callers and (not needed or not needed.isdisjoint(self.held))

    def refusal(self, operation: Operation) -> int:
        """401 for a credential that is none here, 403 for one that may not."""
        tenants = operation.callers != {"relay"}
        return 403 if self.kind is not None and self.kind != "relay" and tenants else 401


def cells(world: World, operation: Operation) -> list[Cell]:
    """Everybody. A key with the wanted permission alone shows that it is enough, one with all others that it is needed."""
    owner, none = world.owner, frozenset[str]()
    wanted, others = sorted(operation.permissions)[:1], sorted(PERMISSIONS - operation.permissions)

    async def nobody() -> str | None:
        return None

    def key(kind: str, scopes: list[str], state: str = "live") -> Callable[[], Awaitable[str]]:
        return lambda: world.key(owner, kind, scopes, state)

    def fixed(text: str) -> Callable[[], Awaitable[str | None]]:
        async def give() -> str:
            return text

        return give

    return [
        Cell("nobody", None, none, nobody),
        Cell("noise", None, none, fixed("tnl_sk_" + "0" * 36)),
        Cell("a revoked API key", None, none, key("api", sorted(PERMISSIONS), "revoked")),
        Cell("an expired API key", None, none, key("api", sorted(PERMISSIONS), "expired")),
        Cell("a revoked agent key", None, none, key("agent", [], "revoked")),
        Cell("an expired token", None, none, lambda: world.person(owner.organization, owner.user, expired=True)),
        Cell("a relay key", "relay", none, fixed(world.relay_key)),
        Cell("the operator key", "operator", none, fixed(world.operator_key)),
        Cell(
            "an operator",
            "person",
            ROLES["viewer"],
            lambda: world.person(owner.organization, world.operator),
            operator=True,
        ),
        Cell(
            "an operator without step-up",
            "person",
            ROLES["viewer"],
            lambda: world.person(owner.organization, world.operator, stale=True),
            operator=True,
            recent=False,
        ),
        Cell("support access", "support", SUPPORT_PERMISSIONS["write"], fixed(world.support[0])),
        Cell("support access after its consent", None, none, fixed(world.support[1])),
        Cell("an API key without scopes", "api_key", none, key("api", [])),
        Cell("an API key with all other scopes", "api_key", frozenset(others), key("api", others)),
        Cell("an API key with the scope", "api_key", frozenset(wanted), key("api", wanted)),
        Cell("an agent key", "agent_key", AGENT_KEY_PERMISSIONS, key("agent", [])),
        *(Cell(role, "person", held, _role(world, role), role == "owner") for role, held in ROLES.items()),
    ]


def _role(world: World, role: str) -> Callable[[], Awaitable[str | None]]:
    return lambda: world.role(role)


class Walk:
    """Calls every operation as everybody and compares."""

    def __init__(self, app: Any, world: World, document: dict[str, Any]) -> None:
        self._app = app
        self._world = world
        self._bodies = Bodies(document)
        self.operations = operations(document)
        self.wrong: list[str] = []
        self.seen = 0

    async def run(self) -> list[str]:
        """What is wrong, a line for each cell."""
        for operation in self.operations:
            everybody = cells(self._world, operation)
            await self._refused(operation, [cell for cell in everybody if not cell.admitted(operation)])
            await self._strangers(operation)
            for cell in everybody:
                if cell.admitted(operation):
                    await self._admitted(operation, cell)
        return self.wrong

    async def _ask(self, operation: Operation, credential: str | None, objects: dict[str, str]) -> Answer:
        self.seen += 1
        body = self._bodies.make(operation.body) if operation.body is not None else None
        return await call(self._app, operation.method, operation.path.format(**objects), credential, body)

    async def _objects(self, operation: Operation) -> dict[str, str]:
        return {name: await self._world.object(name) for name in operation.parameters}

    def _note(self, operation: Operation, who: str, wanted: str, answer: Answer | None = None) -> None:
        got = f", got {answer.status} {answer.body[:200]!r}" if answer else ""
        self.wrong.append(f"{operation} as {who}: {wanted}{got}")

    async def _refused(self, operation: Operation, everybody: list[Cell]) -> None:
        objects = await self._objects(operation)
        credentials = [await cell.credential() for cell in everybody]
        before = await self._world.fingerprint(audit=False)
        for cell, credential in zip(everybody, credentials, strict=True):
            answer, wanted = await self._ask(operation, credential, objects), cell.refusal(operation)
            codes = ("auth.forbidden", "auth.operator_required") if wanted == 403 else None
            if codes and cell.operator and operation.step_up and "operator" in operation.callers:
                codes = ("auth.step_up_required",)
            if answer.status != wanted or (codes and answer.problem.get("code") not in codes):
                self._note(operation, cell.who, f"must be refused with {wanted}", answer)
        if await self._world.fingerprint(audit=False) != before:
            self._note(operation, "those who may not", "a refusal changed something")

    async def _strangers(self, operation: Operation) -> None:
        """The owner of another organization, who may do all this at home: with ids of this one it is 404, and changes nothing."""
        world, theirs = self._world, self._world.stranger
        for who, kind, credential in (
            ("another owner", "person", await world.person(theirs.organization, theirs.user)),
            ("another's API key", "api_key", await world.key(theirs, "api", sorted(PERMISSIONS))),
        ):
            objects = await self._objects(operation)
            before = await world.fingerprint(audit=True)
            answer = await self._ask(operation, credential, objects)
            if kind in operation.callers and objects:
                if answer.status != 404 or not str(answer.problem.get("code")).endswith("not_found"):
                    self._note(operation, who, "must be 404", answer)
            elif kind in operation.callers and answer.status in (401, 403):
                self._note(operation, who, "must be admitted at home", answer)
            elif operation.callers.isdisjoint({kind, "anonymous"}) and answer.status not in (401, 403):
                self._note(operation, who, "must be refused", answer)
            if await world.fingerprint(audit=True) != before:
                self._note(operation, who, "changed something of the other organization")

    async def _admitted(self, operation: Operation, cell: Cell) -> None:
        objects = await self._objects(operation)
        answer = await self._ask(operation, await cell.credential(), objects)
        problem = answer.problem
        code = str(problem.get("code"))
        if "anonymous" in operation.callers:
            good = code not in ("auth.required", "auth.forbidden", "auth.key_invalid", "auth.key_revoked")
        else:
            good = answer.status != 401 and not code.startswith("auth.operator")
            # Past the check of a write, its service may still say that what was asked for is beyond this caller.
            if code == "auth.forbidden":
                named = problem.get("permission")
                beyond = PERMISSIONS - operation.permissions - cell.held
                good = operation.method != "get" and bool(operation.permissions) and named in beyond
        if not good or not 200 <= answer.status < 500:
            self._note(operation, cell.who, "must be admitted", answer)
        elif cell.fits and code == "request.invalid":
            self._note(operation, cell.who, "the body did not fit; add to EXAMPLES of tests/control/matrix.py", answer)
