"""The embedded Valkey: one owner, memory only, bounded, ends with its owner."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from portico.embedded.spawn import living_in
from portico.embedded.valkey import EmbeddedValkey, find_program
from portico.errors import Problem

OWNER = """
import sys, time
from portico.embedded.valkey import EmbeddedValkey
server = EmbeddedValkey(sys.argv[1])
assert server.start()
print(server.process.pid, flush=True)
time.sleep(60)
"""


def test_serves_on_a_private_socket_and_keeps_nothing(home: Path) -> None:
    server = EmbeddedValkey(home, max_memory_mib=32)
    assert server.start() is True
    assert EmbeddedValkey(home).start() is False
    assert server.socket_path.stat().st_mode & 0o777 == 0o700
    with redis.Redis.from_url(server.url) as client:
        client.set("presence", "here")
        assert client.config_get("maxmemory") == {"maxmemory": str(32 * 1024 * 1024)}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-ttl"}
        assert client.config_get("save") == {"save": ""}
        if os.geteuid() == 0:
            assert Path(f"/proc/{client.info('server')['process_id']}").stat().st_uid != 0
    server.stop()
    assert not server.socket_path.exists() and not (home / "run" / "valkey.lock").exists()
    with server, redis.Redis.from_url(server.url) as client:
        assert client.get("presence") is None
    assert list((home / "valkey").iterdir()) == []


def test_ends_with_its_killed_owner(home: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(home)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert living_in(home / "valkey") == [pid]
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 5
    while living_in(home / "valkey") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert living_in(home / "valkey") == []


def test_an_orphan_is_ended_before_the_next_start(home: Path) -> None:
    first = EmbeddedValkey(home)
    first.start()
    orphan, first.process = first.process, None
    assert orphan is not None
    first._lock.release()
    with EmbeddedValkey(home) as server:
        assert server.process is not None and server.process.pid != orphan.pid
        assert orphan.wait(5) is not None


def test_a_program_that_is_not_there_or_does_not_run(home: Path) -> None:
    with pytest.raises(Problem) as caught:
        find_program(Path("/nonexistent/valkey"))
    assert caught.value.code == "up.valkey_missing"
    with pytest.raises(Problem) as caught:
        EmbeddedValkey(home, program=Path("/bin/false")).start()
    assert caught.value.code == "up.valkey_failed"
    assert not (home / "run" / "valkey.lock").exists()
