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

from portico.embedded.logs import LogStream
from portico.embedded.postgres import EmbeddedPostgres
from portico.embedded.spawn import describe_exit, spawn
from portico.embedded.supervisor import wait_exit
from portico.embedded.valkey import EmbeddedValkey
from portico.errors import Problem
from portico.kit import notify, sockets

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


class ProcessUnit:
    """A process of Portico: ``portico ARGS…`` with an environment, inherited sockets and a readiness check.

    Ready is: ``health`` (host, port, path) answers 200; or, without it, the process wrote READY=1 to the descriptor in
    PORTICO_NOTIFY_FD (:mod:`portico.kit.notify`). Any process may write STOPPING=1 there. ``stdout`` makes a descriptor
    for its standard output, which otherwise joins the log. ``end_signal`` is what it gets first when everything ends (once it
    said that it is ready: before, it may not know the signal).
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
    ) -> None:
        self._end_signal = end_signal
        self.name, self._args, self._environment = name, list(args), dict(environment)
        self._listeners, self._health = dict(listeners or {}), health
        self._stdout = stdout
        self._said_ready = False
        self._ears: set[int] = set()

    @property
    def signals(self) -> Sequence[int]:
        return (self._end_signal if self._said_ready else signal.SIGTERM), signal.SIGKILL

    async def launch(self, output: int, leaving: Callable[[], None]) -> subprocess.Popen[bytes]:
        environment = dict(self._environment)
        fds = [sock.fileno() for sock in self._listeners.values()]
        if self._listeners:
            environment["PORTICO_LISTEN_FDS"] = sockets.describe(self._listeners)
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

    def _listen(self, leaving: Callable[[], None]) -> int:
        """A pipe for what the next process says of itself: its end, to be closed here once the process has it. Ours closes
        with the process."""
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        self._said_ready = False
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
        return self._said_ready if self._health is None else await answers(*self._health)

    def ended(self) -> None:
        """Its end of the pipe closed with it."""

    def release(self) -> None:
        for ear in list(self._ears):
            self._deafen(ear)


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
