"""How a report is written: CSV, JSON Lines, Parquet; read in one snapshot, streamed, in memory that does not grow with its rows.

CSV and JSON Lines leave PostgreSQL as they are written (COPY): Python passes on bytes and never sees a row. Parquet is made in
batches of rows, one row group after another, in a thread of its own.

    CSV          RFC 4180 with a head; times RFC 3339 in UTC; no value is nothing at all, an empty text is ""
    JSON Lines   an object a line, every column in each, null where there is no value
    Parquet      zstd; times are timestamps in UTC with microseconds, JSON is text
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from io import BufferedRandom
from pathlib import Path
from typing import Any, Final, Literal

import asyncpg

from portico.control.billing.export_datasets import Column, Dataset
from portico.kit.db import Reader

Format = Literal["csv", "jsonl", "parquet"]
MEDIA: Final = {
    "csv": "text/csv; charset=utf-8", "jsonl": "application/x-ndjson", "parquet": "application/vnd.apache.parquet",
}  # fmt: skip
_CHUNK: Final = 1 << 20
#: Rows that Parquet is made of at a time, and of one row group.
_BATCH: Final = 4096
_ROW_GROUP: Final = 65_536
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_DAY: Final = date(1970, 1, 1).toordinal()
_MICROSECOND: Final = timedelta(microseconds=1)
# What no JSON text and no number holds: with them COPY's CSV is the value itself.
_NO_QUOTE, _NO_DELIMITER = "\x01", "\x02"


class TooLarge(Exception):
    """More bytes than a report may have."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What goes in: of an organization (``None``: of all), of a period, up to a number of the ledger."""

    organization: str | None
    start: datetime
    end: datetime
    cut_off: int

    @property
    def parameters(self) -> tuple[Any, ...]:
        return self.organization, self.start, self.end, self.cut_off


@dataclass(frozen=True, slots=True)
class Written:
    """What a file holds."""

    rows: int
    size: int
    sha256: bytes


# -- the queries ---------------------------------------------------------------------------------------------------------


def _csv_expression(column: Column) -> str:
    x = column.sql
    match column.type:
        case "time":
            return f"""to_char({x} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
        case "text":
            # OWASP, CSV injection: a spreadsheet takes these for the beginning of a formula.
            return f"CASE WHEN left({x}, 1) IN ('=', '+', '-', '@', E'\\t', E'\\r', E'\\n') THEN '''' || ({x}) ELSE {x} END"
        case "json" | "boolean":
            return f"({x})::text"
    return x


def _select(dataset: Dataset, format_: Format) -> str:
    expression = _csv_expression if format_ == "csv" else lambda column: column.sql
    columns = ", ".join(f'{expression(column)} AS "{column.name}"' for column in dataset.columns)
    query = f"SELECT {columns} FROM {dataset.source} {dataset.conditions} ORDER BY {dataset.order}"  # noqa: S608
    if format_ == "jsonl":
        return f"SELECT row_to_json(x)::text FROM ({query}) AS x"  # noqa: S608 - our own words
    return query


async def totals(reader: Reader, dataset: Dataset, scope: Scope) -> dict[str, dict[str, int]]:
    """By currency, what the dataset adds up; nothing where it has no money."""
    if dataset.currency is None or dataset.totals is None:
        return {}
    sums = ", ".join(f'coalesce({sql}, 0)::bigint AS "{name}"' for name, sql in dataset.totals.items())
    query = f"""
        SELECT {dataset.currency} AS currency, {sums} FROM {dataset.source} {dataset.conditions}
        AND {dataset.currency} IS NOT NULL GROUP BY 1 ORDER BY 1
    """  # noqa: S608 - our own words
    rows = await reader.raw.fetch(query, *scope.parameters)
    return {row["currency"]: {name: row[name] for name in dataset.totals} for row in rows}


# -- writing -------------------------------------------------------------------------------------------------------------


async def write(
    reader: Reader, dataset: Dataset, scope: Scope, format_: Format, path: Path, most: int, seconds: float
) -> Written:
    """A new file, mode 0400 in the end, on the disk when this returns. ``reader`` holds a snapshot. Raises :class:`TooLarge`."""
    # Of this transaction alone: reading it all may take longer than a statement usually may.
    await reader.raw.execute(f"SET LOCAL statement_timeout = {int(seconds * 1000)}")
    await reader.raw.execute("SET LOCAL TIME ZONE 'UTC'")
    file = await asyncio.to_thread(_create, path)
    try:
        if format_ == "parquet":
            rows = await _parquet(reader, dataset, scope, file, most)
        else:
            rows = await _copied(reader, dataset, scope, format_, file, most)
        size, digest = await asyncio.to_thread(_finish, file, most)
    finally:
        await asyncio.to_thread(file.close)
    return Written(rows, size, digest)


def _create(path: Path) -> BufferedRandom:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b")


def _finish(file: BufferedRandom, most: int) -> tuple[int, bytes]:
    """What is on the disk: its size and its hash, read again."""
    file.flush()
    os.fsync(file.fileno())
    os.fchmod(file.fileno(), 0o400)
    size = file.seek(0, os.SEEK_END)
    if size > most:
        raise TooLarge(f"it has more than {most} bytes")
    file.seek(0)
    return size, hashlib.file_digest(file, "sha256").digest()


async def _copied(
    reader: Reader, dataset: Dataset, scope: Scope, format_: Format, file: BufferedRandom, most: int
) -> int:
    waiting = bytearray()
    written = 0

    async def put(data: bytes) -> None:
        nonlocal waiting, written
        waiting += data
        if len(waiting) >= _CHUNK:
            written += len(waiting)
            if written > most:
                raise TooLarge(f"it has more than {most} bytes")
            full, waiting = waiting, bytearray()
            await asyncio.to_thread(file.write, full)

    options: dict[str, Any] = {"format": "csv", "encoding": "utf8"}
    if format_ == "csv":
        options["header"] = True
    else:
        options |= {"quote": _NO_QUOTE, "delimiter": _NO_DELIMITER}
    said = await reader.raw.copy_from_query(_select(dataset, format_), *scope.parameters, output=put, **options)
    await asyncio.to_thread(file.write, waiting)
    return int(said.rpartition(" ")[2])


async def _parquet(reader: Reader, dataset: Dataset, scope: Scope, file: BufferedRandom, most: int) -> int:
    loop = asyncio.get_running_loop()
    batches = _batches(reader, dataset, scope)
    stopped: list[BaseException] = []
    rows = 0

    async def read() -> Sequence[asyncpg.Record]:
        async for batch in batches:
            return batch
        return ()

    def pull() -> Iterator[Sequence[asyncpg.Record]]:
        """In the writer's thread: the next batch, read by the loop. An error is kept: the writer makes another of it."""
        nonlocal rows
        try:
            while batch := asyncio.run_coroutine_threadsafe(read(), loop).result():
                if stopped:
                    return
                rows += len(batch)
                if file.tell() > most:
                    raise TooLarge(f"it has more than {most} bytes")
                yield batch
        except Exception as err:
            stopped.append(err)
            raise

    writing = asyncio.create_task(asyncio.to_thread(_write_parquet, dataset.columns, pull(), file))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError as err:
        # The thread reads by our connection: nobody else may have that before it has ended.
        stopped.append(err)
        await asyncio.wait([writing])
        raise
    except Exception:
        if stopped:
            raise stopped[0] from None
        raise
    return rows


