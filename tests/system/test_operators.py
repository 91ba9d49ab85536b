"""An operator on a whole platform: a suspension that reaches live tunnels in two seconds, and the log checked from outside."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from portico.embedded.units import portico_argv
from tests.system.platform import POLL_SECONDS, Account, Agent, Up, clean_environment
from tests.timing import allowed

pytestmark = [pytest.mark.system, pytest.mark.realtime]

LIMIT_SECONDS = 2.0


def until(what: Callable[[], bool], limit: float, why: str) -> float:
    """Seconds until it is so."""
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < allowed(limit, begun), why
        time.sleep(POLL_SECONDS)
    return time.monotonic() - begun


class App(BaseHTTPRequestHandler):
    """A local app."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def port() -> Iterator[int]:
    """Of a local app that serves."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), App)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def test_suspension_and_its_end(up: Up, account: Account, tmp_path: Path, port: int) -> None:
    agent = Agent(account, tmp_path, port, "held").online()
    back = agent
    try:
        key = up.credentials["operator_key"]
        organization = account.call("GET", "/org")["id"]
        host = {"Host": f"held.localhost:{up.http_port}", "Accept": "text/html"}

        def visit() -> httpx.Response:
            return httpx.get(f"http://127.0.0.1:{up.http_port}/", headers=host, trust_env=False)

        assert visit().status_code == 200
        path = f"/admin/organizations/{organization}"
        account.call("POST", f"{path}/suspend", {"reason": "unpaid invoice"}, token=key)
        until(lambda: visit().status_code == 403, LIMIT_SECONDS, "a suspended organization still serves")
        page = visit()
        assert page.headers["portico-error"] == "edge.account_suspended"
        assert "is suspended" in page.text
        shown = account.call("GET", "/org")
        assert (shown["standing"], shown["suspended_reason"]) == ("suspended", "unpaid invoice")
        assert account.tunnels()["held"]["state"] == "suspended"
        told = up.command(account, "http", str(port), "--json")
        assert told.returncode != 0 and "unpaid invoice" in told.stderr

        account.call("POST", f"{path}/resume", {"reason": "paid"}, token=key)
        if agent.process.poll() is not None:
            back = Agent(account, tmp_path, port, "held").online()
        until(lambda: visit().status_code == 200, 15, f"does not serve again: {back.said}")
        acts = {row["action"] for row in account.call("GET", "/audit?limit=100")["data"]}
        assert {"organization.suspend", "organization.resume"} <= acts
    finally:
        for one in {agent, back}:
            one.end()


def test_the_log_is_checked_from_outside(up: Up, account: Account) -> None:
    reader = account.call("POST", "/api-keys", {"kind": "api", "name": "auditor", "scopes": ["audit:read"]})["key"]

    def verify(key: str, *args: str) -> dict[str, Any]:
        env = clean_environment({"server": account.api_url, "agent_key": key, "config_dir": up.folder / "config"})
        argv = portico_argv("audit", "verify", "--json", *args)
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    mine = verify(reader)
    assert mine["valid"] and mine["chain"].startswith("org_") and mine["checked"] >= 4
    whole = verify(up.credentials["operator_key"], "--installation")
    assert whole["valid"] and whole["chain"] == "installation" and whole["checked"] >= 2
