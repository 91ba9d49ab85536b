from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from portico.relay import control_link, meter, spool
from portico.relay.control_link import LinkLost, LinkRefused
from portico.relay.meter import Meter
from portico.relay.spool import FIELDS
from portico.settings import RelaySettings, Secret

from .edge_api import Answer, EdgeApi


class Ledger:
    """The control plane's side: counts each (relay, boot, number) once, whatever is sent again."""

    def __init__(self, api: EdgeApi) -> None:
        self.seen: set[tuple[str, str, int]] = set()
        self.totals: Counter[tuple[str, str]] = Counter()
        self.before: Callable[[], Answer | None] = lambda: None
        self.lose_answers = 0
        api.on_usage = self.take

    async def take(self, report: dict[str, Any]) -> Answer:
        refused = self.before()
        if refused is not None:
            return refused
        for batch in report["batches"]:
            key = (report["relay"], report["boot"], batch["seq"])
            if key not in self.seen:
                self.seen.add(key)
                for row in batch["rows"]:
                    self.totals.update({(row["tunnel"], field): row[field] for field in FIELDS})
        if self.lose_answers:
            self.lose_answers -= 1
            return 500, b"counted, but the answer is lost"
        return 200, json.dumps({"acknowledged": report["batches"][-1]["seq"]}).encode()


@pytest.fixture
async def api() -> AsyncIterator[EdgeApi]:
    api = EdgeApi()
    await api.start()
    yield api
    await api.stop()


@pytest.fixture
def ledger(api: EdgeApi) -> Ledger:
    return Ledger(api)


@pytest.fixture
def make(api: EdgeApi, tmp_path: Path) -> Any:
    @asynccontextmanager
    async def run(**limits: Any) -> AsyncIterator[Meter]:
        limits = {"usage_interval_seconds": 0.05, "usage_backoff_max_seconds": 0.2, "state_dir": tmp_path, **limits}
        settings = RelaySettings(relay_key=Secret("tnl_rly_x"), api_url=api.url, **limits)
        async with control_link.client(settings) as http:
            yield Meter(settings, http=http)

    return run


def down() -> Answer | None:
    return 503, b"down"


def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "usage"
    return sorted(folder.iterdir()) if folder.exists() else []


