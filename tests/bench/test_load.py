"""Both load generators against real apps, right ones and wrong ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import load
from bench.apps import SMALL_BODY
from bench.figures import Refused
from bench.load import Work, drive, parse_wrk
from bench.processes import Child, environment, listener
from bench.visit import Endpoint, check, download, upload
from tests.relay.authorities import certificate

LINE = '{"requests":7,"duration_us":1500000,"bytes":700,"errors":{"read":1},"p50_us":12.5,"p99_us":80.0}'


def test_the_json_line_is_found_in_what_wrk_prints() -> None:
    seen = parse_wrk(f"Running 1s test\n  Thread Stats\n\n{LINE}\n")
    assert (seen.requests, seen.seconds, seen.read_bytes, seen.errors) == (7, 1.5, 700, {"read": 1})
    assert (seen.p50_us, seen.p99_us) == (12.5, 80.0)


def test_an_output_without_figures_is_refused() -> None:
    with pytest.raises(Refused, match="unable to connect"):
        parse_wrk("unable to connect to 127.0.0.1:1 Connection refused")


def _app(kind: str, folder: Path) -> Iterator[Endpoint]:
    sock = listener()
    argv = [sys.executable, "-m", "bench.apps", kind, str(sock.fileno())]
    child = Child(kind, argv, folder, environment(), [sock.fileno()])
    port = int(sock.getsockname()[1])
    sock.close()
    yield Endpoint(port)
    child.end()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Endpoint]:
    yield from _app("small", tmp_path)


@pytest.fixture
def bulk(tmp_path: Path) -> Iterator[Endpoint]:
    yield from _app("bulk", tmp_path)


@pytest.fixture(params=["wrk", "own"])
def generator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each load generator in turn; wrk only where it is installed."""
    name = str(request.param)
    if name == "wrk" and not shutil.which("wrk"):
        pytest.skip("wrk is not installed")
    monkeypatch.setattr(load, "generator", lambda: name)
    return name


@pytest.mark.parametrize("fields", [[], load.BROWSER_FIELDS, [("Connection", "close")]])
def test_a_right_app_gives_a_figure(generator: str, small: Endpoint, fields: load.Fields) -> None:
    seen = drive(small, Work(4, 1.0, fields))
    assert seen.requests > 100
    assert 0 < seen.p50_us <= seen.p99_us


class Shielded:
    """An HTTPS app that closes every connection which it answered once; ``names`` are those that visitors asked for (SNI)."""

    def __init__(self, folder: Path) -> None:
        self.names: set[str | None] = set()
        pem = folder / "app.pem"
        pem.write_bytes(certificate("app.example.com").pem)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(pem)
        self.context.sni_callback = lambda sock, name, context: self.names.add(name)
        self.sock = listener()
        self.endpoint = Endpoint(int(self.sock.getsockname()[1]), "app.example.com", tls=True)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.sock.accept()[0],), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        close = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(SMALL_BODY), SMALL_BODY)
        with contextlib.suppress(OSError), self.context.wrap_socket(plain, server_side=True) as connection:
            connection.recv(65536)
            connection.sendall(close)
            connection.unwrap()


def test_tls_with_the_name_of_the_endpoint(generator: str, tmp_path: Path) -> None:
    """The name need not resolve, and is what the app is asked for: it chooses certificate and tunnel."""
    app = Shielded(tmp_path)
    try:
        assert drive(app.endpoint, Work(2, 1.0)).requests > 10
    finally:
        app.sock.close()
    assert app.names == {"app.example.com"}


class Liar:
    """An app whose first answer, the one that is checked, is right; later ones are ``wrong``."""

    def __init__(self, wrong: bytes) -> None:
        self.wrong, self.answers = wrong, 0
        self.sock = listener()
        self.endpoint = Endpoint(int(self.sock.getsockname()[1]))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.sock.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        right = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(SMALL_BODY), SMALL_BODY)
        with connection, contextlib.suppress(OSError):
            while connection.recv(65536):
                self.answers += 1
                # The generators of this test make more than a handful of requests; the checks make one each.
                connection.sendall(self.wrong if self.answers % 2 == 0 else right)


WRONG = {
    "status": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: %d\r\n\r\n%b" % (len(SMALL_BODY), SMALL_BODY),
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_one_wrong_answer_in_two_refuses_the_figure(generator: str, wrong: str) -> None:
    app = Liar(WRONG[wrong])
    try:
        with pytest.raises(Refused):
            drive(app.endpoint, Work(1, 1.0))
    finally:
        app.sock.close()


def test_a_wrong_body_of_the_right_length_is_refused_by_the_check() -> None:
    body = b"x" * len(SMALL_BODY)
    app = Liar(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    try:
        check(app.endpoint, SMALL_BODY)
        with pytest.raises(Refused, match="instead of 200"):
            check(app.endpoint, SMALL_BODY)
    finally:
        app.sock.close()


def test_nobody_there_is_a_refusal_not_a_traceback() -> None:
    with pytest.raises(Refused, match="no answer"):
        check(Endpoint(1), SMALL_BODY)


def test_bulk_bodies_arrive_and_are_checked(bulk: Endpoint) -> None:
    assert download(bulk, 3) > 0
    assert upload(bulk, 3) > 0


def test_a_download_with_one_wrong_byte_is_refused() -> None:
    mebibyte = 1024 * 1024
    sock = listener()

    def serve() -> None:
        connection, _ = sock.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % mebibyte + os.urandom(mebibyte))

    threading.Thread(target=serve, daemon=True).start()
    with sock, pytest.raises(Refused, match="not those of the app"):
        download(Endpoint(int(sock.getsockname()[1])), 1)
