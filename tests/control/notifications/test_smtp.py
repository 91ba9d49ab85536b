"""Mail handed to a real SMTP server: STARTTLS and TLS, credentials, what its answers mean, and how long it may take."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import email
import ssl
from collections.abc import AsyncIterator
from email import policy
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from portico.control.notifications import mail, smtp
from portico.control.notifications.smtp import SmtpDriver
from portico.errors import Problem
from portico.kit.clock import SystemClock
from portico.kit.outbox import Message, Outcome
from portico.settings import ApiSettings, Secret
from portico.simulators.smtp import CUT, HANG, RESET, TAKE_AND_RESET, MailServer
from tests.authority import Authority


class Receiver:
    """What the server does with a mail, and which it got."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.sender, self.recipient, self.data = "250 OK", "250 OK", "250 2.0.0 queued as 4711"
        self.pause = 0.0

    async def handle_MAIL(self, server: Any, session: Session, envelope: Envelope, address: str, options: Any) -> str:
        envelope.mail_from = address
        return self.sender

    async def handle_RCPT(self, server: Any, session: Session, envelope: Envelope, address: str, options: Any) -> str:
        envelope.rcpt_tos.append(address)
        return self.recipient

    async def handle_DATA(self, server: Any, session: Session, envelope: Envelope) -> str:
        await asyncio.sleep(self.pause)
        assert isinstance(envelope.content, bytes)
        self.got.append(envelope.content)
        return self.data


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def server_context(authority: Authority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("mail", "localhost"))
    return context


