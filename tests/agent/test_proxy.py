"""The way to the platform through a proxy: which one is taken, what goes through it, and which hop a failure names."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from portico.agent import proxy as proxies
from portico.agent import transport
from portico.agent.api import Api
from portico.agent.link import Link
from portico.errors import Problem
from portico.kit import dial
from portico.settings import AgentSettings, Secret
from tests.agent.api_server import KEY, TestApi
from tests.agent.certificates import certificate
from tests.agent.harness import Relay, SilentOwner
from tests.agent.proxies import TestProxy, proxy
from tests.agent.world import FAST, World

KINDS = pytest.mark.parametrize("kind", ["http", "socks5"])


def settings(url: str, **more: Any) -> AgentSettings:
    return dataclasses.replace(FAST, proxy_url=Secret(url), proxy_timeout_seconds=0.5, **more)


@contextlib.asynccontextmanager
async def relay_link(config: AgentSettings, url: str) -> AsyncIterator[Link]:
    link = Link(SilentOwner(), config, url, 1)
    try:
        yield link
    finally:
        link.close("test over")


async def refusal(config: AgentSettings, url: str) -> Problem:
    """The problem of a link that must not open."""
    async with relay_link(config, url) as link:
        with pytest.raises(Problem) as caught:
            await link.open("token")
    return caught.value


class TestWhichProxy:
    @pytest.mark.parametrize(
        ("environ", "url", "wanted"),
        [
            ({}, "https://a.example", None),
            ({"HTTPS_PROXY": "http://p:1"}, "https://a.example", "http://p:1"),
            ({"HTTPS_PROXY": "http://p:1"}, "wss://a.example", "http://p:1"),
            ({"HTTPS_PROXY": "http://p:1"}, "ws://a.example", None),
            ({"HTTP_PROXY": "p:1"}, "ws://a.example", "http://p:1"),
            ({"ALL_PROXY": "socks://p:1080/"}, "http://a.example", "socks5h://p:1080"),
            ({"ALL_PROXY": "socks5h://p"}, "http://a.example", "socks5h://p:1080"),
            ({"ALL_PROXY": "socks5://p:9", "https_proxy": "p"}, "wss://a.example", "http://p:80"),
            ({"https_proxy": "http://low:1", "HTTPS_PROXY": "http://high:1"}, "https://a.example", "http://low:1"),
            ({"HTTP_PROXY": "http://p:1", "REQUEST_METHOD": "GET"}, "http://a.example", None),
            ({"HTTPS_PROXY": "http://p:1"}, "https://127.0.0.1:7000", None),
            ({"HTTPS_PROXY": "http://p:1"}, "https://[::1]:7000", None),
            ({"HTTPS_PROXY": "http://p:1"}, "https://web.localhost", None),
            ({"ALL_PROXY": "http://[fd00::1]:3128"}, "http://a.example", "http://[fd00::1]:3128"),
        ],
    )
    def test_the_environment_is_read_as_people_expect(
        self, environ: dict[str, str], url: str, wanted: str | None
    ) -> None:
        found = proxies.choose(AgentSettings(), url, environ)
        assert (str(found) if found else None) == wanted

    @pytest.mark.parametrize(
        ("no_proxy", "host", "bypassed"),
        [
            ("*", "a.example", True),
            ("example", "a.example", True),
            (".example", "a.example", True),
            ("*.example", "a.example", True),
            ("a.example", "a.example", True),
            ("a.example", "ba.example", False),
            ("b.example, a.EXAMPLE", "a.example", True),
            ("a.example:443", "a.example", True),
            ("a.example:444", "a.example", False),
            ("10.0.0.0/8", "10.1.2.3", True),
            ("10.0.0.0/8", "11.1.2.3", False),
            ("10.1.2.3", "10.1.2.3", True),
            ("10.1.2.3:443", "10.1.2.3", True),
            ("fd00::/8", "[fd00::5]", True),
            ("fd00::5", "[fd00::5]", True),
            ("[fd00::5]", "[fd00::5]", True),
            ("[fd00::5]:443", "[fd00::5]", True),
            ("[fd00::5]:1", "[fd00::5]", False),
            ("10.0.0.0/8", "a.example", False),
            (",, ", "a.example", False),
        ],
    )
    def test_no_proxy_names_hosts_that_are_reached_without_one(self, no_proxy: str, host: str, bypassed: bool) -> None:
        environ = {"HTTPS_PROXY": "http://p:1", "NO_PROXY": no_proxy}
        for config in (AgentSettings(), AgentSettings(proxy_url=Secret("socks5://q:1"))):
            assert (proxies.choose(config, f"wss://{host}", environ) is None) == bypassed

    def test_the_setting_comes_before_the_environment(self) -> None:
        environ = {"HTTPS_PROXY": "http://p:1"}
        found = proxies.choose(AgentSettings(proxy_url=Secret("socks5://q:2")), "wss://a.example", environ)
        assert str(found) == "socks5://q:2" and found is not None and found.source == "proxy_url"
        assert str(proxies.choose(AgentSettings(proxy_url=Secret("q:2")), "ws://127.0.0.1:1", environ)) == "http://q:2"

    @pytest.mark.parametrize("word", ["none", "OFF", "direct", " none "])
    def test_none_switches_off_what_the_environment_names(self, word: str) -> None:
        config = AgentSettings(proxy_url=Secret(word))
        assert proxies.choose(config, "wss://a.example", {"HTTPS_PROXY": "http://p:1"}) is None

    @pytest.mark.parametrize(
        "text",
        [
            "ftp://s3cret@p", "https://u:s3cret@p", "http://", "http://p:s3cret", "http://u:s3cret@p:99999", "http://p:0",
            "http://u:s3cret@p/path", "http://u:s3cret@p q", "socks5://u:" + "s3cret" * 50 + "@p", "http://u%3A:s3cret@p", "",
        ],
    )  # fmt: skip
    def test_an_address_that_is_none_is_refused_without_showing_it(self, text: str) -> None:
        with pytest.raises(Problem) as caught:
            proxies.parse(text)
        assert caught.value.code == "config.invalid"
        assert "s3cret" not in caught.value.line()

    def test_credentials_are_never_shown(self) -> None:
        found = proxies.parse("http://me:s3cr%40t@p:3128")
        assert (found.username, found.secret) == ("me", "s3cr@t")
        assert str(found) == "http://***@p:3128"
        assert "s3cr" not in repr(found) + found.place and "s3cr" not in repr(AgentSettings(proxy_url=Secret("s3cr")))


@KINDS
class TestThrough:
    async def test_an_agent_is_online_through_a_proxy_and_serves(self, kind: str) -> None:
        relay = await Relay().start()
        api = await TestApi([relay.url]).start()
        async with proxy(kind) as way:
            way.users = {"me": "p@ss wörd"}
            world = World(api, relay).start(settings(way.url_for("me", "p%40ss%20w%C3%B6rd")))
            await world.online()
            assert await world.get() == b"hello"
            assert set(way.asked) == {("127.0.0.1", api.port), ("127.0.0.1", relay.port)}
            world.agent.stop()
            assert await world.ended() is None
        assert world.http is not None
        await world.http.aclose()
        await api.stop()
        await relay.stop()

    async def test_an_answer_in_single_bytes_is_read_whole(self, kind: str) -> None:
        relay = await Relay().start()
        async with proxy(kind) as way:
            way.trickle, way.users = True, {"u": "v"}
            async with relay_link(settings(way.url_for("u", "v")), relay.url) as link:
                await link.open("token")
                assert way.opened == 1
        await relay.stop()

    async def test_a_name_that_only_the_proxy_knows(self, kind: str) -> None:
        relay = await Relay().start()
        async with proxy(kind) as way:
            way.names = {"relay.inside.example": "127.0.0.1"}
            url = f"ws://relay.inside.example:{relay.port}/v1/connect"
            async with relay_link(settings(way.url), url) as link:
                await link.open("token")
            assert way.asked == [("relay.inside.example", relay.port)]
        await relay.stop()

    async def test_an_ipv6_relay_is_asked_for_as_its_kind_of_proxy_writes_it(self, kind: str) -> None:
        async with proxy(kind) as way:
            way.names = {"2001:db8::1": "127.0.0.1"}
            problem = await refusal(settings(way.url), "ws://[2001:db8::1]:1/v1/connect")
            assert way.asked == [("[2001:db8::1]" if kind == "http" else "2001:db8::1", 1)]
        assert problem.code == "proxy.target_unreachable"
        assert "[2001:db8::1]:1" in problem.detail

    async def test_a_relay_that_is_not_there(self, kind: str) -> None:
        async with proxy(kind) as way:
            problem = await refusal(settings(way.url), "ws://127.0.0.1:1/v1/connect")
        assert problem.code == "proxy.target_unreachable"
        assert f"the proxy at 127.0.0.1:{way.port} cannot reach 127.0.0.1:1" in problem.detail

    async def test_the_api_behind_it_fails_with_the_same_codes(self, kind: str) -> None:
        async with proxy(kind) as way:
            api = Api("http://127.0.0.1:1", Secret(KEY), settings(way.url))
            with pytest.raises(Problem) as caught:
                await api.call("GET", "whoami")
            await api.aclose()
        assert caught.value.code == "proxy.target_unreachable"

    async def test_a_proxy_that_is_not_there(self, kind: str) -> None:
        scheme = "http" if kind == "http" else "socks5h"
        problem = await refusal(settings(f"{scheme}://u:s3cret@127.0.0.1:1"), "ws://127.0.0.1:2/")
        assert problem.code == "proxy.unreachable"
        assert "the proxy at 127.0.0.1:1 cannot be reached: Connection refused" in problem.line()
        assert "s3cret" not in problem.line()

    async def test_a_proxy_that_hangs_is_named(self, kind: str) -> None:
        async with proxy(kind) as way:
            way.answer = b""
            problem = await refusal(settings(way.url), "ws://127.0.0.1:2/")
        assert problem.code == "proxy.timeout" and "within 0.5 s" in problem.detail

    async def test_credentials_are_asked_for_and_checked(self, kind: str) -> None:
        async with proxy(kind) as way:
            way.users = {"me": "right"}
            missing = await refusal(settings(way.url), "ws://127.0.0.1:2/")
            wrong = await refusal(settings(way.url_for("me", "wr0ng")), "ws://127.0.0.1:2/")
        assert missing.code == wrong.code == "proxy.auth_required"
        assert "asks for credentials" in missing.detail
        assert "did not accept the credentials" in wrong.detail and "wr0ng" not in wrong.line()

    @pytest.mark.parametrize(
        "answer", [b"SSH-2.0-OpenSSH_9\r\n", b"\x00\x00\x00\x00", b"HTTP/1.1 banana\r\n\r\n", b"\r\n" * 9]
    )
    async def test_something_that_is_no_proxy(self, kind: str, answer: bytes) -> None:
        async with proxy(kind) as way:
            way.answer = answer
            problem = await refusal(settings(way.url), "ws://127.0.0.1:2/")
        assert problem.code == "proxy.protocol_error", problem

    async def test_a_proxy_that_says_the_first_half(self, kind: str) -> None:
        async with proxy(kind) as way:
            way.answer = b"HTTP/1.1 200 OK\r\nA: b\r\n" if kind == "http" else b"\x05\x00\x05"
            problem = await refusal(settings(way.url), "ws://127.0.0.1:2/")
        assert problem.code == "proxy.protocol_error", problem

    async def test_a_refused_agent_comes_back_when_the_proxy_is_back(self, kind: str) -> None:
        relay = await Relay().start()
        api = await TestApi([relay.url]).start()
        async with proxy(kind) as way:
            world = await World(api, relay).start(settings(way.url)).online()
            way.answer = b""
            relay.connections[-1].carrier.abort("cut")
            await world.seen.until(lambda: "reconnecting" in world.seen.states)
            way.answer = None
            await world.seen.until(lambda: world.seen.states[-1] == "online", 10)
            world.agent.stop()
            await world.ended()
        assert world.http is not None
        await world.http.aclose()
        await api.stop()
        await relay.stop()


class TestHttpProxy:
    async def test_one_that_forbids(self) -> None:
        async with proxy() as way:
            way.answer = b"HTTP/1.0 403 Blocked by pol\x1bicy\r\nContent-Length: 3\r\n\r\nno\n"
            problem = await refusal(settings(way.url), "ws://127.0.0.1:2/")
        assert problem.code == "proxy.refused"
        assert "it answered 403 Blocked by pol?icy" in problem.detail

    async def test_one_that_takes_other_credentials_only(self) -> None:
        async with proxy() as way:
            way.answer = b"HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM\r\nProxy-Authenticate: Negotiate\r\n\r\n"
            problem = await refusal(settings(way.url_for("a", "b")), "ws://127.0.0.1:2/")
        assert problem.code == "proxy.auth_required"
        assert "takes only NTLM, Negotiate" in problem.detail

    async def test_one_that_says_401_to_wrong_credentials(self) -> None:
        async with proxy() as way:
            way.answer = b"HTTP/1.0 401 Unauthorized\r\nProxy-Authenticate: Basic realm=x\r\n\r\n"
            assert (await refusal(settings(way.url_for("a", "b")), "ws://127.0.0.1:2/")).code == "proxy.auth_required"
            assert (await refusal(settings(way.url), "ws://127.0.0.1:2/")).code == "proxy.refused"

    async def test_an_answer_without_end_is_cut_off(self) -> None:
        async with proxy() as way:
            way.answer = b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000
            problem = await refusal(settings(way.url), "ws://127.0.0.1:2/")
        assert problem.code == "proxy.protocol_error"

    async def test_words_after_the_answer_are_not_the_relays(self) -> None:
        async with proxy() as way:
            way.answer = b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 101 Switching Protocols\r\n\r\n"
            problem = await refusal(settings(way.url), "ws://127.0.0.1:2/")
        assert problem.code == "proxy.protocol_error"

    async def test_the_hint_for_the_wrong_kind(self) -> None:
        async with proxy("http") as way:
            problem = await refusal(settings(f"socks5://127.0.0.1:{way.port}"), "ws://127.0.0.1:2/")
        assert problem.code in ("proxy.timeout", "proxy.protocol_error")
        async with proxy("socks5") as way:
            way.answer = b"HTTP/1.1 400 Bad Request\r\n\r\n"
            problem = await refusal(settings(way.url), "ws://127.0.0.1:2/")
        assert problem.code == "proxy.protocol_error"
        assert "speaks HTTP" in problem.detail and "write http://" in problem.hint


class TestSocks5:
    async def test_socks5_looks_names_up_here_and_tries_every_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        relay = await Relay().start()
        real = dial.resolve

        async def known(host: str, port: int) -> Any:
            if host == "relay.example":
                return [*await real("127.0.0.9", port), *await real("127.0.0.1", port)]
            return await real(host, port)

        monkeypatch.setattr(proxies, "resolve", known)
        async with proxy("socks5") as way:
            url = f"ws://relay.example:{relay.port}/v1/connect"
            async with relay_link(settings(f"socks5://127.0.0.1:{way.port}"), url) as link:
                await link.open("token")
            assert way.asked == [("127.0.0.9", relay.port), ("127.0.0.1", relay.port)]
        await relay.stop()

    async def test_a_name_without_an_address_here_hints_at_socks5h(self) -> None:
        async with proxy("socks5") as way:
            problem = await refusal(settings(f"socks5://127.0.0.1:{way.port}"), "ws://nowhere.invalid:1/")
        assert problem.code == "proxy.target_unreachable" and "socks5h://" in problem.hint

    async def test_one_that_forbids(self) -> None:
        async with proxy("socks5") as way:
            problem = await refusal(settings(way.url), "ws://forbidden.example:1/")
        assert problem.code == "proxy.refused" and "not allowed by its rules" in problem.detail

    async def test_a_name_too_long_for_it(self) -> None:
        async with proxy("socks5") as way:
            problem = await refusal(settings(way.url), f"ws://{'a' * 300}.example:1/")
        assert problem.code == "proxy.target_unreachable" and "not a host name" in problem.detail


@KINDS
class TestTls:
    async def test_wss_checks_the_relays_name_not_the_proxys(self, kind: str, tmp_path: Path) -> None:
        context, ca = certificate(tmp_path, "relay.example")
        relay = await Relay().start(tls=context)
        async with proxy(kind) as way:
            way.names = {"relay.example": "127.0.0.1", "other.example": "127.0.0.1"}
            config = settings(way.url, ca_file=ca)
            async with relay_link(config, f"wss://relay.example:{relay.port}/v1/connect") as link:
                await link.open("token")
            problem = await refusal(config, f"wss://other.example:{relay.port}/v1/connect")
        assert problem.code == "edge.agent_unreachable"
        assert "its certificate is not trusted" in problem.detail and "other.example" in problem.detail
        await relay.stop()

    async def test_https_to_the_api(self, kind: str, tmp_path: Path) -> None:
        context, ca = certificate(tmp_path, "api.example")
        server = await TestApi().start(tls=context)
        server.routes["GET /v1/whoami"] = lambda body: (200, {"kind": "agent_key"})
        async with proxy(kind) as way:
            way.names = {"api.example": "127.0.0.1", "other.example": "127.0.0.1"}
            config = settings(way.url, ca_file=ca)
            api = Api(f"https://api.example:{server.port}", Secret(KEY), config)
            assert await api.call("GET", "whoami") == {"kind": "agent_key"}
            assert await api.call("GET", "whoami") == {"kind": "agent_key"}
            assert way.opened == 1  # the connection is kept
            await api.aclose()
            other = Api(f"https://other.example:{server.port}", Secret(KEY), config)
            with pytest.raises(Problem) as caught:
                await other.call("GET", "whoami")
            await other.aclose()
        assert caught.value.code == "api.unreachable" and "certificate is not trusted" in caught.value.detail
        await server.stop()

    async def test_an_idle_connection_is_not_kept_for_long(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transport, "KEEP_SECONDS", 0.05)
        server = await TestApi().start()
        server.routes["GET /v1/whoami"] = lambda body: (200, {"kind": "agent_key"})
        async with proxy(kind) as way:
            api = Api(server.url, Secret(KEY), settings(way.url))
            await api.call("GET", "whoami")
            await asyncio.sleep(0.1)
            await api.call("GET", "whoami")
            assert way.opened == 2
            await api.aclose()
        await server.stop()

    async def test_a_kept_connection_that_the_api_closed_is_opened_anew(self, kind: str) -> None:
        server = await TestApi().start()
        server.routes["GET /v1/whoami"] = lambda body: (200, {"kind": "agent_key"})
        async with proxy(kind) as way:
            api = Api(server.url, Secret(KEY), settings(way.url))
            await api.call("GET", "whoami")
            port = server.port
            await server.stop()
            await asyncio.sleep(0.05)
            server = await TestApi().start(port)
            server.routes["GET /v1/whoami"] = lambda body: (200, {"kind": "agent_key"})
            assert await api.call("GET", "whoami") == {"kind": "agent_key"}
            assert way.opened == 2
            await api.aclose()
        await server.stop()


async def test_nothing_reaches_a_proxy_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await Relay().start()
    way = await TestProxy().start()
    monkeypatch.setenv("ALL_PROXY", way.url)
    async with relay_link(settings("none"), relay.url) as link:
        await link.open("token")
    assert way.accepted == 0
    await way.stop()
    await relay.stop()
