"""PostgreSQL: one pool, one transaction helper, the only ``commit()`` of the project.

    async with db.transaction() as tx:      # BEGIN … COMMIT; any exception rolls back
        await tx.execute(insert(table).values(…))
        tx.after_commit(wake_streams)       # runs once the commit is durable, never on rollback

    async with db.read() as reader:         # autocommit, no BEGIN/COMMIT round trips
        row = await reader.fetch_one(select(…))

    async with db.direct() as reader:       # the same, cheaper, for single statements of the busiest routes (``reader.raw``)
        row = await reader.raw.fetchrow("SELECT …", …)

BEGIN is sent when the transaction is opened, so a connection that died while it was idle (PostgreSQL restarted) is
found before any statement of the caller ran, and one attempt on a fresh connection is safe. Hot queries may use the
asyncpg connection under a transaction through ``tx.raw``.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import asyncpg
from sqlalchemy import Connection, Executable, MetaData, event
from sqlalchemy import exc as sa_exc
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.engine import URL, CursorResult, Row, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from portico.errors import Problem

log = logging.getLogger(__name__)

T = TypeVar("T")

# Transactions that are open around the code that runs; a task inherits them from the one that made it.
_around: ContextVar[int] = ContextVar("transactions", default=0)

# The order of the last statements of a transaction; see ``Tx.before_commit``.
JOBS, CHAINS, CHANGES = range(3)

# What asyncpg raises, and what SQLAlchemy's adapter makes of it where no statement of SQLAlchemy's is around it (BEGIN).
_DRIVER = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    AsyncAdapt_asyncpg_dbapi.Error,
)

# Every table of the control plane registers here; names make constraint errors and migrations predictable.
metadata = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_ix",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    }
)


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Named limits of the pool and of every statement; the settings classes fill them."""

    size: int = 10
    direct: int = 4
    acquire_timeout_seconds: float = 10.0
    connect_timeout_seconds: float = 5.0
    statement_timeout_seconds: float = 15.0
    lock_timeout_seconds: float = 5.0
    idle_in_transaction_seconds: float = 30.0


def async_url(url: str) -> URL:
    """A plain ``postgresql://`` URL (TCP, or ``?host=/socket/dir``) for SQLAlchemy; others are ``config.invalid``."""
    try:
        parsed = make_url(url)
    except sa_exc.ArgumentError:
        raise Problem("config.invalid", "setting database_url: not a database URL", key="database_url") from None
    if parsed.drivername.split("+")[0] not in ("postgresql", "postgres"):
        raise Problem("config.invalid", "setting database_url: only postgresql:// is supported", key="database_url")
    return parsed.set(drivername="postgresql+asyncpg")


def dsn(url: str) -> tuple[str, dict[str, Any]]:
    """``url`` as asyncpg reads it, which knows libpq's ``sslmode``, ``sslrootcert`` and the rest; and arguments beside it.

    ``sslrootcert=system`` (libpq 16): the public certificate authorities, and the server's name is checked. Raises
    ``config.invalid`` when a file that it names is not there.
    """
    parsed = async_url(url).set(drivername="postgresql")
    for name in ("sslrootcert", "sslcert", "sslkey"):
        path = str(parsed.query.get(name, "system"))
        if path != "system" and not Path(path).is_file():
            detail = f"setting database_url: {name} names {path}, where there is no file"
            raise Problem("config.invalid", detail, key="database_url")
    if parsed.query.get("sslrootcert") != "system":
        return parsed.render_as_string(hide_password=False), {}
    parsed = parsed.difference_update_query(["sslrootcert", "sslmode"])
    return parsed.render_as_string(hide_password=False), {"ssl": ssl.create_default_context()}


class HasConnection(Protocol):
    """Whatever raw queries can run on: a ``Reader``, a ``Tx``, or the holder of a connection of its own."""

    @property
    def raw(self) -> asyncpg.Connection: ...


