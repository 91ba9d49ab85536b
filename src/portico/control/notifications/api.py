"""Routes of notification channels and of what was sent to them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from portico.control.access import Caller, InTx, Paging, Reading, require
from portico.control.notifications import deliveries
from portico.control.notifications.channels import Channels, Wanted
from portico.control.requests import UnitOfWork, shown
from portico.kit.pages import Page

router = APIRouter(prefix="/org", tags=["notifications"], route_class=UnitOfWork)

Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
ChannelId = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Kind = Literal["webhook", "email", "slack"]
Reads = Annotated[Caller, Depends(require("notifications:read"))]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ChannelBody(_Body):
    """A channel as it should be. Without `id` it is made; without `target` that stays as it is."""

    id: ChannelId | None = None
    kind: Kind
    name: Annotated[str, StringConstraints(min_length=1, max_length=80, strip_whitespace=True), AfterValidator(shown)]
    target: Annotated[str, StringConstraints(min_length=1, max_length=2048)] | None = Field(
        None, description="An https:// address, an e-mail address, or the address of an incoming webhook of Slack"
    )
    events: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=64)]],
        Field(min_length=1, max_length=64, description="Of docs/reference/notifications.md; `*`: every event"),
    ]
    enabled: bool = True


class ChannelsBody(_Body):
    """Every channel that the organization should have: those that are not named are removed."""

    channels: Annotated[list[ChannelBody], Field(max_length=100)]


class Channel(BaseModel):
    """A channel. `secret` is shown once, when a webhook is made; `target` without what may be secret in it."""

    id: str
    kind: Kind
    name: str
    target: str
    events: list[str]
    enabled: bool
    state: Literal["active", "off", "disabled", "unconfirmed"]
    reason: str | None
    created_at: datetime
    failing_since: datetime | None
    delivered_at: datetime | None
    last_error: str | None
    secret: str | None


class Sent(BaseModel):
    """A message that is on its way."""

    delivery: str


class RotationBody(_Body):
    """How many seconds the secret before is still signed with; 0 when it is known to others."""

    overlap_seconds: Annotated[int, Field(ge=0, le=604_800)] | None = None


class Rotation(BaseModel):
    """The new secret, shown once, and until when messages are signed with the one before, too."""

    id: str
    secret: str
    previous_until: datetime | None


class ConfirmationBody(_Body):
    """The digits of the mail."""

    code: Annotated[str, StringConstraints(min_length=1, max_length=64)]


class Delivery(BaseModel):
    """A message to a channel and what became of it. `status` is the number in the receiver's last answer."""

    id: str
    channel: str
    kind: Kind
    event: str
    state: Literal["waiting", "delivered", "failed"]
    attempts: int
    status: int | None
    detail: str | None
    created_at: datetime
    attempted_at: datetime | None
    next_attempt_at: datetime | None
    finished_at: datetime | None
    can_resend: bool


async def _channels(request: Request) -> Channels:
    found: Channels = request.app.state.channels
    return found


Service = Annotated[Channels, Depends(_channels)]


@router.get("/notification-channels", response_model=Page[Channel])
async def list_channels(reader: Reading, service: Service, who: Reads) -> Any:
    """Every channel, the oldest first."""
    return await service.listing(reader, who)


@router.put("/notification-channels", response_model=Page[Channel])
async def replace_channels(
    body: ChannelsBody,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("notifications:write", act="channel.change"))],
) -> Any:
    """Make the channels what the body says. The secret of a new webhook is in this answer alone."""
    return await service.replace(tx, who, [Wanted(**each.model_dump()) for each in body.channels])


@router.post("/notification-channels/{channel}/test", status_code=202, response_model=Sent)
async def test_channel(
    channel: Id,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("notifications:write", act="channel.test"))],
) -> Any:
    """Send a test; to an address that is not confirmed yet, a new code."""
    return await service.test(tx, who, channel)


@router.post("/notification-channels/{channel}/confirm", response_model=Channel)
async def confirm_channel(
    channel: Id,
    body: ConfirmationBody,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("notifications:write", act="channel.confirm"))],
) -> Any:
    """Confirm the address of an e-mail channel with the code that was sent there."""
    return await service.confirm(tx, who, channel, body.code)


@router.post("/notification-channels/{channel}/rotate-secret", response_model=Rotation)
async def rotate_secret(
    channel: Id,
    body: RotationBody,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("notifications:write", act="channel.rotate_secret"))],
) -> Any:
    """Replace a webhook's secret; messages are signed with both until the one before ends."""
    return await service.rotate(tx, who, channel, body.overlap_seconds)


@router.get("/notification-deliveries", response_model=Page[Delivery])
async def list_deliveries(
    reader: Reading,
    who: Reads,
    page: Paging,
    channel: Annotated[str | None, Query(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")] = None,
    state: Annotated[Literal["waiting", "delivered", "failed"] | None, Query()] = None,
) -> Any:
    """What was sent to channels, and is to be, the newest first; never the texts."""
    return await deliveries.listing(reader, who, page, channel, state)


@router.post("/notification-deliveries/{delivery}/resend", status_code=202, response_model=Sent)
async def resend_delivery(
    request: Request,
    delivery: Id,
    tx: InTx,
    who: Annotated[Caller, Depends(require("notifications:write", act="delivery.resend"))],
) -> Any:
    """Send it again, with the same webhook-id: a receiver that has it already knows it by that."""
    return await deliveries.resend(tx, who, delivery, request.app.state.settings)
