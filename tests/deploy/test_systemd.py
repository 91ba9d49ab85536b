"""deploy/systemd: units that systemd takes, settings that exist, secrets as credentials, sockets that the processes know."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from portico import settings
from portico.errors import Problem
from tests.deploy.processes import CLASSES, ROOT, check_variables, keys, required, secrets
from tests.ports import free_port
from tests.units import parse, values, verify

FOLDER = ROOT / "deploy/systemd"
SERVICES = sorted(FOLDER.glob("*.service"))
SOCKETS = sorted(FOLDER.glob("*.socket"))
PROGRAM = "/opt/portico/bin/portico"
CONFIG = "/etc/portico/portico.toml"
SECRETS = "/etc/portico/secrets/"


def read(path: Path) -> dict[str, list[tuple[str, str]]]:
    return parse(path.read_text())


def command(path: Path) -> str:
    """The command of portico that a unit runs."""
    words = values(read(path), "Service", "ExecStart")[0].split()
    assert words[0] == PROGRAM and words[2:] == ["--config", CONFIG], words
    return words[1]


def test_systemd_takes_them(tmp_path: Path) -> None:
    for path in [*SERVICES, *SOCKETS, FOLDER / "portico.target"]:
        (tmp_path / path.name).write_text(
            path.read_text().replace(PROGRAM, str(Path(sys.executable).with_name("portico")))
        )
    names = [path.name.replace("@.", "@1.") for path in [*SERVICES, *SOCKETS]]
    for path in tmp_path.glob("*@.*"):
        shutil.copy(path, str(path).replace("@.", "@1."))
    verify(*(tmp_path / name for name in names), tmp_path / "portico.target")


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.stem)
class TestServices:
    def test_it_gets_settings_that_it_has(self, path: Path) -> None:
        given = [value.split("=")[0] for value in values(read(path), "Service", "Environment")]
        check_variables(command(path), given)

    def test_its_secrets_are_credentials(self, path: Path) -> None:
        credentials = dict(value.split(":") for value in values(read(path), "Service", "LoadCredential"))
        assert credentials.keys() <= secrets(command(path)), "named as the setting, so that it is found"
        assert credentials.keys() >= required(command(path)) & secrets(command(path))
        for name, file in credentials.items():
            assert file == SECRETS + ("relay-%i.key" if name == "relay_key" else name), "as `admin init` writes it"

    def test_it_may_do_little(self, path: Path) -> None:
        unit = read(path)
        assert values(unit, "Service", "User") == ["portico"]
        wanted = {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes",
                  "CapabilityBoundingSet": "", "AmbientCapabilities": "", "MemoryDenyWriteExecute": "yes", "UMask": "0077",
                  "RestrictNamespaces": "yes", "SystemCallFilter": "@system-service"}  # fmt: skip
        for key, value in wanted.items():
            assert values(unit, "Service", key) == [value], key

    def test_it_comes_back(self, path: Path) -> None:
        unit = read(path)
        oneshot = values(unit, "Service", "Type") == ["oneshot"]
        assert values(unit, "Service", "Restart") == ["on-failure" if oneshot else "always"]
        assert values(unit, "Unit", "StartLimitIntervalSec") == ["0"], "it tries for as long as it takes"


class TestSettingsFile:
    DOCUMENT = tomllib.loads((FOLDER / "portico.toml").read_text())

    @pytest.mark.parametrize("name", [name for name in CLASSES if name != "admin"])
    def test_every_process_takes_it(self, name: str) -> None:
        environ = {f"PORTICO_{key.upper()}": "x" for key in required(name)}
        for cls in CLASSES[name]:
            table = cls.__name__.removesuffix("Settings").lower()
            found = settings.load(cls, table=table, file=FOLDER / "portico.toml", environ=environ)
            for key, value in self.DOCUMENT.get(table, {}).items():
                assert str(getattr(found, key)) == str(tuple(value) if isinstance(value, list) else value)

    def test_nothing_secret_is_in_it(self) -> None:
        for table in self.DOCUMENT.values():
            assert not any(word in key for key in table for word in ("password", "secret", "master", "relay_key"))

    def test_what_two_tables_say_agrees(self) -> None:
        api, relay = self.DOCUMENT["api"], self.DOCUMENT["relay"]
        for key in api.keys() & relay.keys() - {"metrics_port"}:
            assert api[key] == relay[key], key


class TestSockets:
    def test_names_and_owners(self) -> None:
        named = {path.name: values(read(path), "Socket", "FileDescriptorName") for path in SOCKETS}
        assert named == {
            "portico-api.socket": ["api"],
            "portico-control@.socket": ["control"],
            "portico-https.socket": ["https"],
            "portico-public.socket": ["public"],
        }
        relay = read(FOLDER / "portico-relay@.service")
        assert values(relay, "Service", "Sockets") == [
            "portico-public.socket portico-https.socket portico-control@%i.socket"
        ]

    def test_a_relay_serves_on_what_systemd_holds(self, tmp_path: Path) -> None:
        """With systemd's own tool, which starts a program at the first connection, as a socket unit does."""
        if shutil.which("systemd-socket-activate") is None:
            pytest.skip("needs systemd-socket-activate: apt-get install systemd")
        ports = {name: free_port() for name in ("public", "https", "control")}
        env = {
            "PORTICO_RELAY_KEY": "tnl_rly_none",
            "PORTICO_STATE_DIR": str(tmp_path),
            "PORTICO_API_URL": f"http://127.0.0.1:{free_port()}",
        } | {f"PORTICO_{name.upper()}_PORT": str(free_port()) for name in ports}
        passed = [part for name in env for part in ("-E", name)]
        listen = [part for port in ports.values() for part in ("-l", f"127.0.0.1:{port}")]
        argv = ["systemd-socket-activate", *listen, "--fdname", ":".join(ports), *passed]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [*argv, sys.executable, "-P", "-m", "portico.cli", "relay"], env=os.environ | env, stderr=log
            )
        try:
            assert ask(ports["control"], "/healthz") == 200
            assert ask(ports["public"], "/") == 404, "no such tunnel"
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(15) == 0, (tmp_path / "log").read_text()

    def test_a_restart_refuses_nobody(self, tmp_path: Path) -> None:
        """With sockets that outlive the process, as systemd's do: requests meanwhile wait, and none fails."""
        held = {name: socket.create_server(("127.0.0.1", 0), backlog=128) for name in ("public", "https", "control")}
        port = held["public"].getsockname()[1]
        first = relay_on(held, tmp_path)
        second = None
        try:
            assert ask(port, "/") == 404
            with ThreadPoolExecutor(4) as pool:
                asked = []
                first.send_signal(signal.SIGINT)
                while first.poll() is None:
                    asked.append(pool.submit(ask, port, "/"))
                    time.sleep(0.05)
                assert first.returncode == 0
                second = relay_on(held, tmp_path)
                asked += [pool.submit(ask, port, "/") for _ in range(8)]
                assert {one.result(20) for one in asked} == {404} and len(asked) > 8
        finally:
            for process in filter(None, (first, second)):
                process.kill()
                process.wait()
            for sock in held.values():
                sock.close()

    def test_sockets_without_names(self) -> None:
        environ = {"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "public:https"}
        assert settings.activated_sockets(environ, 7) == "public=3,https=4"
        assert settings.activated_sockets(environ, 8) == "", "they are for another process"
        for names in ("unknown:unknown", "public", ""):
            with pytest.raises(Problem, match="FileDescriptorName"):
                settings.activated_sockets(environ | {"LISTEN_FDNAMES": names}, 7)


def relay_on(held: dict[str, socket.socket], folder: Path) -> subprocess.Popen[bytes]:
    """A relay that is given these sockets as systemd gives them: from descriptor 3 on, for its own process id."""
    numbers = [str(sock.fileno()) for sock in held.values()]
    moves = " ".join(f"{target}<&{number}" for target, number in enumerate(numbers, 3))
    script = f'exec {moves}; LISTEN_PID=$$ exec "$@"'
    env = os.environ | {
        "LISTEN_FDS": str(len(held)),
        "LISTEN_FDNAMES": ":".join(held),
        "PORTICO_RELAY_KEY": "tnl_rly_none",
        "PORTICO_STATE_DIR": str(folder),
        "PORTICO_API_URL": "http://127.0.0.1:1",
    }
    argv = ["bash", "-c", script, "bash", sys.executable, "-P", "-m", "portico.cli", "relay"]
    return subprocess.Popen(argv, env=env, pass_fds=[int(number) for number in numbers], stderr=subprocess.DEVNULL)


def ask(port: int, path: str) -> int:
    """The status of an answer; connections wait in the queue until the process is up, or are refused before it listens."""
    for _ in range(200):
        with contextlib.suppress(ConnectionError):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=15) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as err:
                return err.code
            except urllib.error.URLError as err:
                if not isinstance(err.reason, ConnectionRefusedError):
                    raise
        time.sleep(0.05)
    raise AssertionError("nobody listens")


@pytest.mark.parametrize(
    "page",
    ["docs/how-to/production.md", "docs/how-to/service.md", "deploy/systemd/README.md", "deploy/compose/README.md"],
)
def test_what_the_pages_name_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    known = {f"PORTICO_{key.upper()}" for name in CLASSES for key in keys(name)}
    known |= settings.agent_environment({f"PORTICO_{key.upper()}": "" for key in agent_keys()}).keys()
    for name in set(re.findall(r"PORTICO_[A-Z]\w*[A-Z]", text)):
        assert name in known or name.removesuffix("_FILE") in known, name
    for path in set(re.findall(r"(?<![\w/-])(?:deploy|docs|tests)/[\w/.*-]*\w", text)):
        assert list(ROOT.glob(path)), path


def agent_keys() -> list[str]:
    return [field.name for field in dataclasses.fields(settings.AgentSettings)]
