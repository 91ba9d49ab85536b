"""POST /v1/billing/webhooks/…: what is believed and stored, what is refused and why, and that an event is there once."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.audit.store import audit_events
from portico.control.billing import webhook_store as store
from portico.control.billing import webhooks
from portico.control.billing.webhooks import Received
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings
from tests.control.billing.webhook_sending import (
    RAZORPAY_OLD,
    STRIPE_OLD,
    Authority,
    CertificateServer,
    Sender,
    body_of,
    certificate_server,
    colliding,
    trust,
    with_providers,
)
from tests.control.conftest import MovableClock
from tests.control.domains.sending import operator_client

PROVIDERS = ("stripe", "razorpay", "paypal")
E = store.events.c


@pytest.fixture
async def certificates() -> AsyncIterator[CertificateServer]:
    async with certificate_server() as made:
        yield made


@pytest.fixture
def settings(settings: ApiSettings, certificates: CertificateServer, tmp_path: Path) -> ApiSettings:
    return with_providers(
        settings, paypal_cert_hosts=(certificates.origin,), paypal_cert_ca_file=trust(tmp_path, Authority())
    )


@pytest.fixture
async def sender(
    app: Any, client: httpx.AsyncClient, clock: MovableClock, certificates: CertificateServer
) -> AsyncIterator[Sender]:
    """Somebody who sends as the providers do, while PayPal's certificate is known; nothing is here before or after."""
    await wipe(app)
    await know(app, certificates)
    yield Sender(client, clock, certificates)
    await wipe(app)


async def wipe(app: Any) -> None:
    async with app.state.db.transaction() as tx:
        for table in (store.events, store.certificates):
            await tx.execute(sa.delete(table))


async def know(app: Any, certificates: CertificateServer, name: str = "CERT-1") -> None:
    """PayPal's certificate was fetched before."""
    async with app.state.db.transaction() as tx:
        pem = Authority().issue()
        _, until = app.state.billing_webhooks.certificates.check(pem)
        await store.keep_certificate(tx, certificates.url(name), pem.decode(), until)


async def rows(app: Any, *where: Any) -> list[Any]:
    async with app.state.db.read() as reader:
        return list(await reader.fetch_all(sa.select(store.events).where(*where).order_by(E.id)))


async def audited(app: Any, action: str) -> list[Any]:
    await app.state.billing_webhooks.intake.tell()
    async with app.state.db.read() as reader:
        query = sa.select(audit_events).where(audit_events.c.action == action, audit_events.c.organization_id.is_(None))
        return list(await reader.fetch_all(query.order_by(audit_events.c.id)))


# -- believed


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_an_event_is_stored_once_and_sealed(app: Any, sender: Sender, provider: str) -> None:
    document = body_of(provider, sender.clock.wall())
    raw = json.dumps(document).encode()
    answer = await sender.send(provider, raw)
    assert (answer.status_code, answer.json()["status"]) == (202, "accepted"), answer.text
    again = await sender.send(provider, raw)
    assert (again.status_code, again.json()) == (200, {"event": answer.json()["event"], "status": "duplicate"})
    (row,) = await rows(app)
    assert (row.id, row.provider, row.livemode, row.proven, row.queue_state) == (
        answer.json()["event"], provider, False, True, "pending",
    )  # fmt: skip
    # PayPal signs a checksum: its events are nothing to go by until their objects were fetched.
    assert row.status == ("received" if provider == "paypal" else "verified")
    assert row.proof == ("CERT-1" if provider == "paypal" else "current")
    subject = {"stripe": "sub_", "razorpay": "sub_", "paypal": "I-"}[provider].encode()
    assert subject in raw and subject not in bytes(row.sealed_body)
    assert Sealer(app.state.settings.master_key).open(webhooks.PURPOSE, row.id, bytes(row.sealed_body)) == raw


