"""The way out for mail: SMTP (RFC 5321), by the server that the settings name.

``smtp://host:587`` speaks STARTTLS (RFC 3207) before anything is said, ``smtps://host:465`` TLS from the start (RFC 8314). A
server that offers no STARTTLS is refused unless ``smtp_starttls`` says otherwise: whoever stands in between could have taken the
offer away. What a server says decides what comes of an attempt (RFC 5321, 4.2.1):

    5yz to sender, recipient or text    refused: the same mail will not be taken later
    4yz, no answer, a broken line       tried again
    5yz to greeting or credentials      tried again: it is our fault, or the server's, not this mail's

A mail that was taken, and whose answer was lost, is sent again with the same Message-ID.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from dataclasses import dataclass
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP as WIRE
from email.utils import format_datetime, parseaddr
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiosmtplib

from portico.control.notifications import mail
from portico.errors import Problem
from portico.kit.clock import Clock
from portico.kit.outbox import Message, Outcome
from portico.settings import ApiSettings, Secret

_PORTS: Final = {"smtp": 587, "smtps": 465}
#: Characters of a server's answer that are kept.
_ANSWER_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class Server:
    """Where mail is handed over, checked. ``implicit``: TLS from the start; ``starttls``: None: where it is offered."""

    host: str
    port: int
    implicit: bool
    starttls: bool | None
    sender: Address
    username: str | None
    password: Secret | None
    context: ssl.SSLContext | None
    timeout_seconds: float


def configured(settings: ApiSettings) -> Server | None:
    """The server of the settings, ``None`` when there is none; raises ``config.invalid`` for one that cannot be used."""
    if not settings.smtp_url:
        return None
    try:
        url = urlsplit(settings.smtp_url)
        port = url.port or _PORTS[url.scheme]
    except (ValueError, KeyError):
        raise _invalid("smtp_url", "is smtp://host[:port] or smtps://host[:port]") from None
    if not url.hostname or url.username or url.password or url.path not in ("", "/") or url.query or url.fragment:
        raise _invalid(
            "smtp_url", "has a host and perhaps a port, no more; credentials are smtp_username and smtp_password"
        )
    if settings.smtp_starttls not in _STARTTLS:
        raise _invalid("smtp_starttls", f"is one of {', '.join(_STARTTLS)}")
    implicit = url.scheme == "smtps"
    starttls = False if implicit else _STARTTLS[settings.smtp_starttls]
    if (settings.smtp_username is None) != (settings.smtp_password is None):
        raise _invalid("smtp_password", "goes with smtp_username")
    if settings.smtp_password is not None and not implicit and starttls is not True:
        raise _invalid("smtp_starttls", "must be required where there is a password")
    return Server(
        url.hostname, port, implicit, starttls, _sender(settings.smtp_from), settings.smtp_username,
        settings.smtp_password, _context(settings.smtp_ca_file), settings.smtp_timeout_seconds,
    )  # fmt: skip


_STARTTLS: Final = {"required": True, "offered": None, "never": False}


def _invalid(key: str, what: str) -> Problem:
    return Problem("config.invalid", f"setting {key}: {what}", key=key)


def _sender(text: str) -> Address:
    shown, spec = parseaddr(text)
    try:
        return Address(display_name=mail.one_line(shown, mail.NAME_CHARS), addr_spec=mail.address(spec))
    except ValueError:
        raise _invalid("smtp_from", "is no address; it looks like Portico <no-reply@example.com>") from None


def _context(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as err:
        raise _invalid("smtp_ca_file", f"{ca_file}: {err}") from None


class SmtpDriver:
    """Delivers by one connection for each mail."""

    def __init__(self, server: Server, clock: Clock) -> None:
        self._server, self._clock = server, clock

    async def deliver(self, message: Message) -> Outcome:
        """One attempt, in at most ``timeout_seconds``."""
        try:
            document = self._compose(message)
        except ValueError as err:
            return Outcome("refused", f"it cannot be written: {err}")
        try:
            async with asyncio.timeout(self._server.timeout_seconds):
                return await self._hand_over(document, message.recipient)
        except TimeoutError:
            return Outcome("retry", f"{self._server.host} took longer than {self._server.timeout_seconds:g} s")
        except (aiosmtplib.SMTPException, OSError, ssl.SSLError) as err:
            return Outcome("retry", _said(err), status=getattr(err, "code", None))

    def _compose(self, message: Message) -> EmailMessage:
        """What is sent: text and HTML, in seven bits. Header values with line breaks are refused by the policy."""
        document = EmailMessage(policy=WIRE.clone(cte_type="7bit"))
        document["From"] = self._server.sender
        document["To"] = Address(addr_spec=mail.address(message.recipient))
        document["Subject"] = message.body["subject"]
        document["Date"] = format_datetime(self._clock.wall())
        document["Message-ID"] = message_id(message.key, self._server.sender.domain)
        document["Auto-Submitted"] = "auto-generated"  # RFC 3834: no vacation notes, please
        document.set_content(message.body["text"])
        document.add_alternative(message.body["html"], subtype="html")
        return document

    async def _hand_over(self, document: EmailMessage, recipient: str) -> Outcome:
        server = self._server
        client = aiosmtplib.SMTP(
            hostname=server.host, port=server.port, use_tls=server.implicit, start_tls=server.starttls,
            tls_context=server.context, timeout=server.timeout_seconds, local_hostname=server.sender.domain,
        )  # fmt: skip
        try:
            await client.connect()
            if server.username is not None and server.password is not None:
                await client.login(server.username, server.password.reveal())
            try:
                _, answer = await client.send_message(document, sender=server.sender.addr_spec, recipients=[recipient])
            except aiosmtplib.SMTPRecipientsRefused as err:
                return _answered(err.recipients[0].code, err.recipients[0].message)
            except (aiosmtplib.SMTPSenderRefused, aiosmtplib.SMTPDataError) as err:
                return _answered(err.code, err.message)
            except aiosmtplib.SMTPNotSupported as err:  # an address in other letters than ASCII, and no SMTPUTF8
                return Outcome("refused", _said(err))
            return Outcome("delivered", mail.one_line(answer, _ANSWER_CHARS), status=250)
        finally:
            client.close()


def message_id(key: str, domain: str) -> str:
    """The Message-ID of the mail with this key: the same in every attempt."""
    return f"<{hashlib.sha256(key.encode()).hexdigest()[:40]}@{domain}>"


def _answered(code: int, text: str) -> Outcome:
    said = mail.one_line(f"{code} {text}", _ANSWER_CHARS)
    return Outcome("refused" if 500 <= code < 600 else "retry", said, status=code)


def _said(err: BaseException) -> str:
    code = f"{err.code} " if isinstance(err, aiosmtplib.SMTPResponseException) else ""
    return mail.one_line(f"{type(err).__name__}: {code}{getattr(err, 'message', None) or err}", _ANSWER_CHARS)
