"""Which names may be public hosts: the rules over the words of ``reserved_names.toml``.

    whole       ``blocked`` words, ``numbered`` ones with a number, and every company alone
    part        ``abuse`` words between hyphens; companies beside what people are lured with
    inside      ``distinct`` companies in the midst of a word
    disguise    each of these for what *looks* like the word (``kit/lookalikes``): digits for letters, rn for m, accents, hyphens

``xn--`` names are read as what they show: letters of one script, and not of another one that draws a Latin word. A tunnel that
has its name already keeps it, whatever the rules become.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from portico.errors import Problem
from portico.kit.lookalikes import decoded, drawn, poses_as_latin, skeleton
from portico.settings import ApiSettings

_SUBDOMAIN: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{1,61}[a-z0-9])?")
_LISTS: Final = (
    "blocked", "numbered", "abuse", "lures", "developer", "guarded", "distinct", "known", "allowed",
)  # fmt: skip
_FILE: Final = Path(__file__).with_name("reserved_names.toml")
_MAX_CHARS: Final = 63  # one DNS label
_MAX_BYTES: Final = 1024 * 1024
_WORD: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(slots=True)
class NameRules:
    """The rules of one installation. Raises ``config.invalid`` for a file that is none."""

    allowed: frozenset[str]
    _blocked: frozenset[str]
    _numbered: frozenset[str]
    _abuse: frozenset[str]
    _lures: frozenset[str]
    _developer: frozenset[str]
    _guarded: dict[str, str]  # skeleton -> word, here and below
    _known: dict[str, str]
    _distinct: dict[str, str]
    # Names that were looked at lately: an agent that reconnects brings its names along.
    _answers: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def load(cls, settings: ApiSettings) -> NameRules:
        """Our words with those of ``reserved_names_file``."""
        words = _read(_FILE)
        if (path := settings.reserved_names_file) is not None:
            for name, more in _read(path.expanduser(), "setting reserved_names_file: ").items():
                words[name] = words[name] + more
        guarded = words["guarded"] + words["distinct"]
        return cls(
            frozenset(words["allowed"]),
            frozenset(_flat(word) for word in words["blocked"]),
            frozenset(_flat(word) for word in words["numbered"]),
            frozenset(skeleton(word) for word in words["abuse"]),
            frozenset(skeleton(word) for word in words["lures"]),
            frozenset(words["developer"]),
            {_flat(word): word for word in guarded},
            {_flat(word): word for word in words["known"]},
            {_flat(word): word for word in words["distinct"]},
        )

    def check(self, subdomain: str) -> str:
        """``subdomain`` if it may be public, else ``tunnel.name_invalid`` or ``tunnel.name_reserved``."""
        if (code := self._code(subdomain)) is None:
            return subdomain
        if code == "tunnel.name_invalid":
            raise Problem("tunnel.name_invalid", f"{subdomain[:80]!r} cannot be a subdomain")
        raise Problem("tunnel.name_reserved", f"the subdomain {subdomain} is reserved, or looks like one that is")

    def usable(self, name: str) -> bool:
        """Whether a tunnel's name can also be its subdomain."""
        return self._code(name) is None

    def _code(self, name: str) -> str | None:
        if len(name) > _MAX_CHARS:
            return "tunnel.name_invalid"
        if name not in self._answers:
            if len(self._answers) >= 10_000:
                self._answers.clear()
            self._answers[name] = self._judge(name)
        return self._answers[name]

    def _judge(self, name: str) -> str | None:
        if not _SUBDOMAIN.fullmatch(name):
            return "tunnel.name_invalid"
        if name in self.allowed:
            return None
        text = decoded(name)
        if text is None:
            return "tunnel.name_invalid"
        seen = drawn(text)
        if seen is None:  # nothing that could be read as a Latin word
            return None
        refused = poses_as_latin(text) or self._whole(seen) or self._parts(seen) or self._inside(seen)
        return "tunnel.name_reserved" if refused else None

    def _whole(self, name: str) -> bool:
        flat = _flat(name)
        stem = _flat(name.rstrip("0123456789-"))  # before digits become letters
        alone = flat in self._blocked or flat in self._guarded or flat in self._known
        return alone or (name[-1:].isdigit() and stem in self._numbered)

    def _parts(self, name: str) -> bool:
        """What stands between hyphens: abuse, a company in disguise, or a company beside the wrong words."""
        parts = [part for part in name.split("-") if part]
        looks = [skeleton(part) for part in parts]
        if not self._abuse.isdisjoint(looks):
            return True
        for part, look in zip(parts, looks, strict=True):
            word = self._guarded.get(look) or self._known.get(look)
            if word is None:
                continue
            lured = not self._lures.isdisjoint(looks)
            helped = look in self._known or not self._developer.isdisjoint(parts)
            if word != part or lured or not helped:
                return True
        return False

    def _inside(self, name: str) -> bool:
        """A company that is part of no other word, in the midst of one or across hyphens."""
        flat, parts = _flat(name), name.split("-")
        for look, word in self._distinct.items():
            if look in flat and not (word in parts and not self._developer.isdisjoint(parts)):
                return True
        return False


def _flat(name: str) -> str:
    """The skeleton without hyphens: they are overlooked."""
    return skeleton(name.replace("-", ""))


def _read(path: Path, what: str = "") -> dict[str, list[str]]:
    """The lists of a file, all of them. Raises ``config.invalid``."""
    try:
        with path.open("rb") as file:
            document: dict[str, Any] = tomllib.loads(file.read(_MAX_BYTES).decode())
    except (OSError, ValueError) as err:
        why = getattr(err, "strerror", None) or str(err)
        raise Problem("config.invalid", f"{what}{path}: {why}", key="reserved_names_file") from None
    for name, words in document.items():
        good = isinstance(words, list) and all(isinstance(word, str) and _WORD.fullmatch(word) for word in words)
        if name not in _LISTS or not good:
            detail = f"{what}{path}: {name} is none of the lists ({', '.join(_LISTS)}) of lower-case words"
            raise Problem("config.invalid", detail, key="reserved_names_file")
    return {name: list(document.get(name, [])) for name in _LISTS}
