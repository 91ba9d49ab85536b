"""`portico doctor`: each trouble is found, named and comes with advice."""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from portico.embedded import doctor
from portico.embedded.doctor import examine, running_pid
from portico.embedded.lock import OwnerLock
from portico.embedded.secretfiles import write_credentials
from portico.kit.findings import Finding
from portico.kit.sockets import bind_tcp, port_of
from portico.settings import PlatformSettings, Secret
from tests.system.platform import port_span

FREE = PlatformSettings(http_port=0, https_port=0, control_port=0, api_port=0)


async def findings(settings: PlatformSettings, home: Path, server: str | None = None) -> dict[str, Finding]:
    return {finding.check: finding for finding in await examine(settings, home, server)}


class Api:
    """An API that answers what the test says, with the clock that the test says."""

    def __init__(self) -> None:
        self.port, self.status, self.skew, self.keys = 0, 200, 0.0, 2

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        body = json.dumps({"keys": [{}] * self.keys, "info": {"version": "9.9"}}).encode()
        status = self.status if path == b"/readyz" else 200
        date = email.utils.formatdate(time.time() + self.skew, usegmt=True)
        writer.write(f"HTTP/1.1 {status} X\r\nDate: {date}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        writer.close()


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    made = Api()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()


class TestTcpPorts:
    @staticmethod
    async def found(home: Path, span: str, **more: int) -> Finding:
        settings = dataclasses.replace(FREE, tcp_ports=span, **more)
        return (await findings(settings, home))["TCP ports"]

    async def test_free(self, home: Path) -> None:
        first = int(port_span(3).split("-")[0])
        found = await self.found(home, f"{first}-{first + 2}")
        assert (found.level, found.says) == ("OK", f"{first}-{first + 2}, each open while its tunnel is online")

    async def test_taken_by_another_program(self, home: Path) -> None:
        first = int(port_span(3).split("-")[0])
        with bind_tcp("127.0.0.1", first + 1):
            found = await self.found(home, f"{first}-{first + 2}")
        assert found.level == "WARN" and f"{first + 1} is taken by" in found.says and str(os.getpid()) in found.says

    async def test_those_of_outgoing_connections(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor.ports, "outgoing", lambda: range(20_000, 61_000))
        found = await self.found(home, "19990-20000")
        assert found.level == "WARN" and "20000-60999" in found.says and "--tcp-ports" in found.advice

    async def test_what_is_no_range(self, home: Path) -> None:
        assert (await self.found(home, "7100")).level == "FAIL"
        assert "another listener's" in (await self.found(home, "7000-7100", api_port=7050)).says


class TestHere:
    async def test_a_machine_that_could_run_it_is_fine(self, home: Path) -> None:
        found = await findings(FREE, home / "new")
        assert {finding.level for finding in found.values()} <= {"OK", "WARN"}, found
        assert {
            "Python",
            "Packages",
            "Data folder",
            "Credentials",
            "Disk space",
            "Open files",
            "PostgreSQL",
            "Valkey",
        } <= set(found)
        assert not (home / "new").exists(), "doctor changes nothing"

    async def test_credentials_that_others_can_read(self, home: Path) -> None:
        write_credentials(home, {"agent_key": "x"}).chmod(0o644)
        found = (await findings(FREE, home))["Credentials"]
        assert found.level == "FAIL" and "0644" in found.says and found.advice.startswith("chmod 600")

    async def test_a_taken_port(self, home: Path) -> None:
        with bind_tcp("127.0.0.1", 0) as sock:
            settings = PlatformSettings(http_port=port_of(sock), https_port=0, control_port=0, api_port=0)
            found = (await findings(settings, home))["HTTP port"]
        assert found.level == "FAIL" and f"pid {os.getpid()}" in found.says and "--http-port" in found.advice

    async def test_missing_programs(self, home: Path) -> None:
        settings = PlatformSettings(
            pg_bin=home, valkey_program=home / "none", http_port=0, https_port=0, control_port=0, api_port=0
        )
        found = await findings(settings, home)
        assert found["PostgreSQL"].level == "FAIL" and "--pg-bin" in found["PostgreSQL"].advice
        assert found["Valkey"].level == "FAIL" and "PORTICO_REDIS_URL" in found["Valkey"].advice

    async def test_external_servers_need_no_programs(self, home: Path) -> None:
        settings = PlatformSettings(database_url=Secret("postgresql://x/y"), redis_url=Secret("redis://x"), pg_bin=home)
        found = await findings(settings, home)
        assert found["PostgreSQL"].level == found["Valkey"].level == "OK"

    @pytest.mark.parametrize(("free", "level"), [(10**8, "FAIL"), (10**9, "WARN"), (10**11, "OK")])
    async def test_disk_space(self, home: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
        usage = shutil.disk_usage(home)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=free))
        assert (await findings(FREE, home))["Disk space"].level == level

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the servers then run as another account")
    async def test_a_folder_that_the_servers_cannot_reach(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        found = (await findings(FREE, tmp_path / "data"))["Data folder"]
        assert found.level == "FAIL" and "--data" in found.advice


class TestRunning:
    def test_the_owner_is_found_while_it_lives(self, home: Path) -> None:
        assert running_pid(home) is None
        (home / "run").mkdir()
        code = (
            "import sys, time; from pathlib import Path; from portico.embedded.lock import OwnerLock\n"
            "assert OwnerLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
        )
        lock = home / "run" / "up.lock"
        owner = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
        assert owner.stdout is not None
        owner.stdout.readline()
        assert running_pid(home) == owner.pid
        owner.kill()
        owner.wait()
        assert running_pid(home) is None
        assert OwnerLock(lock).acquire(), "asking must not keep the lock"


class TestApi:
    async def test_a_fine_one(self, home: Path, api: Api) -> None:
        found = await findings(FREE, home, f"http://127.0.0.1:{api.port}")
        assert found["API"].level == "OK" and "9.9" in found["API"].says
        assert found["Clock"].level == "OK" and found["Signing keys"].says == "2 published"

    @pytest.mark.parametrize(("skew", "level"), [(45, "WARN"), (-45, "WARN"), (300, "FAIL"), (-300, "FAIL")])
    async def test_a_clock_that_differs(self, home: Path, api: Api, skew: float, level: str) -> None:
        api.skew = skew
        found = (await findings(FREE, home, f"http://127.0.0.1:{api.port}"))["Clock"]
        assert found.level == level and "clock" in found.advice

    async def test_one_that_is_not_ready_or_has_no_keys(self, home: Path, api: Api) -> None:
        api.status, api.keys = 503, 0
        found = await findings(FREE, home, f"http://127.0.0.1:{api.port}")
        assert found["API"].level == found["Signing keys"].level == "FAIL"

    async def test_one_that_is_not_there(self, home: Path) -> None:
        with bind_tcp("127.0.0.1", 0) as sock:
            port = port_of(sock)
        found = (await findings(FREE, home, f"http://127.0.0.1:{port}"))["API"]
        assert found.level == "FAIL" and "does not answer" in found.says
