"""The log stream: one format, and nobody waits for a reader."""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path

from portico.embedded import logs as module
from portico.embedded.logs import LogStream, translate
from tests.timing import PATIENCE_SECONDS

OURS = "2026-11-23T15:21:20.123Z WARN  relay-1 session ended code=x"


def test_lines_of_every_kind_are_understood() -> None:
    assert translate("relay-1", OURS) == ("15:21:20", "WARN", "relay-1", "session ended code=x")
    fatal = "2026-11-23 15:42:07.642 UTC [12709] FATAL:  data directory has wrong ownership"
    assert translate("postgres", fatal) == ("", "ERROR", "postgres", "data directory has wrong ownership")
    ready = "2026-11-23 15:42:07.642 UTC [12709] LOG:  database system is ready to accept connections"
    assert translate("postgres", ready) == ("", "DEBUG", "postgres", "database system is ready to accept connections")
    assert translate("valkey", "12744:M 23 Nov 2026 15:42:07.843 # Out of memory") == (
        "",
        "WARN",
        "valkey",
        "Out of memory",
    )
    traceback = "Traceback (most recent call last):"
    assert translate("api", traceback) == ("", "ERROR", "api", traceback)
    assert translate("api", "  File x, line 1", "ERROR") == ("", "ERROR", "api", "  File x, line 1")
    assert translate("api", "  \n") is None


async def test_children_write_into_one_stream(tmp_path: Path) -> None:
    out = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    stream = LogStream(out)
    pipe = stream.pipe("relay-1")
    os.write(pipe, OURS.encode() + b"\nplain words\nhalf a ")
    await asyncio.sleep(0.05)
    os.write(pipe, b"line\nno newline at the end")
    os.close(pipe)
    await asyncio.sleep(0.05)
    stream.say("done")
    stream.close()
    os.close(out)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == OURS
    assert [re.sub(r"^\S+Z ", "", line) for line in lines[1:]] == [
        "WARN  relay-1 plain words",
        "WARN  relay-1 half a line",
        "WARN  relay-1 no newline at the end",
        "INFO  supervisor done",
    ]
    assert stream.tail("relay-1")[-1] == "no newline at the end"


def test_levels_below_the_threshold_are_left_out_and_colours_are_for_terminals(tmp_path: Path) -> None:
    out = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    stream = LogStream(out, level="WARNING", color=True)
    stream.raw("relay-1", OURS.replace("WARN ", "INFO "))
    stream.raw("relay-1", OURS)
    stream.close()
    os.close(out)
    text = (tmp_path / "log").read_text()
    assert text.count("\n") == 1 and "\x1b[33msession ended" in text


def test_a_reader_that_stops_reading_stops_nobody() -> None:
    read_end, write_end = os.pipe()
    stream = LogStream(write_end)
    began = time.monotonic()
    for _ in range(module.WAITING_LINES_MAX + 2000):
        stream.say("x" * 100)
    assert time.monotonic() - began < PATIENCE_SECONDS
    assert stream._dropped > 0
    os.set_blocking(read_end, False)
    seen = b""
    deadline = time.monotonic() + 10
    while b"log lines dropped" not in seen and time.monotonic() < deadline:
        try:
            seen = seen[-200:] + os.read(read_end, 1 << 20)
        except BlockingIOError:
            time.sleep(0.01)
    assert b"log lines dropped: the output was not read" in seen
    os.close(read_end)
    stream.close()
    os.close(write_end)
