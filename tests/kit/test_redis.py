"""kit.redis: a server that is missing, hangs, or comes back costs little and is noticed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from portico.errors import Problem
from portico.kit.redis import Redis
from tests.timing import Since


class Monotonic:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_answers_come_in_order(valkey: Any) -> None:
    redis = Redis(valkey.url, timeout_seconds=30)
    answers = await redis.pipeline(
        lambda p: p.set("kit:a", "1").get("kit:a").hset("kit:h", "f", "v").hget("kit:h", "f"), atomic=True
    )
    assert answers == [True, "1", 1, "v"]
    assert redis.available
    await redis.close()


async def test_a_missing_server_is_none_and_then_skipped(tmp_path: Path) -> None:
    clock = Monotonic()
    redis = Redis(f"unix://{tmp_path}/none.sock", monotonic=clock)
    calls = 0

    def fill(commands: Any) -> None:
        nonlocal calls
        calls += 1
        commands.ping()

    assert await redis.pipeline(fill) is None and not redis.available
    assert await redis.pipeline(fill) is None
    assert calls == 1, "skipped within the pause"
    clock.now = 1.5
    assert await redis.pipeline(fill) is None
    assert calls == 2
    await redis.close()


async def test_a_server_that_hangs_costs_one_call_its_deadline(tmp_path: Path) -> None:
    asked = 0

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.read(-1)
        writer.close()

    path = tmp_path / "hang.sock"
    server = await asyncio.start_unix_server(hang, path)
    redis = Redis(f"unix://{path}", timeout_seconds=0.05, pause_seconds=600)
    try:
        since = Since()
        assert await redis.pipeline(lambda p: p.ping()) is None
        assert 0.02 <= since.waited() < 0.5
        since = Since()
        for _ in range(100):
            assert await redis.pipeline(lambda p: p.ping()) is None
        assert asked <= 1 and since.waited() < 0.05
    finally:
        await redis.close()
        server.close()


async def test_while_it_is_away_one_call_probes_and_the_others_skip(tmp_path: Path) -> None:
    clock = Monotonic()
    redis = Redis(f"unix://{tmp_path}/none.sock", monotonic=clock)
    calls = 0

    def fill(commands: Any) -> None:
        nonlocal calls
        calls += 1
        commands.ping()

    await redis.pipeline(fill)
    clock.now = 2.0
    await asyncio.gather(*(redis.pipeline(fill) for _ in range(20)))
    assert calls == 2
    await redis.close()


async def test_a_restarted_server_is_found_at_once(server_home: Path) -> None:
    """Pooled connections to the old server are dead; the first call after the restart already works."""
    from portico.embedded.valkey import EmbeddedValkey

    server = EmbeddedValkey(server_home / "redis-restarts")
    server.start()
    redis = Redis(server.url, timeout_seconds=1)
    try:
        assert await redis.pipeline(lambda p: p.set("k", "v")) == [True]
        server.stop()
        server.start()
        assert await redis.pipeline(lambda p: p.get("k")) == [None]
        assert redis.available
    finally:
        await redis.close()
        server.stop()


async def test_a_wrong_command_is_not_a_crash(valkey: Any) -> None:
    redis = Redis(valkey.url, timeout_seconds=30, pause_seconds=0.01)
    await redis.pipeline(lambda p: p.set("kit:text", "x"))
    assert await redis.pipeline(lambda p: p.hget("kit:text", "f")) is None
    await asyncio.sleep(0.02)
    assert await redis.pipeline(lambda p: p.get("kit:text")) == ["x"]
    await redis.close()


@pytest.mark.parametrize("url", ["", "http://host", "redis://:hunter2@host:port/0", "host:6379"])
async def test_a_url_of_another_kind_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(Problem, match="redis_url") as caught:
        Redis(url)
    assert caught.value.code == "config.invalid" and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("size", [10_000])
async def test_a_large_hash_in_one_round_trip(valkey: Any, size: int) -> None:
    redis = Redis(valkey.url, timeout_seconds=2)
    fields = {f"tun_{n:026}": f"ses_{n:026}" for n in range(size)}
    answers = await redis.pipeline(
        lambda p: p.delete("kit:big").hset("kit:big", mapping=fields).hlen("kit:big"), atomic=True
    )
    assert answers is not None and answers[-1] == size
    await redis.close()
