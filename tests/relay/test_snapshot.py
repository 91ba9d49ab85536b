from __future__ import annotations

import asyncio
import hashlib
import json
import stat
from pathlib import Path
from typing import Any, ClassVar

import pytest

from portico.kit.jwt import SigningKey
from portico.relay.edge_rows import SnapshotInvalid, parse_json
from portico.relay.snapshot import Change, OutOfOrder, Snapshot
from portico.relay.snapshot_store import SnapshotStore

KEY = SigningKey.generate().public_jwk()
OTHER_KEY = SigningKey.generate().public_jwk()


def row(id: str, *hosts: str, state: str = "active", generation: int = 1) -> dict[str, Any]:
    return {"id": id, "organization": "org_1", "hosts": list(hosts), "state": state, "generation": generation}


def ended(session: str, until: float = 2e9, code: str = "session.revoked") -> dict[str, Any]:
    return {"session": session, "code": code, "until": until}


def whole(version: int, *tunnels: dict[str, Any], ends: list[Any] | None = None, keys: list[Any] | None = None) -> Any:
    state = {"keys": [KEY] if keys is None else keys, "tunnels": list(tunnels), "ended": ends or []}
    return {"type": "snapshot", "version": version, "hash": "-", "state": state}


def delta(version: int, *changes: Any) -> Any:
    return {"type": "delta", "version": version, "changes": list(changes)}


def put(tunnel: Any) -> Any:
    return {"kind": "tunnel", "tunnel": tunnel}


@pytest.fixture
def snapshot() -> Snapshot:
    return Snapshot(wall=lambda: 1e9)


@pytest.fixture
def seen(snapshot: Snapshot) -> list[Change]:
    changes: list[Change] = []
    snapshot.on_change(changes.append)
    return changes


class TestLookups:
    def test_nothing_is_known_before_the_first_snapshot(self, snapshot: Snapshot) -> None:
        assert (snapshot.version, len(snapshot), snapshot.digest()) == (None, 0, None)
        assert snapshot.tunnel_for_host("web.localhost") is None

    def test_tunnels_by_id_and_host_ended_sessions_and_keys(self, snapshot: Snapshot) -> None:
        snapshot.apply(whole(7, row("tun_a", "a.localhost", "b.localhost", state="stopped"), ends=[ended("ses_1")]))
        found = snapshot.tunnel_for_host("b.localhost")
        assert found is not None and found is snapshot.tunnel("tun_a")
        assert (found.state, found.active, found.generation) == ("stopped", False, 1)
        assert snapshot.tunnel_for_host("c.localhost") is None
        gone = snapshot.ended("ses_1")
        assert gone is not None and gone.code == "session.revoked"
        assert snapshot.ended("ses_2") is None
        assert KEY["kid"] in snapshot.keys

    def test_ended_sessions_are_pruned_after_a_margin_for_clocks(self) -> None:
        now = 1000.0
        snapshot = Snapshot(wall=lambda: now)
        snapshot.apply(whole(1, ends=[ended("ses_1", until=1000.0), ended("ses_2", until=5000.0)]))
        assert snapshot.prune() == 0
        now = 1301.0
        assert snapshot.prune() == 1
        assert snapshot.ended("ses_1") is None
        assert snapshot.ended("ses_2") is not None


