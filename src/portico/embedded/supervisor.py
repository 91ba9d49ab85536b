"""Keep child processes running: start in order, wait until each is ready, restart what dies, drain in reverse.

    supervisor = Supervisor(logs, roster, limits)
    await supervisor.start(unit_a, unit_b)      # side by side; returns when both are ready, raises when one cannot
    await supervisor.start(unit_c)              # after them
    ...
    await supervisor.stop()                     # c, then a and b; within limits.stop_seconds; leaves no process

A process that says that it drains (somebody sent it SIGTERM) gets its successor at once, and finishes beside it.

Everything runs on one event loop in the main thread: a child's death signal follows the thread that forked it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from portico.embedded.logs import LogStream
from portico.embedded.roster import Roster
from portico.embedded.spawn import describe_exit
from portico.errors import Problem

READY_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class SupervisorLimits:
    """Times of the supervisor; the platform's settings fill them."""

    start_seconds: float = 60.0
    restart_min_seconds: float = 0.2
    restart_max_seconds: float = 5.0
    healthy_after_seconds: float = 2.0
    stop_seconds: float = 10.0
    hurry_seconds: float = 1.0
    leave_seconds: float = 30.0


class Unit(Protocol):
    """One child process and how it is started, asked and ended."""

    name: str

    @property
    def signals(self) -> Sequence[int]:
        """Sent one after the other while the process lives; the last one should be SIGKILL."""

    async def launch(self, output: int, leaving: Callable[[], None]) -> subprocess.Popen[bytes]:
        """Start it, output on ``output``; raises ``Problem``. ``leaving`` is called should this process say that it drains."""

    async def ready(self) -> bool:
        """Whether it serves now; raises ``Problem`` when it never will."""

    def ended(self) -> None:
        """Called after each end of the process."""

    def release(self) -> None:
        """Called once, when it is not started again: give up locks, remove files."""


@dataclass(slots=True, eq=False)
class _Run:
    """One process of a unit."""

    process: subprocess.Popen[bytes]
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    watcher: asyncio.Task[None] | None = None


