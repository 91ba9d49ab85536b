"""Logging: one line per record on stderr, the same shape in every process.

    2026-11-23T15:21:20.123Z INFO  relay-1 session ended code=session.revoked session=ses_…

Fields travel as ``extra={"f": {...}}``. Values that are ``Secret`` print masked; control characters are escaped, so a
name that a visitor chose cannot forge a line or drive a terminal.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, TextIO

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:/@+,[]()*%<>&?#~!")

_LEVELS = {"WARNING": "WARN", "CRITICAL": "FATAL"}  # five columns
_CHATTY = ("httpx", "httpcore", "asyncio", "alembic", "sqlalchemy", "uvicorn.access", "uvicorn.error", "picows")


def _escape(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _value(value: Any) -> str:
    text = _escape(str(value))
    if text and _PLAIN.issuperset(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class LineFormatter(logging.Formatter):
    """The line format above; a traceback follows on its own lines."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        level = _LEVELS.get(record.levelname, record.levelname)
        line = f"{stamp} {level:<5.5} {self._process} {_escape(record.getMessage())}"
        fields = getattr(record, "f", None)
        if fields:
            line += "".join(f" {key}={_value(value)}" for key, value in fields.items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(process: str, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send every log record of this process to ``stream`` (stderr) in the line format. Call once, at process entry."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Libraries that log each request or connection at INFO would drown ours.
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
