"""Resident memory of other processes while something happens to them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

SAMPLE_SECONDS = 0.05
MIB = 1024 * 1024


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} for pid {pid}")


def resident(pid: int) -> int:
    """Bytes resident now."""
    return _status(pid, "VmRSS")


class MemoryWatch:
    """``with MemoryWatch({"relay": pid}, idle) as watch:`` – the peaks above ``idle`` afterwards in ``watch.growth``.

    Sampled every 50 ms; where the kernel lets us start its own high-water mark anew, that counts too.
    """

    def __init__(self, pids: Mapping[str, int], idle: Mapping[str, int]) -> None:
        self._pids, self._idle = dict(pids), dict(idle)
        self.peak = dict.fromkeys(pids, 0)
        self._marked: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def growth(self) -> dict[str, float]:
        """MiB above idle at the peak, by name."""
        return {name: round((peak - self._idle[name]) / MIB, 1) for name, peak in self.peak.items()}

    def assert_within(self, mib: float) -> None:
        over = {name: grown for name, grown in self.growth.items() if grown > mib}
        assert not over, f"resident memory grew by {over} MiB above idle, {mib:g} allowed"

    def __enter__(self) -> MemoryWatch:
        for name, pid in self._pids.items():
            try:
                Path(f"/proc/{pid}/clear_refs").write_text("5")
                self._marked.add(name)
            except OSError:
                pass  # not permitted here: the samples alone
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look(marks=True)
        print(f"memory above idle (MiB): {self.growth}")

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self._look(marks=False)

    def _look(self, marks: bool) -> None:
        for name, pid in self._pids.items():
            now = _status(pid, "VmHWM") if marks and name in self._marked else resident(pid)
            self.peak[name] = max(self.peak[name], now)
