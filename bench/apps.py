"""The local apps behind every candidate, each a process of its own: `python -m bench.apps small|bulk FD`.

small   answers every request with :data:`SMALL_BODY`; only where nginx is missing, which is quicker
bulk    ``GET /download/N`` sends N MiB, ``POST /upload`` answers the size and CRC-32 of what it got

FD is the number of an inherited listening socket, so that nobody can take the port in between.
"""

from __future__ import annotations

import asyncio
import functools
import random
import socket
import sys
import threading
import zlib
from typing import cast

MIB = 1024 * 1024
SMALL_BODY = b'{"message": "hello from the local app", "items": [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]}'
PATTERN = memoryview(random.Random(20260713).randbytes(2 * MIB))


def piece(number: int) -> memoryview:
    """MiB ``number`` of the endless content that bulk bodies are made of; no two neighbours are alike."""
    start = (number * 4099) % MIB
    return PATTERN[start : start + MIB]


@functools.cache
def content_crc(mebibytes: int) -> int:
    """The CRC-32 of the first so many MiB of it."""
    crc = 0
    for number in range(mebibytes):
        crc = zlib.crc32(piece(number), crc)
    return crc


class Small(asyncio.Protocol):
    """Counts heads, answers each with the same bytes. It trusts its visitors: bodiless requests, whole heads."""

    HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(SMALL_BODY)
    ANSWER = HEAD + b"\r\n" + SMALL_BODY
    LAST = HEAD + b"Connection: close\r\n\r\n" + SMALL_BODY

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        data = self.rest + data
        count = data.count(b"\r\n\r\n")
        self.rest = b"" if data.endswith(b"\r\n\r\n") else data[data.rfind(b"\r\n\r\n") + 4 :] if count else data
        if b"\r\nconnection: close\r\n" in data.lower():
            self.transport.write(self.LAST)
            self.transport.close()
        else:
            self.transport.write(self.ANSWER * count)


async def serve_small(sock: socket.socket) -> None:
    server = await asyncio.get_running_loop().create_server(Small, sock=sock, backlog=1024)
    await server.serve_forever()


def serve_bulk(sock: socket.socket) -> None:
    while True:
        connection, _ = sock.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_bulk, args=(connection,), daemon=True).start()


def _bulk(connection: socket.socket) -> None:
    try:
        with connection, connection.makefile("rb", buffering=65536) as reader:
            while first := reader.readline():
                length = 0
                while (line := reader.readline().strip()) != b"":
                    name, _, value = line.partition(b":")
                    if name.strip().lower() == b"content-length":
                        length = int(value)
                crc = _taken(connection, reader.peek(1)[:length] if length else b"", length, reader)  # type: ignore[attr-defined]
                path = first.split()[1].decode()
                if path.startswith("/download/"):
                    count = int(path.rsplit("/", 1)[1])
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (count * MIB))
                    for number in range(count):
                        connection.sendall(piece(number))
                else:
                    body = SMALL_BODY if path == "/" else b"%d %08x" % (length, crc)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    except OSError:
        pass


def _taken(connection: socket.socket, buffered: bytes, length: int, reader: object) -> int:
    """Read a body to its end past the buffered reader; its CRC-32."""
    reader.read(len(buffered))  # type: ignore[attr-defined]
    crc, left, room = zlib.crc32(buffered), length - len(buffered), memoryview(bytearray(MIB))
    while left:
        got = connection.recv_into(room[: min(left, MIB)])
        if not got:
            raise ConnectionError("the body broke off")
        crc = zlib.crc32(room[:got], crc)
        left -= got
    return crc


def main(kind: str, number: str) -> None:
    sock = socket.socket(fileno=int(number))
    if kind == "bulk":
        serve_bulk(sock)
    else:
        import uvloop

        asyncio.Runner(loop_factory=uvloop.new_event_loop).run(serve_small(sock))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
