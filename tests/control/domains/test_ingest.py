"""POST /v1/domains/cert-events: the order of checks, what is refused and how it looks outside, and that an event counts once."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from portico.control.access import Caller
from portico.control.audit.store import audit_events
from portico.control.domains import event_store, ingest, key_material, lifecycle
from portico.control.domains.event_body import CertEvent
from portico.kit import http_signatures, signed_requests, signing
from portico.kit.http_signatures import Target
from portico.kit.redis import Redis
from portico.kit.signed_requests import Codec, SigningKey, headers
from portico.settings import ApiSettings
from tests.control.conftest import Account, MovableClock
from tests.control.domains.sending import PATH, TARGET, Sender, apply_all, domain, hold, make_source, operator_client


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    return replace(settings, cert_activity_seconds=3600.0, cert_source_refresh_seconds=0.0)


@pytest.fixture
async def operator(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return await operator_client(app, connect)


@pytest.fixture
async def sender(operator: httpx.AsyncClient, client: httpx.AsyncClient, clock: MovableClock) -> Sender:
    return await make_source(operator, client, clock)


async def count(app: Any, *where: Any) -> int:
    async with app.state.db.read() as reader:
        return int(await reader.scalar(sa.select(sa.func.count()).select_from(event_store.events).where(*where)))


async def refusals(app: Any, code: str) -> list[Any]:
    """Rows of the audit log about events refused for this."""
    await app.state.cert_ingest.intake.tell()
    async with app.state.db.read() as reader:
        rows = await reader.fetch_all(
            sa.select(audit_events).where(audit_events.c.action == "cert_event.ingest").order_by(audit_events.c.id)
        )
    return [row for row in rows if row.details["code"] == code]


async def told(app: Any, operator: httpx.AsyncClient, sender: Sender) -> dict[tuple[str | None, str], int]:
    await app.state.cert_ingest.intake.tell()
    return await activity(operator, sender.source)


async def activity(operator: httpx.AsyncClient, source: str) -> dict[tuple[str | None, str], int]:
    found = (await operator.get(f"/v1/admin/cert-sources/{source}")).json()
    return {(each["cluster"], each["outcome"]): each["count"] for each in found["activity"]}


# -- believed


@pytest.mark.parametrize("codec", ["standard", "compact", "http"])
async def test_each_codec_is_taken(app: Any, sender: Sender, operator: httpx.AsyncClient, codec: Codec) -> None:
    body = sender.body("issuance.succeeded", "www.example.com")
    answer = await sender.send(body, codec=codec)
    assert (answer.status_code, answer.json()["status"]) == (202, "accepted"), answer.text
    again = await sender.send(body, codec=codec)
    assert (again.status_code, again.json()) == (200, {"event": answer.json()["event"], "status": "duplicate"})
    shown = (await operator.get(f"/v1/admin/cert-events/{answer.json()['event']}")).json()
    assert (shown["type"], shown["state"], shown["source"], shown["cluster"]) == (
        "cert.issued", "queued", sender.source, "eu-1",
    )  # fmt: skip
    assert shown["key"] == sender.key.id
    await app.state.cert_ingest.intake.tell()
    assert (await activity(operator, sender.source)) == {("eu-1", "accepted"): 1, ("eu-1", "duplicate"): 1}
    (key,) = (await operator.get(f"/v1/admin/cert-sources/{sender.source}")).json()["keys"]
    assert (key["state"], key["last_used_at"] is not None) == ("active", True)


async def test_a_public_key_is_enough(
    operator: httpx.AsyncClient, client: httpx.AsyncClient, clock: MovableClock
) -> None:
    pair = Ed25519PrivateKey.generate()
    public = "whpk_" + base64.b64encode(pair.public_key().public_bytes_raw()).decode()
    wanted = {"name": "ed", "environment": "production", "clusters": ["eu-1"], "hostnames": ["*"], "public_key": public}
    made = (await operator.post("/v1/admin/cert-sources", json=wanted)).json()
    assert made["key"]["secret"] is None
    key = SigningKey(made["key"]["id"], "ed25519", pair.private_bytes_raw())
    assert await Sender(client, made["id"], key, clock).tell("issuance.succeeded", "www.example.com")


# -- not believed: one answer, and the reason for whoever runs this


def raw_spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What looked at a body."""
    seen: list[str] = []
    for module, name in ((ingest, "read"), (ingest, "check_provenance")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real, name=name: (seen.append(name), real(*given))[1])

    def loads(*given: Any, **more: Any) -> Any:
        seen.append("loads")
        return json.loads(*given, **more)

    monkeypatch.setattr(ingest, "json", SimpleNamespace(loads=loads))
    return seen


