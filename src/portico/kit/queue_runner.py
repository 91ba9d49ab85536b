"""The one runner of queues: claims jobs of a kind, runs their handlers, records how they ended, and leaves in order.

    KindRunner   one per kind and process: claim → run, a few at once → record → claim
    Schedules    puts jobs in on time; whichever process holds the lock of that moment does it
    Wakes        hears of new jobs (LISTEN); a look every ``poll_seconds`` finds what nobody was told of

Any number of processes may do this at once. A job that ends its process is found by its lease, and runs alone then, so that it
takes no others with it and its attempts run out.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import asyncpg
from sqlalchemy import exc as sa_exc

from portico.errors import Problem
from portico.kit import queue
from portico.kit.db import Database
from portico.kit.metrics import Histogram
from portico.kit.queue import Counts, Hopeless, Kind, LeaseLost, Limits, Retry, Work
from portico.kit.queue_turns import Turns

log = logging.getLogger("portico.queue")

T = TypeVar("T")
Handler = Callable[[Work], Awaitable[None]]

#: What a database that is away, or was lost on the way, looks like.
FAILURES: Final = (Problem, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError,
                   sa_exc.SQLAlchemyError, OSError, TimeoutError)  # fmt: skip
OUTCOMES: Final = ("succeeded", "failed", "dead", "lost", "given_back")
#: Upper bounds in seconds of how long jobs take.
RUN_SECONDS: Final = (0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0)
#: Seconds before something that the database failed at is tried again; doubles up to the second number.
RETRY_SECONDS, RETRY_MAX_SECONDS = 0.2, 5.0
#: Seconds that a suspect is without company when it begins; and that suspects may go before other jobs.
ALONE_SECONDS: Final = 1.0
#: Any number that no other advisory lock of the project uses.
_SCHEDULE_LOCK: Final = 0x706F_7274_7363_6865


@dataclass(frozen=True, slots=True)
class Served:
    """A kind as a worker runs it."""

    kind: Kind
    handle: Handler
    limits: Limits


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between two looks for jobs when nobody tells of any, and between two counts of a whole queue."""

    poll_seconds: float = 1.0
    count_seconds: float = 15.0


class Outage:
    """How long to wait while the database is away, and longer each time."""

    def __init__(self) -> None:
        self._failures = 0

    def over(self) -> None:
        self._failures = 0

    async def wait(self, stopping: asyncio.Event | None = None) -> None:
        """Wait, or less when it is time to stop."""
        seconds = min(RETRY_MAX_SECONDS, RETRY_SECONDS * 2.0**self._failures)
        self._failures = min(self._failures + 1, 10)
        try:
            async with asyncio.timeout(seconds):
                await (stopping or asyncio.Event()).wait()
        except TimeoutError:
            pass


