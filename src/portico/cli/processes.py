"""`portico api`, `relay`, `worker`, `migrate`: one process of Portico each, for production and for `portico up`."""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from portico import settings
from portico.errors import Problem

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Settings file (portico.toml).", metavar="FILE", show_default=False)
]
#: Modules that `portico[server]` brings and the bare package does not.
SERVER_PARTS = ("alembic", "asyncpg", "fastapi", "redis", "sqlalchemy", "uvicorn")


def require_server_parts() -> None:
    """Raise ``up.server_parts_missing`` unless everything that the control plane needs is installed."""
    from importlib.util import find_spec

    if missing := [name for name in SERVER_PARTS if find_spec(name) is None]:
        raise Problem(
            "up.server_parts_missing", f"this command needs the server parts of Portico ({', '.join(missing)})"
        )


def _run(process: str, log_level: str, main: Coroutine[Any, Any, object]) -> None:
    """Run a process's main coroutine with logging; a fault goes into the log, with its traceback, and exits 1."""
    import logging

    from portico.kit import loop, telemetry

    telemetry.configure(process, log_level)
    try:
        loop.run(main)
    except Problem as problem:
        logging.getLogger("portico").error(problem.line())
        sys.exit(1)
    except Exception:
        logging.getLogger("portico").exception("the process ends on a fault")
        sys.exit(1)


def api(config: ConfigOption = None) -> None:
    """The API and console."""
    require_server_parts()
    chosen = settings.load(settings.ApiSettings, table="api", file=config)
    from portico.control import app, server
    from portico.kit import sockets, standby

    app.read_in()
    if standby.wait(chosen.standby_fd, "portico-api"):  # for hours, perhaps: what the file says now counts
        chosen = settings.load(settings.ApiSettings, table="api", file=config)
    given = sockets.inherited(chosen.listen_fds or settings.activated_sockets())
    _run("api", chosen.log_level, server.serve(chosen, given.get("api"), given.get("metrics")))


def relay(config: ConfigOption = None) -> None:
    """A relay: the public edge."""
    chosen = settings.load(settings.RelaySettings, table="relay", file=config)
    from portico.kit import sockets
    from portico.relay import server

    _run(
        chosen.relay_name,
        chosen.log_level,
        server.serve(chosen, sockets.inherited(chosen.listen_fds or settings.activated_sockets())),
    )


def worker(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which workers, or kinds of jobs, to run; all when none is named.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Background work: certificates, maintenance, notifications.

    Any number of processes may run the same: each job is one process's at a time.
    """
    require_server_parts()
    chosen = settings.load(settings.WorkerSettings, table="worker", file=config)
    control = settings.load(settings.ApiSettings, table="api", file=config)
    from portico.kit import sockets
    from portico.worker import runner

    given = sockets.inherited(chosen.listen_fds or settings.activated_sockets())
    _run("worker", chosen.log_level, runner.serve(chosen, control, tuple(names or ()), given.get("metrics")))


def migrate(config: ConfigOption = None) -> None:
    """Bring the database's schema up to date (under a lock; safe to run twice)."""
    require_server_parts()
    chosen = settings.load(settings.MigrateSettings, table="migrate", file=config)
    from portico.control import migrations

    _run("migrate", chosen.log_level, migrations.upgrade(chosen.database_url.reveal()))


def prepare() -> None:
    """For `portico up`: migrate, make the first accounts; JSON in on standard input, credentials out on standard output."""
    import json

    chosen = settings.load(settings.ApiSettings)
    from portico.control import bootstrap, migrations
    from portico.embedded import certkeys, devca

    request = json.load(sys.stdin)
    home, region = Path(request["home"]), request.get("region", "local")
    devca.ensure(home, chosen.base_domain)
    keys = certkeys.ensure(home, region)

    async def both() -> None:
        await migrations.upgrade(chosen.database_url.reveal())
        credentials = await bootstrap.ensure_first(
            chosen, relays=request["relays"], known=request["known"], region_key=(region, keys.region_key)
        )
        sys.stdout.write(json.dumps(bootstrap.document(credentials) | {"certificate_keys": keys.document()}))

    _run("migrate", chosen.log_level, both())


def simulators(folder: Path, webhooks: str) -> None:
    """For `portico up --demo-billing`: simulated payment providers, which keep what they know in a folder."""
    require_server_parts()
    chosen = settings.load(settings.SimulatorSettings)
    from portico.kit import notify, sockets
    from portico.simulators import billing_main

    _run(
        "simulators",
        chosen.log_level,
        billing_main.serve(
            folder,
            webhooks=webhooks,
            sockets=sockets.inherited(chosen.listen_fds),
            ready=lambda: notify.ready(chosen.notify_fd),
        ),
    )


def register(app: typer.Typer) -> None:
    for command in (api, relay, worker, migrate):
        app.command()(command)
    app.command(hidden=True)(prepare)
    app.command(hidden=True)(simulators)
