"""What a tunnel may be called, and names for those who do not care. What its public host may be: ``name_rules.py``."""

from __future__ import annotations

import re
import secrets
from typing import Final

from portico.errors import Problem

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_SUFFIX_ALPHABET: Final = "abcdefghjkmnpqrstuvwxyz23456789"  # nothing that is misread aloud or in print
_SUFFIX_CHARS: Final = 4
_MAX_CHARS: Final = 63  # one DNS label


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES: Final = tuple(
    _words("""
    amber ancient autumn bold brave breezy bright brisk calm clever cool cosmic crimson crisp daring deep eager early easy
    fancy fast fleet fresh gentle giant glad golden grand green happy hidden honest icy jolly keen kind lively lucky lunar
    mellow merry misty modern noble polite proud quick quiet rapid royal rustic silent silver sleek snowy solar steady sunny
    swift tidy tiny vivid warm wild wise witty young
""")
)
_NOUNS: Final = tuple(
    _words("""
    acorn alder anchor arrow badger bay beacon birch bird bloom breeze bridge brook canyon cedar cliff cloud comet coral creek
    crow dawn delta dune eagle ember falcon fern field finch fjord forest fox garden glacier grove harbor hawk hazel heron
    hill island ivy lake lark leaf lynx maple marsh meadow mesa moon moss oak ocean orchid otter owl peak pine planet pond
    quail rain raven reef ridge river robin sky snow spruce star stone storm sun thicket tide trail valley wave willow wind
    wolf wren
""")
)


def check_name(name: str) -> str:
    """``name`` if a tunnel may have it, else ``tunnel.name_invalid``."""
    if not _NAME.fullmatch(name):
        raise Problem(
            "tunnel.name_invalid",
            f"{name[:80]!r} is not a tunnel name",
            hint="Use 1 to 63 lower-case letters, digits and inner hyphens.",
        )
    return name


def _suffix() -> str:
    return "".join(secrets.choice(_SUFFIX_ALPHABET) for _ in range(_SUFFIX_CHARS))


def random_name() -> str:
    """Two words and four characters: about 4 × 10⁹ names."""
    return f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}-{_suffix()}"


def with_suffix(name: str) -> str:
    """A subdomain near ``name`` for when ``name`` itself is not free."""
    stem = name.removeprefix("xn--")[: _MAX_CHARS - _SUFFIX_CHARS - 1].rstrip("-")
    return f"{stem}-{_suffix()}" if stem else random_name()
