"""Routes of certificate sources: /admin/cert-sources, for platform operators."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from portico.control.access import Caller, InTx, Paging, Reading, require_operator
from portico.control.domains.sources import Sources, Wanted
from portico.control.requests import UnitOfWork, shown
from portico.kit.pages import Page

router = APIRouter(prefix="/admin/cert-sources", tags=["admin"], route_class=UnitOfWork)


async def service(request: Request) -> Sources:
    """Dependency: the process's sources."""
    found: Sources = request.app.state.cert_sources
    return found


Service = Annotated[Sources, Depends(service)]
Operator = Annotated[Caller, Depends(require_operator())]
Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Word = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[\x21-\x2d\x2f-\x7e]+$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=80, strip_whitespace=True), AfterValidator(shown)]
Network = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[0-9A-Fa-f:./]+$")]
Scope = Annotated[
    str,
    StringConstraints(
        min_length=1, max_length=254, pattern=r"^(?:\*|(?:\*\.)?(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?)$"
    ),
]
Clusters = Annotated[list[Word], Field(min_length=1, max_length=50, description="The clusters that it speaks for")]
Networks = Annotated[list[Network], Field(max_length=50, description="Networks that it sends from; none: any")]
Scopes = Annotated[
    list[Scope],
    Field(
        min_length=1, max_length=200,
        description="Names that it speaks about: `www.example.com`, `*.example.com` (every name below), `*`",
    ),
]  # fmt: skip
PublicKey = Annotated[
    str, StringConstraints(min_length=49, max_length=49, pattern=r"^whpk_[A-Za-z0-9+/]{43}=$"),
    Field(description="The public half of an Ed25519 pair, instead of a shared secret"),
]  # fmt: skip
Reason = Annotated[str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True), AfterValidator(shown)]


def dangerous(act: str) -> Any:
    """An operator who proved a moment ago who they are; refusals are recorded as ``act``."""
    return Depends(require_operator(step_up=True, act=act))


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SourceBody(_Body):
    """A source to make. Without `public_key` a secret is made, and shown once."""

    name: Label
    environment: Word
    clusters: Clusters
    hostnames: Scopes
    cidrs: Networks = []
    public_key: PublicKey | None = None


class SourceChange(_Body):
    """What to change; members that are not there stay as they are."""

    name: Label | None = None
    environment: Word | None = None
    clusters: Clusters | None = None
    hostnames: Scopes | None = None
    cidrs: Networks | None = None


class RotateBody(_Body):
    """How many seconds the keys before are good for; 0 when one of them is known to others."""

    overlap_seconds: Annotated[int, Field(ge=0, le=2_592_000)] | None = None
    public_key: PublicKey | None = None


class ReasonBody(_Body):
    """Why; it is kept in the audit log."""

    reason: Reason


class SourceKey(BaseModel):
    """A key as far as it may be shown. `pending`: nothing was signed with it yet; `grace`: another has followed it."""

    id: str
    algorithm: Literal["hmac", "ed25519"]
    state: Literal["pending", "active", "grace", "revoked"]
    created_at: datetime
    until: datetime | None
    last_used_at: datetime | None


class Activity(BaseModel):
    """How often something came of what it sent: `accepted`, `duplicate`, …, or the reason of a refusal. Without a cluster: it was
    refused before its cluster was known to be true."""

    cluster: str | None
    outcome: str
    count: int
    last_at: datetime
    last_event: str | None


class CertSource(BaseModel):
    """Somebody who tells of certificates."""

    id: str
    name: str
    environment: str
    clusters: list[str]
    cidrs: list[str]
    hostnames: list[str]
    state: Literal["active", "disabled"]
    disabled_reason: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime
    keys: list[SourceKey]
    activity: list[Activity]


class NewKey(BaseModel):
    """A new key; `secret` is shown this once, and there is none when a public key was brought."""

    id: str
    secret: str | None


class CertSourceWithKey(CertSource):
    """A source, and its new key."""

    key: NewKey


@router.get("", response_model=Page[CertSource])
async def list_sources(reader: Reading, sources: Service, who: Operator, page: Paging) -> Any:
    """Sources, the oldest first, with what came of what they sent."""
    return await sources.listing(reader, page)


@router.post("", response_model=CertSourceWithKey, status_code=201)
async def create_source(
    body: SourceBody, tx: InTx, sources: Service, who: Annotated[Caller, dangerous("cert_source.create")]
) -> Any:
    """Let somebody tell of certificates."""
    wanted = Wanted(body.name, body.environment, body.clusters, body.cidrs, body.hostnames)
    return await sources.create(tx, who, wanted, body.public_key)


@router.get("/{cert_source}", response_model=CertSource)
async def get_source(cert_source: Id, reader: Reading, sources: Service, who: Operator) -> Any:
    """One source."""
    return await sources.document(reader, cert_source)


@router.patch("/{cert_source}", response_model=CertSource)
async def change_source(
    cert_source: Id, body: SourceChange, tx: InTx, sources: Service,
    who: Annotated[Caller, dangerous("cert_source.change")],
) -> Any:  # fmt: skip
    """Change what it may speak about, and from where. It holds for what is not stored yet."""
    wanted = Wanted(body.name, body.environment, body.clusters, body.cidrs, body.hostnames)
    return await sources.change(tx, who, cert_source, wanted)


@router.post("/{cert_source}/rotate", response_model=CertSourceWithKey)
async def rotate_source(
    cert_source: Id, body: RotateBody, tx: InTx, sources: Service,
    who: Annotated[Caller, dangerous("cert_source.rotate")],
) -> Any:  # fmt: skip
    """A new key. Those before it are good until their grace ends; of more than three the oldest ends at once."""
    return await sources.rotate(tx, who, cert_source, body.overlap_seconds, body.public_key)


@router.post("/{cert_source}/disable", response_model=CertSource)
async def disable_source(
    cert_source: Id, body: ReasonBody, tx: InTx, sources: Service,
    who: Annotated[Caller, dangerous("cert_source.disable")],
) -> Any:  # fmt: skip
    """Believe nothing from it any more."""
    return await sources.disable(tx, who, cert_source, body.reason)


@router.post("/{cert_source}/enable", response_model=CertSource)
async def enable_source(
    cert_source: Id, body: ReasonBody, tx: InTx, sources: Service,
    who: Annotated[Caller, dangerous("cert_source.enable")],
) -> Any:  # fmt: skip
    """Believe it again."""
    return await sources.enable(tx, who, cert_source, body.reason)
