"""The proxy between this machine and the platform: which one, and how a connection is opened through it.

    agent ──TCP──► proxy ──CONNECT or SOCKS5──► relay or API

The connection to the relay and the calls to the API take the same way, so that what `portico diagnose` finds holds for both.
TLS is spoken with the far end, through the proxy: its certificate is checked against the relay's or API's own name.
Failures name the hop (``proxy.…`` codes); credentials of a proxy are never shown.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import SplitResult, unquote, urlsplit

from portico import settings as config
from portico.errors import Problem
from portico.kit.dial import authority, connect_tcp, is_address, is_loopback, reason, resolve
from portico.settings import AgentSettings, Secret

#: What `proxy_url` says to use no proxy at all, whatever the environment names.
OFF = frozenset(("none", "off", "direct"))
DEFAULT_PORTS = {"http": 80, "socks5": 1080, "socks5h": 1080}
#: Bytes of a proxy's answer to CONNECT; more is no answer.
HEAD_MAX_BYTES = 65_536

_SOCKS_UNREACHABLE = {
    1: "a general failure", 3: "network unreachable", 4: "host unreachable", 5: "connection refused", 6: "time ran out",
}  # fmt: skip
_SOCKS_REFUSED = {2: "not allowed by its rules", 7: "command not supported", 8: "address type not supported"}


@dataclass(frozen=True, slots=True)
class Proxy:
    """One proxy. ``scheme``: ``http`` (CONNECT), ``socks5`` (names are looked up here), ``socks5h`` (there)."""

    scheme: str
    host: str
    port: int
    username: str = ""
    password: Secret | None = None
    #: Where it was named: `proxy_url`, or a variable of the environment.
    source: str = "proxy_url"

    def __str__(self) -> str:
        """As shown to people: the credentials masked."""
        return f"{self.scheme}://{'***@' if self.username else ''}{authority(self.host, self.port)}"

    @property
    def secret(self) -> str:
        """The password, for the proxy alone."""
        return self.password.reveal() if self.password is not None else ""

    @property
    def place(self) -> str:
        """For error texts."""
        return f"the proxy at {authority(self.host, self.port)}"


def parse(text: str, source: str = "proxy_url") -> Proxy:
    """``[scheme://][user:password@]host[:port]``, without a scheme an HTTP proxy; raises ``config.invalid``.

    The text itself is never in the error: it may hold a password.
    """
    url = text.strip() if "://" in text else f"http://{text.strip()}"
    if url.startswith("socks://"):  # how desktops write ALL_PROXY
        url = f"socks5h{url[5:]}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if not host or not url.isprintable() or " " in url or parts.path not in ("", "/") or parts.query:
            raise ValueError
    except ValueError:
        raise _invalid(source, "it is not an address of a proxy") from None
    if parts.scheme == "https":
        raise _invalid(source, "proxies that are spoken to by TLS are not supported")
    if parts.scheme not in DEFAULT_PORTS or port == 0:
        raise _invalid(source, f"{parts.scheme}:// is no kind of proxy" if port != 0 else "port 0 is no port")
    return Proxy(parts.scheme, host, port or DEFAULT_PORTS[parts.scheme], *_credentials(parts, source), source)


def _credentials(parts: SplitResult, source: str) -> tuple[str, Secret]:
    username, password = unquote(parts.username or ""), unquote(parts.password or "")
    if parts.scheme == "http" and ":" in username:
        raise _invalid(source, "a user name for an HTTP proxy has no colon")
    if parts.scheme != "http" and max(len(username.encode()), len(password.encode())) > 255:
        raise _invalid(source, "a user name or password for SOCKS5 has at most 255 bytes")
    return username, Secret(password)


def _invalid(source: str, why: str) -> Problem:
    return Problem(
        "config.invalid",
        f"setting {source}: {why}",
        hint="Write http://host:port, socks5://host:port or socks5h://host:port (user:password@ before the host), or none.",
    )


# -- which proxy -------------------------------------------------------------------------------------------------------


def choose(settings: AgentSettings, url: str, environ: Mapping[str, str] | None = None) -> Proxy | None:
    """The proxy for a connection to ``url`` (ws, wss, http or https), or ``None``; raises ``config.invalid``.

    `proxy_url` comes before HTTPS_PROXY (https, wss) or HTTP_PROXY (http, ws), then ALL_PROXY. NO_PROXY names hosts that are
    reached without one; the environment's proxies are never used for this machine itself.
    """
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme in ("https", "wss")
    named = config.proxy_environment(environ)
    if settings.proxy_url:
        text, source = settings.proxy_url.reveal().strip(), "proxy_url"
    else:
        text, source = _from_environment(named, secure)
        if is_loopback(host):
            return None
    if not text or text.lower() in OFF:
        return None
    proxy = parse(text, source)  # refused even where NO_PROXY would pass it by: a typing mistake is found at once
    return None if _bypassed(named.get("no_proxy", ""), host, parts.port or (443 if secure else 80)) else proxy


def _from_environment(named: Mapping[str, str], secure: bool) -> tuple[str, str]:
    for name in ("https_proxy" if secure else "http_proxy", "all_proxy"):
        if named.get(name):
            return named[name], name.upper()
    return "", ""


def _bypassed(no_proxy: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY is ``*``, the host, a domain above it, or a network with its address."""
    return any(_matches(entry, host.lower(), port) for entry in re.split(r"[,\s]+", no_proxy.lower()) if entry)


def _matches(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    if is_address(host):
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
        except ValueError:
            pass  # not a network: perhaps an address with a port
    name, colon, only = entry.rpartition(":")
    if colon and only.isdigit() and ("]" in name or ":" not in name):
        if int(only) != port:
            return False
        entry = name
    entry = entry.strip("[]").removeprefix("*").lstrip(".")
    return bool(entry) and (host == entry or host.endswith(f".{entry}"))


# -- through it --------------------------------------------------------------------------------------------------------


async def connect(proxy: Proxy, host: str, port: int, timeout: float) -> socket.socket:
    """A connected, non-blocking socket to ``host`` through ``proxy``, within ``timeout`` seconds.

    Raises ``proxy.unreachable``, ``proxy.auth_required``, ``proxy.refused``, ``proxy.target_unreachable``, ``proxy.timeout``,
    ``proxy.protocol_error``.
    """
    try:
        async with asyncio.timeout(timeout):
            if proxy.scheme == "socks5":
                return await _by_address(proxy, host, port)
            return await _open(proxy, host, port)
    except TimeoutError:
        raise Problem(
            "proxy.timeout", f"{proxy.place} did not open a connection to {authority(host, port)} within {timeout:g} s"
        ) from None


async def reach(proxy: Proxy, timeout: float) -> socket.socket:
    """A connection to the proxy itself; raises ``proxy.unreachable``."""
    try:
        async with asyncio.timeout(timeout):
            return await connect_tcp(proxy.host, proxy.port)
    except TimeoutError:
        raise Problem("proxy.unreachable", f"{proxy.place} did not accept a connection within {timeout:g} s") from None
    except OSError as err:
        raise Problem("proxy.unreachable", f"{proxy.place} cannot be reached: {reason(err)}") from None


async def _by_address(proxy: Proxy, host: str, port: int) -> socket.socket:
    """Look the name up here and try its addresses in turn."""
    try:
        addresses = [str(address[4][0]) for address in await resolve(host, port)]
    except socket.gaierror as err:
        raise Problem(
            "proxy.target_unreachable",
            f"{host} has no address here ({reason(err)})",
            hint="Where only the proxy knows the name, write socks5h:// instead of socks5://.",
        ) from None
    for address in addresses[:-1]:
        try:
            return await _open(proxy, address, port)
        except Problem as problem:
            if problem.code != "proxy.target_unreachable":
                raise
    return await _open(proxy, addresses[-1], port)


async def _open(proxy: Proxy, host: str, port: int) -> socket.socket:
    # The whole has a limit already; a proxy that does not accept within it counts as unreachable by its own name.
    try:
        sock = await connect_tcp(proxy.host, proxy.port)
    except OSError as err:
        raise Problem("proxy.unreachable", f"{proxy.place} cannot be reached: {reason(err)}") from None
    try:
        await (_http if proxy.scheme == "http" else _socks5)(proxy, sock, host, port)
    except OSError as err:
        sock.close()
        raise Problem("proxy.protocol_error", f"{proxy.place} broke the connection off ({reason(err)})") from None
    except BaseException:
        sock.close()
        raise
    return sock


async def _http(proxy: Proxy, sock: socket.socket, host: str, port: int) -> None:
    """CONNECT (RFC 9110, 9.3.6)."""
    loop = asyncio.get_running_loop()
    target = authority(host, port)
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}", "User-Agent: portico"]
    if proxy.username:
        pair = f"{proxy.username}:{proxy.secret}".encode()
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(pair).decode()}")
    await loop.sock_sendall(sock, "\r\n".join([*lines, "", ""]).encode("latin-1", "replace"))
    head = b""
    while b"\r\n\r\n" not in head:
        data = await loop.sock_recv(sock, 4096)
        head += data
        if not data or len(head) > HEAD_MAX_BYTES or b"HTTP/1."[: len(head)] != head[:7]:
            break
    _judge(proxy, target, head)


