"""Memory and descriptors of the platform's processes over time, and how fast they grow."""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from dataclasses import dataclass, field

from tests.drills.stage import Stage
from tests.system.memory import MIB, resident

EVERY_SECONDS = 5.0
#: Seconds of a process's life that do not count: imports, caches, pools and the allocator reach their size.
WARM_UP_SECONDS = 90.0


@dataclass
class Life:
    """One process of a part: what it held, by seconds since its start was noticed."""

    part: str
    pid: int
    began: float
    at: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def warm(self, warm_up: float) -> list[int]:
        return [n for n, at in enumerate(self.at) if at >= warm_up]


def slope(at: list[float], values: list[float]) -> float:
    """Growth per minute: the median over all pairs of samples (Theil and Sen), which a burst does not move."""
    pairs = itertools.combinations(zip(at, values, strict=True), 2)
    return statistics.median([60 * (v2 - v1) / (t2 - t1) for (t1, v1), (t2, v2) in pairs] or [0.0])


def grown(values: list[float]) -> float:
    """By how much the median of the last quarter is above that of the first."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[-quarter:]) - statistics.median(values[:quarter])


class Sampler:
    """``lives`` has every process that was seen."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.lives: list[Life] = []
        self._current: dict[str, Life] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            try:
                pids = self._stage.pids()
            except (OSError, IndexError, ValueError):
                continue  # a part is being started
            for part, pid in pids.items():
                self._sample(part, pid)

    def _sample(self, part: str, pid: int) -> None:
        life = self._current.get(part)
        now = time.monotonic()
        if life is None or life.pid != pid:
            life = self._current[part] = Life(part, pid, now)
            self.lives.append(life)
        try:
            memory, descriptors = resident(pid) / MIB, len(os.listdir(f"/proc/{pid}/fd"))
        except (OSError, ValueError):
            return
        life.at.append(now - life.began)
        life.memory.append(memory)
        life.descriptors.append(descriptors)

    def table(self, seconds: float) -> list[dict[str, float | str | int]]:
        """For every part its longest life: figures once it was warm, and growth per minute. In a short run the warm-up is
        a quarter of it."""
        rows: list[dict[str, float | str | int]] = []
        for part in dict.fromkeys(life.part for life in self.lives):
            life = max((one for one in self.lives if one.part == part), key=lambda one: len(one.at))
            warm_up = min(WARM_UP_SECONDS, life.at[-1] / 3 if life.at else 0.0)
            warm = life.warm(warm_up)
            if len(warm) < 3:
                continue
            at = [life.at[n] for n in warm]
            memory = [life.memory[n] for n in warm]
            descriptors = [float(life.descriptors[n]) for n in warm]
            rows.append(
                {
                    "part": part,
                    "minutes": round((at[-1] - at[0]) / 60, 1),
                    "memory_first": round(memory[0], 1),
                    "memory_last": round(memory[-1], 1),
                    "memory_most": round(max(memory), 1),
                    "memory_per_minute": round(slope(at, memory), 3),
                    "memory_grown": round(grown(memory), 1),
                    "descriptors_first": int(descriptors[0]),
                    "descriptors_last": int(descriptors[-1]),
                    "descriptors_most": int(max(descriptors)),
                    "descriptors_per_minute": round(slope(at, descriptors), 3),
                    "descriptors_grown": round(grown(descriptors), 1),
                    "lives": sum(one.part == part for one in self.lives),
                }
            )
        return rows
