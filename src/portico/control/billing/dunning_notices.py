"""Who hears of a dunning case: channels that want it, and by mail owners and who pays; of each stage once by each way."""

from __future__ import annotations

import logging
from typing import Any, Final

from portico.control.identity import facts as identity_facts
from portico.control.notifications import channels, mail
from portico.control.notifications.mail import Mail
from portico.kit.db import Tx
from portico.kit.money import decimal_text
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

ADVANCED: Final = "dunning.advanced"
RECOVERED: Final = "dunning.recovered"
#: People of one organization that are mailed.
_MAX_MAILS: Final = 50


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
        for person in await identity_facts.payers(tx, case.organization_id, _MAX_MAILS):
            about = {**facts, "organization": person["organization"], "console": self._settings.api_url}
            letter = Mail(f"{key}:{person['id']}", person["email"], topic, about, case.organization_id)
            try:
                await mail.send(tx, self._sealer, letter)
            except ValueError:
                log.warning("an owner's address takes no mail", extra={"f": {"user": person["id"]}})
