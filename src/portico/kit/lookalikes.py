"""What a name looks like: two names with one skeleton cannot be told apart at a glance.

    skeleton("paypa1") == skeleton("paypal"),  skeleton("rnicrosoft") == skeleton("microsoft")

A skeleton is compared with skeletons alone, never shown. After the idea of Unicode's UTS #39 ("confusable detection"), with the
few characters that a DNS label can have, and their pairs: there ``rn`` is an ``m`` and ``vv`` a ``w``.
"""

from __future__ import annotations

import unicodedata
from typing import Final

_PREFIX: Final = "xn--"

# Letters and digits that stand for each other in the fonts of address bars.
_ASCII: Final = str.maketrans("0134567892i", "oleasbtbgzl")
_PAIRS: Final = (("rn", "m"), ("vv", "w"), ("cl", "d"))

# Latin letters that do not decompose to one of a-z.
_LATIN: Final = {
    "ß": "ss",
    "ø": "o",
    "ł": "l",
    "đ": "d",
    "ı": "i",
    "æ": "ae",
    "œ": "oe",
    "ħ": "h",
    "ŋ": "n",
    "þ": "p",
    "ð": "d",
}
# Letters of other scripts that are drawn as Latin ones: Cyrillic, Greek, Armenian.
_DRAWN: Final = dict(
    zip(
        "аеорсухіјѕԁһԛԝкмтвнгпӏьзч" + "αονρτυικηχγεωσβμ" + "ոսօհզցյ",
        "aeopcyxijsdhqwkmtbhrnlbe4" + "aovptuiknxyewobu" + "nuohqgj",
        strict=True,
    )
)

# Those of them that cannot be told from the Latin letter; the others are only like it.
_SAME: Final = frozenset("аеорсухіјѕԁһԛԝӏ" + "ονα" + "օոսհց")

# Scripts that names may be written in, and those that one name may mix.
_SCRIPTS: Final = frozenset(
    {
        *("ARABIC", "ARMENIAN", "BENGALI", "CJK", "CYRILLIC", "DEVANAGARI", "GEORGIAN", "GREEK", "GUJARATI", "HANGUL"),
        *("HEBREW", "HIRAGANA", "KATAKANA", "LATIN", "TAMIL", "TELUGU", "THAI"),
    }
)
_MIXES: Final = (frozenset({"CJK", "HIRAGANA", "KATAKANA"}), frozenset({"CJK", "HANGUL"}))


def decoded(label: str) -> str | None:
    """What a DNS label shows as: itself, or what ``xn--…`` stands for; ``None`` for one that no browser would show.

    Refused are codes that are not what their text is coded as (upper-case or decomposed letters, plain ASCII in disguise),
    characters that are no letters or digits, scripts that are not of the list, and mixtures of scripts.
    """
    if not label.startswith(_PREFIX):
        return None if label[2:4] == "--" and label[:2] != "xn" and not label[:2].isalnum() else label
    try:
        text = label.removeprefix(_PREFIX).encode("ascii").decode("punycode")
        again = text.encode("punycode").decode("ascii")
    except (UnicodeError, ValueError, OverflowError):
        return None
    whole = not text.isascii() and _PREFIX + again == label
    if not whole or text != unicodedata.normalize("NFKC", text).lower() or not _written(text):
        return None
    return text


def _written(text: str) -> bool:
    """Whether all of it is letters of scripts that go together, with digits and hyphens between."""
    scripts = set()
    for at, character in enumerate(text):
        if character == "-" or (character.isascii() and character.isalnum()):
            scripts |= {"LATIN"} if character.isalpha() else set()
            continue
        kind = unicodedata.category(character)
        if kind not in ("Ll", "Lo", "Lm", "Mn", "Mc") or (kind[0] == "M" and at == 0):
            return False
        if kind[0] == "L":
            script = unicodedata.name(character, "?").split()[0].partition("-")[0]
            if script == "LATIN" and drawn(character) is None:  # of phonetics, mostly: ɢ, ɑ, ʀ
                return False
            scripts.add(script)
    return scripts <= _SCRIPTS and (len(scripts) == 1 or any(scripts <= mix for mix in _MIXES))


def drawn(text: str) -> str | None:
    """The a-z, 0-9 and hyphens that ``text`` looks like; ``None`` when something in it looks like none of them."""
    if text.isascii():
        return text
    found = []
    for character in unicodedata.normalize("NFKD", text):
        if unicodedata.category(character) == "Mn":
            continue
        ascii_ = character if character.isascii() else _LATIN.get(character) or _DRAWN.get(character)
        if ascii_ is None:
            return None
        found.append(ascii_)
    return "".join(found)


def poses_as_latin(text: str) -> bool:
    """Whether it is all written in letters of another script that look exactly like Latin ones."""
    letters = [c for c in text if not c.isascii()]
    return bool(letters) and not any("a" <= c <= "z" for c in text) and _SAME.issuperset(letters)


def skeleton(text: str) -> str:
    """What plain letters, digits and hyphens look like; hyphens stay."""
    folded = text.translate(_ASCII)
    for pair, letter in _PAIRS:
        folded = folded.replace(pair.translate(_ASCII), letter)
    return folded
