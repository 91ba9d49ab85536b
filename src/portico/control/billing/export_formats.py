"""How a report is written: CSV, JSON Lines, Parquet; read in one snapshot, streamed, in memory that does not grow with its rows.

CSV leaves PostgreSQL as it is written (COPY): Python passes on bytes and never sees a row. The others are made of columns, some
thousand values of each at a time, by Arrow, which writes JSON in a third less time than PostgreSQL; the next values are read
while a thread writes those before. JSON inside of JSON is PostgreSQL's alone to write: such datasets leave it by COPY, too.

    CSV          RFC 4180 with a head; times RFC 3339 in UTC; no value is nothing at all, an empty text is ""
    JSON Lines   an object a line, every column in each, null where there is no value; times RFC 3339 in UTC
    Parquet      zstd; times are timestamps in UTC with microseconds, JSON is text
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import struct
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from io import BufferedRandom
from pathlib import Path
from typing import Any, Final, Literal

import asyncpg

from portico.control.billing.export_datasets import Column, Dataset
from portico.kit import cells
from portico.kit.db import Reader

Format = Literal["csv", "jsonl", "parquet"]
MEDIA: Final = {
    "csv": "text/csv; charset=utf-8", "jsonl": "application/x-ndjson", "parquet": "application/vnd.apache.parquet",
}  # fmt: skip
_CHUNK: Final = 1 << 20
#: Rows that are read at a time, and of one row group of Parquet.
_BATCH: Final = 4096
_ROW_GROUP: Final = 65_536
# What no JSON text and no number holds: with them COPY's CSV is the value itself.
_NO_QUOTE, _NO_DELIMITER = "\x01", "\x02"
# The characters by which a spreadsheet takes a text for a formula, as numbers: comparing those costs the least.
_FORMULA: Final = ", ".join(str(ord(character)) for character in cells.FORMULA)


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


# -- the queries ---------------------------------------------------------------------------------------------------------


def _csv_expression(column: Column) -> str:
    x = column.sql
    match column.type:
        case "time":
            return _time_text(x)
        case "text":
            # As ``cells.safe`` does it. Most texts begin with none of them and no space: they are looked at once.
            begins = f"ascii({x}) IN (32, {_FORMULA}) AND ascii(ltrim({x}, ' ')) IN ({_FORMULA})"
            return f"CASE WHEN {begins} THEN '''' || ({x}) ELSE {x} END"
        case "json" | "boolean":
            return f"({x})::text"
    return x


def _json_expression(column: Column) -> str:
    return _time_text(column.sql) if column.type == "time" else column.sql


def _arrow_expression(column: Column) -> str:
    """What Arrow has of it, in the fewest steps: days, and eight bytes of microseconds, since 1970. PostgreSQL counts since 2000,
    which is 10957 days later."""
    match column.type:
        case "time":
            return f"timestamptz_send({column.sql} + interval '10957 days')"
        case "date":
            return f"({column.sql} - DATE '1970-01-01')"
        case "json":
            return f"({column.sql})::text"
    return column.sql


def _time_text(x: str) -> str:
    return f"""to_char({x} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""


def _select(dataset: Dataset, expression: Callable[[Column], str]) -> str:
    columns = ", ".join(f'{expression(column)} AS "{column.name}"' for column in dataset.columns)
    return f"SELECT {columns} FROM {dataset.source} {dataset.conditions} ORDER BY {dataset.order}"  # noqa: S608 - our own words


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
    reader: Reader, dataset: Dataset, scope: Scope, format_: Format, file: BufferedRandom, most: int, seconds: float
) -> int:
    """The rows of a report into a file of :func:`create`; how many. ``reader`` holds a snapshot. Raises :class:`TooLarge`."""
    # Of this transaction alone: reading it all may take longer than a statement usually may.
    await reader.raw.execute(f"SET LOCAL statement_timeout = {int(seconds * 1000)}")
    await reader.raw.execute("SET LOCAL TIME ZONE 'UTC'")
    if format_ == "csv":
        options: dict[str, Any] = {"header": True}
        return await _copied(reader, _select(dataset, _csv_expression), scope, file, most, options)
    if format_ == "jsonl" and any(column.type == "json" for column in dataset.columns):
        query = f"SELECT row_to_json(x)::text FROM ({_select(dataset, _json_expression)}) AS x"  # noqa: S608 - our own words
        return await _copied(reader, query, scope, file, most, {"quote": _NO_QUOTE, "delimiter": _NO_DELIMITER})
    async with aclosing(_batches(reader, dataset, scope)) as batches:
        return await _by_column(dataset.columns, batches, file, most, _WRITERS[format_])


