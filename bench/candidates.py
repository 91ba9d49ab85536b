"""What is measured: the direct app, one nginx hop, Portico and other tunnels, each in front of the same two apps.

A candidate says where visitors of an app come in and which processes its CPU and memory are: the app's and the load
generator's are nobody's. What is not installed is skipped with its reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench import nginx
from bench.proc import Roles, tree
from bench.processes import Child, NotStarted, Run, accepts, environment, free_port, listener
from bench.visit import Endpoint
from portico.embedded.units import portico_argv

#: The two apps behind every candidate.
SMALL, BULK = "small", "bulk"
APPS = (SMALL, BULK)
START_SECONDS = 20.0
#: Where `cargo install` puts rathole and bore; a second run finds them.
CARGO_SECONDS = 1500.0


class Missing(Exception):
    """A candidate that this machine cannot run, and why."""


@dataclass(frozen=True)
class Candidate:
    """One way from a visitor to the app. ``roles`` by app: the processes that forward, by what they are."""

    name: str
    title: str
    endpoints: Mapping[str, Endpoint]
    roles: Mapping[str, Roles] = field(default_factory=dict)
    version: str = ""


@dataclass
class Ground:
    """What all candidates of a run share: the processes and the apps (their ports, their pids)."""

    run: Run
    ports: dict[str, int] = field(default_factory=dict)
    apps: dict[str, Child] = field(default_factory=dict)
    #: What the small app is: nginx, or our own where nginx is missing.
    app: str = ""
    platform: Platform | None = None

    def start_apps(self) -> None:
        for name in APPS:
            if name == SMALL and nginx.program():
                self.app = f"nginx {nginx.version()}"
                self.ports[name], self.apps[name] = nginx.start_app(self.run)
                continue
            sock = listener()
            argv = [sys.executable, "-m", "bench.apps", name, str(sock.fileno())]
            self.ports[name] = int(sock.getsockname()[1])
            self.apps[name] = self.run.start(f"app-{name}", argv, pass_fds=[sock.fileno()])
            sock.close()
            if name == SMALL:
                self.app = "our own (Python, uvloop): nginx is not installed"

    def portico(self) -> Platform:
        """The one platform of the run, started when first asked for."""
        if self.platform is None:
            self.platform = Platform(self.run)
        return self.platform


class Platform:
    """`portico up` in a temporary folder, and agents in front of apps."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.home = run.home("portico")
        ports = [part for name in ("http", "https", "control", "api") for part in (f"--{name}-port", "0")]
        env = environment(log_level="WARNING")
        self.child = run.start("portico-up", portico_argv("up", "--data", str(self.home), *ports), env=env)
        self.child.wait_for(lambda: "ready" in self.child.out.splitlines(), 120, "its `ready` line")
        self.credentials: dict[str, str] = json.loads((self.home / "credentials.json").read_text())
        self.http_port = _port(self.credentials["relay_url"])
        self.https_port = _port(self.credentials["https_url"])

    def pid(self, name: str) -> int:
        """The present process of one part (relay-1, api, …)."""
        rows = json.loads((self.home / "run" / "children").read_text())
        return int(next(row["pid"] for row in rows if row["name"] == name))

    @property
    def agent_settings(self) -> dict[str, str]:
        given = self.credentials
        config = str(self._run.home("config"))
        return {"server": given["api_url"], "agent_key": given["agent_key"], "config_dir": config}

    def start_agent(self, *args: str) -> Child:
        """A real agent, `portico ARGS… --json`, not yet online."""
        env = environment(**self.agent_settings, log_level="WARNING")
        return self._run.start("agent", portico_argv(*args, "--json"), env=env)

    def online(self, *args: str) -> tuple[Child, str]:
        """The same, waited for; its URL."""
        child = self.start_agent(*args)
        event = child.wait_for(lambda: _event(child.out, "online"), 30, "its `online` line")
        return child, str(event["url"])


def _event(text: str, kind: str) -> dict[str, object]:
    for line in text.split("\n")[:-1]:
        if line.startswith("{") and (event := json.loads(line)).get("event") == kind:
            return dict(event)
    return {}


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1].split("/")[0])


# ── builders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def direct(ground: Ground) -> Candidate:
    return Candidate("direct", "direct to the app", {app: Endpoint(ground.ports[app]) for app in APPS}, {}, ground.app)


def nginx_hop(ground: Ground) -> Candidate:
    if not nginx.program():
        raise Missing("nginx is not on PATH")
    ports, child = nginx.start_hop(ground.run, ground.ports)
    roles = {app: {"proxy": tree(child.pid)} for app in APPS}
    return Candidate("nginx", "nginx, one proxy hop", _endpoints(ports), roles, f"nginx {nginx.version()}")


