"""One log stream for all processes: every line says which process it is from, in one format.

Children write into pipes; lines that already have our format pass as they are, PostgreSQL's and Valkey's are translated,
anything else gets a time and the name of its process. A thread does the writing, so that a terminal that is paused, or a
pager that nobody scrolls, never stops the supervisor or, by full pipes, the platform: past a limit lines are dropped and
counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

WAITING_LINES_MAX = 10_000
LINE_MAX_BYTES = 64 * 1024
FLUSH_SECONDS = 1.0
TAIL_LINES = 20

_LEVELS = {"DEBUG": 10, "INFO": 20, "WARN": 30, "ERROR": 40, "FATAL": 50}
_OPTION_LEVELS = {"WARNING": "WARN", "CRITICAL": "FATAL"}
_OURS = re.compile(r"^\d{4}-\d\d-\d\dT(\d\d:\d\d:\d\d)\.\d{3}Z ([A-Z]+) +(\S+) (.*)$")
_POSTGRES = re.compile(r"^\d{4}-\S+ \S+ \S+ \[\d+\] ([A-Z]+\d?): +(.*)$")
_VALKEY = re.compile(r"^\d+:(?:[A-Z] \d+ \w+ \d+ \S+ ([.*#-])|signal-handler \(\d+\)) (.*)$")
_POSTGRES_LEVELS = {"LOG": "INFO", "WARNING": "WARN", "ERROR": "ERROR", "FATAL": "ERROR", "PANIC": "ERROR"}
#: What PostgreSQL and Valkey say at every ordinary start and stop, and PostgreSQL to each client that comes during one
#: (the client says so too); shown with log level DEBUG.
_ROUTINE = (
    "starting PostgreSQL",
    "listening on Unix socket",
    "database system was shut down",
    "database system is ready",
    "database system is shut down",
    "received fast shutdown request",
    "aborting any active transactions",
    'background worker "logical replication launcher"',
    "shutting down",
    "the database system is starting up",
    "the database system is shutting down",
    "the database system is not yet accepting connections",
    "Consistent recovery state has not been yet reached",
    "terminating connection due to",
    "Received SIGTERM scheduling shutdown",
    "WARNING Memory overcommit must be enabled",  # matters to saving in the background alone, which is off
    "User requested shutdown",
    "Valkey is now ready to exit",
)
_COLORS = {
    "supervisor": "1",
    "postgres": "34",
    "valkey": "31",
    "api": "35",
    "worker": "33",
    "demo-app": "36",
    "agent": "32",
}


def translate(name: str, line: str, before: str = "INFO") -> tuple[str, str, str, str] | None:
    """``(time or "", level, process, text)`` of a raw line; ``None`` for an empty one.

    A line in no known format goes on with what came before it, at that level (``before``): a traceback after its error.
    """
    if match := _OURS.match(line):
        return match[1], match[2], match[3], match[4]
    text = line.rstrip()
    if not text:
        return None
    level = "ERROR" if text.startswith("Traceback (most recent call last)") else before
    if match := _POSTGRES.match(text):
        level, text = _POSTGRES_LEVELS.get(match[1], "INFO"), match[2]
    elif match := _VALKEY.match(text):
        level, text = "WARN" if match[1] == "#" else "DEBUG", match[2]
    if text.startswith(_ROUTINE):
        level = "DEBUG"
    return "", level, name, text


class LogStream:
    """The one stream, on descriptor ``fd`` (standard error). ``color`` is for a terminal: short times and colours."""

    def __init__(self, fd: int = 2, *, level: str = "INFO", color: bool = False) -> None:
        self._fd, self._color = fd, color
        self._threshold = _LEVELS.get(_OPTION_LEVELS.get(level.upper(), level.upper()), 20)
        self._waiting: queue.Queue[bytes | None] = queue.Queue(WAITING_LINES_MAX)
        self._dropped = 0
        self._tails: dict[str, deque[str]] = {}
        self._last_level: dict[str, str] = {}
        self._readers: set[int] = set()
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    # -- in ----------------------------------------------------------------------------------------------------------

    def pipe(self, name: str, on_line: Callable[[str], None] | None = None) -> int:
        """A descriptor for a child's output, to be closed by the caller once the child has it (event loop required).

        With ``on_line`` its lines go there instead of into the log.
        """
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        self._readers.add(read_end)
        asyncio.get_running_loop().add_reader(
            read_end, self._read, read_end, on_line or partial(self.raw, name), bytearray()
        )
        return write_end

    def _read(self, fd: int, on_line: Callable[[str], None], rest: bytearray) -> None:
        try:
            chunk = os.read(fd, LINE_MAX_BYTES)
        except BlockingIOError:
            return
        rest += chunk
        if not chunk or len(rest) > LINE_MAX_BYTES:
            rest += b"\n"
        *lines, last = rest.split(b"\n")
        for line in lines:
            on_line(line.decode("utf-8", "replace"))
        rest[:] = last
        if not chunk:
            self._forget(fd)

    def _forget(self, fd: int) -> None:
        if fd in self._readers:
            self._readers.discard(fd)
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    def raw(self, name: str, line: str) -> None:
        """One line as a child wrote it."""
        if (parts := translate(name, line, self._last_level.get(name, "INFO"))) is not None:
            self._last_level[name] = parts[1]
            self._tails.setdefault(name, deque(maxlen=TAIL_LINES)).append(parts[3])
            self._emit(line if parts[0] else "", *parts)

    def say(self, text: str, level: str = "INFO", name: str = "supervisor") -> None:
        """One line of our own."""
        self._emit("", "", level, name, text)

    def tail(self, name: str) -> list[str]:
        """The last lines of one process, for an error message."""
        return list(self._tails.get(name, ()))

    # -- out ---------------------------------------------------------------------------------------------------------

    def _emit(self, whole: str, clock: str, level: str, name: str, text: str) -> None:
        if _LEVELS.get(level, 20) < self._threshold:
            return
        if self._color:
            line = _colored(clock or time.strftime("%H:%M:%S", time.gmtime()), level, name, text)
        elif whole:
            line = whole
        else:
            now = time.time()
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
            line = f"{stamp} {level:<5.5} {name} {text}"
        self.write(line)

    def write(self, text: str) -> None:
        """Text of our own, as it is, in order with the log lines."""
        try:
            self._waiting.put_nowait((text + "\n").encode("utf-8", "replace"))
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        while (data := self._waiting.get()) is not None:
            if self._dropped and self._waiting.qsize() < WAITING_LINES_MAX // 2:
                count, self._dropped = self._dropped, 0
                data += f"({count} log lines dropped: the output was not read)\n".encode()
            view = memoryview(data)
            with contextlib.suppress(OSError):  # the terminal is gone: the platform goes on
                while view:
                    view = view[os.write(self._fd, view) :]
            self._waiting.task_done()

    def flush(self) -> None:
        """Wait, a second at most, until what was written before is out: what follows elsewhere comes after it."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def close(self) -> None:
        """Write what waits, within a second."""
        for fd in list(self._readers):
            self._forget(fd)
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=FLUSH_SECONDS)
            self._thread.join(FLUSH_SECONDS)


def _colored(clock: str, level: str, name: str, text: str) -> str:
    color = _COLORS.get(name.split("-")[0], _COLORS.get(name, "36"))
    tone = {"WARN": "33", "ERROR": "31", "FATAL": "31"}.get(level, "0")
    return f"\x1b[2m{clock}\x1b[0m \x1b[{color}m{name:<10}\x1b[0m \x1b[{tone}m{text}\x1b[0m"
