"""Reports: made once, the same bytes every time, delivered and acknowledged; for those who may have them."""

from __future__ import annotations

import asyncio
import base64
import csv
import hashlib
import io
import json
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.audit.store import audit_events
from portico.control.billing import export_delivery as delivery
from portico.control.billing import export_formats as formats
from portico.control.billing import export_store, exports
from portico.control.billing.export_datasets import DATASETS
from portico.control.notifications import reach
from portico.kit import queue
from portico.kit.clock import SystemClock
from portico.kit.db import Database, PoolLimits
from portico.kit.queue import Hopeless, LeaseLost, Limits
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings, Secret
from portico.simulators.webhooks import Behaviour, WebhookReceiver
from tests.control.billing.bookkeeping import (
    END,
    START,
    book,
    deliver_all,
    finance_event,
    january,
    make_all,
    make_sink,
    operator_client,
    receipt,
    reconcile_all,
)
from tests.control.billing.bookkeeping import JANUARY as BOOKS
from tests.control.billing.s3 import ObjectStore
from tests.control.conftest import Account, MovableClock

JANUARY = {"period_start": START.isoformat(), "period_end": END.isoformat()}
PATH = "/v1/billing/report-exports"


@pytest.fixture
def settings(settings: ApiSettings, tmp_path: Path) -> ApiSettings:
    return replace(
        settings, objects_dir=tmp_path / "objects", outbound_allow=("127.0.0.0/8", "::1/128"), outbound_http=True,
        outbound_ports=tuple(range(1, 65536)),
    )  # fmt: skip


@pytest.fixture(autouse=True)
async def nothing_waits(app: Any) -> None:
    """What the tests before left behind is no work of this one."""
    async with app.state.db.transaction() as tx:
        await tx.raw.execute("DELETE FROM outbox_messages WHERE driver = 'report'")
        await tx.raw.execute("UPDATE billing_report_exports SET queue_state = 'done' WHERE queue_state = 'pending'")


