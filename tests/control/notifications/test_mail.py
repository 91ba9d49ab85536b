"""Mail as it is written: templates, subjects, addresses, and what others may not smuggle into it."""

from __future__ import annotations

import re
from typing import Any

import jinja2
import pytest

from portico.control.notifications import mail
from portico.control.notifications.events import EVENTS
from portico.control.notifications.mail import Mail
from portico.kit import outbox, queue
from portico.kit.db import Database
from portico.kit.queue import Limits
from portico.kit.sealing import Sealer, new_master_key
from portico.settings import Secret

SEALER = Sealer(Secret(new_master_key()))

#: Facts for every topic of this layer.
FACTS: dict[str, dict[str, Any]] = {
    "organization.deletion": {
        "organization": "Acme",
        "by": "owner@example.com",
        "until": "2030-01-15 00:00 UTC",
        "page": "https://api.example.com/organizations",
    },
    "organization.invitation": {
        "organization": "Acme",
        "role": "developer",
        "inviter": "owner@example.com",
        "link": "https://api.example.com/invitation?token=tnl_inv_0",
        "until": "2030-01-01 00:00 UTC",
    },
    "key.leaked": {
        "name": "laptop",
        "prefix": "tnl_agt_0123",
        "kind": "agent",
        "organization": "Acme",
        "made_at": "2030-01-01 00:00 UTC",
        "url": None,
        "console": "https://api.example.com",
    },
    "channel.event": {"event": "channel.test", "said": "A test", "rows": [("percent", 80)], "name": "Ops"},
    "channel.confirm": {"code": "12345678", "hours": 24},
    "channel.disabled": dict(EVENTS["channel.disabled"].example),
}


@pytest.mark.parametrize("topic", sorted(FACTS))
def test_every_topic_has_both_forms_and_loads_nothing(topic: str) -> None:
    made = mail.render(topic, FACTS[topic])
    assert made.subject and made.text.strip() and "\n\n\n" not in made.text
    assert "color-scheme" in made.html and "prefers-color-scheme: dark" in made.html
    assert not re.search(r"<(img|script|link|iframe|object|form)\b|url\(|@import|src=", made.html), "nothing external"
    assert max(map(len, made.html.splitlines())) < 900, "RFC 5322 allows 998 a line"


def test_every_topic_has_a_text_and_html() -> None:
    folder = mail._TEMPLATES
    texts = {path.stem for path in folder.glob("*.txt")}
    assert {topic for topic in texts if (folder / f"{topic}.html").is_file()} == texts
    for topic in texts:
        assert (folder / f"{topic}.txt").read_text().startswith("Subject: "), topic
    assert mail.topics() == texts


def test_what_others_chose_is_no_header_no_markup_and_no_link() -> None:
    evil = "Acme\r\nBcc: all@example.com\n\n<script>alert(1)</script> https://evil.example/win \u202egro.live"
    made = mail.render("channel.disabled", FACTS["channel.disabled"] | {"name": evil, "reason": evil})
    assert (
        "\n" not in made.subject and "\r" not in made.subject and "\u202e" not in made.subject + made.text + made.html
    )
    assert "<script>" not in made.html and len(made.subject) <= mail.SUBJECT_CHARS
    assert "evil.example" not in made.text + made.html and "https://evil" not in made.text
    assert not re.search(r"^Bcc", made.text, re.MULTILINE)


def test_a_fact_that_is_missing_is_a_fault() -> None:
    with pytest.raises(jinja2.UndefinedError):
        mail.render("channel.disabled", {})
    with pytest.raises(LookupError):
        mail.render("../../mail", {})


@pytest.mark.parametrize(
    "text",
    ["", "a", "@example.com", "a@", "a@b@c", "a@example.com\r\nBcc: b@example.com", "a@example.com, b@example.com",
     "A <a@example.com>", "a b@example.com", '"a\\"b"@example.com', "a@[127.0.0.1]", "a" * 250 + "@example.com", "a@\x00b",
     "jürgen@example.com"],
)  # fmt: skip
def test_an_address_is_one_address(text: str) -> None:
    with pytest.raises(ValueError, match="address"):
        mail.address(text)


def test_usual_addresses_are_addresses() -> None:
    for text in ("a@example.com", "first.last+tag@mail.example.co.uk", "o'neill@example.com"):
        assert mail.address(text) == text
    assert mail.address("a@exämple.de") == "a@xn--exmple-cua.de"


async def test_a_mail_is_sent_once_for_its_key_and_is_sealed(db: Database) -> None:
    letter = Mail("test:1", "a@example.com", "channel.confirm", FACTS["channel.confirm"], "org_1")
    async with db.transaction() as tx:
        made = await mail.send(tx, SEALER, letter)
        assert await mail.send(tx, SEALER, letter) is None
    async with db.read() as reader:
        row = await reader.raw.fetchrow("SELECT * FROM outbox_messages WHERE id = $1", made)
    assert (row["driver"], row["recipient"], row["topic"]) == ("mail", "a@example.com", "channel.confirm")
    assert b"12345678" not in row["sealed_body"]
    (work,), _ = await queue.claim(db, outbox.kind("mail"), Limits(), 1)
    assert work.id == made