async def test_secrets_overlap(app: Any, sender: Sender) -> None:
    for provider, how in (("stripe", {"secrets": (STRIPE_OLD,)}), ("razorpay", {"secret": RAZORPAY_OLD})):
        assert (await sender.send(provider, **how)).status_code == 202, "what it sends again is signed as it was before"
    assert [row.proof for row in await rows(app)] == ["old", "old"]
    app.state.billing_webhooks.verifier._settings = dataclasses.replace(
        app.state.settings, stripe_webhook_secret_old=None, razorpay_webhook_secret_old=None
    )
    for provider, how in (("stripe", {"secrets": (STRIPE_OLD,)}), ("razorpay", {"secret": RAZORPAY_OLD})):
        assert (await sender.send(provider, **how)).status_code == 401


async def test_an_unset_secret_refuses(app: Any, sender: Sender) -> None:
    """Also when there is an old one, when the account is not set, and for signatures under an empty key."""
    for unset in (
        {"stripe_webhook_secret": None, "razorpay_webhook_secret": None, "paypal_webhook_id": ""},
        {"stripe_account": "", "razorpay_account": "", "paypal_account": ""},
    ):
        app.state.billing_webhooks.verifier._settings = dataclasses.replace(app.state.settings, **unset)
        for provider, how in (
            ("stripe", {"secrets": ("",)}), ("stripe", {"secrets": (STRIPE_OLD,)}), ("stripe", {}),
            ("razorpay", {"secret": ""}), ("razorpay", {"secret": RAZORPAY_OLD}), ("razorpay", {}),
            ("paypal", {"webhook": ""}), ("paypal", {}),
        ):  # fmt: skip
            answer = await sender.send(provider, **how)
            assert (answer.status_code, answer.json()["code"]) == (401, "billing.webhook_rejected"), (provider, how)
    assert await rows(app) == []
    counted = app.state.billing_webhooks.intake.refusals
    assert {key: count for key, count in counted.items() if key[1] == "no_secret"} == {
        ("stripe", "no_secret"): 6, ("razorpay", "no_secret"): 6, ("paypal", "no_secret"): 4,
    }  # fmt: skip


# -- the forgery suite: each changes nothing, and says why

