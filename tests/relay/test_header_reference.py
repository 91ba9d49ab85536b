"""The examples of docs/reference/headers.md are what happens: sent by a visitor, through a real relay and agent, to a target. And
forwarding fields cannot be made up by a visitor, however they are spelled."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from argon2 import PasswordHasher

from portico.errors import catalogue
from portico.relay import decide
from portico.relay.server import Relay
from tests.relay.doubles import Client, port
from tests.relay.edge import online

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reference" / "headers.md").read_text(encoding="utf-8")
Visit = Callable[..., Any]

#: Every example is four messages: a visitor's, the same at the app, the app's answer, the same at the visitor.
BLOCKS = re.findall(r"```http\n(.*?)```", PAGE, re.DOTALL)


def example(number: int) -> list[str]:
    return BLOCKS[4 * number : 4 * number + 4]


def raw(text: str) -> bytes:
    return text.replace("shop.example.com", "web.localhost").replace("\n", "\r\n").encode() + b"\r\n"


def plain(head: bytes, public: int, peer: str) -> str:
    """A head as the page writes it; ``peer``: who we are there."""
    text = head.decode().replace("\r\n", "\n").removesuffix("\n").replace("127.0.0.1", peer)
    text = text.replace("web.localhost", "shop.example.com").replace(
        f"X-Forwarded-Port: {public}", "X-Forwarded-Port: 80"
    )
    return re.sub(r"req_[0-9a-f]{22}", "req_ID", text)


def policy_of_the_page() -> dict[str, Any]:
    """The rules of the second example, stored as the API does."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    document: dict[str, Any] = yaml.safe_load(text)
    for user in document["basic_auth"]["users"]:
        user["digest"] = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash(user.pop("password"))
    return document


@pytest.mark.parametrize(
    ("number", "peer", "relay_settings"),
    [
        (0, "203.0.113.7", {}),
        (1, "203.0.113.7", {}),
        (2, "10.0.0.2", {"trusted_proxies": ("127.0.0.0/8",)}),
    ],
)
async def test_examples(relay: Relay, visit: Visit, number: int, peer: str) -> None:
    sent, got, answered, returned = example(number)
    async with online(relay, policy_of_the_page() if number == 1 else {}) as edge:
        edge.target.answer = raw(answered) + b"hello"
        client: Client = await visit(raw(sent))
        head = await client.read_head()
        assert await client.read(5) == b"hello"
        public = port(relay, 1)
        assert plain(bytes(edge.target.sent), public, peer) == re.sub(r"req_[0-9a-f]{22}", "req_ID", got)
        assert plain(head, public, peer) == returned


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 12


SPOOFS = [
    *("X-Forwarded-For", "x-forwarded-for", "X-FORWARDED-FOR", "X_Forwarded_For", "X-Forwarded_For", "x_forwarded_for"),
    *("X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port", "X-Forwarded-Scheme", "X-Forwarded-Ssl", "X-Forwarded-Prefix"),
    *("X-Forwarded-Server", "X-Forwarded-By", "Forwarded", "FORWARDED", "X-Request-Id", "X_Request_Id"),
]  # fmt: skip


@pytest.mark.parametrize("name", SPOOFS)
async def test_a_visitor_cannot_say_where_it_comes_from(relay: Relay, visit: Visit, name: str) -> None:
    """In heads, again when the head is a known one, repeated, named by Connection, and in trailers."""
    spoof = f"{name}: 6.6.6.6".encode()
    async with online(relay, {}) as edge:
        client: Client = await visit()
        for more in (spoof, spoof + b"\r\n" + spoof, b"Connection: keep-alive, %b\r\n%b" % (name.encode(), spoof)):
            for _ in range(3):
                client.send(b"GET / HTTP/1.1\r\nHost: web.localhost\r\n%b\r\n\r\n" % more)
                assert (await client.response())[0] == 200
        client.send(
            b"POST / HTTP/1.1\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n%b\r\n\r\n" % spoof
        )
        assert (await client.response())[0] == 200
        sent = bytes(edge.target.sent)
    assert b"6.6.6.6" not in sent and sent.count(b"X-Forwarded-For: 127.0.0.1\r\n") == 10
    assert sent.lower().count(b"\r\nforwarded:") == sent.lower().count(b"\r\nx-request-id:") == 10


def test_the_page_on_decisions_has_the_chain() -> None:
    """Its table names the steps in their order, and of each the codes that it can give, with their status."""
    page = (DOCS / "explanation" / "decisions-at-the-edge.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [0-9]? ?\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == [step.name for step in decide.STEPS]
    for (name, refusals), step in zip(rows, decide.STEPS, strict=True):
        codes = set(re.findall(r'"(edge\.\w+)"', inspect.getsource(step.check)))
        if "_PASSWORD_CODES" in inspect.getsource(step.check):
            codes |= {code for code in decide._PASSWORD_CODES.values() if code and code.startswith("edge.")}
        if "CLOSED" in inspect.getsource(step.check):
            codes |= set(decide.CLOSED)
        said = {code: int(status) for status, code in re.findall(r"(\d{3}) `(edge\.\w+)`", refusals)}
        assert said == {code: catalogue()[code].status for code in codes}, name
