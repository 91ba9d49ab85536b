"""`portico doctor`: what a user would ask about when something does not work, each with what to do.

Nothing is started or changed. A platform that does not run is not a fault: then the checks are about whether it could.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import platform as system
import resource
import shutil
import stat
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from portico.embedded import figures, ports, secretfiles
from portico.embedded.accounts import barrier, server_account
from portico.embedded.lock import OwnerLock
from portico.embedded.pg_install import find_install
from portico.embedded.valkey import find_program
from portico.errors import Problem
from portico.kit.findings import Finding, clock
from portico.kit.sockets import bind_tcp
from portico.settings import PlatformSettings

OLDEST_PYTHON = (3, 11)
DISK_WARN_BYTES, DISK_FAIL_BYTES = 2 * 1024**3, 200 * 1024**2
OPEN_FILES_WARN = 8192
ASK_TIMEOUT_SECONDS = 3.0
_WHEELS = ("uvloop", "httptools", "picows", "cryptography")


@dataclass(frozen=True, slots=True)
class Case:
    """What the checks look at."""

    settings: PlatformSettings
    home: Path
    server: str
    credentials: dict[str, Any]
    running: int | None  # the pid of a `portico up` on this data folder

    @property
    def remote(self) -> bool:
        """An API elsewhere is asked about: this machine need not be able to run the platform."""
        return bool(self.server) and self.server != self.credentials.get("api_url")


async def examine(settings: PlatformSettings, home: Path, server: str | None = None) -> list[Finding]:
    """Every finding, in the order of the report."""
    credentials = secretfiles.read_credentials(home)
    case = Case(settings, home, server or str(credentials.get("api_url", "")), credentials, running_pid(home))
    local: tuple[Callable[[Case], Finding], ...] = (
        *(python, packages, data_folder, credentials_file, disk, open_files, postgres, valkey, running),
    )
    findings = [_guard(check, case) for check in local]
    findings += [*_ports(case), _guard(tcp_ports, case)]
    if case.server and (case.running or server):
        remote: tuple[Callable[[Case], Awaitable[list[Finding]]], ...] = (api, keys, relay, metrics)
        for group in await asyncio.gather(*(check(case) for check in remote)):
            findings += group
    return findings


def _guard(check: Callable[[Case], Finding], case: Case) -> Finding:
    """A check that itself fails is a finding."""
    try:
        return check(case)
    except (OSError, Problem) as err:
        return Finding(check.__name__.replace("_", " "), "FAIL", str(err))


def running_pid(home: Path) -> int | None:
    """The pid of the `portico up` that owns ``home``, if one does."""
    lock = OwnerLock(home / "run" / "up.lock")
    if not lock.path.exists():
        return None
    try:
        if lock.acquire():
            lock.release()
            return None
    except OSError:
        pass  # not ours to lock: then its file tells
    return lock.holder()


# -- this machine ------------------------------------------------------------------------------------------------------


def python(case: Case) -> Finding:
    have = f"{system.python_version()} on {system.system()} {system.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("Python", "FAIL", have, "Portico needs Python 3.11 or newer.")
    return Finding("Python", "OK", have)


def packages(case: Case) -> Finding:
    version = metadata.version("portico")
    if missing := [name for name in _WHEELS if importlib.util.find_spec(name) is None]:
        return Finding(
            "Packages",
            "WARN",
            f"portico {version}; without {', '.join(missing)}",
            "pip install --force-reinstall portico",
        )
    if importlib.util.find_spec("sqlalchemy") is None:
        return Finding("Packages", "OK", f"portico {version}, the agent alone (portico[server] adds `portico up`)")
    return Finding("Packages", "OK", f"portico {version} with its server parts")


def data_folder(case: Case) -> Finding:
    name, home = "Data folder", case.home
    there = home if home.exists() else next(parent for parent in home.absolute().parents if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(
            name, "FAIL", f"{there} cannot be written", "Choose another folder with --data, or correct its owner."
        )
    account = server_account(home / "pg" / "data")
    if (blocked := barrier(home, account)) is not None and account is not None:
        return Finding(
            name,
            "FAIL",
            f"{account.name}, who runs PostgreSQL, cannot pass {blocked}",
            "Choose another folder with --data.",
        )
    made = "" if home.exists() else " (made by the first `portico up`)"
    return Finding(name, "OK", f"{home}{made}" + (f", servers run as {account.name}" if account else ""))


def credentials_file(case: Case) -> Finding:
    name, path = "Credentials", case.home / secretfiles.CREDENTIALS
    if not path.exists():
        return Finding(name, "OK", "none yet (written by the first `portico up`)")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Finding(name, "FAIL", f"{path} has mode {mode:04o}: others can read the keys in it", f"chmod 600 {path}")
    if not case.credentials:
        return Finding(name, "FAIL", f"{path} is not readable JSON", "Remove it; the next `portico up` writes it anew.")
    return Finding(name, "OK", f"{path}, mode 0600")


def disk(case: Case) -> Finding:
    there = case.home if case.home.exists() else next(p for p in case.home.absolute().parents if p.exists())
    free = shutil.disk_usage(there).free
    level = "FAIL" if free < DISK_FAIL_BYTES else "WARN" if free < DISK_WARN_BYTES else "OK"
    advice = "PostgreSQL stops when the disk is full." if level != "OK" else ""
    return Finding("Disk space", level, f"{free / 1024**3:.1f} GiB free", advice)


def open_files(case: Case) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= OPEN_FILES_WARN:
        return Finding("Open files", "OK", f"{soft} at most")
    advice = f"Each visitor is one: ulimit -n {min(hard, 65536) if hard > 0 else 65536}"
    return Finding("Open files", "WARN", f"{soft} at most", advice)


def postgres(case: Case) -> Finding:
    if case.settings.database_url is not None:
        return Finding("PostgreSQL", "OK", "an external one (PORTICO_DATABASE_URL)")
    try:
        cluster = int((case.home / "pg" / "data" / "PG_VERSION").read_text(encoding="ascii").split(".")[0])
    except (OSError, ValueError):
        cluster = None
    try:
        install = find_install(case.settings.pg_bin, cluster_major=cluster)
    except Problem as problem:
        return Finding("PostgreSQL", "FAIL", problem.detail, problem.hint)
    data = f"; the data is of version {cluster}" if cluster else ""
    return Finding("PostgreSQL", "OK", f"{install.version} ({install.source}){data}")


def valkey(case: Case) -> Finding:
    if case.settings.redis_url is not None:
        return Finding("Valkey", "OK", "an external one (PORTICO_REDIS_URL)")
    try:
        program = find_program(case.settings.valkey_program)
    except Problem as problem:
        return Finding("Valkey", "FAIL", problem.detail, problem.hint)
    return Finding("Valkey", "OK", f"{program.name} is there")


def running(case: Case) -> Finding:
    if case.running:
        return Finding("Platform", "OK", f"portico up runs (pid {case.running})")
    return Finding("Platform", "OK", "not running on this data folder")


def _ports(case: Case) -> list[Finding]:
    if case.running:
        return [
            _served(name, case.credentials.get(key))
            for name, key in (("HTTP port", "relay_url"), ("API port", "api_url"))
        ]
    s = case.settings
    wanted = (
        ("HTTP port", s.http_port, "--http-port"),
        ("HTTPS port", s.https_port, "--https-port"),
        ("Agent port", s.control_port, "--control-port"),
        ("API port", s.api_port, "--api-port"),
    )
    return [_free(s.host, *row) for row in wanted]


def tcp_ports(case: Case) -> Finding:
    """The range of TCP tunnels: whether it is one, whether others are in it, whether the system gives out of it itself."""
    name, s = "TCP ports", case.settings
    try:
        span = ports.check_range(s.tcp_ports, {s.http_port, s.https_port, s.control_port, s.api_port})
    except Problem as problem:
        return Finding(name, "FAIL", problem.detail, problem.hint)
    own = ports.outgoing()
    if own is not None and span.start < own.stop and own.start < span.stop:
        return Finding(
            name,
            "WARN",
            f"{s.tcp_ports} is within {own.start}-{own.stop - 1}, from which outgoing connections take theirs",
            "Choose another range with --tcp-ports; a tunnel whose port is taken stays off line.",
        )
    taken = [] if case.running else ports.taken(s.host, span)
    if taken:
        by = ports.holder(taken[0])
        more = f", and so are {len(taken) - 1} more of {s.tcp_ports}" if len(taken) > 1 else ""
        return Finding(
            name,
            "WARN",
            f"{taken[0]} is taken{f' by {by}' if by else ''}{more}",
            "End that program, or choose another range with --tcp-ports.",
        )
    return Finding(name, "OK", f"{s.tcp_ports}, each open while its tunnel is online")


def _free(host: str, name: str, port: int, option: str) -> Finding:
    try:
        bind_tcp(host, port, option=option).close()
    except Problem as problem:
        by = ports.holder(port)
        return Finding(name, "FAIL", problem.detail + (f" by {by}" if by else ""), problem.hint)
    return Finding(name, "OK", f"{port} is free")


def _served(name: str, url: object) -> Finding:
    return Finding(name, "OK", f"{url} is ours") if url else Finding(name, "WARN", "not in credentials.json")


# -- the API -----------------------------------------------------------------------------------------------------------


async def ask(url: str, path: str, key: str = "") -> tuple[int, dict[str, str], bytes, float]:
    """GET ``path`` of an API: status, headers, body and the local time in the middle of the exchange."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, timeout=ASK_TIMEOUT_SECONDS, trust_env=False) as client:
        began = time.time()
        answer = await client.get(path, headers=headers)
        return answer.status_code, dict(answer.headers), answer.content, (began + time.time()) / 2


