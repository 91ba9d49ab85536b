"""Pebble, the certificate authority of Let's Encrypt's makers for tests, and its DNS server: built once, run on free ports.

with pebble.running(tmp_path, http_port, tls_port) as ca:
    ca.directory      https://127.0.0.1:…/dir, which `ca.trust` is trusted for
    ca.dns            127.0.0.1:…, asked by the CA; `ca.say("add-a", host=…, addresses=[…])` sets what it answers
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.authority import Authority
from tests.gotools import built
from tests.ports import free_port

VERSION = "v2.10.3"
MODULE = "github.com/letsencrypt/pebble/v2/cmd"
START_SECONDS = 60.0
#: Key id and key of an account that exists outside of ACME, where one is demanded.
EAB = ("kid-1", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W")


@dataclass(frozen=True)
class Pebble:
    """A running CA with its DNS."""

    directory: str
    management: str
    dns: str
    control: str
    trust: Path
    log: Path
    http_port: int
    tls_port: int
    certificate: tuple[Path, Path]  # of its API: files of the certificate and of its key

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.trust))

    def say(self, verb: str, **facts: Any) -> None:
        """Tell the DNS server what to answer."""
        answer = httpx.post(f"{self.control}/{verb}", json=facts, trust_env=False)
        assert answer.status_code == 200, answer.text

    def asked(self, host: str) -> list[dict[str, Any]]:
        """What the DNS server was asked about ``host``."""
        answer = httpx.post(f"{self.control}/dns-request-history", json={"host": host}, trust_env=False)
        return list(answer.json() or [])

    def manage(self, path: str, **facts: Any) -> httpx.Response:
        """Its management interface; POST when there are facts."""
        with httpx.Client(verify=self.context(), trust_env=False) as client:
            if facts:
                return client.post(f"{self.management}{path}", json=facts)
            return client.get(f"{self.management}{path}")

    def root(self) -> str:
        """The root that what it issues chains to, as PEM."""
        return self.manage("/roots/0").text

    def suggest(self, certificate_pem: str, response: str) -> None:
        """Let it answer questions about a certificate's renewal with ``response``, whatever that is."""
        assert self.manage("/set-renewal-info/", Certificate=certificate_pem, ARIResponse=response).status_code == 200

    def orders(self) -> int:
        """How many orders were made, as its log tells."""
        return self.log.read_text(encoding="utf-8", errors="replace").count("Added order ")


@contextmanager
def running(
    folder: Path,
    http_port: int,
    tls_port: int,
    *,
    environment: Mapping[str, str] | None = None,
    external_account: bool = False,
    validity_seconds: int = 7_776_000,
) -> Iterator[Pebble]:
    """Pebble and its DNS server. It validates on ``http_port`` and ``tls_port`` of the addresses that its DNS names."""
    authority = Authority(folder, "pebble-api")
    cert, key = authority.issue("pebble-api-server", "127.0.0.1", "localhost")
    listen, manage, dns, control = free_port(), free_port(), free_port(), free_port()
    settings: dict[str, Any] = {
        "listenAddress": f"127.0.0.1:{listen}",
        "managementListenAddress": f"127.0.0.1:{manage}",
        "certificate": str(cert),
        "privateKey": str(key),
        "httpPort": http_port,
        "tlsPort": tls_port,
        "externalAccountBindingRequired": external_account,
        "externalAccountMACKeys": dict([EAB]) if external_account else {},
        "domainBlocklist": ["blocked-domain.example"],
        "retryAfter": {"authz": 1, "order": 1},
        "keyAlgorithm": "ecdsa",
        "profiles": {
            "default": {"description": "for tests", "validityPeriod": validity_seconds},
            "shortlived": {"description": "for tests", "validityPeriod": 518_400},
        },
    }
    config = folder / "pebble.json"
    config.write_text(json.dumps({"pebble": settings}), encoding="utf-8")
    quick = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "5", "PEBBLE_AUTHZREUSE": "0"}
    env = os.environ | quick | dict(environment or {})
    log = folder / "pebble.log"
    names = [
        str(built(f"{MODULE}/pebble-challtestsrv", VERSION, "1.25")), "-http01", "", "-https01", "", "-tlsalpn01", "",
        "-doh", "", "-dnsserver", f"127.0.0.1:{dns}", "-management", f"127.0.0.1:{control}", "-defaultIPv6", "",
    ]  # fmt: skip
    ca = [str(built(f"{MODULE}/pebble", VERSION, "1.25")), "-config", str(config), "-dnsserver", f"127.0.0.1:{dns}"]
    with (
        _program(names, folder / "challtestsrv.log", env, control),
        _program([*ca, "-strict"], log, env, listen, manage),
    ):
        yield Pebble(
            f"https://127.0.0.1:{listen}/dir", f"https://127.0.0.1:{manage}", f"127.0.0.1:{dns}",
            f"http://127.0.0.1:{control}", authority.ca, log, http_port, tls_port, (cert, key),
        )  # fmt: skip


@contextmanager
def _program(argv: list[str], log: Path, env: Mapping[str, str], *ports: int) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env=dict(env))
    try:
        deadline = time.monotonic() + START_SECONDS
        for port in ports:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert process.poll() is None, f"{argv[0]} ended: {log.read_text(encoding='utf-8')}"
                    assert time.monotonic() < deadline, f"{argv[0]} does not listen"
                    time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(10)
