"""Mail that waits in the outbox, opened as its worker would, and the links in it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import sqlalchemy as sa

from portico.kit import outbox


@dataclass(frozen=True)
class Letter:
    """One mail."""

    topic: str
    subject: str
    text: str
    html: str

    @property
    def token(self) -> str:
        """What its link carries."""
        found = re.search(r"https?://\S+\?token=\S+", self.text)
        assert found is not None, self.text
        assert found[0] in self.html
        return parse_qs(urlsplit(found[0]).query)["token"][0]


async def letters(app: Any, to: str, topic: str | None = None) -> list[Letter]:
    """Mails to an address, oldest first."""
    t = outbox.messages
    query = sa.select(t).where(t.c.recipient == to).order_by(t.c.id)
    if topic is not None:
        query = query.where(t.c.topic == topic)
    async with app.state.db.read() as reader:
        rows = await reader.fetch_all(query)
    found = []
    for row in rows:
        body = json.loads(app.state.sealer.open("outbox message", row.id, row.sealed_body))
        found.append(Letter(row.topic, body["subject"], body["text"], body["html"]))
    return found


async def last(app: Any, to: str, topic: str) -> Letter:
    """The newest mail about a topic."""
    return (await letters(app, to, topic))[-1]
