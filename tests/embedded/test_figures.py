"""Where `up` shows metrics: the same places as the last time, as far as they are free."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from portico.embedded import figures, ports

NAMES = ("api", "relay-1", "worker")


def opened(home: Path) -> dict[str, int]:
    """Open and close them as a run does; their ports."""
    listeners = figures.open_listeners(home, NAMES)
    numbers = {name: int(sock.getsockname()[1]) for name, sock in listeners.items()}
    figures.write_targets(home, numbers)
    ports.close_all(listeners)
    return numbers


def test_a_new_run_has_the_ports_of_the_last_one(tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert len(set(first.values())) == len(NAMES)
    assert opened(tmp_path) == first


def test_a_port_that_somebody_took_is_another_one(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with socket.create_server(("127.0.0.1", first["api"])):
        second = opened(tmp_path)
    assert second["api"] != first["api"]
    assert {**second, "api": 0} == {**first, "api": 0}


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"targets": ["x:99999"], "labels": {"process": "api"}}]'])
def test_a_damaged_file_is_no_obstacle(tmp_path: Path, text: str) -> None:
    (tmp_path / figures.FILE).write_text(text, encoding="utf-8")
    assert set(opened(tmp_path)) == set(NAMES)
