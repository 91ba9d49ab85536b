"""The runner uses uvloop where it is, and returns what the coroutine returns."""

from __future__ import annotations

import asyncio
import builtins
import gc
import platform
import ssl
import subprocess
import sys
import weakref
from typing import Any

import picows
import pytest

from portico.kit import loop


async def _kind() -> str:
    return type(asyncio.get_running_loop()).__module__


def test_uvloop_where_present() -> None:
    assert loop.run(_kind()).startswith("uvloop")


def test_asyncio_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "uvloop":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    assert loop.run(_kind()).startswith("asyncio")


def test_the_collector_still_collects_but_seldom() -> None:
    async def cycle() -> bool:
        class Node:
            pass

        one = Node()
        one.me = one  # type: ignore[attr-defined]
        seen = weakref.ref(one)
        del one
        keep = [[n] for n in range(loop.COLLECT_EVERY + 1000)]
        return seen() is None and len(keep) > 0

    before = gc.get_threshold()
    try:
        assert loop.run(cycle())
        assert gc.get_threshold()[0] == loop.COLLECT_EVERY
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


BURSTS = """
import resource
from portico.kit import loop

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        burst = [bytearray(65_600) for _ in range(16)]
        del burst
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

async def main():
    faults()
    return faults()

print(faults(), loop.run(main()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc, with its own allocator")
def test_bursts_of_buffers_do_not_fault_their_memory_in_again_and_again() -> None:
    done = subprocess.run([sys.executable, "-c", BURSTS], capture_output=True, text=True, check=True, timeout=30)
    usual, kept = map(int, done.stdout.split())
    assert usual > 10_000, "glibc's own defaults have changed: is the setting still of use?"
    assert kept < 200


class TestFaultsThatNobodyCaught:
    @pytest.mark.parametrize("said", [b"\x16\x03", b"GET / HTTP/1.1\r\n\r\n"])
    def test_a_handshake_that_is_broken_off_is_none(self, caplog: pytest.LogCaptureFixture, said: bytes) -> None:
        """On a port that speaks TLS by aiofastnet, the agents'."""

        async def main() -> None:
            server = await picows.ws_create_server(
                lambda request: None, "127.0.0.1", 0, ssl=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            )
            port = server.sockets[0].getsockname()[1]
            for _ in range(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(said)
                writer.write_eof()
                async with asyncio.timeout(30):
                    await reader.read()
                writer.close()
            await asyncio.sleep(0.05)
            server.close()

        loop.run(main())
        assert not caplog.records

    def test_others_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            running = asyncio.get_running_loop()
            running.call_exception_handler({"message": "first", "exception": ValueError})
            running.call_exception_handler({"message": "second", "exception": OSError("disk")})
            running.call_exception_handler({"message": "third"})

        loop.run(main())
        assert [record.getMessage().splitlines()[0] for record in caplog.records] == ["first", "second", "third"]
