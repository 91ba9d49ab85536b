"""The control plane's composition root: an ASGI app from settings.

    app = create_app(settings)

Everything that lives as long as the process hangs on ``app.state``: ``settings``, ``db``, ``clock``, ``sealer``,
``signing_keys``, ``identity``, ``domains``, ``cert_sources``, ``cert_ingest``, ``cert_incidents``, ``authenticate``,
``note_refusal``, ``relays``, ``tunnels``, ``visitor_passwords``, ``channels``, ``agent_sessions``, ``standing``,
``billing``, ``billing_webhooks``, ``report_exports``, ``settlements``, ``edge_states``, ``edge_hub``, ``shortcuts``,
``redis`` (None without one), ``trusted_proxies`` and ``stopping`` (an event set at the first SIGTERM; streams watch it and
end themselves).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import asyncpg
import sqlalchemy as sa
from fastapi import APIRouter, FastAPI, Request
from starlette.routing import BaseRoute

from portico.control import admin_api, changes, http, migrations, openapi, requests
from portico.control.access import PUBLIC
from portico.control.audit import api as audit_api
from portico.control.audit import service as audit
from portico.control.billing import billing_api, dunning_api, invoice_api, overage_api, settlement_api, webhook_api
from portico.control.billing import export_api as report_api
from portico.control.billing.exports import Exports
from portico.control.billing.provider import Providers
from portico.control.billing.service import Billing
from portico.control.billing.settlement import Settlements
from portico.control.billing.webhooks import Webhooks
from portico.control.console import pages as console_pages
from portico.control.domains import (
    acme_api,
    blocking_api,
    distribution_api,
    incident_api,
    ingest_api,
    lifecycle_api,
    source_api,
)
from portico.control.domains import api as domains_api
from portico.control.domains import frozen as frozen_domains
from portico.control.domains import service as domains
from portico.control.domains.incidents import Incidents
from portico.control.domains.ingest import Ingest
from portico.control.domains.sources import Sources
from portico.control.edge import api as edge_api
from portico.control.edge.hub import Hub
from portico.control.edge.state import StateReader
from portico.control.finance import api as finance_api
from portico.control.identity import (
    account_api,
    export_api,
    invitation_api,
    leak_api,
    org_api,
    plan_api,
    plans,
    signing_keys,
    support_api,
)
from portico.control.identity import api as identity_api
from portico.control.identity import jobs as identity_jobs
from portico.control.identity.leaks import Leaks
from portico.control.identity.passwords import Passwords
from portico.control.identity.scanner_keys import ScannerKeys
from portico.control.identity.service import Identity
from portico.control.limits import Limits
from portico.control.notifications import api as notifications_api
from portico.control.notifications.channels import Channels
from portico.control.shortcuts import Shortcuts
from portico.control.tunnels import api as tunnels_api
from portico.control.tunnels import domain_api, relays, usage_api
from portico.control.tunnels import jobs as tunnels_jobs
from portico.control.tunnels import quotas as tunnel_quotas
from portico.control.tunnels.relays import RelayDirectory
from portico.control.tunnels.service import Tunnels
from portico.control.tunnels.sessions import Sessions
from portico.control.tunnels.standing import Standing
from portico.control.tunnels.usage_notices import UsageNotices
from portico.control.tunnels.visitors import VisitorPasswords
from portico.errors import Problem
from portico.kit.clock import Clock, SystemClock
from portico.kit.db import Database, PoolLimits, Tx
from portico.kit.redis import Redis
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

# Seconds between attempts to make the first signing keys while the database is away.
_FIRST_RETRY_SECONDS = 1.0

_TUNNELS = (
    tunnels_api.hot, ingest_api.router, webhook_api.router, edge_api.router, tunnels_api.agent, tunnels_api.tunnels,
    tunnels_api.policies,
    tunnels_api.events, tunnels_api.reserved,
)  # fmt: skip

health = APIRouter(tags=["health"])


def create_app(settings: ApiSettings, *, clock: Clock | None = None, db: Database | None = None) -> FastAPI:
    """The control plane as an ASGI app. ``db`` and ``clock`` are given by tests; the app closes only what it made."""
    app = FastAPI(
        title="Portico",
        version=version("portico"),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    _compose(app, settings, clock or SystemClock(), db)
    _route(app)
    http.install(app, settings)
    return app


def _compose(app: FastAPI, settings: ApiSettings, clock: Clock, db: Database | None) -> None:
    state = app.state
    state.settings = settings
    state.clock = clock
    state.owns_db = db is None
    state.db = db or Database(settings.database_url.reveal(), _pool(settings), application="portico api")
    state.sealer = Sealer(settings.master_key)
    state.stopping = asyncio.Event()
    state.trusted_proxies = _networks(settings.trusted_proxies)
    state.passwords = Passwords(settings)
    state.signing_keys = signing_keys.SigningKeys(settings, state.sealer, clock)
    state.identity = Identity(settings, state.db, clock, state.sealer, state.signing_keys, state.passwords)
    state.authenticate = state.identity.authenticate
    state.channels = Channels(settings, state.db, clock, state.sealer)
    state.note_refusal = partial(audit.refused, state.db)
    state.leaks = Leaks(settings, state.db, clock, state.sealer, state.identity.keys, ScannerKeys(settings, clock))
    state.note_support = partial(audit.request_in_support, state.db)
    state.billing_webhooks = Webhooks(settings, state.db, clock, state.sealer)
    _compose_tunnels(state, settings, clock)


def _compose_tunnels(state: Any, settings: ApiSettings, clock: Clock) -> None:
    """Tunnels and the edge; identity, below them, reaches them by its callbacks alone."""
    quotas = state.identity.quotas
    state.domains = domains.Domains(settings, clock, quotas, state.sealer)
    state.cert_sources = Sources(settings, state.db, clock, state.sealer)
    state.cert_incidents = Incidents(settings, state.sealer, clock)
    state.cert_ingest = Ingest(settings, state.db, clock, state.cert_sources, state.cert_incidents)
    quotas.kinds.update(domains.kinds(settings))
    state.redis = None
    if settings.redis_url is not None:
        state.redis = Redis(
            settings.redis_url.reveal(),
            timeout_seconds=settings.redis_timeout_seconds,
            pause_seconds=settings.redis_pause_seconds,
        )
    state.limits = Limits(settings, state.redis, clock.monotonic)
    state.relays = RelayDirectory(settings)
    state.tunnels = Tunnels(settings, state.relays, state.redis, quotas, state.domains)
    state.visitor_passwords = VisitorPasswords(settings, state.sealer)
    state.agent_sessions = Sessions(
        settings, state.tunnels, state.relays, state.signing_keys, clock, quotas, state.identity
    )
    state.edge_states = StateReader(state.db, state.tunnels, state.signing_keys)
    state.edge_hub = Hub(settings, state.db, state.edge_states, state.stopping)
    state.identity.keys.on_revoked.append(state.agent_sessions.on_key_revoked)
    state.leaks.ends["rly"] = relays.end_leaked
    state.identity.keys.on_restricted.append(state.agent_sessions.on_key_restricted)
    state.identity.organizations.on_standing += [state.agent_sessions.on_standing, state.tunnels.on_standing]
    state.signing_keys.on_changed.append(_announce_keys)
    quotas.kinds.update(tunnel_quotas.kinds(settings))
    state.standing = Standing(settings, clock, quotas)
    quotas.on_changed.append(state.tunnels.frozen.settle)
    quotas.on_changed.append(frozen_domains.settle)
    quotas.on_changed.append(state.standing.moved)
    state.standing.notify.append(UsageNotices(settings, state.sealer))
    plans_ = state.identity.plans
    state.billing = Billing(settings, state.db, clock, state.sealer, plans_, Providers(settings))
    state.report_exports = Exports(settings, state.db, clock, state.sealer)
    state.settlements = Settlements(settings, state.db, clock, state.sealer)


async def _announce_keys(tx: Tx, jwks: Sequence[dict[str, str]]) -> None:
    changes.append(tx, changes.keys(jwks))


def _route(app: FastAPI) -> None:
    app.state.shortcuts = Shortcuts((*tunnels_api.SHORTCUTS, *ingest_api.SHORTCUTS))
    app.router.routes += _routes()
    openapi.install(app)


@cache
def _routes() -> list[BaseRoute]:
    """Every route but the document's own. They know nothing of an app, and working out what each of them needs takes a quarter of
    a second: a process does so once, for all apps that it makes."""
    routes = APIRouter()
    # Tried in this order, which costs microseconds per route passed over: what agents and relays ask comes first.
    for router in (
        *_TUNNELS,
        lifecycle_api.of_domains,
        incident_api.of_domains,
        domains_api.router,
        acme_api.router,
        domains_api.looking,
        domain_api.router,
        identity_api.auth,
        identity_api.sessions,
        account_api.router,
        account_api.own,
        identity_api.keys,
        leak_api.router,
        invitation_api.invited,
        invitation_api.accepting,
        org_api.many,
        invitation_api.router,
        export_api.router,
        org_api.router,
        support_api.router,
        plan_api.router,
        usage_api.router,
        notifications_api.router,
        audit_api.router,
        *admin_api.routers,
        source_api.router,
        lifecycle_api.router,
        webhook_api.admin,
        *distribution_api.routers,
        blocking_api.router,
        incident_api.router,
        *finance_api.routers,
        billing_api.router,
        billing_api.asking,
        billing_api.of_operators,
        dunning_api.router,
        dunning_api.of_operators,
        overage_api.router,
        overage_api.of_operators,
        *report_api.routers,
        *settlement_api.routers,
        *invoice_api.routers,
    ):
        routes.include_router(router, prefix="/v1")
    routes.include_router(identity_api.well_known)
    routes.include_router(console_pages.router)
    routes.include_router(health)
    return routes.routes


def read_in() -> None:
    """Do what a process does once before its first app, so that one which waits for its turn has done it."""
    _routes()
    migrations.revisions()


def _networks(texts: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    try:
        return tuple(ipaddress.ip_network(text, strict=False) for text in texts)
    except ValueError as err:
        raise Problem("config.invalid", f"setting trusted_proxies: {err}", key="trusted_proxies") from None


def _pool(settings: ApiSettings) -> PoolLimits:
    return PoolLimits(
        size=settings.database_pool_size,
        direct=settings.database_direct_connections,
        acquire_timeout_seconds=settings.database_acquire_timeout_seconds,
        statement_timeout_seconds=settings.database_statement_timeout_seconds,
        lock_timeout_seconds=settings.database_lock_timeout_seconds,
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start housekeeping, and close what the app made. A database that is away delays readiness, not the start."""
    await _check_default_plan(app)
    task = asyncio.create_task(_housekeeping(app))
    try:
        try:
            await signing_keys.ensure(app.state.db, app.state.signing_keys)
            async with app.state.db.transaction() as tx:
                await app.state.tunnels.ports.prepare(tx)
        except (Problem, sa.exc.ProgrammingError) as err:  # away, or not migrated yet: housekeeping tries again
            log.warning("not ready yet", extra={"f": {"error": f"{type(err).__name__}: {err}"[:200]}})
        if (redis := app.state.redis) is not None:  # a wrong address or certificate is told now, not at the first use
            limit = app.state.settings.redis_heartbeat_timeout_seconds
            await redis.pipeline(lambda commands: commands.ping(), timeout_seconds=limit)
        yield
    finally:
        app.state.stopping.set()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        with suppress(Exception):
            await app.state.cert_ingest.intake.close()
        with suppress(Exception):
            await app.state.billing_webhooks.intake.close()
        with suppress(Exception):
            await app.state.identity.write_last_used()
            await app.state.identity.elsewhere.close()
        await app.state.edge_hub.close()
        await app.state.billing.close()
        if app.state.redis is not None:
            await app.state.redis.close()
        app.state.passwords.close()
        app.state.visitor_passwords.close()
        if app.state.owns_db:
            await app.state.db.close()


