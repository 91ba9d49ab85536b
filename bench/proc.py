"""What Linux says about other processes: CPU time, resident memory, descendants.

CPU comes from the scheduler's own nanoseconds, thread by thread; when a thread ended in between, its time is only in the
process's clock ticks (10 ms each), which then count.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PROC = Path("/proc")
MIB = 1024 * 1024
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class CpuReading:
    """The CPU time of one process: nanoseconds by thread, and seconds of the whole in ticks."""

    threads: Mapping[int, int]
    ticks: float

    def until(self, later: CpuReading) -> float:
        """CPU seconds between two readings of the same process."""
        if self.threads.keys() - later.threads.keys() or not later.threads:
            return later.ticks - self.ticks
        return sum(ns - self.threads.get(thread, 0) for thread, ns in later.threads.items()) / 1e9


def parse_stat_ticks(text: str) -> int:
    """utime + stime of ``/proc/PID/stat``, in ticks; the name of the program may hold spaces and parentheses."""
    fields = text.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def parse_parent(text: str) -> int:
    """The parent of ``/proc/PID/stat``."""
    return int(text.rpartition(")")[2].split()[1])


def parse_status_bytes(text: str, field: str) -> int:
    """One ``kB`` field of ``/proc/PID/status`` in bytes; raises ``ValueError`` when it is not there."""
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no field {field}")


def cpu(pid: int, proc: Path = PROC) -> CpuReading:
    """The CPU time that ``pid`` has used until now; raises ``OSError`` when it is gone."""
    ticks = parse_stat_ticks((proc / str(pid) / "stat").read_text(encoding="ascii", errors="replace"))
    threads: dict[int, int] = {}
    for entry in (proc / str(pid) / "task").iterdir():
        try:
            threads[int(entry.name)] = int((entry / "schedstat").read_text(encoding="ascii").split()[0])
        except FileNotFoundError:
            if (entry / "stat").exists():  # a kernel without schedstat: ticks alone
                return CpuReading({}, ticks / os.sysconf("SC_CLK_TCK"))
    return CpuReading(threads, ticks / os.sysconf("SC_CLK_TCK"))


def resident(pid: int, field: str = "VmRSS", proc: Path = PROC) -> int:
    """Bytes resident now (``VmHWM``: at most so far)."""
    return parse_status_bytes((proc / str(pid) / "status").read_text(encoding="ascii", errors="replace"), field)


def tree(pid: int, proc: Path = PROC) -> list[int]:
    """``pid`` and all its descendants."""
    below: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text(encoding="ascii", errors="replace")
            except OSError:
                continue
            below.setdefault(parse_parent(text), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += below.get(one, [])
    return found


Roles = Mapping[str, list[int]]


class Watch:
    """``with Watch({"relay": [pid], …}) as watch:`` – afterwards ``watch.cpu`` (seconds) and ``watch.peak`` (bytes) by role.

    Memory is sampled every 50 ms; where the kernel lets us start its high-water mark anew, that counts too.
    """

    def __init__(self, roles: Roles) -> None:
        self._roles = roles
        self.cpu: dict[str, float] = {}
        self.peak: dict[str, int] = dict.fromkeys(roles, 0)
        self._marked = all(_restart_mark(pid) for pid in _pids(roles))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._before: dict[int, CpuReading] = {}

    def __enter__(self) -> Watch:
        self._before = {pid: cpu(pid) for pid in _pids(self._roles)}
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for role, pids in self._roles.items():
            self.cpu[role] = sum(self._before[pid].until(cpu(pid)) for pid in pids)
        self._over.set()
        self._thread.join()
        self._look("VmHWM" if self._marked else "VmRSS")

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self._look("VmRSS")

    def _look(self, field: str) -> None:
        for role, pids in self._roles.items():
            self.peak[role] = max(self.peak[role], sum(resident(pid, field) for pid in pids))


def idle_memory(roles: Roles) -> dict[str, int]:
    """Bytes resident now, by role."""
    return {role: sum(resident(pid) for pid in pids) for role, pids in roles.items()}


def _pids(roles: Roles) -> Iterable[int]:
    return [pid for pids in roles.values() for pid in pids]


def _restart_mark(pid: int) -> bool:
    try:
        (PROC / str(pid) / "clear_refs").write_text("5")
    except OSError:
        return False
    return True