class Reader:
    """Queries on one connection. Outside a transaction each statement sees its own snapshot; writes are refused."""

    def __init__(self, connection: AsyncConnection, raw: asyncpg.Connection) -> None:
        self._connection = connection
        self.raw = raw  # the asyncpg connection, for hot queries; inside a Tx it is inside the transaction

    async def _run(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        if getattr(statement, "is_dml", False) and not isinstance(self, Tx):
            raise TypeError("a reader does not write; open db.transaction()")
        return await self._connection.execute(statement, parameters)

    async def fetch_one(self, statement: Executable, parameters: Any = None) -> Row[Any] | None:
        """The first row, or ``None``."""
        return (await self._run(statement, parameters)).first()

    async def fetch_all(self, statement: Executable, parameters: Any = None) -> Sequence[Row[Any]]:
        """Every row."""
        return (await self._run(statement, parameters)).all()

    async def scalar(self, statement: Executable, parameters: Any = None) -> Any:
        """The first column of the first row, or ``None``."""
        return (await self._run(statement, parameters)).scalar()


class _Direct(Reader):
    """A reader whose ``raw`` is no connection of the pool; one of the pool is had when a statement of SQLAlchemy's needs it."""

    def __init__(self, db: Database, raw: asyncpg.Connection) -> None:
        self._db, self._pooled = db, False
        self.raw = raw

    async def _run(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        if not self._pooled:
            self._connection, _ = await self._db._open(None)
            self._pooled = True
        return await super()._run(statement, parameters)

    async def close(self) -> None:
        if self._pooled:
            await asyncio.shield(self._connection.close())


class Tx(Reader):
    """An open transaction. ``Database.transaction`` ends it: commit on success, rollback on any error."""

    def __init__(self, connection: AsyncConnection, raw: asyncpg.Connection) -> None:
        super().__init__(connection, raw)
        self._callbacks: list[Callable[[], Awaitable[None] | None]] = []
        self._last_steps: dict[int, list[Callable[[], Awaitable[None]]]] = {JOBS: [], CHAINS: [], CHANGES: []}
        self.state: dict[object, Any] = {}  # what a last step gathers, by an object of the module that owns it

    async def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        """Run a statement (a list of parameter rows runs it for each)."""
        return await self._run(statement, parameters)

    async def run_sync(self, function: Callable[[Connection], T]) -> T:
        """Call ``function`` with the synchronous connection of this transaction (schema migrations)."""
        return await self._connection.run_sync(function)

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """A part that may fail alone (a unique violation that the caller turns into another attempt)."""
        async with self._connection.begin_nested():
            yield

    def before_commit(self, step: Callable[[], Awaitable[None]], *, order: int = CHANGES) -> None:
        """Run ``step`` inside the transaction as one of its last statements; if it raises, everything rolls back.

        For what must hold a contended lock as briefly as possible. Such locks have one order, whichever was asked for
        first: the row of a job at work (``JOBS``), the heads of audit chains (``CHAINS``), then the append to the edge change
        table (``CHANGES``), which everybody shares.
        """
        self._last_steps[order].append(step)

    async def run_last_steps(self) -> None:
        """Run what ``before_commit`` gathered, in order."""
        for order in (JOBS, CHAINS, CHANGES):
            for step in self._last_steps[order]:
                await step()

    def after_commit(self, callback: Callable[[], Awaitable[None] | None]) -> None:
        """Call ``callback`` once the commit is durable. It is a wake-up, not a promise: a crash in between loses it."""
        self._callbacks.append(callback)

    async def run_callbacks(self) -> None:
        """Run what ``after_commit`` gathered; a failing callback is logged and cannot undo the commit."""
        for callback in self._callbacks:
            try:
                if (pending := callback()) is not None:
                    await pending
            except Exception:
                log.exception("after-commit callback failed")


class Database:
    """The pool. One per process; ``close()`` at the end."""

    def __init__(self, url: str, limits: PoolLimits | None = None, *, application: str = "portico") -> None:
        self.url = url
        self.limits = limits or PoolLimits()
        self._dsn, self._more = dsn(url)
        self._application = application
        self.engine: AsyncEngine = create_async_engine(
            async_url(url),
            pool_size=self.limits.size,
            max_overflow=0,
            hide_parameters=True,  # an error's text goes to logs, and the values may be anybody's secrets
            pool_timeout=self.limits.acquire_timeout_seconds,
            async_creator=self._connect_pooled,
        )
        self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._idle: list[asyncpg.Connection] = []
        self._room = asyncio.Semaphore(self.limits.direct)
        self._direct_in_use = 0
        event.listen(self.engine.sync_engine, "checkout", _refuse_dead)

    async def _connect_pooled(self) -> asyncpg.Connection:
        limits = self.limits
        return await asyncpg.connect(
            self._dsn,
            **self._more,
            timeout=limits.connect_timeout_seconds,
            server_settings={
                "application_name": self._application,
                "statement_timeout": str(int(limits.statement_timeout_seconds * 1000)),
                "lock_timeout": str(int(limits.lock_timeout_seconds * 1000)),
                "idle_in_transaction_session_timeout": str(int(limits.idle_in_transaction_seconds * 1000)),
            },
        )

    async def connect(self, application: str, *, timeout_seconds: float) -> asyncpg.Connection:
        """A connection outside the pool, for LISTEN; the caller closes it. ``timeout_seconds`` limits every statement."""
        return await asyncpg.connect(
            self._dsn,
            **self._more,
            timeout=min(timeout_seconds, self.limits.connect_timeout_seconds),
            command_timeout=timeout_seconds,
            server_settings={"application_name": application},
        )

    async def close(self) -> None:
        """Close every connection that is idle."""
        while self._idle:
            self._idle.pop().terminate()
        await self.engine.dispose()

    def connections(self) -> tuple[int, int]:
        """Connections that are at work, and that are idle."""
        pool = self.engine.pool
        at_work, idle = pool.checkedout(), pool.checkedin()  # type: ignore[attr-defined]
        return at_work + self._direct_in_use, idle + len(self._idle)

    async def ping(self) -> None:
        """One round trip; raises ``service.unavailable`` when the database does not answer."""
        async with self.read() as reader:
            await reader.raw.execute("SELECT 1")

    @asynccontextmanager
    async def transaction(self, *, isolation: str | None = None, read_only: bool = False) -> AsyncIterator[Tx]:
        """One transaction: commits when the block ends, rolls back when it raises.

        Raises ``service.unavailable`` when no connection can be had or it is lost on the way (when it is lost during
        COMMIT itself, nobody knows the outcome); ``isolation`` as PostgreSQL names it.
        """
        connection, raw = await self._open(_options(isolation, read_only))
        try:
            tx = Tx(connection, raw)
            _around.set(_around.get() + 1)
            try:
                yield tx
                await tx.run_last_steps()
                await connection.commit()
            except BaseException as err:
                await _rollback(connection)
                if (lost := _loss(err, raw)) is not None:
                    raise lost from err
                raise
            finally:
                _around.set(_around.get() - 1)
        finally:
            if not raw.is_closed() and raw.is_in_transaction():
                raw.terminate()  # cancelled during COMMIT or ROLLBACK: nobody else may come into this transaction
            # Shielded: a cancelled request must hand its connection back, not leave it half-way out of the pool.
            await asyncio.shield(connection.close())
        await tx.run_callbacks()

    @asynccontextmanager
    async def read(self, *, snapshot: bool = False) -> AsyncIterator[Reader]:
        """Queries without a transaction; ``snapshot=True`` gives them all one consistent, read-only snapshot."""
        if snapshot:
            async with self.transaction(isolation="REPEATABLE READ", read_only=True) as tx:
                yield Reader(tx._connection, tx.raw)
            return
        connection, raw = await self._open(None)
        try:
            yield Reader(connection, raw)
        except BaseException as err:
            if (lost := _loss(err, raw)) is not None:
                raise lost from err
            raise
        finally:
            await asyncio.shield(connection.close())

    @asynccontextmanager
    async def direct(self) -> AsyncIterator[Reader]:
        """As :meth:`read`, for what is asked most: statements of ``raw`` run on one of a few connections kept for them.

        The way in and out of SQLAlchemy's pool costs more of the processor than such a statement. Other statements have one of
        the pool.
        """
        await self._enter()
        self._direct_in_use += 1
        raw: asyncpg.Connection | None = None
        try:
            raw = await self._kept()
            reader = _Direct(self, raw)
            try:
                yield reader
            except BaseException as err:
                if not isinstance(err, Exception):
                    raw.terminate()  # cancelled, maybe in the middle of a statement
                if (lost := _loss(err, raw)) is not None:
                    raise lost from err
                raise
            finally:
                await reader.close()
        finally:
            self._direct_in_use -= 1
            self._room.release()
            if raw is not None and not raw.is_closed():
                if raw.is_in_transaction():
                    raw.terminate()
                else:
                    self._idle.append(raw)

    async def _enter(self) -> None:
        """A place among those that have connections of their own."""
        try:
            if not self._room.locked():
                await self._room.acquire()
                return
            async with asyncio.timeout(self.limits.acquire_timeout_seconds):
                await self._room.acquire()
        except TimeoutError:
            raise Problem("service.unavailable", "every database connection is busy") from None

    async def _kept(self) -> asyncpg.Connection:
        """One that is idle and alive as far as is known, or a new one."""
        while self._idle:
            if not (raw := self._idle.pop()).is_closed():
                return raw
        try:
            return await self._connect_pooled()
        except (*_DRIVER, OSError) as err:
            raise _unavailable(err) from err

    async def _open(self, options: dict[str, Any] | None) -> tuple[AsyncConnection, asyncpg.Connection]:
        """A live connection, its transaction begun unless ``options`` is None; one dead connection is forgiven."""
        for last in (False, True):
            try:
                return await self._begin(options)
            except sa_exc.TimeoutError:
                raise Problem("service.unavailable", "every database connection is busy") from None
            except (sa_exc.DBAPIError, *_DRIVER, OSError) as err:
                if last or not _is_connection_loss(err):
                    raise _unavailable(err) from err
        raise AssertionError("unreachable")

    async def _begin(self, options: dict[str, Any] | None) -> tuple[AsyncConnection, asyncpg.Connection]:
        engine = self._autocommit if options is None else self.engine
        connection = await engine.connect()
        adapter: Any = None
        try:
            if options:
                await connection.execution_options(**options)
            fairy = await connection.get_raw_connection()
            adapter = fairy.dbapi_connection
            if options is not None:
                await connection.begin()
                # SQLAlchemy sends BEGIN with the first statement only; sent here, it proves the connection alive
                # and lets raw asyncpg statements join the transaction. (Private name: pinned by tests/kit/test_db.py.)
                await adapter._start_transaction()
        except BaseException as err:
            if isinstance(err, asyncio.CancelledError) and adapter is not None:
                adapter.driver_connection.terminate()  # BEGIN may have been heard, and the pool would not know
            elif _is_connection_loss(err):
                await connection.invalidate()
            await connection.close()
            raise
        return connection, adapter.driver_connection


def refuse_in_transaction() -> None:
    """For whoever is about to call out over the network: raises ``RuntimeError`` inside ``db.transaction()``."""
    if _around.get() > 0:
        raise RuntimeError("a transaction is open during a call over the network")


def _options(isolation: str | None, read_only: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if isolation is not None:
        options["isolation_level"] = isolation
    if read_only:
        options["postgresql_readonly"] = True
    return options


def _refuse_dead(dbapi_connection: Any, record: Any, proxy: Any) -> None:
    """Pool check-out: a connection whose socket is known to be closed costs no round trip to refuse."""
    if dbapi_connection.driver_connection.is_closed():
        raise sa_exc.DisconnectionError("connection was closed by the server")


async def _rollback(connection: AsyncConnection) -> None:
    try:
        await asyncio.shield(connection.rollback())
    except (sa_exc.DBAPIError, *_DRIVER, OSError) as err:
        log.warning("rollback failed, connection dropped", extra={"f": {"error": type(err).__name__}})
        await connection.invalidate()


# 57P01..03: server shutting down or starting; class 08: connection exceptions; 25P03: idle in transaction timeout.
_LOSS = (
    asyncpg.exceptions.PostgresConnectionError,
    asyncpg.exceptions.AdminShutdownError,
    asyncpg.exceptions.CrashShutdownError,
    asyncpg.exceptions.CannotConnectNowError,
    asyncpg.exceptions.InterfaceError,
    # A statement on a connection whose end the server has announced, and whose socket is not closed yet.
    asyncpg.exceptions.InternalClientError,
    OSError,
)


def _is_connection_loss(err: BaseException) -> bool:
    if isinstance(err, sa_exc.DBAPIError):
        cause = getattr(err.orig, "__cause__", None)
        return err.connection_invalidated or isinstance(cause, _LOSS) or isinstance(err.orig, OSError)
    return isinstance(err, _LOSS) or isinstance(err.__cause__, _LOSS)


def _loss(err: BaseException, raw: asyncpg.Connection) -> BaseException | None:
    """``service.unavailable`` when ``err`` left a block because the connection was lost, else ``None``."""
    origin = err.orig.__cause__ if isinstance(err, sa_exc.DBAPIError) and err.orig is not None else err
    if isinstance(origin, asyncpg.InternalClientError):
        raw.terminate()  # its protocol is out of step: not back into the pool
    elif not isinstance(err, (sa_exc.DBAPIError, *_DRIVER)) or not raw.is_closed():
        return None
    log.warning("database connection lost", extra={"f": {"error": f"{type(err).__name__}: {err}"[:300]}})
    return Problem("service.unavailable", "the database connection was lost", headers={"Retry-After": "1"})


def _driver_error(err: BaseException) -> BaseException:
    """What the driver or the network said, without SQLAlchemy's wrappers."""
    if isinstance(err, sa_exc.DBAPIError) and err.orig is not None:
        err = err.orig
    return err.__cause__ if isinstance(err, AsyncAdapt_asyncpg_dbapi.Error) and err.__cause__ is not None else err


def _unavailable(err: BaseException) -> BaseException:
    origin = _driver_error(err)
    if isinstance(origin, asyncpg.exceptions.ClientConfigurationError):
        return Problem("config.invalid", f"setting database_url: {origin}", key="database_url")
    if isinstance(origin, ssl.SSLCertVerificationError):
        log.error("the database's certificate is refused", extra={"f": {"why": origin.verify_message}})
        hint = "sslrootcert in database_url names the CA of the database, its host the name in the certificate."
        return Problem(
            "service.unavailable", "the database's certificate is refused", hint=hint, headers={"Retry-After": "1"}
        )
    if _is_connection_loss(err) or isinstance(err, sa_exc.OperationalError | asyncpg.TooManyConnectionsError):
        log.warning("database unavailable", extra={"f": {"error": f"{type(err).__name__}: {err}"[:300]}})
        return Problem("service.unavailable", "the database does not answer", headers={"Retry-After": "1"})
    return err


def is_unique_violation(err: BaseException, constraint: str | None = None) -> bool:
    """Whether ``err`` is a unique violation (of the named constraint)."""
    origin = err.orig.__cause__ if isinstance(err, sa_exc.IntegrityError) and err.orig is not None else err
    if not isinstance(origin, asyncpg.UniqueViolationError):
        return False
    return constraint is None or origin.constraint_name == constraint
