"""The runner uses uvloop where it is, and returns what the coroutine returns."""

from __future__ import annotations

import asyncio
import builtins
import gc
import weakref
from typing import Any

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