async def api(case: Case) -> list[Finding]:
    try:
        status, headers, body, middle = await ask(case.server, "/readyz")
    except Exception as err:  # an address that a person typed can fail in any way
        why = str(err) or type(err).__name__
        return [
            Finding(
                "API",
                "FAIL",
                f"{case.server} does not answer: {why}",
                "Is `portico up` running, and is the address right?",
            )
        ]
    if status != 200:
        return [
            Finding("API", "FAIL", f"{case.server} answers {status} to /readyz: {body[:120].decode(errors='replace')}")
        ]
    return [Finding("API", "OK", f"{case.server} is ready{await _api_version(case.server)}"), clock(headers, middle)]


async def _api_version(server: str) -> str:
    try:
        _, _, body, _ = await ask(server, "/openapi.json")
        return f", version {json.loads(body)['info']['version']}"
    except Exception:  # a version is only nice to have
        return ""


async def keys(case: Case) -> list[Finding]:
    try:
        status, _, body, _ = await ask(case.server, "/.well-known/jwks.json")
        count = len(json.loads(body)["keys"]) if status == 200 else 0
    except Exception:
        return []  # said by the API's own line
    if count == 0:
        return [
            Finding(
                "Signing keys",
                "FAIL",
                f"/.well-known/jwks.json answers {status} and no key",
                "Relays cannot check tokens.",
            )
        ]
    return [Finding("Signing keys", "OK", f"{count} published")]


