"""The access log: one JSON object a line for each request and connection that ended. Off unless ``access_log`` says where to.

    the loop: a line is made and queued ─► 5 times a second a batch ─► a thread: write(2), rotation, a full disk ─► file or stdout

Traffic never waits for it. The queue is bounded (``access_log_queue_bytes``): what does not fit, or cannot be written, is
dropped, counted, and told of in the log itself (``"event": "dropped"``) once writing works again. Lines of answers that went well
may be sampled (``access_log_sample``); refusals and failures are always written, up to ``access_log_errors_per_second`` of them.

A file that was moved away is opened anew (looked at once a second, and at SIGHUP), so logrotate needs no ``copytruncate``. No
line has a header, a body or a password; the query, which may hold secrets, only with ``access_log_query``. Values of visitors are
JSON strings in ASCII: they cannot end a line or begin another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import random
import threading
import time
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import TYPE_CHECKING, Final

from portico.errors import Problem
from portico.settings import RelaySettings

if TYPE_CHECKING:
    from portico.relay.agent_connection import LiveTunnel
    from portico.relay.exchange import Exchange
    from portico.relay.heads import KnownAnswer
    from portico.relay.peers import RemoteTunnel
    from portico.relay.raw import RawVisitor
    from portico.relay.repeats import Asked, Repeats

log = logging.getLogger("portico.relay.access_log")

OFF, STDOUT = "off", "stdout"
#: Seconds between two batches, between two looks at whether the file was moved, and between two tries of a full disk.
BATCH_SECONDS: Final = 0.2
LOOK_SECONDS: Final = 1.0
#: Seconds that the end of a process waits for the last batch.
CLOSE_SECONDS: Final = 2.0
#: Characters of a visitor's value in a line.
MAX_TEXT: Final = 2048
MODE: Final = 0o640
_SAID_EVERY: Final = 60.0
_NEWLINE: Final = 10
#: What is logged as the status of a request whose visitor left before an answer (as nginx has it).
VISITOR_LEFT: Final = 499
quote = encode_basestring_ascii


def _invalid(key: str, what: str) -> Problem:
    return Problem("config.invalid", f"setting {key}: {what}", key=key)


def text(value: bytes) -> str:
    """A visitor's bytes as a JSON string: UTF-8 where it is that, else ``\\xNN``; nothing in it can end a line."""
    return quote(value[:MAX_TEXT].decode("utf-8", "backslashreplace"))


def path_of(target: bytes, query: bool) -> str:
    """A request's target as a JSON string, with its query or without."""
    return text(target if query else target.partition(b"?")[0])


# Our own words need no quoting: ids, codes, methods (tokens), numbers. Hosts, paths and addresses are a visitor's.
def _who(tunnel: LiveTunnel | RemoteTunnel | None, host: bytes) -> str:
    name = text(host) if host else "null"
    if tunnel is None:
        return f'"tunnel":null,"organization":null,"host":{name},'
    return f'"tunnel":{quote(tunnel.tunnel)},"organization":{quote(tunnel.organization)},"host":{name},'


def _client(visitor: Repeats, address: str) -> str:
    tls = "null" if visitor.tls is None else quote(visitor.tls)
    return f'"client":{quote(address)},"tls":{tls},'


def _code(code: str | None) -> str:
    return "null" if code is None else quote(code)


