"""Asking the DNS, at several resolvers, and what they say together.

    looks = Looks(settings)
    answers = await looks.ask("www.example.com", "A")       one Answer per resolver, in their order
    verdict(answers, lambda values: …)                      yes, no or unknown: what more than half of all resolvers say

One resolver that lies, is slow or is behind decides nothing; with two, both must agree. An answer that never came is no answer:
it counts for neither side, so that an outage of resolvers takes nobody's domain away. Aliases are followed here, hop by hop and
never in circles, since a resolver may leave the rest of a chain to who asks.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.resolver

from portico.errors import Problem
from portico.settings import ApiSettings

#: Aliases that are followed, as many as Let's Encrypt's resolver does.
MAX_HOPS: Final = 10
#: Records of one answer that are looked at.
MAX_RECORDS: Final = 100
#: The resolvers of the machine (/etc/resolv.conf), as a word of the setting.
SYSTEM: Final = "system"
_MAX_TEXT: Final = 512

Status = Literal["found", "nodata", "nxdomain", "loop", "failed"]
Verdict = Literal["yes", "no", "unknown"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one resolver said. ``chain``: the names that aliases led to, in order; ``values``: records of the type that was asked
    for, at the end of it, as texts; ``why``: of a failure."""

    status: Status
    values: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()
    why: str = ""

    @property
    def sure(self) -> bool:
        """Whether the resolver answered, for better or worse."""
        return self.status != "failed"


def verdict(answers: Sequence[Answer], good: Callable[[Answer], bool]) -> Verdict:
    """What more than half of the resolvers say: that what they answer is ``good``, or that it is not."""
    yes = sum(answer.sure and good(answer) for answer in answers)
    no = sum(answer.sure and not good(answer) for answer in answers)
    if 2 * yes > len(answers):
        return "yes"
    return "no" if 2 * no > len(answers) else "unknown"


def common(answers: Sequence[Answer]) -> Answer:
    """The answer that most of those resolvers gave that answered at all; for showing."""
    sure = [answer for answer in answers if answer.sure]
    if not sure:
        return answers[0] if answers else Answer("failed", why="there is no resolver")
    return max(sure, key=sure.count)


@dataclass(frozen=True, slots=True)
class Server:
    """One resolver."""

    host: str
    port: int


def servers(texts: Sequence[str]) -> tuple[Server, ...]:
    """The resolvers that a setting names. Raises ``config.invalid``."""
    found = [server for text in texts for server in (_system() if text == SYSTEM else [_server(text)])]
    if not found:
        raise Problem("config.invalid", "setting dns_resolvers: names no resolver", key="dns_resolvers")
    return tuple(dict.fromkeys(found))


def _server(text: str) -> Server:
    host, port = text, "53"
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") or "53"
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    try:
        address, number = ipaddress.ip_address(host), int(port)
        if not 0 < number < 65_536:
            raise ValueError
    except ValueError:
        detail = f"setting dns_resolvers: {text!r} is not ADDRESS, ADDRESS:PORT or {SYSTEM}"
        raise Problem("config.invalid", detail, key="dns_resolvers") from None
    return Server(str(address), number)


def _system() -> list[Server]:
    try:
        return [Server(str(host), 53) for host in dns.resolver.Resolver(configure=True).nameservers]
    except dns.exception.DNSException:
        return []


