"""The public TLS port: every connection is looked at before a handshake begins, then passed through or terminated.

    accept ─► counted ─► ClientHello peeked ─┬─► a certificate authority asks whose the name is (RFC 8737): handshake, and no more
                                             ├─► a live passthrough tunnel has the name: the socket goes there, nothing was read
                                             └─► certificate, client CA and ALPN chosen ─► handshake ─► Visitor

The hello stays in the socket, so that whoever takes the connection reads it as the first bytes. The context is chosen before the
handshake: exchanged within it, as OpenSSL's own callback for names does, the checks of client certificates would stay
those of the first context. A connection is one guest of ``PublicServer`` from its accept on, with one deadline for
hello and handshake, and no task before its hello is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import logging
import socket
import ssl
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from portico.kit import proxy_protocol
from portico.kit.networks import network
from portico.kit.proxy_protocol import Place
from portico.relay import challenges
from portico.relay.certificates import ALPN, CertificateStore
from portico.relay.door import Door
from portico.relay.exchange import request_id
from portico.relay.hello import (
    INTERNAL_ERROR,
    NO_APPLICATION_PROTOCOL,
    UNRECOGNIZED_NAME,
    Hello,
    Invalid,
    NeedMore,
    alert,
    parse,
)
from portico.relay.http1 import plain_address

if TYPE_CHECKING:
    from portico.relay.listeners import Guest, PublicServer

log = logging.getLogger("portico.relay.tls_port")

#: Connections taken from the queue before the loop does something else.
ACCEPTS_PER_TICK: Final = 16
#: Handshakes begun before the loop does something else: each is half a millisecond of a core, and requests go on between them.
HANDSHAKES_PER_TICK: Final = 4
#: For each second of handshakes, seconds that the loop has for everything else before the next ones begin. What else a new
#: connection costs is more than the first, so that nothing is lost by it; the second is for while others ask on connections that
#: they have: who only begins handshakes, as fast as can be, takes a fifth of the loop from them.
PAUSE_ALONE: Final = 1.5
PAUSE_AMONG_OTHERS: Final = 4.0
#: Seconds for which somebody who asked on a connection that it has counts as others.
OTHERS_SECONDS: Final = 0.25
#: The shortest pause of accepting: loops count milliseconds, and what is owed adds up until it is as much.
SHORTEST_PAUSE: Final = 0.002
#: The longest one, whatever is owed: who sends a handshake in crumbs, each of which is looked at, would else put off all others
#: for as long as he did, and so would a process that stood still in the middle of one.
LONGEST_PAUSE: Final = 0.25
#: Seconds without accepting after the process ran out of descriptors or memory.
OUT_OF_RESOURCES_SECONDS: Final = 1.0
_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
#: Bytes looked at for the first time: most hellos are smaller.
FIRST_PEEK: Final = 4096
_HTTP_STARTS: Final = (b"GET ", b"POST", b"HEAD", b"PUT ", b"OPTI", b"DELE", b"PATC", b"CONN", b"TRAC", b"PRI ")

#: What became of connections that had no handshake, or a failed one.
FAILURES: Final = (
    "too_many",  # over a limit, refused unheard
    "proxy_header", "hello_timeout", "hello_gone", "not_tls", "plain_http", "malformed", "too_large", "bad_name",
    "unknown_name", "unknown_name_ech", "no_protocol", "handshake_timeout", "handshake_gone",
    "version", "cipher", "client_certificate", "handshake", "internal",
)  # fmt: skip

Passthrough = Callable[[socket.socket, Hello, Any, Place | None], bool]
ClientCa = Callable[[bytes], tuple[str, str] | None]


class TlsStats:
    """Plain counters of one port; read by whoever exports them."""

    __slots__ = ("accepted", "failures", "passed_through", "proved", "resumed", "versions")

    def __init__(self) -> None:
        self.accepted = 0
        #: Finished handshakes by version (``TLSv1.2``, ``TLSv1.3``), and how many of them resumed a session.
        self.versions: dict[str, int] = {"TLSv1.2": 0, "TLSv1.3": 0}
        self.resumed = 0
        self.passed_through = 0
        #: Validations of certificate authorities that were answered here.
        self.proved = 0
        self.failures: dict[str, int] = dict.fromkeys(FAILURES, 0)


#: The socket whose handshake the running task does.
_SOCKET: contextvars.ContextVar[socket.socket | None] = contextvars.ContextVar("portico_tls_socket", default=None)


class _Pace:
    """When the next handshakes may begin, on the clock of ``time.monotonic``: one for the process."""

    free_at = 0.0
    pause = PAUSE_ALONE


class Turns:
    """Those who wait for their handshake. Addresses take turns: one that brings thousands waits behind itself. An IPv6 client has
    a whole network of them, so networks do."""

    def __init__(self) -> None:
        self._by_address: OrderedDict[str, deque[Arrival]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, arrival: Arrival) -> None:
        self._by_address.setdefault(network(arrival.address), deque()).append(arrival)
        self._count += 1

    def pop(self) -> Arrival:
        """The next one, which may have been closed meanwhile; there must be one."""
        address, line = self._by_address.popitem(last=False)
        arrival = line.popleft()
        if line:
            self._by_address[address] = line
        self._count -= 1
        return arrival

    def drop(self, than: str) -> Arrival | None:
        """The last one of the address that has most, for one of ``than`` that there is no room for; ``None``: none has more."""
        than = network(than)
        address = max(self._by_address, key=lambda one: len(self._by_address[one]), default=than)
        if address == than or len(self._by_address[address]) <= 1 + len(self._by_address.get(than, ())):
            return None
        self._count -= 1
        return self._by_address[address].pop()


class EdgeObject(ssl.SSLObject):
    """A TLS connection that tells its client why its handshake failed.

    Event loops drop what OpenSSL wrote when a handshake fails, so that the client would see a connection that ends for no
    reason. The alert is sent past them, before they close.
    """

    outgoing: ssl.MemoryBIO | None = None
    sock: socket.socket | None = None

    def do_handshake(self) -> None:
        began = time.monotonic()
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError:
            if self.outgoing is not None and self.sock is not None and (last := self.outgoing.read()):
                with contextlib.suppress(OSError):
                    self.sock.send(last)
            self.outgoing = self.sock = None
            raise
        finally:
            now = time.monotonic()
            owed = max(_Pace.free_at, began) + (now - began) * (1 + _Pace.pause)
            _Pace.free_at = min(owed, max(_Pace.free_at, now + LONGEST_PAUSE))
        self.outgoing = self.sock = None

    def shorten(self) -> None:
        """Let event loops call the functions that these methods do nothing but call: four frames less for a small request, and
        two for each 16 KiB of a body."""
        below = getattr(self, "_sslobj", None)
        if below is not None:
            self.read, self.write, self.pending = below.read, below.write, below.pending  # type: ignore[method-assign]


class EdgeContext(ssl.SSLContext):
    """Makes :class:`EdgeObject`."""

    sslobject_class = EdgeObject

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        made = super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        if isinstance(made, EdgeObject):
            made.outgoing = outgoing
            made.sock = _SOCKET.get()
            made.shorten()
        return made


class Arrival(asyncio.Protocol):
    """A connection from its accept to the end of its handshake. Its own transport, for ``PublicServer``, while it has none."""

    __slots__ = (
        "address",
        "deadline",
        "door",
        "draining",
        "hello",
        "local",
        "met",
        "peer",
        "port",
        "proving",
        "sock",
        "task",
        "want",
    )

    def __init__(self, port: TlsPort, sock: socket.socket, peer: Any, deadline: float) -> None:
        self.port = port
        self.sock = sock
        self.peer = peer
        self.local: Place | None = None
        self.address = plain_address(peer)
        self.deadline = deadline
        self.draining = self.proving = False
        self.want = 1  # bytes before it is of use to look again
        self.met = self.address not in port.public.introducing
        self.hello: Hello | None = None
        self.door = port.arriving
        self.task: asyncio.Task[None] | None = None

    # -- a guest of PublicServer --
    @property
    def transport(self) -> asyncio.Transport:
        return cast(asyncio.Transport, self)

    def is_closing(self) -> bool:
        return self.sock.fileno() < 0

    def expire(self) -> None:
        if not self.met:
            self.port.refuse_proxy(self, "no whole PROXY header in time")
        elif self.task is None:
            self.port.end(self, "hello_timeout" if self.hello is None else "handshake_timeout")
        else:
            self.port.stats.failures["handshake_timeout"] += 1
            self.task.cancel()
        self.deadline = float("inf")

    def drain(self) -> None:
        """A client that is about to ask is answered."""

    def close_idle(self) -> None:
        """By now its port is closed for a while: whoever is still not done with the handshake will not ask soon."""
        self.cut_off()

    def cut_off(self) -> None:
        if self.task is not None:
            self.task.cancel()
        else:
            self.port.end(self, None)

    abort = cut_off

    # -- the protocol of the handshake --
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is done: the visitor takes over, in the same place of the counts."""
        self.port.established(self, cast(asyncio.Transport, transport))