class TestDeltas:
    def test_each_kind_changes_what_it_names(self, snapshot: Snapshot, seen: list[Change]) -> None:
        snapshot.apply(whole(1, row("tun_a", "a.localhost"), row("tun_b", "b.localhost")))
        seen.clear()
        snapshot.apply(
            delta(
                5,
                put(row("tun_a", "new.localhost", generation=2)),
                {"kind": "tunnel_removed", "id": "tun_b", "code": "tunnel.deleted"},
                {"kind": "session_ended", **ended("ses_1")},
                {"kind": "keys", "keys": [KEY, OTHER_KEY]},
            )
        )
        assert snapshot.version == 5
        assert snapshot.tunnel_for_host("a.localhost") is None
        moved = snapshot.tunnel_for_host("new.localhost")
        assert moved is not None and moved.generation == 2
        assert snapshot.tunnel("tun_b") is None and snapshot.tunnel_for_host("b.localhost") is None
        assert snapshot.ended("ses_1") is not None
        assert len(snapshot.keys) == 2
        assert [(c.kind, c.id) for c in seen] == [
            ("tunnel", "tun_a"),
            ("tunnel_removed", "tun_b"),
            ("session_ended", "ses_1"),
            ("keys", ""),
        ]

    def test_a_host_that_moved_stays_with_its_new_tunnel(self, snapshot: Snapshot) -> None:
        snapshot.apply(whole(1, row("tun_a", "x.localhost"), row("tun_b")))
        snapshot.apply(delta(2, put(row("tun_b", "x.localhost")), put(row("tun_a", "y.localhost"))))
        found = snapshot.tunnel_for_host("x.localhost")
        assert found is not None and found.id == "tun_b"

    @pytest.mark.parametrize("version", [3, 2, 0])
    def test_a_version_that_does_not_follow_is_refused(self, snapshot: Snapshot, version: int) -> None:
        snapshot.apply(whole(3, row("tun_a", "a.localhost")))
        with pytest.raises(OutOfOrder):
            snapshot.apply(delta(version, {"kind": "tunnel_removed", "id": "tun_a", "code": "tunnel.deleted"}))
        assert snapshot.tunnel("tun_a") is not None

    def test_a_delta_before_any_snapshot_is_refused(self, snapshot: Snapshot) -> None:
        with pytest.raises(OutOfOrder):
            snapshot.apply(delta(1))

    def test_an_unknown_kind_of_a_newer_control_plane_is_left_out(self, snapshot: Snapshot) -> None:
        snapshot.apply(whole(1))
        snapshot.apply(delta(2, {"kind": "of_a_newer_one", "x": 1}, put(row("tun_a", "a.localhost"))))
        assert snapshot.version == 2 and snapshot.tunnel("tun_a") is not None

    def test_an_unknown_code_becomes_one_that_can_be_rendered(self, snapshot: Snapshot) -> None:
        snapshot.apply(whole(1, ends=[ended("ses_1", code="session.from_the_future")]))
        gone = snapshot.ended("ses_1")
        assert gone is not None and gone.code == "session.revoked"


