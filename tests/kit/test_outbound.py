"""The client for addresses that customers name: which it calls, and what receivers can do to it."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from portico.kit import outbound
from portico.kit.dial import Address
from portico.kit.outbound import Client, Limits, OutboundError, is_public
from portico.simulators.webhooks import Behaviour, WebhookReceiver
from tests.authority import Authority
from tests.timing import PATIENCE_SECONDS

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def server_context(authority: Authority, name: str = "localhost") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue(name, name))
    return context


def client(authority: Authority, port: int, **more: Any) -> Client:
    limits = replace(Limits(timeout_seconds=5.0, body_seconds=0.3, ports=(port,), allow=LOOPBACK), **more)
    return Client(limits, context=authority.client())


async def fault(asked: Client, url: str) -> str:
    with pytest.raises(OutboundError) as refused:
        await asked.post(url, {}, b"{}")
    return refused.value.fault


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "127.255.0.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
     "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9",
     "192.88.99.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fc00::1",
     "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1",
     "64:ff9b::a00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "100::1"],
)  # fmt: skip
def test_addresses_that_are_not_public(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", ["1.1.1.1", "93.184.215.14", "2606:4700::1111", "::ffff:1.1.1.1", "2a00:1450::1"])
def test_addresses_that_are(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://example.com/", "url"), ("ftp://example.com/", "url"), ("file:///etc/passwd", "url"), ("", "url"),
        ("https://", "url"), ("https://user:pass@example.com/", "url"), ("https://user@example.com/", "url"),
        ("https://example.com:22/", "url"), ("https://example.com:0/", "url"), ("https://example.com:99999/", "url"),
        ("https://example.com/\r\nx: y", "url"), ("https://example.com/ü", "url"), ("https://exa mple.com/", "url"),
        ("https://example.com\\@127.0.0.1/", "url"), ("https://[::1", "url"), ("https://e.com/" + "a" * 2048, "url"),
        ("https://127.0.0.1/", "address"), ("https://[::1]/", "address"), ("https://[::ffff:10.0.0.1]/", "address"),
        ("https://[fe80::1%25eth0]/", "address"), ("https://169.254.169.254/latest/meta-data/", "address"),
        ("https://localhost/", "address"), ("https://metadata.localhost/", "address"),
        ("https://2130706433/", "address"), ("https://0x7f.1/", "address"), ("https://0177.0.0.1/", "address"),
        ("https://a..b/", "name"),
    ],
)  # fmt: skip
async def test_what_is_never_called(url: str, expected: str) -> None:
    assert await fault(Client(Limits()), url) == expected


def answers(*rounds: Sequence[str]) -> tuple[Callable[[str, int], Any], list[str]]:
    """A name server that answers with these addresses, each time the next; and what it was asked."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[Address]:
        found = rounds[min(len(asked), len(rounds) - 1)]
        asked.append(host)
        families = [socket.AF_INET6 if ":" in each else socket.AF_INET for each in found]
        return [(family, socket.SOCK_STREAM, 0, "", (each, port)) for family, each in zip(families, found, strict=True)]

    return resolve, asked


@pytest.mark.parametrize(
    "found", [["10.0.0.7"], ["1.1.1.1", "10.0.0.7"], ["10.0.0.7", "1.1.1.1"], ["1.1.1.1", "::ffff:10.0.0.7"]]
)
async def test_one_private_address_in_the_answer_is_enough(found: list[str]) -> None:
    resolve, asked = answers(found)
    assert await fault(Client(Limits(), resolve=resolve), "https://hooks.example.com/") == "address"
    assert asked == ["hooks.example.com"]


async def test_the_address_that_was_checked_is_the_one_that_is_called(authority: Authority) -> None:
    """A name that would answer otherwise when asked again (rebinding) is not asked again."""
    async with WebhookReceiver(server_context(authority, "hooks.test")) as receiver:
        resolve, asked = answers(["127.0.0.1"], ["10.0.0.7"])
        limits = Limits(ports=(receiver.port,), allow=LOOPBACK)
        asker = Client(limits, context=authority.client(), resolve=resolve)
        assert (await asker.post(f"https://hooks.test:{receiver.port}/a?b=c", {"x": "y"}, b"hi")).status == 200
    (got,) = receiver.got
    assert asked == ["hooks.test"] and got.path == "/a?b=c" and got.body == b"hi" and got.headers["x"] == "y"
    assert got.headers["host"] == f"hooks.test:{receiver.port}"


