"""Who may call what: every operation of the OpenAPI document as everybody, against what it declares."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends

from portico.control import access
from portico.control.access import PERMISSIONS, Caller, InTx, require
from portico.control.identity import tables
from portico.control.requests import UnitOfWork
from portico.settings import ApiSettings
from tests.control.conftest import Account
from tests.control.matrix import Operation, Walk, World, build_world, operations


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    """Nobody tidies up meanwhile: a walk takes minutes, and compares what is there before and after each call."""
    return replace(settings, housekeeping_seconds=86_400)


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    return dict((await client.get("/openapi.json")).json())


@pytest.fixture
async def world(app: Any, owner: Account, stranger: Account, relay_key: str) -> World:
    return await build_world(app, owner, stranger, relay_key)


@pytest.mark.timeout(900)  # thousands of calls, on a machine that may do other things
async def test_every_cell(app: Any, world: World, document: dict[str, Any]) -> None:
    walk = Walk(app, world, document)
    wrong = await walk.run()
    assert not wrong, "\n".join(wrong)
    # Six roles, sixteen other credentials and two strangers for every operation.
    assert walk.seen == len(walk.operations) * 24
    assert len(walk.operations) >= 44


def test_every_permission_is_asked_for(document: dict[str, Any]) -> None:
    asked = set[str]().union(*(operation.permissions for operation in operations(document)))
    assert asked <= PERMISSIONS
    assert asked == PERMISSIONS


@access.declare(access.Access(access.MEMBERS, ("audit:read",)))
async def lax(who: Annotated[Caller, Depends(access.caller)]) -> Caller:
    """Says that it asks for a permission, and does not."""
    return who


strict = access.declare(access.Access(access.MEMBERS, ("tunnels:read",)))(require("audit:read"))


class TestTheWalkNotices:
    async def _walk(self, app: Any, world: World, client: httpx.AsyncClient, router: APIRouter) -> list[str]:
        app.include_router(router, prefix="/v1")
        app.openapi_schema = None
        document = (await client.get("/openapi.json")).json()
        document["paths"] = {path: found for path, found in document["paths"].items() if path.startswith("/v1/lax")}
        return await Walk(app, world, document).run()

    async def test_a_route_that_declares_nothing(self, app: Any, world: World, client: httpx.AsyncClient) -> None:
        router = APIRouter()

        @router.get("/lax")
        async def read() -> dict[str, str]:
            return {}

        with pytest.raises(AssertionError, match="GET /v1/lax"):
            await self._walk(app, world, client, router)

    async def test_a_route_whose_objects_it_cannot_make(
        self, app: Any, world: World, client: httpx.AsyncClient
    ) -> None:
        router = APIRouter(route_class=UnitOfWork)

        @router.get("/lax/{thing}")
        async def read(thing: str, who: Annotated[Caller, Depends(access.caller)]) -> dict[str, str]:
            return {}

        with pytest.raises(AssertionError, match="new kind of object"):
            await self._walk(app, world, client, router)

    async def test_a_route_that_does_not_check(self, app: Any, world: World, client: httpx.AsyncClient) -> None:
        router = APIRouter(route_class=UnitOfWork)

        @router.get("/lax")
        async def read(who: Annotated[Caller, Depends(lax)]) -> dict[str, str]:
            return {}

        wrong = await self._walk(app, world, client, router)
        who = {line.partition(" as ")[2].partition(":")[0] for line in wrong}
        assert {"viewer", "developer", "billing", "an agent key", "an API key without scopes"} <= who
        assert not {"owner", "admin", "auditor", "nobody"} & who

    async def test_a_route_that_asks_for_more_than_it_says(
        self, app: Any, world: World, client: httpx.AsyncClient
    ) -> None:
        router = APIRouter(route_class=UnitOfWork)

        @router.get("/lax")
        async def read(who: Annotated[Caller, Depends(strict)]) -> dict[str, str]:
            return {}

        wrong = await self._walk(app, world, client, router)
        assert any("as viewer: must be admitted" in line for line in wrong)

    async def test_a_route_that_reaches_into_another_organization(
        self, app: Any, world: World, client: httpx.AsyncClient
    ) -> None:
        router = APIRouter(route_class=UnitOfWork)

        @router.delete("/lax/{key}")
        async def revoke(key: str, tx: InTx, who: Annotated[Caller, Depends(require("keys:write"))]) -> dict[str, str]:
            await tx.execute(tables.api_keys.delete().where(tables.api_keys.c.id == key))
            return {}

        wrong = await self._walk(app, world, client, router)
        assert any("as another owner: must be 404" in line for line in wrong)
        assert any("as another owner: changed something" in line for line in wrong)


def test_operations_are_read_with_their_parameters(document: dict[str, Any]) -> None:
    found = {str(operation): operation for operation in operations(document)}
    stop: Operation = found["POST /v1/tunnels/{tunnel_id}/stop"]
    assert stop.parameters == ["tunnel_id"]
    assert stop.permissions == {"tunnels:write"}
    assert stop.callers == {"person", "agent_key", "api_key", "support"}
