"""Log lines have one shape, and nobody outside can forge one."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest

from portico.kit import telemetry
from portico.settings import Secret


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out = io.StringIO()
    telemetry.configure("relay-1", "INFO", out)
    yield out
    root.handlers[:] = handlers
    root.setLevel(level)


def test_line_format(stream: io.StringIO) -> None:
    logging.getLogger("x").info("session ended", extra={"f": {"code": "session.revoked", "why": "two words", "n": 3}})
    line = stream.getvalue()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO  relay-1 session ended code=session\.revoked why=\"two words\" n=3\n",
        line,
    )


def test_control_characters_and_secrets_are_not_printed(stream: io.StringIO) -> None:
    logging.getLogger("x").warning(
        "name %s", "a\nb\x1b[31m", extra={"f": {"key": Secret("hunter2"), "host": 'x\r\n" y'}}
    )
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert "hunter2" not in text
    assert r'host="x\\r\\n\" y"' in text


def test_level_and_traceback(stream: io.StringIO) -> None:
    logging.getLogger("x").debug("quiet")
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("x").exception("failed")
    assert "quiet" not in stream.getvalue()
    assert "ValueError: boom" in stream.getvalue()