def _endpoints(ports: dict[str, int]) -> dict[str, Endpoint]:
    return {app: Endpoint(port) for app, port in ports.items()}


def portico(
    ground: Ground, name: str = "portico", title: str = "Portico", *options: str, tls: bool = False
) -> Candidate:
    platform = ground.portico()
    endpoints, roles = {}, {}
    for app in APPS:
        agent, url = platform.online("http", str(ground.ports[app]), "--name", f"{name}-{app}", *options)
        port = platform.https_port if tls else platform.http_port
        endpoints[app] = Endpoint(port, url.split("//")[1].split(":")[0], tls)
        roles[app] = {"relay": [platform.pid("relay-1")], "agent": [agent.pid]}
    return Candidate(name, title, endpoints, roles, _portico_version())


def portico_tls(ground: Ground) -> Candidate:
    return portico(ground, "portico-tls", "Portico, TLS at the edge", tls=True)


#: Ten rules that each request meets: five for its address, of which the last one lets it in, and five for header fields.
TEN_RULES = {
    "addresses": {
        "rules": [
            *({"deny": network} for network in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")),
            {"allow": "127.0.0.0/8"},
        ]
    },
    "headers": {
        "request": {"remove": ["X-Debug", "X-Internal"], "add": [{"name": "X-Environment", "value": "bench"}]},
        "response": {"remove": ["Server"], "add": [{"name": "X-Frame-Options", "value": "DENY"}]},
    },
}


def portico_policy(ground: Ground) -> Candidate:
    path = ground.run.home("policy") / "policy.json"
    path.write_text(json.dumps(TEN_RULES))
    return portico(ground, "portico-policy", "Portico, ten rules", "--policy-file", str(path))


def portico_no_inspect(ground: Ground) -> Candidate:
    if not any((Path(portico_package()) / "agent").glob("inspect*")):
        raise Missing("this version has no local inspector to switch off")
    return portico(ground, "portico-no-inspect", "Portico, --no-inspect", "--no-inspect")


def portico_tcp(ground: Ground) -> Candidate:
    help_of = subprocess.run(portico_argv("tcp", "--help"), env=environment(), capture_output=True, check=False)
    if help_of.returncode:
        raise Missing("this version has no `portico tcp`")
    platform = ground.portico()
    endpoints, roles = {}, {}
    for app in APPS:
        agent, url = platform.online("tcp", str(ground.ports[app]), "--name", f"tcp-{app}")
        endpoints[app] = Endpoint(_port(url))
        roles[app] = {"relay": [platform.pid("relay-1")], "agent": [agent.pid]}
    return Candidate("portico-tcp", "Portico, TCP tunnel", endpoints, roles, _portico_version())


def portico_package() -> str:
    import portico as package

    return str(Path(str(package.__file__)).parent)


def _portico_version() -> str:
    from importlib.metadata import version

    return f"portico {version('portico')}"


def rathole(ground: Ground) -> Candidate:
    program = cargo_program("rathole", "rathole")
    control, ports = free_port(), {app: free_port() for app in APPS}
    home = ground.run.home("rathole")
    server = f'[server]\nbind_addr = "127.0.0.1:{control}"\ndefault_token = "bench"\n'
    client = f'[client]\nremote_addr = "127.0.0.1:{control}"\ndefault_token = "bench"\n'
    for app in APPS:
        server += f'[server.services.{app}]\nbind_addr = "127.0.0.1:{ports[app]}"\n'
        client += f'[client.services.{app}]\nlocal_addr = "127.0.0.1:{ground.ports[app]}"\n'
    (home / "server.toml").write_text(server)
    (home / "client.toml").write_text(client)
    far = ground.run.start("rathole-server", [program, "--server", home / "server.toml"])
    far.wait_for(lambda: accepts(control), START_SECONDS, "its control port")
    near = ground.run.start("rathole-client", [program, "--client", home / "client.toml"])
    _both_open(near, ports)
    roles = {app: {"relay": [far.pid], "agent": [near.pid]} for app in APPS}
    return Candidate("rathole", "rathole (plain TCP)", _endpoints(ports), roles, _version(program))


def bore(ground: Ground) -> Candidate:
    if accepts(7835):
        raise Missing("its fixed control port 7835 is taken")
    program = cargo_program("bore-cli", "bore")
    first = free_port()
    far = ground.run.start("bore-server", [program, "server", "--bind-addr", "127.0.0.1", "--min-port", "1024"])
    far.wait_for(lambda: accepts(7835), START_SECONDS, "its control port")
    ports, roles = {}, {}
    for app in APPS:
        port = first if app == SMALL else free_port()
        argv: list[str | Path] = [program, "local", str(ground.ports[app]), "-l", "127.0.0.1", "-t", "127.0.0.1"]
        near = ground.run.start(f"bore-{app}", [*argv, "-p", str(port)])
        ports[app], roles[app] = port, {"relay": [far.pid], "agent": [near.pid]}
        near.wait_for(lambda port=port: accepts(port), START_SECONDS, "its public port")  # type: ignore[misc]
    return Candidate("bore", "bore (plain TCP)", _endpoints(ports), roles, _version(program))


def _frp(ground: Ground, kind: str) -> Candidate:
    servers, clients = shutil.which("frps"), shutil.which("frpc")
    if not servers or not clients:
        raise Missing("frps and frpc are not on PATH")
    control, vhost = free_port(), free_port()
    home = ground.run.home(f"frp-{kind}")
    ports = {app: vhost if kind == "http" else free_port() for app in APPS}
    server = f'bindAddr = "127.0.0.1"\nbindPort = {control}\nproxyBindAddr = "127.0.0.1"\nvhostHTTPPort = {vhost}\n'
    (home / "frps.toml").write_text(server + 'log.level = "warn"\n')
    client = f'serverAddr = "127.0.0.1"\nserverPort = {control}\nlog.level = "warn"\n'
    for app in APPS:
        client += (
            f'[[proxies]]\nname = "{app}"\ntype = "{kind}"\nlocalIP = "127.0.0.1"\nlocalPort = {ground.ports[app]}\n'
        )
        client += f'customDomains = ["{app}.example"]\n' if kind == "http" else f"remotePort = {ports[app]}\n"
    (home / "frpc.toml").write_text(client)
    far = ground.run.start(f"frps-{kind}", [servers, "-c", home / "frps.toml"])
    far.wait_for(lambda: accepts(control), START_SECONDS, "its control port")
    near = ground.run.start(f"frpc-{kind}", [clients, "-c", home / "frpc.toml"])
    _both_open(near, ports)
    roles = {app: {"relay": [far.pid], "agent": [near.pid]} for app in APPS}
    endpoints = {app: Endpoint(ports[app], f"{app}.example") for app in APPS}
    title = "frp, HTTP mode" if kind == "http" else "frp, TCP mode"
    return Candidate(f"frp-{kind}", title, endpoints, roles, f"frp {_version(servers)}")


def frp_http(ground: Ground) -> Candidate:
    return _frp(ground, "http")


def frp_tcp(ground: Ground) -> Candidate:
    return _frp(ground, "tcp")


BUILDERS: dict[str, Callable[[Ground], Candidate]] = {
    "direct": direct,
    "nginx": nginx_hop,
    "portico": portico,
    "portico-no-inspect": portico_no_inspect,
    "portico-tls": portico_tls,
    "portico-policy": portico_policy,
    "portico-tcp": portico_tcp,
    "rathole": rathole,
    "bore": bore,
    "frp-http": frp_http,
    "frp-tcp": frp_tcp,
}


def _both_open(near: Child, ports: dict[str, int]) -> None:
    near.wait_for(lambda: all(accepts(port) for port in ports.values()), START_SECONDS, "its public ports")


def _version(program: str | Path) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    found = [line.split(":", 1)[-1].strip() for line in done.stdout.splitlines() if "version" in line.lower()]
    return found[0] if found else done.stdout.strip().splitlines()[0]


# ── programs that cargo builds ────────────────────────────────────────────────────────────────────────────────────────


def cache_folder() -> Path:
    """Where built programs are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "portico-bench"


def cargo_program(crate: str, program: str) -> Path:
    """``program`` from PATH or the cache; else built by `cargo install` into the cache. Raises :class:`Missing`."""
    found = shutil.which(program)
    if found:
        return Path(found)
    kept = cache_folder() / "cargo" / "bin" / program
    if kept.exists():
        return kept
    cargo = shutil.which("cargo")
    if not cargo:
        raise Missing(f"{program} is not on PATH, and there is no cargo to build it")
    print(f"building {crate} with cargo into {kept.parent} (once, some minutes) …", file=sys.stderr, flush=True)
    # Not --locked: the locked `time` crate of rathole 0.5.0 does not compile with a recent rustc.
    argv = [cargo, "install", "--quiet", "--root", str(kept.parent.parent), crate]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=CARGO_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Missing(f"cargo did not build {crate} within {CARGO_SECONDS:g} s") from None
    if done.returncode or not kept.exists():
        raise Missing(f"cargo could not build {crate}: {' '.join(done.stderr.split())[-200:]}")
    return kept


__all__ = ["APPS", "BUILDERS", "BULK", "SMALL", "Candidate", "Ground", "Missing", "NotStarted", "Platform"]
