"""The local page of a running command: where it is, who may switch it off, and what scripts for ngrok find there."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import httpx

from tests.agent.harness import Relay, answering, target_server
from tests.agent.test_forward import OK
from tests.cli.commands import Cli
from tests.ports import free_port
from tests.system.memory import MIB, MemoryWatch, resident


async def first_event(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 30)
    assert line, (await process.communicate())[1]
    return json.loads(line)


async def end(process: asyncio.subprocess.Process) -> str:
    process.send_signal(signal.SIGTERM)
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    return err.decode()


async def test_the_page_of_a_command(cli: Cli, relay: Relay) -> None:
    await cli.login()
    async with target_server(answering(OK)) as port:
        process = await cli.start("http", str(port), "--name", "web", "--json")
        url = (await first_event(process))["inspector"]
        assert url.startswith("http://127.0.0.1:")
        await relay.connections[0].get(b"/hello").over()
        async with httpx.AsyncClient(base_url=url, trust_env=False) as web:
            # The members that pyngrok and scripts for ngrok read.
            (tunnel,) = (await web.get("/api/tunnels")).json()["tunnels"]
            assert tunnel["name"] == "web" and tunnel["public_url"] == "http://web.localhost:7080"
            assert tunnel["proto"] == "http" and tunnel["config"] == {
                "addr": f"http://localhost:{port}",
                "inspect": True,
            }
            (row,) = (await web.get("/api/requests")).json()["requests"]
            assert (row["tunnel"], row["path"], row["status"]) == ("web", "/hello", 200)
            status = (await web.get("/api/status")).json()
            assert status["status"] == "online" and status["session"]["relay"] == "test"
            assert status["metrics"]["http"]["count"] == 1 and status["version"]
            made = (await web.post(f"/api/requests/{row['id']}/replay")).json()
            assert (made["status"], made["replay_of"]) == (200, row["id"])
            page = (await web.get("/")).text
            assert "/hello" in page and "http://web.localhost:7080" in page
        await end(process)


async def test_two_commands_have_two_pages(cli: Cli, relay: Relay) -> None:
    await cli.login()
    port = free_port()
    address = f"127.0.0.1:{port}"
    first = await cli.start("http", "8000", "--json", PORTICO_WEB_ADDR=address)
    assert (await first_event(first))["inspector"] == f"http://{address}"
    second = await cli.start("http", "8001", "--json", PORTICO_WEB_ADDR=address)
    other = (await first_event(second))["inspector"]
    assert other != f"http://{address}" and int(other.rpartition(":")[2]) > port
    await end(first)
    await end(second)


async def test_memory_stays_within_the_limit(cli: Cli, relay: Relay) -> None:
    await cli.login()
    body = bytes(range(256)) * 40
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with target_server(answering(answer)) as port:
        process = await cli.start("http", str(port), "--json", PORTICO_INSPECT_MAX_BYTES=str(8 * MIB))
        url = (await first_event(process))["inspector"]
        connection = relay.connections[0]

        async def pass_through(requests: int) -> None:
            for _ in range(requests // 50):
                for visit in [connection.get(b"/x") for _ in range(50)]:
                    await visit.over()

        await pass_through(100)
        idle = resident(process.pid)
        with MemoryWatch({"agent": process.pid}, {"agent": idle}) as watch:
            await pass_through(6000)  # 60 MB
        watch.assert_within(8 + 12)
        async with httpx.AsyncClient(base_url=url, trust_env=False) as web:
            kept = (await web.get("/api/status")).json()["recorder"]
        assert kept["evicted"] > 4000 and 7 * MIB < kept["bytes"] <= 8 * MIB
        await end(process)


async def test_switched_off(cli: Cli, relay: Relay) -> None:
    await cli.login()
    for arguments, environment in (
        (["--no-inspect"], {}), ([], {"PORTICO_WEB_ADDR": "false"}), ([], {"PORTICO_INSPECT": "false"}),
    ):  # fmt: skip
        process = await cli.start("http", "8000", "--json", *arguments, **environment)
        assert "inspector" not in await first_event(process)
        await end(process)


async def test_an_address_that_others_reach(cli: Cli) -> None:
    await cli.login()
    done = await cli.run("http", "8000", PORTICO_WEB_ADDR="0.0.0.0:4040")
    assert done.code == 2 and "web_addr" in done.err and "(config.invalid)" in done.err


async def test_portico_yml(cli: Cli, relay: Relay, tmp_path: Path) -> None:
    await cli.login()
    async with target_server(answering(OK)) as port:
        path = tmp_path / "portico.yml"
        tunnels = f"tunnels:\n  web: {{addr: {port}}}\n  quiet: {{addr: {port}, inspect: false}}\n"
        path.write_text("version: 1\nweb_addr: 127.0.0.1:0\n" + tunnels)
        process = await cli.start("start", "--all", "--config", str(path), "--json")
        url = (await first_event(process))["inspector"]
        await first_event(process)
        connection = relay.connections[0]
        for bind in (1, 2):
            await connection.request([b"GET", b"/%d" % bind, b"Host", b"h"], bind=bind).over()
        async with httpx.AsyncClient(base_url=url, trust_env=False) as web:
            kept = {t["name"]: t["config"]["inspect"] for t in (await web.get("/api/tunnels")).json()["tunnels"]}
            assert kept == {"web": True, "quiet": False}
            (row,) = (await web.get("/api/requests")).json()["requests"]
            assert (row["tunnel"], row["path"]) == ("web", "/1")
            # The tunnel moves to another target: a replay follows it.
            async with target_server(answering(OK.replace(b"200 OK", b"202 Moved"))) as other:
                path.write_text(
                    "version: 1\nweb_addr: 127.0.0.1:0\n"
                    + tunnels.replace(f"web: {{addr: {port}", f"web: {{addr: {other}")
                )
                async with asyncio.timeout(30):
                    while (await web.post(f"/api/requests/{row['id']}/replay")).json()["status"] != 202:
                        await asyncio.sleep(0.2)
            path.write_text("version: 1\nweb_addr: 127.0.0.1:0\n" + tunnels.replace(f"  web: {{addr: {port}}}\n", ""))
            async with asyncio.timeout(30):
                while (await web.post(f"/api/requests/{row['id']}/replay")).status_code != 409:
                    await asyncio.sleep(0.2)
        await end(process)
        path.write_text("version: 1\nweb_addr: false\n" + tunnels)
        process = await cli.start("start", "--all", "--config", str(path), "--json")
        assert "inspector" not in await first_event(process)
        await end(process)
        path.write_text("version: 1\nweb_addr: nonsense\n" + tunnels)
        done = await cli.run("config", "check", "--config", str(path))
        assert done.code != 0 and "web_addr" in done.out + done.err
