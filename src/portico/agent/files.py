"""``file:///dir``: the agent answers from a folder itself.

Nothing outside of the folder is ever opened: names are checked, links are resolved first, and the resolved path is then
walked from the folder's own descriptor without following links, so that a link changed meanwhile leads nowhere.
Hidden names (a leading dot) do not exist.
"""

# ruff: noqa: PTH118, PTH206 - strings and descriptors on purpose: pathlib has no openat and no scandir of a descriptor

from __future__ import annotations

import asyncio
import contextlib
import html
import mimetypes
import os
import stat
import time
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

from portico.agent.recorder import Entry, Tap, head_bytes
from portico.agent.stats import Stats, request_id
from portico.agent.target import Target
from portico.settings import AgentSettings
from portico.wire import frames as f
from portico.wire.session import Session
from portico.wire.stream import Sink, Stream

#: Bytes read from disk at once.
CHUNK = 65_536
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}}
h1{{font-size:1.15rem;overflow-wrap:anywhere}}table{{border-collapse:collapse;width:100%}}
td{{padding:.3rem .5rem;border-top:1px solid #e3e6ea;overflow-wrap:anywhere}}
td+td{{text-align:right;white-space:nowrap;color:#5b6570}}
a{{color:#0b57d0;text-decoration:none}}a:hover{{text-decoration:underline}}
@media(prefers-color-scheme:dark){{body{{background:#14171a;color:#e4e7ea}}td{{border-color:#2b3036}}a{{color:#8ab4f8}}}}
</style></head><body><h1>{title}</h1><table>{rows}</table>{note}</body></html>
"""


class Found(NamedTuple):
    """An open file: the caller closes ``fd``."""

    fd: int
    size: int
    mtime: float
    etag: str
    kind: str


class Answer(NamedTuple):
    """A response head, with a body in memory or in ``found`` from ``start`` for ``length`` bytes."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes = b""
    found: Found | None = None
    start: int = 0
    length: int = 0


def split_path(target: bytes) -> list[str] | None:
    """The names in a request target; ``None`` when one of them must not be looked at."""
    raw = target.partition(b"?")[0]
    if not raw.startswith(b"/"):
        return None
    try:
        path = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        return None
    if "\0" in path or "\\" in path:
        return None
    names = [name for name in path.split("/") if name]
    return None if any(name.startswith(".") for name in names) else names


class Folder:
    """Looks files up below ``root``; every method blocks (it is called in a thread)."""

    def __init__(self, root: str, listing_max: int) -> None:
        self.root = os.path.realpath(root)
        self._listing_max = listing_max

    def open(self, names: list[str]) -> int | None:
        """A descriptor of the file or folder, or ``None`` when there is none that may be seen."""
        real = os.path.realpath(os.path.join(self.root, *names))
        if real != self.root and not real.startswith(self.root.rstrip(os.sep) + os.sep):
            return None
        parts = [part for part in real[len(self.root) :].split(os.sep) if part]
        if any(part.startswith(".") for part in parts):
            return None
        try:
            return self._walk(parts)
        except OSError:
            return None

    def _walk(self, parts: list[str]) -> int:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        if os.open not in os.supports_dir_fd:
            return os.open(os.path.join(self.root, *parts), flags | getattr(os, "O_BINARY", 0))
        fd = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
        for part in parts:
            try:
                deeper = os.open(part, flags, dir_fd=fd)
            finally:
                os.close(fd)
            fd = deeper
        return fd

    def answer(self, target: bytes, wants: dict[bytes, bytes]) -> Answer:
        """The response to GET ``target``; ``wants`` has the request's fields by lower-case name."""
        names = split_path(target)
        fd = None if names is None else self.open(names)
        if fd is None or names is None:
            return _text(404, "Not found")
        try:
            info = os.fstat(fd)
            if stat.S_ISDIR(info.st_mode):
                return self._folder(fd, names, target, wants)
            if not stat.S_ISREG(info.st_mode) or target.partition(b"?")[0].endswith(b"/"):
                return _text(404, "Not found")
            answer = _file(fd, info, names[-1], wants)
            if answer.found is not None:
                fd = -1  # the answer owns it now
            return answer
        finally:
            if fd >= 0:
                os.close(fd)

    def _folder(self, fd: int, names: list[str], target: bytes, wants: dict[bytes, bytes]) -> Answer:
        path, mark, query = target.partition(b"?")
        here = "".join("/" + quote(name) for name in names)
        if not path.endswith(b"/"):
            location = f"{here}/" + (mark + query).decode("latin-1")
            return Answer(301, [("Location", location), ("Content-Length", "0")])
        index = self.open([*names, "index.html"])
        if index is not None:
            info = os.fstat(index)
            if stat.S_ISREG(info.st_mode):
                answer = _file(index, info, "index.html", wants)
                if answer.found is None:
                    os.close(index)
                return answer
            os.close(index)
        return self._listing(fd, names)

    def _listing(self, fd: int, names: list[str]) -> Answer:
        entries: list[tuple[bool, str, int, float]] = []
        more = False
        source: Any = fd if os.scandir in os.supports_fd else os.path.join(self.root, *names)
        with os.scandir(source) as found:
            for entry in found:
                if entry.name.startswith(".") or not _encodable(entry.name):
                    continue
                if len(entries) >= self._listing_max:
                    more = True
                    break
                with contextlib.suppress(OSError):
                    info = entry.stat(follow_symlinks=False)
                    if stat.S_ISLNK(info.st_mode):
                        linked = self.open([*names, entry.name])
                        if linked is None:
                            continue
                        info = os.fstat(linked)
                        os.close(linked)
                    entries.append((stat.S_ISDIR(info.st_mode), entry.name, info.st_size, info.st_mtime))
        entries.sort(key=lambda e: (not e[0], e[1].casefold(), e[1]))
        title = html.escape("/" + "/".join(names))
        rows = ['<tr><td><a href="../">../</a></td><td></td><td></td></tr>'] if names else []
        for is_dir, name, size, mtime in entries:
            tail = "/" if is_dir else ""
            when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(mtime))
            rows.append(
                f'<tr><td><a href="./{quote(name)}{tail}">{html.escape(name)}{tail}</a></td>'
                f"<td>{'' if is_dir else _size(size)}</td><td>{when}</td></tr>"
            )
        note = "<p>More entries than are shown.</p>" if more else ""
        page = _PAGE.format(title=title, rows="".join(rows), note=note).encode()
        fields = [
            ("Content-Type", "text/html; charset=utf-8"),
            ("Content-Length", str(len(page))),
            ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'"),
            ("Cache-Control", "no-cache"),
            ("X-Content-Type-Options", "nosniff"),
        ]
        return Answer(200, fields, page)


def _encodable(name: str) -> bool:
    """Names that are not UTF-8 on disk have no URL here."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\\" not in name


def _size(size: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.1f} TB"


def _text(status: int, text: str, *extra: tuple[str, str]) -> Answer:
    body = f"{text}\n".encode()
    fields = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))), *extra]
    return Answer(status, fields, body)


def _file(fd: int, info: os.stat_result, name: str, wants: dict[bytes, bytes]) -> Answer:
    etag = f'"{info.st_mtime_ns:x}-{info.st_size:x}"'
    kind, encoding = mimetypes.guess_type(name)
    if kind is None or encoding is not None:
        kind = "application/octet-stream"
    if kind.startswith("text/") or kind in ("application/javascript", "application/json", "image/svg+xml"):
        kind += "; charset=utf-8"
    common = [
        ("ETag", etag),
        ("Last-Modified", formatdate(info.st_mtime, usegmt=True)),
        ("Cache-Control", "no-cache"),
        ("Accept-Ranges", "bytes"),
        ("X-Content-Type-Options", "nosniff"),
    ]
    if _unchanged(etag, info.st_mtime, wants):
        return Answer(304, common)
    found = Found(fd, info.st_size, info.st_mtime, etag, kind)
    span = _range(wants, found)
    if span == (0, -1):
        return _text(416, "Range not satisfiable", ("Content-Range", f"bytes */{info.st_size}"))
    fields = [("Content-Type", kind), *common]
    if span is None:
        return Answer(200, [*fields, ("Content-Length", str(info.st_size))], found=found, length=info.st_size)
    start, length = span
    fields += [
        ("Content-Range", f"bytes {start}-{start + length - 1}/{info.st_size}"),
        ("Content-Length", str(length)),
    ]
    return Answer(206, fields, found=found, start=start, length=length)


def _unchanged(etag: str, mtime: float, wants: dict[bytes, bytes]) -> bool:
    """RFC 9110, 13.2.2: If-None-Match decides alone when it is there."""
    match = wants.get(b"if-none-match")
    if match is not None:
        tags = {tag.strip().removeprefix(b"W/") for tag in match.split(b",")}
        return b"*" in tags or etag.encode() in tags
    since = _http_date(wants.get(b"if-modified-since"))
    return since is not None and int(mtime) <= since


def _http_date(value: bytes | None) -> float | None:
    if value is None:
        return None
    try:
        return parsedate_to_datetime(value.decode("latin-1")).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def _range(wants: dict[bytes, bytes], found: Found) -> tuple[int, int] | None:
    """``(start, length)`` of a single satisfiable range, ``(0, -1)`` for one outside, ``None`` for the whole file."""
    value = wants.get(b"range")
    if value is None or not value.startswith(b"bytes=") or b"," in value:
        return None
    condition = wants.get(b"if-range")
    if condition is not None and condition != found.etag.encode() and _http_date(condition) != int(found.mtime):
        return None
    first, dash, last = value[len(b"bytes=") :].strip().partition(b"-")
    if not dash or not (first + last).isdigit() or len(first + last) > 38:
        return None
    if not first:
        length = min(int(last), found.size)
        return (found.size - length, length) if length else (0, -1)
    start = int(first)
    end = min(int(last), found.size - 1) if last else found.size - 1
    if last and int(last) < start:
        return None
    return (start, end - start + 1) if start <= end else (0, -1)


class FileServer:
    """Serves the streams of one tunnel from a folder."""

    #: Where requests are recorded for the inspector, or nowhere.
    tap: Tap | None = None

    def __init__(self, target: Target, settings: AgentSettings, stats: Stats) -> None:
        self.target = target
        self.stats = stats
        self.folder = Folder(target.path, settings.listing_max_entries)
        self._tasks: set[asyncio.Task[None]] = set()

    def reveal(self) -> None:
        """Everything that runs is recorded from its start."""

    def on_request(self, stream: Stream, head: list[bytes], flags: int) -> Sink | None:
        """Start serving one request."""
        sink = _FileStream(self, stream, head, flags)
        task = asyncio.get_running_loop().create_task(sink.run())
        self._tasks.add(task)
        task.add_done_callback(sink.over)
        sink.task = task
        return sink

    def quick(self, session: Session, ident: int, payload: bytes) -> None:
        """Files know no requests by heart."""

    def on_open(self, stream: Stream, info: dict[str, Any]) -> Sink | None:
        """A folder has no TCP."""
        stream.reset(f.TARGET_REFUSED, "the target is a folder")
        return None

    async def probe(self) -> str | None:
        """Why the folder cannot be served now, or ``None``."""
        is_dir = await asyncio.to_thread(Path(self.target.path).is_dir)
        return None if is_dir else f"{self.target.path} is not a folder"

    @property
    def busy(self) -> bool:
        """Whether requests are in flight."""
        return bool(self._tasks)

    def retire(self) -> None:
        """Nothing is kept open between requests."""

    def forget(self, task: asyncio.Task[None]) -> None:
        """A request is over."""
        self._tasks.discard(task)

    async def abort(self) -> None:
        """Cut everything."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _FileStream:
    """One request for a file."""

    def __init__(self, server: FileServer, stream: Stream, head: list[bytes], flags: int) -> None:
        self.stream = stream
        self.status = 499
        self.started = time.perf_counter()
        tap = server.tap
        self.entry: Entry | None = tap.begin(head_bytes(head), flags, self.started) if tap is not None else None
        self.task: asyncio.Task[None] | None = None
        self._server = server
        self._head = head
        self._credit = asyncio.Event()

    async def run(self) -> None:
        """Answer; the stream is over afterwards."""
        stats, head = self._server.stats, self._head
        stats.opened()
        try:
            self.status = await self._answer(head[0], head[1])
        except OSError:
            self.status = 500
            self.stream.reset(f.TARGET_RESET, "the file could not be read to its end")
        finally:
            stats.closed()
            stats.done(head[0], head[1], self.status, self.started, request_id(head))
            self._close_entry()

    def over(self, task: asyncio.Task[None]) -> None:
        """The task has ended, or was cancelled before it began."""
        self._server.forget(task)
        self._close_entry()

    def _close_entry(self) -> None:
        if self.entry is not None and not self.entry.ended:
            self.entry.finish(self.status)

    async def _answer(self, method: bytes, target: bytes) -> int:
        if method not in (b"GET", b"HEAD"):
            answer = _text(405, "Only GET and HEAD", ("Allow", "GET, HEAD"))
        else:
            wants = {name.lower(): value for name, value in zip(self._head[2::2], self._head[3::2], strict=True)}
            answer = await self._open(target, wants)
        try:
            await self._send(answer, bodiless=method == b"HEAD")
        finally:
            if answer.found is not None:
                os.close(answer.found.fd)
        return answer.status

    async def _open(self, target: bytes, wants: dict[bytes, bytes]) -> Answer:
        """Look the file up in a thread; one that is found after the visitor left is closed again."""
        work = asyncio.get_running_loop().run_in_executor(None, self._server.folder.answer, target, wants)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_close_unused)
            raise

    async def _send(self, answer: Answer, bodiless: bool) -> None:
        stream = self.stream
        fields = [part.encode("latin-1", "replace") for pair in answer.fields for part in pair]
        empty = bodiless or answer.status == 304 or not (answer.body or answer.length)
        payload = stream.send_response(answer.status, [b"", *fields], end=empty)
        if self.entry is not None:
            self.entry.answer(answer.status, payload)
        if not empty and answer.found is None:
            await self._send_bytes(answer.body, end=True)
        elif not empty and answer.found is not None:
            await self._send_file(answer.found.fd, answer.start, answer.length)
        if not stream.closed:
            stream.reset(f.NO_ERROR, "the answer is complete")

    async def _send_file(self, fd: int, at: int, left: int) -> None:
        loop = asyncio.get_running_loop()
        while left:
            data = await loop.run_in_executor(None, _read_at, fd, min(CHUNK, left), at)
            if not data:
                self.stream.reset(f.TARGET_RESET, "the file became shorter while it was sent")
                return
            at += len(data)
            left -= len(data)
            await self._send_bytes(data, end=left == 0)

    async def _send_bytes(self, data: bytes, end: bool) -> None:
        stream = self.stream
        while data:
            room = stream.sendable()
            if room <= 0:
                self._credit.clear()
                stream.wait()
                await self._credit.wait()
                continue
            part, data = data[:room], data[room:]
            if self.entry is not None:
                self.entry.response_data(part)
            stream.send_data(part, end and not data)

    def on_credit(self) -> None:
        self._credit.set()

    def on_reset(self, code: int, detail: str) -> None:
        if self.entry is not None:
            self.entry.abort(detail)
        if self.task is not None:
            self.task.cancel()

    def on_data(self, data: bytes, end: bool) -> None:
        """A body on a request for a file is read and forgotten."""
        if self.entry is not None:
            self.entry.request_data(data)
            if end:
                self.entry.request_end([])
        self.stream.consumed(len(data))

    def on_end(self, trailers: list[bytes]) -> None:
        if self.entry is not None:
            self.entry.request_end(trailers)

    def on_response(self, status: int, head: list[bytes], end: bool) -> None: ...
    def on_interim(self, status: int, head: list[bytes]) -> None: ...
    def on_opened(self) -> None: ...


def _read_at(fd: int, size: int, at: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, size, at)
    os.lseek(fd, at, os.SEEK_SET)
    return os.read(fd, size)


def _close_unused(work: asyncio.Future[Answer]) -> None:
    if not work.cancelled() and work.exception() is None and (found := work.result().found) is not None:
        os.close(found.fd)