class KindRunner:
    """The jobs of one kind that this process has in hand."""

    def __init__(self, served: Served, db: Database, stopping: asyncio.Event, pace: Pace) -> None:
        self.kind, self._handle, self.limits = served.kind, served.handle, served.limits
        self._db, self._stopping, self._pace = db, stopping, pace
        self._held: dict[
            uuid.UUID, Work
        ] = {}  # by token: a job that was lost may come back before its handler has ended
        self._waiting: deque[Work] = deque()
        self._running: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._ended: list[tuple[Work, asyncio.Future[bool]]] = []  # handlers are through, the end is not recorded
        self._recording = 0  # of those running
        self._turns = Turns(self.kind.lane, self.limits) if self.kind.lane is not None else None
        self._outage = Outage()
        self._company: asyncio.TimerHandle | None = None  # when a suspect gets it
        self._alone = self._cut = False
        self._suspects = False  # some may wait; looked at now and then
        self._looked = self._suspects_since = 0.0
        self._look, self._moved, self._record = asyncio.Event(), asyncio.Event(), asyncio.Event()
        #: Of this process: jobs by how they ended, and how long their handlers took.
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.seconds = Histogram(RUN_SECONDS)
        #: Of the whole queue, when it was last looked at.
        self.counts: Counts | None = None

    def wake(self) -> None:
        """There may be something to do."""
        self._look.set()

    async def run(self, shutdown_seconds: float) -> None:
        """Work until it is time to stop; then let jobs end for so long, and give the others back.

        Raises when one of the parts beside has ended: without it jobs would be done twice, or hang; another process goes on.
        """
        helpers = [
            asyncio.create_task(part(), name=part.__name__)
            for part in (self._record_ends, self._keep_leases, self._survey)
        ]
        stop = asyncio.create_task(self._stopping.wait())
        try:
            while not self._stopping.is_set():
                await self._fill()
                await self._pause(self._moved if self._full else self._look, stop, *helpers)
                for helper in helpers:
                    if helper.done():
                        raise RuntimeError(f"{self.kind.name}: {helper.get_name()} ended") from helper.exception()
            await self._leave(shutdown_seconds)
        finally:
            stop.cancel()
            for task in (*helpers, *self._running.values()):
                task.cancel()
            await asyncio.gather(*helpers, *self._running.values(), return_exceptions=True)

    # -- taking jobs

    @property
    def _room(self) -> int:
        return self.limits.concurrency + self.limits.prefetch

    @property
    def _full(self) -> bool:
        """Whether to claim later. What is held in advance is used up to the half first: few large claims are cheaper."""
        if self._alone or (self._suspects and self._held):
            return True
        return len(self._held) >= self._room or len(self._waiting) > self.limits.prefetch // 2

    async def _fill(self) -> None:
        """Claim what there is room for."""
        self._look.clear()
        self._moved.clear()
        try:
            await self._look_for_suspects()
            if self._full:
                return
            free = 1 if self._suspects else self._room - len(self._held)
            found, dead = await self._claim(free)
        except FAILURES as err:
            self._warn("queue cannot be read", err)
            await self._outage.wait(self._stopping)
            self._look.set()
            return
        self._outage.over()
        for row in dead:
            self.outcomes["dead"] += 1
            self._say_dead(row[self.kind.id_column], row["attempts"], row["last_error"] or "")
        for work in found:
            self._held[work.token] = work
            self._waiting.append(work)
        if self._suspects:
            self._suspects = bool(found or dead) and time.monotonic() < self._suspects_since + ALONE_SECONDS
            self._alone = bool(found)
            if self._company is not None:
                self._company.cancel()
            self._company = asyncio.get_running_loop().call_later(ALONE_SECONDS, self._with_others)
            self._look.set()
        self._start()
        if len(found) + len(dead) >= free:
            self._look.set()  # there may be more

    async def _claim(self, free: int) -> tuple[list[Work], list[Any]]:
        if self._turns is None or self._suspects:
            return await queue.claim(self._db, self.kind, self.limits, free, suspect=self._suspects)
        count, turn = self._turns.next(self._held.values(), free)
        found, dead = await queue.claim(self._db, self.kind, self.limits, count, turn=turn)
        if self._turns.taken(found, count - len(dead)):
            self._look.set()
        return found, dead

    async def _look_for_suspects(self) -> None:
        """Jobs that may have ended a process are taken one at a time, when nothing else is in hand: what a process has in hand
        when it ends has lost an attempt."""
        now = time.monotonic()
        if not self._suspects and now >= self._looked + self._pace.poll_seconds:
            self._suspects = await queue.suspects(self._db, self.kind)
            self._looked = self._suspects_since = now

    def _with_others(self) -> None:
        self._alone = False
        self._moved.set()

    async def _pause(self, event: asyncio.Event, *ends: asyncio.Task[Any]) -> None:
        waiter = asyncio.create_task(event.wait())
        await asyncio.wait((waiter, *ends), timeout=self._pace.poll_seconds, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()

    def _start(self) -> None:
        """Start what waits, while there are places."""
        while self._waiting and len(self._running) - self._recording < self.limits.concurrency:
            work = self._waiting.popleft()
            self._running[work.token] = asyncio.create_task(self._run(work))

    # -- running them

    async def _run(self, work: Work) -> None:
        began = time.monotonic()
        outcome = "failed"
        try:
            outcome = await self._attempt(work)
        except Exception:
            log.exception("the end of a job could not be recorded", extra={"f": self._about(work)})
        finally:
            self.seconds.observe(time.monotonic() - began)
            self.outcomes[outcome] += 1
            self._held.pop(work.token, None)
            self._running.pop(work.token, None)
            self._alone = False
            self._moved.set()
            self._look.set()
            if not self._stopping.is_set():
                self._start()

    async def _attempt(self, work: Work) -> str:
        limit = asyncio.timeout(self.limits.timeout_seconds)
        try:
            async with limit:
                await self._handle(work)
            if work.finished or await self._finished(work):
                return "succeeded"
        except LeaseLost:
            pass
        except asyncio.CancelledError:
            if not (self._cut or work.lost):
                raise
            if self._cut:
                await self._give_back([work])
                return "given_back"
        except Exception as err:
            late = TimeoutError(f"it took longer than {self.limits.timeout_seconds:g} s")
            return await self._failed(work, late if limit.expired() else err)
        log.warning("job lost to another worker", extra={"f": self._about(work)})
        return "lost"

    async def _finished(self, work: Work) -> bool:
        """Have the end recorded, together with others; false when the lease was lost."""
        recorded = asyncio.get_running_loop().create_future()
        self._ended.append((work, recorded))
        self._record.set()
        self._recording += 1  # its place is free
        try:
            if not self._stopping.is_set():
                self._start()
            return bool(await recorded)
        finally:
            self._recording -= 1

    async def _failed(self, work: Work, err: Exception) -> str:
        """Record the failure and when to try again, or that there is no more trying."""
        known = isinstance(err, (Retry, Hopeless, Problem, TimeoutError))
        dead = isinstance(err, Hopeless) or work.attempt >= self.limits.max_attempts
        pause = self.limits.pause(work.attempt)
        if isinstance(err, Retry):
            pause = min(max(0.0, err.seconds), self.limits.longest)
        text = str(err) if isinstance(err, (Retry, Hopeless)) else f"{type(err).__name__}: {err}"
        fields = self._about(work) | {"error": text[:300]}
        # A handler's lost connection leaves open whether its last commit happened: the token decides, here.
        if not await self._insist(lambda: queue.fail(work, text, pause, dead=dead)):
            log.warning("job failed, and is not ours any more or ended all the same", extra={"f": fields})
            return "lost"
        if dead:
            self._say_dead(work.id, work.attempt, text, None if known else err)
            return "dead"
        log.log(
            logging.WARNING if known else logging.ERROR, "job failed", exc_info=None if known else err,
            extra={"f": fields | {"again_in": f"{pause:.1f}s"}},
        )  # fmt: skip
        return "failed"

    async def _insist(self, record: Callable[[], Awaitable[T]]) -> T | None:
        """Record an end, as long as the lease can be ours, whatever becomes of connections; ``None`` when it cannot be."""
        until, outage = time.monotonic() + self.limits.lease_seconds, Outage()
        while True:
            try:
                return await record()
            except FAILURES as err:
                self._warn("the end of a job is not recorded yet", err)
                if time.monotonic() > until:
                    return None
                await outage.wait()

    # -- beside them

    async def _record_ends(self) -> None:
        """Record the ends that came meanwhile in one statement: what makes small jobs cheap."""
        while True:
            await self._record.wait()
            self._record.clear()
            batch, self._ended = self._ended, []
            held = [work for work, _ in batch]
            ours = await self._insist(lambda held=held: queue.finish(self._db, self.kind, held)) or set()  # type: ignore[misc]
            for work, recorded in batch:
                if not recorded.done():
                    recorded.set_result(work.id in ours)

    async def _keep_leases(self) -> None:
        """Renew what is in hand three times in the life of a lease; end handlers whose lease is gone."""
        while True:
            await asyncio.sleep(self.limits.lease_seconds / 3)
            if not (held := list(self._held.values())):
                continue
            try:
                gone = await queue.renew(self._db, self.kind, self.limits, held)
            except FAILURES as err:
                self._warn("leases cannot be renewed", err)
                continue
            for work in held:
                if work.id in gone and work.token in self._held and not work.finished:
                    self._drop(work)

    def _drop(self, work: Work) -> None:
        work.lost = True
        if work in self._waiting:
            self._waiting.remove(work)
            self._held.pop(work.token, None)
            self.outcomes["lost"] += 1
        elif not any(work is ended for ended, _ in self._ended) and (task := self._running.get(work.token)) is not None:
            task.cancel()

    async def _survey(self) -> None:
        """Count the queue, and put right what a clock that was set back has done to it."""
        while True:
            try:
                if mended := await queue.mend(self._db, self.kind):
                    log.warning(
                        "PostgreSQL's clock was set back", extra={"f": {"kind": self.kind.name, "jobs": mended}}
                    )
                    self.wake()
                async with self._db.read() as reader:
                    self.counts = await queue.count(reader, self.kind)
            except FAILURES as err:
                self._warn("queue cannot be counted", err)
            await asyncio.sleep(self._pace.count_seconds)

    # -- leaving

    async def _leave(self, seconds: float) -> None:
        """What has not begun goes back at once; what runs has its time, and goes back then."""
        back = list(self._waiting)
        self._waiting.clear()
        for work in back:
            self._held.pop(work.token, None)
            self.outcomes["given_back"] += 1
        if back:
            await self._give_back(back)
        if self._running:
            await asyncio.wait(self._running.values(), timeout=seconds)
        if late := list(self._running.values()):
            log.warning("jobs cut at the shutdown limit", extra={"f": {"kind": self.kind.name, "jobs": len(late)}})
            self._cut = True
            for task in late:
                task.cancel()
            await asyncio.wait(late, timeout=1.0)

    async def _give_back(self, held: Sequence[Work]) -> None:
        try:
            await asyncio.shield(queue.give_back(self._db, self.kind, held))
        except FAILURES as err:
            self._warn("jobs cannot be given back; their leases will end", err)

    # -- saying

    def _about(self, work: Work) -> dict[str, Any]:
        return {"kind": self.kind.name, "job": str(work.id), "attempt": work.attempt}

    def _warn(self, what: str, err: BaseException) -> None:
        log.warning(what, extra={"f": {"kind": self.kind.name, "error": f"{type(err).__name__}: {err}"[:200]}})

    def _say_dead(self, job: Any, attempts: int, error: str, err: Exception | None = None) -> None:
        fields = {"kind": self.kind.name, "job": str(job), "attempts": attempts, "error": error[:300]}
        log.error("job is dead; portico admin queues replays it", exc_info=err, extra={"f": fields})


# -- schedules -----------------------------------------------------------------------------------------------------------

_PLAN = """
INSERT INTO queue_schedules (name, next_at) SELECT name, now() FROM unnest($1::text[]) AS name
ON CONFLICT (name) DO NOTHING
"""
# The second condition: the interval was shortened, or PostgreSQL's clock was set back.
_DUE = """
SELECT s.name FROM queue_schedules AS s JOIN unnest($1::text[], $2::float8[]) AS plan(name, every) USING (name)
WHERE s.next_at <= now() OR s.next_at > now() + make_interval(secs => plan.every)
"""
_NEXT = "UPDATE queue_schedules SET next_at = now() + make_interval(secs => $2) WHERE name = $1"
_SOON = "SELECT extract(epoch FROM min(next_at) - now())::float8 FROM queue_schedules WHERE name = ANY($1::text[])"


class Schedules:
    """Puts a job of each kind in every so many seconds. Intervals that nobody was there for are not made up for."""

    #: Seconds that it sleeps at most: how late it may notice that a clock was set.
    LONGEST_SLEEP = 60.0

    def __init__(self, every: Mapping[Kind, float], db: Database, stopping: asyncio.Event, pace: Pace) -> None:
        self._every, self._db, self._stopping, self._pace = every, db, stopping, pace
        self._names = [kind.name for kind in every]

    async def run(self) -> None:
        """Until it is time to stop."""
        while self._every and not self._stopping.is_set():
            try:
                seconds = await self.round()
            except FAILURES as err:
                log.warning("schedules cannot be read", extra={"f": {"error": f"{type(err).__name__}: {err}"[:200]}})
                seconds = self._pace.poll_seconds
            try:
                async with asyncio.timeout(seconds):
                    await self._stopping.wait()
            except TimeoutError:
                pass

    async def round(self) -> float:
        """Put in what is due, unless another process is at it; returns the seconds until there may be more."""
        async with self._db.transaction() as tx:
            if not await tx.raw.fetchval("SELECT pg_try_advisory_xact_lock($1)", _SCHEDULE_LOCK):
                return self._pace.poll_seconds
            await tx.raw.execute(_PLAN, self._names)
            due = {row["name"] for row in await tx.raw.fetch(_DUE, self._names, list(self._every.values()))}
            for kind, seconds in self._every.items():
                if kind.name in due:
                    await queue.enqueue(tx, kind)
                    await tx.raw.execute(_NEXT, kind.name, seconds)
            soon = await tx.raw.fetchval(_SOON, self._names)
        return min(max(float(soon), min(self._pace.poll_seconds, *self._every.values())), self.LONGEST_SLEEP)


# -- being told ----------------------------------------------------------------------------------------------------------


class Wakes:
    """Listens on a connection of its own, and makes another one when it is lost."""

    #: Seconds between two looks at whether the connection still answers.
    CHECK_SECONDS = 30.0

    def __init__(self, runners: Sequence[KindRunner], db: Database, application: str) -> None:
        self._runners = {runner.kind.name: runner for runner in runners}
        self._db, self._application, self._outage = db, application, Outage()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._listen()
            except FAILURES as err:
                log.warning("cannot listen for jobs", extra={"f": {"error": f"{type(err).__name__}: {err}"[:200]}})
            await self._outage.wait()

    async def _listen(self) -> None:
        connection = await self._db.connect(self._application, timeout_seconds=5.0)
        try:
            lost = asyncio.Event()
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(queue.CHANNEL, self._told)
            self._outage.over()
            for runner in self._runners.values():
                runner.wake()  # of what came before, nobody told us
            while not lost.is_set():
                try:
                    async with asyncio.timeout(self.CHECK_SECONDS):
                        await lost.wait()
                except TimeoutError:
                    await connection.execute("SELECT 1")
        finally:
            connection.terminate()

    def _told(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        if (runner := self._runners.get(str(payload))) is not None:
            runner.wake()
