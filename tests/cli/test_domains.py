"""`portico domains`: exact records, what to fix, and exit codes for scripts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.agent.api_server import TestApi, problem
from tests.cli.commands import Cli


def domain(name: str = "www.example.com", status: str = "pending", **more: Any) -> dict[str, Any]:
    """As the API shows one."""
    record = {"required": True, "state": "unchecked", "found": [], "fix": None}
    records = [
        {**record, "purpose": "ownership", "type": "TXT", "name": f"_portico-challenge.{name}",
         "value": "portico-verification=t"},
        {**record, "purpose": "routing", "type": "CNAME", "name": name, "value": "edge.portico.test"},
    ]  # fmt: skip
    certificate = {"status": "none", "not_after": None, "held_at": None, "error_code": None, "error_detail": None}
    return {
        "id": "dom_1", "name": name, "display_name": name, "hostname_status": status, "tls_mode": "terminate",
        "tunnel": None, "records": records, "dns_error": None, "certificate": certificate, **more,
    }  # fmt: skip


def serve(api: TestApi, *rows: dict[str, Any]) -> None:
    api.routes["GET /v1/domains?limit=100"] = lambda body: (200, {"data": list(rows), "next_cursor": None})
    api.routes["GET /v1/domains"] = api.routes["GET /v1/domains?limit=100"]


async def test_add_prints_the_exact_records(cli: Cli, api: TestApi) -> None:
    api.routes["POST /v1/domains"] = lambda body: (201, domain(body["name"]))
    cli.signed_in()
    done = await cli.run("domains", "add", "www.example.com", "--failure-policy", "strict")
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert ["TXT", "_portico-challenge.www.example.com", "portico-verification=t"] in lines
    assert ["CNAME", "www.example.com", "edge.portico.test"] in lines
    assert "portico domains verify www.example.com" in done.err
    assert api.calls[-1][2] == {"name": "www.example.com", "tls_mode": "terminate", "failure_policy": "strict"}


@pytest.mark.parametrize(("status", "code"), [("pending", 1), ("verified", 0), ("active", 0), ("moved", 1)])
async def test_verify_says_what_to_fix(cli: Cli, api: TestApi, status: str, code: int) -> None:
    seen = domain(status=status, dns_error="ownership_missing")
    seen["records"][0] |= {"state": "wrong", "found": ["evil\x1b[2J"], "fix": "Add a TXT record"}
    serve(api, domain())
    api.routes["POST /v1/domains/dom_1/verify"] = lambda body: (200, seen)
    cli.signed_in()
    done = await cli.run("domains", "verify", "WWW.example.com.")
    assert done.code == code, done.err
    assert f"www.example.com: {status} (its TXT record is not there)" in done.out
    assert "Add a TXT record" in done.out and "\x1b" not in done.out
    told = await cli.run("domains", "verify", "dom_1", "--json")
    assert (told.code, json.loads(told.out)) == (code, seen)


async def test_route_unroute_and_rm(cli: Cli, api: TestApi) -> None:
    serve(api, domain(status="deleted", id="dom_0"), domain(status="active"))
    api.routes["POST /v1/domains/dom_1/route"] = lambda body: (200, domain(status="active", tunnel="tun_1"))
    api.routes["POST /v1/domains/dom_1/unroute"] = lambda body: (200, domain(status="active"))
    api.routes["DELETE /v1/domains/dom_1"] = lambda body: (204, {})
    cli.signed_in()
    done = await cli.run("domains", "route", "www.example.com", "shop")
    assert (done.code, done.out) == (0, "www.example.com leads to shop\n")
    assert api.calls[-1][2] == {"tunnel": "shop"}
    assert (await cli.run("domains", "unroute", "www.example.com")).out == "www.example.com leads nowhere\n"
    assert (await cli.run("domains", "rm", "www.example.com")).out == "www.example.com removed\n"
    done = await cli.run("domains", "rm", "other.example.com")
    assert done.code == 1 and "(domain.not_found)" in done.err


async def test_ls(cli: Cli, api: TestApi) -> None:
    held = domain("api.example.com", "active", tunnel="tun_1", id="dom_2")
    held["certificate"] |= {"status": "active", "not_after": "2030-01-02T00:00:00Z", "held_at": "2029-12-01T00:00:00Z",
                            "error_detail": "CAA forbids it"}  # fmt: skip
    serve(api, domain(dns_error="claimed"), held)
    api.routes["GET /v1/tunnels?limit=100"] = lambda body: (
        200,
        {"data": [{"id": "tun_1", "name": "shop"}], "next_cursor": None},
    )
    cli.signed_in()
    done = await cli.run("domains", "ls")
    assert done.code == 0, done.err
    first, second = done.out.splitlines()[1:]
    assert "another organization has this name" in first
    assert second.split()[:5] == ["api.example.com", "active", "shop", "active", "2030-01-02"]
    assert "held: CAA forbids it" in second
    assert len(json.loads((await cli.run("domains", "ls", "--json")).out)) == 2


async def test_a_refusal_is_a_line(cli: Cli, api: TestApi) -> None:
    api.routes["POST /v1/domains"] = lambda body: problem(409, "domain.exists")
    cli.signed_in()
    done = await cli.run("domains", "add", "www.example.com")
    assert done.code == 1 and "(domain.exists)" in done.err and "Traceback" not in done.err
