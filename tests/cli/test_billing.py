"""`portico billing`: what is paid, invoices, and the subscription from checkout to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.agent.api_server import TestApi, problem
from tests.cli.commands import Cli, only_line


def held(**more: Any) -> dict[str, Any]:
    """As the API shows a subscription."""
    known = {
        "id": "sub_1", "provider": "stripe", "status": "active", "plan": "pro", "cancel_at_period_end": False,
        "period_start": "2026-11-02T10:00:00Z", "period_end": "2026-12-02T10:00:00Z", "owing": [],
    }  # fmt: skip
    return {"subscription": {**known, **more}}


def month(*, plan: str = "pro", beyond: int = 0) -> dict[str, Any]:
    use = [
        {"limit": "requests_per_month", "used": 1234, "allowed": 5_000_000, "beyond": 0},
        {"limit": "bytes_per_month", "used": (100 << 30) + beyond, "allowed": 100 << 30, "beyond": beyond},
    ]
    line = {"description": "bytes beyond the plan Pro", "quantity": 2, "unit_minor": 50, "amount_minor": 100}
    lines = [line] if beyond else []
    return {
        "month": "2026-11",
        "plan": plan,
        "currency": "EUR",
        "use": use,
        "lines": lines,
        "total_minor": 100 * len(lines),
    }


def serve(api: TestApi, subscription: dict[str, Any], overage: dict[str, Any]) -> None:
    api.routes["GET /v1/billing/subscription"] = lambda body: (200, subscription)
    api.routes["GET /v1/billing/overage"] = lambda body: (200, overage)


def invoice(number: str = "INV-2026-000001", **more: Any) -> dict[str, Any]:
    known = {
        "id": "inv_1", "number": number, "status": "paid", "currency": "EUR", "gross_minor": 1190, "tax_minor": 190,
        "credited_minor": 0, "issued_at": "2026-11-02T10:00:00Z", "period_start": "2026-11-02T10:00:00Z",
        "period_end": "2026-12-02T10:00:00Z",
    }  # fmt: skip
    return {**known, **more}


async def test_overview(cli: Cli, api: TestApi) -> None:
    owing = [{"id": "dun_1", "state": "retrying", "amount_minor": 1190, "currency": "EUR"}]
    serve(api, held(owing=owing, cancel_at_period_end=True), month(beyond=3 << 29))
    cli.signed_in()
    done = await cli.run("billing")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[:3] == [
        "Plan pro: active, paid by stripe", "Period 2026-11-02 to 2026-12-02, then it ends", "Owed 11.90 EUR (retrying)",
    ]  # fmt: skip
    cells = [line.split() for line in lines]
    assert ["bytes", "per", "month", "101.5", "GiB", "100.0", "GiB", "1.5", "GiB"] in cells
    assert ["requests", "per", "month", "1,234", "5,000,000"] in cells
    assert lines[-1] == "So far beyond the plan: 1.00 EUR, without tax."
    document = json.loads((await cli.run("billing", "--json")).out)
    assert (document["subscription"]["id"], document["overage"]["total_minor"]) == ("sub_1", 100)


async def test_overview_without_a_subscription(cli: Cli, api: TestApi) -> None:
    serve(api, {"subscription": None}, month(plan="free"))
    cli.signed_in()
    done = await cli.run("billing")
    assert done.out.splitlines()[0] == "Plan free. No subscription."
    assert "portico billing checkout PLAN" in done.err
    serve(api, held(status="canceled"), month(plan="free"))
    assert (await cli.run("billing")).out.startswith("Plan free. No subscription. The one for pro is canceled.\n")


async def test_an_agent_key_sees_no_bills(cli: Cli, api: TestApi) -> None:
    api.routes["GET /v1/billing/subscription"] = lambda body: problem(403, "auth.forbidden", "billing:read is needed")
    cli.signed_in()
    done = await cli.run("billing")
    assert done.code == 3 and "(auth.forbidden)" in only_line(done.err)


@pytest.mark.parametrize(
    ("option", "asked"), [([], ["stripe", "razorpay"]), (["--provider", "razorpay"], ["razorpay"])]
)
async def test_checkout(cli: Cli, api: TestApi, option: list[str], asked: list[str]) -> None:
    def buy(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["provider"] == "stripe":
            return problem(409, "billing.provider_unconfigured")
        page = {
            "id": "chk_1",
            "url": "https://pay.example.com/1\x1b",
            "plan": body["plan"],
            "provider": body["provider"],
        }
        return 201, {**page, "expires_at": "2026-11-03T10:00:00Z"}

    api.routes["POST /v1/billing/checkout-sessions"] = buy
    cli.signed_in()
    done = await cli.run("billing", "checkout", "pro", *option)
    assert (done.code, done.out) == (0, "https://pay.example.com/1\\x1b\n"), done.err
    assert "Pay for pro on this page of razorpay until 2026-11-03 10:00 UTC." in done.err
    calls = [call[2] for call in api.calls]
    assert [call["provider"] for call in calls] == asked
    assert calls[-1]["success_url"] == f"{api.url}/organizations"


async def test_a_plan_that_nobody_sells(cli: Cli, api: TestApi) -> None:
    def refuse(body: dict[str, Any]) -> Any:
        sold = body["provider"] == "razorpay"
        return (
            problem(400, "billing.plan_not_sold", "not sold") if sold else problem(409, "billing.provider_unconfigured")
        )

    api.routes["POST /v1/billing/checkout-sessions"] = refuse
    cli.signed_in()
    done = await cli.run("billing", "checkout", "gold")
    assert done.code == 1 and "(billing.plan_not_sold)" in only_line(done.err)
    done = await cli.run("billing", "checkout", "gold", "--provider", "cash")
    assert done.code == 2 and "(config.invalid)" in only_line(done.err)


async def test_invoices_and_a_pdf(cli: Cli, api: TestApi, tmp_path: Path) -> None:
    back = invoice("INV-2026-000002", id="inv_2", credited_minor=119)
    api.routes["GET /v1/billing/invoices?limit=100"] = lambda body: (
        200,
        {"data": [back, invoice()], "next_cursor": None},
    )
    api.routes["GET /v1/billing/invoices"] = api.routes["GET /v1/billing/invoices?limit=100"]
    api.routes["GET /v1/billing/invoices/inv_1/pdf"] = lambda body: (200, {"pdf": "%PDF"})
    cli.signed_in()
    done = await cli.run("billing", "invoices")
    cells = [line.split("  ") for line in done.out.splitlines()]
    assert cells[2][:1] == ["INV-2026-000001"] and "11.90 EUR" in done.out
    assert done.out.splitlines()[1].endswith("paid, 1.19 EUR given back")
    file = tmp_path / "invoice.pdf"
    done = await cli.run("billing", "invoices", "--pdf", "INV-2026-000001", str(file))
    assert (done.code, json.loads(file.read_text())) == (0, {"pdf": "%PDF"}), done.err
    done = await cli.run("billing", "invoices", "--pdf", "INV-2026-000009", str(file))
    assert done.code == 1 and "(billing.invoice_not_found)" in only_line(done.err)
    done = await cli.run("billing", "invoices", "--pdf", "INV-2026-000001", str(tmp_path / "no" / "x.pdf"))
    assert done.code == 2 and "(config.invalid)" in only_line(done.err)


async def test_cancel_and_resume(cli: Cli, api: TestApi) -> None:
    answer = {**held(), "request": "done", "url": None}
    api.routes["POST /v1/billing/subscription/cancel"] = lambda body: (200, answer)
    api.routes["POST /v1/billing/subscription/resume"] = lambda body: (200, answer)
    cli.signed_in()
    done = await cli.run("billing", "cancel", "--reason", "too dear")
    assert (done.code, done.out) == (0, "The subscription ends on 2026-12-02.\n"), done.err
    assert api.calls[-1][2] == {"at_period_end": True, "reason": "too dear"}
    assert (await cli.run("billing", "cancel", "--now")).out == "The subscription ends now.\n"
    assert api.calls[-1][2] == {"at_period_end": False}
    assert (await cli.run("billing", "resume")).out == "The subscription goes on; it renews on 2026-12-02.\n"
    api.routes["POST /v1/billing/subscription/resume"] = lambda body: problem(409, "billing.no_subscription")
    done = await cli.run("billing", "resume")
    assert done.code == 1 and "(billing.no_subscription)" in only_line(done.err)