def _judge(proxy: Proxy, target: str, head: bytes) -> None:
    """Read the answer to CONNECT; returns when the way is open."""
    found = re.match(rb"HTTP/1\.[01] (\d{3})(?: ([^\r\n]*))?\r\n", head)
    if found is None or b"\r\n\r\n" not in head:
        _garbled(proxy, "HTTP", "closed the connection without an answer" if not head else "")
    status = int(found[1])
    answer = f"{status} {_words(found[2] or b'')}".strip()
    if 200 <= status < 300:
        if not head.endswith(b"\r\n\r\n") or head.count(b"\r\n\r\n") > 1:
            _garbled(proxy, "HTTP", "sent something after its answer")  # the far end never speaks first
        return
    if status == 407 or (status == 401 and proxy.username):  # some answer wrong credentials with 401
        offered = sorted({m[1].decode("latin-1") for m in re.finditer(rb"(?im)^proxy-authenticate:\s*([\w-]+)", head)})
        if offered and not any(scheme.lower() == "basic" for scheme in offered):
            detail = f"{proxy.place} takes only {', '.join(offered)}, and Portico signs in by Basic"
        else:
            detail = f"{proxy.place} {'did not accept the credentials' if proxy.username else 'asks for credentials'}"
        raise Problem("proxy.auth_required", f"{detail} ({answer})")
    if status >= 500:
        raise Problem("proxy.target_unreachable", f"{proxy.place} cannot reach {target}: it answered {answer}")
    raise Problem("proxy.refused", f"{proxy.place} does not allow a connection to {target}: it answered {answer}")


