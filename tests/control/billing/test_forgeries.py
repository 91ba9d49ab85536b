"""Forgeries of one real event: a refund at the provider that nobody has told us of yet. Whatever is wrong with it, nothing moves
and the reason is counted and in the audit log; the real event then does move money, so each was one step from doing so.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control import metrics
from portico.control.audit.store import audit_events
from portico.simulators.billing_delivery import Message
from portico.simulators.billing_world import DAY
from tests.control.billing.shop import SIMULATORS, Shop, open_shop
from tests.control.billing.webhook_sending import colliding

AMOUNT = 700
_PAYMENTS = {"stripe": "charges", "razorpay": "payments", "paypal": "sales"}
_ID = {"stripe": "stripe-signature", "razorpay": "x-razorpay-signature", "paypal": "paypal-transmission-sig"}
_LIVE = "https://api.paypal.com/v1/notifications/certs/CERT-1"


@pytest.fixture(params=list(SIMULATORS))
async def shop(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> AsyncIterator[Shop]:
    # Nothing comes by itself meanwhile: what is compared is what events did.
    async with open_shop(database_url, SIMULATORS[request.param], tmp_path, every_seconds=3600) as made:
        yield made


Post = tuple[dict[str, str], bytes]


class Forger:
    """Has the real event, and signs as the provider would: rightly, for itself, at other times."""

    def __init__(self, shop: Shop) -> None:
        self.shop, simulator = shop, shop.simulator
        self.endpoint = simulator.courier.endpoints[0]
        payment = simulator.world.all(_PAYMENTS[shop.name])[-1]
        given: tuple[Any, ...] = {"stripe": (None, {}), "razorpay": ({},), "paypal": ("asked",)}[shop.name]
        simulator.faults.lose = -1
        simulator.books.refund(payment, AMOUNT, *given)  # type: ignore[attr-defined]
        simulator.faults.lose = 0
        self.message = self._last("refund.created", "refund.processed", "PAYMENT.SALE.REFUNDED")
        self.document = json.loads(self.message.body)

    def _last(self, *types: str) -> Message:
        """The newest event of these types."""
        simulator = self.shop.simulator
        found = [simulator.message(event) for event in simulator.world.kinds["events"]]
        return [message for message in found if message is not None and message.type in types][-1]

    def signed(self, document: Mapping[str, Any] | None = None, *, ago: float = 0.0, manner: Any = "right") -> Post:
        """Headers and body as they are sent; of another ``document``, under the same id."""
        body = self.message.body if document is None else json.dumps(document).encode()
        message = dataclasses.replace(self.message, body=body)
        return self.shop.simulator.sign(self.endpoint, message, time.time() - ago, manner)

    def with_body(self, body: bytes, **more: str) -> Post:
        """The real signature over another body."""
        fields, _ = self.signed()
        return fields | {name.replace("_", "-"): value for name, value in more.items()}, body

    def richer(self) -> dict[str, Any]:
        """The same refund, a hundred times as much."""
        return dict(
            json.loads(json.dumps(self.document).replace(f": {AMOUNT}", f": {AMOUNT}00").replace("7.00", "700.00"))
        )

    def elsewhere(self) -> Post:
        """Of somebody else's account, signed by whoever signs ours."""
        if self.shop.name == "stripe":
            return self.signed(self.document | {"account": "acct_other"})
        if self.shop.name == "razorpay":
            return self.signed(self.document | {"account_id": "acc_other"})
        # PayPal signs the registration that it sends to, which is an account's.
        self.endpoint = dataclasses.replace(self.endpoint, secret="9XL90610J3647323D")
        try:
            return self.signed()
        finally:
            self.endpoint = self.shop.simulator.courier.endpoints[0]

    def other_mode(self) -> Post:
        """Of real money, where there is none: Stripe says so, Razorpay has another secret for it, PayPal another host."""
        if self.shop.name == "stripe":
            return self.signed(self.document | {"livemode": True})
        fields, body = self.signed(manner="wrong" if self.shop.name == "razorpay" else "right")
        return (fields | {"PAYPAL-CERT-URL": _LIVE} if self.shop.name == "paypal" else fields), body

    def stale(self) -> Post:
        return self._aged(1)

    def future(self) -> Post:
        return self._aged(-1)

    def _aged(self, sign: int) -> Post:
        """By a minute more than is believed: the other way it is five minutes for all."""
        past = {"stripe": 300, "razorpay": 8 * DAY, "paypal": 4 * DAY}[self.shop.name]
        ago = (past if sign > 0 else 300) + 60
        if self.shop.name != "razorpay":
            return self.signed(ago=sign * ago)
        return self.signed(
            self.document | {"created_at": int(time.time()) - sign * ago}
        )  # nothing else has a time there


