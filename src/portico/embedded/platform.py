"""Portico on one machine: what `portico up` starts, in which order, with which settings.

    home and lock → leftovers of a killed run → listening sockets → PostgreSQL, Valkey → migrations and first accounts
    → api (which has read in its modules meanwhile), relays, worker → credentials.json → ready

The supervisor owns the listening sockets for its whole life and passes them to the api and the relays.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from portico.embedded import devca, ports, secretfiles
from portico.embedded.accounts import server_account
from portico.embedded.figures import open_listeners, write_targets
from portico.embedded.folders import make_home, own_folder
from portico.embedded.lock import OwnerLock
from portico.embedded.logs import LogStream
from portico.embedded.postgres import EmbeddedPostgres
from portico.embedded.roster import Roster
from portico.embedded.supervisor import Supervisor, SupervisorLimits
from portico.embedded.units import ProcessUnit, Standby, answers, postgres_unit, run_to_end, valkey_unit
from portico.embedded.valkey import EmbeddedValkey
from portico.errors import Problem
from portico.kit.sockets import check_port, port_of
from portico.settings import ApiSettings, PlatformSettings, RelaySettings, secret_file_variables

#: Of our own environment, what would mislead a child: it belongs to commands that people type.
_NOT_FOR_CHILDREN = (
    "PORTICO_AGENT_KEY",
    "PORTICO_SERVER",
    "PORTICO_CONFIG_DIR",
    "PORTICO_LISTEN_FDS",
    "PORTICO_NOTIFY_FD",
    "CREDENTIALS_DIRECTORY",
    # What they name was read here; children get the values.
    *secret_file_variables(PlatformSettings, RelaySettings, ApiSettings),
)
#: Seconds for a relay's visitors and a worker's job when everything ends: the rest of the ten is for what comes after.
_RELAY_DRAIN_SECONDS = 5
_API_DRAIN_SECONDS = 2
#: Seconds that we wait for relays to follow: above the ten in which one fetches its certificates before it serves, and the time
#: that a busy machine needs for the rest.
_FOLLOW_SECONDS = 30.0
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104 - where to reach a wildcard listener


_LOOPBACK = "127.0.0.1"
#: The payment providers that ``demo_billing`` simulates. Nobody but this machine reaches them.
SIMULATORS = ("stripe", "razorpay", "paypal")


@dataclasses.dataclass(frozen=True, slots=True)
class RelayPorts:
    """The addresses of one relay."""

    name: str
    http: int
    https: int
    control: int


class Platform:
    """One run of everything. :meth:`start`, then :meth:`stop`, also after a failed start."""

    def __init__(self, settings: PlatformSettings, data: Path, logs: LogStream) -> None:
        self.settings, self.logs = settings, logs
        self.home = data
        self.credentials: dict[str, Any] = {}
        #: E-mail and password of the first operator, when this run made it: the only time they can be shown.
        self.first_admin: dict[str, str] = {}
        self._lock: OwnerLock | None = None
        self._listeners: dict[str, socket.socket] = {}
        #: Where each process shows its metrics, by its name.
        self._figures: dict[str, socket.socket] = {}
        self._supervisor: Supervisor | None = None
        self._api: ProcessUnit | None = None
        self._database_url = self._redis_url = ""
        #: The key of relay to relay: of this run only, in nobody's file.
        self._peer_key = secrets.token_urlsafe(32)
        #: Of the simulated payment providers: what makes the API and workers use them.
        self._billing: dict[str, str] = {}
        #: Files of certificate distribution, and what is public of them (``certkeys.py``).
        self._keys: dict[str, str] = {}

    # -- addresses ---------------------------------------------------------------------------------------------------

    @property
    def supervisor(self) -> Supervisor:
        assert self._supervisor is not None, "not started"
        return self._supervisor

    @property
    def host(self) -> str:
        """Where our own listeners are reached from this machine."""
        return _WILDCARDS.get(self.settings.host, self.settings.host)

    def _at(self, scheme: str, port: int, path: str = "") -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{port}{path}"

    @property
    def region(self) -> str:
        """Of every relay here."""
        return os.environ.get("PORTICO_REGION") or "local"

    def _visitors(self) -> str:
        """Where visitors of our region arrive, for the look at what they are served."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.region}={host}:{self.relay(1).https}"

    @property
    def dev_ca(self) -> Path:
        """The certificate of the authority behind our HTTPS."""
        return devca.folder(self.home, self.settings.base_domain) / devca.CERTIFICATE_FILE

    @property
    def api_url(self) -> str:
        return self._at("http", port_of(self._listeners["api"]))

    def relay(self, number: int) -> RelayPorts:
        """The addresses of relay ``number`` (1 is the main one)."""
        public, https, control = (port_of(self._listeners[name]) for name in ("public", "https", f"control-{number}"))
        return RelayPorts(f"relay-{number}", public, https, control)

    # -- start -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything; returns when every listener accepts and ``credentials.json`` is written."""
        embedded = self.settings.database_url is None or self.settings.redis_url is None
        wanted, simulated = self._wanted_ports(), self._simulator_ports()
        devca.folder(self.home, self.settings.base_domain)  # refuses a domain that is none before anything is touched
        self._take_home(embedded)
        roster = Roster(self.home / "run" / "children")
        for name in await asyncio.to_thread(roster.end_leftovers):
            self.logs.say(f"ended {name}, left behind by a run that was killed", "WARN")
        roster.remove()
        self._listeners = ports.open_all(self.settings.host, wanted)
        self._listeners |= ports.open_all(_LOOPBACK, simulated)
        self._figures = open_listeners(self.home, self._processes())
        self._supervisor = Supervisor(self.logs, roster, self._limits())
        await self._start_servers()
        if self.settings.demo_billing:
            await self._start_simulators()
        self._api = self._api_unit()
        self._api.stand_by()  # it reads in its modules while the database is prepared
        given = await self._prepare()
        relays = [self._relay_unit(n, given["relay_keys"]) for n in range(1, self.settings.relays + 1)]
        # Side by side: the relays' first question waits in the API's listening queue. Two groups, so that at the end
        # the relays have reported their usage before the API goes.
        await asyncio.gather(self.supervisor.start(self._api), self.supervisor.start(*relays, self._worker_unit()))
        await self._relays_follow()
        self._write_credentials(given)

    async def _relays_follow(self) -> None:
        """Wait until every relay has the edge state, so that a tunnel can start at once. Not for ever: a relay that
        cannot follow says why in its log, and the rest is of use without it."""
        deadline = asyncio.get_running_loop().time() + _FOLLOW_SECONDS
        for number in range(1, self.settings.relays + 1):
            while not await answers(self.host, self.relay(number).control, "/readyz"):
                if asyncio.get_running_loop().time() > deadline:
                    self.logs.say(f"relay-{number} does not follow the API yet", "WARN")
                    break
                await asyncio.sleep(0.03)

    def _take_home(self, embedded: bool) -> None:
        account = server_account(self.home / "pg" / "data") if embedded else None
        self.home = make_home(self.home, account)
        lock = OwnerLock(self.home / "run" / "up.lock")
        try:
            taken = lock.acquire()
        except OSError as err:
            raise Problem("up.data_unusable", f"cannot lock {lock.path}: {err.strerror}") from None
        if not taken:
            pid = lock.holder()
            by = f" (pid {pid})" if pid else ""
            raise Problem("up.already_running", f"portico up already runs on {self.home}{by}", pid=pid)
        self._lock = lock

    def _wanted_ports(self) -> list[tuple[str, int, str, str]]:
        """Name, port, what it is and the option that changes it; checked before anything is touched."""
        s = self.settings
        ports.check_range(s.tcp_ports, {s.http_port, s.https_port, s.control_port, s.api_port})
        wanted = [
            ("api", s.api_port, "API", "--api-port"),
            ("public", s.http_port, "public HTTP", "--http-port"),
            ("https", s.https_port, "public HTTPS", "--https-port"),
            ("control-1", s.control_port, "agents", "--control-port"),
        ]
        # All relays accept from the same public sockets; agents reach each one by a port of its own.
        further = list(s.relay_ports) or [0] * (s.relays - 1)
        if s.relays < 1 or len(further) != s.relays - 1:
            raise Problem("config.invalid", "setting relay_ports: needs one port for each relay after the first")
        for number, port in enumerate(further, start=2):
            wanted.append((f"control-{number}", port, f"agents of relay-{number}", "PORTICO_RELAY_PORTS"))
        for _, port, _, option in wanted:
            check_port(port, option)
        return wanted

    def _simulator_ports(self) -> list[tuple[str, int, str, str]]:
        if not self.settings.demo_billing:
            return []
        if len(self.settings.simulator_ports) != len(SIMULATORS):
            raise Problem("config.invalid", "setting simulator_ports: one port for each payment provider")
        option = "PORTICO_SIMULATOR_PORTS"
        for port in self.settings.simulator_ports:
            check_port(port, option)
        named = zip(SIMULATORS, self.settings.simulator_ports, strict=True)
        return [(name, port, f"simulated {name}", option) for name, port in named]

    async def _start_simulators(self) -> None:
        """Simulated payment providers, before whoever needs their keys."""
        folder = own_folder(self.home / "simulators", 0o700)
        settings_file = folder / "settings.json"
        settings_file.unlink(missing_ok=True)
        unit = ProcessUnit(
            "simulators",
            ["simulators", str(folder), f"{self.api_url}/v1/billing/webhooks"],
            self.environment(),
            listeners={name: self._listeners[name] for name in SIMULATORS},
        )
        await self.supervisor.start(unit)
        self._billing = json.loads(settings_file.read_text(encoding="utf-8"))
        # Who has everything has nothing to buy: further organizations start on the plan that costs nothing.
        self._billing["PORTICO_DEFAULT_PLAN"] = os.environ.get("PORTICO_DEFAULT_PLAN") or "free"

    @property
    def simulators(self) -> dict[str, str]:
        """The simulated payment providers by name, and their URLs; empty without them."""
        ports_of = {name: port_of(self._listeners[name]) for name in SIMULATORS if name in self._listeners}
        return {name: f"http://{_LOOPBACK}:{port}" for name, port in ports_of.items()}

    def _processes(self) -> list[str]:
        return ["api", *(f"relay-{number}" for number in range(1, self.settings.relays + 1)), "worker"]

    def _limits(self) -> SupervisorLimits:
        names = {field.name for field in dataclasses.fields(SupervisorLimits)}
        return SupervisorLimits(**{name: getattr(self.settings, name) for name in names})

    async def _start_servers(self) -> None:
        s = self.settings
        postgres = valkey = None
        if s.database_url is None:
            postgres = EmbeddedPostgres(self.home, pg_bin=s.pg_bin, max_connections=s.postgres_max_connections)
        if s.redis_url is None:
            valkey = EmbeddedValkey(self.home, program=s.valkey_program, max_memory_mib=s.valkey_max_memory_mib)
        units = [*([postgres_unit(postgres)] if postgres else []), *([valkey_unit(valkey)] if valkey else [])]
        if units:
            await self.supervisor.start(*units)
        # Their socket folders are known only once they run.
        self._database_url = s.database_url.reveal() if s.database_url else postgres.uri if postgres else ""
        self._redis_url = s.redis_url.reveal() if s.redis_url else valkey.url if valkey else ""

    async def _prepare(self) -> dict[str, Any]:
        """Migrations (under a lock) and the first accounts, by a process of its own: the supervisor stays small."""
        request = {
            "relays": [f"relay-{n}" for n in range(1, self.settings.relays + 1)],
            "known": {key: secretfiles.read_credentials(self.home).get(key) for key in ("operator_key", "agent_key")},
            "home": str(self.home),
            "region": self.region,
        }
        answer = await run_to_end("migrate", ["prepare"], self.environment(), self.logs, json.dumps(request).encode())
        given: dict[str, Any] = json.loads(answer)
        self.first_admin = given.get("first_admin") or {}
        self._keys = given["certificate_keys"]
        return given

    # -- children ----------------------------------------------------------------------------------------------------

    def environment(self, **more: str | int) -> dict[str, str]:
        """The environment of a child: ours without what belongs to typed commands, then what all share, then ``more``."""
        env = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_CHILDREN}
        main = self.relay(1)
        env |= {
            "PORTICO_DATABASE_URL": self._database_url,
            "PORTICO_REDIS_URL": self._redis_url,
            "PORTICO_MASTER_KEY": secretfiles.master_key(self.home),
            "PORTICO_API_URL": self.api_url,
            "PORTICO_BASE_DOMAIN": self.settings.base_domain,
            "PORTICO_PUBLIC_URL": f"http://{self.settings.base_domain}:{main.http}",
            "PORTICO_LOG_LEVEL": self.settings.log_level,
            "PORTICO_OBJECTS_DIR": str(self.home / "objects"),
            "PYTHONUNBUFFERED": "1",
        }
        return env | {f"PORTICO_{key.upper()}": str(value) for key, value in more.items()}

    def _api_unit(self) -> ProcessUnit:
        s = self.settings
        sock, main = self._listeners["api"], self.relay(1)
        return ProcessUnit(
            "api",
            ["api"],
            self.environment(
                **verification(os.environ),
                api_host=self.settings.host,
                api_port=port_of(sock),
                tcp_ports=self.settings.tcp_ports,
                public_https_port=main.https,
                shutdown_seconds=_API_DRAIN_SECONDS,
            )
            | self._billing,
            listeners={"api": sock, "metrics": self._figures["api"]},
            health=(self.host, port_of(sock), "/readyz"),
            standby=Standby(self.logs, s.standby_after_seconds if s.standby else None),
        )

    def _relay_unit(self, number: int, keys: dict[str, str]) -> ProcessUnit:
        at = self.relay(number)
        state = own_folder(own_folder(self.home / "relays", 0o700) / at.name, 0o700)
        others = [self.relay(n).control for n in range(1, self.settings.relays + 1) if n != number]
        listeners = {"public": self._listeners["public"], "https": self._listeners["https"]}
        return ProcessUnit(
            at.name,
            ["relay"],
            self.environment(
                relay_name=at.name,
                relay_key=keys[at.name],
                state_dir=str(state),
                dev_ca_dir=str(self.dev_ca.parent),
                dev_ca_passphrase=devca.passphrase(self.home),
                public_url=self._at("http", at.http),
                connect_url=self._at("ws", at.control, "/v1/connect"),
                public_host=self.settings.host,
                public_port=at.http,
                https_host=self.settings.host,
                https_port=at.https,
                tcp_host=self.settings.host,
                control_host=self.settings.host,
                control_port=at.control,
                peers=",".join(self._at("ws", port, "/v1/peer") for port in others),
                peer_key=self._peer_key,
                region=self.region,
                region_key_files=self._keys["region_file"],
                certificate_signers=self._keys["signer"],
                exempt_loopback=1,
                drain_seconds=_RELAY_DRAIN_SECONDS,
            ),
            listeners=listeners | {"control": self._listeners[f"control-{number}"], "metrics": self._figures[at.name]},
            # Everything ends: agents have no other place to find first.
            end_signal=signal.SIGINT,
        )

    @property
    def outbox(self) -> Path:
        """The folder that mail is written to while no server is set for it."""
        return self.home / "outbox"

    @property
    def sends_mail(self) -> bool:
        """Whether a server is set for mail."""
        return bool(self.environment().get("PORTICO_SMTP_URL"))

    def _worker_unit(self) -> ProcessUnit:
        environment = self.environment(
            shutdown_seconds=_RELAY_DRAIN_SECONDS,
            outbox_dir=str(self.outbox),
            certificate_key_file=self._keys["worker_file"],
            certificate_probe_targets=os.environ.get("PORTICO_CERTIFICATE_PROBE_TARGETS") or self._visitors(),
        )
        environment |= self._billing
        return ProcessUnit("worker", ["worker"], environment, listeners={"metrics": self._figures["worker"]})

    # -- the end -----------------------------------------------------------------------------------------------------

    def _write_credentials(self, given: dict[str, Any]) -> None:
        main = self.relay(1)
        self.credentials = {
            "api_url": self.api_url,
            "relay_url": self._at("http", main.http),
            "https_url": self._at("https", main.https),
            "dev_ca_file": str(self.dev_ca),
            "control_url": self._at("ws", main.control),
            "console_url": self.api_url,
            "base_domain": self.settings.base_domain,
            **{key: given[key] for key in ("operator_key", "organization_id", "agent_key")},
        }
        secretfiles.write_credentials(self.home, self.credentials)
        write_targets(self.home, {name: port_of(sock) for name, sock in self._figures.items()})

    async def stop(self) -> None:
        """Drain and end everything that was started; leaves no process, socket file or lock."""
        if self._supervisor is not None:
            await self._supervisor.stop()
        if self._api is not None:  # a start that failed has not handed it over
            self._api.release()
        ports.close_all(self._listeners)
        ports.close_all(self._figures)
        if self._lock is not None:
            self._lock.release()


