"""`portico diagnose`: each trouble on the way to the platform is found at its hop, and comes with a fix."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from portico.agent import diagnose
from portico.agent.credentials import Credentials
from portico.agent.diagnose import Case, Diagnosis
from portico.agent.target import parse_target
from portico.errors import Problem
from portico.kit import dial
from portico.kit.findings import Finding
from portico.settings import AgentSettings, Secret
from tests.agent.api_server import KEY, TestApi, problem
from tests.agent.certificates import certificate
from tests.agent.harness import Relay, answering, target_server
from tests.agent.proxies import proxy
from tests.kit.test_dial import address, blackhole
from tests.timing import PATIENCE_SECONDS

QUICK = AgentSettings(diagnose_step_seconds=1)
#: So that a busy machine is not found broken.
PATIENT = AgentSettings(diagnose_step_seconds=30, diagnose_seconds=120)
WHO = {"user": {"email": "a@b.c"}, "organization": {"name": "Org"}}
HERE = ["Version", "Configuration", "Credentials"]


class Platform:
    """An API and a relay, and diagnoses of the way to them."""

    def __init__(self, api: TestApi, relay: Relay) -> None:
        self.api = api
        self.relay = relay
        self.settings = PATIENT
        self.target = ""
        self.signed_in: Credentials | Problem = Credentials(api.url, Secret(KEY), "a@b.c · Org")

    async def look(self, server: str = "") -> dict[str, Finding]:
        case = Case(
            self.settings,
            {},
            server or self.api.url,
            self.signed_in,
            parse_target(self.target) if self.target else None,
        )
        return {finding.check: finding async for finding in Diagnosis(case).run()}


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    relay = await Relay().start()
    api = await TestApi([relay.url]).start()
    api.routes["GET /v1/whoami"] = lambda body: (200, WHO)
    yield Platform(api, relay)
    await api.stop()
    await relay.stop()


def broken(found: dict[str, Finding]) -> Finding:
    """The one trouble; nothing comes after it but the local app."""
    bad = [finding for finding in found.values() if finding.level != "OK"]
    assert len(bad) == 1, bad
    assert bad[0].advice, bad[0]
    return bad[0]


class TestAllIsWell:
    async def test_every_hop_in_order_and_nothing_is_left(self, platform: Platform) -> None:
        async with target_server(answering(b"HTTP/1.1 204 No Content\r\n\r\n")) as port:
            platform.target = str(port)
            found = await platform.look()
        assert {finding.level for finding in found.values()} == {"OK"}, found
        assert list(found) == [
            *HERE, "Proxy", "API connection", "API", "Clock", "Sign-in", "Relays", "Relay 1 connection", "Relay 1 session",
            "Local app",
        ]  # fmt: skip
        assert "test () in" in found["Relay 1 session"].says and "ping" in found["Relay 1 session"].says
        assert found["Local app"].says.startswith(f"http://localhost:{port} answers 204 No Content")
        assert found["Sign-in"].says == "the key is accepted: a@b.c · Org"
        opened = [
            body for method, path, body, _ in platform.api.calls if (method, path) == ("POST", "/v1/agent/sessions")
        ]
        assert len(opened) == 1 and opened[0]["tunnels"] == []
        assert platform.api.count("DELETE /v1/agent/sessions/ses_1") == 1
        await platform.relay.until(lambda: platform.relay.connections[0].lost)
        assert KEY not in repr(found)

    @pytest.mark.parametrize("kind", ["http", "socks5"])
    async def test_through_a_proxy(self, platform: Platform, kind: str) -> None:
        async with proxy(kind) as way:
            way.users = {"me": "s3cret"}
            way.names = {"api.inside.example": "127.0.0.1", "relay.inside.example": "127.0.0.1"}
            platform.settings = dataclasses.replace(PATIENT, proxy_url=Secret(way.url_for("me", "s3cret")))
            platform.api.edges = [platform.relay.url.replace("127.0.0.1", "relay.inside.example")]
            found = await platform.look(f"http://api.inside.example:{platform.api.port}")
            assert {finding.level for finding in found.values()} == {"OK"}, found
            assert "***@127.0.0.1" in found["Proxy"].says and "s3cret" not in repr(found)
            assert "through the proxy" in found["Relay 1 connection"].says
            assert "API name" not in found, "the proxy looks names up"

    async def test_over_tls(self, tmp_path: Path) -> None:
        context, ca = certificate(tmp_path, "127.0.0.1")
        relay = await Relay().start(tls=context)
        api = await TestApi([relay.url.replace("ws:", "wss:")]).start(tls=context)
        api.routes["GET /v1/whoami"] = lambda body: (200, WHO)
        platform = Platform(api, relay)
        platform.settings = dataclasses.replace(PATIENT, ca_file=ca)
        found = await platform.look(f"https://127.0.0.1:{api.port}")
        assert {finding.level for finding in found.values()} == {"OK"}, found
        for check in ("API certificate", "Relay 1 certificate"):
            assert found[check].says == "for 127.0.0.1, by test CA of 127.0.0.1 (ca_file), 30 days left"
        await api.stop()
        await relay.stop()


class TestHere:
    async def test_not_signed_in_still_looks_at_the_platform(self, platform: Platform) -> None:
        platform.signed_in = Problem("auth.not_logged_in", "this machine is not signed in")
        found = await platform.look()
        assert broken(found).check == "Credentials" and "(auth.not_logged_in)" in found["Credentials"].says
        assert found["API"].level == found["Clock"].level == "OK"

    async def test_settings_are_named_with_where_they_came_from(self, platform: Platform) -> None:
        settings = dataclasses.replace(PATIENT, region="eu", proxy_url=Secret("http://me:s3cret@127.0.0.1:1"))
        sources = {"region": "PORTICO_REGION", "proxy_url": "command line", "agent_key": "PORTICO_AGENT_KEY"}
        case = Case(dataclasses.replace(settings, agent_key=Secret(KEY)), sources, platform.api.url, platform.signed_in)
        found = {finding.check: finding async for finding in Diagnosis(case).run()}
        said = found["Configuration"].says
        assert "region=eu (PORTICO_REGION)" in said and "proxy_url=http://***@127.0.0.1:1 (command line)" in said
        assert "agent_key=Secret(***) (PORTICO_AGENT_KEY)" in said
        assert "s3cret" not in repr(found) and KEY not in repr(found)

    @pytest.mark.parametrize(("ahead", "level"), [(40, "WARN"), (-45, "WARN"), (3600, "FAIL"), (-90, "FAIL")])
    async def test_a_clock_that_differs(self, platform: Platform, ahead: float, level: str) -> None:
        platform.api.clock_ahead = ahead
        found = await platform.look()
        assert found["Clock"].level == level and "clock" in found["Clock"].advice
        assert ("Sign-in" in found) == (level == "WARN")

    async def test_a_local_app_that_is_not_there(self, platform: Platform) -> None:
        platform.target = "127.0.0.1:1"
        assert broken(await platform.look()).says == "nothing listens on 127.0.0.1:1"

    async def test_a_local_app_that_speaks_something_else(self, platform: Platform) -> None:
        async def ssh(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-OpenSSH_9\r\n")
            await reader.read()

        async with target_server(ssh) as port:
            platform.target = str(port)
            found = broken(await platform.look())
        assert found.level == "WARN" and "speaks no HTTP ('SSH-2.0-OpenSSH_9')" in found.says

    async def test_a_local_app_that_hangs(self, platform: Platform) -> None:
        platform.settings = QUICK

        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        async with target_server(mute) as port:
            platform.target = str(port)
            assert "answers nothing" in broken(await platform.look()).says


class TestProxy:
    async def test_each_failure_is_named(self, platform: Platform) -> None:
        platform.settings = dataclasses.replace(PATIENT, proxy_url=Secret("http://127.0.0.1:1"))
        found = await platform.look()
        assert broken(found).check == "Proxy" and "(proxy.unreachable)" in found["Proxy"].says
        assert list(found)[-1] == "Proxy"
        async with proxy() as way:
            platform.settings = dataclasses.replace(PATIENT, proxy_url=Secret(way.url))
            way.users = {"a": "b"}
            found = await platform.look()
            assert broken(found).check == "API connection" and "(proxy.auth_required)" in found["API connection"].says
            way.answer = b"HTTP/1.1 403 Forbidden\r\n\r\n"
            assert "(proxy.refused)" in broken(await platform.look()).says
            platform.settings = dataclasses.replace(QUICK, proxy_url=Secret(way.url))
            way.answer = b""
            assert "(proxy.timeout)" in broken(await platform.look()).says

    async def test_a_proxy_that_lets_the_api_through_and_no_relay(self, platform: Platform) -> None:
        async with proxy() as way:
            platform.settings = dataclasses.replace(PATIENT, proxy_url=Secret(way.url))
            platform.api.edges = ["ws://127.0.0.1:1/v1/connect"]
            found = await platform.look()
        assert broken(found).check == "Relay 1 connection"
        assert "(proxy.target_unreachable)" in found["Relay 1 connection"].says


class TestApiHops:
    async def test_a_name_without_address(self, platform: Platform) -> None:
        found = await platform.look("https://nowhere.invalid")
        assert broken(found).check == "API name" and list(found)[-1] == "API name"

    async def test_a_name_server_that_does_not_answer(
        self, platform: Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        platform.settings = QUICK

        async def never(host: str, port: int) -> Any:
            await asyncio.sleep(60)

        monkeypatch.setattr(diagnose, "resolve", never)
        found = broken(await platform.look("https://slow.example"))
        assert found.check == "API name" and "name server" in found.advice

    async def test_nothing_listens(self, platform: Platform) -> None:
        found = broken(await platform.look("http://127.0.0.1:1"))
        assert found.check == "API connection" and found.says == "port 1: 127.0.0.1 connection refused"

    async def test_a_firewall_that_drops(self, platform: Platform) -> None:
        platform.settings = QUICK
        with blackhole("127.0.0.2") as port:
            found = broken(await platform.look(f"http://127.0.0.2:{port}"))
        assert found.check == "API connection" and "127.0.0.2 no answer within" in found.says

    async def test_one_dead_address_of_several(self, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
        async def two(host: str, port: int) -> Any:
            return [address("::1", 1), address("127.0.0.1", platform.api.port)]

        monkeypatch.setattr(diagnose, "resolve", two)
        monkeypatch.setattr(dial, "resolve", two)
        platform.api.edges = []
        found = await platform.look(f"http://api.example:{platform.api.port}")
        assert found["API name"].says == "api.example: ::1, 127.0.0.1 (1 × IPv4, 1 × IPv6)"
        assert found["API connection"].level == "WARN"
        assert "[::1] connection refused, 127.0.0.1 in" in found["API connection"].says
        assert found["API"].level == "OK"

    @pytest.mark.parametrize(
        ("name", "days", "trusted", "says", "advice"),
        [
            ("other.example", 30, True, "it is for other.example, not for 127.0.0.1", "Use a name"),
            ("127.0.0.1", -3, True, "it expired 3 days ago", "Renew"),
            (
                "127.0.0.1",
                30,
                False,
                "nobody that this machine trusts signed it (issuer: test CA of 127.0.0.1)",
                "ca_file",
            ),
        ],
    )
    async def test_a_certificate_that_is_refused(
        self, platform: Platform, tmp_path: Path, name: str, days: float, trusted: bool, says: str, advice: str
    ) -> None:
        context, ca = certificate(tmp_path, name, days=days)
        api = await TestApi().start(tls=context)
        platform.settings = dataclasses.replace(PATIENT, ca_file=ca if trusted else None)
        found = broken(await platform.look(f"https://127.0.0.1:{api.port}"))
        await api.stop()
        assert found.check == "API certificate" and found.says.startswith(says) and advice in found.advice

    async def test_a_certificate_that_ends_soon(self, platform: Platform, tmp_path: Path) -> None:
        context, ca = certificate(tmp_path, "127.0.0.1", days=5)
        api = await TestApi(platform.api.edges).start(tls=context)
        api.routes["GET /v1/whoami"] = lambda body: (200, WHO)
        platform.settings = dataclasses.replace(PATIENT, ca_file=ca)
        found = broken(await platform.look(f"https://127.0.0.1:{api.port}"))
        await api.stop()
        assert found.level == "WARN" and found.check == "API certificate" and "5 days left" in found.says

    async def test_https_to_a_plain_port(self, platform: Platform) -> None:
        platform.settings = QUICK

        async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        found = broken(await platform.look(f"https://127.0.0.1:{platform.api.port}"))
        assert found.check == "API certificate" and "plain port" in found.advice
        async with target_server(plain) as port:
            found = broken(await platform.look(f"https://127.0.0.1:{port}"))
        assert found.check == "API certificate" and "no TLS on port" in found.says and "plain port" in found.advice

    async def test_a_ca_file_that_is_none(self, platform: Platform, tmp_path: Path) -> None:
        platform.settings = dataclasses.replace(PATIENT, ca_file=tmp_path / "missing.pem")
        found = broken(await platform.look(f"https://127.0.0.1:{platform.api.port}"))
        assert "setting ca_file" in found.says and "(config.invalid)" in found.says

    async def test_an_api_that_is_not_ready_or_is_none(self, platform: Platform) -> None:
        platform.api.refuse = problem(503, "service.unavailable", "the database does not answer")
        found = broken(await platform.look())
        assert found.check == "API" and "503: the database does not answer" in found.says
        async with target_server(answering(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\n<h1>")) as port:
            assert (
                "answers 404: not as a Portico API does" in broken(await platform.look(f"http://127.0.0.1:{port}")).says
            )
        async with target_server(answering(b"garbage\r\n\r\n")) as port:
            assert broken(await platform.look(f"http://127.0.0.1:{port}")).check == "API"

    @pytest.mark.parametrize(
        ("version", "says", "advice"),
        [("0.2.0", "the agent is older", "pip install"), ("0.0.9", "the platform is older", "operator")],
    )
    async def test_versions_that_do_not_go_together(
        self, platform: Platform, version: str, says: str, advice: str
    ) -> None:
        platform.api.routes["GET /openapi.json"] = lambda body: (200, {"info": {"version": version}})
        found = broken(await platform.look())
        assert found.level == "WARN" and says in found.says and advice in found.advice

    async def test_a_key_that_is_not_accepted(self, platform: Platform) -> None:
        platform.api.routes["GET /v1/whoami"] = lambda body: problem(401, "auth.key_revoked", "the key was revoked")
        found = await platform.look()
        assert broken(found).check == "Sign-in" and "(auth.key_revoked)" in found["Sign-in"].says


class TestRelays:
    async def test_each_relay_by_itself(self, platform: Platform) -> None:
        platform.api.edges = ["ws://127.0.0.1:1/v1/connect", platform.relay.url]
        found = await platform.look()
        assert broken(found).check == "Relay 1 connection"
        assert found["Relay 2 session"].level == "OK"

    async def test_no_relay_at_all(self, platform: Platform) -> None:
        platform.api.edges = []
        assert "names no relay" in broken(await platform.look()).says
        platform.api.routes["POST /v1/agent/sessions"] = lambda body: problem(503, "edge.no_relay", "no relay is live")
        assert "(edge.no_relay)" in broken(await platform.look()).says

    async def test_a_relay_that_refuses(self, platform: Platform) -> None:
        platform.relay.refuse = {"status": 401, "code": "session.token_invalid", "detail": "not one of ours"}
        assert "not one of ours (session.token_invalid)" in broken(await platform.look()).says

    async def test_a_relay_that_says_nothing(self, platform: Platform) -> None:
        platform.settings = QUICK
        platform.relay.mute = True
        found = broken(await platform.look())
        assert found.check == "Relay 1 session" and "did not answer in time" in found.says
        assert platform.api.count("DELETE /v1/agent/sessions/ses_1") == 1

    async def test_a_port_that_is_no_relay(self, platform: Platform) -> None:
        async with target_server(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as port:
            platform.api.edges = [f"ws://127.0.0.1:{port}/v1/connect"]
            assert broken(await platform.look()).check == "Relay 1 session"


class TestDeadline:
    async def test_the_whole_is_bounded(self, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every step is slow, none too slow by itself: the run still ends in time."""
        real = dial.resolve

        async def slow(host: str, port: int) -> Any:
            await asyncio.sleep(0.3)
            return await real(host, port)

        monkeypatch.setattr(diagnose, "resolve", slow)
        monkeypatch.setattr(dial, "resolve", slow)
        platform.settings = dataclasses.replace(QUICK, diagnose_seconds=0.8)
        began = time.monotonic()
        found = await platform.look()
        assert time.monotonic() - began < PATIENCE_SECONDS
        assert any(finding.level == "FAIL" for finding in found.values())
