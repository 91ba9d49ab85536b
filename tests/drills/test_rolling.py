"""Two relays behind one address are restarted one after the other under load, again and again: no request fails at all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.drills.drill import REPEATS, Moments, run
from tests.drills.load import Load
from tests.drills.stage import Stage, stage
from tests.drills.test_drills import alive, in_flight, replaced, until

pytestmark = [
    pytest.mark.system,
    pytest.mark.realtime,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

#: Restarts in a run: of each relay in turn.
RESTARTS = 4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with stage("rolling", tmp_path_factory.mktemp("rolling"), relays=2) as made:
        yield made


async def roll(pair: Stage, load: Load) -> None:
    """Each restart waits for the one before: the old process has gone and its successor serves."""
    for number in range(RESTARTS):
        name = f"relay-{number % 2 + 1}"
        old = pair.pids()[name]
        os.kill(old, signal.SIGTERM)
        said = f"the old {name} ended (exit 0)"
        before = pair.up.child.err.count(said)
        await until(lambda said=said, before=before: pair.up.child.err.count(said) > before)


@pytest.mark.parametrize("run_number", range(1, REPEATS + 1))
async def test_a_rolling_restart_fails_nothing(pair: Stage, run_number: int) -> None:
    await run(f"rolling restart of 2 relays, {RESTARTS} restarts", pair, roll)


@pytest.mark.parametrize("run_number", range(1, REPEATS + 1))
async def test_kill_9_of_the_relay_that_holds_the_tunnel(pair: Stage, run_number: int) -> None:
    """With a second relay up nothing waits for the first one's restart."""

    async def act(pair: Stage, load: Load) -> Moments:
        connection = await pair.database()
        try:
            holder = await connection.fetchval("SELECT relay FROM relay_bindings WHERE tunnel_id = $1", pair.tunnel_id)
        finally:
            await connection.close()
        old = pair.pids()[holder]
        done = time.monotonic()
        os.kill(old, signal.SIGKILL)
        await until(lambda: not alive(old))
        over = time.monotonic()
        await replaced(pair, holder, old)
        return Moments(done, done, over)

    allowed = in_flight(30, "requests in flight in the relay that died")
    await run("kill -9 relay, second one up", pair, act, allowed, back=1.0, usage_lost=1.5)