def verification(environ: Mapping[str, str]) -> dict[str, str]:
    """Whether people must verify their addresses: where mail goes out, unless it was set otherwise."""
    given = environ.get("PORTICO_REQUIRE_VERIFIED_EMAIL")
    return {"require_verified_email": given or str(bool(environ.get("PORTICO_SMTP_URL"))).lower()}


async def run(platform: Platform, body: Callable[[Platform], Awaitable[int]]) -> int:
    """Start ``platform``, run ``body``, stop; the exit code. SIGINT, SIGTERM and SIGHUP end it, a second one quicker.

    ``body`` is cancelled by a signal. An end by signal is 0 once ``body`` ran (that is how a server ends), else 130.
    """
    loop = asyncio.get_running_loop()
    began_body = stopping = False

    async def whole() -> int:
        nonlocal began_body
        await platform.start()
        began_body = True
        return await body(platform)

    task = asyncio.create_task(whole())

    def on_signal() -> None:
        nonlocal stopping
        if stopping:
            platform.logs.say("ending now")
            if platform._supervisor is not None:
                platform._supervisor.hurry()
            return
        stopping = True
        platform.logs.say("stopping; once more to end at once")
        task.cancel()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, on_signal)
    try:
        return await task
    except asyncio.CancelledError:
        return 0 if began_body else 130
    finally:
        began = loop.time()
        await platform.stop()
        if stopping:
            platform.logs.say(f"stopped in {loop.time() - began:.1f} s")
