"""Where the processes of `portico up` show their metrics: `DIR/metrics.json`, as Prometheus's ``file_sd_configs`` read it."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable
from pathlib import Path

from portico.embedded import ports
from portico.embedded.secretfiles import write_private
from portico.errors import Problem

HOST = "127.0.0.1"
FILE = "metrics.json"
LABEL = "process"


def open_listeners(home: Path, processes: Iterable[str]) -> dict[str, socket.socket]:
    """A listener for each process, on this machine alone, wherever visitors may come from: figures are the operator's.

    The ports are those of the run before, where nobody took them meanwhile: Prometheus and its rules know them.
    """
    before = read_targets(home)
    opened: dict[str, socket.socket] = {}
    for name in processes:
        for port in (_port(before.get(name, "")), 0):
            with contextlib.suppress(Problem):
                opened |= ports.open_all(HOST, [(name, port, f"metrics of {name}", "")])
                break
        else:
            ports.close_all(opened)
            raise Problem("up.port_taken", f"no port is free for the metrics of {name}")
    return opened


def _port(place: str) -> int:
    digits = place.rpartition(":")[2]
    return int(digits) if digits.isascii() and digits.isdigit() and int(digits) < 65_536 else 0


def write_targets(home: Path, numbers: dict[str, int]) -> None:
    """One target a process, by its name."""
    groups = [{"targets": [f"{HOST}:{port}"], "labels": {LABEL: name}} for name, port in numbers.items()]
    write_private(home / FILE, json.dumps(groups, indent=2) + "\n")


def read_targets(home: Path) -> dict[str, str]:
    """``host:port`` by process; empty when there is no such file or it is damaged."""
    try:
        groups = json.loads((home / FILE).read_text(encoding="utf-8"))
        return {str(group["labels"][LABEL]): str(group["targets"][0]) for group in groups}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}
