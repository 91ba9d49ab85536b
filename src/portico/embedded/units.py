"""The kinds of children that `portico up` keeps: the two servers, and processes of Portico itself."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from portico.embedded.logs import LogStream
from portico.embedded.postgres import EmbeddedPostgres
from portico.embedded.spawn import describe_exit, spawn
from portico.embedded.supervisor import wait_exit
from portico.embedded.valkey import EmbeddedValkey
from portico.errors import Problem
from portico.kit import notify, sockets, standby

HEALTH_TIMEOUT_SECONDS = 5.0


class ServerUnit:
    """Embedded PostgreSQL or Valkey: prepared in a thread, forked from the main one."""

    def __init__(self, name: str, server: EmbeddedPostgres | EmbeddedValkey, signals: Sequence[int]) -> None:
        self.name, self.signals = name, signals
        self.server = server
        self._preparing: concurrent.futures.Future[None] | None = None

    async def launch(self, output: int, leaving: Callable[[], None]) -> subprocess.Popen[bytes]:
        if not self.server.acquire():
            raise Problem("up.already_running", f"another process runs {self.name} in {self.server.home}")
        pool = concurrent.futures.ThreadPoolExecutor(1, f"prepare-{self.name}")
        self._preparing = pool.submit(self.server.prepare)
        pool.shutdown(wait=False)
        await asyncio.wrap_future(self._preparing)
        self.server.log_to(output)
        return self.server.launch()

    async def ready(self) -> bool:
        return self.server.ready()

    def ended(self) -> None:
        self.server.process = None

    def release(self) -> None:
        if self._preparing is not None:  # stopped while a cluster was being made: the thread still writes
            concurrent.futures.wait([self._preparing])
        self.server.stop()


def postgres_unit(server: EmbeddedPostgres) -> ServerUnit:
    """Fast shutdown first; an immediate one loses nothing either, it only recovers at the next start."""
    return ServerUnit("postgres", server, (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL))


def valkey_unit(server: EmbeddedValkey) -> ServerUnit:
    return ServerUnit("valkey", server, (signal.SIGTERM, signal.SIGKILL))


@dataclass(frozen=True, slots=True)
class Standby:
    """That a unit may have a process waiting; one is kept from ``after_seconds`` after each start, or not at all (None)."""

    logs: LogStream
    after_seconds: float | None


@dataclass(slots=True, eq=False)
class _Waiting:
    """A process that waits: our end of what it is told to go on by, and whom to tell, from then on, that it drains."""

    process: subprocess.Popen[bytes]
    go: int
    told: list[Callable[[], None]]


class ProcessUnit:
    """A process of Portico: ``portico ARGS…`` with an environment, inherited sockets and a readiness check.

    Ready is: ``health`` (host, port, path) answers 200; or, without it, the process wrote READY=1 to the descriptor in
    PORTICO_NOTIFY_FD (:mod:`portico.kit.notify`). Any process may write STOPPING=1 there. ``stdout`` makes a descriptor
    for its standard output, which otherwise joins the log. ``end_signal`` is what it gets first when everything ends (once it
    said that it is ready: before, it may not know the signal).

    With ``standby`` a second process, of a command that knows :mod:`portico.kit.standby`, can wait to take over: it is kept, or
    started once by :meth:`stand_by`.
    """

    def __init__(
        self,
        name: str,
        args: Sequence[str],
        environment: Mapping[str, str],
        *,
        listeners: Mapping[str, socket.socket] | None = None,
        health: tuple[str, int, str] | None = None,
        stdout: Callable[[], int] | None = None,
        end_signal: int = signal.SIGTERM,
        standby: Standby | None = None,
    ) -> None:
        self._end_signal = end_signal
        self._standby = standby
        self._waiting: _Waiting | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.name, self._args, self._environment = name, list(args), dict(environment)
        self._listeners, self._health = dict(listeners or {}), health
        self._stdout = stdout
        self._said_ready = False
        self._ears: set[int] = set()

    @property
    def signals(self) -> Sequence[int]:
        return (self._end_signal if self._said_ready else signal.SIGTERM), signal.SIGKILL

    async def launch(self, output: int, leaving: Callable[[], None]) -> subprocess.Popen[bytes]:
        self._said_ready = False
        self._cancel_timer()
        if (waiting := self._take()) is not None:
            waiting.told.append(leaving)
            return waiting.process
        return self._spawn(output, leaving)

    def _spawn(
        self, output: int, leaving: Callable[[], None], standby_fd: int | None = None
    ) -> subprocess.Popen[bytes]:
        environment = dict(self._environment)
        fds = [sock.fileno() for sock in self._listeners.values()]
        if self._listeners:
            environment["PORTICO_LISTEN_FDS"] = sockets.describe(self._listeners)
        if standby_fd is not None:
            environment["PORTICO_STANDBY_FD"] = str(standby_fd)
            fds.append(standby_fd)
        theirs = self._listen(leaving)
        environment["PORTICO_NOTIFY_FD"] = str(theirs)
        fds.append(theirs)
        stdout = self._stdout() if self._stdout is not None else None
        try:
            return spawn(portico_argv(*self._args), env=environment, output=output, stdout=stdout, pass_fds=fds)
        except OSError as err:
            raise Problem("up.child_failed", f"{self.name} could not be started: {err.strerror}") from None
        finally:
            os.close(theirs)
            if stdout is not None:
                os.close(stdout)

    # -- the one that waits ------------------------------------------------------------------------------------------

    def stand_by(self) -> None:
        """Start the process that waits, unless there is one. That it cannot be started is no failure: nothing needs it."""
        self._cancel_timer()
        if self._standby is None or self._waiting is not None:
            return
        theirs, ours = os.pipe()
        output = self._standby.logs.pipe(self.name)
        told: list[Callable[[], None]] = []
        try:
            process = self._spawn(output, partial(_tell, told), theirs)
        except Problem as problem:
            self._standby.logs.say(f"nothing waits to take over from {self.name}: {problem.detail}", "WARN")
            os.close(ours)
        else:
            self._waiting = _Waiting(process, ours, told)
        finally:
            os.close(theirs)
            os.close(output)

    def _take(self) -> _Waiting | None:
        """The process that waited, told to go on; none when there is none, or it has died."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return None
        try:
            if waiting.process.poll() is None:
                os.write(waiting.go, standby.GO)
                return waiting
        except BrokenPipeError:  # it dies just now
            waiting.process.kill()
            waiting.process.wait()
        finally:
            os.close(waiting.go)
        return None

    def _keep_one(self) -> None:
        """Have one wait, a while from now: what serves has the processor first."""
        if self._standby is not None and self._standby.after_seconds is not None and self._waiting is None:
            self._timer = asyncio.get_running_loop().call_later(self._standby.after_seconds, self.stand_by)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- what it says ------------------------------------------------------------------------------------------------

    def _listen(self, leaving: Callable[[], None]) -> int:
        """A pipe for what the next process says of itself: its end, to be closed here once the process has it. Ours closes
        with the process."""
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        self._ears.add(ours)
        asyncio.get_running_loop().add_reader(ours, self._hear, ours, leaving)
        return theirs

    def _hear(self, ear: int, leaving: Callable[[], None]) -> None:
        try:
            said = os.read(ear, 256)
        except BlockingIOError:
            return
        if notify.READY in said:
            self._said_ready = True
        if notify.STOPPING in said:
            leaving()
        if not said:
            self._deafen(ear)

    def _deafen(self, ear: int) -> None:
        if ear in self._ears:
            self._ears.discard(ear)
            asyncio.get_running_loop().remove_reader(ear)
            os.close(ear)

    async def ready(self) -> bool:
        up = self._said_ready if self._health is None else await answers(*self._health)
        if up:
            self._keep_one()
        return up

    def ended(self) -> None:
        """Its end of the pipe closed with it."""

    def release(self) -> None:
        """Also when it was never launched."""
        self._cancel_timer()
        if self._waiting is not None:
            os.close(self._waiting.go)
            self._waiting.process.kill()  # it has nothing to finish
            self._waiting.process.wait()
            self._waiting = None
        for ear in list(self._ears):
            self._deafen(ear)


