"""`portico usage`, and how a refusal of the plan reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.agent.api_server import TestApi
from tests.cli.commands import Cli


def plan(refused: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the API answers: of the plan, and of usage."""
    limits = [
        {"name": "tunnels", "about": "", "allowed": 5, "used": 4, "monthly": False},
        {"name": "members", "about": "", "allowed": None, "used": 1234, "monthly": False},
        {"name": "roles", "about": "", "allowed": 0, "used": 0, "monthly": False},
        {"name": "custom_domains", "about": "", "allowed": 0, "used": None, "monthly": False},
        {"name": "bytes_per_month", "about": "", "allowed": 5 << 30, "used": None, "monthly": True},
    ]
    features = [{"name": "tcp", "about": "TCP tunnels", "has": False}, {"name": "tls", "about": "TLS", "has": True}]
    month = {
        "month": "2026-02", "resets_at": "2026-03-01T00:00:00Z", "hard_cap": True, "refused": refused,
        "limits": [{"name": "bytes_per_month", "used": 1536 << 20, "allowed": 5 << 30, "percent": 30}],
    }  # fmt: skip
    shown = {"id": "free", "version": 1, "name": "Free"}
    return {"plan": shown, "hard_cap": True, "limits": limits, "features": features, "overrides": []}, {"month": month}


def serve(api: TestApi, refused: bool = False) -> None:
    what, used = plan(refused)
    api.routes["GET /v1/org/plan"] = lambda body: (200, what)
    api.routes["GET /v1/usage"] = lambda body: (200, used)


async def test_limits_with_what_is_used(cli: Cli, api: TestApi) -> None:
    serve(api)
    cli.signed_in()
    done = await cli.run("usage")
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["Plan", "Free,", "2026-02"]
    assert ["tunnels", "4", "5", "80", "%"] in lines
    assert ["members", "1,234", "no", "limit"] in lines
    assert ["roles", "0", "0"] in lines
    assert ["bytes", "per", "month", "1.5", "GiB", "5.0", "GiB", "30", "%"] in lines
    assert not any(line[:1] == ["custom"] for line in lines)
    assert done.out.splitlines()[-1] == "Not in this plan: TCP tunnels."


async def test_a_month_that_is_used_up_and_json(cli: Cli, api: TestApi) -> None:
    serve(api, refused=True)
    cli.signed_in()
    assert "visitors are refused until 2026-03-01T00:00:00Z" in (await cli.run("usage")).out
    document = json.loads((await cli.run("usage", "--json")).out)
    assert document["plan"]["id"] == "free" and document["usage"]["month"]["refused"] is True


@pytest.mark.parametrize("code", ["quota.exceeded", "quota.feature_missing"])
async def test_a_tunnel_that_the_plan_has_no_room_for(cli: Cli, api: TestApi, code: str) -> None:
    hint = "Remove what is no longer needed, or move to the plan pro."
    problem = {"code": code, "detail": "the plan Free allows 5 tunnels; your organization has 5", "hint": hint}
    api.routes["POST /v1/agent/sessions"] = lambda body: (403, problem)
    cli.signed_in()
    done = await cli.run("http", "8000", "--name", "six")
    assert done.code == 5
    assert "the plan Free allows 5 tunnels" in done.err and "move to the plan pro" in done.err and code in done.err