FORGERIES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "stripe": {
        "wrong": ("mismatch", {"secrets": ("whsec_other",)}),
        "stale": ("stale", {"shift": -302}),
        "of the future": ("future", {"shift": 302}),
        "truncated": ("mismatch", {"cut": True}),
        "re-encoded": ("mismatch", {"recode": True}),
        "no signature": ("missing", {"change": {"stripe-signature": None}}),
        "signed by Razorpay's way": ("missing", {"change": {"stripe-signature": None, "x-razorpay-signature": "0" * 64}}),
    },
    "razorpay": {
        "wrong": ("mismatch", {"secret": "other"}),
        "stale": ("stale", {"made": -691_300}),
        "of the future": ("future", {"made": 302}),
        "truncated": ("mismatch", {"cut": True}),
        "re-encoded": ("mismatch", {"recode": True}),
        "no signature": ("missing", {"change": {"x-razorpay-signature": None}}),
        "in capitals": ("mismatch", {"capitals": True}),
    },
    "paypal": {
        "wrong": ("mismatch", {"webhook": "9XL90610J3647323D"}),
        "stale": ("stale", {"shift": -345_700}),
        "of the future": ("future", {"shift": 302}),
        "truncated": ("mismatch", {"cut": True}),
        "re-encoded": ("mismatch", {"recode": True}),
        "another algorithm": ("algorithm", {"change": {"paypal-auth-algo": "SHA1withRSA"}}),
        "a certificate of their own": (
            "cert_url", {"change": {"paypal-cert-url": "https://evil.example/v1/notifications/certs/CERT-1"}},
        ),
        "the live host in test mode": (
            "cert_url", {"change": {"paypal-cert-url": "https://api.paypal.com/v1/notifications/certs/CERT-1"}},
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_forgeries_change_nothing_and_say_why(app: Any, sender: Sender, provider: str) -> None:
    counted, answers = app.state.billing_webhooks.intake.refusals, set()
    for case, (why, how) in FORGERIES[provider].items():
        given, before = dict(how), counted[provider, why]
        made = body_of(provider, sender.clock.wall())
        if "made" in given:
            made["created_at"] += given.pop("made")
        raw = json.dumps(made).encode()
        if given.pop("cut", False):
            given["body"] = raw[:-1]
        if given.pop("recode", False):
            given["body"] = json.dumps(made, separators=(",", ":")).encode()
        if given.pop("capitals", False):
            given["change"] = {"x-razorpay-signature": sender.fields(provider, raw)["x-razorpay-signature"].upper()}
        answer = await sender.send(provider, raw, **given)
        assert answer.status_code == 401, (case, answer.text)
        assert counted[provider, why] == before + 1, (case, dict(counted))
        answers.add(json.dumps({**answer.json(), "request_id": ""}))
    assert len(answers) == 1, "outside, no two differ"
    assert await rows(app) == []
    told = {
        row.details["code"]: row.details["count"]
        for row in await audited(app, "billing_webhook.ingest")
        if row.target == provider
    }
    reasons = Counter(why for why, _ in FORGERIES[provider].values())
    assert reasons.items() <= told.items(), "and the audit log says why"


@pytest.mark.parametrize("change", [{"livemode": True}, {"account": "acct_other"}, {"account_id": "acc_other"}])
async def test_another_mode_or_account(app: Any, sender: Sender, change: dict[str, Any]) -> None:
    """Signed by our secret, and not about our account in our mode: kept as a trace, applied never, and said aloud."""
    provider = "razorpay" if "account_id" in change else "stripe"
    made = body_of(provider, sender.clock.wall()) | change
    answer = await sender.send(provider, made)
    assert (answer.status_code, answer.json()["status"]) == (202, "ignored")
    why = "other_mode" if "livemode" in change else "other_account"
    (row,) = await rows(app)
    assert (row.status, row.reason, row.queue_state) == ("ignored", why, "done")
    assert why in [each.details["code"] for each in await audited(app, "billing_webhook.ingest")]
    # It holds no id of ours.
    ours = {name: value for name, value in made.items() if name not in change} | body_of(
        provider, sender.clock.wall(), id=made.get("id")
    )
    assert (await sender.send(provider, ours)).json()["status"] == "accepted"


async def test_another_body_under_the_same_id(app: Any, sender: Sender) -> None:
    """A security event: nothing is overwritten, the sender hears 409, and the audit log names both."""
    for provider in PROVIDERS:
        made = body_of(provider, sender.clock.wall())
        how = {"event": "ev_same"} if provider == "razorpay" else {}
        first = await sender.send(provider, made, **how)
        other = await sender.send(provider, made | {"more": 1}, **how)
        assert (other.status_code, other.json()["code"]) == (409, "billing.webhook_conflict"), provider
        (row,) = await rows(app, E.provider == provider)
        assert (row.id, row.status) == (first.json()["event"], "received" if provider == "paypal" else "verified")
        (told,) = [each for each in await audited(app, "billing_webhook.conflict") if each.target == row.id]
        assert (told.outcome, told.details["event"], told.details["sha256"] != row.raw_sha256.hex()) == (
            "refused", row.event_id, True,
        )  # fmt: skip


async def test_stripe_counts_endpoints_anew_for_each_delivery(app: Any, sender: Sender) -> None:
    """``pending_webhooks`` is no part of what happened: the same event is no other one for it."""
    made = body_of("stripe", sender.clock.wall(), pending_webhooks=2)
    first = await sender.send("stripe", made)
    again = await sender.send("stripe", made | {"pending_webhooks": 1})
    assert (again.status_code, again.json()) == (200, {"event": first.json()["event"], "status": "duplicate"})
    other = await sender.send("stripe", made | {"pending_webhooks": 1, "created": made["created"] + 1})
    assert (other.status_code, other.json()["code"]) == (409, "billing.webhook_conflict")
    assert len(await rows(app)) == 1


async def test_a_signature_of_paypal_is_good_for_one_body(app: Any, sender: Sender) -> None:
    """Bodies with the same checksum are endless: a delivery that was here is not here again with another one."""
    genuine = json.dumps(body_of("paypal", sender.clock.wall())).encode()
    fields = sender.fields("paypal", genuine)
    assert (await sender.client.post("/v1/billing/webhooks/paypal", content=genuine, headers=fields)).status_code == 202
    forged = colliding(genuine, body_of("paypal", sender.clock.wall(), resource={"id": "I-OTHER", "status": "ACTIVE"}))
    answer = await sender.client.post("/v1/billing/webhooks/paypal", content=forged, headers=fields)
    assert (answer.status_code, answer.json()["code"]) == (409, "billing.webhook_conflict")
    assert len(await rows(app)) == 1


async def test_razorpays_id_is_not_signed(app: Any, sender: Sender) -> None:
    """A copy under another id is the same event, and without one its body is its name."""
    made = json.dumps(body_of("razorpay", sender.clock.wall())).encode()
    first = (await sender.send("razorpay", made, event="ev_1")).json()
    for event in ("ev_2", None):
        assert (await sender.send("razorpay", made, event=event)).json() == first | {"status": "duplicate"}
    without = (await sender.send("razorpay", event=None)).json()
    assert without["status"] == "accepted"
    assert [row.event_id.partition(":")[0] for row in await rows(app)] == ["ev_1", "sha256"]


async def test_a_header_twice_is_not_read(app: Any, sender: Sender) -> None:
    for provider, name in (
        ("stripe", "Stripe-Signature"), ("razorpay", "X-Razorpay-Event-Id"), ("paypal", "PayPal-Cert-Url"),
    ):  # fmt: skip
        raw = json.dumps(body_of(provider, sender.clock.wall())).encode()
        fields = [*sender.fields(provider, raw).items(), (name, "x")]
        answer = await sender.client.post(f"/v1/billing/webhooks/{provider}", content=raw, headers=fields)
        assert answer.status_code == 401
        assert app.state.billing_webhooks.intake.refusals[provider, "malformed"] == 1


async def test_a_signed_body_that_says_too_little(app: Any, sender: Sender) -> None:
    texts = (
        b"",
        b"[]",
        b"{}",
        b"nonsense",
        b'{"id": 1}',
        b'{"id": "a", "id": "b"}',
        "{}".encode("utf-16"),
        b"[" * 50_000,
    )
    for raw in texts:
        answer = await sender.send("stripe", raw)
        assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid"), raw[:20]
    for provider, name in (
        ("stripe", "id"), ("stripe", "type"), ("stripe", "livemode"), ("stripe", "created"), ("razorpay", "event"),
        ("razorpay", "account_id"), ("razorpay", "created_at"), ("paypal", "id"), ("paypal", "event_type"),
        ("paypal", "create_time"),
    ):  # fmt: skip
        for wrong in (None, {}, "x\ny"):
            answer = await sender.send(provider, body_of(provider, sender.clock.wall()) | {name: wrong})
            assert answer.status_code == 422, (provider, name, wrong)
    assert await rows(app) == []


async def test_what_is_too_large(app: Any, sender: Sender) -> None:
    raw = json.dumps(body_of("stripe", sender.clock.wall(), more="x" * app.state.settings.billing_webhook_max_bytes))
    answer = await sender.send("stripe", raw.encode())
    assert (answer.status_code, answer.json()["code"]) == (413, "request.too_large")
    large = body_of("stripe", sender.clock.wall(), more="x" * 200_000)
    assert (await sender.send("stripe", large)).status_code == 202


async def test_other_addresses(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v1/billing/webhooks/square", content=b"{}")).status_code == 404
    assert (await client.get("/v1/billing/webhooks/stripe")).status_code == 405


# -- PayPal while its certificate has to be fetched


async def test_what_nothing_vouches_for_is_bounded(
    app: Any, sender: Sender, connect: Callable[..., httpx.AsyncClient], certificates: CertificateServer
) -> None:
    """By network and in all; it holds nobody's id, and what is known meanwhile is not held up by it."""
    intake = app.state.billing_webhooks.intake
    intake._settings = dataclasses.replace(
        app.state.settings, billing_webhook_unproven_per_network=3, billing_webhook_unproven=5
    )
    here, there = (
        Sender(connect(None, address=each), sender.clock, certificates) for each in ("192.0.2.1", "192.0.2.2")
    )
    made = body_of("paypal", sender.clock.wall())
    answers = await asyncio.gather(*(here.send("paypal", made, url=certificates.url("CERT-2")) for _ in range(6)))
    assert Counter(answer.status_code for answer in answers) == {202: 3, 429: 3}
    (full,) = {answer.json()["code"] for answer in answers if answer.status_code == 429}
    assert full == "billing.webhook_backlog"
    answers = [await there.send("paypal", url=certificates.url("CERT-2")) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    kept = await rows(app)
    assert [(row.status, row.proven, row.source) for row in kept[:1]] == [("received", False, "192.0.2.1")]
    assert len(kept) == 5
    assert (await sender.send("paypal", made)).json()["status"] == "accepted", (
        "the same id, with a certificate that is known"
    )
    assert (await sender.send("stripe")).status_code == 202


async def test_an_expired_certificate_is_not_known(app: Any, sender: Sender, clock: MovableClock) -> None:
    clock.advance(91 * 86_400)
    answer = await sender.send("paypal")
    assert answer.status_code == 202
    (row,) = await rows(app)
    assert (row.status, row.proven) == ("received", False)


# -- once, whoever sends it however often


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_thousand_copies_are_one(app: Any, sender: Sender, provider: str) -> None:
    raw = json.dumps(body_of(provider, sender.clock.wall())).encode()
    received = Received(provider, sender.fields(provider, raw), frozenset(), raw, "127.0.0.1")  # type: ignore[arg-type]
    who, hooks = Caller("anonymous", "anonymous", None), app.state.billing_webhooks
    other = webhooks.Webhooks(app.state.settings, app.state.db, app.state.clock, app.state.sealer)  # another process
    taken = await asyncio.gather(*((hooks, other)[n % 2].receive(who, received) for n in range(1000)))
    assert Counter(each.status for each in taken) == {"accepted": 1, "duplicate": 999}
    assert len({each.event for each in taken}) == 1 == len(await rows(app))
    assert hooks.intake.groups + other.intake.groups < 500, "they share transactions"


async def test_groups_that_meet_in_other_orders(app: Any, sender: Sender) -> None:
    """Bodies under each other's ids, in two processes at once: some are refused, nobody waits for ever, nothing fails."""
    made = [json.dumps(body_of("razorpay", sender.clock.wall())).encode() for _ in range(40)]
    ids = [f"ev_{n}" for n in range(40)]
    other = webhooks.Webhooks(app.state.settings, app.state.db, app.state.clock, app.state.sealer)
    who, hooks = Caller("anonymous", "anonymous", None), app.state.billing_webhooks

    def calls(at: Any, pairs: Any) -> list[Any]:
        return [
            at.receive(
                who, Received("razorpay", sender.fields("razorpay", raw, event=event), frozenset(), raw, "127.0.0.1")
            )
            for raw, event in pairs
        ]

    both = calls(hooks, zip(made, ids, strict=True)) + calls(other, zip(reversed(made), ids, strict=True))
    answers = await asyncio.gather(*both, return_exceptions=True)
    bad = [
        answer
        for answer in answers
        if isinstance(answer, BaseException) and getattr(answer, "code", "") != "billing.webhook_conflict"
    ]
    assert bad == []
    kept = await rows(app)
    assert len({bytes(row.raw_sha256) for row in kept}) == len(kept) == len({row.event_id for row in kept}) <= 40


async def test_an_answer_means_that_it_is_stored(app: Any, sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the commit is under way nobody is answered; when it fails, nobody is told that it did not."""
    real, gate = store.insert, asyncio.Event()

    async def slow(tx: Any, given: Any) -> Any:
        new = await real(tx, given)
        await gate.wait()
        return new

    monkeypatch.setattr(store, "insert", slow)
    task = asyncio.create_task(sender.send("stripe"))
    await asyncio.sleep(0.05)
    assert not task.done()
    assert await rows(app) == []
    gate.set()
    assert (await task).status_code == 202
    assert len(await rows(app)) == 1

    async def fails(tx: Any, given: Any) -> Any:
        await real(tx, given)
        raise asyncpg.PostgresConnectionError("gone")

    monkeypatch.setattr(store, "insert", fails)
    answer = await sender.send("stripe")
    assert answer.status_code == 503
    assert len(await rows(app)) == 1


async def test_too_many_at_once(app: Any, sender: Sender) -> None:
    app.state.billing_webhooks.intake._settings = dataclasses.replace(app.state.settings, billing_webhook_backlog=0)
    answer = await sender.send("stripe")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


# -- what operators see


async def test_operators_see_them(app: Any, sender: Sender, connect: Callable[..., httpx.AsyncClient]) -> None:
    operator = await operator_client(app, connect)
    ids = [(await sender.send(provider)).json()["event"] for provider in PROVIDERS]
    await sender.send("stripe", body_of("stripe", sender.clock.wall(), livemode=True))
    listed = (await operator.get("/v1/admin/billing-webhooks")).json()["data"]
    assert [row["id"] for row in listed][1:] == ids[::-1]
    assert (listed[0]["state"], listed[0]["reason"]) == ("ignored", "other_mode")
    for query, wanted in (
        ({"provider": "stripe", "state": "verified"}, ids[:1]), ({"state": "received"}, ids[2:]),
        ({"type": "subscription.*"}, ids[1:2]), ({"type": "BILLING.SUBSCRIPTION.ACTIVATED"}, ids[2:]),
        ({"type": "%"}, []), ({"since": "2999-01-01T00:00:00Z"}, []),
    ):  # fmt: skip
        found = (await operator.get("/v1/admin/billing-webhooks", params=query)).json()["data"]
        assert [row["id"] for row in found] == wanted, query
    one = (await operator.get(f"/v1/admin/billing-webhooks/{ids[0]}")).json()
    assert (one["provider"], one["type"], one["proof"]) == ("stripe", "customer.subscription.updated", "current")
    assert "body" not in str(one)
    none = await operator.get("/v1/admin/billing-webhooks/bwh_none")
    assert (none.status_code, none.json()["code"]) == (404, "billing.webhook_not_found")


async def test_metrics(app: Any, sender: Sender) -> None:
    from portico.control import metrics

    await sender.send("stripe")
    await sender.send("stripe", secrets=("other",))
    found = {(metric.name, labels): value for metric, labels, value in metrics.read(app.state)}
    assert found["portico_api_billing_webhooks_total", ("stripe", "accepted")] == 1
    assert found["portico_api_billing_webhooks_refused_total", ("stripe", "mismatch")] == 1


async def test_what_cannot_be_replayed(app: Any, sender: Sender, connect: Callable[..., httpx.AsyncClient]) -> None:
    operator = await operator_client(app, connect)
    event = (await sender.send("stripe")).json()["event"]
    path = f"/v1/admin/billing-webhooks/{event}/replay"
    pending = await operator.post(path, json={"reason": "too soon"})
    assert (pending.status_code, pending.json()["code"]) == (409, "billing.webhook_pending")
    async with app.state.db.transaction() as tx:
        await tx.execute(sa.update(store.events).where(E.id == event).values(queue_state="done", sealed_body=None))
    gone = await operator.post(path, json={"reason": "too late"})
    assert (gone.status_code, gone.json()["code"]) == (409, "billing.webhook_gone")
    wanted = {"filter": {"state": None}, "reason": "all", "dry_run": False}
    assert (await operator.post("/v1/admin/billing-webhooks/replay", json=wanted)).json()["matched"] == 0
