"""Who hears of a share of a month's quota that was used: channels that want it, and by mail owners and who pays."""

from __future__ import annotations

from typing import Any, Final

from portico.control.identity import payer_mail
from portico.control.identity.plans import GIB, LIMIT_TABLE
from portico.control.notifications import channels
from portico.kit.db import Tx
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

TOPIC: Final = "usage.threshold"


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
        await payer_mail.send(tx, self._sealer, organization, TOPIC, told, f"{TOPIC}:{key}")


def amount(name: str, count: int) -> str:
    """A number of a limit, for people."""
    return f"{count / GIB:,.2f} GiB" if name.startswith("bytes") else f"{count:,}"
