"""One platform of separate processes, TLS everywhere: it serves, survives the death of each process, and trusts nobody else."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pytest

from portico.embedded.folders import temp_home
from tests.ports import free_port
from tests.system.platform import Child
from tests.system.production import Production, readable_by_all
from tests.timing import PATIENCE_SECONDS, allowed

pytestmark = [pytest.mark.system, pytest.mark.realtime, pytest.mark.slow]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    home = temp_home("portico-production-")
    home.chmod(0o755)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        yield Production(home, tmp_path_factory.mktemp("production"), stack)


def until(what: Callable[[], bool], limit: float, why: str) -> float:
    """Seconds until it is true."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < allowed(limit, began), f"{why}: not in {limit:g} s"
        time.sleep(0.05)
    return time.monotonic() - began


def works(platform: Production) -> bool:
    """The URL answers by either relay: by the one that has the agent, and by the other over their link."""
    return platform.visit("relay-1") == 200 and platform.visit("relay-2") == 200


def test_a_database_of_a_stranger_is_refused(platform: Production) -> None:
    """Before anything else: the password must not reach it."""
    url = platform.secret("stranger_url", platform.postgres.url(ca=platform.stranger.ca))
    done = platform.run("migrate", database_url_file=url)
    assert done.returncode == 1
    assert "the database's certificate is refused" in done.stderr and "unable to get local issuer" in done.stderr
    assert "sslrootcert" in done.stderr and "Traceback" not in done.stderr


def test_it_serves(platform: Production) -> None:
    site = platform.home / "site"
    site.mkdir()
    (site / "app.txt").write_text("hello")
    platform.install()
    platform.start_all()
    agent = platform.agent(site)
    agent.wait_for(lambda: '"online"' in agent.out, 20, "online event")
    assert "https://web.localhost:" in agent.out
    until(lambda: works(platform), 10, "the URL")
    platform.children["agent"] = agent


@pytest.mark.parametrize("name", ["api", "worker", "relay-1", "relay-2", "postgres", "redis"])
def test_each_process_may_die(platform: Production, name: str) -> None:
    """Killed and started again, as its supervisor does; the URL works at the latest then, by both relays."""
    if name in ("postgres", "redis"):
        server = platform.postgres if name == "postgres" else platform.redis
        server.kill()
        assert works(platform), "a tunnel does not notice"
        server.start()
        until(lambda: platform.status(f"{platform.api_url}/readyz") == 200, 15, "the API with its database")
    else:
        platform.children[name].kill()
        platform.children[name].process.wait()
        if not name.startswith("relay"):
            assert works(platform), "a tunnel does not notice"
        else:
            other = "relay-2" if name == "relay-1" else "relay-1"
            until(lambda: platform.visit(other) == 200, 10, f"the URL by {other} alone")
        platform.start(name)
        platform.ready(name)
    until(lambda: works(platform), 15, f"the URL after the death of {name}")


def test_nobody_else_is_trusted(platform: Production) -> None:
    """One process each with another authority: none gets further, and each says why."""
    stranger = platform.stranger.ca
    redis = platform.secret("stranger_redis", f"{platform.redis.url().split('?')[0]}?ssl_ca_certs={stranger}")
    kept = dict(platform.children)
    platform.ports["relay-3"] = {name: free_port() for name in ("public", "https", "control")}
    key = platform.home / "secrets" / "relay-2.key"
    started = {
        "agent": platform.agent(platform.home / "site", ca_file=stranger, config_dir=platform.home / "other"),
        "relay": platform.start("relay-3", relay_key_file=key, api_ca_file=stranger, peer_ca_file=stranger),
        "api": platform.start("api", redis_url_file=redis, api_port=free_port()),
    }
    platform.children = kept
    del platform.ports["relay-3"]
    says = {
        "agent": ["its certificate is not trusted", "PORTICO_CA_FILE"],
        "relay": ["edge stream is down", "certificate verify failed", "peer is out of reach"],
        "api": ["redis is not reachable", "its certificate is refused"],
    }
    for name, child in started.items():
        until_said(child, says[name])
        assert "Traceback" not in child.err
        child.end()
    assert '"online"' not in started["agent"].out
    address = f"https://127.0.0.1:{platform.ports['relay-1']['https']}/app.txt"
    assert platform.status(address, "web.localhost", stranger) == 0, "a visitor checks, too"


def test_a_relay_of_a_stranger_gets_no_agent(platform: Production) -> None:
    """One that is first in an agent's list and shows another authority's certificate: the agent says so, and takes the next."""
    done = platform.run("admin", "init", "--keys", str(platform.home / "secrets"), "--relay", "relay-3")
    assert done.returncode == 0, done.stderr
    cert, key = platform.stranger.issue("far", "localhost")
    kept = dict(platform.children)
    platform.ports["relay-3"] = {name: free_port() for name in ("public", "https", "control")}
    relay = platform.start("relay-3", region="far", control_tls_cert_file=cert, control_tls_key_file=key)
    del platform.ports["relay-3"]
    platform.children = kept
    until_said(relay, ["edge stream is up"])
    agent = platform.agent(
        platform.home / "site", name="far", region="far", config_dir=platform.home / "far", log_level="DEBUG"
    )
    until_said(agent, ['"online"', "relay refused or unreachable", "certificate"])
    for child in (agent, relay):
        child.end()
    assert "tunnel bound" not in relay.err


def until_said(child: Child, words: list[str]) -> None:
    """Until its output has all of them."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while missing := [word for word in words if word not in child.out + child.err]:
        assert time.monotonic() < deadline, f"{child.name} does not say {missing}\n{child.tail()}"
        time.sleep(0.05)


def test_no_secret_is_anywhere_to_be_read(platform: Production) -> None:
    """Not on a command line (`ps`), nor in an environment, a log, or a file that every user may read."""
    words = [platform.postgres.password, platform.redis.password]
    words += [text for name, text in platform.secrets.items() if not name.endswith("_url")]
    words += [quote(word, safe="") for word in words]
    seen = {}
    for name, child in platform.children.items():
        if child.process.poll() is None:
            for part in ("cmdline", "environ"):
                seen[f"{part} of {name}"] = Path(f"/proc/{child.pid}/{part}").read_bytes().decode(errors="replace")
    assert len(seen) >= 8
    for path in platform.texts() + readable_by_all(platform.home, [platform.home / "postgres" / "data"]):
        seen[str(path)] = path.read_text(errors="replace")
    for where, text in seen.items():
        for word in words:
            assert word not in text, f"a secret stands in {where}"


def test_they_end_in_order(platform: Production) -> None:
    """SIGTERM, and every process leaves with 0."""
    for name in ("agent", "relay-1", "relay-2", "worker", "api"):
        child = platform.children[name]
        os.kill(child.pid, signal.SIGTERM)
        assert child.process.wait(20) == 0, child.tail()
        assert "Traceback" not in child.err
