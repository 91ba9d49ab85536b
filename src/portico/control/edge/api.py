"""Routes for relays: /edge/stream, /edge/certificates, /edge/heartbeat, /edge/acks, /edge/usage.

The credential is a relay key, nothing else.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.security import HTTPBearer
from pydantic import AwareDatetime, BaseModel, Field, StringConstraints

from portico.control.access import RELAYS, Db, credential_of, declare
from portico.control.domains import replicas, vault
from portico.control.edge.stream import EdgeStream
from portico.control.requests import JsonRoute
from portico.control.tunnels import relays, usage
from portico.control.tunnels.presence import Bound
from portico.control.tunnels.relays import RelayKey

log = logging.getLogger(__name__)

router = APIRouter(prefix="/edge", tags=["edge"], route_class=JsonRoute)

_bearer = HTTPBearer(auto_error=False, bearerFormat="relay key", scheme_name="relay key")


@declare(RELAYS)
async def relay_key(request: Request, db: Db, _: Annotated[Any, Depends(_bearer)] = None) -> RelayKey:
    """Dependency: the authenticated relay key. Raises ``auth.required``, ``edge.relay_key_invalid`` or ``…_revoked``."""
    token = credential_of(request)
    async with db.read() as reader:
        return await relays.authenticate(reader, token)


Key = Annotated[RelayKey, Depends(relay_key)]

_MAX: int = 2**53 - 1
Whole = Annotated[int, Field(ge=0, le=_MAX, strict=True)]
RelayName = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$")]
Region = Annotated[str, StringConstraints(min_length=1, max_length=32, pattern=r"^[a-z0-9-]+$")]
ObjectId = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
ConnectUrl = Annotated[str, StringConstraints(max_length=300, pattern=r"^wss?://[^\s\x00-\x1f\x7f]+$")]
PublicUrl = Annotated[str, StringConstraints(max_length=300, pattern=r"^https?://[^\s\x00-\x1f\x7f]+$")]


class LoadBody(BaseModel):
    """How busy a relay is."""

    sessions: Whole = 0
    tunnels: Whole = 0
    streams: Whole = 0
    cpu: Annotated[float, Field(ge=0, le=100_000, allow_inf_nan=False)] = 0.0


class BoundBody(BaseModel):
    """A tunnel that is bound at the relay now."""

    tunnel: ObjectId
    session: ObjectId
    generation: Whole


class LeftBody(BaseModel):
    """Why a tunnel is not bound any more."""

    tunnel: ObjectId
    reason: Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00]*$")]


class HeartbeatBody(BaseModel):
    """What a relay says of itself, at most 5 s apart. The first one registers it."""

    relay: RelayName
    region: Region = "local"
    connect_url: ConnectUrl
    public_url: PublicUrl
    version: Annotated[Whole, Field(description="edge change version that the relay has applied")] = 0
    load: LoadBody = LoadBody()
    draining: bool = False
    bound: Annotated[list[BoundBody], Field(max_length=100_000)] = []
    left: Annotated[list[LeftBody], Field(max_length=100_000, description="since the heartbeat before")] = []


class HeartbeatAnswer(BaseModel):
    """The relay is registered. `presence`: whether Redis was told, too."""

    ok: Literal[True] = True
    time: float
    presence: bool


class UsageRowBody(BaseModel):
    """What one tunnel used in a batch."""

    tunnel: ObjectId
    organization: ObjectId
    requests: Whole = 0
    connections: Whole = 0
    bytes_in: Whole = 0
    bytes_out: Whole = 0
    errors: Whole = 0


class UsageBatchBody(BaseModel):
    """A numbered batch; its number is never used again for other counts."""

    seq: Annotated[Whole, Field(ge=1)]
    since: Annotated[AwareDatetime | Annotated[float, Field(ge=0, le=2**40)], Field(alias="from")]
    until: Annotated[AwareDatetime | Annotated[float, Field(ge=0, le=2**40)], Field(alias="to")]
    rows: Annotated[list[UsageRowBody], Field(max_length=100_000)]


class UsageBody(BaseModel):
    """Batches of one spool (`boot`) of one relay."""

    relay: RelayName
    boot: ObjectId
    batches: Annotated[list[UsageBatchBody], Field(min_length=1, max_length=1000)]


class UsageAnswer(BaseModel):
    """Every batch of the report up to this number is counted for good."""

    acknowledged: int


class CertificateAckBody(BaseModel):
    """What a relay made of a version of a certificate: it holds it ready, serves with it, or cannot use it."""

    certificate: ObjectId
    fingerprint: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    state: Literal["staged", "active", "failed"]
    reason: Annotated[str | None, Field(max_length=300, pattern=r"^[^\x00]*$")] = None
    floor: Annotated[
        Whole | None, Field(description="the newer version that it has served, where this one is refused")
    ] = None


class AckBody(BaseModel):
    """The version of the stream that a relay has applied, and what became of certificates."""

    relay: RelayName
    version: Whole
    certificates: Annotated[list[CertificateAckBody], Field(max_length=500)] = []


class CertificatesBody(BaseModel):
    """Which versions a relay wants, by the ids in the stream."""

    region: Region
    certificates: Annotated[list[ObjectId], Field(min_length=1, max_length=50)]


class WrapBody(BaseModel):
    """The data key for one key of the region, HPKE: encapsulated key and ciphertext, base64."""

    key_id: str
    wrapped: str


class Bundle(BaseModel):
    """A version: the signed manifest, the chain (PEM), and the private key under a data key (base64)."""

    certificate: str
    domain: str
    version: int
    manifest: str
    chain: str
    sealed: str
    wraps: list[WrapBody]


class CertificatesAnswer(BaseModel):
    """Those that are there and have a key."""

    data: list[Bundle]


class AckAnswer(BaseModel):
    """The acknowledgement is kept."""

    ok: Literal[True] = True


@router.get(
    "/stream",
    status_code=200,
    response_class=EdgeStream,
    responses={200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}},
)
async def stream(request: Request, key: Key, version: Annotated[int | None, Query(ge=0, le=_MAX)] = None) -> EdgeStream:
    """Snapshot, then deltas, one JSON object a line (contracts/edge-stream.schema.json). `version` resumes after it."""
    state = request.app.state
    return EdgeStream(state.settings, state.db, state.edge_hub, state.edge_states, key.id, version)


@router.post("/heartbeat", response_model=HeartbeatAnswer)
async def heartbeat(request: Request, db: Db, key: Key, body: HeartbeatBody) -> Any:
    """Register the relay, or renew it for 15 s, with what it has bound."""
    state = request.app.state
    beat = relays.Heartbeat(
        relay=body.relay,
        region=body.region,
        connect_url=body.connect_url,
        public_url=body.public_url,
        version=body.version,
        load=body.load.model_dump(),
        draining=body.draining,
        bound=[Bound(b.tunnel, b.session, b.generation) for b in body.bound],
        left={gone.tunnel: gone.reason for gone in body.left},
    )
    async with db.transaction() as tx:
        new, fresh = await relays.heartbeat(tx, key, beat, lease=state.settings.relay_lease_seconds)
    if new or beat.draining:
        state.relays.forget()
    if fresh:
        await state.tunnels.frozen.look(db, fresh)
    told = await relays.report_presence(state.redis, state.settings, beat)
    return {"ok": True, "time": state.clock.wall().timestamp(), "presence": told}


@router.post("/acks", response_model=AckAnswer)
async def acknowledge(request: Request, db: Db, key: Key, body: AckBody) -> Any:
    """Note the version that the relay has applied (the heartbeat carries it too), and which certificates it holds."""
    said = [replicas.Said(**row.model_dump()) for row in body.certificates]
    async with db.transaction() as tx:
        await relays.acknowledge(tx, key, body.relay, body.version)
        if said:
            await replicas.acknowledge(tx, body.relay, said, replicas.Rules.of(request.app.state.settings))
    return {"ok": True}


@router.post("/certificates", response_model=CertificatesAnswer)
async def certificates(db: Db, key: Key, body: CertificatesBody) -> Any:
    """Versions of certificates as they are stored: sealed, for whoever has a key of the region."""
    async with db.read() as reader:
        return {"data": await vault.bundles(reader, body.certificates, body.region)}


@router.post("/usage", response_model=UsageAnswer)
async def report_usage(request: Request, db: Db, key: Key, body: UsageBody) -> Any:
    """Count numbered batches, each once per (relay, boot, seq) however often it is sent."""
    now: datetime = request.app.state.clock.wall()
    batches = [usage.Batch(b.seq, _moment(b.since, now), [_row(row) for row in b.rows]) for b in body.batches]
    async with db.transaction() as tx:
        relays.check_name(key, body.relay)
        users = await usage.count(tx, body.relay, body.boot, batches, now)
    await request.app.state.standing.look(db, users)
    return {"acknowledged": max(batch.seq for batch in batches)}


def _moment(value: datetime | float, now: datetime) -> datetime:
    if isinstance(value, datetime):
        return value
    try:
        return datetime.fromtimestamp(value, now.tzinfo)
    except (OverflowError, ValueError, OSError):
        return now


def _row(row: UsageRowBody) -> usage.Row:
    counts = (row.requests, row.connections, row.bytes_in, row.bytes_out, row.errors)
    return usage.Row(row.tunnel, row.organization, counts)
