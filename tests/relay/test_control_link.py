from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from portico.kit.jwt import SigningKey
from portico.relay import control_link
from portico.relay.control_link import Backoff, ControlLink, LineReader, LinkLost
from portico.relay.snapshot import Snapshot
from portico.settings import RelaySettings, Secret
from tests.timing import Since

from .edge_api import Answer, EdgeApi, Script, Stream

KEY = SigningKey.generate().public_jwk()


def row(id: str, generation: int = 1) -> dict[str, Any]:
    return {
        "id": id,
        "organization": "org_1",
        "hosts": [f"{id}.localhost"],
        "state": "active",
        "generation": generation,
    }


def whole(version: int, *ids: str) -> dict[str, Any]:
    message = {
        "type": "snapshot",
        "version": version,
        "state": {"keys": [KEY], "tunnels": [row(id) for id in ids], "ended": [], "organizations": [], "domains": []},
    }
    reference = Snapshot()
    reference.apply(message)
    return {**message, "hash": reference.digest()}


def organization(id: str, version: int) -> dict[str, Any]:
    return {"id": id, "version": version, "limits": {"concurrency": version, "connections": 1}}


def told(version: int, *organizations: dict[str, Any]) -> dict[str, Any]:
    """A snapshot with a tunnel of org_1, as a control plane sends it that hashes organizations."""
    message = whole(version, "tun_a")
    message["state"]["organizations"] = list(organizations)
    versions = {row["id"]: row["version"] for row in organizations if row["id"] == "org_1"}
    text = json.dumps({"organizations": versions}, sort_keys=True, separators=(",", ":")).encode()
    return {**message, "organizations_hash": hashlib.sha256(text).hexdigest()}


def put(version: int, id: str) -> dict[str, Any]:
    return {"type": "delta", "version": version, "changes": [{"kind": "tunnel", "tunnel": row(id)}]}


def ends(version: int, session: str) -> dict[str, Any]:
    change = {"kind": "session_ended", "session": session, "code": "session.revoked", "until": 2e9}
    return {"type": "delta", "version": version, "changes": [change]}


def beat(version: int, **more: Any) -> dict[str, Any]:
    return {"type": "heartbeat", "version": version, "time": time.time(), **more}


def script(*steps: Any, then: str = "hold") -> Script:
    """Sends each step (bytes raw, anything else as a line), then holds, ends or cuts the stream."""

    async def run(stream: Stream) -> None:
        await stream.head()
        for step in steps:
            await (stream.raw(step) if isinstance(step, bytes) else stream.line(step))
        if then == "hold":
            await asyncio.Event().wait()
        elif then == "end":
            await stream.end()
        else:
            stream.cut()

    return run


def refuse(status: int, body: bytes = b"no") -> Script:
    async def run(stream: Stream) -> None:
        await stream.head(status)
        await stream.raw(body)
        await stream.end()

    return run


@pytest.fixture
async def api() -> AsyncIterator[EdgeApi]:
    api = EdgeApi()
    await api.start()
    yield api
    await api.stop()


class Rig:
    def __init__(self, link: ControlLink, snapshot: Snapshot) -> None:
        self.link, self.snapshot = link, snapshot
        self.bound: list[dict[str, Any]] = []


