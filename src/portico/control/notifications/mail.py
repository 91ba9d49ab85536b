"""Mail to people: one template for each topic, rendered where the facts are, sent from the outbox.

    await mail.send(tx, sealer, Mail(f"verify:{user}:{n}", "a@example.com", "account.verify", {"link": …}))

``templates/<topic>.txt`` has ``Subject: …`` as its first line, an empty one, and the text; ``templates/<topic>.html`` extends
``layout.html`` and fills its block ``content``. Both see the facts, all of them named (a missing one is an error), and ``topic``.
In a text nothing is escaped, in HTML everything is; what somebody chose for a name goes through the filter ``name``, which keeps
it on one line, short, and from being read as a link.

Of one key there is one mail, whoever sends it and however often. It leaves by SMTP, or becomes a file of JSON in development:
that is the worker's choice, when it is sent (``delivery.py``).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.headerregistry import Address
from pathlib import Path
from typing import Any, Final

import jinja2

from portico.kit import outbox
from portico.kit.db import Tx
from portico.kit.outbox import Draft
from portico.kit.sealing import Sealer

#: The outbox driver of mail, whichever way it leaves.
DRIVER: Final = "mail"
#: Characters of a subject, of a name that somebody chose, and of an address (RFC 5321, 4.5.3.1.3).
SUBJECT_CHARS: Final = 150
NAME_CHARS: Final = 80
ADDRESS_CHARS: Final = 254

# WORD JOINER: no width, no line break, and the end of a link.
_JOINER: Final = "\u2060"
_TEMPLATES: Final = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Mail:
    """A mail to be. ``key`` is unique in the installation; ``facts`` are what the templates of ``topic`` name."""

    key: str
    to: str
    topic: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    organization: str | None = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a reader gets: the text, and the same as HTML."""

    subject: str
    text: str
    html: str


async def send(tx: Tx, sealer: Sealer, mail: Mail, *, destination: str | None = None) -> str | None:
    """Have ``mail`` sent once ``tx`` has committed; its id, or ``None`` when its key is known already.

    ``destination`` tells an organization's receivers apart, where there are several (``outbox.Draft``).

    Raises ``ValueError`` for an address that no mail can have, ``jinja2.UndefinedError`` for a fact that is missing: both are
    faults of the caller.
    """
    to = address(mail.to)
    made = render(mail.topic, mail.facts)
    body = {"subject": made.subject, "text": made.text, "html": made.html}
    draft = Draft(DRIVER, mail.key, to, mail.topic, body, mail.organization, destination)
    return await outbox.append(tx, sealer, draft)


def address(text: str) -> str:
    """``text`` when it is one address and nothing else (``name@domain``, without comments, quotes or a display name).

    A domain in other letters than ASCII comes back as DNS has it; a name in such letters is refused, as by most servers.
    Raises ``ValueError``. A line break in it would be a header of somebody else's making, a comma another recipient.
    """
    if len(text) > ADDRESS_CHARS or re.search(r"[\x00-\x20\x7f<>()\[\]\\,;:\"]", text) or text.count("@") != 1:
        raise ValueError("not an address that mail can be sent to")
    try:
        user, _, domain = text.rpartition("@")
        found = Address(addr_spec=f"{user}@{domain.encode('idna').decode()}")
    except Exception as err:  # what the parser raises is not documented: IndexError, HeaderParseError, …
        raise ValueError("not an address that mail can be sent to") from err
    if not found.username.isascii() or not found.username or not found.domain:
        raise ValueError("not an address that mail can be sent to")
    return found.addr_spec


def render(topic: str, facts: Mapping[str, Any]) -> Rendered:
    """The mail of ``topic``. Raises ``LookupError`` for a topic without templates."""
    if topic not in topics():
        raise LookupError(f"there is no mail about {topic}")
    known = {**facts, "topic": topic}
    text = _text.get_template(f"{topic}.txt").render(known)
    first, _, rest = text.partition("\n")
    if not first.startswith("Subject: "):
        raise ValueError(f"the first line of {topic}.txt is no subject")
    subject = one_line(first.removeprefix("Subject: "), SUBJECT_CHARS)
    html = _html.get_template(f"{topic}.html").render({**known, "subject": subject})
    return Rendered(subject, rest.strip("\n") + "\n", html)


def topics() -> frozenset[str]:
    """What there are mails about."""
    return frozenset(path.stem for path in _TEMPLATES.glob("*.txt"))


# -- what others wrote, in our words -------------------------------------------------------------------------------------


def one_line(text: str, limit: int) -> str:
    """``text`` on one line, without characters that act instead of showing (controls, direction marks), cut to ``limit``."""
    shown = "".join(" " if c.isspace() else c for c in text if c.isspace() or c == _JOINER or _shows(c))
    joined = " ".join(shown.split())
    return joined if len(joined) <= limit else joined[: limit - 1] + "…"


def _shows(character: str) -> bool:
    return unicodedata.category(character)[0] != "C"


def name(text: object) -> str:
    """A name that somebody chose, made harmless: an organization called ``Win at evil.example`` must not become our link.

    A word joiner after each dot, slash and at sign keeps mail programs from making links of it, and shows as nothing.
    """
    return re.sub(r"(?<=\w)([.@])(?=\w)|(://)", lambda match: match[0] + _JOINER, one_line(str(text), NAME_CHARS))


def _environment(*, html: bool) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=html,  # noqa: S701 - a text is no HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["name"] = name
    return made


_text, _html = _environment(html=False), _environment(html=True)