@pytest.fixture
async def operator(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return await operator_client(app, connect)


@pytest.fixture
async def books(app: Any, owner: Account, stranger: Account) -> None:
    """January of two organizations."""
    await january(app.state.db, f"acct_{owner.organization}", owner.organization)
    await january(app.state.db, f"acct_{stranger.organization}", stranger.organization)


async def asked(client: httpx.AsyncClient, path: str = PATH, **body: Any) -> dict[str, Any]:
    answer = await client.post(path, json={"dataset": "finance_events", **JANUARY, **body})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def look(client: httpx.AsyncClient, report: dict[str, Any]) -> dict[str, Any]:
    return dict((await client.get(f"{PATH}/{report['id']}")).json())


async def made(app: Any, client: httpx.AsyncClient, **body: Any) -> tuple[dict[str, Any], httpx.Response]:
    """A report that was made, and its download."""
    report = await asked(client, **body)
    assert await make_all(app) >= 1
    return await look(client, report), await client.get(f"{PATH}/{report['id']}/download")


async def acts(app: Any, report: str) -> list[tuple[str, str]]:
    async with app.state.db.read() as reader:
        c = audit_events.c
        rows = await reader.fetch_all(sa.select(c.action, c.outcome).where(c.target == report).order_by(c.id))
    return [(row.action, row.outcome) for row in rows]


# -- what is in it


@pytest.mark.usefixtures("books")
class TestContent:
    async def test_csv(self, app: Any, owner: Account) -> None:
        report, answer = await made(app, owner.client)
        assert (report["state"], report["rows"], report["schema_version"]) == ("ready", 5, 1)
        assert hashlib.sha256(answer.content).hexdigest() == report["sha256"] == answer.headers["portico-sha256"]
        assert report["bytes"] == len(answer.content)
        assert report["totals"] == {"EUR": {"payments": 40700, "refunds": -2500, "fees": 1265, "events": 5}}
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        assert {row["organization_id"] for row in rows} == {owner.organization}
        assert sum(int(row["amount_minor"]) for row in rows if row["kind"] == "payment.succeeded") == 40700
        assert all(datetime.fromisoformat(row["occurred_at"]).tzinfo is not None for row in rows)
        assert rows[0]["livemode"] == "true"
        assert rows[0]["subscription_ref"] == ""

    async def test_json_lines(self, app: Any, owner: Account) -> None:
        report, answer = await made(app, owner.client, format="jsonl")
        lines = [json.loads(each) for each in answer.text.splitlines()]
        assert len(lines) == report["rows"] == 5
        assert {type(each["amount_minor"]) for each in lines} == {int}
        assert {each["livemode"] for each in lines} == {True}
        assert lines[0]["subscription_ref"] is None

    async def test_parquet(self, app: Any, owner: Account) -> None:
        from arro3.io import read_parquet

        report, answer = await made(app, owner.client, format="parquet")
        table = read_parquet(io.BytesIO(answer.content)).read_all()
        assert table.num_rows == report["rows"] == 5
        columns = {name: table[name].to_pylist() for name in ("amount_minor", "occurred_at", "livemode", "currency")}
        assert sum(columns["amount_minor"]) == 40700 + 2500 + 5000
        assert set(columns["currency"]) == {"EUR"}
        assert set(columns["livemode"]) == {True}
        assert all(START <= each.astimezone(UTC) < END for each in columns["occurred_at"])

    async def test_the_ledger_sums_to_zero(self, app: Any, owner: Account) -> None:
        report, answer = await made(app, owner.client, dataset="ledger")
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        assert report["totals"]["EUR"]["balance"] == 0 == sum(int(row["amount_minor"]) for row in rows)
        assert report["totals"]["EUR"]["postings"] == len(rows) == report["rows"]
        assert max(int(row["number"]) for row in rows) <= report["ledger_cut_off"]

    async def test_what_is_posted_later_is_not_in_it(self, app: Any, owner: Account) -> None:
        first, before = await made(app, owner.client, dataset="ledger")
        await book(
            app.state.db,
            finance_event("payment.succeeded", 1, account="a", organization=owner.organization, payment_ref="x"),
        )
        again, after = await made(app, owner.client, dataset="ledger")
        assert again["ledger_cut_off"] > first["ledger_cut_off"]
        assert after.content.startswith(before.content), "what was below the cut-off is the same"
        assert (await owner.client.get(f"{PATH}/{first['id']}/download")).content == before.content

    async def test_a_period_is_half_open(self, app: Any, owner: Account) -> None:
        at = datetime(2025, 6, 1, tzinfo=UTC)
        for moment in (at, at + timedelta(days=1)):
            await book(app.state.db, finance_event(
                "payment.succeeded", 100, account="p", organization=owner.organization, payment_ref=str(moment),
                occurred_at=moment,
            ))  # fmt: skip
        period = {"period_start": at.isoformat(), "period_end": (at + timedelta(days=1)).isoformat()}
        report, _ = await made(app, owner.client, **period)
        assert report["rows"] == 1

    async def test_a_text_that_is_a_formula_is_none_in_csv(self, app: Any, owner: Account) -> None:
        evil = '=HYPERLINK("http://evil.example","x")'
        await book(app.state.db, finance_event(
            "payment.succeeded", 100, account="evil", organization=owner.organization, payment_ref=evil, failure_code="-1+1",
            plan_ref="  =1+1", checkout_ref="＝1+1", customer_ref="  1-1",
            occurred_at=datetime(2025, 7, 1, 12, tzinfo=UTC),
        ))  # fmt: skip
        period = {"period_start": "2025-07-01T00:00:00Z", "period_end": "2025-07-02T00:00:00Z"}
        _, answer = await made(app, owner.client, **period)
        (row,) = csv.DictReader(io.StringIO(answer.text))
        assert (row["payment_ref"], row["failure_code"]) == (f"'{evil}", "'-1+1")
        assert (row["plan_ref"], row["checkout_ref"], row["customer_ref"]) == ("'  =1+1", "'＝1+1", "  1-1"), (
            "spaces before it and the wide forms change nothing"
        )
        _, answer = await made(app, owner.client, format="jsonl", **period)
        assert json.loads(answer.text)["payment_ref"] == evil

    async def test_odd_texts_survive_every_format(self, app: Any, owner: Account) -> None:
        odd = 'a"b\\c,d\ne\tf\u20ac\x7f\\.'
        await book(app.state.db, finance_event(
            "payment.succeeded", 100, account="odd", organization=owner.organization, payment_ref=odd,
            occurred_at=datetime(2025, 8, 1, 12, tzinfo=UTC),
        ))  # fmt: skip
        period = {"period_start": "2025-08-01T00:00:00Z", "period_end": "2025-08-02T00:00:00Z"}
        _, answer = await made(app, owner.client, **period)
        (row,) = csv.DictReader(io.StringIO(answer.content.decode(), newline=""))
        assert row["payment_ref"] == odd
        _, answer = await made(app, owner.client, format="jsonl", **period)
        assert json.loads(answer.content.decode())["payment_ref"] == odd

    async def test_every_format_says_the_same(self, app: Any, owner: Account) -> None:
        """To the microsecond, before 1970 too; and nothing is no empty text."""
        from arro3.io import read_parquet

        at = datetime(2025, 9, 1, 12, 0, 0, 1, UTC)
        for amount, more in (
            (2**53 - 1, {"failure_code": ""}),
            (1, {"period_start": datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC)}),
        ):
            await book(app.state.db, finance_event(
                "payment.succeeded", amount, account="same", organization=owner.organization, payment_ref=f"pi_{amount}",
                occurred_at=at, **more,
            ))  # fmt: skip
        period = {"period_start": "2025-09-01T00:00:00Z", "period_end": "2025-09-02T00:00:00Z"}
        found = {}
        for format_ in ("csv", "jsonl", "parquet"):
            _, answer = await made(app, owner.client, format=format_, **period)
            found[format_] = answer.content
        columns = read_parquet(io.BytesIO(found["parquet"])).read_all()
        names = [each.name for each in DATASETS["finance_events"].columns]
        by_column = [columns[name].to_pylist() for name in names]
        parquet = [dict(zip(names, row, strict=True)) for row in zip(*by_column, strict=True)]
        lines = [json.loads(each) for each in found["jsonl"].splitlines()]
        assert [list(each) for each in lines] == [names, names]
        for column in DATASETS["finance_events"].columns:
            for given, told in zip(parquet, lines, strict=True):
                value = told[column.name]
                if column.type == "time" and value is not None:
                    value = datetime.fromisoformat(value)
                assert given[column.name] == value, column.name
        told = list(csv.DictReader(io.StringIO(found["csv"].decode())))
        for given, row in zip(parquet, told, strict=True):
            assert [row[name] for name in ("id", "amount_minor", "failure_code")] == [
                given["id"], str(given["amount_minor"]), given["failure_code"] or "",
            ]  # fmt: skip
            assert datetime.fromisoformat(row["occurred_at"]) == given["occurred_at"] == at
        assert sorted((each["amount_minor"], each["failure_code"]) for each in parquet) == [(1, None), (2**53 - 1, "")]
        assert b',"",' in found["csv"] and b",," in found["csv"], "an empty text is no missing one in CSV either"
        assert parquet[1]["period_start"] == datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC)

    async def test_days_in_every_format(self, app: Any, owner: Account) -> None:
        from arro3.io import read_parquet

        _, lines = await made(app, owner.client, dataset="ledger", format="jsonl")
        _, answer = await made(app, owner.client, dataset="ledger", format="parquet")
        days = [
            each.isoformat() for each in read_parquet(io.BytesIO(answer.content)).read_all()["booked_on"].to_pylist()
        ]
        assert days == [json.loads(each)["booked_on"] for each in lines.text.splitlines()]
        assert days and days[0].startswith("2026-01-")

    @pytest.mark.parametrize("format_", ["csv", "jsonl", "parquet"])
    async def test_nothing_is_a_report_too(self, app: Any, owner: Account, format_: str) -> None:
        period = {"period_start": "2001-01-01T00:00:00Z", "period_end": "2001-01-02T00:00:00Z"}
        report, answer = await made(app, owner.client, format=format_, dataset="usage", **period)
        assert (report["state"], report["rows"], report["totals"], answer.status_code) == ("ready", 0, {}, 200)

    @pytest.mark.parametrize("dataset", [name for name, each in DATASETS.items() if not each.operators_only])
    async def test_every_dataset_can_be_read(self, app: Any, owner: Account, dataset: str) -> None:
        report, answer = await made(app, owner.client, dataset=dataset)
        assert (report["state"], answer.status_code) == ("ready", 200), report
        assert next(csv.reader(io.StringIO(answer.text))) == [each.name for each in DATASETS[dataset].columns]

    async def test_operators_have_everybody_and_settlements(
        self, app: Any, owner: Account, operator: httpx.AsyncClient
    ) -> None:
        report = await asked(operator, "/v1/admin/report-exports")
        settled = await asked(operator, "/v1/admin/report-exports", dataset="settlements", format="jsonl")
        assert await make_all(app) >= 2
        answer = await operator.get(f"/v1/admin/report-exports/{report['id']}/download")
        owners = {row["organization_id"] for row in csv.DictReader(io.StringIO(answer.text))}
        assert owner.organization in owners
        assert len(owners) >= 2
        assert (await operator.get(f"/v1/admin/report-exports/{settled['id']}")).json()["state"] == "ready"
        refused = await owner.client.post(PATH, json={"dataset": "settlements"})
        assert (refused.status_code, refused.json()["code"]) == (400, "report.invalid")

    async def test_what_is_json_already_stays_json(
        self, app: Any, client: httpx.AsyncClient, clock: MovableClock, owner: Account, operator: httpx.AsyncClient
    ) -> None:
        sink = await make_sink(operator, client, clock)
        told = await sink.send(receipt(f"acct_{owner.organization}", BOOKS[:-1]))
        await reconcile_all(app)
        found = {}
        for format_ in ("csv", "jsonl", "parquet"):
            report = await asked(operator, "/v1/admin/report-exports", dataset="settlements", format=format_)
            await make_all(app)
            found[format_] = (await operator.get(f"/v1/admin/report-exports/{report['id']}/download")).content
        from arro3.io import read_parquet

        lines = {each["id"]: each for each in map(json.loads, found["jsonl"].splitlines())}
        assert lines[told.json()["receipt"]]["findings"] == {"missing": 1}
        table = read_parquet(io.BytesIO(found["parquet"])).read_all()
        texts = dict(zip(table["id"].to_pylist(), table["findings"].to_pylist(), strict=True))
        rows = {row["id"]: row["findings"] for row in csv.DictReader(io.StringIO(found["csv"].decode()))}
        assert json.loads(texts[told.json()["receipt"]]) == json.loads(rows[told.json()["receipt"]]) == {"missing": 1}


