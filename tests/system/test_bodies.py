"""Bodies of any size through a tunnel: whole, unchanged, in bounded memory, and a slow reader costs nobody else."""

from __future__ import annotations

import selectors
import socket
import threading
import time
import zlib
from collections.abc import Iterator

import pytest

from tests.system.memory import MemoryWatch, resident
from tests.system.platform import Agent, Up
from tests.system.targets import MIB, BulkApp, content_crc, piece

pytestmark = [pytest.mark.system, pytest.mark.realtime]

GROWTH_MIB = 40
WHOLE_MIB = 1024
SLOW_READERS = 200
SLOW_MIB = 64
FAST_MIB = 96
FAST_SHARE = 0.8
FAST_ROUNDS = 4


@pytest.fixture(scope="module", autouse=True)
def bulk(target: socket.socket) -> Iterator[BulkApp]:
    """The app that makes and checks the bodies."""
    app = BulkApp(target)
    yield app
    app.close()


@pytest.fixture(scope="module")
def pids(up: Up, agent: Agent) -> dict[str, int]:
    return {"relay": up.pid("relay-1"), "agent": agent.pid}


@pytest.fixture(scope="module")
def idle(up: Up, host: str, bulk: BulkApp, pids: dict[str, int]) -> dict[str, int]:
    """Resident memory after one small request; once for the module, so that nothing of one test excuses the next."""
    download(up.http_port, host, 1)
    time.sleep(0.2)
    return {name: resident(pid) for name, pid in pids.items()}


def connect(port: int, receive_buffer: int = 0) -> socket.socket:
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(60)
    sock.connect(("127.0.0.1", port))
    return sock


def read_head(sock: socket.socket) -> tuple[bytes, bytearray]:
    """The response head, and what came after it."""
    got = bytearray()
    while b"\r\n\r\n" not in got:
        data = sock.recv(4096)
        assert data, f"connection closed after {bytes(got)!r}"
        got += data
    head, _, rest = bytes(got).partition(b"\r\n\r\n")
    return head, bytearray(rest)


def download(port: int, host: str, mebibytes: int) -> float:
    """Fetch and check that much; seconds from the request to the last byte."""
    with connect(port) as sock:
        began = time.monotonic()
        sock.sendall(f"GET /download/{mebibytes} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head, rest = read_head(sock)
        assert head.startswith(b"HTTP/1.1 200 "), head
        crc, size = zlib.crc32(rest), len(rest)
        buffer = memoryview(bytearray(MIB))
        while size < mebibytes * MIB:
            got = sock.recv_into(buffer)
            assert got, f"the body ended after {size} bytes"
            crc = zlib.crc32(buffer[:got], crc)
            size += got
        seconds = time.monotonic() - began
    assert size == mebibytes * MIB
    assert crc == content_crc(mebibytes), "the bytes are not those that the target sent"
    return seconds


def test_download_of_1_gib_in_bounded_memory(up: Up, host: str, pids: dict[str, int], idle: dict[str, int]) -> None:
    with MemoryWatch(pids, idle) as watch:
        seconds = download(up.http_port, host, WHOLE_MIB)
    print(f"1 GiB down in {seconds:.1f} s")
    watch.assert_within(GROWTH_MIB)


def test_upload_of_1_gib_in_bounded_memory(up: Up, host: str, pids: dict[str, int], idle: dict[str, int]) -> None:
    with MemoryWatch(pids, idle) as watch, connect(up.http_port) as sock:
        began = time.monotonic()
        sock.sendall(f"POST /upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: {WHOLE_MIB * MIB}\r\n\r\n".encode())
        for number in range(WHOLE_MIB):
            sock.sendall(piece(number))
        head, body = read_head(sock)
    print(f"1 GiB up in {time.monotonic() - began:.1f} s")
    assert head.startswith(b"HTTP/1.1 200 "), head
    assert bytes(body) == b"%d %08x" % (WHOLE_MIB * MIB, content_crc(WHOLE_MIB)), "not the bytes that were sent"
    watch.assert_within(GROWTH_MIB)


class SlowReader:
    """Reads the head and a little, then next to nothing; everything it reads is checked."""

    def __init__(self, port: int, host: str) -> None:
        self.sock = connect(port, receive_buffer=8192)
        self.sock.sendall(f"GET /download/{SLOW_MIB} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head, rest = read_head(self.sock)
        assert head.startswith(b"HTTP/1.1 200 "), head
        self.size = 0
        self._take(bytes(rest))

    def read(self, limit: int) -> int:
        """At most ``limit`` bytes of what is there."""
        data = self.sock.recv(limit)
        assert data, f"a slow reader was cut off after {self.size} bytes"
        self._take(data)
        return len(data)

    def _take(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            number, offset = divmod(self.size, MIB)
            expected = piece(number)[offset : offset + len(data) - at]
            assert data[at : at + len(expected)] == expected, f"a slow reader got wrong bytes near {self.size}"
            at += len(expected)
            self.size += len(expected)


def trickle(readers: list[SlowReader], over: threading.Event, faults: list[BaseException]) -> None:
    """1 KiB a second for each of them."""
    try:
        while not over.is_set():
            for reader in readers:
                reader.read(1024)
                if over.wait(1.0 / len(readers)):
                    return
    except BaseException as err:
        faults.append(err)


def read_more(readers: list[SlowReader], size: int) -> None:
    """Every one of them reads ``size`` bytes more, as fast as they come."""
    goal = {reader: reader.size + size for reader in readers}
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            selector.register(reader.sock, selectors.EVENT_READ, reader)
        deadline = time.monotonic() + 60
        while selector.get_map():
            assert time.monotonic() < deadline, f"{len(selector.get_map())} slow readers got no more data"
            for key, _ in selector.select(1.0):
                key.data.read(65536)
                if key.data.size >= goal[key.data]:
                    selector.unregister(key.fileobj)


def beside_slow_readers(port: int, host: str) -> float:
    """Seconds of the fast download, the best of three, while 200 others stand all but still; they are served to the end."""
    readers: list[SlowReader] = []
    over, faults = threading.Event(), list[BaseException]()
    trickling = threading.Thread(target=trickle, args=(readers, over, faults))
    try:
        readers += [SlowReader(port, host) for _ in range(SLOW_READERS)]
        trickling.start()
        time.sleep(1.0)  # until every buffer on the way is full
        seconds = min(download(port, host, FAST_MIB) for _ in range(3))
        over.set()
        trickling.join()
        assert not faults, faults[0]
        read_more(readers, MIB // 2)
        return seconds
    finally:
        over.set()
        for reader in readers:
            reader.sock.close()


def test_200_slow_readers_beside_a_fast_one(up: Up, host: str, pids: dict[str, int], idle: dict[str, int]) -> None:
    """Rounds, because what else this machine does meanwhile hits one measurement and not the other; each is a pair."""
    shares = []
    with MemoryWatch(pids, idle) as watch:
        for _ in range(FAST_ROUNDS):
            alone = min(download(up.http_port, host, FAST_MIB) for _ in range(3))
            beside = beside_slow_readers(up.http_port, host)
            print(
                f"fast reader: {FAST_MIB / alone:.0f} MiB/s alone, {FAST_MIB / beside:.0f} beside {SLOW_READERS} slow"
            )
            shares.append(round(alone / beside, 2))
            if shares[-1] >= FAST_SHARE:
                break
    watch.assert_within(GROWTH_MIB)
    assert max(shares) >= FAST_SHARE, f"the fast reader kept {shares} of its speed"