async def test_names_without_an_address(authority: Authority) -> None:
    resolve, _ = answers([])
    assert await fault(Client(Limits(), resolve=resolve), "https://gone.example.com/") == "name"


async def test_proxies_of_the_environment_are_not_asked(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with WebhookReceiver(server_context(authority)) as receiver:
        assert (await client(authority, receiver.port).post(receiver.url, {}, b"")).status == 200


async def test_certificates_are_checked(authority: Authority) -> None:
    async with WebhookReceiver(server_context(authority, "other.test")) as receiver:
        assert await fault(client(authority, receiver.port), receiver.url) == "tls", "another name"
    async with WebhookReceiver(server_context(authority)) as receiver:
        untrusting = Client(Limits(ports=(receiver.port,), allow=LOOPBACK))
        assert await fault(untrusting, receiver.url) == "tls", "nobody's authority"
    assert not receiver.got
    async with WebhookReceiver() as receiver:
        asked = client(authority, receiver.port)
        assert await fault(asked, receiver.url.replace("http:", "https:")) == "tls"
        assert await fault(asked, receiver.url) == "url", "http is for development"
        plain = Client(replace(asked.limits, http=True))
        assert (await plain.post(receiver.url, {}, b"")).status == 200


async def test_redirects_are_answers(authority: Authority) -> None:
    async with WebhookReceiver(server_context(authority)) as receiver:
        receiver.plan(Behaviour(status=307, headers={"location": receiver.url}))
        answer = await client(authority, receiver.port).post(receiver.url, {}, b"")
    assert (answer.status, answer.headers["location"]) == (307, receiver.url) and len(receiver.got) == 1


async def test_answers_come_with_head_and_body(authority: Authority) -> None:
    async with WebhookReceiver(server_context(authority)) as receiver:
        receiver.plan(Behaviour(status=429, headers={"Retry-After": "7"}, body=b"busy"))
        answer = await client(authority, receiver.port).post(receiver.url, {}, b"")
    assert (answer.status, answer.headers["retry-after"], answer.body) == (429, "7", b"busy")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("reset", "answer"), ("reset_in_head", "answer"), ("garbage", "answer"), ("interim", "answer"), ("big_head", "answer"),
     ("hang", "time")],
)  # fmt: skip
async def test_receivers_that_misbehave(authority: Authority, kind: Any, expected: str) -> None:
    async with WebhookReceiver(server_context(authority)) as receiver:
        receiver.plan(Behaviour(kind))
        asked = client(authority, receiver.port, timeout_seconds=0.5 if kind == "hang" else 5.0)
        assert await fault(asked, receiver.url) == expected


@pytest.mark.parametrize("kind", ["reset_in_body", "endless"])
async def test_once_the_head_is_there_the_body_matters_no_more(authority: Authority, kind: Any) -> None:
    async with WebhookReceiver(server_context(authority)) as receiver:
        receiver.plan(Behaviour(kind))
        answer = await client(authority, receiver.port, body_bytes=50_000).post(receiver.url, {}, b"")
    assert answer.status == 200 and len(answer.body) <= 50_000


async def test_a_receiver_that_drips_has_the_time_of_all(authority: Authority) -> None:
    async with WebhookReceiver(server_context(authority)) as receiver:
        receiver.plan(Behaviour("drip", seconds=0.05))
        began = time.monotonic()
        assert await fault(client(authority, receiver.port, timeout_seconds=0.5), receiver.url) == "time"
        assert time.monotonic() - began < PATIENCE_SECONDS


async def test_a_receiver_that_reads_nothing_has_no_more(authority: Authority) -> None:
    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(30)

    server = await asyncio.start_server(ignore, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    asked = Client(Limits(timeout_seconds=0.5, ports=(port,), http=True, allow=LOOPBACK))
    with pytest.raises(OutboundError) as refused:
        await asked.post(f"http://localhost:{port}/", {}, b"x" * 4_000_000)
    assert refused.value.fault == "time"
    server.close()


async def test_nothing_can_be_smuggled_in_a_header(authority: Authority) -> None:
    async with WebhookReceiver(server_context(authority)) as receiver:
        with pytest.raises(Exception, match=r"[Ii]llegal"):
            await client(authority, receiver.port).post(receiver.url, {"x": "y\r\nhost: evil"}, b"")
    assert not receiver.got


def test_ranges_have_gaps() -> None:
    assert all(not is_public(network[1]) for network in outbound._CARRIES_V4)
