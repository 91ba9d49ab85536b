"""What a figure holds for: machine, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from typing import Any

from bench.proc import PROC
from bench.processes import ROOT


def machine() -> dict[str, Any]:
    """Cores, CPU model, memory, kernel and Python."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu_model((PROC / "cpuinfo").read_text(errors="replace")),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }


def cpu_model(cpuinfo: str) -> str:
    """The first model name of ``/proc/cpuinfo``."""
    for line in cpuinfo.splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine() or "unknown"


def commit() -> str:
    """The short commit, with ``+`` when the checkout differs from it; ``unknown`` outside a checkout."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "--short=10", "HEAD")
    return f"{name}{'+' if git('status', '--porcelain', '--', 'src', 'bench') else ''}" if name else "unknown"


def about(repeats: int, seconds: float, mebibytes: int, generator: str, app: str) -> dict[str, Any]:
    """The head of the results."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "machine": machine(),
        "load": round(os.getloadavg()[0], 1),
        "repeats": repeats,
        "seconds": seconds,
        "mebibytes": mebibytes,
        "generator": generator,
        "app": app,
    }
