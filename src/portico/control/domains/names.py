"""Names that an organization may bring: what somebody types, as the DNS has it and as people read it.

    parse("Bücher.Example.")   Name("xn--bcher-kva.example", …)       A-labels, lower case, no dot at the end
    parse("*.example.com")     wildcard: every name one label below, which is what a wildcard certificate is for

Letters beyond ASCII go through UTS #46 (non-transitional) and IDNA 2008. A label that no browser would show as written (scripts
mixed, or another script in the shapes of Latin letters) is refused, as are names that belong to everybody (public suffixes, by a
list that comes with a package: nothing is fetched) and those of this installation.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import idna
from publicsuffixlist import PublicSuffixList

from portico.errors import Problem
from portico.kit.lookalikes import decoded, poses_as_latin
from portico.settings import ApiSettings

#: Characters that somebody may type; A-labels are longer than what they stand for, never four times.
MAX_CHARS: Final = 1024
#: A name in the DNS without its last dot (RFC 1035, 2.3.4), less the longest label that we put before one.
MAX_NAME_CHARS: Final = 253 - len("_portico-challenge.")
_WILDCARD: Final = "*."
_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True, slots=True)
class Name:
    """A domain. ``name``: with ``*.`` when it is a wildcard; ``base``: without; ``registrable``: what was registered, of it."""

    name: str
    base: str
    display: str
    registrable: str

    @property
    def wildcard(self) -> bool:
        return self.name != self.base

    @property
    def apex(self) -> bool:
        """Whether it is the registered name itself, at which no CNAME may stand."""
        return self.base == self.registrable


class NameRules:
    """What this installation takes. Raises ``config.invalid`` for a list of suffixes that is none."""

    def __init__(self, settings: ApiSettings) -> None:
        self._base = _plain(settings.base_domain)
        self._suffixes = suffixes(settings.public_suffix_file)
        own = {_plain(urlsplit(url).hostname or "") for url in (settings.public_url,)}
        own |= {_plain(settings.tcp_url_host or ""), target(settings)}
        self._own = frozenset(own - {""})

    def parse(self, text: str) -> Name:
        """The domain that ``text`` names.

        Raises ``domain.name_invalid``, ``domain.public_suffix``, ``domain.reserved``.
        """
        found = self._name(text)
        suffix = self._suffixes.publicsuffix(found)
        if found == suffix:
            raise Problem("domain.public_suffix", f"{found} is a suffix under which anybody registers names")
        wildcard = text.strip().startswith(_WILDCARD)
        self._check_own(found, wildcard)
        return self.known(_WILDCARD + found if wildcard else found)

    def known(self, name: str) -> Name:
        """A domain by its stored name, which passed the rules of its day."""
        base = name.removeprefix(_WILDCARD)
        registrable = self._suffixes.privatesuffix(base) or base
        shown = ".".join(decoded(label) or label for label in base.split("."))
        return Name(name, base, _WILDCARD + shown if name != base else shown, registrable)

    def _name(self, text: str) -> str:
        stripped = text.strip().removeprefix(_WILDCARD)
        stripped = stripped[:-1] if stripped.endswith((".", "。")) else stripped
        if not stripped or len(text) > MAX_CHARS:
            raise _invalid(text, "it is empty or too long")
        if any(mark in stripped for mark in ("/", ":", "@", "*", " ", "_")):
            raise _invalid(
                text, "it has more than the labels of a host name", "Give the name alone, as www.example.com"
            )
        try:
            found = idna.encode(stripped, uts46=True, std3_rules=True).decode("ascii")
        except (idna.IDNAError, UnicodeError) as err:
            raise _invalid(text, str(err)[:120] or "no host name is written so") from None
        labels = found.split(".")
        if len(found) > MAX_NAME_CHARS:
            raise _invalid(text, f"it is longer than {MAX_NAME_CHARS} characters")
        if len(labels) < 2 or not all(_LABEL.fullmatch(label) for label in labels) or _NUMBER.fullmatch(labels[-1]):
            raise _invalid(text, "it is not a name with at least two labels")
        for label in labels:
            shown = decoded(label)
            if shown is None:
                raise _invalid(text, f"the label {label} is written in a way that browsers do not show")
            if shown != label and poses_as_latin(shown) and labels[-1].isascii() and not labels[-1].startswith("xn--"):
                raise _invalid(text, f"the label {label} looks like Latin letters and is not")
        return found

    def _check_own(self, found: str, wildcard: bool) -> None:
        """Names of this installation are nobody's, nor is a wildcard that would cover one of them."""
        below = found == self._base or found.endswith(f".{self._base}")
        covers = wildcard and any(host.partition(".")[2] == found for host in (self._base, *self._own))
        if below or found in self._own or covers:
            raise Problem("domain.reserved", f"{found} belongs to this installation, or has names of it below")


def target(settings: ApiSettings) -> str:
    """The name that a domain's CNAME points to."""
    return _plain(settings.domain_cname or f"edge.{settings.base_domain}")


def parent(host: str) -> str:
    """The wildcard that would cover a host."""
    return f"{_WILDCARD}{host.partition('.')[2]}"


@functools.lru_cache(maxsize=4)
def suffixes(path: Path | None) -> PublicSuffixList:
    """The list of public suffixes: of the package, or of a file in the format of publicsuffix.org."""
    if path is None:
        return PublicSuffixList()
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
        if not any(line.strip() and not line.startswith("//") for line in lines):
            raise ValueError("it has no suffix")
        return PublicSuffixList([line.encode() for line in lines])
    except (OSError, ValueError) as err:
        why = getattr(err, "strerror", None) or str(err)
        raise Problem(
            "config.invalid", f"setting public_suffix_file: {path}: {why}", key="public_suffix_file"
        ) from None


def _plain(host: str) -> str:
    return host.lower().strip(".")


def _invalid(text: str, why: str, hint: str | None = None) -> Problem:
    return Problem("domain.name_invalid", f"{text.strip()[:80]!r} cannot be a domain: {why}", hint=hint)