#: What is wrong, and the reason that is told of each provider's.
FORGERIES: dict[str, tuple[Callable[[Forger], Post], dict[str, str]]] = {
    "wrong secret": (lambda f: f.signed(manner="wrong"), dict.fromkeys(SIMULATORS, "mismatch")),
    "stale": (Forger.stale, dict.fromkeys(SIMULATORS, "stale")),
    "of the future": (Forger.future, dict.fromkeys(SIMULATORS, "future")),
    "truncated": (lambda f: f.with_body(f.message.body[:-1]), dict.fromkeys(SIMULATORS, "mismatch")),
    "empty": (lambda f: f.with_body(b""), dict.fromkeys(SIMULATORS, "mismatch")),
    "encoded anew": (
        lambda f: f.with_body(json.dumps(f.document, indent=1).encode()), dict.fromkeys(SIMULATORS, "mismatch"),
    ),
    "with a byte order mark": (
        lambda f: f.with_body(b"\xef\xbb\xbf" + f.message.body), dict.fromkeys(SIMULATORS, "mismatch"),
    ),
    "in UTF-16": (
        lambda f: f.with_body(f.message.body.decode().encode("utf-16")), dict.fromkeys(SIMULATORS, "mismatch"),
    ),
    "compressed": (
        lambda f: f.with_body(gzip.compress(f.message.body), content_encoding="gzip"), dict.fromkeys(SIMULATORS, "mismatch"),
    ),
    "another amount": (
        lambda f: f.with_body(json.dumps(f.richer()).encode()), dict.fromkeys(SIMULATORS, "mismatch"),
    ),
    "no signature": (
        lambda f: ({k: v for k, v in f.signed()[0].items() if k.lower() != _ID[f.shop.name]}, f.message.body),
        dict.fromkeys(SIMULATORS, "missing"),
    ),
    "somebody else's account": (
        Forger.elsewhere, {"stripe": "other_account", "razorpay": "other_account", "paypal": "mismatch"},
    ),
    "the other mode": (Forger.other_mode, {"stripe": "other_mode", "razorpay": "mismatch", "paypal": "cert_url"}),
}  # fmt: skip


async def send(shop: Shop, post: Post) -> httpx.Response:
    fields, body = post
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        return await http.post(shop.simulator.courier.endpoints[0].url, content=body, headers=fields)


async def books(shop: Shop) -> Any:
    """All that an event can change but its own row."""
    names = await shop.fetch(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public' AND table_type = 'BASE TABLE'"
        " AND table_name ~ '^(billing|ledger|plan_overrides|outbox|organizations|edge_changes|revenue|mrr)'"
        " AND table_name !~ '^billing_(webhook|reconcil)'"
    )
    assert len(names) > 15
    parts = " UNION ALL ".join(f"SELECT '{row[0]}' || t::text AS x FROM {row[0]} t" for row in names)
    return (await shop.fetch(f"SELECT md5(string_agg(x, '' ORDER BY x)) FROM ({parts}) y"))[0][0]


def counted(shop: Shop, why: str) -> Any:
    found = {(metric.name, labels): value for metric, labels, value in metrics.read(shop.app.state)}
    return found["portico_api_billing_webhooks_refused_total", (shop.name, why)]


async def audited(shop: Shop) -> dict[str, int]:
    """Reasons in the installation's audit log, and how often each."""
    await shop.app.state.billing_webhooks.intake.tell()
    async with shop.db.read() as reader:
        c = audit_events.c
        query = sa.select(audit_events).where(c.action == "billing_webhook.ingest", c.target == shop.name)
        found: dict[str, int] = {}
        for row in await reader.fetch_all(query):
            found[row.details["code"]] = found.get(row.details["code"], 0) + row.details["count"]
        return found