OTHER = SigningKey.of("key_other", signing.new_secret())
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "no such source": ("unknown_source", {"change": {"x-cert-source": "src_nobody"}}),
    "a text": ("unsupported_content_type", {"change": {"content-type": "text/plain"}}),
    "no type": ("unsupported_content_type", {"change": {"content-type": None}}),
    "no signature": ("unreadable", {"change": {"webhook-signature": None}}),
    "no source": ("unreadable", {"change": {"x-cert-source": None}}),
    "no time": ("unreadable", {"change": {"webhook-timestamp": None}}),
    "too old": ("stale_timestamp", {"shift": -302}),
    "of the future": ("stale_timestamp", {"shift": 302}),
    "another time than the signed one": ("bad_signature", {"change": {"webhook-timestamp": "now+1"}}),
    "another id than the signed one": ("bad_signature", {"change": {"webhook-id": "evt_other"}}),
    "not its key": ("bad_signature", {"key": OTHER}),
}


async def test_refusals_differ_inside_alone(
    app: Any, sender: Sender, operator: httpx.AsyncClient, owner: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each negative case of the order of checks: its code inside, one answer outside, nothing parsed, no domain changed."""
    held = await hold(app.state.db, owner.organization, "refusals.example.com")
    await apply_all(app.state.db)
    before, stored, key = await domain(app.state.db, held), await count(app), sender.key
    seen, counted = raw_spy(monkeypatch), app.state.cert_ingest.intake.refusals
    document = sender.body("deployment.succeeded", before.name)
    answers = {}
    for case, (code, how) in CASES.items():
        change, was = dict(how.get("change", {})), counted[code]
        if change.get("webhook-timestamp") == "now+1":
            change["webhook-timestamp"] = str(int(app.state.clock.wall().timestamp()) + 1)
        sender.key = how.get("key", key)
        answer = await sender.send(document, change=change | {"x-request-id": "r"}, shift=how.get("shift", 0))
        assert (answer.status_code, answer.json()["code"]) == (401, "cert.event_rejected"), case
        assert counted[code] == was + 1, case
        fields = {name: value for name, value in answer.headers.items() if not name.startswith("ratelimit")}
        answers[answer.content, json.dumps(fields)] = case
    assert len(answers) == 1, f"no two refusals differ: {answers}"
    assert seen == [], "nothing of a body was parsed"
    assert (await count(app), await apply_all(app.state.db)) == (stored, 0)
    assert await domain(app.state.db, held) == before
    by_code: dict[str, int] = {}
    for code, how in CASES.values():
        ours = how.get("change", {}).get("x-cert-source", sender.source) == sender.source
        by_code[code] = by_code.get(code, 0) + ours
    shown = await told(app, operator, sender)
    for code, number in by_code.items():
        assert shown.get((None, code), 0) == number, code
        rows = [row for row in await refusals(app, code) if row.target in (sender.source, None)]
        assert sum(row.details["count"] for row in rows) >= number > 0 or code == "unknown_source"
        assert all(row.outcome == "refused" for row in rows) and rows


async def test_networks_come_before_the_signature(
    app: Any, operator: httpx.AsyncClient, connect: Any, clock: MovableClock
) -> None:
    inside, outside = connect(None, address="203.0.113.7"), connect(None, address="198.51.100.7")
    sender = await make_source(operator, inside, clock, cidrs=["203.0.113.9/24"])
    assert await sender.tell("issuance.succeeded", "www.example.com")
    sender.client = outside
    assert (await sender.send(sender.body("issuance.succeeded", "www.example.com"))).status_code == 401
    sender.key = OTHER
    assert (await sender.send(sender.body("issuance.succeeded", "www.example.com"), shift=-999)).status_code == 401
    await app.state.cert_ingest.intake.tell()
    (row,) = [row for row in await refusals(app, "source_not_allowed") if row.target == sender.source]
    assert (row.details["count"], row.address) == (2, "198.51.100.7")
    assert set(await activity(operator, sender.source)) == {("eu-1", "accepted"), (None, "source_not_allowed")}


async def test_a_field_twice_is_not_read(app: Any, sender: Sender) -> None:
    raw = json.dumps(document := sender.body("issuance.succeeded", "www.example.com")).encode()
    fields = [*sender.fields(raw, document["eventId"]).items(), ("Webhook-Id", "evt_other")]
    answer = await sender.client.post(PATH, content=raw, headers=fields)
    assert answer.json()["code"] == "cert.event_rejected"
    assert app.state.cert_ingest.intake.refusals["unreadable"] == 1


@pytest.mark.parametrize("name", ["host", "x-covered"])
async def test_nor_is_a_signed_field_that_is_there_twice(
    app: Any, sender: Sender, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of two values that one signature is over, two programs could believe different ones."""
    monkeypatch.setattr(signed_requests, "COVERED", (*signed_requests.COVERED, "x-covered"))
    monkeypatch.setattr(http_signatures, "base", _with("x-covered", "one", http_signatures.base))
    raw = json.dumps(document := sender.body("issuance.succeeded", "www.example.com")).encode()
    fields = {**sender.fields(raw, document["eventId"], "http"), "x-covered": "one"}
    verifier = app.state.cert_ingest.verifier
    assert await verifier.verify(ingest.Received(TARGET, fields, frozenset(), raw, "127.0.0.1"))
    with pytest.raises(ingest.Rejected, match="unreadable"):
        await verifier.verify(ingest.Received(TARGET, fields, frozenset({name}), raw, "127.0.0.1"))


def _with(name: str, value: str, real: Any) -> Any:
    """``http_signatures.base`` for a sender, who has that field, too; a receiver has it or not."""

    def base(found: Any, target: Target, fields: Any) -> bytes:
        sending = "signature-input" not in fields
        made: bytes = real(found, target, {**fields, name: value} if sending else fields)
        return made

    return base


async def test_a_signature_for_another_address_is_none(sender: Sender) -> None:
    raw = json.dumps(document := sender.body("issuance.succeeded", "www.example.com")).encode()
    at = int(sender.clock.wall().timestamp())
    for codec, target in (
        ("compact", replace(TARGET, path="/v1/domains")),
        ("http", Target("POST", "other.test", PATH)),
    ):
        fields = headers(codec, sender.key, sender.source, "eu-1", document["eventId"], at, target, raw)  # type: ignore[arg-type]
        answer = await sender.client.post(PATH, content=raw, headers=fields)
        assert answer.status_code == 401, codec


async def test_refusals_take_one_time(app: Any, sender: Sender) -> None:
    """Not sooner than the floor, whichever check it was: what the checks themselves take is far below it."""
    floor = app.state.settings.cert_refusal_seconds
    document = sender.body("issuance.succeeded", "www.example.com")
    for how in ({"change": {"x-cert-source": "src_nobody"}}, {"shift": -999}, {"change": {"webhook-signature": None}}):
        began = time.perf_counter()
        assert (await sender.send(document, **how)).status_code == 401  # type: ignore[arg-type]
        assert time.perf_counter() - began >= floor * 0.95


async def test_a_flood_of_refusals_is_a_few_rows(app: Any, sender: Sender) -> None:
    sender.key = OTHER
    document = sender.body("issuance.succeeded", "www.example.com")
    await asyncio.gather(*(sender.send(document) for _ in range(60)))
    (row,) = [row for row in await refusals(app, "bad_signature") if row.target == sender.source]
    assert row.details["count"] == 60


async def test_size_is_said_openly(app: Any, sender: Sender) -> None:
    answer = await sender.send(b"x" * (app.state.settings.cert_event_max_bytes + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "request.too_large")


async def test_other_methods(client: httpx.AsyncClient) -> None:
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        answer = await client.request(method, PATH)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


# -- signed, and refused openly


SHAPES: list[dict[str, Any]] = [
    {"specVersion": "2"},
    {"sequence": -1},
    {"sequence": 2**53},
    {"sequence": "1"},
    {"occurredAt": "2026-01-01"},
    {"occurredAt": "0001-01-01T00:00:00+14:00"},
    {"subject": {"hostname": "bücher.example"}},
    {"subject": {"hostname": "a..b"}},
    {"subject": {}},
    {"callbackClass": "Issuance"},
    {"provenance": {"producer": "x"}},
    {"certificate": {"serial": "xyz"}},
    {"certificate": {"notBefore": "2026-02-01T00:00:00Z", "notAfter": "2026-01-01T00:00:00Z"}},
    {"error": {"code": "has space"}},
    {"error": {"code": "x", "detail": "\ud800"}},
    {"regions": {"active": 1}},
]


async def test_shapes_that_do_not_fit(app: Any, sender: Sender) -> None:
    stored = await count(app)
    for change in SHAPES:
        answer = await sender.send(sender.body("issuance.succeeded", "www.example.com", **change))
        assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid"), change
    for raw in (b"", b"{", b"[]", b"null", b'{"a":1,"a":2}', b"[" * 60_000, b'{"sequence":NaN}', b"\xff\xfe"):
        answer = await sender.send(raw, event="evt_1")
        assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid"), raw[:20]
    assert await count(app) == stored


def pems() -> list[str]:
    key = ec.generate_private_key(ec.SECP256R1())
    made = [
        key.private_bytes(Encoding.PEM, form, NoEncryption()).decode()
        for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL)
    ]
    der = base64.b64encode(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())).decode()
    sec1 = base64.b64encode(key.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())).decode()
    ssh = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    twice = base64.b64encode(made[0].encode()).decode()
    return [*made, der, sec1, ssh, twice, made[0].replace("\n", " "), f"oops: {der[:40]}\n{der[40:]}"]


