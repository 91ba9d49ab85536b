"""Run a coroutine as a process's main: on uvloop where it is present, on plain asyncio elsewhere (Windows)."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop factory, or ``None`` where uvloop is not installed."""
    try:
        import uvloop
    except ImportError:
        return None
    new_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return new_loop


#: New containers between two looks of the cyclic collector. Requests make hundreds that plain reference counts free;
#: at Python's default of 700 the collector looked at them several times a millisecond (4 % of the relay's time).
COLLECT_EVERY = 20_000


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end and return its value.

    What was imported until now stays for the life of the process, so the cyclic collector need not look at it again.
    """
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, 10, 10)
    with asyncio.Runner(loop_factory=factory()) as runner:
        return runner.run(main)