def _tell(whom: Sequence[Callable[[], None]]) -> None:
    for tell in whom:
        tell()


async def run_to_end(
    name: str, args: Sequence[str], environment: Mapping[str, str], logs: LogStream, data: bytes
) -> bytes:
    """Run ``portico ARGS…`` with ``data`` on standard input; what it wrote to standard output. Errors go to the log.

    Raises ``up.child_failed`` with its last line when it fails; ends it when cancelled.
    """
    output = logs.pipe(name)
    try:
        process = spawn(
            portico_argv(*args), env=dict(environment), output=output, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    finally:
        os.close(output)
    try:
        said, _ = await asyncio.to_thread(process.communicate, data)
    except asyncio.CancelledError:
        process.kill()
        await wait_exit(process)
        raise
    if process.returncode != 0:
        await asyncio.sleep(0.05)  # its last words may still be in the pipe
        last = next(iter(logs.tail(name)[-1:]), describe_exit(process.returncode))
        raise Problem("up.child_failed", f"{name} failed: {last[:400]}")
    return said


def portico_argv(*args: str) -> list[str]:
    """The command line of a Portico process, by the interpreter that runs us. ``-P``: the working directory of whoever
    started us must not shadow a module."""
    return [sys.executable, "-P", "-m", "portico.cli", *args]


async def answers(host: str, port: int, path: str) -> bool:
    """Whether an HTTP server answers GET ``path`` with 200 (a connection waits in its queue until it is up)."""
    writer = None
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            status = await reader.readline()
    except (OSError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                writer.transport.abort()
    return status.split()[1:2] == [b"200"]
