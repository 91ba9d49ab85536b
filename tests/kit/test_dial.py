"""Several addresses for one name: a dead one costs a fraction of a second, and no socket is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from portico.kit import dial
from tests.timing import PATIENCE_SECONDS


@contextlib.contextmanager
def listener(host: str = "127.0.0.1", port: int = 0) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(64)
        yield sock


@contextlib.contextmanager
def blackhole(host: str) -> Iterator[int]:
    """A port where nothing is refused and nothing answers: a listener whose queue is full drops what comes."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        sock.listen(0)
        waiting = []
        for _ in range(4):
            filler = socket.socket(sock.family)
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(sock.getsockname())
            waiting.append(filler)
        yield sock.getsockname()[1]
        for filler in waiting:
            filler.close()


def address(host: str, port: int) -> dial.Address:
    family, where = (socket.AF_INET6, (host, port, 0, 0)) if ":" in host else (socket.AF_INET, (host, port))
    return family, socket.SOCK_STREAM, 0, "", where


def open_sockets() -> int:
    return sum(
        os.readlink(entry).startswith("socket:") for entry in Path("/proc/self/fd").iterdir() if os.path.lexists(entry)
    )


class TestRace:
    async def test_a_refused_address_costs_nothing(self) -> None:
        with listener() as sock:
            port = sock.getsockname()[1]
            began = time.monotonic()
            found = await dial.race([address("127.0.0.2", 1), address("::1", 1), address("127.0.0.1", port)], delay=600)
            assert time.monotonic() - began < PATIENCE_SECONDS
            assert found.getpeername() == ("127.0.0.1", port)
            found.close()

    async def test_a_silent_address_costs_a_fraction_of_a_second(self) -> None:
        with blackhole("127.0.0.2") as dead, listener("::1") as sock:
            before = open_sockets()
            began = time.monotonic()
            found = await dial.race([address("127.0.0.2", dead), address("::1", sock.getsockname()[1])])
            assert dial.ATTEMPT_DELAY <= time.monotonic() - began < PATIENCE_SECONDS
            assert found.getpeername()[0] == "::1"
            found.close()
            assert open_sockets() == before

    async def test_a_slow_address_may_still_win(self) -> None:
        """The first is not given up when the second is tried: what answers first is taken."""
        with blackhole("127.0.0.2") as dead:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await dial.race([address("127.0.0.2", dead), address("127.0.0.1", 1)])

    async def test_cancelling_leaves_no_socket(self) -> None:
        with blackhole("127.0.0.2") as dead:
            before = open_sockets()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await dial.race([address("127.0.0.2", dead)] * 3, delay=0.01)
            assert open_sockets() == before

    async def test_the_error_says_what_each_address_did(self) -> None:
        with pytest.raises(OSError) as one:
            await dial.race([address("127.0.0.1", 1)])
        assert dial.reason(one.value) == "Connection refused" and one.value.errno == errno.ECONNREFUSED
        with pytest.raises(OSError) as same:
            await dial.race([address("::1", 1), address("127.0.0.1", 1)])
        assert dial.reason(same.value) == "Connection refused (tried [::1], 127.0.0.1)"
        with pytest.raises(OSError) as each:
            await dial.race([address("127.0.0.1", 1), address("255.255.255.255", 1)])
        assert dial.reason(each.value).startswith("127.0.0.1: Connection refused; 255.255.255.255: ")

    async def test_no_address_at_all(self) -> None:
        with pytest.raises(socket.gaierror):
            await dial.race([])


class TestNames:
    async def test_localhost_is_reached_by_whichever_family_listens(self) -> None:
        for host in ("127.0.0.1", "::1"):
            with listener(host) as sock:
                found = await dial.connect_tcp("localhost", sock.getsockname()[1])
                assert found.getpeername()[0] == host
                found.close()

    @pytest.mark.parametrize("name", ["nowhere.invalid", "a..b", "x" * 70 + ".example"])
    async def test_a_name_without_address(self, name: str) -> None:
        with pytest.raises(socket.gaierror):
            await dial.connect_tcp(name, 80)

    def test_families_take_turns(self) -> None:
        six = [address(f"fd00::{i}", 1) for i in range(3)]
        four = [address(f"10.0.0.{i}", 1) for i in range(2)]
        assert dial.interleaved([*six, *four, *six]) == [six[0], four[0], six[1], four[1], six[2]]

    @pytest.mark.parametrize(
        ("host", "loopback"),
        [("localhost", True), ("a.localhost", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True),
         ("localhost.example", False), ("10.0.0.1", False), ("", False)],
    )  # fmt: skip
    def test_what_is_this_machine(self, host: str, loopback: bool) -> None:
        assert dial.is_loopback(host) is loopback

    def test_brackets(self) -> None:
        assert [dial.authority(h, 1) for h in ("::1", "[::1]", "a.example", "1.2.3.4")] == [
            "[::1]:1", "[::1]:1", "a.example:1", "1.2.3.4:1",
        ]  # fmt: skip