# -- whose it is


async def test_nobody_else_sees_it(app: Any, owner: Account, stranger: Account, operator: httpx.AsyncClient) -> None:
    report, _ = await made(app, owner.client)
    for path in (f"{PATH}/{report['id']}", f"{PATH}/{report['id']}/download"):
        answer = await stranger.client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "report.not_found")
    whole = await asked(operator, "/v1/admin/report-exports")
    assert (await owner.client.get(f"{PATH}/{whole['id']}")).status_code == 404
    listed = (await owner.client.get(PATH)).json()["data"]
    assert [each["id"] for each in listed] == [report["id"]]


async def test_refusals(app: Any, owner: Account, stranger: Account, operator: httpx.AsyncClient) -> None:
    async def refused(**body: Any) -> str:
        answer = await owner.client.post(PATH, json={"dataset": "usage", **JANUARY, **body})
        assert answer.status_code == 400, answer.text
        return str(answer.json()["code"])

    assert await refused(period_end=START.isoformat()) == "report.invalid"
    assert await refused(destination={"kind": "s3"}) == "report.invalid"
    assert await refused(destination={"kind": "webhook"}) == "report.invalid"
    channel = (await stranger.client.put("/v1/org/notification-channels", json={"channels": [
        {"kind": "webhook", "name": "theirs", "target": "https://hooks.example.com/x", "events": ["*"]},
    ]})).json()["data"][0]["id"]  # fmt: skip
    assert await refused(destination={"kind": "webhook", "channel": channel}) == "report.invalid"
    sink = await operator.post("/v1/admin/settlement-sinks", json={"name": "only receipts"})
    assert await refused(destination={"kind": "webhook", "sink": sink.json()["id"]}) == "report.invalid"
    for beyond in ({"period_start": "9999-12-31T12:00:00Z"}, {"period_end": "0001-01-01T12:00:00Z"}):
        answer = await owner.client.post(PATH, json={"dataset": "usage", **beyond})
        assert (answer.status_code, answer.json()["code"]) == (400, "report.invalid"), beyond
    gone = await owner.client.delete("/v1/billing/report-schedules/rsc_none")
    assert (gone.status_code, gone.json()["code"]) == (404, "report.schedule_not_found")
    report = await asked(owner.client)
    early = await owner.client.get(f"{PATH}/{report['id']}/download")
    assert (early.status_code, early.json()["code"]) == (409, "report.not_ready")


