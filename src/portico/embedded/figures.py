"""Where the processes of `portico up` show their metrics: `DIR/metrics.json`, as Prometheus's ``file_sd_configs`` read it."""

from __future__ import annotations

import json
from pathlib import Path

from portico.embedded.secretfiles import write_private

FILE = "metrics.json"
LABEL = "process"


def write_targets(home: Path, ports: dict[str, int]) -> None:
    """One target a process, by its name."""
    groups = [{"targets": [f"127.0.0.1:{port}"], "labels": {LABEL: name}} for name, port in ports.items()]
    write_private(home / FILE, json.dumps(groups, indent=2) + "\n")


def read_targets(home: Path) -> dict[str, str]:
    """``host:port`` by process; empty when there is no such file or it is damaged."""
    try:
        groups = json.loads((home / FILE).read_text(encoding="utf-8"))
        return {str(group["labels"][LABEL]): str(group["targets"][0]) for group in groups}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}
