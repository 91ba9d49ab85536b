"""Private keys that somebody sends by mistake, in any clothes that mistakes come in.

Nothing that tells of certificates needs a private key. One that is here all the same must be refused before anything is stored,
and whoever sent it has to treat it as known to others.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any, Final

# The text of a PEM label once everything but capitals is gone: spaces, line ends and dashes hide nothing. (Messages about private
# keys, in the letters of a sentence, are none.)
_LABEL: Final = "PRIVATEKEY"
_NOT_A_LETTER: Final = re.compile(r"[^A-Z]+")
_AGE: Final = re.compile(r"AGE-SECRET-KEY-1[0-9A-Z]{20,}", re.IGNORECASE)
_PRIVATE_TEXT: Final = re.compile(r"whsk_[A-Za-z0-9+/=_-]{16,}")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]{60,}={0,2}")
# How DER begins, behind the length of the outer sequence: PKCS#8 and PKCS#1 (version 0, then a sequence or an integer), SEC 1.
_DER: Final = re.compile(
    rb"\x30(?:[\x00-\x7f]|\x81.|\x82..|\x83...)(?:\x02\x01[\x00\x01](?:\x30|\x02)|\x02\x01\x01\x04)", re.DOTALL
)
# Between texts that are looked at together: neither a label nor base64 goes on across it.
_APART: Final = "\n|Q|\n"
_JWK_TYPES: Final = ("RSA", "EC", "OKP", "oct")


def in_text(text: str) -> bool:
    """Whether a text holds something like a private key."""
    # What patterns begin with is looked for first: most texts have nothing of it, and a plain look costs a tenth.
    if "age-secret-key-1" in text.lower() and _AGE.search(text):
        return True
    if _is_labelled(text) or ("whsk_" in text and _PRIVATE_TEXT.search(text)):
        return True
    joined = "".join(text.split())
    return any(_is_key(match.group()) for match in _BASE64.finditer(joined))


def in_document(document: Any) -> bool:
    """Whether a JSON value does anywhere: in a string, in a name of a member, or as a JSON Web Key with its private part."""
    stack, texts = [document], []
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            if "kty" in value and value["kty"] in _JWK_TYPES and ("d" in value or "k" in value):
                return True
            texts.extend(value)
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
    return in_text(_APART.join(texts))


def _is_key(text: str) -> bool:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_" if set(text) & set("-_") else None)
    except (binascii.Error, ValueError):
        return False
    return _DER.match(raw) is not None or _is_labelled(raw.decode("latin-1"))


def _is_labelled(text: str) -> bool:
    """Whether a label of PEM is in it, however it is broken up. Without its rarest letters none is."""
    return all(letter in text for letter in "VKYP") and _LABEL in _NOT_A_LETTER.sub("", text)