class AccessLog:
    """See the module. All methods are for the loop; :class:`_Writer` is the thread's."""

    def __init__(self, settings: RelaySettings) -> None:
        """Raises ``config.invalid`` when the file cannot be opened or the sample is no share."""
        if not 0 <= settings.access_log_sample <= 1:
            raise _invalid("access_log_sample", f"{settings.access_log_sample} is not between 0 and 1")
        self._loop = asyncio.get_running_loop()
        self._sample = settings.access_log_sample
        self._errors_limit = settings.access_log_errors_per_second
        self._limit = settings.access_log_queue_bytes
        self.query = settings.access_log_query
        self._relay = f'"relay":{quote(settings.relay_name)}}}\n'
        self._lines: list[str] = []
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._second, self._stamp = 0, ""
        self._errors_in_second = 0
        #: Lines made; left out by the cap on errors; that did not fit into the queue. What the writer dropped it counts itself.
        self.lines = self.suppressed = self.overflowed = 0
        try:
            self.writer = _Writer(settings.access_log)
        except OSError as err:
            raise _invalid("access_log", f"{settings.access_log}: {err.strerror}") from None
        self._told = 0

    # ── what is logged ────────────────────────────────────────────────────────────────────────────────────────────
    def wants(self, failed: bool) -> bool:
        """Whether the line of a request is to be made: always when it ``failed``, within the cap; else a sample of them."""
        if not failed:
            return self._sample >= 1 or random.random() < self._sample  # noqa: S311 - a sample
        if self._errors_limit:
            self._tick()
            self._errors_in_second += 1
            if self._errors_in_second > self._errors_limit:
                self.suppressed += 1
                self._arm()
                return False
        return True

    def put(self, fields: str) -> None:
        """Queue a line of ``fields``, JSON members each followed by a comma; time and relay are added."""
        now = self._tick()
        line = f'{{"time":"{self._stamp}.{int(now % 1 * 1000):03d}Z",{fields}{self._relay}'
        if self._size + len(line) + self.writer.queued() > self._limit:
            self.overflowed += 1
            return
        self.lines += 1
        self._lines.append(line)
        self._size += len(line)
        self._arm()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(BATCH_SECONDS, self.flush)

    def _tick(self) -> float:
        now = time.time()
        if int(now) != self._second:
            self._second, self._errors_in_second = int(now), 0
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self._second))
        return now

    # ── lines ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def whole(
        self,
        visitor: Repeats,
        tunnel: LiveTunnel | RemoteTunnel,
        asked: Asked,
        known: KnownAnswer,
        sent: int,
        took: float,
    ) -> None:
        """A request that took the short way, which had a whole answer."""
        if not self.wants(failed=known.kind >= 4):
            return
        _, plain, head, ident, _, _ = asked
        noted = visitor.noted
        if noted[0] is not tunnel or noted[1] is not head:
            visitor.noted = noted = (tunnel, head, _who(tunnel, head.host), _client(visitor, visitor.address))
        method, _, target = plain.partition(b"\0")
        if not self.query:
            target = target.partition(b"?")[0]
        millis = f"{took * 1000:.3f}"
        self.put(
            f'"request":"{ident.decode()}",{noted[2]}"method":"{method.decode()}","path":{text(target)},'
            f'"protocol":"{visitor.door.scheme.decode()}","status":{known.text[9:12].decode()},"code":null,{noted[3]}'
            f'"bytes_in":0,"bytes_out":{sent},"duration_ms":{millis},"head_ms":{millis},"end":"answered",'
        )

    def exchange(self, exchange: Exchange, end: str, took: float) -> None:
        """Any other request; ``end`` as in :mod:`portico.relay.exchange`."""
        status = exchange.status or VISITOR_LEFT
        if not self.wants(failed=status >= 400 or end == "broken_off"):
            return
        conn = exchange.conn
        head = f"{(exchange.head_at - exchange.began) * 1000:.3f}" if exchange.head_at else "null"
        self.put(
            f'"request":"{exchange.id.decode()}",{_who(exchange.tunnel, exchange.host)}'
            f'"method":"{exchange.method.decode()}","path":{path_of(exchange.target, self.query)},'
            f'"protocol":"{"websocket" if status == 101 else conn.door.scheme.decode()}","status":{status},'
            f'"code":{_code(exchange.code)},{_client(conn, exchange.address)}'
            f'"bytes_in":{exchange.got},"bytes_out":{exchange.sent},'
            f'"duration_ms":{took * 1000:.3f},"head_ms":{head},"end":"{end}",'
        )

    def unread(self, visitor: Repeats, ident: bytes, code: str, status: int) -> None:
        """A refusal before there was a request, or of one that could not be read."""
        if self.wants(failed=True):
            self.put(
                f'"request":"{ident.decode()}",{_who(None, b"")}"method":null,"path":null,'
                f'"protocol":"{visitor.door.scheme.decode()}","status":{status},"code":{_code(code)},'
                f"{_client(visitor, visitor.address)}"
                f'"bytes_in":0,"bytes_out":0,"duration_ms":null,"head_ms":null,"end":"refused",'
            )

    def connection(self, visitor: RawVisitor, end: str, took: float) -> None:
        """A connection of a TCP tunnel, or one that was passed through."""
        if not self.wants(failed=visitor.code is not None):
            return
        self.put(
            f'"request":"{visitor.id.decode()}",{_who(visitor.tunnel, visitor.door.sni or b"")}"port":{visitor.door.port},'
            f'"protocol":"{visitor.door.scheme.decode()}","code":{_code(visitor.code)},"client":{quote(visitor.address)},'
            f'"bytes_in":{visitor.got},"bytes_out":{visitor.sent},"duration_ms":{took * 1000:.3f},"end":"{end}",'
        )

    # ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────
    def flush(self) -> None:
        """Hand what is queued to the thread."""
        self._tell_of_drops()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines, self._size = self._lines, [], 0
        if lines:
            self.writer.put("".join(lines).encode("ascii"), len(lines))

    def dropped(self) -> int:
        """Lines that were made or wanted and are not in the log."""
        return self.suppressed + self.overflowed + self.writer.dropped

    def _tell_of_drops(self) -> None:
        """A line about lines that are missing, once there is room for it."""
        missing = self.dropped() - self._told
        if missing > 0 and not self.writer.failing and self.writer.queued() < self._limit // 2:
            self._told += missing
            self.put(f'"event":"dropped","lines":{missing},')

    def reopen(self) -> None:
        """The file was moved, or should be looked for again (SIGHUP)."""
        self.flush()
        self.writer.reopen()

    def close(self) -> None:
        """Write what is left, for a moment; a disk that hangs does not hold the process up."""
        self.flush()
        self.writer.close()