class TestCounters:
    async def test_only_differences_and_only_of_tunnels_that_were_used(self, make: Any, api: EdgeApi) -> None:
        Ledger(api)
        async with make() as m:
            one, _idle = m.counters("tun_a", "org_1"), m.counters("tun_b", "org_1")
            one.requests += 2
            one.bytes_in += 10
            await m.collect()
            await m.collect()
            one.requests += 1
            one.connections += 1
            one.bytes_out += 7
            one.errors += 1
            await m.collect()
            while await m.send_one():
                pass
            assert m.totals() == {"requests": 3, "connections": 1, "bytes_in": 10, "bytes_out": 7, "errors": 1}
        (report,) = api.usage
        assert (report["relay"], report["boot"]) == ("relay-1", m.boot)
        assert [batch["seq"] for batch in report["batches"]] == [1, 2]
        assert all(batch["from"] <= batch["to"] for batch in report["batches"])
        zero = dict.fromkeys(FIELDS, 0)
        assert report["batches"][0]["rows"] == [
            {"tunnel": "tun_a", "organization": "org_1", **zero, "requests": 2, "bytes_in": 10}
        ]
        assert report["batches"][1]["rows"][0]["bytes_out"] == 7

    async def test_they_are_shared_by_binds_and_forgotten_long_after_the_last(self, tmp_path: Path) -> None:
        now = 0.0
        settings = RelaySettings(relay_key=Secret("x"), state_dir=tmp_path)
        async with control_link.client(settings) as http:
            m = Meter(settings, http=http, monotonic=lambda: now)
            first = m.counters("tun_a", "org_1")
            assert m.counters("tun_a", "org_1") is first
            assert m.counters("tun_a", "org_2") is not first
            m.release(first)
            now = 4000.0
            await m.collect()
            assert m.counters("tun_a", "org_1") is first  # one bind was left
            for _ in range(2):
                m.release(first)
            first.bytes_out += 5  # a stream still under way
            await m.collect()
            await m.collect()
            now = 8000.0
            await m.collect()
            assert m.counters("tun_a", "org_1") is not first

    async def test_many_tunnels_become_batches_of_a_bounded_size(
        self, make: Any, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(meter, "BATCH_MAX_ROWS", 10)
        async with make() as m:
            for i in range(25):
                m.counters(f"tun_{i}", "org_1").requests += 1
            await m.collect()
            while await m.send_one():
                pass
        assert len(ledger.seen) == 3 and sum(ledger.totals.values()) == 25


class TestSending:
    async def test_traffic_arrives_and_nothing_stays_behind(self, make: Any, ledger: Ledger, tmp_path: Path) -> None:
        async with make() as m:
            task = asyncio.create_task(m.run())
            counters = m.counters("tun_a", "org_1")
            for _ in range(20):
                counters.requests += 1
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert len(ledger.seen) >= 2
            counters.requests += 1
            await m.close()
        assert ledger.totals["tun_a", "requests"] == 21
        assert files(tmp_path) == []

    async def test_a_lost_answer_is_sent_again_under_the_same_number(self, make: Any, ledger: Ledger) -> None:
        ledger.lose_answers = 3
        async with make() as m:
            task = asyncio.create_task(m.run())
            m.counters("tun_a", "org_1").bytes_in += 99
            async with asyncio.timeout(30):
                while not ledger.seen or m._own.live:
                    await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert ledger.totals["tun_a", "bytes_in"] == 99 and len(ledger.seen) == 1

    async def test_an_outage_delays_and_loses_nothing(
        self, make: Any, ledger: Ledger, caplog: pytest.LogCaptureFixture
    ) -> None:
        ledger.before = down
        async with make(usage_post_max_batches=2) as m:
            task = asyncio.create_task(m.run())
            counters = m.counters("tun_a", "org_1")
            for _ in range(8):
                counters.requests += 1
                await asyncio.sleep(0.06)
            assert not ledger.seen
            ledger.before = lambda: None
            async with asyncio.timeout(30):
                while ledger.totals["tun_a", "requests"] < 8:
                    await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert ledger.totals["tun_a", "requests"] == 8
        assert caplog.text.count("cannot be reported") == 1

    async def test_reports_stay_below_their_limits(self, make: Any, ledger: Ledger, api: EdgeApi) -> None:
        async with make(usage_post_max_batches=3, usage_post_max_bytes=400) as m:
            counters = m.counters("tun_a", "org_1")
            for _ in range(7):
                counters.requests += 1
                await m.collect()
            while await m.send_one():
                pass
        sizes = [len(report["batches"]) for report in api.usage]
        assert sum(sizes) == 7 and max(sizes) <= 3
        assert all(len(json.dumps(report)) < 600 for report in api.usage)

    @pytest.mark.parametrize(
        "answer",
        [b"", b"[]", b"null", b'{"acknowledged":"1"}', b'{"acknowledged":true}', b'{"acknowledged":0}', b"\xff"],
    )
    async def test_an_answer_without_acknowledgement_keeps_the_batch(
        self, make: Any, ledger: Ledger, answer: bytes
    ) -> None:
        ledger.before = lambda: (200, answer)
        async with make() as m:
            m.counters("tun_a", "org_1").requests += 1
            await m.collect()
            with pytest.raises(LinkLost):
                await m.send_one()
            assert len(m._own.live) == 1

    async def test_an_acknowledgement_beyond_what_was_sent_is_not_believed(self, make: Any, ledger: Ledger) -> None:
        ledger.before = lambda: (200, b'{"acknowledged":999}')
        async with make(usage_post_max_batches=1) as m:
            for _ in range(2):
                m.counters("tun_a", "org_1").requests += 1
                await m.collect()
            await m.send_one()
            assert [item.seq for item in m._own.live] == [2]

    async def test_a_refused_key_is_named(self, make: Any, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
        ledger.before = lambda: (401, b'{"code":"auth.key_revoked","detail":"revoked"}')
        async with make(edge_refused_seconds=0.05) as m:
            m.counters("tun_a", "org_1").requests += 1
            task = asyncio.create_task(m.run())
            async with asyncio.timeout(30):
                while "refuses this relay's usage reports" not in caplog.text:
                    await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            with pytest.raises(LinkRefused):
                await m.send_one()


class TestRestart:
    async def test_what_a_process_left_is_sent_by_the_next_under_its_own_boot(
        self, make: Any, ledger: Ledger, api: EdgeApi, tmp_path: Path
    ) -> None:
        ledger.before = down
        async with make() as old:
            old.counters("tun_a", "org_1").requests += 3
            await old.close()
        (left,) = files(tmp_path)
        assert left.name == f"{old.boot}.spool" and stat.S_IMODE(left.stat().st_mode) == 0o600
        ledger.before = lambda: None
        async with make() as new:
            task = asyncio.create_task(new.run())
            await api.until(lambda: ledger.totals["tun_a", "requests"] == 3)
            await api.until(lambda: files(tmp_path) == [])
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert ledger.seen == {("relay-1", old.boot, 1)}

    async def test_counted_but_not_acknowledged_before_the_crash_is_not_counted_twice(
        self, make: Any, ledger: Ledger, tmp_path: Path
    ) -> None:
        ledger.lose_answers = 1
        async with make() as old:
            old.counters("tun_a", "org_1").requests += 3
            await old.collect()
            with pytest.raises(LinkLost):
                await old.send_one()
            old._own.close()  # what the kernel does when a process dies
        async with make() as new:
            new._left = spool.Spool.adopt_all(tmp_path / "usage")
            while await new.send_one():
                pass
            await new.close()
        assert ledger.totals["tun_a", "requests"] == 3 and files(tmp_path) == []

    async def test_a_living_process_keeps_its_file(self, make: Any, ledger: Ledger, tmp_path: Path) -> None:
        async with make() as one:
            one.counters("tun_a", "org_1").requests += 1
            await one.collect()
            assert spool.Spool.adopt_all(tmp_path / "usage") == []
            one._own.rewrite(one._own.live)  # a new inode: locked before it took the name
            assert spool.Spool.adopt_all(tmp_path / "usage") == []

    @pytest.mark.parametrize("tail", [b"0", b'deadbeef {"seq":9', b'00000000 {"seq":9,"rows":[]}\n', b"\xff\x00\n"])
    async def test_a_torn_or_damaged_tail_costs_only_itself(self, make: Any, tmp_path: Path, tail: bytes) -> None:
        async with make() as m:
            for _ in range(3):
                m.counters("tun_a", "org_1").requests += 1
                await m.collect()
            m._own.close()
        (path,) = files(tmp_path)
        with path.open("ab") as file:
            file.write(tail)
        (found,) = spool.Spool.adopt_all(tmp_path / "usage")
        assert [item.seq for item in found.live] == [1, 2, 3]
        found.close()

    async def test_a_file_without_a_sound_batch_is_removed(self, tmp_path: Path) -> None:
        folder = tmp_path / "usage"
        folder.mkdir()
        (folder / "feed.spool").write_bytes(b"torn")
        assert spool.Spool.adopt_all(folder) == [] and files(tmp_path) == []

    def test_kill_9_loses_one_interval_at_most(self, tmp_path: Path) -> None:
        program = """
import asyncio, sys, httpx
from pathlib import Path
from portico.relay.meter import Meter
from portico.settings import RelaySettings, Secret

async def main():
    settings = RelaySettings(relay_key=Secret("x"), api_url="http://127.0.0.1:9", state_dir=Path(sys.argv[1]),
                             usage_interval_seconds=0.1)
    meter = Meter(settings, http=httpx.AsyncClient(base_url="http://127.0.0.1:9", trust_env=False))
    counters = meter.counters("tun_a", "org_1")
    collect = meter.collect
    async def told():
        durable = counters.requests
        await collect()
        print(durable, flush=True)
    meter.collect = told
    asyncio.get_running_loop().create_task(meter.run())
    while True:
        counters.requests += 1
        await asyncio.sleep(0.001)

asyncio.run(main())
"""
        child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        durable = [int(child.stdout.readline()) for _ in range(4)][-1]
        child.send_signal(signal.SIGKILL)
        child.wait()
        (left,) = spool.Spool.adopt_all(tmp_path / "usage")
        _, _, (row,) = spool.merged_rows(left.live)
        left.close()
        assert row["requests"] >= durable > 0
        assert [item.seq for item in left.live] == list(range(1, len(left.live) + 1))


class TestBounds:
    async def test_a_full_spool_merges_and_keeps_the_totals(self, make: Any, ledger: Ledger, tmp_path: Path) -> None:
        ledger.before = down
        async with make(usage_spool_max_bytes=5000, usage_post_max_batches=2) as m:
            sent = m.counters("tun_a", "org_1")
            sent.requests += 1
            await m.collect()
            with pytest.raises(LinkLost):
                await m.send_one()  # number 1 may have been received: it stays as it is
            for i in range(300):
                sent.requests += 1
                m.counters(f"tun_{i % 3}", "org_1").bytes_out += 5
                await m.collect()
            (path,) = files(tmp_path)
            assert path.stat().st_size < 8000
            assert m._own.live[0].seq == 1
            ledger.before = lambda: None
            while await m.send_one():
                pass
            await m.close()
        assert ledger.totals["tun_a", "requests"] == 301
        assert sum(ledger.totals[f"tun_{i}", "bytes_out"] for i in range(3)) == 1500
        assert files(tmp_path) == []

    async def test_merged_batches_survive_a_crash_with_the_same_totals(
        self, make: Any, ledger: Ledger, tmp_path: Path
    ) -> None:
        async with make(usage_spool_max_bytes=1000) as m:
            for _ in range(60):
                m.counters("tun_a", "org_1").requests += 1
                await m.collect()
            m._own.close()
        async with make() as new:
            new._left = spool.Spool.adopt_all(tmp_path / "usage")
            while await new.send_one():
                pass
        assert ledger.totals["tun_a", "requests"] == 60

    async def test_acknowledged_lines_give_their_room_back(self, make: Any, ledger: Ledger, tmp_path: Path) -> None:
        async with make(usage_spool_max_bytes=400, usage_post_max_batches=1) as m:
            for _ in range(6):
                m.counters("tun_a", "org_1").requests += 1
                await m.collect()
                m._own.group(99, 10**9)  # as if sent, so that nothing is merged
            (path,) = files(tmp_path)
            full = path.stat().st_size
            for _ in range(5):
                await m.send_one()
            assert 0 < path.stat().st_size <= full / 2
            await m.send_one()
            assert path.stat().st_size == 0
        assert ledger.totals["tun_a", "requests"] == 6


class TestFullDisk:
    @pytest.fixture
    def disk(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A disk that takes a part of a write and then refuses, while ``full``."""

        class Disk:
            full = False

        real = os.write

        def write(fd: int, data: Any) -> int:
            if Disk.full:
                if len(data) > 20:
                    return real(fd, bytes(data)[:20])
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, data)

        monkeypatch.setattr("portico.relay.statefiles.os.write", write)
        return Disk

    async def test_it_waits_in_memory_and_is_stored_when_there_is_room(
        self, make: Any, disk: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with make() as m:
            counters = m.counters("tun_a", "org_1")
            counters.requests += 1
            await m.collect()
            disk.full = True
            for _ in range(3):
                counters.requests += 1
                await m.collect()
            assert caplog.text.count("cannot be saved") == 1
            disk.full = False
            await m.collect()
            m._own.close()
        (found,) = spool.Spool.adopt_all(tmp_path / "usage")
        assert [item.seq for item in found.live] == [1, 2, 3, 4]
        found.close()

    async def test_it_is_sent_from_memory_meanwhile(self, make: Any, disk: Any, ledger: Ledger) -> None:
        disk.full = True
        async with make() as m:
            m.counters("tun_a", "org_1").requests += 4
            await m.collect()
            while await m.send_one():
                pass
        assert ledger.totals["tun_a", "requests"] == 4

    async def test_memory_is_bounded_by_merging(self, make: Any, disk: Any, ledger: Ledger) -> None:
        disk.full = True
        async with make(usage_spool_max_bytes=1000) as m:
            for _ in range(100):
                m.counters("tun_a", "org_1").requests += 1
                await m.collect()
            assert m._own.size() < 2000
            while await m.send_one():
                pass
        assert ledger.totals["tun_a", "requests"] == 100

    async def test_a_folder_that_cannot_be_made_stops_nothing(self, make: Any, ledger: Ledger, tmp_path: Path) -> None:
        (tmp_path / "usage").write_text("in the way")
        async with make() as m:
            task = asyncio.create_task(m.run())
            m.counters("tun_a", "org_1").requests += 4
            async with asyncio.timeout(30):
                while ledger.totals["tun_a", "requests"] < 4:
                    await asyncio.sleep(0.01)
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