class Looks:
    """Asks the resolvers of the settings. One per process; any number of questions at once, ``dns_concurrency`` on their way."""

    def __init__(self, settings: ApiSettings) -> None:
        self.servers = servers(settings.dns_resolvers)
        self._timeout = settings.dns_timeout_seconds
        self._places = asyncio.Semaphore(settings.dns_concurrency)

    async def ask(self, name: str, type_: str) -> list[Answer]:
        """What each resolver has at ``name``; aliases are followed, unless the alias itself is asked for. Never raises."""
        return list(await asyncio.gather(*(self._ask(server, name, type_) for server in self.servers)))

    async def _ask(self, server: Server, name: str, type_: str) -> Answer:
        try:
            async with self._places, asyncio.timeout(self._timeout):
                return await self._chase(server, dns.name.from_text(name), dns.rdatatype.from_text(type_))
        except TimeoutError:
            return Answer("failed", why="it did not answer in time")
        except (dns.exception.DNSException, OSError, EOFError, ValueError) as err:
            return Answer("failed", why=f"{type(err).__name__}: {err}"[:200])

    async def _chase(self, server: Server, name: dns.name.Name, type_: dns.rdatatype.RdataType) -> Answer:
        chain: list[dns.name.Name] = []
        seen = {name}
        while True:
            response = await self._query(server, name, type_)
            code = response.rcode()
            if code not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                return Answer("failed", chain=_texts(chain), why=dns.rcode.to_text(code))
            before = name
            while True:
                values = _values(response, name, type_)
                if values:
                    return Answer("found", values, _texts(chain))
                alias = None if type_ == dns.rdatatype.CNAME else _alias(response, name)
                if alias is None:
                    break
                chain.append(alias)
                if alias in seen or len(chain) > MAX_HOPS:
                    return Answer("loop", chain=_texts(chain))
                seen.add(alias)
                name = alias
            if name == before or code == dns.rcode.NXDOMAIN:
                return Answer("nxdomain" if code == dns.rcode.NXDOMAIN else "nodata", chain=_texts(chain))

    async def _query(
        self, server: Server, name: dns.name.Name, type_: dns.rdatatype.RdataType
    ) -> dns.message.QueryMessage:
        """One question, by UDP and, when the answer is too long for that, by TCP. A packet that is no answer to it (another id,
        question or sender) is passed over: somebody may be guessing. Half the time is left for a second try: packets get lost."""
        query = dns.message.make_query(name, type_, use_edns=0, payload=1232)
        half = self._timeout / 2
        for last in (False, True):
            try:
                response, _ = await dns.asyncquery.udp_with_fallback(
                    query, server.host, half, server.port, ignore_unexpected=True, ignore_errors=True
                )
            except dns.exception.Timeout:
                if last:
                    raise
                continue
            assert isinstance(response, dns.message.QueryMessage)
            return response
        raise AssertionError("unreachable")


def _texts(names: Sequence[dns.name.Name]) -> tuple[str, ...]:
    return tuple(plain(name) for name in names)


def plain(name: dns.name.Name) -> str:
    """A name as we write it: lower case, without the last dot."""
    return name.to_text(omit_final_dot=True).lower()


def _values(response: dns.message.QueryMessage, name: dns.name.Name, type_: dns.rdatatype.RdataType) -> tuple[str, ...]:
    found: Any = response.get_rrset(response.answer, name, dns.rdataclass.IN, type_)
    if found is None:
        return ()
    return tuple(sorted(_storable(_text(each)[:_MAX_TEXT]) for each in list(found)[:MAX_RECORDS]))


def _storable(text: str) -> str:
    """What anybody may publish is stored, shown in terminals and compared: no NUL, no escape sequence survives."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _text(value: Any) -> str:
    match value.rdtype:
        case dns.rdatatype.TXT:
            return b"".join(value.strings).decode("utf-8", "replace")
        case dns.rdatatype.CNAME:
            return plain(value.target)
        case dns.rdatatype.CAA:
            tag, text = value.tag.decode("ascii", "replace").lower(), value.value.decode("utf-8", "replace")
            return f"{value.flags} {tag} {text}"
        case _:
            return str(value.to_text())


def _alias(response: dns.message.QueryMessage, name: dns.name.Name) -> dns.name.Name | None:
    found: Any = response.get_rrset(response.answer, name, dns.rdataclass.IN, dns.rdatatype.CNAME)
    target = next(iter(found)).target if found else None
    return target if isinstance(target, dns.name.Name) else None
