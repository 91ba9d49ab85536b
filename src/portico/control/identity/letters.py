"""What an account's mails say: one function a topic, so that every call names its facts in one place.

Mails go to the account's address in the transaction of what they tell about. Their keys name what happened, never a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portico.control.access import Caller
from portico.control.notifications import mail
from portico.control.notifications.mail import Mail
from portico.kit.clock import Clock
from portico.kit.db import Tx
from portico.kit.ids import new_id
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings


class Letters:
    """Sends them."""

    def __init__(self, settings: ApiSettings, sealer: Sealer, clock: Clock) -> None:
        self._settings = settings
        self._sealer = sealer
        self._clock = clock

    def link(self, path: str, token: str) -> str:
        """The address of a page of the console that takes ``token``."""
        return f"{self._settings.api_url.rstrip('/')}/{path}?token={token}"

    async def verify(self, tx: Tx, caller: Caller, to: str, organization: str, token: str) -> None:
        """The link that shows that an address is theirs."""
        facts: dict[str, Any] = {
            "link": self.link("verify-email", token),
            "organization": organization,
            **self._who(caller),
        }
        facts["hours"] = str(self._settings.email_verification_seconds // 3600)
        await self._send(tx, to, "account.verify", facts)

    async def reset(self, tx: Tx, caller: Caller, to: str, token: str, *, verified: bool) -> None:
        """The link that sets a new password."""
        facts: dict[str, Any] = {"link": self.link("reset-password", token), "verified": verified, **self._who(caller)}
        facts["minutes"] = str(self._settings.password_reset_seconds // 60)
        await self._send(tx, to, "account.reset", facts)

    async def change_address(self, tx: Tx, caller: Caller, to: str, old: str, token: str) -> None:
        """The link, to the new address, that makes it the account's."""
        facts: dict[str, Any] = {"link": self.link("change-email", token), "old": old, **self._who(caller)}
        facts["hours"] = str(self._settings.email_verification_seconds // 3600)
        await self._send(tx, to, "account.change_email", facts)

    async def tell(
        self, tx: Tx, caller: Caller, to: str, happened: str, *, detail: str = "", key: str | None = None
    ) -> None:
        """That something about the account's security changed (``account.changed``); ``happened`` is of ``HAPPENED``.

        Of one ``key`` there is one mail.
        """
        facts = {"title": HAPPENED[happened], "detail": detail, "page": self._page("account/security")}
        facts |= self._who(caller)
        await self._send(tx, to, "account.changed", facts, key)

    async def support_begun(
        self, tx: Tx, to: str, session: Mapping[str, Any], organization: str, scope: str, key: str
    ) -> None:
        """To an owner: that an operator is in the organization, why, and until when."""
        facts = {
            "organization": organization,
            "consent": session["consent_id"],
            "operator": session["operator_id"],
            "reason": session["reason"],
            "may": "look around and change tunnels" if scope == "write" else "look around",
            "until": f"{session['expires_at']:%Y-%m-%d %H:%M} UTC",
            "at": f"{self._clock.wall():%Y-%m-%d %H:%M} UTC",
            "console": self._settings.api_url,
        }
        await self._send(tx, to, "support.begun", facts, key)

    def _page(self, path: str) -> str:
        return f"{self._settings.api_url.rstrip('/')}/{path}"

    def _who(self, caller: Caller) -> dict[str, str]:
        return {"at": f"{self._clock.wall():%Y-%m-%d %H:%M} UTC", "address": caller.address or "an unknown address"}

    async def _send(self, tx: Tx, to: str, topic: str, facts: Mapping[str, Any], key: str | None = None) -> None:
        try:
            mail.address(to)
        except ValueError:  # an account from before addresses were held to what mail can reach
            return
        await mail.send(tx, self._sealer, Mail(key or f"{topic}:{new_id('mal')}", to, topic, facts))


HAPPENED = {
    "password": "Your password was changed",
    "reset": "Your password was reset",
    "taken_over": "Your account is yours now",
    "email": "The e-mail address of your account was changed",
    "email_asked": "Another e-mail address was asked for your account",
    "totp_on": "An authenticator app was set up",
    "totp_off": "The authenticator app was removed",
    "recovery_used": "A recovery code was used to sign in",
    "recovery_new": "New recovery codes were made",
    "passkey_on": "A passkey was added",
    "passkey_off": "A passkey was removed",
    "factors_off": "Your second factors were taken away by operators of the platform, and your sessions ended",
    "guessing": "Somebody who knows your password is guessing codes",
}
