"""What tests of requests and answers that were seen before share: a visitor whose next request is known, and whole answers."""

from __future__ import annotations

from portico.relay import heads
from portico.relay.http1 import Visitor
from portico.relay.server import Relay
from portico.wire import frames as f
from tests.relay.doubles import Client, ScriptedStream

SECTION = b"Host: web.localhost\r\nAccept: text/html\r\nCookie: a=b\r\n\r\n"
GET = b"GET /a HTTP/1.1\r\n" + SECTION


def forget() -> None:
    """Empty every memo of the relay, as in a new process."""
    for memo in (heads.KNOWN_HEADS, heads.KNOWN_ANSWERS):
        memo.clear()
        memo._seen.clear()
    heads.PLAIN_LINES.clear()


def whole(
    s: ScriptedStream,
    body: bytes = b"hello",
    status: int = 200,
    fields: tuple[bytes, ...] = (),
    length: int | None = -1,
) -> None:
    """The answer as one ANSWER frame; ``length`` is announced, -1 for the body's own, ``None`` for none."""
    announced = () if length is None else (b"Content-Length", b"%d" % (len(body) if length == -1 else length))
    begin = f.encode_answer(f.encode_response(status, [b"OK", *fields, *announced]))
    s.stream.session.put(f.frame(f.ANSWER, s.stream.id, begin + body))
    s.stream.close()


def visitors(relay: Relay) -> list[Visitor]:
    """The relay's ends of the visitors' connections."""
    return [guest for guest in relay.public.connections if isinstance(guest, Visitor)]


async def learn(client: Client, request: bytes = GET, answers: int = 3) -> None:
    """Ask until request and answer are known."""
    for _ in range(answers):
        client.send(request)
        assert (await client.response())[0] == 200
    assert request.partition(b"\r\n")[2] in heads.KNOWN_HEADS
