"""Who hears of a dunning case: channels that want it, and by mail owners and who pays; of each stage once by each way."""

from __future__ import annotations

from typing import Any, Final

from portico.control.identity import payer_mail
from portico.control.notifications import channels
from portico.kit.db import Tx
from portico.kit.money import decimal_text
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

ADVANCED: Final = "dunning.advanced"
RECOVERED: Final = "dunning.recovered"


class Notices:
    """Drafts, in the transaction that moves a case. The outbox has one message for each key, so a stage is told once."""

    def __init__(self, settings: ApiSettings, sealer: Sealer) -> None:
        self._settings = settings
        self._sealer = sealer

    async def stage(self, tx: Tx, subscription: Any, case: Any) -> None:
        """A case has reached a stage."""
        await self._tell(tx, subscription, case, ADVANCED, case.stage)

    async def recovered(self, tx: Tx, subscription: Any, case: Any) -> None:
        """Everything is paid."""
        await self._tell(tx, subscription, case, RECOVERED, "recovered")

    async def _tell(self, tx: Tx, subscription: Any, case: Any, topic: str, stage: str) -> None:
        facts = {
            "case": case.id,
            "subscription": subscription.id,
            "state": case.state,
            "stage": case.stage,
            "amount_minor": case.amount_minor,
            "currency": case.currency,
            "amount": f"{decimal_text(case.amount_minor, case.currency)} {case.currency}",
            "attempts": case.attempts,
            "next_attempt_at": case.next_attempt_at.isoformat() if case.next_attempt_at is not None else None,
            "opened_at": case.opened_at.isoformat(),
        }
        key = f"dunning:{case.id}:{stage}"
        await channels.notify(tx, self._sealer, case.organization_id, topic, facts, key)
        about = {**facts, "console": self._settings.api_url}
        await payer_mail.send(tx, self._sealer, case.organization_id, topic, about, key)