async def test_without_a_folder_there_are_none(app: Any, owner: Account) -> None:
    app.state.report_exports._settings = replace(app.state.settings, objects_dir=None)
    answer = await owner.client.post(PATH, json={"dataset": "usage"})
    assert (answer.status_code, answer.json()["code"]) == (409, "report.unavailable")


async def test_so_many_a_day(app: Any, owner: Account) -> None:
    app.state.report_exports._settings = replace(app.state.settings, reports_per_day=2)
    await asked(owner.client)
    await asked(owner.client)
    answer = await owner.client.post(PATH, json={"dataset": "usage"})
    assert (answer.status_code, answer.json()["code"]) == (409, "report.limit_reached")


async def test_a_refusal_is_recorded_as_what_was_refused(
    app: Any, owner: Account, connect: Callable[..., httpx.AsyncClient]
) -> None:
    report, _ = await made(app, owner.client)
    reader = connect((await owner.key("api", scopes=["billing:read"]))["key"])
    asked_for = [
        reader.get(f"{PATH}/{report['id']}/download"), reader.post(f"{PATH}/{report['id']}/redeliver", json={"reason": "x"}),
        reader.post("/v1/billing/report-schedules", json={"dataset": "usage", "every": "day"}),
        reader.delete("/v1/billing/report-schedules/rsc_none"), reader.post(PATH, json={"dataset": "usage"}),
    ]  # fmt: skip
    assert [(await each).status_code for each in asked_for] == [403] * 5
    async with app.state.db.read() as found:
        c = audit_events.c
        query = (
            sa.select(c.action).where(c.outcome == "refused", c.organization_id == owner.organization).order_by(c.id)
        )
        rows = [row.action for row in await found.fetch_all(query)]
    assert rows == [
        "report_export.download", "report_export.redeliver", "report_schedule.create", "report_schedule.delete",
        "report_export.create",
    ]  # fmt: skip


# -- once, whatever happens


async def test_a_file_that_changed_is_never_given_out(app: Any, owner: Account, settings: ApiSettings) -> None:
    report, answer = await made(app, owner.client)
    assert answer.status_code == 200
    assert settings.objects_dir is not None
    (path,) = (settings.objects_dir / "reports").glob(f"{report['id']}-*")
    assert path.stat().st_mode & 0o777 == 0o400
    path.chmod(0o600)
    path.write_bytes(answer.content + b"\n")
    refused = await owner.client.get(f"{PATH}/{report['id']}/download")
    assert (refused.status_code, refused.json()["code"]) == (409, "report.corrupt")
    path.unlink()
    refused = await owner.client.get(f"{PATH}/{report['id']}/download")
    assert (refused.status_code, refused.json()["code"]) == (409, "report.corrupt"), "lost is not expired"


async def test_nobody_who_reads_a_large_file_holds_up_its_report(
    app: Any, owner: Account, settings: ApiSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a file is checked for a download, its report's row is free: the worker records a delivery by it."""
    report, _ = await made(app, owner.client)
    begun, free = threading.Event(), threading.Event()
    whole = delivery._digest

    def slowly(path: Path) -> bytes:
        begun.set()
        assert free.wait(60)
        return whole(path)

    monkeypatch.setattr(delivery, "_digest", slowly)
    reading = asyncio.create_task(owner.client.get(f"{PATH}/{report['id']}/download"))
    assert await asyncio.to_thread(begun.wait, 60)
    try:
        async with app.state.db.transaction() as tx:
            assert await export_store.one(tx, report["id"], lock=True) is not None
    finally:
        free.set()
    assert (await reading).status_code == 200


async def test_a_disk_that_is_full_leaves_nothing(app: Any, owner: Account, settings: ApiSettings) -> None:
    await january(app.state.db, "full", owner.organization)
    assert settings.objects_dir is not None
    for format_ in ("csv", "jsonl", "parquet"):
        report = await asked(owner.client, format=format_)
        most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, most[1]))
        try:
            await make_all(app)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
        found = await look(owner.client, report)
        assert (found["state"], found["error"]) == ("failed", "it could not be written: File too large")
        assert not list((settings.objects_dir / "reports").iterdir())
    assert ("report_export.failed", "success") in await acts(app, report["id"])


def _half(pipe: Any, url: str, key: str, folder: str) -> None:
    """A worker that has written its file, says so, and comes no further."""

    async def main() -> None:
        settings = ApiSettings(database_url=Secret(url), master_key=Secret(key), objects_dir=Path(folder))
        db = Database(url, PoolLimits(size=4))
        (work,), _ = await queue.claim(db, export_store.KIND, Limits(lease_seconds=1.0, max_attempts=9), 1)
        whole = formats.finish

        def stop(file: Any, path: Path, most: int) -> tuple[int, bytes]:
            whole(file, path, most)
            pipe.send(path.name)
            time.sleep(600)
            raise AssertionError

        formats.finish = stop  # type: ignore[assignment]
        await exports.make(work, settings, Sealer(settings.master_key), SystemClock())

    asyncio.run(main())