class TlsPort:
    """Accepts from one listening socket until :meth:`close`. ``visitor`` makes the protocol of a terminated connection.

    ``client_ca(name)``: hash and PEM of the authority that the tunnel of a name wants clients to have a certificate of.
    ``passthrough(sock, hello, peer, local)``: takes a connection over, with its hello unread, or returns ``False``; ``local``
    is where the visitor connected to, if a proxy said so. From ``True`` on
    the socket is the callee's, which counts it as a guest of its own.
    """

    def __init__(
        self,
        public: PublicServer,
        sock: socket.socket,
        store: CertificateStore,
        visitor: Callable[[Door], asyncio.BaseProtocol],
        *,
        client_ca: ClientCa = lambda name: None,
        passthrough: Passthrough | None = None,
    ) -> None:
        self.public = public
        self.sock = sock
        self.store = store
        self.visitor = visitor
        self.client_ca = client_ca
        self.passthrough = passthrough
        self.stats = TlsStats()
        self.loop = public.loop
        self.number = sock.getsockname()[1]
        self.arriving = Door(b"handshake", self.number)
        limits = public.settings
        self._seconds = limits.head_timeout_seconds
        self._hello_max = limits.tls_hello_max_bytes
        self._pending_max = limits.max_handshakes
        #: Connections whose hello is not whole, oldest first, and those with one that wait for their turn.
        self._greeting: dict[Arrival, None] = {}
        self._ready = Turns()
        self._shaking: set[Arrival] = set()
        #: What others asked so far on connections that they have, and when that was last seen to grow.
        self._returning, self._returned_at = 0, float("-inf")
        #: Seconds spent on connections before their handshake, of which nothing was given back to others yet.
        self._spent = 0.0
        self._resuming: asyncio.TimerHandle | None = None
        self.loop.add_reader(sock, self._accept)

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        return (self.sock,) if self.sock.fileno() >= 0 else ()

    @property
    def pending(self) -> int:
        """Connections whose handshake is not over."""
        return len(self._greeting) + len(self._ready) + len(self._shaking)

    def close(self) -> None:
        """Accept no more; connections that were taken in go on."""
        if self.sock.fileno() >= 0:
            self.loop.remove_reader(self.sock)
            self.sock.close()
        if self._resuming is not None:
            self._resuming.cancel()

    # ── accepting ─────────────────────────────────────────────────────────────────────────────────────────────────
    def _accept(self) -> None:
        began = time.monotonic()
        if self._take_in():
            self._spent += time.monotonic() - began
            self._rest()

    def _rest(self) -> None:
        """Leave the loop to others for a multiple of what accepting and looking took, while they ask. Who is not accepted yet
        waits in the kernel, in a line of ``listen_backlog``."""
        if not self._others_ask():
            self._spent = 0.0
            return
        owed = min(self._spent * PAUSE_AMONG_OTHERS, LONGEST_PAUSE)
        if owed >= SHORTEST_PAUSE:
            self._spent = 0.0
            self.loop.remove_reader(self.sock)
            self._resuming = self.loop.call_later(owed, self._resume)

    def _others_ask(self) -> bool:
        """Whether visitors ask, or did a moment ago, on connections that they have."""
        now = time.monotonic()
        if self.public.returning != self._returning:
            self._returning, self._returned_at = self.public.returning, now
        return now - self._returned_at < OTHERS_SECONDS

    def _take_in(self) -> bool:
        """Accept some of those who wait. ``False``: there is no room for more in this process."""
        for _ in range(ACCEPTS_PER_TICK):
            try:
                sock, peer = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return True
            except OSError as err:
                if err.errno not in _OUT_OF_RESOURCES:
                    raise
                log.error("cannot accept connections", extra={"f": {"port": self.number, "why": err.strerror}})
                self.loop.remove_reader(self.sock)
                self._resuming = self.loop.call_later(OUT_OF_RESOURCES_SECONDS, self._resume)
                return False
            sock.setblocking(False)
            self.stats.accepted += 1
            self._admit(Arrival(self, sock, peer, self.loop.time() + self._seconds))
        return True

    def _resume(self) -> None:
        if self.sock.fileno() >= 0:
            self.loop.add_reader(self.sock, self._accept)

    def _admit(self, arrival: Arrival) -> None:
        if self.pending >= self._pending_max:
            # Whoever connected longest ago without saying anything makes room, then the address that has most in the line; one
            # flood does not keep all others out.
            other = next(iter(self._greeting), None) or self._ready.drop(arrival.address)
            if other is None:
                self._refuse_unheard(arrival)
                return
            self.end(other, "too_many")
        if not self.public.admit(cast("Guest", arrival)):
            self._refuse_unheard(arrival)
            return
        self._greeting[arrival] = None
        begin = self._look if arrival.met else self._meet
        self.loop.add_reader(arrival.sock, begin, arrival)

    def _refuse_unheard(self, arrival: Arrival) -> None:
        """A page would cost a handshake, which is what there is no room for."""
        self.public.refused("edge.too_many_connections")
        self.stats.failures["too_many"] += 1
        arrival.sock.close()

    # ── the word of a proxy before it ─────────────────────────────────────────────────────────────────────────────
    def _meet(self, arrival: Arrival) -> None:
        """A connection of a proxy that has to say whose it is: its PROXY header is taken off, and nothing behind it."""
        most = self.public.settings.proxy_header_max_bytes
        try:
            data = arrival.sock.recv(most, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if len(data) < arrival.want:  # its end came instead; before any byte, from whoever checks whether we are here
            self.end(arrival, "proxy_header" if data else "hello_gone")
            return
        try:
            found = proxy_protocol.read(data, most)
        except ValueError as err:
            self.refuse_proxy(arrival, str(err))
            return
        if found is None:
            self._wait_for(arrival, len(data) + 1)
            return
        arrival.sock.recv(found.length)
        self._wait_for(arrival, 1)
        self.loop.remove_reader(arrival.sock)
        if found.source is not None:
            self.public.leave(cast("Guest", arrival))
            arrival.peer, arrival.local = found.source, found.destination
            arrival.address = plain_address(found.source)
            if not self.public.admit(cast("Guest", arrival)):
                del self._greeting[arrival]
                self._refuse_unheard(arrival)
                return
        arrival.met = True
        self.loop.add_reader(arrival.sock, self._look, arrival)

    def _wait_for(self, arrival: Arrival, count: int) -> None:
        """Hear of the socket again when ``count`` bytes are there, or its end."""
        if count != arrival.want:
            arrival.want = count
            arrival.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def refuse_proxy(self, arrival: Arrival, why: str) -> None:
        """It did not say whose connection it is."""
        self.public.refuse_proxy(arrival.address, why)
        self.end(arrival, "proxy_header")

    # ── the hello ─────────────────────────────────────────────────────────────────────────────────────────────────
    def _look(self, arrival: Arrival) -> None:
        """Something came. The socket says so again only when as much is there as the rest of the hello needs at least."""
        began = time.monotonic()
        self._read_hello(arrival)
        self._spent += time.monotonic() - began

    def _read_hello(self, arrival: Arrival) -> None:
        want = arrival.want
        try:
            data = arrival.sock.recv(max(want, FIRST_PEEK), socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if len(data) < want:  # its end came instead
            self.end(arrival, "hello_gone")
            return
        found = parse(data, self._hello_max)
        while isinstance(found, NeedMore) and len(data) == max(want, FIRST_PEEK):
            want = found.total  # more than was asked for may be there
            data = arrival.sock.recv(max(want, 2 * len(data)), socket.MSG_PEEK)
            if len(data) < want:
                break
            found = parse(data, self._hello_max)
        if isinstance(found, NeedMore):
            self._wait_for(arrival, found.total)
        elif isinstance(found, Invalid):
            self._refuse_hello(arrival, data, found)
        else:
            self._greeted(arrival, found)

    def _refuse_hello(self, arrival: Arrival, data: bytes, why: Invalid) -> None:
        if why.alert is not None:
            self._alert(arrival, why.alert, why.kind)
        elif data[:4] in _HTTP_STARTS:
            self._say(arrival, self._page())
            self.end(arrival, "plain_http")
        else:
            self.end(arrival, why.kind)

    def _page(self) -> bytes:
        detail = "this port speaks TLS; use https:// in the address"
        return self.public.page("edge.bad_request", request_id(), html=False, keep_alive=False, detail=detail)

    def _greeted(self, arrival: Arrival, hello: Hello) -> None:
        """The hello is whole."""
        self.loop.remove_reader(arrival.sock)
        del self._greeting[arrival]
        self._wait_for(arrival, 1)
        arrival.hello = hello
        asked = challenges.ALPN in hello.alpn and self.public.challenges.tls(hello.sni)
        if (
            not asked
            and hello.sni is not None
            and self.passthrough is not None
            and self._passed_through(arrival, hello)
        ):
            return
        self._ready.add(arrival)
        if len(self._ready) == 1:
            self.loop.call_soon(self._begin_some)

    def _passed_through(self, arrival: Arrival, hello: Hello) -> bool:
        assert self.passthrough is not None
        try:
            if not self.passthrough(arrival.sock, hello, arrival.peer, arrival.local):
                return False
        except Exception:
            log.exception("fault while passing a connection through")
            self.end(arrival, "internal")
            return True
        self.stats.passed_through += 1
        self.public.leave(cast("Guest", arrival))
        return True

    # ── the handshake ─────────────────────────────────────────────────────────────────────────────────────────────
    def _begin_some(self) -> None:
        ready = self._ready
        pause = _Pace.free_at - time.monotonic()
        if pause > 0:
            self.loop.call_later(pause, self._begin_some)
            return
        _Pace.pause = PAUSE_AMONG_OTHERS if self._others_ask() else PAUSE_ALONE
        try:
            for _ in range(min(HANDSHAKES_PER_TICK, len(ready))):
                arrival = ready.pop()
                if not arrival.is_closing():
                    self._begin(arrival)
        finally:  # nobody else would: those who come find a line that moves, or none
            if ready:
                self.loop.call_soon(self._begin_some)

    def _begin(self, arrival: Arrival) -> None:
        hello = arrival.hello
        assert hello is not None
        if challenges.ALPN in hello.alpn and self._prove(arrival, hello):
            return
        if hello.alpn and not any(name in ALPN for name in hello.alpn):
            self._alert(arrival, NO_APPLICATION_PROTOCOL, "no_protocol")
            return
        try:
            certificate = self.store.find(hello.sni)
            if certificate is None:
                self._alert(arrival, UNRECOGNIZED_NAME, "unknown_name_ech" if hello.ech else "unknown_name")
                return
            client_ca = self.client_ca(hello.sni) if hello.sni is not None else None
            context = self.store.context(certificate, client_ca, EdgeContext)
        except Exception:
            log.exception("no TLS context", extra={"f": {"name": (hello.sni or b"").decode()}})
            self._alert(arrival, INTERNAL_ERROR, "internal")
            return
        port = arrival.local[1] if arrival.local is not None and arrival.local[1] else self.number
        hash_of_ca = client_ca[0] if client_ca else None
        peer = arrival.peer[:2] if isinstance(arrival.peer, tuple) else None
        door = Door(b"https", port, hello.sni, certificate.covers, hash_of_ca, peer, arrival.local)
        self._shaking.add(arrival)
        arrival.task = self.loop.create_task(self._shake(arrival, context, door))

    def _prove(self, arrival: Arrival, hello: Hello) -> bool:
        """Whether it is a validation that we answer: then by the certificate made for it alone, chosen before the handshake."""
        proof = self.public.challenges.tls(hello.sni)
        if proof is None:
            return False
        arrival.proving = True
        door = Door(b"https", self.number, hello.sni, lambda host: False)
        self._shaking.add(arrival)
        arrival.task = self.loop.create_task(self._shake(arrival, proof.context(EdgeContext), door))
        return True

    async def _shake(self, arrival: Arrival, context: ssl.SSLContext, door: Door) -> None:
        stats = self.stats
        _SOCKET.set(arrival.sock)
        arrival.door = door
        try:
            await self.loop.connect_accepted_socket(
                lambda: arrival, arrival.sock, ssl=context, ssl_handshake_timeout=self._seconds
            )
        except ssl.SSLError as err:
            stats.failures[_kind(err)] += 1
        except ConnectionAbortedError:  # the loop's own limit, a little before the next sweep
            stats.failures["handshake_timeout"] += 1
        except OSError:
            stats.failures["handshake_gone"] += 1
        except asyncio.CancelledError:
            pass  # whoever cancelled has counted it
        finally:
            self._shaking.discard(arrival)
            self.public.leave(cast("Guest", arrival))

    def established(self, arrival: Arrival, transport: asyncio.Transport) -> None:
        """Count it, and let the visitor have the connection."""
        spoken = transport.get_extra_info("ssl_object")
        version = spoken.version()
        self.stats.versions[version] = self.stats.versions.get(version, 0) + 1
        self.stats.resumed += spoken.session_reused
        self.public.leave(cast("Guest", arrival))
        if arrival.proving:
            self.stats.proved += 1
            transport.close()  # nothing is said on it (RFC 8737, 3)
            return
        visitor = self.visitor(arrival.door)
        transport.set_protocol(visitor)
        visitor.connection_made(transport)

    # ── endings ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _alert(self, arrival: Arrival, description: int, kind: str) -> None:
        self._say(arrival, alert(description))
        self.end(arrival, kind)

    def _say(self, arrival: Arrival, data: bytes) -> None:
        """Send the last word. What came is read first: a close with unread bytes is a reset, which takes the word away."""
        with contextlib.suppress(OSError):
            arrival.sock.recv(self._hello_max * 2)
            arrival.sock.send(data)

    def end(self, arrival: Arrival, kind: str | None) -> None:
        """Close a connection before its handshake began, and count why."""
        if kind is not None:
            self.stats.failures[kind] += 1
        if self._greeting.pop(arrival, self) is None:
            self.loop.remove_reader(arrival.sock)
        arrival.sock.close()
        self.public.leave(cast("Guest", arrival))


def _kind(err: ssl.SSLError) -> str:
    """What a failed handshake is counted as."""
    reason = err.reason or ""
    if "CERTIFICATE" in reason or "CERT" in reason:
        return "client_certificate"
    if "VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
        return "version"
    if "CIPHER" in reason:
        return "cipher"
    return "handshake"
