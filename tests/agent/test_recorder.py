"""What is recorded of requests, served by a real forwarder from real targets."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from portico.agent.recorder import Entry, Recorder, head_bytes
from portico.agent.target import Target
from portico.settings import AgentSettings
from portico.wire import frames as f
from tests.agent.harness import answering, read_head, target_server
from tests.agent.inspecting import Inspected, inspected
from tests.agent.test_forward import OK, echo, local


def recorder(**settings: int) -> Recorder:
    return Recorder(AgentSettings(**settings), "run")  # type: ignore[arg-type]


def record(ring: Recorder, body: bytes = b"ok", path: bytes = b"/", end: bool = True) -> Entry:
    entry = ring.tap(None, "http://localhost:1").begin(head_bytes([b"GET", path, b"Host", b"h"]), f.F_END, 1.0)
    entry.answer(200, f.encode_response(200, [b"OK", b"Content-Length", b"%d" % len(body)]))
    entry.response_data(body)
    if end:
        entry.finish(200)
    return entry


class TestRing:
    def test_the_oldest_make_room_in_bytes(self) -> None:
        ring = recorder(inspect_max_bytes=100_000)
        for number in range(2000):
            record(ring, b"x" * (number % 300), b"/%d" % number)
            assert ring.bytes <= 100_000
        assert ring.evicted + len(ring.entries) == ring.last == 2000
        assert ring.bytes == sum(entry.size for entry in ring.entries) > 90_000
        assert [e.line()[1] for e in ring.newest()][:2] == [b"/1999", b"/1998"]
        assert ring.find(1) is None and ring.find(2000) is ring.entries[-1]
        assert ring.find(ring.entries[0].seq) is ring.entries[0]
        assert next(ring.newest(before=1990)).seq == 1989

    def test_bodies_count(self) -> None:
        ring = recorder(inspect_max_bytes=1_000_000)
        for _ in range(40):
            record(ring, b"x" * 65_536)
        assert len(ring.entries) == 14 and ring.bytes <= 1_000_000

    def test_what_runs_stays_listed_without_its_body(self) -> None:
        ring = recorder(inspect_max_bytes=50_000)
        running = record(ring, b"x" * 10_000, b"/events", end=False)
        for _ in range(200):
            record(ring, b"y" * 1000)
        assert ring.find(running.seq) is running and running in list(ring.newest())
        before = ring.bytes
        running.response_data(b"z" * 500)
        running.request_data(b"z" * 500)
        assert (running.received, running.more.sent, running.response_body) == (10_500, 500, None)
        assert ring.bytes == before
        running.finish(200)
        assert ring.find(running.seq) is None and running not in list(ring.newest())
        assert ring.bytes == before == sum(entry.size for entry in ring.entries)

    def test_whole_answers_are_entries_like_the_others(self) -> None:
        ring = recorder(inspect_max_bytes=100_000)
        tap = ring.tap(None, "http://localhost:1")
        out = head_bytes([b"GET", b"/a", b"Host", b"h"])
        head = f.encode_answer(f.encode_response(201, [b"Made", b"X-A", b"1"]))
        for _ in range(500):
            record(ring)
            tap.whole(out, time.perf_counter(), time.perf_counter(), 201, head, b"ok")
            assert ring.bytes <= 100_000
        entry = ring.find(ring.last)
        assert entry is not None and entry.seq == ring.last == 1000 and entry.complete
        assert (entry.line(), entry.status, entry.response_body, entry.received) == ((b"GET", b"/a"), 201, b"ok", 2)
        assert entry.answer_head() == [b"Made", b"X-A", b"1"] and entry.started <= entry.ended
        assert [e.seq for e in ring.newest()][:3] == [1000, 999, 998] and ring.evicted + len(ring.entries) == 1000
        ring.clear()
        assert ring.bytes == 0 and list(ring.newest()) == []

    def test_a_tunnel_that_is_gone_leaves_nothing(self) -> None:
        import gc
        import weakref

        class Serves:
            tap: Any = None

            def reveal(self) -> None:
                raise AssertionError("it is gone")

        ring, serves = recorder(), Serves()
        serves.tap = ring.tap(serves, "http://localhost:1")
        gone = weakref.ref(serves)
        del serves
        gc.collect()
        assert gone() is None and list(ring.newest()) == []

    def test_what_runs_is_found_without_making_entries_of_the_rest(self) -> None:
        ring = recorder()
        first, last = record(ring, end=False), None
        for _ in range(10):
            ring.tap(None, "").whole(
                b"GET / HTTP/1.1\r\n\r\n", 1.0, 2.0, 200, f.encode_answer(f.encode_response(200, [b"OK"])), b""
            )
            last = record(ring, end=False)
            record(ring)
            last.finish(200)
        second = record(ring, end=False)
        assert ring.running() == [first, second]

    def test_clear_keeps_what_runs(self) -> None:
        ring = recorder()
        running = record(ring, end=False)
        record(ring)
        ring.clear()
        assert list(ring.newest()) == [running] and ring.clears == 1
        running.finish(200)
        assert ring.bytes == running.size

    def test_wall_clock_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ring = recorder()
        then, wall = time.perf_counter(), time.time()
        assert ring.wall(then) == pytest.approx(wall, abs=0.05)
        monkeypatch.setattr(time, "time", lambda real=time.time: real() + 3600)
        ring.note_clock()
        assert ring.wall(then) == pytest.approx(wall, abs=0.05)
        assert ring.wall(time.perf_counter()) == pytest.approx(wall + 3600, abs=0.5)

    def test_chunks_are_joined_up_to_the_limit(self) -> None:
        ring = recorder(inspect_body_max_bytes=1000)
        entry = record(ring, b"a" * 300, end=False)
        shared = bytearray(b"b" * 600)
        entry.response_data(memoryview(shared))
        shared[:] = b"?" * 600
        entry.response_data(b"c" * 600)
        entry.finish(200)
        assert entry.response_body == b"a" * 300 + b"b" * 600 + b"c" * 100
        assert entry.received == 1500 and ring.bytes == entry.size
        large = record(ring, b"d" * 5000)
        assert (large.response_body, large.received) == (b"d" * 1000, 5000)


async def served(handler: Any, act: Any, **options: Any) -> None:
    async with target_server(handler) as port, inspected(local(port), **options) as tunnel:
        await act(tunnel)


class TestForwarded:
    async def test_a_request_and_its_answer(self) -> None:
        answer = b"HTTP/1.1 201 Made\r\nContent-Length: 2\r\nX-A: 1\r\nX-A: 2\r\n\r\nok"

        async def act(tunnel: Inspected) -> None:
            for _ in range(2):  # the second takes the hot path: an idle connection
                await tunnel.get(b"/a?b=c", b"X-B", b"1").over()
                entry = await tunnel.ended()
                assert entry.head() == [b"GET", b"/a?b=c", b"Host", b"web.localhost", b"X-B", b"1"]
                assert entry.answer_head() == [b"Made", b"Content-Length", b"2", b"X-A", b"1", b"X-A", b"2"]
                assert (entry.status, entry.response_body, entry.received, entry.complete) == (201, b"ok", 2, True)
                assert entry.started < entry.answered <= entry.ended
            assert [e.seq for e in tunnel.recorder.newest()] == [2, 1]

        await served(answering(answer), act)

    async def test_usual_requests_take_the_short_way_and_are_kept_like_the_others(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                path = (await read_head(reader)).split(b" ")[1]
                if path == b"/slow":
                    await asyncio.sleep(60)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n%b" % path[-2:])

        async def act(tunnel: Inspected) -> None:
            for number in range(20):
                visit = await tunnel.get(b"/%02d" % number, b"X-Request-Id", b"r%d" % number).over()
                assert bytes(visit.body) == b"%02d" % number
            await tunnel.ended()
            assert any(isinstance(one, tuple) for one in tunnel.recorder.entries), "none took the short way"
            rows = (await tunnel.json("/api/requests"))["requests"]
            assert [row["path"] for row in rows] == [f"/{number:02}" for number in reversed(range(20))]
            document = await tunnel.json(f"/api/requests/{rows[0]['id']}")
            assert document["request"]["headers"] == [["Host", "web.localhost"], ["X-Request-Id", "r19"]]
            assert document["response"]["headers"] == [["Content-Type", "text/plain"], ["Content-Length", "2"]]
            assert document["response"]["body"]["text"] == "19" and document["response"]["reason"] == "OK"
            made = (await tunnel.web.post(f"/api/requests/{rows[3]['id']}/replay")).json()
            assert (made["path"], made["status"], made["replay_of"]) == ("/16", 200, rows[3]["id"])
            tunnel.get(b"/slow", b"X-Request-Id", b"r20")
            await tunnel.until(lambda: tunnel.serves.stats.open == 1)
            row = (await tunnel.json("/api/requests", params={"status": "running"}))["requests"][0]
            assert (row["path"], row["state"]) == ("/slow", "running")

        async with target_server(handler) as port, inspected(local(port), answers=True) as tunnel:
            await act(tunnel)

    @pytest.mark.parametrize("size", [10, 5000, 200_000])
    @pytest.mark.parametrize("known", [True, False])
    async def test_bodies_both_ways(self, size: int, known: bool) -> None:
        body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)

        async def act(tunnel: Inspected) -> None:
            length = [b"Content-Length", b"%d" % size] if known else []
            visit = tunnel.request([b"POST", b"/", b"Host", b"h", *length], end=False)
            await visit.send(body, end=True)
            await visit.over()
            entry = await tunnel.ended()
            assert entry.more.request_body == body[:65_536] and entry.more.sent == size
            assert entry.response_body == body[:65_536] and entry.received == size
            assert entry.complete == (size <= 65_536)

        await served(echo, act)

    async def test_trailers_and_interim_answers(self) -> None:
        answer = (
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nok\r\n0\r\nX-Sum: 42\r\n\r\n"
        )

        async def act(tunnel: Inspected) -> None:
            visit = tunnel.request([b"POST", b"/", b"Host", b"h"], end=False)
            await visit.send(b"body")
            visit.stream.send_end([b"X-Up", b"1"])
            await visit.over()
            entry = await tunnel.ended()
            assert entry.more.interim == [(103, [b"Early Hints", b"Link", b"</a>"])]
            assert (entry.more.request_trailers, entry.more.response_trailers) == ([b"X-Up", b"1"], [b"X-Sum", b"42"])
            document = await tunnel.detail()
            assert document["interim"] == [{"status": 103, "headers": [["Link", "</a>"]]}]
            assert (
                document["response"]["trailers"] == [["X-Sum", "42"]] and document["response"]["body"]["text"] == "ok"
            )

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"0\r\nX-Up: 1\r\n\r\n")
            writer.write(answer)
            await reader.read()

        await served(handler, act)

    async def test_head_has_no_body(self) -> None:
        async def act(tunnel: Inspected) -> None:
            await tunnel.get(method=b"HEAD").over()
            entry = await tunnel.ended()
            assert (entry.status, entry.received, entry.response_body) == (200, 0, None)
            assert entry.answer_head() == [b"OK", b"Content-Length", b"2"]

        await served(answering(OK.removesuffix(b"ok")), act)

    async def test_pipelined_by_the_visitor(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                path = (await read_head(reader)).split(b" ")[1]
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(path), path))

        async def act(tunnel: Inspected) -> None:
            visits = [tunnel.get(b"/%d" % n) for n in range(50)]
            for visit in visits:
                await visit.over()
            assert sorted(e.line()[1] for e in tunnel.recorder.entries) == sorted(b"/%d" % n for n in range(50))
            assert all(e.response_body == e.line()[1] for e in tunnel.recorder.entries)

        await served(handler, act)

    async def test_failures_say_why(self) -> None:
        async def act(tunnel: Inspected) -> None:
            await tunnel.get().over()
            entry = await tunnel.ended()
            assert entry.status == 502 and "without an answer" in entry.more.failure
            row = (await tunnel.json("/api/requests"))["requests"][0]
            assert (row["state"], row["status"]) == ("failed", 502) and "without an answer" in row["failure"]
            bad = tunnel.request([b"GET", b"/", b"Host", b"h", b"Content-Length", b"x"])
            await bad.over()
            assert "Content-Length" in (await tunnel.ended()).more.failure

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)

        await served(handler, act)

    async def test_a_refused_connection(self) -> None:
        async with inspected(Target("tcp", "127.0.0.1", 1)) as tunnel:
            await tunnel.get().over()
            assert "nothing listens" in (await tunnel.ended()).more.failure

    async def test_an_answer_that_breaks_off(self) -> None:
        async def act(tunnel: Inspected) -> None:
            await tunnel.get().over()
            entry = await tunnel.ended()
            assert (entry.status, entry.response_body) == (200, b"part")
            assert "in the middle" in entry.more.failure

        await served(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\npart", close=True), act)

    async def test_a_visitor_that_leaves(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\ndata: 1\n\n")
            await reader.read()

        async def act(tunnel: Inspected) -> None:
            visit = tunnel.get()
            await visit.until(lambda: visit.body)
            visit.stream.reset(f.CANCELLED, "the visitor left")
            entry = await tunnel.ended()
            row = (await tunnel.json("/api/requests"))["requests"][0]
            assert (row["state"], row["status"], row["kind"]) == ("aborted", 200, "events")
            assert row["failure"] == "the visitor left" and entry.response_body == b"data: 1\n\n"

        await served(handler, act)

    async def test_events_show_while_they_run(self) -> None:
        go = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(b"9\r\ndata: 1\n\n\r\n")
            await go.wait()
            writer.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")
            await reader.read()

        async def act(tunnel: Inspected) -> None:
            visit = tunnel.get()
            await visit.until(lambda: visit.body)
            document = await tunnel.detail()
            assert (document["state"], document["kind"]) == ("running", "events")
            assert document["response"]["body"]["text"] == "data: 1\n\n"
            go.set()
            await visit.over()
            await tunnel.ended()
            document = await tunnel.detail()
            assert document["state"] == "done" and document["response"]["body"]["text"] == "data: 1\n\ndata: 2\n\n"

        await served(handler, act)

    async def test_an_upgrade_and_what_passes_then(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n\x81\x02hi"
            )
            while data := await reader.read(65_536):
                writer.write(data)

        async def act(tunnel: Inspected) -> None:
            head = [b"GET", b"/ws", b"Host", b"h", b"Upgrade", b"websocket"]
            visit = tunnel.request(head, flags=f.F_UPGRADE, end=False)
            await visit.send(b"\x81\x05early")
            await visit.until(lambda: visit.body == b"\x81\x02hi\x81\x05early")
            document = await tunnel.detail()
            assert document["request"]["messages"] == [{"type": "text", "bytes": 5, "text": "early"}]
            assert [message["text"] for message in document["response"]["messages"]] == ["hi", "early"]
            row = (await tunnel.json("/api/requests"))["requests"][0]
            assert (row["state"], row["status"], row["kind"]) == ("running", 101, "websocket")
            assert (row["request_bytes"], row["response_bytes"]) == (7, 11)
            await visit.send(b"x" * 100_000)
            await visit.until(lambda: len(visit.body) == 100_011)
            entry = tunnel.entry()
            assert entry.more.sent == 100_007 and len(entry.more.request_body or b"") == 65_536
            assert entry.received == 100_011 and len(entry.response_body or b"") == 65_536 and not entry.ended
            visit.stream.send_end()
            await visit.over()
            assert (await tunnel.ended()).status == 101
            assert tunnel.recorder.bytes == entry.size

        await served(handler, act)


class TestFolder:
    async def test_requests_for_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"x" * 100_000)
        async with inspected(Target("file", path=str(tmp_path))) as tunnel:
            await tunnel.get(b"/a.txt").over()
            entry = await tunnel.ended()
            assert (entry.status, entry.received, entry.complete) == (200, 100_000, True)
            assert entry.response_body == b"x" * 65_536 and b"ETag" in entry.answer_head()
            visit = tunnel.request([b"PUT", b"/a.txt", b"Host", b"h"], end=False)
            await visit.send(b"new", end=True)
            await visit.over()
            entry = await tunnel.ended()
            assert (entry.status, entry.more.request_body) == (405, b"new")

    async def test_a_visitor_that_leaves_before_the_work_began(self, tmp_path: Path) -> None:
        async with inspected(Target("file", path=str(tmp_path))) as tunnel:
            visit = tunnel.get(b"/")
            visit.stream.reset(f.CANCELLED, "gone")
            await tunnel.until(lambda: tunnel.recorder.last)
            assert (await tunnel.ended()).status in (499, 200)


class TestUnix:
    async def test_a_socket_as_target(self, tmp_path: Path) -> None:
        path = str(tmp_path / "s")
        server = await asyncio.start_unix_server(answering(OK), path)
        async with inspected(Target("unix", path=path)) as tunnel:
            await tunnel.get().over()
            await tunnel.ended()
            again = (await tunnel.replay()).json()
            assert again["status"] == 200 and again["target"] == f"unix:{path}"
        server.close()