def create(path: Path) -> BufferedRandom:
    """A new file, its owner's alone."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b")


def finish(file: BufferedRandom, path: Path, most: int) -> tuple[int, bytes]:
    """See to it that file and name are on the disk, mode 0400; the size and the hash of what is there, read again. Raises
    :class:`TooLarge`. It waits for the disk, for long if the file is large: no transaction may be open meanwhile."""
    file.flush()
    os.fsync(file.fileno())
    os.fchmod(file.fileno(), 0o400)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    size = file.seek(0, os.SEEK_END)
    _bound(size, most)
    file.seek(0)
    return size, hashlib.file_digest(file, "sha256").digest()


def _bound(size: int, most: int) -> None:
    if size > most:
        raise TooLarge(f"it has more than {most} bytes")


async def _copied(
    reader: Reader, query: str, scope: Scope, file: BufferedRandom, most: int, options: dict[str, Any]
) -> int:
    waiting = bytearray()
    written = 0

    async def put(data: bytes) -> None:
        nonlocal waiting, written
        waiting += data
        if len(waiting) >= _CHUNK:
            written += len(waiting)
            _bound(written, most)
            full, waiting = waiting, bytearray()
            await asyncio.to_thread(file.write, full)

    said = await reader.raw.copy_from_query(
        query, *scope.parameters, output=put, format="csv", encoding="utf8", **options
    )
    await asyncio.to_thread(file.write, waiting)
    return int(said.rpartition(" ")[2])


# -- by column ------------------------------------------------------------------------------------------

Batch = Sequence[asyncpg.Record]


async def _batches(reader: Reader, dataset: Dataset, scope: Scope) -> AsyncGenerator[Batch, None]:
    """The rows, some at a time; the next ones are on their way while whoever asked for these writes them."""
    cursor = await reader.raw.cursor(_select(dataset, _arrow_expression), *scope.parameters)
    ahead = asyncio.ensure_future(cursor.fetch(_BATCH))
    try:
        while rows := await ahead:
            ahead = asyncio.ensure_future(cursor.fetch(_BATCH))
            yield rows
    finally:
        ahead.cancel()
        await asyncio.gather(ahead, return_exceptions=True)


async def _by_column(
    columns: Sequence[Column], batches: AsyncGenerator[Batch, None], file: BufferedRandom, most: int,
    write_all: Callable[[Any, Any], None],
) -> int:  # fmt: skip
    loop = asyncio.get_running_loop()
    stopped: list[BaseException] = []
    sink = _Sink(file, stopped)
    rows = 0

    async def read() -> Batch:
        async for batch in batches:
            return batch
        return ()

    def pull() -> Iterator[Batch]:
        """In the writer's thread: the next batch, read by the loop. An error is kept: the writer makes another of it."""
        nonlocal rows
        try:
            while batch := asyncio.run_coroutine_threadsafe(read(), loop).result():
                if stopped:
                    return
                rows += len(batch)
                _bound(file.tell(), most)
                yield batch
        except Exception as err:
            stopped.append(err)
            raise

    writing = asyncio.create_task(asyncio.to_thread(_write, columns, pull(), sink, write_all))
    try:
        await asyncio.shield(writing)
        if stopped:
            raise stopped[0]
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


class _Sink:
    """The file as Arrow's writer has it, which panics when a write fails: an error is kept, and the rest is dropped."""

    def __init__(self, file: BufferedRandom, stopped: list[BaseException]) -> None:
        self._file, self._stopped = file, stopped

    def write(self, data: bytes) -> int:
        if not self._stopped:
            try:
                self._file.write(data)
            except OSError as err:
                self._stopped.append(err)
        return len(data)

    def flush(self) -> None:
        """Nothing: ``finish`` does it."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Asked for, and not used: all is written from the beginning to the end."""
        return self._file.seek(offset, whence)


def _write(
    columns: Sequence[Column], batches: Iterator[Batch], sink: _Sink, write_all: Callable[[Any, Any], None]
) -> None:
    from arro3.core import RecordBatchReader, Schema

    schema = Schema([_field(column) for column in columns])
    made = (_record_batch(schema, columns, batch) for batch in batches)
    write_all(RecordBatchReader.from_batches(schema, made), sink)


def _write_parquet(data: Any, sink: Any) -> None:
    from arro3.io import write_parquet

    write_parquet(data, sink, compression="zstd(1)", max_row_group_size=_ROW_GROUP, created_by="portico")


def _write_lines(data: Any, sink: Any) -> None:
    from arro3.io import write_ndjson

    write_ndjson(data, sink, explicit_nulls=True)


_WRITERS: Final = {"jsonl": _write_lines, "parquet": _write_parquet}


def _field(column: Column) -> Any:
    from arro3.core import DataType, Field

    kinds: dict[str, Callable[[], Any]] = {
        "text": DataType.utf8, "json": DataType.utf8, "integer": DataType.int64, "boolean": DataType.bool,
        "date": DataType.date32, "time": lambda: DataType.timestamp("us", tz="UTC"),
    }  # fmt: skip
    return Field(column.name, kinds[column.type](), nullable=True)


def _record_batch(schema: Any, columns: Sequence[Column], rows: Batch) -> Any:
    from arro3.core import RecordBatch

    values = zip(*rows, strict=True)
    arrays = [_array(column, each) for column, each in zip(columns, values, strict=True)]
    return RecordBatch.from_arrays(arrays, schema=schema)


def _array(column: Column, values: Sequence[Any]) -> Any:
    """The values of a column as :func:`_arrow_expression` gives them."""
    from arro3.core import Array, DataType

    match column.type:
        case "time":
            return Array(_ticks(values), type=DataType.int64()).cast(DataType.timestamp("us", tz="UTC"))
        case "date":
            return Array(list(values), type=DataType.int32()).cast(DataType.date32())
        case "integer":
            return Array(list(values), type=DataType.int64())
        case "boolean":
            return Array(list(values), type=DataType.bool())
    return Array(list(values), type=DataType.utf8())


def _ticks(values: Sequence[bytes | None]) -> list[int | None]:
    """Numbers of eight bytes each; those of a column without gaps in one step."""
    if None not in values:
        return list(struct.unpack(f">{len(values)}q", b"".join(values)))  # type: ignore[arg-type]
    return [None if each is None else int.from_bytes(each, "big", signed=True) for each in values]
