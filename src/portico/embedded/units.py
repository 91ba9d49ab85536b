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

    async def launch(self, output: int) -> subprocess.Popen[bytes]:
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
    PORTICO_NOTIFY_FD (:mod:`portico.kit.notify`). ``stdout`` makes a descriptor for its standard output, which
    otherwise joins the log.
    """

    signals: Sequence[int] = (signal.SIGTERM, signal.SIGKILL)

    def __init__(
        self,
        name: str,
        args: Sequence[str],
        environment: Mapping[str, str],
        *,
        listeners: Mapping[str, socket.socket] | None = None,
        health: tuple[str, int, str] | None = None,
        stdout: Callable[[], int] | None = None,
    ) -> None:
        self.name, self._args, self._environment = name, list(args), dict(environment)
        self._listeners, self._health = dict(listeners or {}), health
        self._stdout = stdout
        self._notify: int | None = None

    async def launch(self, output: int) -> subprocess.Popen[bytes]:
        environment = dict(self._environment)
        fds = [sock.fileno() for sock in self._listeners.values()]
        if self._listeners:
            environment["PORTICO_LISTEN_FDS"] = sockets.describe(self._listeners)
        theirs = None
        if self._health is None:
            self._close_notify()
            self._notify, theirs = os.pipe()
            os.set_blocking(self._notify, False)
            environment["PORTICO_NOTIFY_FD"] = str(theirs)
            fds.append(theirs)
        stdout = self._stdout() if self._stdout is not None else None
        try:
            return spawn(portico_argv(*self._args), env=environment, output=output, stdout=stdout, pass_fds=fds)
        except OSError as err:
            raise Problem("up.child_failed", f"{self.name} could not be started: {err.strerror}") from None
        finally:
            for given in (theirs, stdout):
                if given is not None:
                    os.close(given)

    async def ready(self) -> bool:
        if self._health is not None:
            return await answers(*self._health)
        if self._notify is None:
            return False
        try:
            said = os.read(self._notify, 64)
        except BlockingIOError:
            return False
        self._close_notify()
        return said.startswith(notify.READY)

    def ended(self) -> None:
        self._close_notify()

    def release(self) -> None:
        self._close_notify()

    def _close_notify(self) -> None:
        if self._notify is not None:
            os.close(self._notify)
            self._notify = None


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