def _words(reason: bytes) -> str:
    text = reason.decode("latin-1")[:80]
    return "".join(c if c.isprintable() else "?" for c in text)


async def _socks5(proxy: Proxy, sock: socket.socket, host: str, port: int) -> None:
    """RFC 1928, with user name and password as in RFC 1929."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, b"\x05\x02\x00\x02" if proxy.username else b"\x05\x01\x00")
    version, method = await _exactly(proxy, sock, 2)
    if version != 5:
        _garbled(proxy, "SOCKS5", "speaks HTTP" if version == ord("H") else "")
    if method == 2 and proxy.username:
        name, password = proxy.username.encode(), proxy.secret.encode()
        await loop.sock_sendall(sock, b"\x01%c%b%c%b" % (len(name), name, len(password), password))
        if (await _exactly(proxy, sock, 2))[1] != 0:
            raise Problem("proxy.auth_required", f"{proxy.place} did not accept the credentials")
    elif method == 0xFF:
        what = "accepts no way to sign in that Portico knows" if proxy.username else "asks for credentials"
        raise Problem("proxy.auth_required", f"{proxy.place} {what}")
    elif method != 0:
        _garbled(proxy, "SOCKS5")
    await loop.sock_sendall(sock, b"\x05\x01\x00" + _socks_address(proxy, host) + port.to_bytes(2, "big"))
    version, reply, _, kind = await _exactly(proxy, sock, 4)
    if version != 5:
        _garbled(proxy, "SOCKS5")
    if reply:
        _socks_failure(proxy, authority(host, port), reply)
    size = {1: 4, 4: 16}.get(kind) or (await _exactly(proxy, sock, 1))[0]
    await _exactly(proxy, sock, size + 2)


def _socks_address(proxy: Proxy, host: str) -> bytes:
    if is_address(host):
        address = ipaddress.ip_address(host)
        return bytes([1 if address.version == 4 else 4]) + address.packed
    try:
        name = host.encode("ascii") if host.isascii() else host.encode("idna")
    except UnicodeError:
        name = b""
    if not 0 < len(name) <= 255:
        raise Problem("proxy.target_unreachable", f"{host!r} is not a host name")
    return bytes([3, len(name)]) + name


def _socks_failure(proxy: Proxy, target: str, reply: int) -> NoReturn:
    if why := _SOCKS_REFUSED.get(reply):
        raise Problem("proxy.refused", f"{proxy.place} does not allow a connection to {target}: {why}")
    why = _SOCKS_UNREACHABLE.get(reply, f"reply {reply}")
    raise Problem("proxy.target_unreachable", f"{proxy.place} cannot reach {target}: {why}")


async def _exactly(proxy: Proxy, sock: socket.socket, size: int) -> bytes:
    """``size`` bytes and no more: what follows belongs to the far end."""
    data = b""
    while len(data) < size:
        part = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not part:
            _garbled(proxy, "SOCKS5", "closed the connection without an answer")
        data += part
    return data


def _garbled(proxy: Proxy, protocol: str, how: str = "") -> NoReturn:
    raise Problem(
        "proxy.protocol_error", f"{proxy.place} {how or f'does not speak {protocol}'}", hint=_other_scheme(protocol)
    )


def _other_scheme(protocol: str) -> str:
    other = "socks5h" if protocol == "HTTP" else "http"
    return f"Check the port; if the proxy is of the other kind, write {other}:// before its address."
