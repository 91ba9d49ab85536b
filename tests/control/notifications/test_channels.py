"""Channels by the API, and events on their way to real receivers: once for a key, signed, tried again, switched off."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from portico.control.notifications import channels
from portico.control.notifications.events import EVENTS
from portico.kit import outbox, queue, signing
from portico.kit.clock import SystemClock
from portico.kit.db import Database
from portico.kit.queue import Hopeless, Retry
from portico.settings import ApiSettings, Secret, WorkerSettings
from portico.simulators.webhooks import Behaviour, WebhookReceiver
from portico.worker import notifications
from portico.worker.jobs import Context
from tests.control.conftest import Account, MovableClock

URL = "https://hooks.example.com/portico"
CHANNELS, DELIVERIES = "/v1/org/notification-channels", "/v1/org/notification-deliveries"


@pytest.fixture
async def receiver() -> AsyncIterator[WebhookReceiver]:
    async with WebhookReceiver() as made:
        yield made


@pytest.fixture
def settings(database_url: str, receiver: WebhookReceiver) -> ApiSettings:
    from tests.control.conftest import _MASTER_KEY

    return ApiSettings(
        database_url=Secret(database_url), master_key=Secret(_MASTER_KEY), registrations_per_address=100_000,
        outbound_http=True, outbound_ports=(443, receiver.port), outbound_allow=("127.0.0.0/8", "::1/128"),
        outbound_timeout_seconds=2.0, slack_hosts=("hooks.slack.com", "localhost"),
    )  # fmt: skip


@pytest.fixture
def context(settings: ApiSettings, db: Database, tmp_path: Path, clock: MovableClock) -> Context:
    return Context(WorkerSettings(database_url=Secret("x"), outbox_dir=tmp_path / "outbox"), settings, db, clock)


@pytest.fixture(autouse=True)
async def nothing_before(db: Database) -> None:
    """What earlier tests left is not delivered in this one."""
    await sql(db, "DELETE FROM outbox_messages")


def webhook(target: str = URL, **more: Any) -> dict[str, Any]:
    return {"kind": "webhook", "name": "Deployments", "target": target, "events": ["*"], **more}


async def put(account: Account, *wanted: dict[str, Any]) -> Any:
    answer = await account.client.put(CHANNELS, json={"channels": list(wanted)})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


async def refused(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


async def tell(app: Any, organization: str, key: str, event: str = "channel.test") -> list[str]:
    async with app.state.db.transaction() as tx:
        return await channels.notify(tx, app.state.sealer, organization, event, dict(EVENTS[event].example), key)


async def work(context: Context, kind: queue.Kind = notifications.WEBHOOK, *, suspect: bool = False) -> list[str]:
    """One attempt at everything that is due, recorded as the runner would; returns how each ended."""
    (job,) = [each for each in notifications.jobs(context.settings) if each.kind.name == kind.name]
    limits = job.limited(context.settings)
    found, _ = await queue.claim(context.db, kind, limits, 50, suspect=suspect)

    async def one(each: queue.Work) -> str:
        try:
            await job.run(context, each)
            return "delivered"
        except Hopeless as err:
            await queue.fail(each, str(err), 0, dead=True)
            return "dead"
        except Retry as err:
            await queue.fail(each, str(err), err.seconds, dead=each.attempt >= limits.max_attempts)
            return "retry"

    return await asyncio.gather(*(one(each) for each in found))


async def sql(db: Database, text: str, *values: Any) -> Any:
    async with db.transaction() as tx:
        return await tx.raw.fetch(text, *values)


async def hurry(db: Database, organization: str) -> None:
    """Time passes for what waits."""
    await sql(db, "UPDATE outbox_messages SET available_at = now() WHERE organization_id = $1", organization)


async def mails(context: Context) -> list[dict[str, Any]]:
    """What is in the folder of mail, after everything due was written there."""
    await work(context, notifications.MAIL)
    assert context.settings.outbox_dir is not None
    return [json.loads(path.read_text()) for path in sorted(context.settings.outbox_dir.glob("*.json"))]


async def test_channels_are_kept_as_they_are_wanted(owner: Account, app: Any) -> None:
    hook, slack, mail = await put(
        owner,
        webhook(f"{URL}?token=s3cret"),
        {"kind": "slack", "name": "Ops", "target": "https://hooks.slack.com/services/T0/B0/verysecret",
         "events": ["channel.disabled"]},
        {"kind": "email", "name": "Team", "target": "team@example.com", "events": ["*"]},
    )  # fmt: skip
    assert hook["secret"].startswith("whsec_") and slack["secret"] is mail["secret"] is None
    assert (hook["state"], slack["state"], mail["state"]) == ("active", "active", "unconfirmed")
    assert hook["target"] == f"{URL}?…" and "verysecret" not in slack["target"]
    listed = (await owner.client.get(CHANNELS)).json()["data"]
    assert [each["id"] for each in listed] == [hook["id"], slack["id"], mail["id"]]
    assert all(each["secret"] is None for each in listed), "shown once"
    stored = str(await sql(app.state.db, "SELECT * FROM notification_channels WHERE id = $1", hook["id"]))
    assert hook["secret"] not in stored and "s3cret" not in stored
    # What was read can be written back, changed; what is left out is removed.
    again = {key: hook[key] for key in ("id", "kind", "target", "events")} | {"name": "New", "enabled": False}
    (only,) = await put(owner, again)
    assert (only["id"], only["name"], only["state"], only["secret"]) == (hook["id"], "New", "off", None)
    async with app.state.db.read() as reader:
        row = await channels.store.one(reader, owner.organization, hook["id"])
    assert channels.target_of(app.state.sealer, row) == f"{URL}?token=s3cret", "the shown form is no new target"
    log = (await owner.client.get("/v1/audit")).text
    assert "channel.create" in log and "channel.change" in log and "channel.delete" in log
    assert hook["secret"] not in log and "s3cret" not in log and "verysecret" not in log


REFUSED = [
    (webhook("https://127.0.0.1.example.com:22/"), 400, "notification.channel_invalid"),
    (webhook("https://10.0.0.1/"), 400, "notification.channel_invalid"),
    (webhook("https://u:p@example.com/"), 400, "notification.channel_invalid"),
    (webhook("ftp://example.com/"), 400, "notification.channel_invalid"),
    (webhook(events=["tunnel.vanished"]), 400, "notification.channel_invalid"),
    (webhook() | {"kind": "slack"}, 400, "notification.channel_invalid"),
    (webhook("a@example.com\r\nBcc: b@example.com") | {"kind": "email"}, 400, "notification.channel_invalid"),
    ({"kind": "webhook", "name": "x", "events": ["*"]}, 400, "notification.channel_invalid"),
    (webhook(id="chn_unknown"), 404, "notification.channel_not_found"),
    (webhook(events=[]), 422, "request.invalid"),
    (webhook(name="a\u202eb"), 422, "request.invalid"),
    (webhook(secret="whsec_x"), 422, "request.invalid"),
]


async def test_channels_that_cannot_be_are_refused(owner: Account) -> None:
    for body, status, code in REFUSED:
        await refused(await owner.client.put(CHANNELS, json={"channels": [body]}), status, code)
    assert (await owner.client.get(CHANNELS)).json()["data"] == []


async def test_there_are_only_so_many(owner: Account) -> None:
    wanted = {"channels": [webhook(name=str(number)) for number in range(21)]}
    await refused(await owner.client.put(CHANNELS, json=wanted), 409, "notification.channel_limit")


async def test_of_many_replacements_at_once_one_is_left(owner: Account) -> None:
    names = [f"n{number}" for number in range(6)]
    await asyncio.gather(*(put(owner, webhook(name=name), webhook(name=name)) for name in names))
    left = [each["name"] for each in (await owner.client.get(CHANNELS)).json()["data"]]
    assert len(left) == 2 and left[0] == left[1]


async def test_another_tenants_channel_is_none(owner: Account, stranger: Account, app: Any) -> None:
    (hook,) = await put(owner, webhook())
    tested = await owner.client.post(f"{CHANNELS}/{hook['id']}/test")
    delivery = tested.json()["delivery"]
    for path in ("test", "rotate-secret", "confirm"):
        answer = await stranger.client.post(
            f"{CHANNELS}/{hook['id']}/{path}", json={"code": "1"} if path == "confirm" else {}
        )
        await refused(answer, 404, "notification.channel_not_found")
    wanted = {"channels": [webhook(id=hook["id"])]}
    await refused(await stranger.client.put(CHANNELS, json=wanted), 404, "notification.channel_not_found")
    await refused(await stranger.client.post(f"{DELIVERIES}/{delivery}/resend"), 404, "notification.delivery_not_found")
    assert (await stranger.client.get(DELIVERIES, params={"channel": hook["id"]})).json()["data"] == []
    assert await tell(app, stranger.organization, "k") == []


async def test_an_event_goes_to_each_channel_once_for_its_key(
    owner: Account, app: Any, receiver: WebhookReceiver, context: Context
) -> None:
    hook, quiet, off, slack = await put(
        owner,
        webhook(receiver.url),
        webhook(receiver.url, events=["channel.disabled"]),
        webhook(receiver.url, enabled=False),
        {"kind": "slack", "name": "Ops", "target": f"http://localhost:{receiver.port}/services/x", "events": ["channel.test"]},
    )  # fmt: skip
    made = await asyncio.gather(*(tell(app, owner.organization, "one") for _ in range(5)))
    assert sorted(map(len, made)) == [0, 0, 0, 0, 2], quiet
    assert await work(context) == ["delivered"] and await work(context, notifications.SLACK) == ["delivered"], off
    signed = next(each for each in receiver.got if each.id)
    message, at = signing.verify([hook["secret"]], signed.headers, signed.body, time.time())
    assert message in [each for some in made for each in some] and abs(at - time.time()) < 60
    document = json.loads(signed.body)
    assert document["type"] == "channel.test" and document["data"] == EVENTS["channel.test"].example
    assert document["organization"] == owner.organization
    (said,) = [json.loads(each.body) for each in receiver.got if each.path == "/services/x"]
    assert "Deployments" in said["text"], slack
    await tell(app, owner.organization, "k" * 300)
    assert len(await tell(app, owner.organization, "k" * 301)) == 2, "long keys are told apart"
    with pytest.raises(ValueError, match="no event"):
        async with app.state.db.transaction() as tx:
            await channels.notify(tx, app.state.sealer, owner.organization, "no.such", {}, "k")


async def test_names_are_no_markup_in_slack() -> None:
    assert channels.slack_text("<!channel> <https://evil|x> & co") == "&lt;!channel&gt; &lt;https://evil|x&gt; &amp; co"


async def test_a_worker_killed_after_the_answer_sends_the_same_id_again(
    owner: Account, app: Any, receiver: WebhookReceiver, context: Context
) -> None:
    await put(owner, webhook(receiver.url))
    (message,) = await tell(app, owner.organization, "killed")
    (job,) = [each for each in notifications.jobs(context.settings) if each.kind.name == "outbox.webhook"]
    (held,), _ = await queue.claim(context.db, job.kind, job.limited(context.settings), 1)
    task = asyncio.create_task(job.run(context, held))
    await receiver.until(1)
    task.cancel()  # what kill -9 does: the receiver has answered, nothing is recorded
    await asyncio.gather(task, return_exceptions=True)
    assert (await sql(context.db, "SELECT queue_state FROM outbox_messages WHERE id = $1", message))[0][0] == "pending"
    await hurry(context.db, owner.organization)
    assert await work(context, suspect=True) == ["delivered"]
    first, second = receiver.got
    assert first.id == second.id == message and first.body == second.body


async def test_two_workers_never_send_one_twice(
    owner: Account, app: Any, receiver: WebhookReceiver, context: Context
) -> None:
    await put(owner, webhook(receiver.url))
    for number in range(30):
        await tell(app, owner.organization, f"n{number}")
    ended = await asyncio.gather(*(work(context) for _ in range(5)))
    assert sum(map(len, ended)) == 30 and {each for some in ended for each in some} == {"delivered"}
    assert len({each.id for each in receiver.got}) == len(receiver.got) == 30


ANSWERS = [
    (Behaviour(status=500), 5, 6), (Behaviour(status=302, headers={"location": "http://127.0.0.1/"}), 5, 6),
    (Behaviour(status=429, headers={"retry-after": "3600"}), 3600, 3601), (Behaviour("reset_in_head"), 5, 6),
    (Behaviour(status=503, headers={"retry-after": "999999999"}), 86_400, 95_040), (Behaviour("garbage"), 5, 6),
    (Behaviour(status=503, headers={"retry-after": "-1"}), 5, 6), (Behaviour("hang"), 5, 6),
]  # fmt: skip


async def test_what_failed_is_tried_again_on_the_ladder(
    owner: Account, app: Any, receiver: WebhookReceiver, context: Context
) -> None:
    context = dataclasses.replace(context, control=dataclasses.replace(context.control, outbound_timeout_seconds=0.5))
    await put(owner, webhook(receiver.url))
    for number, (behaviour, least, most) in enumerate(ANSWERS):
        (message,) = await tell(app, owner.organization, f"k{number}")
        receiver.plan(behaviour)
        assert await work(context) == ["retry"], behaviour
        (row,) = await sql(
            context.db,
            "SELECT extract(epoch FROM available_at - moved_at)::float8 AS pause, status FROM outbox_messages WHERE id = $1",
            message,
        )
        assert least <= row["pause"] <= most, behaviour
        assert row["status"] == (None if behaviour.kind != "answer" else behaviour.status)
        (channel,) = (await owner.client.get(CHANNELS)).json()["data"]
        assert channel["failing_since"] is not None and channel["state"] == "active"
        shown = (await owner.client.get(DELIVERIES)).json()["data"][0]
        assert (shown["id"], shown["state"], shown["attempts"]) == (message, "waiting", 1)
        assert shown["next_attempt_at"] and shown["detail"]
        await hurry(context.db, owner.organization)
        assert await work(context) == ["delivered"]
        (channel,) = (await owner.client.get(CHANNELS)).json()["data"]
        assert channel["failing_since"] is None and channel["delivered_at"] is not None
    assert len({each.id for each in receiver.got}) == len(ANSWERS) and len(receiver.got) == 2 * len(ANSWERS)


async def test_the_ladder_has_an_end(owner: Account, app: Any, receiver: WebhookReceiver, context: Context) -> None:
    (hook,) = await put(owner, webhook(receiver.url))
    (message,) = await tell(app, owner.organization, "k")
    receiver.usual = Behaviour(status=500)
    for _ in range(9):
        assert await work(context) == ["retry"]
        await hurry(context.db, owner.organization)
    assert await work(context) == ["retry"], "the tenth, and the last"
    assert await work(context) == [] and len(receiver.got) == 10
    (shown,) = (await owner.client.get(DELIVERIES, params={"state": "failed", "channel": hook["id"]})).json()["data"]
    assert (shown["id"], shown["attempts"], shown["status"], shown["can_resend"]) == (message, 10, 500, True)
    await refused(await owner.client.post(f"{DELIVERIES}/msg_none/resend"), 404, "notification.delivery_not_found")
    receiver.usual = Behaviour()
    for answer in (202, 409):
        again = await owner.client.post(f"{DELIVERIES}/{message}/resend")
        assert again.status_code == answer, again.text
    assert again.json()["code"] == "notification.delivery_pending"
    assert await work(context) == ["delivered"] and len({each.id for each in receiver.got}) == 1
    assert (await owner.client.post(f"{DELIVERIES}/{message}/resend")).status_code == 202, "what arrived, too"
    assert await work(context) == ["delivered"] and len(receiver.got) == 12
    await sql(context.db, "UPDATE outbox_messages SET sealed_body = NULL WHERE id = $1", message)
    await refused(await owner.client.post(f"{DELIVERIES}/{message}/resend"), 409, "notification.delivery_gone")
    assert "delivery.resend" in (await owner.client.get("/v1/audit")).text


async def test_a_receiver_that_is_gone_is_switched_off_and_its_owners_told(
    owner: Account, app: Any, receiver: WebhookReceiver, context: Context
) -> None:
    gone, other = await put(owner, webhook(f"{receiver.url}/gone"), webhook(f"{receiver.url}/other"))
    first = await tell(app, owner.organization, "k")
    await tell(app, owner.organization, "later")
    receiver.usual = Behaviour(status=410)
    async with app.state.db.transaction() as tx:  # this one only, for now
        await tx.raw.execute("UPDATE notification_channels SET state = 'off' WHERE id = $1", other["id"])
    assert set(await work(context)) == {"dead"}
    shown = {each["id"]: each for each in (await owner.client.get(CHANNELS)).json()["data"]}
    assert shown[gone["id"]]["state"] == "disabled" and "410" in shown[gone["id"]]["reason"]
    written = [each for each in await mails(context) if each["topic"] == "channel.disabled"]
    assert [each["recipient"] for each in written] == [owner.email], "once, although two messages were answered so"
    await refused(await owner.client.post(f"{CHANNELS}/{gone['id']}/test"), 409, "notification.channel_inactive")
    await refused(await owner.client.post(f"{DELIVERIES}/{first[0]}/resend"), 409, "notification.channel_inactive")
    assert "channel.disable" in (await owner.client.get("/v1/audit")).text
    again = {key: shown[gone["id"]][key] for key in ("id", "kind", "name", "target", "events")} | {"enabled": True}
    (back,) = await put(owner, again)
    assert (back["state"], back["reason"], back["failing_since"]) == ("active", None, None)


async def test_one_that_fails_for_days_is_switched_off(
    owner: Account, app: Any, receiver: WebhookReceiver, context: Context
) -> None:
    hook, other = await put(owner, webhook(receiver.url), webhook(f"{receiver.url}/other", events=["channel.disabled"]))
    receiver.plan(Behaviour(status=500), Behaviour(status=500))
    await tell(app, owner.organization, "k")
    assert await work(context) == ["retry"]
    await sql(
        context.db,
        "UPDATE notification_channels SET failing_since = now() - interval '5 days 1 s' WHERE id = $1",
        hook["id"],
    )
    await hurry(context.db, owner.organization)
    assert await work(context) == ["retry"]
    shown = {each["id"]: each for each in (await owner.client.get(CHANNELS)).json()["data"]}
    assert shown[hook["id"]]["state"] == "disabled" and "5 days" in shown[hook["id"]]["reason"]
    assert await work(context) == ["delivered"], other
    told = json.loads(receiver.got[-1].body)
    assert (told["type"], told["data"]["channel"]) == ("channel.disabled", hook["id"])


async def test_a_secret_is_replaced_with_time_for_the_receiver(
    owner: Account, app: Any, receiver: WebhookReceiver, context: Context, clock: MovableClock
) -> None:
    (hook,) = await put(owner, webhook(receiver.url))
    path = f"{CHANNELS}/{hook['id']}/rotate-secret"
    new = (await owner.client.post(path, json={})).json()
    assert new["secret"] != hook["secret"] and new["previous_until"]
    receiver.secrets = [hook["secret"]]  # it has not been told yet
    await tell(app, owner.organization, "during")
    assert await work(context) == ["delivered"]
    receiver.secrets = [new["secret"]]
    await tell(app, owner.organization, "told")
    assert await work(context) == ["delivered"]
    (got,) = receiver.got[-1:]
    at_once = (await owner.client.post(path, json={"overlap_seconds": 0})).json()
    assert at_once["previous_until"] is None
    for _ in range(5):
        last = (await owner.client.post(path, json={})).json()
    async with app.state.db.read() as reader:
        row = await channels.store.one(reader, owner.organization, hook["id"])
    assert len(channels.secrets_of(app.state.sealer, row, clock.wall())) == channels.MAX_SECRETS
    log = (await owner.client.get("/v1/audit")).text
    assert "channel.rotate_secret" in log and new["secret"] not in log and at_once["secret"] not in log
    clock.advance(86_401)
    await tell(app, owner.organization, "after")
    receiver.secrets = []
    await work(context)
    late = receiver.got[-1]
    with pytest.raises(signing.SignatureError, match="no signature"):
        signing.verify(
            [hook["secret"], new["secret"], at_once["secret"]], late.headers, late.body, time.time() + 86_401
        )
    assert signing.verify([last["secret"]], late.headers, late.body, time.time() + 86_401)
    with pytest.raises(signing.SignatureError) as replayed:
        signing.verify([new["secret"]], got.headers, got.body, time.time() + 86_401)
    assert replayed.value.fault == "stale"


async def test_an_address_gets_nothing_before_its_reader_says_yes(owner: Account, app: Any, context: Context) -> None:
    wanted = {"kind": "email", "name": "Team", "target": "team@example.com", "events": ["*"]}
    (channel,) = await put(owner, wanted)
    assert await tell(app, owner.organization, "early") == []
    (letter,) = [each for each in await mails(context) if each["topic"] == "channel.confirm"]
    code = letter["body"]["subject"].split()[0]
    assert letter["recipient"] == "team@example.com" and code.isdigit() and len(code) == 8
    path = f"{CHANNELS}/{channel['id']}/confirm"
    wrong = str((int(code) + 1) % 10**8).rjust(8, "0")
    await refused(await owner.client.post(path, json={"code": wrong}), 400, "notification.code_invalid")
    answers = await asyncio.gather(*(owner.client.post(path, json={"code": code}) for _ in range(3)))
    assert sorted(each.status_code for each in answers) == [200, 400, 400], "once"
    assert len(await tell(app, owner.organization, "now")) == 1
    (told,) = [each for each in await mails(context) if each["topic"] == "channel.test"]
    assert told["recipient"] == "team@example.com" and "Deployments" in told["body"]["text"]
    # Another address has to be confirmed anew.
    (moved,) = await put(owner, wanted | {"id": channel["id"], "target": "stranger@example.com"})
    assert moved["state"] == "unconfirmed" and await tell(app, owner.organization, "moved") == []


@pytest.mark.parametrize("change", ["removed", "off", "moved", "moved, then sent again"])
async def test_a_reader_who_left_gets_nothing_that_is_on_its_way(
    owner: Account, app: Any, context: Context, db: Database, change: str
) -> None:
    wanted = {"kind": "email", "name": "Team", "target": "left@example.com", "events": ["*"]}
    (channel,) = await put(owner, wanted)
    code = (await mails(context))[-1]["body"]["subject"].split()[0]
    path = f"{CHANNELS}/{channel['id']}"
    assert (await owner.client.post(f"{path}/confirm", json={"code": code})).status_code == 200
    (message,) = await tell(app, owner.organization, "before")
    if change == "removed":
        await put(owner)
    elif change == "off":
        await put(owner, {**wanted, "id": channel["id"], "enabled": False})
    else:
        await put(owner, {**wanted, "id": channel["id"], "target": "next@example.com"})
    written = await mails(context)
    assert [each for each in written if each["topic"] == "channel.test"] == []
    if change == "moved, then sent again":
        (code,) = [each["body"]["subject"].split()[0] for each in written if each["recipient"] == "next@example.com"]
        assert (await owner.client.post(f"{path}/confirm", json={"code": code})).status_code == 200
        assert (await owner.client.post(f"{DELIVERIES}/{message}/resend")).status_code == 202
        assert [each for each in await mails(context) if each["topic"] == "channel.test"] == []
    said = await sql(db, "SELECT last_error FROM outbox_messages WHERE id = $1", message)
    assert "channel" in said[0]["last_error"]


async def test_codes_are_not_guessed(owner: Account, app: Any, context: Context) -> None:
    (channel,) = await put(owner, {"kind": "email", "name": "x", "target": "victim@example.com", "events": ["*"]})
    (letter,) = [each for each in await mails(context) if each["recipient"] == "victim@example.com"]
    code = letter["body"]["subject"].split()[0]
    path = f"{CHANNELS}/{channel['id']}"
    for _ in range(5):
        await refused(await owner.client.post(f"{path}/confirm", json={"code": "x"}), 400, "notification.code_invalid")
    await refused(await owner.client.post(f"{path}/confirm", json={"code": code}), 400, "notification.code_invalid")
    answers = [await owner.client.post(f"{path}/test") for _ in range(6)]
    assert [each.status_code for each in answers] == [202] * 4 + [429] * 2, "the first code counts, too"
    assert answers[-1].json()["code"] == "notification.throttled" and answers[-1].headers["retry-after"]


async def test_what_is_on_its_way_to_a_channel_that_was_removed_is_dropped(
    owner: Account, app: Any, receiver: WebhookReceiver, context: Context
) -> None:
    await put(owner, webhook(receiver.url))
    (message,) = await tell(app, owner.organization, "k")
    await put(owner)
    assert await work(context) == ["dead"] and not receiver.got
    await refused(await owner.client.post(f"{DELIVERIES}/{message}/resend"), 404, "notification.channel_not_found")


async def test_a_name_that_leads_inside_is_not_called(owner: Account, app: Any, context: Context) -> None:
    """The text of the address says nothing; DNS does."""
    await put(owner, webhook("https://internal.localhost/"))
    await tell(app, owner.organization, "k")
    strict = dataclasses.replace(context, control=dataclasses.replace(context.control, outbound_allow=()))
    assert await work(strict) == ["retry"]
    (shown,) = (await owner.client.get(DELIVERIES)).json()["data"]
    assert "not a public one" in shown["detail"] and "127.0.0.1" not in shown["detail"]


def test_dates_are_understood_as_retry_after() -> None:
    from portico.control.notifications.outgoing import retry_after
    from portico.kit.outbound import Answer

    clock = SystemClock()
    cases = {"": None, "x": None, "120": 120.0, "1e9": None, "Thu, 01 Jan 1970 00:00:00 GMT": 0.0,
             "Fri, 31 Dec 9999 23:59:59 GMT": 86_400.0,
             "12345678901234": None, "Fri, 99 Foo 2026 00:00:00 GMT": None}  # fmt: skip
    assert {text: retry_after(Answer(429, {"retry-after": text}), clock) for text in cases} == cases


def test_events_say_what_they_need() -> None:
    for name, event in EVENTS.items():
        assert "…" not in event.said(event.example) and event.about and name.count(".") == 1
        assert "…" in event.said({})


def test_lanes_are_of_organization_and_channel() -> None:
    assert outbox.lane("org_1", "chn_1") == "org_1/chn_1" and outbox.lane(None) == "-"


async def test_what_happens_elsewhere_reaches_channels(owner: Account, app: Any) -> None:
    await put(owner, webhook(events=["organization.deletion"]))
    name = (await owner.client.get("/v1/org")).json()["name"]
    asked = await owner.client.post("/v1/org/deletion", json={"name": name})
    assert asked.status_code < 300, asked.text
    rows = await sql(app.state.db, "SELECT topic FROM outbox_messages WHERE driver = 'webhook'")
    assert [row["topic"] for row in rows] == ["organization.deletion"]


async def test_channels_that_are_made_anew_test_no_more_than_their_organization_may(
    owner: Account, app: Any, context: Context
) -> None:
    app.state.channels._settings = replace(app.state.settings, channel_tests_per_organization=6)
    answers = []
    for _ in range(2):
        (hook,) = await put(owner, webhook())  # the one before is gone
        answers += [(await owner.client.post(f"{CHANNELS}/{hook['id']}/test")).status_code for _ in range(5)]
    assert answers == [202] * 6 + [429] * 4
    await refused(await owner.client.post(f"{CHANNELS}/{hook['id']}/test"), 429, "notification.throttled")


async def test_what_is_sent_again_has_a_limit(
    owner: Account, stranger: Account, app: Any, receiver: WebhookReceiver, context: Context, monkeypatch: Any
) -> None:
    """However many deliveries there are, and of whatever channel; other organizations have theirs."""
    monkeypatch.setattr(app.state, "settings", replace(app.state.settings, channel_resends_per_organization=2))
    await put(owner, webhook(receiver.url))
    first, second = await tell(app, owner.organization, "one"), await tell(app, owner.organization, "two")
    assert await work(context) == ["delivered", "delivered"]
    for message in (*first, *second):
        assert (await owner.client.post(f"{DELIVERIES}/{message}/resend")).status_code == 202
    assert await work(context) == ["delivered", "delivered"]
    answer = await owner.client.post(f"{DELIVERIES}/{first[0]}/resend")
    await refused(answer, 429, "notification.throttled")
    assert int(answer.headers["retry-after"]) > 0 and len(receiver.got) == 4
    await put(stranger, webhook(receiver.url))
    (theirs,) = await tell(app, stranger.organization, "three")
    assert await work(context) == ["delivered"]
    assert (await stranger.client.post(f"{DELIVERIES}/{theirs}/resend")).status_code == 202
