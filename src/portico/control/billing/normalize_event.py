"""What all finance events of one provider's event share, and what is said of those that mean nothing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from portico.control.billing.provider import Fetched, Name, Origin
from portico.control.finance.events import FinanceEvent
from portico.errors import Problem


@dataclass(frozen=True, slots=True)
class Head:
    """What all finance events of one provider's event share."""

    provider: Name
    origin: Origin
    event_id: str
    event_type: str
    api_version: str | None
    occurred_at: datetime

    def event(self, kind: str, effect: str, **facts: Any) -> FinanceEvent:
        """A finance event of ``kind``; ``effect`` is its key: kind, provider and the object that it happened to."""
        origin = self.origin
        return FinanceEvent(
            provider=self.provider,
            account=origin.account,
            livemode=origin.livemode,
            event_id=self.event_id,
            event_type=self.event_type,
            api_version=self.api_version,
            kind=kind,
            received_at=origin.received_at,
            raw_sha256=origin.raw_sha256,
            effect_key=effect,
            **{"occurred_at": self.occurred_at, **facts},
        )

    def version(self, fetched: Fetched | None, kind: str) -> int:
        """The version of an object: of the look at it, or of the event."""
        at = fetched.at if fetched is not None and kind in fetched.objects else self.occurred_at
        return int(at.timestamp() * 1_000_000)


def unreadable(provider: str, what: str) -> Problem:
    """An event lacks what its kind always has."""
    return Problem("billing.event_unreadable", f"an event of {provider} without {what}", provider=provider)


def unconfirmed(provider: str, what: str) -> Problem:
    """An event's object could not be fetched, and its body alone is not believed."""
    return Problem("billing.event_unconfirmed", f"{provider} does not confirm {what}", provider=provider)
