"""A visitor by hand: one request over a blocking socket, its answer checked byte by byte; bulk bodies checked by CRC."""

from __future__ import annotations

import socket
import ssl
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from bench.apps import MIB, content_crc, piece
from bench.figures import Refused

TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a candidate takes visitors of one app in. ``host`` is what the Host header says."""

    port: int
    host: str = "bench.example"
    tls: bool = False

    @property
    def url(self) -> str:
        """For programs that connect to 127.0.0.1 whatever the name; a TLS client says the name before it says the Host."""
        return f"https://{self.host}:{self.port}/" if self.tls else f"http://127.0.0.1:{self.port}/"

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.tls:
            return sock
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # a self-signed development certificate on loopback
        return context.wrap_socket(sock, server_hostname=self.host)


def head_of(endpoint: Endpoint, method: str, path: str, fields: Sequence[tuple[str, str]] = ()) -> bytes:
    """A request head with its final empty line."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {endpoint.host}", *(f"{name}: {value}" for name, value in fields)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Answer:
    """Reads one answer from ``sock``: head first, then the body by :meth:`into` or :meth:`body`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        data = bytearray()
        while (end := data.find(b"\r\n\r\n")) < 0:
            got = sock.recv(65536)
            if not got:
                raise Refused("the connection was closed before an answer")
            data += got
        self.head_bytes = end + 4
        head = bytes(data[:end]).decode("latin-1").split("\r\n")
        self.first = bytes(data[self.head_bytes :])
        self.status = int(head[0].split(" ", 2)[1])
        self.fields = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
        }
        if "content-length" not in self.fields:
            raise Refused(f"an answer without Content-Length (status {self.status})")
        self.length = int(self.fields["content-length"])

    def body(self) -> bytes:
        data = bytearray(self.first)
        while len(data) < self.length:
            got = self._sock.recv(65536)
            if not got:
                raise Refused(f"the body broke off after {len(data)} of {self.length} bytes")
            data += got
        return bytes(data)


def check(endpoint: Endpoint, expected: bytes, fields: Sequence[tuple[str, str]] = ()) -> int:
    """One ``GET /``; the size of the whole answer. Raises :class:`Refused` unless it is 200 with exactly ``expected``."""
    try:
        with endpoint.connect() as sock:
            sock.sendall(head_of(endpoint, "GET", "/", fields))
            answer = Answer(sock)
            body = answer.body()
    except OSError as err:
        raise Refused(f"no answer: {err}") from None
    if answer.status != 200 or body != expected:
        raise Refused(f"answered {answer.status} with {body[:80]!r} instead of 200 with {expected[:40]!r}…")
    return answer.head_bytes + len(body)


def download(endpoint: Endpoint, mebibytes: int) -> float:
    """``GET /download/N`` on one connection; its seconds. Raises :class:`Refused` unless every byte is right."""
    buffer = memoryview(bytearray(MIB))
    began = time.perf_counter()
    with endpoint.connect() as sock:
        sock.sendall(head_of(endpoint, "GET", f"/download/{mebibytes}"))
        answer = Answer(sock)
        if answer.status != 200 or answer.length != mebibytes * MIB:
            raise Refused(f"answered {answer.status} with {answer.length} bytes")
        crc, left = zlib.crc32(answer.first), answer.length - len(answer.first)
        while left:
            got = sock.recv_into(buffer[: min(left, MIB)])
            if not got:
                raise Refused(f"the download broke off with {left} bytes to come")
            crc = zlib.crc32(buffer[:got], crc)
            left -= got
        took = time.perf_counter() - began
    if crc != content_crc(mebibytes):
        raise Refused("the downloaded bytes are not those of the app")
    return took


def upload(endpoint: Endpoint, mebibytes: int) -> float:
    """``POST /upload`` on one connection; its seconds. The app answers with what it got: it must be what was sent."""
    began = time.perf_counter()
    with endpoint.connect() as sock:
        sock.sendall(head_of(endpoint, "POST", "/upload", [("Content-Length", str(mebibytes * MIB))]))
        for number in range(mebibytes):
            sock.sendall(piece(number))
        answer = Answer(sock)
        said = answer.body()
        took = time.perf_counter() - began
    expected = b"%d %08x" % (mebibytes * MIB, content_crc(mebibytes))
    if answer.status != 200 or said != expected:
        raise Refused(f"the app got {said[:60]!r}, sent was {expected!r}")
    return took
