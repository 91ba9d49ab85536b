"""What a worker is made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from portico.kit.clock import Clock
from portico.kit.db import Database
from portico.settings import ApiSettings, WorkerSettings


@dataclass(frozen=True, slots=True)
class Context:
    """What a job works with. ``control`` is the API's settings: how long things live is said once, there."""

    settings: WorkerSettings
    control: ApiSettings
    db: Database
    clock: Clock


@dataclass(frozen=True, slots=True)
class Job:
    """Work that is done every ``every_seconds``.

    ``run`` opens its own transactions, does a bounded piece of work, and is harmless when it runs twice: after a lost
    connection two processes may for a moment both believe that they lead. It returns what it did, for the log ("" for
    nothing).
    """

    name: str
    every_seconds: float
    run: Callable[[Context], Awaitable[str]]
