"""The control plane as an ASGI app on a real database, and people and keys to call it with."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from portico.control.app import create_app
from portico.control.identity import passwords
from portico.kit.db import Database
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret

PASSWORD = "tall-Giraffe-42"
_numbers = itertools.count(1)
_MASTER_KEY = new_master_key()
#: Memory (KiB) and passes of argon2id outside tests.
REAL_COST = (passwords.MEMORY_KIB, passwords.PASSES)


class MovableClock:
    """A clock that tests set forward."""

    def __init__(self) -> None:
        self.shift = timedelta()
        self._start = datetime.now(UTC)

    def wall(self) -> datetime:
        return datetime.now(UTC) + self.shift

    def monotonic(self) -> float:
        return (self.wall() - self._start).total_seconds()

    def advance(self, seconds: float) -> None:
        self.shift += timedelta(seconds=seconds)


@dataclass(frozen=True)
class Account:
    """A registered person with a client that is signed in."""

    email: str
    user: str
    organization: str
    access: str
    refresh: str
    session: str
    client: httpx.AsyncClient

    async def key(self, kind: str = "agent", **more: Any) -> dict[str, Any]:
        answer = await self.client.post("/v1/api-keys", json={"kind": kind, "name": "test", **more})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())


@pytest.fixture(scope="session", autouse=True)
def cheap_passwords() -> Iterator[None]:
    """argon2id at a hundredth of its cost: hundreds of accounts are made here, and what guards them is not its price.

    tests/control/identity/test_passwords.py asks for the real one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passwords, "MEMORY_KIB", 128)
        patch.setattr(passwords, "PASSES", 1)
        yield


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
def settings(database_url: str) -> ApiSettings:
    """Settings of the app under test; a module overrides this fixture for its own limits."""
    return ApiSettings(
        database_url=Secret(database_url),
        master_key=Secret(_MASTER_KEY),
        sign_in_failures_per_address=100_000,
        registrations_per_address=100_000,
        device_codes_per_address=100_000,
        # Every person and program of a test has one address, and a walk asks for thousands of things.
        rate_auth_per_minute=1_000_000,
        rate_page_per_minute=1_000_000,
        rate_read_per_minute=1_000_000,
        rate_unknown_per_minute=1_000_000,
        rate_write_per_minute=1_000_000,
        # Nobody answers there; tests of domains bring name servers of their own.
        dns_resolvers=("127.0.0.1:9",),
        dns_timeout_seconds=0.05,
    )


@pytest.fixture
async def app(settings: ApiSettings, db: Database, clock: MovableClock) -> AsyncIterator[Any]:
    """The app, started."""
    made = create_app(settings, clock=clock, db=db)
    async with made.router.lifespan_context(made):
        yield made


@pytest.fixture
async def connect(app: Any) -> AsyncIterator[Callable[..., httpx.AsyncClient]]:
    """Clients of the app: ``connect("credential")``, ``connect(None, address="198.51.100.7")``."""
    opened: list[httpx.AsyncClient] = []

    def make(credential: str | None = None, address: str = "127.0.0.1") -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(address, 4711))
        headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        opened.append(httpx.AsyncClient(transport=transport, base_url="http://api.test", headers=headers))
        return opened[-1]

    yield make
    for client in opened:
        await client.aclose()


@pytest.fixture
def client(connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    """A client without credentials."""
    return connect()


@pytest.fixture
def register(client: httpx.AsyncClient, connect: Callable[..., httpx.AsyncClient]) -> Callable[[], Awaitable[Account]]:
    """Make another account."""

    async def make() -> Account:
        email = f"person{next(_numbers)}@example.com"
        body = {"email": email, "password": PASSWORD, "organization": "Acme"}
        answer = await client.post("/v1/auth/register", json=body)
        assert answer.status_code == 201, answer.text
        made = answer.json()
        return Account(
            email,
            made["user"]["id"],
            made["organization"]["id"],
            made["access_token"],
            made["refresh_token"],
            made["session"],
            connect(made["access_token"]),
        )

    return make


@pytest.fixture
async def owner(register: Callable[[], Awaitable[Account]]) -> Account:
    """A person who owns an organization."""
    return await register()


@pytest.fixture
async def stranger(register: Callable[[], Awaitable[Account]]) -> Account:
    """The owner of another organization."""
    return await register()


# -- relays


def heartbeat_body(relay: str = "relay-1", **more: Any) -> dict[str, Any]:
    """What a relay posts to /edge/heartbeat."""
    return {
        "relay": relay,
        "region": "local",
        "connect_url": f"ws://127.0.0.1:7081/{relay}",
        "public_url": "http://127.0.0.1:7080",
        "version": 0,
        "load": {"sessions": 0, "tunnels": 0, "streams": 0, "cpu": 0.0},
        "draining": False,
        "bound": [],
        **more,
    }


@pytest.fixture
async def relay_key(app: Any) -> str:
    """The text of a live relay key, good for any relay."""
    from portico.control.access import Caller
    from portico.control.tunnels import relays

    async with app.state.db.transaction() as tx:
        _, token = await relays.create_key(tx, Caller("operator", "installation", None), "test")
    return token


@pytest.fixture
async def relay(relay_key: str, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    """A client with a relay's credential, and a live relay registered under it."""
    client = connect(relay_key)
    answer = await client.post("/v1/edge/heartbeat", json=heartbeat_body())
    assert answer.status_code == 200, answer.text
    return client


@pytest.fixture
async def agent(
    owner: Account, relay: httpx.AsyncClient, connect: Callable[..., httpx.AsyncClient]
) -> httpx.AsyncClient:
    """A client with an agent key of ``owner``, while a relay is live."""
    return connect((await owner.key())["key"])