async def test_a_worker_that_is_killed_between_file_and_row(app: Any, owner: Account, settings: ApiSettings) -> None:
    """Its file is nobody's: the report is made anew by the next worker, and the file is swept up."""
    await january(app.state.db, "killed", owner.organization)
    report = await asked(owner.client)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    args = (theirs, app.state.db.url, settings.master_key.reveal(), str(settings.objects_dir))
    process = spawn.Process(target=_half, args=args)
    process.start()
    try:
        assert await asyncio.to_thread(ours.poll, 120), "it wrote its file"
        half = ours.recv()
    finally:
        process.kill()
        await asyncio.to_thread(process.join)
    assert settings.objects_dir is not None
    assert [path.name for path in (settings.objects_dir / "reports").iterdir()] == [half]
    assert (await look(owner.client, report))["state"] == "generating"
    early = await owner.client.get(f"{PATH}/{report['id']}/download")
    assert (early.status_code, early.json()["code"]) == (409, "report.not_ready")
    async with asyncio.timeout(60):
        found: list[Any] = []
        while not found:
            found, _ = await queue.claim(app.state.db, export_store.KIND, Limits(max_attempts=9), 1, suspect=True)
            await asyncio.sleep(0.05)
    await exports.make(found[0], settings, app.state.sealer, app.state.clock)
    async with app.state.db.read() as reader:
        row = await export_store.one(reader, report["id"])
    assert row is not None and (row.state, row.attempts) == ("ready", 2)
    assert row.file != half
    await exports.forget_strays(app.state.db, settings, app.state.clock.wall() + timedelta(days=2))
    assert [path.name for path in (settings.objects_dir / "reports").iterdir()] == [row.file]
    assert (await owner.client.get(f"{PATH}/{report['id']}/download")).status_code == 200


async def test_a_report_that_is_over_is_not_made(app: Any, owner: Account, settings: ApiSettings) -> None:
    """An operator may put its job in again; its state does not come back."""
    report = await asked(owner.client)
    async with app.state.db.transaction() as tx:
        await export_store.update(tx, report["id"], state="failed")
    (work,), _ = await queue.claim(app.state.db, export_store.KIND, Limits(), 1)
    with pytest.raises(Hopeless, match="the report is failed"):
        await exports.make(work, settings, app.state.sealer, app.state.clock)
    assert settings.objects_dir is not None
    assert not (settings.objects_dir / "reports").exists()


async def test_a_worker_that_lost_its_lease_makes_nothing(app: Any, owner: Account, settings: ApiSettings) -> None:
    report, state = await asked(owner.client), app.state
    (slow,), _ = await queue.claim(state.db, export_store.KIND, Limits(lease_seconds=0.0, max_attempts=9), 1)
    (fast,), _ = await queue.claim(state.db, export_store.KIND, Limits(max_attempts=9), 1, suspect=True)
    await exports.make(fast, settings, state.sealer, state.clock)
    ready = await look(owner.client, report)
    with pytest.raises(LeaseLost):
        await exports.make(slow, settings, state.sealer, state.clock)
    assert await look(owner.client, report) == ready
    assert settings.objects_dir is not None
    assert len(list((settings.objects_dir / "reports").iterdir())) == 1


async def test_one_that_is_too_large_fails_and_says_so(app: Any, owner: Account, settings: ApiSettings) -> None:
    await january(app.state.db, "large", owner.organization)
    report = await asked(owner.client)
    await make_all(app, replace(settings, report_max_bytes=100))
    found = await look(owner.client, report)
    assert (found["state"], found["error"]) == ("failed", "it has more than 100 bytes")
    assert settings.objects_dir is not None
    assert not list((settings.objects_dir / "reports").iterdir())


async def test_one_whose_last_attempt_breaks_fails(app: Any, owner: Account, settings: ApiSettings) -> None:
    report = await asked(owner.client)
    async with app.state.db.transaction() as tx:
        await export_store.update(tx, report["id"], dataset="none")
    await make_all(app)
    async with app.state.db.read() as reader:
        row = await export_store.one(reader, report["id"])
    assert row is not None
    assert (row.state, row.error) == ("failed", "it could not be made (KeyError)"), "nothing of ours is told"
    gone = await asked(owner.client)
    async with app.state.db.transaction() as tx:  # the worker was killed each time
        await export_store.update(tx, gone["id"], queue_state="dead", state="generating", last_error="the worker ended")
        await exports.sweep(tx, settings, app.state.clock.wall(), 10)
    found = await look(owner.client, gone)
    assert (found["state"], found["error"]) == ("failed", "every attempt to make it has failed")
    assert (await acts(app, gone["id"]))[-1] == ("report_export.failed", "success")


async def test_it_expires_and_its_file_goes(
    app: Any, owner: Account, settings: ApiSettings, clock: MovableClock
) -> None:
    report, _ = await made(app, owner.client)
    clock.advance(settings.report_days * 86_400 + 1)
    late = await owner.client.get(f"{PATH}/{report['id']}/download")
    assert late.status_code in (401, 409)  # the token of the person may be over, too
    async with app.state.db.transaction() as tx:
        assert await exports.sweep(tx, settings, clock.wall(), 1000) >= 1
    async with app.state.db.read() as reader:
        row = await export_store.one(reader, report["id"])
    assert row is not None
    assert (row.state, row.file, row.sha256.hex()) == ("expired", None, report["sha256"])
    assert (await acts(app, report["id"]))[-1] == ("report_export.expired", "success")
    assert settings.objects_dir is not None
    assert not list((settings.objects_dir / "reports").iterdir())


async def test_strays_are_swept_up(app: Any, owner: Account, settings: ApiSettings, clock: MovableClock) -> None:
    report, _ = await made(app, owner.client)
    assert settings.objects_dir is not None
    (settings.objects_dir / "reports" / "rex_stray-1.csv").write_bytes(b"x")
    later = clock.wall() + timedelta(days=2)
    assert await exports.forget_strays(app.state.db, settings, later) == 1
    assert [path.name.partition("-")[0] for path in (settings.objects_dir / "reports").iterdir()] == [report["id"]]


# -- schedules


