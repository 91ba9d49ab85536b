"""A recorded request as a command line for a POSIX shell that makes curl send it again, byte for byte."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote, urlsplit

#: What curl or the connection sets by itself.
_OWN = frozenset(("content-length", "connection", "transfer-encoding", "te", "keep-alive", "upgrade", "expect"))
#: What a relay sets on its way to the target; a public URL will get them again.
_RELAY = frozenset(
    ("x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port", "forwarded", "x-request-id")
)
#: What curl would add if the request does not say otherwise.
_DEFAULTS = ("User-Agent", "Accept")
_PLAIN = re.compile(rb"[A-Za-z0-9_@%+=:,./-]+")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def quoted(data: bytes) -> str:
    """``data`` as one word of a POSIX shell. What is no text is written by printf: NUL and a last newline would be lost."""
    if _PLAIN.fullmatch(data):
        return data.decode("ascii")
    if _is_text(data):
        return "'" + data.decode("utf-8").replace("'", "'\\''") + "'"
    return f'"$(printf {_printf(data)})"'


def _is_text(data: bytes) -> bool:
    try:
        return _CONTROL.search(data.decode("utf-8")) is None
    except UnicodeDecodeError:
        return False


def _printf(data: bytes) -> str:
    """A format for printf(1) that prints ``data``."""
    kept = b"".join(
        bytes((c,)) if 0x20 <= c < 0x7F and c not in b"%\\'" else b"%%" if c == 0x25 else b"\\%03o" % c for c in data
    )
    return f"'{kept.decode('ascii')}'"


def command(head: Sequence[bytes], body: bytes, target: str, *, public: bool = False) -> str:
    """The command. ``head`` is ``[method, path, name, value, …]``; ``target`` a URL without path, or ``unix:/path``.

    ``public``: the target is the tunnel's public URL, so its own Host is right and what the relay adds is left out.
    """
    method, path = head[0], head[1]
    fields = list(zip(head[2::2], head[3::2], strict=True))
    names = {name.decode("latin-1").lower() for name, _ in fields}
    words = ["curl", *_method(method, body), *_address(path, target)]
    for name, value in fields:
        lower = name.decode("latin-1").lower()
        if lower in _OWN or (public and (lower in _RELAY or lower == "host")):
            continue
        words += ["-H", quoted(name + b": " + value if value else name + b";")]
    words += [word for name in _DEFAULTS if name.lower() not in names for word in ("-H", quoted(f"{name}:".encode()))]
    if "accept-encoding" in names:
        words.append("--compressed")
    if not body:
        return _lines(words)
    if "content-type" not in names:
        words += ["-H", quoted(b"Content-Type:")]
    if _is_text(body):
        return _lines([*words, "--data-raw", quoted(body)])
    return f"printf {_printf(body)} |\n" + _lines([*words, "--data-binary", "@-"])


def _method(method: bytes, body: bytes) -> list[str]:
    if method == b"HEAD" and not body:
        return ["--head"]
    usual = b"POST" if body else b"GET"
    return [] if method == usual else ["-X", quoted(method)]


def _address(path: bytes, target: str) -> list[str]:
    """The URL, and what keeps curl from reading anything into it."""
    words = ["--globoff", "--path-as-is"]
    if target.startswith("unix:"):
        words += ["--unix-socket", quoted(target[len("unix:") :].encode())]
        target = "http://localhost"
    elif target.startswith("https:") and urlsplit(target).hostname in ("localhost", "127.0.0.1", "::1"):
        words.append("--insecure")  # as the agent: development servers sign their own certificates
    if b"#" in path or not path.startswith(b"/"):
        words += ["--request-target", quoted(path)]
        path = b"/"
    return [*words, quoted(target.rstrip("/").encode() + quote(path, safe="".join(map(chr, range(33, 127)))).encode())]


def _lines(words: list[str]) -> str:
    """One option a line."""
    text = words[0]
    for word in words[1:]:
        text += (" \\\n  " if word.startswith("-") else " ") + word
    return text + "\n"
