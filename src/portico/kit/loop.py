"""Run a coroutine as a process's main: on uvloop where it is present, on plain asyncio elsewhere (Windows)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
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


#: Free bytes at the top of the heap that stay with the process, and the size from which a block is mapped on its own. With
#: glibc's 128 KiB for both, the buffers of one burst of a download are given back and faulted in again with the next
#: (10 % of the agent's time).
KEEP_FREE_BYTES = 16_777_216
MAPPED_FROM_BYTES = 1_048_576
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def _keep_memory() -> None:
    """Tell glibc to keep a little free memory; does nothing with another allocator."""
    if sys.platform != "linux":
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, KEEP_FREE_BYTES)
        mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)


def on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What the loop logs of faults that nobody caught: not who breaks off a TLS handshake (aiofastnet reports an end of the
    connection within it, and by the class of an exception, of which nothing can be logged)."""
    exception = context.get("exception")
    if isinstance(exception, type):
        context = {**context, "exception": exception()}
    if isinstance(context.get("exception"), OSError) and context.get("message") == "SSL handshake failed":
        return
    loop.default_exception_handler(context)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end and return its value.

    What was imported until now stays for the life of the process, so the cyclic collector need not look at it again.
    """
    _keep_memory()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, 10, 10)
    with asyncio.Runner(loop_factory=factory()) as runner:
        runner.get_loop().set_exception_handler(on_exception)
        return runner.run(main)