async def test_a_schedule_makes_one_of_each_period(
    app: Any, owner: Account, settings: ApiSettings, clock: MovableClock
) -> None:
    body = {"dataset": "usage", "every": "day"}
    schedule = (await owner.client.post("/v1/billing/report-schedules", json=body)).json()
    end = datetime.fromisoformat(schedule["next_end"])
    db, sealer = app.state.db, app.state.sealer
    assert await exports.run_schedules(db, sealer, end - timedelta(seconds=1)) == 0
    # Two workers at once, twice; and then three days after which nobody had looked.
    both = await asyncio.gather(*(exports.run_schedules(db, sealer, end) for _ in range(2)))
    assert sum(both) == 1
    assert await exports.run_schedules(db, sealer, end) == 0
    days = 0
    while made_now := await exports.run_schedules(db, sealer, end + timedelta(days=3)):
        days += made_now
    assert days == 3
    found = (await owner.client.get(PATH)).json()["data"]
    starts = sorted(datetime.fromisoformat(each["period_start"]) for each in found)
    assert [(each - starts[0]).days for each in starts] == [0, 1, 2, 3]
    assert (await owner.client.delete(f"/v1/billing/report-schedules/{schedule['id']}")).status_code == 204
    assert (await owner.client.get("/v1/billing/report-schedules")).json()["data"] == []


@pytest.mark.parametrize(
    ("every", "at", "start", "end"),
    [
        ("day", "2026-11-26T23:30:00-02:00", "2026-11-27", "2026-11-28"),
        ("week", "2026-11-26T12:00:00+00:00", "2026-11-23", "2026-11-30"),
        ("month", "2028-02-29T00:00:00+00:00", "2028-02-01", "2028-03-01"),
        ("month", "2026-12-31T23:59:59+00:00", "2026-12-01", "2027-01-01"),
    ],
)
def test_periods(every: str, at: str, start: str, end: str) -> None:
    found = exports.period_of(every, datetime.fromisoformat(at))
    assert [each.isoformat()[:10] for each in found] == [start, end]


# -- deliveries


async def hook(owner: Account, receiver: WebhookReceiver) -> str:
    """A channel that leads to the receiver, which knows its secret."""
    answer = await owner.client.put("/v1/org/notification-channels", json={"channels": [
        {"kind": "webhook", "name": "books", "target": receiver.url, "events": ["channel.test"]},
    ]})  # fmt: skip
    assert answer.status_code == 200, answer.text
    receiver.secrets = [answer.json()["data"][0]["secret"]]
    return str(answer.json()["data"][0]["id"])


async def ack(client: httpx.AsyncClient, report: str, token: str, sha256: str) -> httpx.Response:
    return await client.post(f"{PATH}/{report}/ack", json={"token": token, "sha256": sha256, "receipt": "load-1"})