async def test_a_private_key_is_refused_and_never_stored(
    app: Any, sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    stored = await count(app)
    for text in pems():
        for change in (
            {"error": {"code": "x", "detail": text}},
            {"unknown": [{"deep": {text: 1}}]},
            {"certificate": {"chainPem": text}},
        ):
            answer = await sender.send(sender.body("issuance.failed", "www.example.com", **change))
            assert (answer.status_code, answer.json()["code"]) == (422, "cert.key_material"), change
            found = (await refusals(app, "cert.key_material"))[-1]
            secret = text.split("\n")[1][:30] if "\n" in text else text[40:70]
            assert found.target == sender.source
            assert secret not in caplog.text + str(found) + answer.text
    assert await count(app) == stored


async def test_a_jwk_and_words_about_keys(sender: Sender) -> None:
    jwk = {"kty": "EC", "crv": "P-256", "x": "a", "y": "b", "d": "c"}
    answer = await sender.send(sender.body("issuance.failed", "www.example.com", provenance={"jwk": jwk}))
    assert answer.json()["code"] == "cert.key_material"
    said = "the private key in the secret does not match: b" + "0" * 64
    assert await sender.tell("issuance.failed", "www.example.com", error={"code": "InvalidKeyPair", "detail": said})
    assert not key_material.in_text("Private key size must be 2048")


async def test_provenance(
    app: Any, operator: httpx.AsyncClient, client: httpx.AsyncClient, clock: MovableClock
) -> None:
    sender = await make_source(operator, client, clock, hostnames=["*.example.com", "example.org"])
    assert (await sender.send(sender.body("issuance.succeeded", "a.b.EXAMPLE.com."))).status_code == 202
    cases: list[tuple[str, dict[str, Any]]] = [
        ("eventId", {"eventId": "evt_other"}),
        ("sourceId", {"sourceId": "src_other"}),
        ("clusterId", {"clusterId": "us-1"}),
        ("environment", {"environment": "staging"}),
        *(("hostname", {"subject": {"hostname": name}}) for name in ("evil.example", "example.com", "notexample.com")),
        ("hostname", {"subject": {"hostname": "www.example.com", "sans": ["evil.example"]}}),
    ]
    for member, change in cases:
        document = sender.body("issuance.succeeded", "www.example.com")
        without = {"x-cert-cluster": None} if member == "clusterId" else {}
        answer = await sender.send(document | change, event=document["eventId"], change=without)
        assert (answer.status_code, answer.json()["code"]) == (403, "cert.provenance_mismatch")
        assert answer.json()["members"] == [member]
        assert (await refusals(app, "cert.provenance_mismatch"))[-1].details["members"] == [member]
    assert (await told(app, operator, sender))[None, "mismatch"] == len(cases)


async def test_the_cluster_of_the_header_is_that_of_the_body(sender: Sender) -> None:
    sender.cluster = "us-1"
    answer = await sender.send(sender.body("issuance.succeeded", "www.example.com"), codec="compact")
    assert answer.json()["members"] == ["clusterId of the header"]


# -- once


async def test_who_has_a_key_does_not_fill_the_audit_log(app: Any, sender: Sender) -> None:
    """The first of a second and kind is recorded before its answer, the others are one row."""
    bad = [sender.body("issuance.succeeded", "www.example.com", clusterId=f"us-{n}") for n in range(40)]
    assert (await sender.send(bad[0])).status_code == 403
    mine = (audit_events.c.action == "cert_event.ingest") & (audit_events.c.target == sender.source)
    query = sa.select(audit_events.c.details).where(mine).order_by(audit_events.c.id)
    async with app.state.db.read() as reader:
        assert [row.details["event"] for row in await reader.fetch_all(query)] == [bad[0]["eventId"]]
    answers = await asyncio.gather(*(sender.send(each) for each in bad[1:]))
    assert {answer.json()["code"] for answer in answers} == {"cert.provenance_mismatch"}
    await app.state.cert_ingest.intake.tell()
    async with app.state.db.read() as reader:
        first, others = [row.details for row in await reader.fetch_all(query)]
    assert "count" not in first
    assert (others["count"], others["code"], others["members"]) == (39, "cert.provenance_mismatch", first["members"])


async def test_an_id_belongs_to_one_body(app: Any, sender: Sender) -> None:
    body = sender.body("issuance.succeeded", "www.example.com")
    assert (await sender.send(body)).status_code == 202
    answer = await sender.send({**body, "callbackAction": "failed"})
    assert (answer.status_code, answer.json()["code"]) == (409, "cert.event_id_conflict")
    (row,) = await refusals(app, "cert.event_id_conflict")
    assert row.details["event"] == body["eventId"]
    mine = event_store.events.c.source_id == sender.source
    assert await count(app, mine) == 1


async def test_a_thousand_copies_apply_once(app: Any, sender: Sender, owner: Account, valkey: Any) -> None:
    """At once, and again after everything but PostgreSQL has forgotten."""
    held = await hold(app.state.db, owner.organization, "copies.example.com")
    await apply_all(app.state.db)
    body = sender.body("validation.failed", "copies.example.com", error={"code": "dns"})
    raw = json.dumps(body).encode()
    received = ingest.Received(TARGET, sender.fields(raw, body["eventId"]), frozenset(), raw, "127.0.0.1")
    who = Caller("anonymous", "anonymous", None)
    copies = [app.state.cert_ingest.receive(who, received) for _ in range(1000)]
    *taken, posted = await asyncio.gather(*copies, sender.send(body))
    assert sorted(Counter(each.status for each in taken).values())[-1] >= 999
    assert {each.event for each in taken} == {posted.json()["event"]}
    assert [each.status for each in taken].count("accepted") + (posted.status_code == 202) == 1
    assert app.state.cert_ingest.intake.groups < 1000, "they share transactions"
    assert await apply_all(app.state.db) == 1
    assert (await domain(app.state.db, held)).cert_failures == 1
    redis = Redis(valkey.url, timeout_seconds=5, pause_seconds=1)
    assert await redis.pipeline(lambda commands: commands.flushall(), timeout_seconds=5)
    await redis.close()
    assert (await sender.send(body)).json()["status"] == "duplicate"
    assert await apply_all(app.state.db) == 0


async def test_one_effect_under_many_ids_counts_once(app: Any, sender: Sender, owner: Account) -> None:
    held = await hold(app.state.db, owner.organization, "effects.example.com")
    await apply_all(app.state.db)
    provenance = {"producer": "test", "objectUid": "challenge-7", "revision": 1}
    more: dict[str, Any] = {"provenance": provenance, "error": {"code": "dns"}}
    answers = await asyncio.gather(
        *(sender.send(sender.body("validation.failed", "effects.example.com", **more)) for _ in range(50))
    )
    assert {answer.status_code for answer in answers} == {202}
    mine = event_store.events.c.source_id == sender.source
    assert await count(app, mine & ~event_store.events.c.repeated) == 1
    assert await apply_all(app.state.db) == 50
    assert (await domain(app.state.db, held)).cert_failures == 1


async def test_another_sources_ids_are_its_own(
    operator: httpx.AsyncClient, client: httpx.AsyncClient, clock: MovableClock
) -> None:
    one, two = [await make_source(operator, client, clock) for _ in range(2)]
    body = one.body("issuance.succeeded", "www.example.com")
    assert (await one.send(body)).status_code == 202
    assert (await two.send({**body, "sourceId": two.source, "sequence": 9})).status_code == 202


async def test_what_means_nothing_is_stored_and_changes_nothing(
    app: Any, sender: Sender, owner: Account, operator: httpx.AsyncClient
) -> None:
    held = await hold(app.state.db, owner.organization, "unmapped.example.com")
    await apply_all(app.state.db)
    before = await domain(app.state.db, held)
    answer = await sender.send(sender.body("issuance.exploded", "unmapped.example.com"))
    assert (answer.status_code, answer.json()["status"]) == (202, "unmapped")
    assert await apply_all(app.state.db) == 0
    assert await domain(app.state.db, held) == before
    shown = (await operator.get("/v1/admin/cert-events", params={"state": "unmapped", "source": sender.source})).json()
    assert [each["id"] for each in shown["data"]] == [answer.json()["event"]]


# -- sources that change


async def test_keys_rotate_with_grace(
    app: Any, sender: Sender, operator: httpx.AsyncClient, clock: MovableClock
) -> None:
    old = sender.key
    path = f"/v1/admin/cert-sources/{sender.source}/rotate"
    made = (await operator.post(path, json={"overlap_seconds": 600})).json()
    new = SigningKey.of(made["key"]["id"], made["key"]["secret"])
    assert [key["state"] for key in made["keys"]] == ["pending", "grace"]
    for key in (old, new):
        sender.key = key
        assert await sender.tell("issuance.succeeded", "www.example.com")
    clock.advance(601)
    assert await sender.tell("issuance.succeeded", "www.example.com")
    sender.key = old
    assert (await sender.send(sender.body("issuance.succeeded", "www.example.com"))).status_code == 401
    assert (await operator.post(path, json={"overlap_seconds": 0})).status_code == 200
    sender.key = new
    assert (await sender.send(sender.body("issuance.succeeded", "www.example.com"))).status_code == 401, (
        "known to others"
    )
    for _ in range(4):
        shown = (await operator.post(path, json={})).json()
    assert len(shown["keys"]) == 3
    assert sender.key.material.hex() not in str(shown)


async def test_a_disabled_source_stores_nothing_more(app: Any, sender: Sender, operator: httpx.AsyncClient) -> None:
    """Though a process has not heard of it yet: what was checked against its memory is looked at again under a lock."""
    app.state.cert_sources._settings = replace(app.state.settings, cert_source_refresh_seconds=3600.0)
    assert await sender.tell("issuance.succeeded", "www.example.com")
    stored = await count(app)
    path = f"/v1/admin/cert-sources/{sender.source}"
    app.state.cert_sources._forget = lambda: None  # as in another process
    assert (await operator.post(f"{path}/disable", json={"reason": "leaked"})).json()["state"] == "disabled"
    assert app.state.cert_sources._known[sender.source].active
    assert (await sender.send(sender.body("issuance.succeeded", "www.example.com"))).status_code == 401
    assert await count(app) == stored
    assert (await operator.post(f"{path}/enable", json={"reason": "was not"})).json()["state"] == "active"
    app.state.cert_sources._read_at = None
    assert await sender.tell("issuance.succeeded", "www.example.com")
    assert (await operator.patch(path, json={"hostnames": ["other.example"]})).status_code == 200
    assert (await sender.send(sender.body("issuance.succeeded", "www.example.com"))).status_code == 403, "a scope, too"


async def test_sources_of_operators(app: Any, operator: httpx.AsyncClient, owner: Account) -> None:
    wanted = {"name": "one", "environment": "production", "clusters": ["eu-1"], "hostnames": ["*.Example.com"]}
    made = (await operator.post("/v1/admin/cert-sources", json=wanted | {"cidrs": ["203.0.113.9/24"]})).json()
    assert (made["hostnames"], made["cidrs"]) == (["*.example.com"], ["203.0.113.0/24"])
    path = f"/v1/admin/cert-sources/{made['id']}"
    listed = (await operator.get("/v1/admin/cert-sources", params={"limit": 100})).json()["data"]
    assert made["id"] in [each["id"] for each in listed]
    assert made["key"]["secret"] not in str(listed)
    again = await operator.post("/v1/admin/cert-sources", json=wanted)
    assert (again.status_code, again.json()["code"]) == (409, "cert.source_name_taken")
    wrong = await operator.post("/v1/admin/cert-sources", json=wanted | {"name": "two", "cidrs": ["300.0.0.0/8"]})
    assert (wrong.status_code, wrong.json()["code"]) == (400, "cert.source_invalid")
    none = await operator.get("/v1/admin/cert-sources/src_none")
    assert (none.status_code, none.json()["code"]) == (404, "cert.source_not_found")
    app.state.cert_sources._settings = replace(app.state.settings, cert_sources_max=1)
    full = await operator.post("/v1/admin/cert-sources", json=wanted | {"name": "three"})
    assert (full.status_code, full.json()["code"]) == (409, "cert.source_limit")
    assert (await owner.client.get(path)).status_code == 403
    async with app.state.db.read() as reader:
        rows = await reader.fetch_all(sa.select(audit_events).where(audit_events.c.target == made["id"]))
    assert [row.action for row in rows] == ["cert_source.create"]
    assert made["key"]["secret"] not in str(rows)
    assert rows[0].organization_id is None


async def test_the_secret_is_sealed(app: Any, sender: Sender) -> None:
    async with app.state.db.read() as reader:
        rows = await reader.raw.fetch("SELECT sealed_keys FROM certificate_sources WHERE id = $1", sender.source)
    assert base64.b64encode(sender.key.material) not in bytes(rows[0]["sealed_keys"])
    assert sender.key.material not in bytes(rows[0]["sealed_keys"])


# -- the group


async def test_one_event_that_cannot_be_stored_takes_no_other_with_it(app: Any, sender: Sender) -> None:
    """A row that PostgreSQL refuses, among good ones of the same group."""
    intake = app.state.cert_ingest.intake
    verified = await app.state.cert_ingest.verifier.verify(_received(sender, app))
    bodies = [sender.body("issuance.succeeded", "www.example.com") for _ in range(3)]
    events = [CertEvent.model_validate(body) for body in bodies]
    bad = events[1].model_copy(update={"sequence": 2**70})
    asked = [
        intake.take(verified, event, json.dumps(body).encode())
        for event, body in zip([events[0], bad, events[2]], bodies, strict=True)
    ]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [getattr(each, "status", None) for each in found][::2] == ["accepted", "accepted"]
    assert getattr(found[1], "code", None) == "request.invalid"


def _received(sender: Sender, app: Any) -> ingest.Received:
    fields = sender.fields(b"{}", "evt_1")
    return ingest.Received(TARGET, fields, frozenset(), b"{}", "127.0.0.1")


async def test_a_full_process_says_so(app: Any, sender: Sender) -> None:
    app.state.cert_ingest.intake._settings = replace(app.state.settings, cert_event_backlog=0)
    answer = await sender.send(sender.body("issuance.succeeded", "www.example.com"))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_old_events_are_cleared(app: Any, sender: Sender, clock: MovableClock) -> None:
    await sender.tell("issuance.succeeded", "clear.example.com")
    await apply_all(app.state.db)
    waits = await sender.tell("issuance.succeeded", "clear.example.com")
    await lifecycle.clear(app.state.db, clock.wall() + timedelta(hours=1))
    async with app.state.db.read() as reader:
        left = await event_store.listing(reader, {"source": sender.source}, 10, None)
        kept = await reader.raw.fetchval("SELECT count(*) FROM certificate_effects WHERE event_id <> ALL($1)", [waits])
    assert ([row.id for row in left], kept) == ([waits], 0)


async def test_another_process_stores_the_same_events_at_once(app: Any, sender: Sender, settings: ApiSettings) -> None:
    """In another order, and groups of another cut: each event is there once, and both processes name it by the same id."""
    verified = await app.state.cert_ingest.verifier.verify(_received(sender, app))
    bodies = [sender.body("issuance.failed", f"n{n}.example.com") for n in range(200)]
    raws = [json.dumps(body).encode() for body in bodies]

    async def all_of(group: int, order: list[int]) -> dict[int, ingest.Accepted]:
        intake = ingest.Intake(replace(settings, cert_event_group=group), app.state.db, app.state.clock)
        taken = [intake.take(verified, CertEvent.model_validate(bodies[n]), raws[n]) for n in order]
        return dict(zip(order, await asyncio.gather(*taken), strict=True))

    one, two = await asyncio.gather(all_of(7, list(range(200))), all_of(13, list(range(199, -1, -1))))
    assert {n: each.event for n, each in one.items()} == {n: each.event for n, each in two.items()}
    assert all({one[n].status, two[n].status} == {"accepted", "duplicate"} for n in range(200))
    mine = event_store.events.c.source_id == sender.source
    assert await count(app, mine) == await count(app, mine & ~event_store.events.c.repeated) == 200


async def test_an_id_that_another_process_is_about_to_use(app: Any, sender: Sender) -> None:
    """For something else: it waits for the other's commit, tells of nothing, and says so."""
    verified = await app.state.cert_ingest.verifier.verify(_received(sender, app))
    body = sender.body("issuance.failed", "www.example.com")
    other = {**body, "provenance": {**body["provenance"], "objectUid": "another"}}
    mine = sender.body("issuance.failed", "www.example.com")
    theirs = ingest._row(verified, CertEvent.model_validate(other), "00" * 32)
    intake = app.state.cert_ingest.intake
    async with app.state.db.transaction() as tx:
        await event_store.insert(tx, [theirs])
        asked = [
            asyncio.create_task(intake.take(verified, CertEvent.model_validate(each), json.dumps(each).encode()))
            for each in (body, mine)
        ]
        pid = await tx.raw.fetchval("SELECT pg_backend_pid()")
        async with asyncio.timeout(30), app.state.db.read() as reader:
            while not await reader.raw.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE $1 = ANY(pg_blocking_pids(pid))", pid
            ):
                await asyncio.sleep(0.02)
    conflict, taken = await asyncio.gather(*asked, return_exceptions=True)
    assert getattr(conflict, "code", None) == "cert.event_id_conflict"
    assert getattr(taken, "status", None) == "accepted"
    async with app.state.db.read() as reader:
        effect = ingest._row(verified, CertEvent.model_validate(body), "")["effect_key"]
        assert not await reader.raw.fetchval("SELECT count(*) FROM certificate_effects WHERE key = $1", effect)
