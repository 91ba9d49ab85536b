"""Settings of mail, and of what is sent to customers' own addresses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from portico.settings.secrets import Secret


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class NotificationSettings:
    """Mail, webhooks and Slack."""

    __slots__ = ()

    # == Mail
    # Where mail is handed over: smtp://host[:port] (587, STARTTLS) or smtps://host[:port] (465, TLS from the start); empty: mail
    # is written to the worker's outbox_dir, for development.
    smtp_url: str = ""
    # Sender of every mail, as `Portico <no-reply@example.com>`; its domain is also the name that we give in EHLO.
    smtp_from: str = "Portico <no-reply@localhost>"
    # Name for that server, if it asks for one.
    smtp_username: str | None = None
    # Password that goes with it.
    smtp_password: Secret | None = None
    # Whether STARTTLS is `required`, used where `offered`, or `never` (a server on this machine); a password asks for `required`.
    smtp_starttls: str = "required"
    # Certificate authorities (PEM) that vouch for that server; empty: those of the system.
    smtp_ca_file: Path | None = None
    # Seconds for one mail to be handed over.
    smtp_timeout_seconds: float = 30.0

    # == Notifications
    # Channels that an organization may have.
    channels_per_organization: int = 20
    # Tests of one channel, and codes to it, in one window.
    channel_tests_per_window: int = 5
    # The same of all channels of an organization, those that were removed meanwhile among them.
    channel_tests_per_organization: int = 30
    # Deliveries that an organization has sent again in one window.
    channel_resends_per_organization: int = 60
    # Seconds of that window.
    channel_test_window_seconds: float = 300.0
    # Seconds that a code to an address is good for.
    channel_code_seconds: int = 86_400
    # Tries of one code.
    channel_code_tries: int = 5
    # Codes that an organization has mailed at most while one is good: readers who never asked for it get no more.
    channel_codes_per_organization: int = 40
    # Seconds that a webhook's secret is still signed with after it was replaced, unless the call says otherwise.
    webhook_secret_overlap_seconds: int = 86_400
    # Seconds for which every attempt at a channel fails before it is switched off.
    channel_patience_seconds: float = 432_000.0
    # Hosts that incoming webhooks of Slack, and of what speaks its format, may have.
    slack_hosts: tuple[str, ...] = ("hooks.slack.com", "hooks.slack-gov.com")
    # TCP ports of customers' addresses that are called (webhooks, Slack).
    outbound_ports: tuple[int, ...] = (443, 8443)
    # Networks that may be called although they are not public, as 10.1.0.0/16; empty: none.
    outbound_allow: tuple[str, ...] = ()
    # Whether http:// is called, too; for development.
    outbound_http: bool = False
    # Certificate authorities (PEM) that vouch for customers' addresses; empty: those of the system.
    outbound_ca_file: Path | None = None
    # Seconds for one call, from the look at the name to the answer.
    outbound_timeout_seconds: float = 15.0
