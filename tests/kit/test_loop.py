"""The runner uses uvloop where it is, and returns what the coroutine returns."""

from __future__ import annotations

import asyncio
import builtins
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