class TestWebhook:
    async def test_from_the_books_to_the_acknowledgement(
        self, app: Any, owner: Account, client: httpx.AsyncClient, settings: ApiSettings
    ) -> None:
        await january(app.state.db, "hooked", owner.organization)
        async with WebhookReceiver() as receiver:
            to = {"kind": "webhook", "channel": await hook(owner, receiver)}
            report = await asked(owner.client, destination=to)
            await make_all(app)
            assert (await look(owner.client, report))["state"] == "delivering"
            receiver.plan(Behaviour(status=503))
            outside = reach.client_of(settings)
            first = await deliver_all(app, outside)
            assert first == ["Retry: HTTP 503"]
            assert (await look(owner.client, report))["error"] == "HTTP 503"
            assert await deliver_all(app, outside) == ["delivered"]
            assert not receiver.refused
            bodies = [each.body for each in receiver.got]
            assert len(bodies) == 2
            assert bodies[0] == bodies[1], "every attempt is the same bytes"
        data = json.loads(bodies[0])["data"]
        found = await look(owner.client, report)
        assert (found["state"], found["deliveries"]) == ("delivered", 1)
        assert (data["sha256"], data["rows"], data["totals"]) == (found["sha256"], found["rows"], found["totals"])
        content = base64.b64decode(data["content_base64"])
        assert hashlib.sha256(content).hexdigest() == data["sha256"]
        linked = await client.get("/v1/" + data["content_url"].partition("/v1/")[2])
        assert linked.content == content
        assert (await client.get(f"{PATH}/{report['id']}/content", params={"token": "0" * 64})).status_code == 401
        acked = await ack(client, report["id"], data["ack_token"], data["sha256"])
        assert acked.json() == {"id": report["id"], "state": "acked", "applied": True}
        assert (await ack(client, report["id"], data["ack_token"], data["sha256"])).json()["applied"] is True
        assert [each for each in await acts(app, report["id"]) if each[0] != "report_export.download"] == [
            ("report_export.create", "success"), ("report_export.ready", "success"),
            ("report_export.deliver", "success"), ("report_export.ack", "success"),
        ]  # fmt: skip

    async def test_redelivery_is_the_same_bytes(self, app: Any, owner: Account, settings: ApiSettings) -> None:
        async with WebhookReceiver() as receiver:
            report = await asked(owner.client, destination={"kind": "webhook", "channel": await hook(owner, receiver)})
            await make_all(app)
            outside = reach.client_of(settings)
            await deliver_all(app, outside)
            again = await owner.client.post(f"{PATH}/{report['id']}/redeliver", json={"reason": "lost"})
            assert (again.status_code, again.json()["state"], again.json()["deliveries"]) == (202, "delivering", 2)
            twice = await owner.client.post(f"{PATH}/{report['id']}/redeliver", json={"reason": "lost"})
            assert (twice.status_code, twice.json()["code"]) == (409, "report.state")
            await deliver_all(app, outside)
            assert receiver.got[0].body == receiver.got[1].body
            assert receiver.got[0].id != receiver.got[1].id
        assert (await look(owner.client, report))["state"] == "delivered"

    async def test_a_large_one_brings_its_link_alone(self, app: Any, owner: Account, settings: ApiSettings) -> None:
        async with WebhookReceiver() as receiver:
            await asked(owner.client, destination={"kind": "webhook", "channel": await hook(owner, receiver)})
            await make_all(app)
            small = replace(settings, report_inline_max_bytes=10)
            assert await deliver_all(app, reach.client_of(settings), small) == ["delivered"]
            assert json.loads(receiver.got[0].body)["data"]["content_base64"] is None

    async def test_the_bytes_that_are_sent_are_those_that_were_checked(
        self, app: Any, owner: Account, settings: ApiSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with WebhookReceiver() as receiver:
            report = await asked(owner.client, destination={"kind": "webhook", "channel": await hook(owner, receiver)})
            await make_all(app)
            checked = delivery._digest

            def then_changed(path: Path) -> bytes:
                found = checked(path)
                path.chmod(0o600)
                path.write_bytes(path.read_bytes() + b"1")
                return found

            monkeypatch.setattr(delivery, "_digest", then_changed)
            (came,) = await deliver_all(app, reach.client_of(settings))
            assert came == "Hopeless: the file is gone, or is not the one that was made"
            assert not receiver.got
        assert (await look(owner.client, report))["state"] == "failed"

    async def test_a_worker_without_the_folder_leaves_it_to_another(
        self, app: Any, owner: Account, settings: ApiSettings
    ) -> None:
        async with WebhookReceiver() as receiver:
            report = await asked(owner.client, destination={"kind": "webhook", "channel": await hook(owner, receiver)})
            await make_all(app)
            outside = reach.client_of(settings)
            (came,) = await deliver_all(app, outside, replace(settings, objects_dir=None))
            assert came.startswith("Retry: ")
            assert await deliver_all(app, outside) == ["delivered"]
        assert (await look(owner.client, report))["state"] == "delivered"

    async def test_a_channel_that_is_gone_fails_it(self, app: Any, owner: Account, settings: ApiSettings) -> None:
        async with WebhookReceiver() as receiver:
            report = await asked(owner.client, destination={"kind": "webhook", "channel": await hook(owner, receiver)})
            await make_all(app)
            await owner.client.put("/v1/org/notification-channels", json={"channels": []})
            (came,) = await deliver_all(app, reach.client_of(settings))
            assert came.startswith("Hopeless")
            assert not receiver.got
        assert (await look(owner.client, report))["state"] == "failed"

    async def test_a_sink_of_the_operators(
        self,
        app: Any,
        client: httpx.AsyncClient,
        clock: MovableClock,
        operator: httpx.AsyncClient,
        settings: ApiSettings,
    ) -> None:
        async with WebhookReceiver() as receiver:
            sink = await make_sink(operator, client, clock, receiver.url)
            receiver.secrets = [sink.secret]
            to = {"kind": "webhook", "sink": sink.id}
            report = await asked(operator, "/v1/admin/report-exports", destination=to)
            await make_all(app)
            assert await deliver_all(app, reach.client_of(settings)) == ["delivered"]
            assert not receiver.refused
            assert json.loads(receiver.got[0].body)["data"]["export_id"] == report["id"]


class TestAcknowledgement:
    async def _delivering(self, app: Any, owner: Account) -> tuple[str, str, str]:
        """A report on its way: its id, its token and its hash."""
        async with WebhookReceiver() as receiver:
            report = await asked(owner.client, destination={"kind": "webhook", "channel": await hook(owner, receiver)})
        await make_all(app)
        async with app.state.db.read() as reader:
            row = await export_store.one(reader, report["id"])
        assert row is not None
        return report["id"], exports.token_of(app.state.sealer, row), row.sha256.hex()

    async def test_may_be_faster_than_the_record_of_the_delivery(
        self, app: Any, owner: Account, client: httpx.AsyncClient, settings: ApiSettings
    ) -> None:
        report, token, sha256 = await self._delivering(app, owner)
        assert (await ack(client, report, token, sha256)).json()["state"] == "acked"
        await deliver_all(app, reach.client_of(settings))
        assert (await owner.client.get(f"{PATH}/{report}")).json()["state"] == "acked"

    async def test_another_token_is_nobodys(self, app: Any, owner: Account, client: httpx.AsyncClient) -> None:
        report, token, sha256 = await self._delivering(app, owner)
        other, _, _ = await self._delivering(app, owner)
        answers = [
            await ack(client, report, "x", sha256), await ack(client, report, token[:-1], sha256),
            await ack(client, other, token, sha256), await ack(client, "rex_none", token, sha256),
        ]  # fmt: skip
        assert {(each.status_code, each.json()["code"]) for each in answers} == {(401, "report.ack_refused")}
        assert (await owner.client.get(f"{PATH}/{report}")).json()["state"] == "delivering"
        assert ("report_export.ack", "refused") in await acts(app, report)

    async def test_whoever_guesses_does_not_fill_the_log(
        self, app: Any, owner: Account, client: httpx.AsyncClient, clock: MovableClock
    ) -> None:
        report, _, sha256 = await self._delivering(app, owner)
        for _ in range(5):
            assert (await ack(client, report, "guess", sha256)).status_code == 401
        assert (await acts(app, report)).count(("report_export.ack", "refused")) == 1
        clock.advance(61)
        await ack(client, report, "guess", sha256)
        async with app.state.db.read() as reader:
            c = audit_events.c
            query = sa.select(c.details).where(c.target == report, c.action == "report_export.ack").order_by(c.id)
            rows = await reader.fetch_all(query)
        assert [row.details["unrecorded"] for row in rows] == [0, 4]

    async def test_another_hash_is_an_incident_and_changes_nothing(
        self, app: Any, owner: Account, client: httpx.AsyncClient
    ) -> None:
        report, token, sha256 = await self._delivering(app, owner)
        wrong = await ack(client, report, token, "0" * 64)
        assert (wrong.status_code, wrong.json()["code"]) == (409, "report.ack_mismatch")
        found = (await owner.client.get(f"{PATH}/{report}")).json()
        assert (found["state"], found["ack_mismatches"]) == ("delivering", 1)
        assert (await ack(client, report, token, sha256)).json()["state"] == "acked"

    async def test_after_its_time_is_written_down_and_not_applied(
        self, app: Any, owner: Account, client: httpx.AsyncClient, clock: MovableClock, settings: ApiSettings
    ) -> None:
        report, token, sha256 = await self._delivering(app, owner)
        clock.advance(settings.report_days * 86_400 + 1)
        late = await ack(client, report, token, sha256)
        assert (late.status_code, late.json()["applied"]) == (200, False)
        async with app.state.db.read() as reader:
            row = await export_store.one(reader, report)
        assert row is not None
        assert row.late_ack_at is not None
        assert row.acked_at is None

    async def test_before_anything_was_sent(self, app: Any, owner: Account, client: httpx.AsyncClient) -> None:
        report = await asked(owner.client)
        async with app.state.db.read() as reader:
            row = await export_store.one(reader, report["id"])
        token = exports.token_of(app.state.sealer, row)
        early = await ack(client, report["id"], token, "0" * 64)
        assert (early.status_code, early.json()["code"]) == (409, "report.state")

    async def test_of_a_download(self, app: Any, owner: Account, client: httpx.AsyncClient) -> None:
        report, answer = await made(app, owner.client)
        assert (await look(owner.client, report))["state"] == "delivered"
        acked = await ack(client, report["id"], answer.headers["portico-ack-token"], report["sha256"])
        assert acked.json()["state"] == "acked"
        refused = await owner.client.post(f"{PATH}/{report['id']}/redeliver", json={"reason": "x"})
        assert (refused.status_code, refused.json()["code"]) == (409, "report.state")

    async def test_what_has_expired_is_not_sent_again(
        self,
        app: Any,
        owner: Account,
        connect: Callable[..., httpx.AsyncClient],
        clock: MovableClock,
        settings: ApiSettings,
    ) -> None:
        report, token, sha256 = await self._delivering(app, owner)
        await ack(connect(), report, token, sha256)
        key = (await owner.key("api", scopes=["billing:read", "billing:export"]))["key"]
        clock.advance(settings.report_days * 86_400 + 1)
        refused = await connect(key).post(f"{PATH}/{report}/redeliver", json={"reason": "x"})
        assert (refused.status_code, refused.json()["code"]) == (409, "report.expired")


async def test_the_object_store(app: Any, operator: httpx.AsyncClient, settings: ApiSettings, tmp_path: Path) -> None:
    with_store = replace(settings, report_store_url=f"file://{tmp_path}/bucket")
    app.state.report_exports._settings = with_store
    report = await asked(operator, "/v1/admin/report-exports", destination={"kind": "s3"})
    await make_all(app)
    assert await deliver_all(app, None, with_store) == ["delivered"]
    files = {path.suffix: path for path in (tmp_path / "bucket").rglob("*.*") if path.is_file()}
    manifest = json.loads(files[".json"].read_text())
    assert manifest["export_id"] == report["id"]
    assert hashlib.sha256(files[".csv"].read_bytes()).hexdigest() == manifest["sha256"]
    again = await operator.post(f"/v1/admin/report-exports/{report['id']}/redeliver", json={"reason": "lost"})
    assert again.status_code == 202, again.text
    before = {path: path.read_bytes() for path in files.values()}
    assert await deliver_all(app, None, with_store) == ["delivered"]
    assert {path: path.read_bytes() for path in files.values()} == before


async def test_an_object_store_that_speaks_s3(app: Any, operator: httpx.AsyncClient, settings: ApiSettings) -> None:
    async with ObjectStore("AKIATEST", "s3cret") as outside:
        with_store = replace(
            settings, report_store_url="s3://books/reports", report_store_endpoint=outside.url, report_store_key="AKIATEST",
            report_store_secret=Secret("s3cret"), report_store_timeout_seconds=60.0,
        )  # fmt: skip
        app.state.report_exports._settings = with_store
        report = await asked(operator, "/v1/admin/report-exports", destination={"kind": "s3"})
        await make_all(app)
        wrong = replace(with_store, report_store_secret=Secret("guessed"))
        (came,) = await deliver_all(app, None, wrong)
        assert came.startswith("Retry") and "guessed" not in came
        outside.fail = 1_000_000
        (came,) = await deliver_all(app, None, replace(with_store, report_store_timeout_seconds=0.5))
        assert came == "Retry: the object store did not take it within 0.5 s"
        outside.fail = 1  # and the next one is tried again before anybody is told
        assert (outside.refused > 0, outside.objects) == (True, {})
        assert await deliver_all(app, None, with_store) == ["delivered"]
        file, manifest = outside.order
        assert manifest == f"{file}.manifest.json", "the manifest comes when the file is there"
        assert file.startswith("/books/reports/finance_events/") and file.endswith(f"{report['id']}.csv")
        found = (await operator.get(f"/v1/admin/report-exports/{report['id']}")).json()
        assert hashlib.sha256(outside.objects[file]).hexdigest() == found["sha256"]
        assert (found["state"], json.loads(outside.objects[manifest])["sha256"]) == ("delivered", found["sha256"])
