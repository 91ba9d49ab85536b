"""A small DNS server on real sockets, for tests: zones in a dict, and every way to be a bad one.

    async with DnsServer() as dns:
        dns.put("_portico-challenge.example.com", "TXT", "portico-verification=…")
        dns.address                      "127.0.0.1:40123", UDP and TCP

Names without records are NXDOMAIN; a name that has other records, or something below it, answers NODATA. ``mode``: see
``MODES``. Aliases are followed inside the server, as a resolver does, unless ``lazy``.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from typing import Any, Final

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

#: silent: no answer at all; servfail, refused: those; garbage: bytes; forge: first answers with another id, question and sender;
#: cut: every UDP answer is cut short, so that TCP is asked; good: none of them.
MODES: Final = ("good", "silent", "servfail", "refused", "garbage", "forge", "cut")


class DnsServer(asyncio.DatagramProtocol):
    """UDP and TCP on one port of the loopback."""

    def __init__(self, *, lazy: bool = False) -> None:
        self.records: dict[tuple[dns.name.Name, dns.rdatatype.RdataType], list[str]] = {}
        self.mode = "good"
        self.delay = 0.0
        self.lazy = lazy
        self.asked: Counter[tuple[str, str]] = Counter()
        self.by_tcp = 0
        self.address = ""
        self._transport: Any = None
        self._tcp: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> DnsServer:
        loop = asyncio.get_running_loop()
        for _ in range(50):  # the port of UDP may be taken for TCP
            self._transport, _ = await loop.create_datagram_endpoint(lambda: self, ("127.0.0.1", 0))
            port = self._transport.get_extra_info("sockname")[1]
            try:
                self._tcp = await asyncio.start_server(self._serve_tcp, "127.0.0.1", port)
            except OSError:
                self._transport.close()
                continue
            self.address = f"127.0.0.1:{port}"
            return self
        raise AssertionError("no port is free for both")

    async def __aexit__(self, *_: object) -> None:
        self._transport.close()
        if self._tcp is not None:
            self._tcp.close()
        for task in self._tasks:
            task.cancel()

    def put(self, name: str, type_: str, *values: str) -> None:
        """Set the records of a name; none: it has none of this type any more."""
        key = (dns.name.from_text(name), dns.rdatatype.from_text(type_))
        if values:
            self.records[key] = [f'"{value}"' if type_ == "TXT" else value for value in values]
        else:
            self.records.pop(key, None)

    # -- answering

    def _answer(self, query: dns.message.Message, *, udp: bool) -> dns.message.Message:
        question = query.question[0]
        self.asked[(question.name.to_text(omit_final_dot=True).lower(), dns.rdatatype.to_text(question.rdtype))] += 1
        answer = dns.message.make_response(query, recursion_available=True)
        if self.mode in ("servfail", "refused"):
            answer.set_rcode(dns.rcode.from_text(self.mode))
            return answer
        if self.mode == "cut" and udp:
            answer.flags |= dns.flags.TC
            return answer
        name, seen = question.name, set[Any]()
        while True:
            if (values := self._records(name, question.rdtype)) is not None:
                answer.answer.append(dns.rrset.from_text_list(name, 60, "IN", question.rdtype, values))
                return answer
            alias = self._records(name, dns.rdatatype.CNAME)
            if alias is None or name in seen:
                break
            seen.add(name)
            answer.answer.append(dns.rrset.from_text_list(name, 60, "IN", "CNAME", alias))
            if self.lazy:
                return answer
            name = dns.name.from_text(alias[0])
        if not any(known.is_subdomain(name) for known, _ in self.records):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        return answer

    def _records(self, name: dns.name.Name, type_: dns.rdatatype.RdataType) -> list[str] | None:
        """Of the name, or of a wildcard (RFC 4592) when nothing else is there."""
        if (found := self.records.get((name, type_))) is not None:
            return found
        if any(known == name for known, _ in self.records) or len(name.labels) < 2:
            return None
        return self.records.get((dns.name.from_text("*", name.parent()), type_))

    def connection_made(self, transport: Any) -> None:
        pass

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._spawn(self._serve_udp(data, addr))

    def _spawn(self, job: Any) -> None:
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_udp(self, data: bytes, addr: Any) -> None:
        query = dns.message.from_wire(data)
        if self.mode == "silent":
            self._answer(query, udp=True)
            return
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.mode == "garbage":
            self._transport.sendto(b"\x00\x01garbage", addr)
            return
        if self.mode == "forge":
            self._forge(query, addr)
        self._transport.sendto(self._answer(query, udp=True).to_wire(max_size=65_535), addr)

    def _forge(self, query: dns.message.Message, addr: Any) -> None:
        """Answers that somebody guesses: with another id, to another question, and from another socket."""
        question = query.question[0]
        lies = dns.rrset.from_text_list(question.name, 60, "IN", question.rdtype, ['"forged"'])
        other = dns.message.make_query(dns.name.from_text("other.example"), question.rdtype)
        other.id = query.id
        for wrong in (dns.message.make_response(query), dns.message.make_response(other)):
            wrong.answer.append(lies)
            if wrong.question == query.question:
                wrong.id = (query.id + 1) % 65_536
            self._transport.sendto(wrong.to_wire(), addr)
        spoofed = dns.message.make_response(query)
        spoofed.answer.append(lies)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(spoofed.to_wire(), addr)

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            length = int.from_bytes(await reader.readexactly(2), "big")
            query = dns.message.from_wire(await reader.readexactly(length))
            self.by_tcp += 1
            wire = self._answer(query, udp=False).to_wire(max_size=65_535)
            writer.write(len(wire).to_bytes(2, "big") + wire)
            await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()