async def test_nothing_moves_and_the_reason_is_told(shop: Shop) -> None:
    buyer = await shop.register()
    await buyer.buy()
    forger, before, told = Forger(shop), await books(shop), dict[str, int]()
    for name, (forge, reasons) in FORGERIES.items():
        why, at_first = reasons[shop.name], counted(shop, reasons[shop.name])
        answer = await send(shop, forge(forger))
        ours = why in ("other_account", "other_mode")  # signed well, by whoever signs for us: kept as a trace
        assert answer.status_code == (202 if ours else 401), (name, answer.text)
        assert answer.json().get("code" if not ours else "status") == (
            "ignored" if ours else "billing.webhook_rejected"
        ), name
        assert counted(shop, why) == at_first + 1, name
        told[why] = told.get(why, 0) + 1
    await shop.settled()
    assert await books(shop) == before
    assert (await audited(shop)).items() >= told.items()
    await unset(shop, forger)
    assert await books(shop) == before
    if shop.name == "paypal":
        await same_checksum_at_paypal(shop, forger, before)
    else:
        forged = colliding(forger.message.body, forger.richer())
        assert (await send(shop, forger.with_body(forged))).status_code == 401, "a checksum is no signature"
    await shop.settled()
    assert "contra_revenue" not in await buyer.ledger()
    assert (await send(shop, forger.signed())).status_code == 202
    await shop.settled()
    assert (await buyer.ledger())["contra_revenue"] == AMOUNT, "and the real one"
    if shop.name == "paypal":  # of a refund that is there, only what PayPal says counts
        forged = colliding(forger.message.body, forger.richer() | {"id": "WH-FORGED-2"})
        assert (await send(shop, forger.with_body(forged))).status_code == 202
        await shop.settled()
        assert (await buyer.ledger())["contra_revenue"] == AMOUNT, "not a hundred times as much"
    # A copy of it is the same event; another story under its id is none, and somebody hears of that.
    assert (await send(shop, forger.signed())).json()["status"] == "duplicate"
    assert (await send(shop, forger.signed(forger.richer()))).status_code == 409
    await shop.settled()
    assert (await buyer.ledger())["contra_revenue"] == AMOUNT
    await shop.balanced()


async def unset(shop: Shop, forger: Forger) -> None:
    """Without a secret nobody is believed, whoever signs, and whatever with."""
    verifier = shop.app.state.billing_webhooks.verifier
    names = {
        "stripe": ("stripe_webhook_secret", None), "razorpay": ("razorpay_webhook_secret", None),
        "paypal": ("paypal_webhook_id", ""),
    }  # fmt: skip
    name, nothing = names[shop.name]
    known, at_first = verifier._settings, counted(shop, "no_secret")
    verifier._settings = dataclasses.replace(known, **{name: nothing})
    try:
        assert (await send(shop, forger.signed())).status_code == 401
        forger.endpoint = dataclasses.replace(forger.endpoint, secret="")
        assert (await send(shop, forger.signed())).status_code == 401, "signed with nothing"
    finally:
        forger.endpoint = shop.simulator.courier.endpoints[0]
        verifier._settings = known
    assert counted(shop, "no_secret") == at_first + 2


async def same_checksum_at_paypal(shop: Shop, forger: Forger, before: Any) -> None:
    """Its signature fits: what the body says has to be at PayPal, too, and is not."""
    wanted = forger.richer() | {"id": "WH-FORGED"}
    wanted["resource"] = wanted["resource"] | {"id": "0" * 17}
    forged = colliding(forger.message.body, wanted)
    answer = await send(shop, forger.with_body(forged))
    assert (answer.status_code, answer.json()["status"]) == (202, "accepted")
    await shop.settled()
    query = "SELECT status, reason, proven FROM billing_webhook_events WHERE id = $1"
    (row,) = await shop.fetch(query, answer.json()["event"])
    assert tuple(row) == ("ignored", "unconfirmed", False)
    assert await books(shop) == before