class _Writer:
    """The thread and its file. ``put`` and ``queued`` are called by the loop, the rest runs in the thread."""

    def __init__(self, where: str) -> None:
        self._path = None if where == STDOUT else Path(where)
        self._fd = -1
        self._batches: queue.SimpleQueue[tuple[bytes, int] | None] = queue.SimpleQueue()
        # Each is written by one side alone, so that no lock is needed: bytes handed over, and bytes done with.
        self._given = self._done = 0
        self.dropped = 0
        self.written = 0
        self.failing = False
        self._torn = False
        self._looked = -LOOK_SECONDS
        self._look_now = False
        self._said = -_SAID_EVERY
        self._open()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    # ── for the loop ──────────────────────────────────────────────────────────────────────────────────────────────
    def put(self, batch: bytes, lines: int) -> None:
        self._given += len(batch)
        self._batches.put((batch, lines))

    def queued(self) -> int:
        """Bytes that the thread has not written yet."""
        return self._given - self._done

    def reopen(self) -> None:
        """Look whether the file was moved, after what was handed over before."""
        self._batches.put((b"", 0))

    def close(self) -> None:
        self._batches.put(None)
        self._thread.join(CLOSE_SECONDS)

    # ── the thread ────────────────────────────────────────────────────────────────────────────────────────────────
    def _run(self) -> None:
        while (item := self._batches.get()) is not None:
            batch, lines = item
            before = self.written
            self._look_now = self._look_now or not batch
            try:
                self._open()
                self._write(batch)
                if self.failing and lines:
                    self.failing = False
                    log.info("the access log is written again", extra={"f": {"dropped": self.dropped}})
            except OSError as err:
                self._failed(err, lines - (self.written - before))
            self._done += len(batch)
        if self._fd >= 0 and self._path is not None:
            os.close(self._fd)

    def _open(self) -> None:
        """The file as its name says it, also after somebody moved it."""
        if self._path is None:
            self._fd = 1
            return
        now = time.monotonic()
        if self._fd >= 0 and not self._look_now and now - self._looked < LOOK_SECONDS:
            return
        self._looked, self._look_now = now, False
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                there, ours = self._path.stat(), os.fstat(self._fd)
                if (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev):
                    return
            os.close(self._fd)
            self._fd, self._torn = -1, False
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        fd = os.open(self._path, flags, MODE)
        os.set_blocking(fd, True)  # opened without, so that a pipe nobody reads is an error and not a stand-still
        self._fd = fd

    def _write(self, batch: bytes) -> None:
        """All of it. A line that a full disk cut in two is ended before the next begins."""
        at = 0
        try:
            if self._torn and batch:
                os.write(self._fd, b"\n")
                self._torn = False
            while at < len(batch):
                at += os.write(self._fd, memoryview(batch)[at:])
        finally:
            self.written += batch.count(b"\n", 0, at)
            if at:
                self._torn = batch[at - 1] != _NEWLINE

    def _failed(self, err: OSError, lines: int) -> None:
        self.dropped += lines
        self.failing = True
        now = time.monotonic()
        if now - self._said >= _SAID_EVERY:
            self._said = now
            why = err.strerror or str(err)
            log.warning("the access log cannot be written; its lines are dropped", extra={"f": {"why": why}})
        if self._fd >= 0 and self._path is not None:
            self._look_now = True  # perhaps the file is another one by now