class _Kept:
    """A unit with its present process, and those that it had before and that finish what they have."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.run: _Run | None = None
        self.leaving = asyncio.Event()
        self.old: dict[_Run, asyncio.Task[None]] = {}
        self.keeper: asyncio.Task[None] | None = None

    def runs(self) -> list[_Run]:
        return [*([self.run] if self.run is not None else []), *self.old]


class Supervisor:
    """See the module."""

    def __init__(self, logs: LogStream, roster: Roster, limits: SupervisorLimits | None = None) -> None:
        self._logs, self._roster = logs, roster
        self._limits = limits or SupervisorLimits()
        self._groups: list[list[_Kept]] = []
        self._stopping = False
        self._hurry = asyncio.Event()

    def pid(self, name: str) -> int | None:
        """The present process id of a unit."""
        for kept in (kept for group in self._groups for kept in group):
            if kept.unit.name == name and kept.run is not None:
                return kept.run.process.pid
        return None

    # -- start and keep ----------------------------------------------------------------------------------------------

    async def start(self, *units: Unit) -> None:
        """Start ``units`` side by side and return when all are ready. Raises the first one's ``Problem``; then
        :meth:`stop` is still due."""
        group = [_Kept(unit) for unit in units]
        self._groups.append(group)
        firsts: list[asyncio.Future[None]] = []
        for kept in group:
            first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            kept.keeper = asyncio.create_task(self._keep(kept, first), name=f"keep {kept.unit.name}")
            firsts.append(first)
        try:
            await asyncio.gather(*firsts)
        finally:
            for first in firsts:  # a second failure has nobody to tell
                if first.done() and not first.cancelled():
                    first.exception()

    async def _keep(self, kept: _Kept, first: asyncio.Future[None]) -> None:
        """Start, wait, restart: until :meth:`stop`. A failure before it was ever ready goes to ``first`` and ends it."""
        pause = self._limits.restart_min_seconds
        try:
            while not self._stopping:
                began = time.monotonic()
                if await self._try(kept, first):
                    if first.done():
                        self._logs.say(f"{kept.unit.name} is back after {time.monotonic() - began:.1f} s")
                    else:
                        first.set_result(None)
                    healthy_since = time.monotonic()
                    if await self._over(kept):
                        continue
                    if time.monotonic() - healthy_since >= self._limits.healthy_after_seconds:
                        pause = self._limits.restart_min_seconds
                    self._report_end(kept, pause)
                elif not first.done() or first.exception() is not None:
                    return
                await asyncio.sleep(pause)
                pause = min(pause * 2, self._limits.restart_max_seconds)
        finally:
            first.cancel()  # stopped before it was ready; nothing happens when it is done

    async def _try(self, kept: _Kept, first: asyncio.Future[None]) -> bool:
        """One start. A failure goes to ``first`` while that waits, else into the log."""
        try:
            await self._bring_up(kept)
        except Exception as err:
            problem = err if isinstance(err, Problem) else Problem("up.child_failed", f"{kept.unit.name}: {err!r}")
            if kept.run is not None:
                await self._end(kept.unit, kept.run, time.monotonic() + self._limits.hurry_seconds)
                kept.run = None
            if first.done():
                self._logs.say(f"{kept.unit.name} did not restart: {problem.detail}", "ERROR")
            else:
                first.set_exception(problem)
            return False
        return True

    async def _over(self, kept: _Kept) -> bool:
        """Wait until the present process ended, or drains (true): then it is left to itself, within ``leave_seconds``."""
        run = kept.run
        assert run is not None
        waiters = [asyncio.create_task(event.wait()) for event in (run.exited, kept.leaving)]
        try:
            await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waiters:
                waiter.cancel()
        if run.exited.is_set():
            return False
        self._logs.say(f"{kept.unit.name} drains; its successor starts")
        kept.run = None
        kept.old[run] = asyncio.create_task(self._see_off(kept, run), name=f"see off {kept.unit.name}")
        return True

    async def _see_off(self, kept: _Kept, run: _Run) -> None:
        began = time.monotonic()
        try:
            await asyncio.wait_for(run.exited.wait(), self._limits.leave_seconds)
        except TimeoutError:
            self._logs.say(f"the old {kept.unit.name} did not end in {self._limits.leave_seconds:.0f} s", "WARN")
            run.process.kill()
            await run.exited.wait()
        kept.old.pop(run, None)
        how = describe_exit(run.process.returncode)
        self._logs.say(f"the old {kept.unit.name} ended ({how}) after {time.monotonic() - began:.1f} s")

    def _report_end(self, kept: _Kept, pause: float) -> None:
        code = kept.run.process.returncode if kept.run else None
        self._logs.say(f"{kept.unit.name} ended ({describe_exit(code)}); restart in {pause:.1f} s", "WARN")

    async def _bring_up(self, kept: _Kept) -> None:
        output = self._logs.pipe(kept.unit.name)
        try:
            kept.leaving = asyncio.Event()
            process = await kept.unit.launch(output, kept.leaving.set)
        finally:
            os.close(output)
        kept.run = run = _Run(process)
        self._roster.add(kept.unit.name, process.pid)
        run.watcher = asyncio.create_task(self._watch(kept, run))
        deadline = time.monotonic() + self._limits.start_seconds
        while not await kept.unit.ready():
            if run.exited.is_set():
                raise self._ended_early(kept.unit.name, process.returncode)
            if time.monotonic() > deadline:
                raise Problem(
                    "up.child_failed", f"{kept.unit.name} was not ready in {self._limits.start_seconds:.0f} s"
                )
            await asyncio.sleep(READY_POLL_SECONDS)

    def _ended_early(self, name: str, code: int | None) -> Problem:
        last = next((line for line in reversed(self._logs.tail(name)) if line.strip()), "")
        said = f": {last.strip()[:300]}" if last else ""
        return Problem("up.child_failed", f"{name} ended before it was ready ({describe_exit(code)}){said}")

    async def _watch(self, kept: _Kept, run: _Run) -> None:
        await wait_exit(run.process)
        self._roster.discard(run.process.pid)
        if run is kept.run:
            kept.unit.ended()
        run.exited.set()

    # -- stop --------------------------------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Cut what is left of :meth:`stop`'s patience to ``hurry_seconds`` (a second Ctrl-C)."""
        self._hurry.set()

    async def stop(self) -> None:
        """End everything, last started first, within ``stop_seconds``; afterwards no process, lock or socket is left."""
        self._stopping = True
        deadline = time.monotonic() + self._limits.stop_seconds
        for kept in (kept for group in self._groups for kept in group):
            if kept.keeper is not None:
                kept.keeper.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await kept.keeper
        for left, group in reversed(list(enumerate(self._groups))):
            # Each earlier group keeps a second of its own, whatever this one does with its time.
            share = max(deadline - left * 1.0, time.monotonic() + self._limits.hurry_seconds)
            await asyncio.gather(*(self._end(kept.unit, run, share) for kept in group for run in kept.runs()))
            for kept in group:
                await asyncio.gather(*kept.old.values())
                kept.run = None
                kept.unit.release()
        self._roster.remove()

    async def _end(self, unit: Unit, run: _Run, deadline: float) -> None:
        """Send the unit's signals in turn, sharing the time until ``deadline``; returns when the process is gone."""
        if run.watcher is None:
            return
        for number, signum in enumerate(unit.signals):
            if run.exited.is_set():
                break
            with contextlib.suppress(ProcessLookupError):
                run.process.send_signal(signum)
            last = number == len(unit.signals) - 1
            now = time.monotonic()
            await self._wait_end(run.exited, float("inf") if last else now + (deadline - now) * 0.8)
            if not run.exited.is_set():
                self._logs.say(f"{unit.name} did not end on {signal.Signals(signum).name}", "WARN")
        await run.watcher

    async def _wait_end(self, exited: asyncio.Event, until: float) -> None:
        """Until the process ended or the time is up, which :meth:`hurry` brings forward."""
        while not exited.is_set() and (remaining := until - time.monotonic()) > 0:
            waiters = {asyncio.create_task(exited.wait())}
            if not self._hurry.is_set():
                waiters.add(asyncio.create_task(self._hurry.wait()))
            else:
                remaining = min(remaining, self._limits.hurry_seconds)
                until = min(until, time.monotonic() + remaining)
            await asyncio.wait(
                waiters, timeout=None if remaining == float("inf") else remaining, return_when=asyncio.FIRST_COMPLETED
            )
            for waiter in waiters:
                waiter.cancel()


async def wait_exit(process: subprocess.Popen[bytes]) -> int:
    """Wait, without a thread, until ``process`` has ended; its exit code."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, or a kernel before 5.3
        while process.poll() is None:  # noqa: ASYNC110 - there is nothing that could set an event
            await asyncio.sleep(0.05)
        return process.wait()
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def ended() -> None:
        if not over.done():
            over.set_result(None)

    loop.add_reader(pidfd, ended)
    try:
        await over
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()
