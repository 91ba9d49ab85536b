"""Who hears of a share of a month's quota that was used: channels that want it, and by mail owners and who pays."""

from __future__ import annotations

import logging
from typing import Any, Final

from portico.control.identity import facts as identity_facts
from portico.control.identity.plans import GIB, LIMIT_TABLE
from portico.control.notifications import channels, mail
from portico.control.notifications.mail import Mail
from portico.kit.db import Tx
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

TOPIC: Final = "usage.threshold"
#: People of one organization that are mailed.
_MAX_MAILS: Final = 50


class UsageNotices:
    """Told by ``standing`` of each share, once a month; one mail for each person and share, in the transaction that notes it."""

    def __init__(self, settings: ApiSettings, sealer: Sealer) -> None:
        self._settings = settings
        self._sealer = sealer

    async def __call__(self, tx: Tx, organization: str, facts: dict[str, Any], key: str) -> None:
        told_once = f"{TOPIC}:{facts['month']} {facts['limit']} {facts['percent']}"
        await channels.notify(tx, self._sealer, organization, TOPIC, facts, told_once)
        name = facts["limit"]
        told = {
            "percent": facts["percent"],
            "what": LIMIT_TABLE[name].noun,
            "used": amount(name, facts["used"]),
            "allowed": amount(name, facts["allowed"]),
            "month": facts["month"],
            "plan": facts["plan"],
            "stops": facts["hard_cap"],
            "console": self._settings.api_url,
        }
        for person in await identity_facts.payers(tx, organization, _MAX_MAILS):
            about = {**told, "organization": person["organization"]}
            letter = Mail(f"{TOPIC}:{key}:{person['id']}", person["email"], TOPIC, about, organization)
            try:
                await mail.send(tx, self._sealer, letter)
            except ValueError:
                log.warning("an owner's address takes no mail", extra={"f": {"user": person["id"]}})


def amount(name: str, count: int) -> str:
    """A number of a limit, for people."""
    return f"{count / GIB:,.2f} GiB" if name.startswith("bytes") else f"{count:,}"