class TestHostile:
    BAD_ROWS: ClassVar[list[Any]] = [
        None,
        {},
        {**row("t"), "hosts": "a.localhost"},
        {**row("t"), "hosts": [1]},
        {**row("t"), "hosts": ["a"] * 1025},
        {**row("t"), "hosts": ["a" * 254]},
        {**row("t"), "generation": True},
        {**row("t"), "generation": -1},
        {**row("t"), "generation": 2**60},
        {**row("t"), "id": ""},
        {**row("t"), "id": "x" * 129},
        {**row("t"), "state": 3},
    ]
    BAD: ClassVar[list[Any]] = [
        None,
        [],
        7,
        {},
        {"type": "snapshot"},
        {"type": "snapshot", "version": "1", "state": {}},
        {"type": "snapshot", "version": True, "state": {"keys": [], "tunnels": [], "ended": []}},
        {"type": "snapshot", "version": 9, "state": []},
        {"type": "snapshot", "version": 9, "state": {"keys": [], "tunnels": {}, "ended": []}},
        {"type": "other", "version": 9},
        {"type": "delta", "version": 9, "changes": {}},
        whole(9, keys=[{"kty": "oct", "k": "c2VjcmV0", "kid": "x"}]),
        whole(9, keys=[None]),
        whole(9, keys=[KEY, KEY]),
        whole(9, ends=[{"session": "s", "code": "session.revoked", "until": "soon"}]),
        whole(9, ends=[{"session": "s", "code": "session.revoked", "until": 1e300}]),
        whole(9, ends=[{"session": "s", "code": "session.revoked", "until": float("nan")}]),
        delta(9, None),
        delta(9, {}),
        delta(9, {"kind": 4}),
        delta(9, {"kind": "tunnel_removed"}),
        delta(9, {"kind": "session_ended", "session": 1}),
        delta(9, {"kind": "keys", "keys": "none"}),
        *[whole(9, bad) for bad in BAD_ROWS],
        *[delta(9, put(bad)) for bad in BAD_ROWS],
    ]

    @pytest.mark.parametrize("message", BAD, ids=lambda m: json.dumps(m)[:60])
    def test_a_malformed_message_changes_nothing(self, snapshot: Snapshot, seen: list[Change], message: Any) -> None:
        snapshot.apply(whole(3, row("tun_a", "a.localhost")))
        before = snapshot.digest()
        seen.clear()
        with pytest.raises(SnapshotInvalid):
            snapshot.apply(message)
        assert (snapshot.version, snapshot.digest(), seen) == (3, before, [])

    def test_one_bad_change_keeps_the_good_ones_of_its_delta_out(self, snapshot: Snapshot) -> None:
        snapshot.apply(whole(1))
        with pytest.raises(SnapshotInvalid):
            snapshot.apply(delta(2, put(row("tun_a", "a.localhost")), {"kind": "tunnel", "tunnel": {}}))
        assert snapshot.tunnel("tun_a") is None

    @pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000, b"NaN", b'{"a":Infinity}', b"1" * 5000])
    def test_text_that_is_not_json(self, text: bytes) -> None:
        with pytest.raises(SnapshotInvalid):
            parse_json(text)

    def test_a_listener_that_fails_does_not_keep_a_change_from_the_others(
        self, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(change: Change) -> None:
            raise RuntimeError("listener")

        later: list[Change] = []
        snapshot.on_change(broken)
        snapshot.on_change(later.append)
        snapshot.apply(whole(1, row("tun_a")))
        assert [change.kind for change in later] == ["tunnel", "keys"]
        assert "listener failed" in caplog.text


class TestSnapshots:
    def test_listeners_hear_the_difference_only(self, snapshot: Snapshot, seen: list[Change]) -> None:
        snapshot.apply(whole(5, row("tun_a", "a.localhost"), row("tun_b", "b.localhost"), row("tun_c")))
        seen.clear()
        stopped = row("tun_b", "b.localhost", state="stopped")
        snapshot.apply(whole(9, row("tun_a", "a.localhost"), stopped, row("tun_d"), ends=[ended("ses_1")]))
        assert {(c.kind, c.id, c.code) for c in seen} == {
            ("tunnel_removed", "tun_c", "tunnel.deleted"),
            ("tunnel", "tun_b", ""),
            ("tunnel", "tun_d", ""),
            ("session_ended", "ses_1", "session.revoked"),
        }

    def test_a_snapshot_of_a_restored_control_plane_may_go_back(self, snapshot: Snapshot) -> None:
        snapshot.apply(whole(900, row("tun_a")))
        snapshot.apply(whole(2, row("tun_b")))
        assert snapshot.version == 2 and snapshot.tunnel("tun_a") is None

    async def test_a_large_one_leaves_the_loop_its_turns(self, snapshot: Snapshot) -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        message = whole(4, *[row(f"tun_{i}", f"h{i}.localhost") for i in range(5000)])
        await snapshot.apply_gently(message)
        task.cancel()
        reference = Snapshot()
        reference.apply(message)
        assert turns >= 10 and snapshot.digest() == reference.digest()

    @pytest.mark.parametrize("last", TestHostile.BAD_ROWS, ids=lambda value: str(value)[:50])
    async def test_a_large_one_with_one_bad_row_changes_nothing(self, snapshot: Snapshot, last: Any) -> None:
        snapshot.apply(whole(3))
        with pytest.raises(SnapshotInvalid):
            await snapshot.apply_gently(whole(4, *[row(f"tun_{i}") for i in range(600)], last))
        assert (snapshot.version, len(snapshot)) == (3, 0)


class TestHash:
    def test_it_is_the_one_of_the_interface(self, snapshot: Snapshot) -> None:
        tunnels = [row("tun_b", "b.localhost"), {**row("tun_a", "a.localhost"), "added_later": {"z": 1, "a": "é"}}]
        snapshot.apply(whole(4, *tunnels, ends=[ended("ses_2"), ended("ses_1")], keys=[KEY, OTHER_KEY]))
        expected = {
            "tunnels": {t["id"]: t for t in tunnels},
            "ended": ["ses_1", "ses_2"],
            "keys": sorted([KEY["kid"], OTHER_KEY["kid"]]),
        }
        text = json.dumps(expected, sort_keys=True, separators=(",", ":")).encode()
        assert snapshot.digest() == hashlib.sha256(text).hexdigest()

    def test_deltas_and_a_snapshot_of_the_same_state_agree(self, snapshot: Snapshot) -> None:
        snapshot.apply(whole(1, row("tun_a", "a.localhost"), row("tun_b")))
        removed = {"kind": "tunnel_removed", "id": "tun_b", "code": "tunnel.deleted"}
        snapshot.apply(delta(2, put(row("tun_c", "c.localhost")), removed))
        other = Snapshot(wall=lambda: 1e9)
        other.apply(whole(2, row("tun_c", "c.localhost"), row("tun_a", "a.localhost")))
        assert snapshot.digest() == other.digest()

    def test_a_time_leaves_out_what_is_over(self, snapshot: Snapshot) -> None:
        snapshot.apply(whole(1, ends=[ended("ses_1", until=1e9 + 5), ended("ses_2", until=1e9 + 50)]))
        other = Snapshot(wall=lambda: 1e9)
        other.apply(whole(1, ends=[ended("ses_2", until=1e9 + 50)]))
        assert snapshot.digest(at=1e9 + 10) == other.digest()


class TestStore:
    def store(self, snapshot: Snapshot, folder: Path, source: str = "http://api", delay: float = 0.01) -> SnapshotStore:
        return SnapshotStore(snapshot, folder, source=source, delay=delay)

    async def saved(self, folder: Path) -> Snapshot:
        snapshot = Snapshot(wall=lambda: 1e9)
        store = self.store(snapshot, folder)
        snapshot.apply(whole(8, row("tun_a", "a.localhost"), ends=[ended("ses_1"), ended("old", until=1.0)]))
        assert await store.save()
        return snapshot

    async def test_a_restart_knows_keys_hosts_and_ended_sessions(self, tmp_path: Path) -> None:
        before = await self.saved(tmp_path)
        after = Snapshot(wall=lambda: 1e9)
        assert self.store(after, tmp_path).load()
        assert (after.version, after.digest()) == (8, before.digest())
        assert after.tunnel_for_host("a.localhost") is not None
        assert after.ended("ses_1") is not None and after.ended("old") is None
        assert KEY["kid"] in after.keys

    async def test_it_is_private(self, tmp_path: Path) -> None:
        await self.saved(tmp_path)
        (file,) = tmp_path.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    async def test_nothing_there_is_not_an_error(self, tmp_path: Path) -> None:
        assert not self.store(Snapshot(), tmp_path).load()

    @pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "garbage"])
    async def test_a_damaged_file_is_left_out(
        self, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        await self.saved(tmp_path)
        path = tmp_path / SnapshotStore.FILE
        good = path.read_bytes()
        path.write_bytes(
            {
                "torn": good[: len(good) // 2],
                "flipped": good.replace(b"a.localhost", b"b.localhost"),
                "empty": b"",
                "garbage": b"\x00\xff\n{",
            }[damage]
        )
        after = Snapshot()
        assert not self.store(after, tmp_path).load()
        assert after.version is None
        assert "cannot be used" in caplog.text

    async def test_the_state_of_another_control_plane_is_not_used(self, tmp_path: Path) -> None:
        await self.saved(tmp_path)
        after = Snapshot()
        assert not self.store(after, tmp_path, source="http://elsewhere").load()
        assert after.version is None

    async def test_changes_are_written_a_moment_later_and_together(self, tmp_path: Path) -> None:
        snapshot = Snapshot(wall=lambda: 1e9)
        store = self.store(snapshot, tmp_path, delay=0.05)
        writes: list[int] = []
        write = store._write
        store._write = lambda frozen: (writes.append(frozen.version), write(frozen))[1]  # type: ignore[method-assign]
        task = asyncio.create_task(store.run())
        snapshot.apply(whole(1, row("tun_a")))
        for version in range(2, 30):
            snapshot.apply(delta(version, put(row("tun_a", generation=version))))
        async with asyncio.timeout(30):
            while not (tmp_path / SnapshotStore.FILE).exists():
                await asyncio.sleep(0.01)
        task.cancel()
        assert writes == [29]

    async def test_a_folder_that_refuses_is_reported_once_and_tried_again(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "state"
        snapshot = Snapshot(wall=lambda: 1e9)
        store = self.store(snapshot, folder)
        snapshot.apply(whole(1))
        assert not await store.save()
        assert not await store.save()
        assert caplog.text.count("cannot be saved") == 1
        folder.mkdir()
        await store.close()
        assert (folder / SnapshotStore.FILE).exists()
