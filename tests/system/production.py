"""The platform as an operator runs it: separate processes, external PostgreSQL and Redis, TLS on every connection.

    visitor ──https──► relay-1 ◄──wss──► relay-2 ◄──https── visitor
                         ▲ │ https          │
    agent ─────wss───────┘ └────► API ◄─────┘
      └───────https─────────────► │ ──TLS──► PostgreSQL, Redis ◄──TLS── worker

Settings come from one `portico.toml` and a few variables, secrets from files of mode 0600.
"""

from __future__ import annotations

import json
import os
import secrets
import ssl
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from portico.embedded.units import portico_argv
from portico.kit.sealing import new_master_key
from tests.authority import Authority
from tests.ports import free_port
from tests.system.external import Postgres, Redis
from tests.system.platform import Child, clean_environment

#: OpenSSL takes no wildcard directly below a top-level name.
NAMES = ("localhost", "web.localhost", "127.0.0.1")


class Production:
    """See the module. ``stack`` ends everything, also after a failed start."""

    def __init__(self, home: Path, folder: Path, stack: ExitStack) -> None:
        self.home, self.folder, self._stack = home, folder, stack
        tls = home / "tls"
        tls.mkdir()
        self.authority, self.stranger = Authority(tls), Authority(tls, "stranger")
        self.api_port, *ports = (free_port() for _ in range(9))
        self.ports = {
            f"relay-{n}": dict(zip(("public", "https", "control"), ports[3 * n - 3 :], strict=False)) for n in (1, 2)
        }
        self.postgres = Postgres(home / "postgres", ports[6], self.authority)
        self.redis = Redis(home / "redis", ports[7], self.authority)
        for server in (self.postgres, self.redis):
            stack.callback(server.kill)
            server.start()
        self.secrets = {
            "database_url": self.postgres.url(),
            "redis_url": self.redis.url(),
            "master_key": new_master_key(),
            "peer_key": secrets.token_urlsafe(32),
        }
        self._keys = home / "secrets"
        self._keys.mkdir(mode=0o700)
        for name, text in self.secrets.items():
            self.secret(name, text)
        self.config = home / "portico.toml"
        self.config.write_text(self._settings())
        self.children: dict[str, Child] = {}

    def secret(self, name: str, text: str) -> Path:
        """A file that holds it."""
        path = self._keys / name
        path.touch(0o600)
        path.write_text(text + "\n")
        return path

    @property
    def api_url(self) -> str:
        return f"https://localhost:{self.api_port}"

    def _settings(self) -> str:
        cert, key = self.authority.issue("platform", *NAMES)
        control = {
            "database_url_file": "secrets/database_url", "redis_url_file": "secrets/redis_url",
            "master_key_file": "secrets/master_key", "api_port": self.api_port, "api_url": self.api_url,
            "public_url": f"https://localhost:{self.ports['relay-1']['https']}",
            "api_tls_cert_file": str(cert), "api_tls_key_file": str(key), "redis_timeout_seconds": 0.5,
        }  # fmt: skip
        relay = {
            "api_url": self.api_url, "api_ca_file": str(self.authority.ca), "peer_ca_file": str(self.authority.ca),
            "peer_key_file": "secrets/peer_key", "redis_url_file": "secrets/redis_url", "exempt_loopback": True,
            "tls_certificates": [f"{cert}:{key}"], "control_tls_cert_file": str(cert), "control_tls_key_file": str(key),
        }  # fmt: skip
        own = {"database_url_file": "secrets/database_url"}
        tables = {"api": control, "relay": relay, "worker": own, "migrate": own}
        return "\n".join(
            line
            for table, values in tables.items()
            for line in (f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()))
        )

    # -- processes -----------------------------------------------------------------------------------------------------
    def run(self, *args: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        env = clean_environment(settings)
        argv = portico_argv(*args, "--config", str(self.config))
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)

    def install(self) -> None:
        """Schema, first accounts, keys."""
        for args in (
            ("migrate",),
            ("admin", "init", "--keys", str(self._keys), "--relay", "relay-1", "--relay", "relay-2"),
        ):
            done = self.run(*args)
            assert done.returncode == 0, done.stderr
        for name in ("operator", "agent", "relay-1", "relay-2"):
            self.secrets[name] = (self._keys / f"{name}.key").read_text().strip()

    def start(self, name: str, **settings: Any) -> Child:
        """``api``, ``worker`` or a relay; more settings by variables."""
        if name in self.ports:
            own = self.ports[name]
            others = [f"wss://localhost:{at['control']}/v1/peer" for other, at in self.ports.items() if other != name]
            settings = {
                "relay_name": name, "relay_key_file": self._keys / f"{name}.key", "state_dir": self.home / name,
                "connect_url": f"wss://localhost:{own['control']}/v1/connect", "peers": ",".join(others),
                "public_url": f"https://localhost:{own['https']}", **{f"{key}_port": port for key, port in own.items()},
            } | settings  # fmt: skip
        command = "relay" if name in self.ports else name
        child = Child(name, [command, "--config", str(self.config)], self.folder, settings)
        self._stack.callback(child.end)
        self.children[name] = child
        return child

    def ready(self, name: str) -> None:
        """Until it serves."""
        child = self.children[name]
        if name == "worker":
            child.wait_for(lambda: "worker ready" in child.err, 20, "ready line")
            return
        url = f"{self.api_url}/readyz" if name == "api" else f"https://localhost:{self.ports[name]['control']}/readyz"
        child.wait_for(lambda: self.status(url) == 200, 30, f"answer of {url}")

    def start_all(self) -> None:
        names = ["api", "relay-1", "relay-2", "worker"]
        for name in names:
            self.start(name)
        for name in names:
            self.ready(name)
        # An agent knows the relays that were there when it asked: with both, the death of either costs it a moment.
        api = self.children["api"]
        for name in self.ports:
            api.wait_for(lambda name=name: f"relay registered relay={name}" in api.err, 10, f"heartbeat of {name}")

    def agent(self, target: Path, name: str = "web", **settings: Any) -> Child:
        """An agent that serves a folder as the tunnel ``name``; ``settings`` go before what it needs to get in."""
        own = {
            "server": self.api_url, "ca_file": self.authority.ca, "agent_key_file": self._keys / "agent.key",
            "config_dir": self.home / "agent",
        } | settings  # fmt: skip
        child = Child("agent", ["http", f"file://{target}", "--name", name, "--json", "--no-inspect"], self.folder, own)
        self._stack.callback(child.end)
        return child

    # -- what is seen from outside ---------------------------------------------------------------------------------------
    def status(self, url: str, host: str | None = None, trust: Path | None = None) -> int:
        """The status of an answer; 0 without one."""
        context = ssl.create_default_context(cafile=str(trust or self.authority.ca))
        headers, extensions = ({"Host": host}, {"sni_hostname": host}) if host else ({}, {})
        try:
            with httpx.Client(verify=context, trust_env=False, timeout=5) as client:
                return client.get(url, headers=headers, extensions=extensions).status_code
        except httpx.TransportError:
            return 0

    def visit(self, name: str, path: str = "/app.txt") -> int:
        """The tunnel `web` by one relay, over TLS that is checked."""
        return self.status(f"https://127.0.0.1:{self.ports[name]['https']}{path}", "web.localhost")

    def texts(self) -> list[Path]:
        """Logs of every process."""
        return [*self.folder.iterdir(), self.postgres.log, self.redis.log]


def readable_by_all(root: Path, skip: Sequence[Path]) -> list[Path]:
    """Files below ``root`` that any user of the machine can read."""
    found = []
    for folder, names, files in os.walk(root):
        here = Path(folder)
        names[:] = [name for name in names if here / name not in skip and (here / name).stat().st_mode & 0o001]
        found += [here / name for name in files if (here / name).stat().st_mode & 0o004]
    return found