async def _batches(reader: Reader, dataset: Dataset, scope: Scope) -> AsyncIterator[Sequence[asyncpg.Record]]:
    cursor = await reader.raw.cursor(_select(dataset, "parquet"), *scope.parameters)
    while rows := await cursor.fetch(_BATCH):
        yield rows


def _write_parquet(columns: Sequence[Column], batches: Iterator[Sequence[Any]], file: BufferedRandom) -> None:
    from arro3.core import RecordBatchReader, Schema
    from arro3.io import write_parquet

    schema = Schema([_field(column) for column in columns])
    made = (_record_batch(schema, columns, batch) for batch in batches)
    write_parquet(
        RecordBatchReader.from_batches(schema, made), file, compression="zstd(1)", max_row_group_size=_ROW_GROUP,
        created_by="portico",
    )  # fmt: skip


def _field(column: Column) -> Any:
    from arro3.core import DataType, Field

    kinds: dict[str, Callable[[], Any]] = {
        "text": DataType.utf8, "json": DataType.utf8, "integer": DataType.int64, "boolean": DataType.bool,
        "date": DataType.date32, "time": lambda: DataType.timestamp("us", tz="UTC"),
    }  # fmt: skip
    return Field(column.name, kinds[column.type](), nullable=True)


def _record_batch(schema: Any, columns: Sequence[Column], rows: Sequence[Any]) -> Any:
    from arro3.core import RecordBatch

    values = zip(*rows, strict=True)
    arrays = [_array(column, each) for column, each in zip(columns, values, strict=True)]
    return RecordBatch.from_arrays(arrays, schema=schema)


def _array(column: Column, values: Sequence[Any]) -> Any:
    from arro3.core import Array, DataType

    match column.type:
        case "time":
            ticks = [None if each is None else (each - _EPOCH) // _MICROSECOND for each in values]
            return Array(ticks, type=DataType.int64()).cast(DataType.timestamp("us", tz="UTC"))
        case "date":
            days = [None if each is None else each.toordinal() - _FIRST_DAY for each in values]
            return Array(days, type=DataType.int32()).cast(DataType.date32())
        case "integer":
            return Array(list(values), type=DataType.int64())
        case "boolean":
            return Array(list(values), type=DataType.bool())
    return Array(list(values), type=DataType.utf8())
