"""The signed webhook to the operator's own automation: what happened to an incident, and which runbook is about it.

Standard Webhooks, with the secret ``cert_runbook_secret``; retried like every other message that leaves.
"""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from portico.control.notifications.outgoing import read_answer
from portico.errors import Problem
from portico.kit import signing
from portico.kit.clock import Clock
from portico.kit.outbound import Client, OutboundError
from portico.kit.outbox import Message, Outcome
from portico.settings import ApiSettings


def check(settings: ApiSettings) -> None:
    """Raises ``config.invalid`` for an address without a secret to sign with, and for what is none of both."""
    if settings.cert_runbook_url is None:
        return
    if not urlsplit(settings.cert_runbook_url).hostname:
        raise Problem("config.invalid", "setting cert_runbook_url: not a URL", key="cert_runbook_url")
    try:
        signing.key_of(settings.cert_runbook_secret.reveal() if settings.cert_runbook_secret else "")
    except ValueError as err:
        raise Problem("config.invalid", f"setting cert_runbook_secret: {err}", key="cert_runbook_secret") from None


class RunbookDriver:
    """Delivers to the address of the settings, whatever it is by now."""

    def __init__(self, settings: ApiSettings, clock: Clock, client: Client) -> None:
        self._settings, self._clock, self._client = settings, clock, client

    async def deliver(self, message: Message) -> Outcome:
        """One attempt."""
        url, secret = self._settings.cert_runbook_url, self._settings.cert_runbook_secret
        if url is None or secret is None:
            return Outcome("refused", "there is no cert_runbook_url any more")
        payload = json.dumps(message.body, separators=(",", ":")).encode()
        headers = {"content-type": "application/json", "user-agent": "Portico-Runbooks/1"}
        headers |= signing.headers([secret.reveal()], message.id, int(self._clock.wall().timestamp()), payload)
        try:
            answer = await self._client.post(url, headers, payload)
        except OutboundError as err:
            return Outcome("refused" if err.fault == "url" else "retry", str(err))
        return read_answer(answer, self._clock)
