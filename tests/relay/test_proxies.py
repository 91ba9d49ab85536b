"""Behind proxies: visitors' addresses from PROXY headers and forwarding fields, from configured proxies and nobody else."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from portico.kit.proxy_protocol import SIGNATURE
from portico.relay.server import Relay
from tests.relay.doubles import Client, ScriptedAgent, grant, port, row
from tests.relay.known import forget, learn

V1 = b"PROXY TCP4 203.0.113.7 198.51.100.9 40000 80\r\n"
GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"
TRUSTED = {"trusted_proxies": ("127.0.0.0/8", "10.0.0.0/8")}


def with_fields(*lines: str, target: str = "/") -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: web.localhost\r\n{''.join(line + chr(13) + chr(10) for line in lines)}\r\n".encode()


def said(agent: ScriptedAgent, number: int = -1) -> dict[bytes, bytes]:
    """The forwarding fields that the target got, each once."""
    found: dict[bytes, bytes] = {}
    for name, value in agent.streams[number].fields:
        if name.lower().replace(b"_", b"-").startswith((b"x-forwarded", b"forwarded", b"x-request-id")):
            assert name.lower() not in found, "each field is told once"
            found[name.lower()] = value
    return found


def client(agent: ScriptedAgent, number: int = -1) -> bytes:
    return said(agent, number)[b"x-forwarded-for"]


async def ended(client: Client) -> bytes:
    """What came until the end of the connection, reset or closed."""
    try:
        return await client.rest()
    except ConnectionError:
        return b""


def any_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.mark.parametrize("header", [V1, SIGNATURE + b"\x20\0\0\0"])
@pytest.mark.parametrize("relay_settings", [{}, {"proxy_protocol_from": ("192.0.2.0/24",)}])
async def test_from_anybody_else_a_header_is_malformed_http(
    relay: Relay, agent: ScriptedAgent, visit: Any, header: bytes
) -> None:
    status, fields, _ = await (await visit(header + GET)).response()
    assert (status, fields[b"portico-error"]) == (400, [b"edge.bad_request"])
    assert (await (await visit(GET)).response())[0] == 200
    assert client(agent) == b"127.0.0.1" and len(agent.streams) == 1


SPOOFED = [
    "X-Forwarded-For: 6.6.6.6",
    "x-forwarded-for: 6.6.6.6\r\nX-FORWARDED-FOR: 6.6.6.7",
    "X-Forwarded-For: 6.6.6.6,",
    "X-Forwarded-For:",
    "X-Forwarded-For: [2001:db8::1]:80, ::ffff:10.0.0.1",
    "X_Forwarded_For: 6.6.6.6",
    "X-Forwarded_For: 6.6.6.6",
    "Forwarded: for=6.6.6.6;proto=https",
    'Forwarded: for="_hidden", for=unknown',
    "X-Forwarded-Proto: https\r\nX-Forwarded-Host: evil.example\r\nX-Forwarded-Port: 1",
    "X-Request-Id: f3a9c1d2-77aa",
    "Connection: X-Forwarded-For, X-Request-Id\r\nX-Forwarded-For: 6.6.6.6\r\nX-Request-Id: f3a9c1d2-77aa",
    "Connection: close, X-Forwarded-Proto\r\nX-Forwarded-Proto: https",
]


@pytest.mark.parametrize("relay_settings", [{}, {"trusted_proxies": ("10.0.0.0/8",)}])
@pytest.mark.parametrize("lines", SPOOFED)
async def test_nobody_is_believed_by_default(relay: Relay, agent: ScriptedAgent, visit: Any, lines: str) -> None:
    assert (await (await visit(with_fields(lines))).response())[0] == 200
    found = said(agent)
    assert found.pop(b"x-request-id").startswith(b"req_")
    assert found == {
        b"x-forwarded-for": b"127.0.0.1",
        b"x-forwarded-proto": b"http",
        b"x-forwarded-host": b"web.localhost",
        b"x-forwarded-port": b"%d" % port(relay, 1),
        b"forwarded": b"for=127.0.0.1;host=web.localhost;proto=http",
    }


class TestTrusted:
    pytestmark = pytest.mark.parametrize("relay_settings", [TRUSTED])

    async def test_what_it_says_is_passed_on_and_added_to(self, agent: ScriptedAgent, visit: Any) -> None:
        request = with_fields(
            "X-Forwarded-For: 6.6.6.6, 203.0.113.7, 10.1.1.1", "X-Forwarded-Proto: https", "X-Request-Id: f3a9c1d2-77aa"
        )
        assert (await (await visit(request)).response())[0] == 200
        assert said(agent) == {
            b"x-forwarded-for": b"6.6.6.6, 203.0.113.7, 10.1.1.1, 127.0.0.1",
            b"x-forwarded-proto": b"https",
            b"x-forwarded-host": b"web.localhost",
            b"x-forwarded-port": b"443",
            b"forwarded": b"for=203.0.113.7;host=web.localhost;proto=https, for=10.1.1.1, for=127.0.0.1",
            b"x-request-id": b"f3a9c1d2-77aa",
        }

    @pytest.mark.parametrize(
        "lines",
        [
            ["Connection: X-Forwarded-For", "X-Forwarded-For: 203.0.113.7"],
            ["X_Forwarded_For: 6.6.6.6", "X-Forwarded-For: 203.0.113.7", "X-Forwarded_For: 6.6.6.6"],
            ["X-Forwarded-For: 6.6.6.6", "x-forwarded-FOR: 203.0.113.7"],
            ["X-Forwarded-For: \t203.0.113.7 \t", "X-Forwarded-Extra: 1"],
        ],
    )
    async def test_the_client_is_the_last_that_is_no_proxy(
        self, relay: Relay, agent: ScriptedAgent, visit: Any, lines: list[str]
    ) -> None:
        rule(relay, {"addresses": {"rules": [{"allow": "203.0.113.7/32"}]}})
        assert (await (await visit(with_fields(*lines))).response())[0] == 200
        assert client(agent).endswith(b"203.0.113.7, 127.0.0.1")
        assert b"x-forwarded-extra" not in said(agent)

    async def test_trailers_say_nothing(self, relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
        trailers = b"X-Forwarded-For: 6.6.6.6\r\nX-Ok: 1\r\n\r\n"
        body = b"Transfer-Encoding: chunked\r\nTrailer: X-Forwarded-For\r\n\r\n1\r\na\r\n0\r\n" + trailers
        visitor = await visit(b"POST / HTTP/1.1\r\nHost: web.localhost\r\nX-Forwarded-For: 203.0.113.7\r\n" + body)
        assert (await visitor.response())[0] == 200
        await agent.streams[0].ended.wait()
        assert client(agent) == b"203.0.113.7, 127.0.0.1" and agent.streams[0].trailers == [b"X-Ok", b"1"]

    async def test_rules_and_rates_are_the_clients(self, relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
        """Of one connection of the proxy, one request after the other, alike but for whose they are; also pipelined."""
        rule(
            relay,
            {
                "addresses": {"rules": [{"deny": "203.0.113.9/32"}]},
                "rate_limits": {"client": {"requests": 1, "seconds": 60, "burst": 2}},
            },
        )
        proxy = await visit()
        asked = [7, 7, 9, 8, 7, 8, 9, 8]
        requests = [with_fields(f"X-Forwarded-For: 203.0.113.{last}") for last in asked]
        expected = [200, 200, 403, 200, 429, 200, 403, 429]
        for request, status in zip(requests[:4], expected[:4], strict=True):
            proxy.send(request)
            assert (await proxy.response())[0] == status
        proxy.send(b"".join(requests[4:]))
        assert [(await proxy.response())[0] for _ in range(4)] == expected[4:]
        assert len(agent.streams) == 4

    @pytest.mark.parametrize("value", ["unknown", "203.0.113.7, _hidden", "garbage", "10.1.1.1, ;"])
    async def test_an_unknown_client_passes_no_address_rule(
        self, relay: Relay, agent: ScriptedAgent, visit: Any, value: str
    ) -> None:
        request = with_fields(f"X-Forwarded-For: {value}")
        assert (await (await visit(request)).response())[0] == 200
        rule(relay, {"addresses": {"rules": [{"allow": "0.0.0.0/0"}, {"allow": "::/0"}]}})
        status, fields, _ = await (await visit(request)).response()
        assert (status, fields[b"portico-error"]) == (403, [b"edge.ip_denied"])

    async def test_https_at_the_proxy_is_https(self, relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
        rule(relay, {"plain_http": "redirect"})
        for lines, status in (
            (["X-Forwarded-Proto: https"], 200),
            (["X-Forwarded-Proto: http"], 308),
            (["X-Forwarded-Proto: HTTPS"], 200),
            (["X-Forwarded-Proto: https,http"], 308),
            (["X-Forwarded-Proto: https", "X-Forwarded-Proto: https"], 308),
            (["X-Forwarded-For: 203.0.113.7"], 308),
            (["Forwarded: for=203.0.113.7;proto=https"], 200),
        ):
            assert (await (await visit(with_fields(*lines))).response())[0] == status, lines

    async def test_plain_http_at_the_proxy_is_plain(self, relay: Relay, agent: ScriptedAgent) -> None:
        rule(relay, {"plain_http": "refuse"})
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port(relay, 2), ssl=any_certificate(), server_hostname="web.localhost"
        )
        proxy = Client(reader, writer)
        for lines, status in (([], 200), (["X-Forwarded-Proto: https"], 200), (["X-Forwarded-Proto: http"], 421)):
            proxy.send(with_fields(*lines))
            assert (await proxy.response())[0] == status
        writer.close()

    async def test_it_holds_any_number_of_connections(self, relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
        settings = relay.public.settings
        object.__setattr__(settings, "connections_per_address", 2)
        object.__setattr__(settings, "exempt_loopback", False)
        for _ in range(5):
            assert (await (await visit(GET)).response())[0] == 200

    @pytest.mark.parametrize("ident", ["short", "x" * 129, "a b c d e f g", "<script>alert(1)</script>", "\xe4" * 9])
    async def test_an_id_that_is_not_sane_is_ours(self, agent: ScriptedAgent, visit: Any, ident: str) -> None:
        visitor = await visit(with_fields(f"X-Request-Id: {ident}"))
        assert (await visitor.response())[0] == 200
        assert said(agent)[b"x-request-id"].startswith(b"req_")

    async def test_its_id_is_the_one_of_a_refusal(self, relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
        rule(relay, {"addresses": {"rules": [{"allow": "192.0.2.0/24"}]}})
        status, fields, body = await (await visit(with_fields("X-Request-Id: f3a9c1d2-77aa"))).response()
        assert status == 403 and fields[b"x-request-id"] == [b"f3a9c1d2-77aa"] and b"f3a9c1d2-77aa" in body

    async def test_a_head_that_others_repeat_is_read_here(self, relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
        """What the short way learned from an untrusted connection is not used for a proxy's."""
        request = with_fields("X-Forwarded-For: 203.0.113.7")
        forget()
        object.__setattr__(relay.public.trusted, "_known", {"127.0.0.1": False})
        await learn(await visit(), request)
        assert client(agent) == b"127.0.0.1"
        object.__setattr__(relay.public.trusted, "_known", {})
        proxy = await visit()
        for _ in range(3):
            proxy.send(request)
            assert (await proxy.response())[0] == 200
            assert client(agent) == b"203.0.113.7, 127.0.0.1"