async def _check_default_plan(app: FastAPI) -> None:
    """Raises ``config.invalid`` when new organizations would be on a plan that there is not; a database that is away, or not
    migrated yet, is no reason."""
    name = app.state.settings.default_plan
    known: list[str] = []
    with suppress(Problem, asyncpg.UndefinedTableError):
        async with app.state.db.read() as reader:
            known = [plan.id for plan in await plans.current(reader)]
    if known and name not in known:
        detail = f"setting default_plan: there is no plan {name}, only {', '.join(known)}"
        raise Problem("config.invalid", detail, key="default_plan")


async def _housekeeping(app: FastAPI) -> None:
    settings: ApiSettings = app.state.settings
    while True:
        wait = settings.housekeeping_seconds
        try:
            await identity_jobs.housekeeping(app.state.identity)
            await tunnels_jobs.housekeeping(app.state.db, settings)
            await requests.expire(app.state.db, app.state.clock.wall(), settings.idempotency_seconds)
            await app.state.standing.round(app.state.db)
        except Exception as err:
            wait = _FIRST_RETRY_SECONDS
            log.warning("housekeeping failed", extra={"f": {"error": f"{type(err).__name__}: {err}"[:200]}})
        await asyncio.sleep(wait)


@health.get("/healthz", openapi_extra=PUBLIC.openapi())
async def healthz() -> dict[str, str]:
    """The process runs."""
    return {"status": "ok"}


@health.get("/readyz", openapi_extra=PUBLIC.openapi())
async def readyz(request: Request) -> dict[str, str]:
    """The process can serve: the database answers, its schema fits, and there is a key to sign with."""
    state: Any = request.app.state
    async with state.db.read() as reader:
        try:
            revision = await reader.scalar(sa.text("SELECT version_num FROM alembic_version"))
        except sa.exc.ProgrammingError:
            revision = None
        if migrations.is_behind(revision):
            raise Problem(
                "service.unavailable", "the database schema is older than this version", hint="Run: portico migrate"
            )
        await state.signing_keys.current_signer(reader)
    return {"status": "ready"}
