"""The wall clock of a machine is set ten minutes forward, and back, under load: platform and agent with it, PostgreSQL not.

Tokens and grants live 5 minutes here, so that the step ends all of them at once, or has them begin in the future. Deadlines are
of the monotonic clock and do not move.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import patch

import pytest
import pytest_asyncio

from tests.drills.drill import REPEATS, run
from tests.drills.load import Load
from tests.drills.stage import Stage, stage
from tests.drills.test_drills import in_flight, killer

pytestmark = [
    pytest.mark.system,
    pytest.mark.realtime,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

LIFE_SECONDS = 300
STEP_SECONDS = 600


needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="needs a C compiler (apt-get install gcc libc6-dev)"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clock(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Stage, Path]]:
    """A platform and agent whose clock is off by the seconds that stand in a file."""
    folder = tmp_path_factory.mktemp("clock")
    stamp, library = folder / "offset", folder / "clock.so"
    stamp.write_text("0\n")
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", library, source], check=True, timeout=60)
    faked = {"LD_PRELOAD": str(library), "DRILL_CLOCK": str(stamp)}
    lives = {"session_token_seconds": LIFE_SECONDS, "grant_life_seconds": LIFE_SECONDS}
    with patch.dict(os.environ, faked):
        async with stage("clock", folder, **lives) as made:
            yield made, stamp


@needs_compiler
@pytest.mark.parametrize("run_number", range(1, REPEATS + 1))
@pytest.mark.parametrize("step", [STEP_SECONDS, -STEP_SECONDS])
async def test_a_step(clock: tuple[Stage, Path], step: int, run_number: int) -> None:
    made, stamp = clock
    base = int(stamp.read_text())

    async def act(made: Stage, load: Load) -> None:
        stamp.write_text(f"{base + step}\n")
        await asyncio.sleep(4)  # some pings, usage reports and looks of every housekeeper

    await run(f"clock {step // 60:+d} min", made, act)
    # What is connected goes on; what connects anew has to be believed as well. An agent whose token begins in the future is
    # refused with it, and asks the API for another first.
    allowed = in_flight(30, "requests in flight in the relay")
    await run(
        f"kill -9 relay after clock {step // 60:+d} min",
        made,
        killer("relay-1", signal.SIGKILL),
        allowed,
        usage_lost=1.5,
        back=6.0,
    )
    stamps = re.findall(r"^(\S+)Z INFO +relay-1 relay ready", made.up.child.err, re.MULTILINE)
    off = datetime.datetime.fromisoformat(f"{stamps[-1]}+00:00").timestamp() - time.time() - base - step
    assert -60 < off <= 1, f"the relay's clock was not set: it is {off + step:.0f} s off"