BOTH = {"proxy_protocol_from": ("127.0.0.0/8",), "trusted_proxies": ("203.0.113.7/32",)}


@pytest.mark.parametrize("relay_settings", [BOTH])
async def test_a_proxy_behind_a_proxy(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    """A balancer that speaks PROXY for a web server that sets fields: each is believed for what it says."""
    fields = with_fields("X-Forwarded-For: 192.0.2.77")
    assert (await (await visit(V1 + fields)).response())[0] == 200
    assert client(agent) == b"192.0.2.77, 203.0.113.7"
    assert (await (await visit(V1.replace(b"7 198", b"8 198") + fields)).response())[0] == 200
    assert client(agent) == b"203.0.113.8"


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rule(relay: Relay, document: dict[str, Any]) -> None:
    """The tunnel's policy from now on."""
    live = relay.agents.by_tunnel["tun_web"]
    version = live.policy_version + 1
    changed = {"kind": "tunnel", "tunnel": row("web", policy={"version": 1} | document, policy_version=version)}
    relay.snapshot.apply({"type": "delta", "version": relay.snapshot.version + 1, "changes": [changed]})
    assert live.policy_version == version


async def test_a_network_that_is_none_is_refused_at_the_start(tmp_path: Any) -> None:
    from portico.errors import Problem
    from portico.settings import RelaySettings, Secret

    for setting in ("trusted_proxies", "proxy_protocol_from"):
        wrong: dict[str, Any] = {setting: ("10.0.0.1/8",)}
        with pytest.raises(Problem, match=setting):
            Relay(RelaySettings(relay_key=Secret("tnl_rly_unused"), state_dir=tmp_path, **wrong))
    assert grant("web")


@pytest.mark.parametrize("relay_settings", [TRUSTED | {"access_log": "access.log"}])
async def test_the_log_names_the_client_and_the_proxys_id(
    in_folder: None, relay: Relay, agent: ScriptedAgent, visit: Any
) -> None:
    request = with_fields("X-Forwarded-For: 203.0.113.7", "X-Request-Id: f3a9c1d2-77aa")
    assert (await (await visit(request)).response())[0] == 200
    assert relay.public.access is not None
    relay.public.access.flush()
    await agent.until(lambda: Path("access.log").read_text())
    line = json.loads(Path("access.log").read_text())
    assert (line["client"], line["request"]) == ("203.0.113.7", "f3a9c1d2-77aa")
