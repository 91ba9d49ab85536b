"""The access log's writer: whole lines, in a file that rotates, on a disk that fills, behind a reader that sleeps."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from portico.errors import Problem
from portico.relay import access_log
from portico.relay.access_log import AccessLog, path_of, text
from portico.settings import RelaySettings, Secret


def opened(where: Path | str, **more: Any) -> AccessLog:
    return AccessLog(RelaySettings(relay_key=Secret("x"), access_log=str(where), **more))


def lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


async def until(what: Any) -> None:
    async with asyncio.timeout(30):
        while not what():
            await asyncio.sleep(0.01)


async def test_lines_come_in_batches_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = opened(path)
    before = time.time()
    for number in range(1000):
        log.put(f'"number":{number},')
    assert path.read_text() == "", "the loop writes nothing itself"
    await until(lambda: log.writer.written == 1000)
    found = lines(path)
    assert [line["number"] for line in found] == list(range(1000))
    assert found[0]["relay"] == "relay-1"
    from datetime import datetime

    at = datetime.fromisoformat(found[0]["time"])
    assert before - 0.01 <= at.timestamp() <= time.time() and found[0]["time"].endswith("Z")
    assert path.stat().st_mode & 0o777 == 0o640
    log.put('"number":1000,')
    log.close()
    assert lines(path)[-1]["number"] == 1000, "the end writes what waits"


def test_what_a_visitor_sends_cannot_forge_a_line() -> None:
    for hostile in (
        b'/","status":200,"x":"',
        b'/a\\"b\\',
        b'/\r\n{"time":"2026","status":200}',
        b"/\x00\x1b[2J\x7f",
        "/\u2028\u2029\u0085\u202e".encode(),
        b"/\xff\xfe\xed\xa0\x80",
        b"/<script>",
    ):
        line = f'{{"path":{path_of(hostile, query=True)},"status":404}}'
        assert line.isascii() and line.isprintable()
        assert len(line.splitlines()) == 1
        assert json.loads(line)["status"] == 404
        assert list(json.loads(line)) == ["path", "status"]
    assert json.loads(path_of(b"/a?token=secret", query=False)) == "/a"
    assert json.loads(path_of(b"/a?token=secret", query=True)) == "/a?token=secret"
    assert len(json.loads(text(b"a" * 100_000))) == access_log.MAX_TEXT


@pytest.mark.parametrize("by_signal", [False, True])
async def test_a_file_that_was_moved_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_signal: bool
) -> None:
    monkeypatch.setattr(access_log, "LOOK_SECONDS", 60.0 if by_signal else 0.0)
    path = tmp_path / "access.log"
    log = opened(path)
    log.put('"n":1,')
    log.flush()
    await until(lambda: log.writer.written == 1)
    path.rename(tmp_path / "access.log.1")
    if by_signal:
        log.put('"n":2,')  # made before the signal: it belongs to the old file
        log.reopen()
        await until(path.exists)
    log.put('"n":3,')
    log.close()
    assert [line["n"] for line in lines(tmp_path / "access.log.1")] == [1, 2][: 1 + by_signal]
    assert [line["n"] for line in lines(path)] == [3]


async def test_a_full_disk_costs_lines_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "access.log"
    log = opened(path)
    log.put('"n":1,')
    log.flush()
    await until(lambda: log.writer.written == 1)
    write, room = os.write, [30]

    def full(fd: int, data: Any) -> int:
        """Room for 30 more bytes, so that a line is torn, and then for none."""
        if fd != log.writer._fd:
            return write(fd, data)
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size = write(fd, bytes(data[: room[0]]))
        room[0] -= size
        return size

    monkeypatch.setattr(access_log.os, "write", full)
    for number in (2, 3):
        log.put(f'"n":{number},')
        log.flush()
    await until(lambda: log.writer.dropped == 2)
    assert log.writer.queued() == 0, "nothing waits for a disk that is full"
    room[0] = 1 << 30
    log.put('"n":4,')
    log.flush()
    await until(lambda: log.writer.written == 2)
    log.put('"n":5,')
    log.close()
    first, torn, *rest = path.read_text().splitlines()
    assert json.loads(first)["n"] == 1 and len(torn) == 30
    assert [json.loads(line).get("n") for line in rest] == [4, 5, None]
    assert json.loads(rest[-1])["event"] == "dropped" and json.loads(rest[-1])["lines"] == 2
    said = [record.getMessage() for record in caplog.records]
    assert said.count("the access log cannot be written; its lines are dropped") == 1
    assert "the access log is written again" in said


async def test_a_reader_that_sleeps_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody reads: the thread stands still, the queue fills to its limit, the loop goes on."""
    reader, writer = os.pipe()
    log = opened(tmp_path / "access.log", access_log_queue_bytes=300_000)
    os.dup2(writer, log.writer._fd)
    monkeypatch.setattr(access_log, "LOOK_SECONDS", 60.0)
    log.writer._looked = time.monotonic() + 60
    line = f'"pad":"{"x" * 1000}",'
    for _ in range(1000):
        log.put(line)
        if log._size > 50_000:
            log.flush()
    assert 200 < log.lines < 400 and log.overflowed == 1000 - log.lines
    assert log.writer.queued() <= 300_000
    seen = b""
    os.set_blocking(reader, False)

    def awake() -> bool:
        """Read what is there, and whether the queue is empty; what the pipe still holds would stop the next write."""
        nonlocal seen
        with contextlib.suppress(BlockingIOError):
            seen += os.read(reader, 1 << 20)
        return not log.writer.queued()

    await until(awake)
    log.put('"last":true,')
    monkeypatch.setattr(access_log, "CLOSE_SECONDS", 5.0)
    log.flush()
    await until(awake)
    log.close()
    awake()
    told = [json.loads(row) for row in seen.splitlines()]
    missing = sum(row.get("lines", 0) for row in told)
    assert missing == log.overflowed == log.dropped()
    assert told[-2]["last"] is True and told[-1]["event"] == "dropped"
    os.close(reader)
    os.close(writer)


async def test_samples_and_the_cap_on_errors(tmp_path: Path) -> None:
    log = opened(tmp_path / "a", access_log_sample=0.25, access_log_errors_per_second=10)
    assert 150 < sum(log.wants(failed=False) for _ in range(1000)) < 350
    log._second = 0
    wanted = sum(log.wants(failed=True) for _ in range(500))
    assert wanted % 10 == 0 and wanted < 500, "ten for each second that passed meanwhile"
    assert log.suppressed == 500 - wanted
    log.flush()
    await until(lambda: log.writer.written == 1)
    assert lines(tmp_path / "a")[0]["lines"] == log.suppressed
    log.close()
    none = opened(tmp_path / "b", access_log_sample=0, access_log_errors_per_second=0)
    assert not any(none.wants(failed=False) for _ in range(100))
    assert all(none.wants(failed=True) for _ in range(5000))
    none.close()


async def test_what_cannot_work_is_refused_at_the_start(tmp_path: Path) -> None:
    for where, more in ((tmp_path / "no" / "such", {}), (tmp_path, {}), ("stdout", {"access_log_sample": 1.5})):
        with pytest.raises(Problem) as refused:
            opened(where, **more)
        assert refused.value.code == "config.invalid"
