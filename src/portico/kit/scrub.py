"""What looks like a secret does not pass: the last guard in front of records that are kept for years.

Whoever writes a record leaves secrets out; this catches what was forgotten. It knows shapes, not meanings: tokens of this
platform, JSON Web Tokens, password digests, PEM private keys, webhook secrets, and credentials in URLs.
"""

from __future__ import annotations

import re
from typing import Any, Final

MASK: Final = "[masked]"

_SECRET: Final = re.compile(
    r"tnl_[a-z]{1,8}_[0-9A-Za-z]{20,}"  # a token of kit/ids.py, however cut off
    r"|eyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*)?"  # a JWS or JWE in compact form
    r"|\$(?:argon2(?:id|i|d)|scrypt|2[aby]|5|6|y|pbkdf2[a-z0-9-]*)\$[^\s\"']{8,}"  # a digest in crypt's format
    r"|-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----(?:.*?-----END [A-Z0-9 ]*PRIVATE KEY-----|.*\Z)"
    r"|wh(?:sec|sk)_[A-Za-z0-9+/=_-]{16,}"  # Standard Webhooks
    r"|(?<=://)[^\s/@:]{0,256}:[^\s/@]{1,256}(?=@)",
    re.DOTALL,
)


def text(value: str) -> str:
    """``value`` with every part that looks like a secret masked."""
    return _SECRET.sub(MASK, value)


def value(found: Any) -> Any:
    """A JSON value with every string in it, names of members too, run through :func:`text`."""
    if isinstance(found, str):
        return text(found)
    if isinstance(found, dict):
        return {text(str(name)): value(item) for name, item in found.items()}
    if isinstance(found, list | tuple | set | frozenset):
        return [value(item) for item in found]
    return found
