"""`portico up` as people run it: a process, its children, its signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from portico.embedded.folders import temp_home
from portico.embedded.postgres import EmbeddedPostgres
from portico.embedded.roster import started_at
from portico.embedded.valkey import EmbeddedValkey
from tests.ports import free_port

pytestmark = [pytest.mark.system, pytest.mark.realtime]
START_SECONDS = 90.0
PORTICO = [sys.executable, "-P", "-m", "portico.cli"]
FREE = ["--http-port", "0", "--https-port", "0", "--control-port", "0", "--api-port", "0"]


class Up:
    """A `portico up` of a test."""

    def __init__(self, home: Path, *args: str, env: dict[str, str] | None = None) -> None:
        self.home = home
        self.errors = home.with_name(home.name + ".log")
        with self.errors.open("wb") as log:
            self.process = subprocess.Popen(
                [*PORTICO, "up", "--data", str(home), *(args or FREE)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | (env or {}),
            )

    def wait_ready(self) -> Up:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "ready\n", f"{line!r}: {self.said()}"
        return self

    def said(self) -> str:
        return self.errors.read_text()

    @property
    def credentials(self) -> dict[str, Any]:
        return json.loads((self.home / "credentials.json").read_text())

    def children(self) -> dict[str, int]:
        return {row["name"]: row["pid"] for row in json.loads((self.home / "run" / "children").read_text())}

    def end(self, signum: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        self.process.send_signal(signum)
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.unlink(missing_ok=True)


@pytest.fixture
def home() -> Iterator[Path]:
    folder = temp_home("portico-test-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def get(url: str) -> tuple[int, bytes]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.status, answer.read()


def until(what: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        return get(url)[0] == 200
    except OSError:
        return False


def all_gone(pids: dict[str, int]) -> bool:
    return all(started_at(pid) is None for pid in pids.values())


def test_a_whole_life(home: Path) -> None:
    """Ready, credentials, a second `up`, taken ports, doctor, a crash of each part, the end."""
    up = Up(home)
    try:
        up.wait_ready()
        credentials = up.credentials
        assert (home / "credentials.json").stat().st_mode & 0o777 == 0o600
        wanted = {"api_url", "relay_url", "console_url", "operator_key", "organization_id", "agent_key"}
        assert wanted <= set(credentials)
        assert get(credentials["api_url"] + "/readyz")[0] == 200
        assert "First admin (shown only now)" in up.said() and "agent_key in credentials.json" in up.said()
        assert credentials["agent_key"] not in up.said(), "a key must not end in a log file"

        second = subprocess.run(
            [*PORTICO, "up", "--data", str(home), *FREE], capture_output=True, text=True, timeout=30
        )
        assert second.returncode == 1 and "up.already_running" in second.stderr
        assert f"pid {up.process.pid}" in second.stderr

        port = credentials["api_url"].rsplit(":", 1)[1]
        other = temp_home("portico-test-")
        taken = subprocess.run(
            [*PORTICO, "up", "--data", str(other), *FREE[:-1], port], capture_output=True, text=True, timeout=30
        )
        shutil.rmtree(other)
        assert taken.returncode == 1 and "up.port_taken" in taken.stderr
        assert f"port {port} (API) is taken by" in taken.stderr and "--api-port" in taken.stderr

        told = subprocess.run(
            [*PORTICO, "doctor", "--data", str(home), "--json"], capture_output=True, text=True, timeout=30
        )
        findings = {row["check"]: row for row in json.loads(told.stdout)}
        assert told.returncode == 0, findings
        assert {"API", "Clock", "Signing keys", "Relay", "Relay link"} <= set(findings)
        shown = {row["labels"]["process"]: row["targets"][0] for row in json.loads((home / "metrics.json").read_text())}
        assert set(shown) == {"api", "relay-1", "worker"}
        for process, place in shown.items():
            assert place in findings["Metrics"]["says"]
            status, figures = get(f"http://{place}/metrics")
            family = "portico_queue_" if process == "worker" else f"portico_{process.split('-')[0]}_"
            assert status == 200 and family.encode() in figures
        assert str(up.process.pid) in findings["Platform"]["says"]

        before = up.children()
        assert set(before) == {"postgres", "valkey", "api", "relay-1", "worker"}
        for name in before:
            os.kill(before[name], signal.SIGKILL)
        until(lambda: set(up.children()) == set(before) and not set(up.children().values()) & set(before.values()))
        until(lambda: answers(credentials["api_url"] + "/readyz"))
        assert all(answers(f"http://{place}/metrics") for place in shown.values()), "the ports outlive their processes"

        pids = up.children()
        assert up.end() == 0
        assert all_gone(pids)
        assert list((home / "run").iterdir()) == []
    finally:
        up.close()


def test_kill_9_of_the_supervisor_leaves_nothing_and_the_next_up_keeps_everything(home: Path) -> None:
    up = Up(home)
    try:
        up.wait_ready()
        pids, first = up.children(), up.credentials
        up.process.kill()
        up.process.wait()
        until(lambda: all_gone(pids), 12)
    finally:
        up.close()
    again = Up(home)
    try:
        again.wait_ready()
        for key in ("operator_key", "organization_id", "agent_key"):
            assert again.credentials[key] == first[key]
        assert "First admin" not in again.said(), "the first admin is shown once"
        assert again.end(signal.SIGINT) == 0
        assert list((home / "run").iterdir()) == []
    finally:
        again.close()


def test_an_interrupted_start_leaves_nothing(home: Path) -> None:
    up = Up(home)
    try:
        until(lambda: up.process.poll() is not None or (home / "run" / "children").exists(), START_SECONDS)
        assert up.process.poll() is None, up.said()
        until(up.children)
        pids = up.children()
        assert up.end(signal.SIGINT) == 130
        assert all_gone(pids)
        assert list((home / "run").iterdir()) == []
    finally:
        up.close()


async def test_external_servers_and_two_relays(home: Path, cluster: EmbeddedPostgres) -> None:
    connection = await asyncpg.connect(cluster.uri)
    await connection.execute("CREATE DATABASE outside")
    await connection.close()
    with EmbeddedValkey(cluster.home) as valkey:
        env = {
            "PORTICO_DATABASE_URL": cluster.uri_for("outside"),
            "PORTICO_REDIS_URL": valkey.url,
            "PORTICO_RELAYS": "2",
        }
        up = Up(home, env=env)
        try:
            up.wait_ready()
            assert set(up.children()) == {"api", "relay-1", "relay-2", "worker"}
            assert not (home / "pg").exists() and not (home / "valkey").exists()
            assert up.end() == 0
        finally:
            up.close()


def test_a_socket_port_that_is_free_again_is_reused_at_once(home: Path) -> None:
    """The supervisor binds with SO_REUSEADDR: the last run's connections in TIME_WAIT do not hold the port."""
    port = str(free_port())
    for _ in range(2):
        up = Up(home, *FREE[:-1], port)
        try:
            up.wait_ready()
            assert get(f"http://127.0.0.1:{port}/healthz")[0] == 200
            assert up.end() == 0
        finally:
            up.close()


class TestDemo:
    def test_once_makes_a_request_and_exits_0(self) -> None:
        told = subprocess.run([*PORTICO, "demo", "--once"], capture_output=True, text=True, timeout=120)
        assert told.returncode == 0, told.stderr
        assert "answers “Hello through the tunnel”" in told.stdout and "✓ 200" in told.stdout
        slow = "silent for too long"  # what a relay may say of an API on a machine with much else to do
        assert [line for line in told.stderr.splitlines() if slow not in line] == [], (
            "one that works has nothing to warn of"
        )