@pytest.fixture
def rig(api: EdgeApi, tmp_path: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def run(version: int | None = None, **limits: Any) -> AsyncIterator[Rig]:
        settings = RelaySettings(relay_key=Secret("tnl_rly_x"), api_url=api.url, state_dir=tmp_path, **limits)
        snapshot = Snapshot()
        if version is not None:
            snapshot.apply(whole(version))
        async with control_link.client(settings) as http:
            link = ControlLink(settings, snapshot, load=lambda: {"sessions": 1}, bound=lambda: made.bound, http=http)
            made = Rig(link, snapshot)
            task = asyncio.create_task(link.run())
            try:
                yield made
                assert not task.done()  # nothing that a test did may have ended the loops
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    return run


class TestStream:
    async def test_snapshot_and_deltas_are_applied_under_the_relays_key(self, api: EdgeApi, rig: Any) -> None:
        api.scripts = [script(whole(3, "tun_a"), beat(3), put(4, "tun_b"), {"type": "news"}, ends(6, "ses_1"))]
        async with rig() as r:
            assert not r.link.connected and r.link.disconnected_since is not None
            await api.until(lambda: r.snapshot.version == 6)
            assert r.link.connected and r.link.disconnected_since is None
            assert r.snapshot.tunnel("tun_a") and r.snapshot.tunnel("tun_b") and r.snapshot.ended("ses_1")
        assert api.streams[0].authorization == "Bearer tnl_rly_x"
        assert api.streams[0].version is None

    async def test_lines_may_come_in_any_pieces(self, api: EdgeApi, rig: Any) -> None:
        text = b"\n".join(json.dumps(m).encode() for m in (whole(3, "tun_a"), put(4, "tun_b"), beat(4))) + b"\n\r\n"
        api.scripts = [script(*[text[i : i + 7] for i in range(0, len(text), 7)])]
        async with rig() as r:
            await api.until(lambda: r.snapshot.version == 4)
            assert len(api.streams) == 1

    @pytest.mark.parametrize("then", ["end", "cut"])
    async def test_it_resumes_at_its_version(self, api: EdgeApi, rig: Any, then: str) -> None:
        api.scripts = [script(whole(3, "tun_a"), then=then), script(put(4, "tun_b"))]
        async with rig() as r:
            await api.until(lambda: r.snapshot.version == 4)
            assert [stream.version for stream in api.streams] == [None, "3"]
            assert r.snapshot.tunnel("tun_a") is not None
            assert r.link.resyncs == 0

    async def test_a_loaded_state_is_resumed(self, api: EdgeApi, rig: Any) -> None:
        api.scripts = [script(beat(8))]
        async with rig(version=8) as r:
            await api.until(lambda: r.link.connected)
        assert api.streams[0].version == "8"

    async def test_a_state_without_organizations_is_asked_for_anew(self, api: EdgeApi, rig: Any) -> None:
        """An earlier control plane sent it, or an earlier relay kept it: what changed of them since is not in it."""
        earlier = whole(3)
        del earlier["state"]["organizations"]
        api.scripts = [script(earlier, then="end"), script(whole(3))]
        async with rig() as r:
            await api.until(lambda: r.snapshot.complete)
        assert [stream.version for stream in api.streams[:2]] == [None, None]

    async def test_silence_means_dead(self, api: EdgeApi, rig: Any, caplog: pytest.LogCaptureFixture) -> None:
        api.scripts = [script(whole(3)), script(put(4, "tun_b"))]
        async with rig(edge_silence_seconds=0.2) as r:
            await api.until(lambda: r.snapshot.version == 4)
        assert "edge stream is down" in caplog.text

    async def test_an_api_that_takes_the_connection_and_never_answers(
        self, api: EdgeApi, rig: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def stall(stream: Stream) -> None:
            await asyncio.Event().wait()

        api.scripts = [stall, script(whole(3))]
        async with rig(edge_connect_timeout_seconds=0.1, edge_answer_timeout_seconds=0.1) as r:
            await api.until(lambda: r.snapshot.version == 3)
        assert "edge stream is down" not in caplog.text, "it may be starting beside us"

    async def test_a_revocation_applies_within_two_seconds_of_the_apis_return(
        self, api: EdgeApi, rig: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        api.scripts = [script(whole(3)), script(ends(4, "ses_1"))]
        async with rig() as r:
            await api.until(lambda: r.link.connected)
            await api.stop()
            await api.until(lambda: not r.link.connected)
            await asyncio.sleep(1.5)  # the backoff reaches its cap
            assert r.link.disconnected_since is not None and r.snapshot.version == 3
            await api.start()
            back = Since()
            await api.until(lambda: r.snapshot.ended("ses_1") is not None)
            assert back.waited() < 2.0
            assert r.link.disconnected_since is None
        assert caplog.text.count("edge stream is down") <= 3  # an outage is not a line per attempt

    @pytest.mark.parametrize("status", [401, 403])
    async def test_a_refused_key_is_named_and_tried_again_slowly(
        self, api: EdgeApi, rig: Any, status: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        body = json.dumps({"code": "auth.key_revoked", "detail": "this key was revoked"}).encode()
        api.scripts = [refuse(status, body), script(whole(3))]
        async with rig(edge_refused_seconds=0.4) as r:
            await api.until(lambda: r.link.refused)
            await asyncio.sleep(0.2)
            assert len(api.streams) == 1 and not r.link.connected
            await api.until(lambda: r.link.connected)
            assert not r.link.refused
        reasons = [getattr(record, "f", {}).get("why", "") for record in caplog.records]
        assert any("auth.key_revoked: this key was revoked" in reason for reason in reasons)
        assert "refuses this relay's key" in caplog.text

    @pytest.mark.parametrize("status", [301, 404, 500, 503])
    async def test_other_answers_are_tried_again(self, api: EdgeApi, rig: Any, status: int) -> None:
        api.scripts = [refuse(status, b"x" * 200_000), script(whole(3))]
        async with rig() as r:
            await api.until(lambda: r.snapshot.version == 3)
            assert not r.link.refused

    async def test_a_compressed_stream_is_not_read(self, api: EdgeApi, rig: Any) -> None:
        async def zipped(stream: Stream) -> None:
            await stream.head(extra="Content-Encoding: gzip\r\n")
            await stream.line(whole(9))

        api.scripts = [zipped, script(whole(3))]
        async with rig() as r:
            await api.until(lambda: r.snapshot.version is not None)
            assert r.snapshot.version == 3

    async def test_whoever_asked_hears_of_the_connection(self, api: EdgeApi, rig: Any) -> None:
        api.scripts = [script(whole(3), then="end"), script(beat(3))]
        async with rig() as r:
            heard: list[bool] = []
            r.link.on_connected.append(lambda: heard.append(r.link.connected))
            await api.until(lambda: len(heard) == 2)
            assert heard == [True, True]


class TestHostileLines:
    GARBAGE: ClassVar[list[Any]] = [
        b"not json\n",
        b"\x00\xff\xfe\n",
        b"[" * 50_000 + b"\n",
        b"[]\n",
        b"{}\n",
        b'{"type":7}\n',
        b'{"type":"delta"}\n',
        b'{"type":"delta","version":4,"changes":[{"kind":"tunnel","tunnel":{"id":1}}]}\n',
        b'{"type":"snapshot","version":4,"state":{"keys":[{}],"tunnels":[],"ended":[]}}\n',
        b'{"type":"heartbeat"}\n',
        put(3, "tun_x"),
        put(1, "tun_x"),
    ]

    @pytest.mark.parametrize("garbage", GARBAGE, ids=lambda g: str(g)[:40])
    async def test_garbage_and_disorder_lead_to_a_whole_snapshot(self, api: EdgeApi, rig: Any, garbage: Any) -> None:
        api.scripts = [script(whole(3, "tun_a"), garbage), script(whole(7, "tun_b"))]
        async with rig() as r:
            await api.until(lambda: r.snapshot.version == 7)
            assert [stream.version for stream in api.streams] == [None, None]
            assert r.snapshot.tunnel("tun_x") is None and r.link.resyncs == 1

    async def test_the_state_held_survives_garbage(self, api: EdgeApi, rig: Any) -> None:
        api.scripts = [script(whole(3, "tun_a"), b"garbage\n"), script(b"garbage\n")]
        async with rig() as r:
            await api.until(lambda: len(api.streams) >= 4)
            assert r.snapshot.tunnel("tun_a") is not None and r.snapshot.version == 3

    async def test_a_delta_instead_of_the_snapshot_asked_for_is_refused(self, api: EdgeApi, rig: Any) -> None:
        api.scripts = [script(whole(3), b"x\n"), script(put(4, "tun_x")), script(whole(9))]
        async with rig() as r:
            await api.until(lambda: r.snapshot.version == 9)
            assert r.snapshot.tunnel("tun_x") is None

    async def test_a_line_without_end_is_cut_off(self, api: EdgeApi, rig: Any) -> None:
        api.scripts = [script(*[b"x" * 4000] * 10), script(whole(3))]
        async with rig(edge_line_max_bytes=10_000) as r:
            await api.until(lambda: r.snapshot.version == 3)

    def test_a_line_that_drips_is_cut_off(self) -> None:
        reader = LineReader(1000, 0.02)
        assert reader.feed(b"abc\nde") == [b"abc"]
        time.sleep(0.03)
        with pytest.raises(LinkLost, match="edge_line_timeout_seconds"):
            reader.feed(b"f")


class TestHash:
    async def test_an_equal_hash_keeps_the_stream(self, api: EdgeApi, rig: Any) -> None:
        same = whole(3, "tun_a")["hash"]
        api.scripts = [script(whole(3, "tun_a"), beat(3, hash=same), beat(5, hash=same), put(6, "tun_b"))]
        async with rig() as r:
            await api.until(lambda: r.snapshot.version == 6)
            assert r.link.resyncs == 0 and len(api.streams) == 1

    async def test_a_hash_in_a_thread_for_many_tunnels(
        self, api: EdgeApi, rig: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control_link, "LARGE", 1)
        first = whole(3, "tun_a", "tun_b")
        api.scripts = [script(first, beat(3, hash=first["hash"]), put(4, "tun_c"))]
        async with rig() as r:
            await api.until(lambda: r.snapshot.version == 4)
            assert r.link.resyncs == 0

    async def test_a_different_hash_asks_for_everything(
        self, api: EdgeApi, rig: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        api.scripts = [script(whole(3, "tun_a"), beat(3, hash="0" * 64)), script(whole(3, "tun_b"))]
        async with rig() as r:
            await api.until(lambda: r.snapshot.tunnel("tun_b") is not None)
            assert r.snapshot.tunnel("tun_a") is None
            assert [stream.version for stream in api.streams] == [None, None]
        assert "differs from the control plane's" in caplog.text

    async def test_organizations_are_compared_where_both_tell_of_them(
        self, api: EdgeApi, rig: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A change of limits that was lost; and what makes no difference: an organization without a tunnel (relays do not hear
        that one was deleted), and control planes of the version before, which send no such hash or tell of none at all."""
        lost, deleted = organization("org_1", 1), organization("org_gone", 7)
        first, fine = told(3, lost, deleted), told(3, organization("org_1", 1))["organizations_hash"]
        newer = told(3, organization("org_1", 2))
        api.scripts = [
            script(first, beat(3, hash=first["hash"], organizations_hash=fine), beat(3, hash=first["hash"]), put(4, "tun_b"),
                   beat(4, hash=whole(4, "tun_a", "tun_b")["hash"], organizations_hash=newer["organizations_hash"])),
            script(told(5, organization("org_1", 2)), put(6, "tun_c")),
        ]  # fmt: skip
        async with rig() as r:
            await api.until(lambda: r.snapshot.version == 6)
            assert (r.link.resyncs, len(api.streams)) == (1, 2)
            assert r.snapshot.organization("org_1").version == 2
        assert "differs from the control plane's" in caplog.text

    async def test_an_earlier_control_plane_that_told_of_none_is_not_compared(self, api: EdgeApi, rig: Any) -> None:
        first = whole(3, "tun_a")
        del first["state"]["organizations"]
        later = told(3, organization("org_1", 1))["organizations_hash"]  # another process of a newer one beats here
        api.scripts = [script(first, beat(3, hash=first["hash"], organizations_hash=later), put(4, "tun_b"))]
        async with rig() as r:
            await api.until(lambda: r.snapshot.version == 4)
            assert r.link.resyncs == 0

    async def test_sessions_that_the_api_already_forgot_make_no_difference(self, api: EdgeApi, rig: Any) -> None:
        now = time.time()
        first = whole(3)
        first["state"]["ended"] = [{"session": "ses_1", "code": "session.revoked", "until": now - 10}]
        api.scripts = [script({**first, "hash": None}, beat(3, hash=whole(3)["hash"]), put(4, "tun_b"))]
        async with rig() as r:
            await api.until(lambda: r.snapshot.version == 4)
            assert r.link.resyncs == 0


class TestHeartbeats:
    async def test_it_says_what_the_relay_is_and_holds(self, api: EdgeApi, rig: Any) -> None:
        api.scripts = [script(whole(3))]
        async with rig() as r:
            r.bound.append({"tunnel": "tun_a", "session": "ses_1", "generation": 2})
            await api.until(lambda: r.snapshot.version == 3)
            r.link.draining = True
            r.link.poke()
            await api.until(lambda: bool(api.heartbeats) and api.heartbeats[-1]["version"] == 3)
        assert api.heartbeats[-1] == {
            "relay": "relay-1",
            "region": "local",
            "connect_url": "ws://127.0.0.1:7081/v1/connect",
            "public_url": "http://127.0.0.1:7080",
            "version": 3,
            "load": {"sessions": 1},
            "draining": True,
            "bound": [{"tunnel": "tun_a", "session": "ses_1", "generation": 2}],
            "left": [],
        }

    async def test_why_tunnels_went_is_told_until_it_was_heard(self, api: EdgeApi, rig: Any) -> None:
        async def no() -> Answer:
            return 503, b"{}"

        api.on_heartbeat = no
        api.scripts = [script(whole(3))]
        async with rig(heartbeat_interval_seconds=0.1) as r:
            r.link._left |= {"tun_a": "the agent is stopping"}
            await api.until(lambda: sum(bool(beat["left"]) for beat in api.heartbeats) >= 2)
            api.on_heartbeat = api._ok
            await api.until(lambda: not r.link._left)
            count = len(api.heartbeats)
            await api.until(lambda: len(api.heartbeats) > count + 1)
        assert api.heartbeats[-1]["left"] == []
        assert {"tunnel": "tun_a", "reason": "the agent is stopping"} in api.heartbeats[count - 1]["left"]

    async def test_they_come_at_their_interval(self, api: EdgeApi, rig: Any) -> None:
        api.scripts = [script(whole(3))]
        began = asyncio.get_running_loop().time()
        async with rig(heartbeat_interval_seconds=0.1):
            await api.until(lambda: len(api.heartbeats) >= 6)
        assert api.heartbeat_times[5] - began > 0.25, "five intervals, and each may be half as long"

    def test_the_defaults_keep_them_within_five_seconds(self) -> None:
        limits = RelaySettings(relay_key=Secret("x"))
        assert limits.heartbeat_interval_seconds + limits.heartbeat_timeout_seconds < 5

    async def test_a_poke_is_answered_within_50_ms_and_pokes_are_collected(self, api: EdgeApi, rig: Any) -> None:
        api.scripts = [script(whole(3))]
        async with rig() as r:
            await api.until(lambda: r.link.connected and len(api.heartbeats) == 1)
            await asyncio.sleep(0.1)
            delays = []
            for _ in range(5):
                count = len(api.heartbeats)
                poked = Since()
                for _ in range(100):
                    r.link.poke()
                await api.until(lambda: len(api.heartbeats) > count)  # noqa: B023
                delays.append(poked.waited())
                await asyncio.sleep(0.02)
            assert min(delays) < 0.05
            assert len(api.heartbeats) == 6

    async def test_failures_are_tried_again_and_do_not_touch_the_stream(self, api: EdgeApi, rig: Any) -> None:
        answers: list[Answer] = [(500, b"oops"), (429, b"[" * 100_000), (200, b"\xff not json")]

        async def answer() -> Answer:
            return answers.pop(0) if answers else (200, b"{}")

        api.on_heartbeat = answer
        api.scripts = [script(whole(3))]
        async with rig(heartbeat_interval_seconds=0.05) as r:
            await api.until(lambda: len(api.heartbeats) >= 5)
            assert r.link.connected and len(api.streams) == 1

    async def test_a_stalled_one_is_given_up(self, api: EdgeApi, rig: Any) -> None:
        async def stall() -> Answer:
            api.on_heartbeat = api._ok
            await asyncio.Event().wait()
            raise AssertionError

        api.on_heartbeat = stall
        api.scripts = [script(whole(3))]
        async with rig(heartbeat_timeout_seconds=0.1):
            await api.until(lambda: len(api.heartbeats) >= 2)

    async def test_a_refused_key_is_tried_again_slowly(
        self, api: EdgeApi, rig: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def no() -> Answer:
            return 401, b'{"code":"auth.key_invalid","detail":"unknown key"}'

        api.on_heartbeat = no
        api.scripts = [script(whole(3))]
        async with rig(edge_refused_seconds=0.3):
            await api.until(lambda: len(api.heartbeats) == 1)
            await asyncio.sleep(0.15)
            assert len(api.heartbeats) == 1
            await api.until(lambda: len(api.heartbeats) == 2)
        assert caplog.text.count("refuses this relay's key") == 1

    async def test_a_fault_of_the_relays_own_report_ends_nothing(self, api: EdgeApi, rig: Any) -> None:
        api.scripts = [script(whole(3))]
        async with rig(edge_backoff_max_seconds=0.1) as r:
            await api.until(lambda: len(api.heartbeats) == 1)
            r.bound.append({"tunnel": object()})
            r.link.poke()
            await asyncio.sleep(0.2)
            r.bound.clear()
            await api.until(lambda: len(api.heartbeats) == 2)


class TestBackoff:
    def test_full_jitter_below_a_ceiling_that_doubles_to_the_cap(self) -> None:
        highest = Backoff(0.1, 1.0, draw=lambda low, high: high)
        assert [highest.next() for _ in range(6)] == [0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
        highest.reset()
        assert highest.next() == 0.2
        lowest = Backoff(0.1, 1.0, draw=lambda low, high: low)
        assert {lowest.next() for _ in range(6)} == {0.1}
