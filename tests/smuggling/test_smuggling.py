"""No request is taken for two, and no answer: not by the relay, the agent, the target or the next visitor.

Every try is a connection: (requests that the relay and the agent then know,) the attack, and a victim's request behind it. All
tries run side by side, once; then each is looked at, and in the end everything that reached the target, by two parsers.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections import Counter
from dataclasses import dataclass, field

import h11
import pytest

from tests.differential.exact import Answer, Connection, Way
from tests.smuggling import target, vectors
from tests.smuggling.conftest import Ground

pytestmark = pytest.mark.system
#: Seconds without anything new, after which a connection that stays open is left.
QUIET = 2.0
AT_ONCE = 40
WARM = 3
#: How an attack comes: on a new connection; behind requests with known fields; after the same attack, twice; over TLS.
MODES = ("new", "known", "again", "tls")
_numbers = itertools.count(1)


@dataclass
class Try:
    """One connection: what was sent, what came back, and the marks that it left at the target."""

    number: int
    sent: bytes = b""
    heard: bytes = b""
    open: bool = False
    answers: list[Answer] = field(default_factory=list)

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers]


def fill(data: bytes, number: int, host: bytes) -> bytes:
    inner = vectors.INNER.replace(b"%N%", b"%d" % number).replace(b"%HOST%", host)
    data = data.replace(b"%N%", b"%d" % number).replace(b"%HOST%", host)
    return data.replace(b"%L%", b"%d" % len(inner)).replace(b"%X%", b"%x" % len(inner))


def get(path: bytes, host: bytes, more: bytes = b"") -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: %b\r\nAccept: */*\r\n%b\r\n" % (path, host, more)


async def hear(connection: Connection, made: Try) -> None:
    """Everything until the end, or until nothing comes any more."""
    try:
        while data := await asyncio.wait_for(connection.reader.read(2**20), QUIET):
            made.heard += data
    except TimeoutError:
        made.open = True
    except (OSError, ssl.SSLError):
        pass


async def attempt(way: Way, host: bytes, attack: bytes, *, warm: int, method: bytes = b"GET") -> Try:
    made = Try(next(_numbers))
    async with way.connect() as connection:
        for _ in range(warm):
            await connection.send(get(b"/known-%d" % made.number, host))
            assert (await connection.answer()).status == 200
        made.sent = fill(attack, made.number, host)
        await connection.send(made.sent + get(b"/victim-%d" % made.number, host, b"Connection: close\r\n"))
        await hear(connection, made)
    await parse(made, method)
    return made


async def parse(made: Try, method: bytes) -> None:
    """The answers, read strictly, and by h11 as well."""
    reader = asyncio.StreamReader(limit=2**25)
    reader.feed_data(made.heard)
    reader.feed_eof()
    connection = Connection(reader, None)  # type: ignore[arg-type]
    while not reader.at_eof():
        try:
            made.answers.append(await connection.answer(head_only=not made.answers and method == b"HEAD"))
        except asyncio.IncompleteReadError:
            break  # an answer that broke off: the connection ended with it
    assert statuses_by_h11(made.heard, method) == made.statuses


def statuses_by_h11(heard: bytes, method: bytes) -> list[int]:
    found: list[int] = []
    rest = heard
    while rest:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=2**20)
        connection.send(h11.Request(method=b"GET" if found else method, target=b"/", headers=[(b"Host", b"a")]))
        connection.send(h11.EndOfMessage())
        connection.receive_data(rest)
        connection.receive_data(b"")
        status = 0
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError:
                return found
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed) or event is h11.NEED_DATA or event is h11.PAUSED:
                return found
        found.append(status)
        rest = connection.trailing_data[0]
    return found


async def tries(ground: Ground, attack: bytes, mode: str, method: bytes = b"GET") -> list[Try]:
    way = ground.https if mode == "tls" else ground.http
    count = 3 if mode == "again" else 1
    return [
        await attempt(way, ground.host, attack, warm=WARM if mode == "known" else 0, method=method)
        for _ in range(count)
    ]


def method_of(attack: bytes) -> bytes:
    return b"HEAD" if attack.startswith(b"HEAD ") else b"GET"


ATTACKS: dict[str, bytes] = {
    **vectors.REFUSED,
    **vectors.BROKEN,
    **vectors.ENDLESS,
    **{name: data for name, (data, _) in vectors.PASS.items()},
}
Outcomes = dict[tuple[str, str], list[Try]]


@pytest.fixture(scope="module")
def outcomes(ground: Ground) -> Outcomes:
    """Every attack in every mode."""

    async def everything() -> Outcomes:
        turn = asyncio.Semaphore(AT_ONCE)

        async def one(name: str, mode: str) -> tuple[tuple[str, str], list[Try]]:
            async with turn:
                return (name, mode), await tries(ground, ATTACKS[name], mode, method_of(ATTACKS[name]))

        return dict(await asyncio.gather(*(one(name, mode) for name in ATTACKS for mode in MODES)))

    return asyncio.run(everything())


@pytest.fixture(scope="module")
def seen(ground: Ground, outcomes: Outcomes) -> list[target.Request]:
    """All that reached the target as whole requests, as two parsers agree on it."""
    assert not ground.recorder.faults
    return [request for stream in ground.recorder.connections for request in target.requests(bytes(stream))]


def marks(seen: list[target.Request], number: int) -> Counter[bytes]:
    """How often which paths of a try were seen."""
    found: Counter[bytes] = Counter()
    for request in seen:
        path, _, rest = request.target.partition(b"-%d" % number)
        if rest[:1] in (b"", b"?", b"%") and request.target != path:
            found[path] += 1
    return found


@pytest.mark.parametrize("name", [*vectors.REFUSED, *vectors.BROKEN])
def test_it_is_refused_and_nothing_comes_through(outcomes: Outcomes, seen: list[target.Request], name: str) -> None:
    for mode in MODES:
        for made in outcomes[name, mode]:
            assert made.statuses in ([400], [431]), (mode, made)
            assert made.answers[0].head.values(b"connection") == [b"close"] and not made.open, (mode, made)
            found = marks(seen, made.number)
            found.pop(b"/known", 0)
            assert not found, (mode, made)


@pytest.mark.parametrize("name", vectors.ENDLESS)
def test_what_does_not_end_is_no_request(outcomes: Outcomes, seen: list[target.Request], name: str) -> None:
    for mode in MODES:
        for made in outcomes[name, mode]:
            assert made.open and made.heard == b"", (mode, made)
            found = marks(seen, made.number)
            found.pop(b"/known", 0)
            assert not found, (mode, made)


@pytest.mark.parametrize("name", vectors.PASS)
def test_it_is_one_request_and_so_is_the_victims(outcomes: Outcomes, seen: list[target.Request], name: str) -> None:
    body = vectors.PASS[name][1]
    for mode in MODES:
        for made in outcomes[name, mode]:
            assert made.statuses == [200, 200], (mode, made)
            assert made.answers[1].body == b"GET /victim-%d 0" % made.number, (mode, made)
            found = marks(seen, made.number)
            found.pop(b"/known", 0)
            assert found == {b"/try": 1, b"/victim": 1}, (mode, made, found)
            (request,) = (r for r in seen if r.target.startswith(b"/try-%d" % made.number) and marks([r], made.number))
            expected = vectors.INNER.replace(b"%N%", b"%d" % made.number) if body == vectors.INNER else body
            assert request.body.replace(b"Host: ", b"") == expected.replace(b"Host: %HOST%", request.fields[0][1])


def test_nothing_reached_the_target_that_nobody_asked_for(outcomes: Outcomes, seen: list[target.Request]) -> None:
    kinds = Counter(request.target.split(b"-")[0] for request in seen)
    assert set(kinds) <= {b"/try", b"/victim", b"/known", b"/answer", b"/bystander"}
    asked = [made for many in outcomes.values() for made in many]
    assert kinds[b"/known"] == WARM * sum(1 for (_, mode) in outcomes if mode == "known")
    assert kinds[b"/victim"] == sum(1 for made in asked if made.statuses == [200, 200])
    for request in seen:
        names = [name for name, _ in request.fields]
        assert names.count(b"host") == 1
        assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
        assert names.count(b"x-forwarded-for") == names.count(b"x-request-id") == 1


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", vectors.ANSWERS)
async def test_an_answer_is_one_answer_to_one_visitor(ground: Ground, name: str) -> None:
    number = list(vectors.ANSWERS).index(name)
    _, method = vectors.ANSWERS[name]
    attack = b"%b /answer-%d HTTP/1.1\r\nHost: %%HOST%%\r\n\r\n" % (method, number)
    for mode in ("new", "known", "tls"):
        (made,) = await tries(ground, attack, mode, method)
        others = await asyncio.gather(*(bystander(ground) for _ in range(3)))
        assert others == [200] * 3
        assert not made.open, (mode, made)
        if name in vectors.BREAK_OFF:
            assert made.heard.startswith(b"HTTP/1.1 200 OK\r\n") and not made.answers, (mode, made)
            continue
        first, *rest = made.answers
        ours = first.head.values(b"portico-error")
        assert (first.status == 502) == (ours == [b"edge.target_invalid"]), (mode, made)
        assert b"Smuggled" not in first.head.first and not first.head.values(b"set-cookie")
        assert all(not name.lower().startswith(b"portico") for name, _ in first.trailers)
        # The victim behind it gets its own answer, or none where the connection had to end.
        assert [answer.body for answer in rest] in ([], [b"GET /victim-%d 0" % made.number]), (mode, made)


async def bystander(ground: Ground) -> int:
    """Somebody else's request right after, perhaps over the same connection to the target."""
    number = next(_numbers)
    async with asyncio.timeout(5), ground.http.connect() as connection:
        await connection.send(get(b"/bystander-%d" % number, ground.host, b"Connection: close\r\n"))
        answer = await connection.answer()
        assert answer.body == b"GET /bystander-%d 0" % number
        assert await connection.rest() == b""
        return answer.status