@contextlib.asynccontextmanager
async def listening(
    receiver: Receiver, *, implicit: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[int]:
    """The port of an SMTP server."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(receiver, hostname="mail.test", loop=loop, **options), "127.0.0.1", 0, ssl=implicit
    )
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def settings(port: int, scheme: str = "smtp", **more: Any) -> ApiSettings:
    wanted = {
        "smtp_starttls": "never",
        "smtp_from": "Portico <no-reply@portico.test>",
        "smtp_timeout_seconds": 10.0,
    } | more
    return ApiSettings(
        database_url=Secret("x"), master_key=Secret("x"), smtp_url=f"{scheme}://localhost:{port}", **wanted
    )


def driver(chosen: ApiSettings) -> SmtpDriver:
    server = smtp.configured(chosen)
    assert server is not None
    return SmtpDriver(server, SystemClock())


def message(to: str = "a@example.com", **body: str) -> Message:
    made = mail.render("channel.event", {"event": "x.y", "said": "News of Süd & Co", "rows": [], "name": "Ops"})
    content = {"subject": made.subject, "text": made.text, "html": made.html} | body
    return Message("msg_1", "test:1", to, "channel.event", content, None, 1)


async def test_a_mail_arrives_in_both_forms() -> None:
    receiver = Receiver()
    async with listening(receiver) as port:
        for _ in range(2):
            outcome = await driver(settings(port)).deliver(message())
            assert outcome == Outcome("delivered", "2.0.0 queued as 4711", status=250)
    first, second = (email.message_from_bytes(raw, policy=policy.default) for raw in receiver.got)
    assert first["Message-ID"] == second["Message-ID"] == smtp.message_id("test:1", "portico.test")
    assert (first["From"], first["To"]) == ("Portico <no-reply@portico.test>", "a@example.com")
    assert first["Subject"] == "News of Süd & Co" and first["Auto-Submitted"] == "auto-generated"
    text, html = first.iter_parts()
    assert text.get_content_type() == "text/plain" and "Süd & Co" in text.get_content()
    assert html.get_content_type() == "text/html" and "Süd &amp; Co" in html.get_content()
    assert receiver.got[0].isascii() and max(map(len, receiver.got[0].splitlines())) <= 78


async def test_starttls_credentials_and_tls_from_the_start(authority: Authority) -> None:
    receiver, seen = Receiver(), list[tuple[bytes, bytes]]()

    def authenticate(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        seen.append((data.login, data.password))
        return AuthResult(success=data.password == b"s3cret", handled=False)

    tls: dict[str, Any] = {"smtp_ca_file": authority.ca, "smtp_username": "portico", "smtp_password": Secret("s3cret")}
    options: dict[str, Any] = {"authenticator": authenticate}
    context = server_context(authority)
    async with listening(receiver, tls_context=context, require_starttls=True, **options) as port:
        assert (await driver(settings(port, smtp_starttls="required", **tls)).deliver(message())).result == "delivered"
        wrong = settings(port, smtp_starttls="required", **tls | {"smtp_password": Secret("other")})
        refused = await driver(wrong).deliver(message())
        assert refused.result == "retry" and "535" in refused.detail and "other" not in refused.detail
        untrusted = settings(port, smtp_starttls="required")
        assert (await driver(untrusted).deliver(message())).result == "retry"
    async with listening(receiver, implicit=context, auth_require_tls=False, **options) as port:
        outcome = await driver(settings(port, "smtps", **tls)).deliver(message())
        assert outcome.result == "delivered", outcome
    assert set(seen) == {(b"portico", b"s3cret"), (b"portico", b"other")} and len(receiver.got) == 2


async def test_without_starttls_nothing_is_said() -> None:
    receiver = Receiver()
    async with listening(receiver) as port:
        outcome = await driver(settings(port, smtp_starttls="required")).deliver(message())
    assert outcome.result == "retry" and not receiver.got


@pytest.mark.parametrize(
    ("changed", "result"),
    [
        ({"recipient": "550 5.1.1 no such user"}, "refused"),
        ({"recipient": "452 4.2.2 mailbox full"}, "retry"),
        ({"sender": "553 5.1.8 not you"}, "refused"),
        ({"data": "554 5.7.1 looks like spam"}, "refused"),
        ({"data": "451 4.7.1 greylisted"}, "retry"),
    ],
)
async def test_what_a_server_says_is_done(changed: dict[str, str], result: str) -> None:
    receiver = Receiver()
    ((part, answer),) = changed.items()
    setattr(receiver, part, answer)
    async with listening(receiver) as port:
        outcome = await driver(settings(port)).deliver(message())
    assert outcome.result == result and answer[:3] in outcome.detail and outcome.status == int(answer[:3])


async def test_a_server_that_hangs_or_is_away_is_tried_again() -> None:
    receiver = Receiver()
    receiver.pause = 30
    async with listening(receiver) as port:
        outcome = await driver(settings(port, smtp_timeout_seconds=0.3)).deliver(message())
        assert outcome.result == "retry" and "0.3 s" in outcome.detail
    gone = await driver(settings(port)).deliver(message())
    assert gone.result == "retry" and not receiver.got


@pytest.mark.parametrize(
    ("command", "plan", "result"),
    [
        ("", HANG, "retry"), ("", RESET, "retry"), ("", "554 5.3.2 not now", "retry"), ("", "421 4.3.2 busy", "retry"),
        ("EHLO", CUT, "retry"), ("MAIL", CUT, "retry"), ("RCPT", HANG, "retry"), ("RCPT", "450 4.2.1 later", "retry"),
        ("RCPT", "550 5.1.1 nobody", "refused"), ("DATA", RESET, "retry"), ("DATA", "451 4.3.0 later", "retry"),
        (".", HANG, "retry"), (".", CUT, "retry"), (".", "552 5.2.2 full", "refused"), (".", "452 4.2.2 full", "retry"),
    ],
)  # fmt: skip
async def test_servers_that_misbehave(command: str, plan: str, result: str) -> None:
    async with MailServer() as server:
        server.plan(command, plan)
        limit = 0.4 if plan == HANG else 10.0
        chosen = driver(settings(server.port, smtp_timeout_seconds=limit))
        assert (await chosen.deliver(message())).result == result
        assert server.got == []
        assert (await chosen.deliver(message())).result == "delivered"
    (letter,) = server.got
    assert (letter.sender, letter.recipients) == ("no-reply@portico.test", ("a@example.com",))


async def test_a_mail_whose_answer_was_lost_is_known_by_its_id() -> None:
    async with MailServer() as server:
        server.plan(".", TAKE_AND_RESET)
        chosen = driver(settings(server.port))
        assert (await chosen.deliver(message())).result == "retry"
        assert (await chosen.deliver(message())).result == "delivered"
    ids = [email.message_from_bytes(letter.content)["Message-ID"] for letter in server.got]
    assert len(ids) == 2 and len(set(ids)) == 1


async def test_no_header_is_smuggled() -> None:
    receiver = Receiver()
    async with listening(receiver) as port:
        for bad in (message("a@example.com\r\nBcc: b@example.com"), message(subject="Hi\r\nBcc: b@example.com")):
            assert (await driver(settings(port)).deliver(bad)).result == "refused"
        dots = message(text="before\r\n.\r\nMAIL FROM:<x@example.com>\r\n")
        assert (await driver(settings(port)).deliver(dots)).result == "delivered"
    (raw,) = receiver.got
    assert "MAIL FROM" in raw.decode()


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"smtp_url": "http://localhost"}, "smtp_url"), ({"smtp_url": "smtp://a:b@localhost"}, "smtp_url"),
        ({"smtp_url": "smtp://localhost:x"}, "smtp_url"), ({"smtp_from": "nobody"}, "smtp_from"),
        ({"smtp_starttls": "maybe"}, "smtp_starttls"), ({"smtp_username": "a"}, "smtp_password"),
        ({"smtp_username": "a", "smtp_password": Secret("b"), "smtp_starttls": "offered"}, "smtp_starttls"),
        ({"smtp_ca_file": Path("/nowhere.pem")}, "smtp_ca_file"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(Problem) as refused:
        smtp.configured(dataclasses.replace(settings(25), **wrong))
    assert refused.value.code == "config.invalid" and refused.value.extra["key"] == key


def test_without_a_server_there_is_none() -> None:
    assert smtp.configured(ApiSettings(database_url=Secret("x"), master_key=Secret("x"))) is None
