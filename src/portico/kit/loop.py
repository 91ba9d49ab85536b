"""Run a coroutine as a process's main: on uvloop where it is present, on plain asyncio elsewhere (Windows)."""

from __future__ import annotations

import asyncio
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


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end and return its value."""
    with asyncio.Runner(loop_factory=factory()) as runner:
        return runner.run(main)