async def relay(case: Case) -> list[Finding]:
    """The relay of this data folder: does it serve visitors, and does it follow the API?"""
    url, control = str(case.credentials.get("relay_url", "")), str(case.credentials.get("control_url", ""))
    if case.remote or not (case.running and url and control):
        return []
    return [await _relay_health(url), await _relay_link(control.replace("ws://", "http://", 1))]


async def metrics(case: Case) -> list[Finding]:
    """Whether every process of this data folder shows its figures, and where."""
    if case.remote or not case.running or not (places := figures.read_targets(case.home)):
        return []
    silent = [name for name, place in places.items() if not await _shows_metrics(f"http://{place}")]
    if silent:
        return [Finding("Metrics", "FAIL", f"{', '.join(silent)} does not answer at the port in {figures.FILE}")]
    shown = ", ".join(f"{name} {place}" for name, place in places.items())
    return [Finding("Metrics", "OK", f"{shown} (/metrics; for Prometheus: {case.home / figures.FILE})")]


async def _shows_metrics(url: str) -> bool:
    try:
        status, _, _, _ = await ask(url, "/metrics")
    except Exception:
        return False
    return status == 200


async def _relay_link(url: str) -> Finding:
    try:
        status, _, _, _ = await ask(url, "/readyz")
    except Exception as err:
        return Finding("Relay link", "FAIL", f"{url} does not answer: {str(err) or type(err).__name__}")
    if status != 200:
        return Finding(
            "Relay link", "FAIL", "the relay has no edge state from the API yet", "The relay's log says why."
        )
    return Finding("Relay link", "OK", "the relay has the edge state of the API")


async def _relay_health(url: str) -> Finding:
    """Any answer of the relay, with its own error code, means that visitors are served."""
    try:
        status, headers, _, _ = await ask(url, "/")
    except Exception as err:
        return Finding("Relay", "FAIL", f"{url} does not answer: {str(err) or type(err).__name__}")
    name = urlsplit(url).netloc
    return Finding(
        "Relay", "OK", f"{name} serves visitors ({headers.get('portico-error', status)} for an unknown name)"
    )
