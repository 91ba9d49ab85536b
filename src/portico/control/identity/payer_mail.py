"""Mails to the people who decide what an organization pays for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from portico.control.identity import facts as identity_facts
from portico.control.notifications import mail
from portico.control.notifications.mail import Mail
from portico.kit.db import Tx
from portico.kit.sealing import Sealer

log = logging.getLogger(__name__)

#: People of one organization that are mailed.
_MAX_MAILS: Final = 50


async def send(tx: Tx, sealer: Sealer, organization: str, topic: str, facts: Mapping[str, Any], key: str) -> None:
    """One mail to each of them, in the transaction of what it tells about; of each ``key`` there is one for each person.

    ``facts`` are the topic's, and gets the organization's name. An address that takes no mail is passed over, and logged.
    """
    for person in await identity_facts.payers(tx, organization, _MAX_MAILS):
        about = {**facts, "organization": person["organization"]}
        try:
            await mail.send(tx, sealer, Mail(f"{key}:{person['id']}", person["email"], topic, about, organization))
        except ValueError:
            log.warning("an owner's address takes no mail", extra={"f": {"user": person["id"]}})
