"""The platform as separate processes, as in production, so that each can really be killed: `portico api`, `portico relay`.

    agent ──gate──► API ──► PostgreSQL, Valkey
      └────gate──► relay ──gate──► API

Grants and session tokens live 5 s here and the clocks are trusted to 1 s; the outage grace is the default.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from portico.embedded.postgres import EmbeddedPostgres
from portico.embedded.units import portico_argv
from portico.embedded.valkey import EmbeddedValkey
from tests.ports import free_port
from tests.system.gate import Gate
from tests.system.platform import Account, Child, clean_environment, signal_all, tree

LIFE, LEEWAY, REFRESH_GRACE = 5, 1, 6
#: For processes of every kind; each takes what is a setting of its own.
SHORT_LIVES: dict[str, Any] = {
    "grant_life_seconds": LIFE,
    "session_token_seconds": LIFE,
    "token_leeway_seconds": LEEWAY,
    "grant_refresh_grace_seconds": REFRESH_GRACE,
    "edge_heartbeat_seconds": 1,
    "edge_silence_seconds": 3,
    "refresh_retry_max_seconds": 3,
}
#: After this long without the control plane nothing but the outage grace keeps a tunnel alive.
OUTAGE_SECONDS = LIFE + LEEWAY + REFRESH_GRACE + 2


class Parts:
    """See the module. ``stack`` ends everything, also after a failed start."""

    def __init__(self, home: Path, folder: Path, stack: ExitStack) -> None:
        self.folder, self._home, self._stack = folder, home, stack
        self.http_port, self.https_port, self._control, self._api = (free_port() for _ in range(4))
        self.to_api, self.relay_to_api, self.to_relay = Gate(self._api), Gate(self._api), Gate(self._control)
        for gate in (self.to_api, self.relay_to_api, self.to_relay):
            stack.callback(gate.close)
        self._postgres = EmbeddedPostgres(home)
        self._valkey = EmbeddedValkey(home)
        stack.callback(self._postgres.stop)
        stack.callback(self._valkey.stop)
        self._postgres.start()
        self._valkey.start()
        self._key = base64.urlsafe_b64encode(os.urandom(32)).decode()
        self._relay_key = self._prepare()["relay_keys"]["relay-1"]
        self.api = self.start_api()
        self.relay = self.start_relay()
        self.account = Account(f"http://127.0.0.1:{self._api}", f"http://127.0.0.1:{self.to_api.port}")
        stack.callback(self.account.close)

    def _control_settings(self) -> dict[str, Any]:
        return SHORT_LIVES | {
            "database_url": self._postgres.uri,
            "redis_url": self._valkey.url,
            "master_key": self._key,
            "api_port": self._api,
            "api_url": f"http://127.0.0.1:{self.to_api.port}",
            "public_url": f"http://localhost:{self.http_port}",
        }

    def _prepare(self) -> dict[str, Any]:
        request = json.dumps({"relays": ["relay-1"], "known": {}, "home": str(self._home)})
        env = clean_environment(self._control_settings())
        done = subprocess.run(
            portico_argv("prepare"), env=env, input=request, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def start_api(self) -> Child:
        """A new API process; returns when it answers."""
        child = Child("api", ["api"], self.folder, self._control_settings())
        self._stack.callback(child.end)
        child.wait_for(lambda: answers(self._api, "/readyz"), 30, "answer to /readyz")
        return child

    def start_relay(self) -> Child:
        """A new relay process; returns when it accepts."""
        settings = {
            "relay_key": self._relay_key,
            "api_url": f"http://127.0.0.1:{self.relay_to_api.port}",
            "state_dir": self._home / "relay-1",
            "public_port": self.http_port,
            "https_port": self.https_port,
            "control_port": self._control,
            "connect_url": f"ws://127.0.0.1:{self.to_relay.port}/v1/connect",
            "exempt_loopback": 1,
        }
        child = Child("relay", ["relay"], self.folder, SHORT_LIVES | settings)
        self._stack.callback(child.end)
        child.wait_for(lambda: answers(self._control, "/healthz"), 30, "answer to /healthz")
        return child

    def kill_control_plane(self) -> None:
        """API, PostgreSQL and Valkey end by `kill -9`."""
        for process in (self.api.process, self._postgres.process, self._valkey.process):
            assert process is not None
            signal_all(tree(process.pid), signal.SIGKILL)
            process.wait()

    def restart_control_plane(self) -> None:
        self._postgres.stop()
        self._valkey.stop()
        self._postgres.start()
        self._valkey.start()
        self.api = self.start_api()

    def streams_up(self) -> int:
        """How often the present relay process found its edge stream up."""
        return self.relay.err.count("edge stream is up")

    def grant_life(self) -> float:
        """Seconds that a grant made now lives, from the token itself."""
        body = {"agent_id": "agt-probe", "tunnels": [{"protocol": "http", "name": "probe"}]}
        made = self.account.call("POST", "/agent/sessions", body, self.account.agent_key)
        claims = json.loads(base64.urlsafe_b64decode(made["grants"][0]["grant"].split(".")[1] + "=="))
        return float(claims["exp"] - time.time())


def answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
