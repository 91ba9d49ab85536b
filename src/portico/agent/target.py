"""What a tunnel forwards to: parsing of TARGET, and the words for a target that cannot be reached.

8000 · host:port · http://host[:port] · https://host[:port] · unix:/path · file:///dir
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from portico.errors import Problem
from portico.kit.dial import connect_tcp, is_address

#: What `localhost` is tried as, in this order: development servers listen on either.
LOCALHOST = ("127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed TARGET. ``kind`` is ``tcp``, ``unix`` or ``file``; ``tls`` only with ``tcp``; ``raw``: of a TCP or TLS tunnel,
    where ``tls`` says that the visitors' own TLS reaches it."""

    kind: str
    host: str = ""
    port: int = 0
    path: str = ""
    tls: bool = False
    raw: bool = False

    @property
    def authority(self) -> str:
        """Host and port as a Host header names them; the default port of the scheme is left out."""
        if self.kind != "tcp":
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """As shown to people and to the API."""
        if self.kind == "tcp" and self.raw:
            return f"{'tls' if self.tls else 'tcp'}://{self.place}"
        if self.kind == "tcp":
            return f"http{'s' if self.tls else ''}://{self.authority}"
        return f"unix:{self.path}" if self.kind == "unix" else f"file://{self.path}"

    @property
    def place(self) -> str:
        """The address alone, for error texts."""
        if self.kind != "tcp":
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether the target is this machine by its very address (no name is looked up)."""
        if self.kind != "tcp" or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _refuse(text: str, why: str) -> Problem:
    return Problem("target.invalid", f"target {text!r}: {why}")


_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?\.?")


def _host_port(text: str, host: str | None, port: int | None, tls: bool) -> Target:
    if not host or (_HOST.fullmatch(host) is None and ":" not in host):
        raise _refuse(text, "no valid host")
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _refuse(text, "no valid host") from None
    if port is None or not 1 <= port <= 65535:
        raise _refuse(text, "the port must be 1 to 65535")
    return Target("tcp", host.lower(), port, tls=tls)


def _parse_url(text: str) -> Target:
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError as err:
        raise _refuse(text, str(err)) from None
    if url.path not in ("", "/") or url.query or url.fragment:
        raise _refuse(text, "a path in the target is not supported; give the scheme, host and port alone")
    if url.username is not None or url.password is not None:
        raise _refuse(text, "credentials in the target are not supported")
    tls = url.scheme == "https"
    return _host_port(text, url.hostname, port if port is not None else (443 if tls else 80), tls)


def _parse_file(text: str) -> Target:
    rest = text[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost"):
            raise _refuse(text, "files of another machine cannot be served; write file:///dir")
        rest = slash + path
    folder = Path(unquote(rest))
    if not folder.is_absolute():
        raise _refuse(text, "the folder must be an absolute path, as in file:///dir")
    if not folder.is_dir():
        raise _refuse(text, f"{folder} is not a folder")
    return Target("file", path=str(folder.resolve()))


def parse_target(text: str) -> Target:
    """``text`` as typed by a person; raises ``target.invalid``."""
    text = text.strip()
    if text.isascii() and text.isdecimal():
        return _host_port(text, "localhost", int(text[:6]), False)
    scheme, colon, rest = text.partition(":")
    scheme = scheme.lower()
    if scheme == "unix" and colon:
        path = rest[2:] if rest.startswith("//") else rest
        if not path.startswith("/"):
            raise _refuse(text, "the socket must be an absolute path, as in unix:/run/app.sock")
        return Target("unix", path=path)
    if scheme == "file" and colon:
        return _parse_file(text)
    if "://" in text:
        if scheme not in ("http", "https"):
            raise _refuse(text, "the scheme must be http, https, unix or file")
        return _parse_url(f"{scheme}:{rest}")
    if "/" in text:
        raise _refuse(text, "a path in the target is not supported; for files write file:///dir")
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdecimal()):
        raise _refuse(text, "add a port, as in 8000 or localhost:8000")
    return _host_port(text, host.removeprefix("[").removesuffix("]"), int(port[:6]), False)


def parse_tcp_target(text: str) -> Target:
    """The TARGET of a TCP tunnel: 8000, host:port, tcp://host:port or unix:/path; raises ``target.invalid``."""
    try:
        return replace(parse_target(_bytes_target(text.strip())), raw=True)
    except Problem as problem:
        hint = "Use 22, host:port, tcp://host:port or unix:/path."
        raise Problem(problem.code, problem.detail, hint=hint) from None


def parse_tls_target(text: str) -> Target:
    """The TARGET of a TLS tunnel: 8443, host:port, tls://host:port or unix:/path; raises ``target.invalid``."""
    try:
        found = parse_target(_bytes_target(text.strip(), "tls"))
    except Problem as problem:
        hint = "Use 8443, host:port, tls://host:port or unix:/path."
        raise Problem(problem.code, problem.detail, hint=hint) from None
    return replace(found, raw=True, tls=found.kind == "tcp")


def _bytes_target(text: str, kind: str = "tcp") -> str:
    """``text`` as :func:`parse_target` takes it, without what only HTTP can reach."""
    scheme, _, rest = text.partition("://")
    if rest and scheme.lower() in ("tcp", kind):
        return rest.rstrip("/")
    if (rest and scheme.lower() != "unix") or text.lower().startswith("file:"):
        raise _refuse(text, f"a {kind.upper()} tunnel carries bytes, so it needs a port or a socket")
    return text


def tls_context(target: Target, verify: bool | None) -> ssl.SSLContext | None:
    """The TLS client context for ``target``. ``verify=None``: verified, except on a loopback address.

    Development servers sign their own certificates, and on loopback nobody else can answer.
    """
    if not target.tls:
        return None
    context = ssl.create_default_context()
    if verify is False or (verify is None and target.loopback):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context


async def dial(target: Target, factory: Callable[[], Any], context: ssl.SSLContext | None, timeout: float) -> Any:
    """Connect ``factory``'s protocol to the target and return it; raises ``OSError`` (``TimeoutError`` among them)."""
    try:
        return await _dial(target, factory, context, timeout)
    except UnicodeError as err:  # a host that looks like a name and is none, such as one with an empty label
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from err


async def _dial(target: Target, factory: Callable[[], Any], context: ssl.SSLContext | None, timeout: float) -> Any:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout):
        if target.kind == "unix":
            return (await loop.create_unix_connection(factory, target.path))[1]
        name = target.host if context is not None else None
        if target.host != "localhost" and not is_address(target.host):
            # A name may have several addresses, of which the first may be dead.
            sock = await connect_tcp(target.host, target.port)
            return (await loop.create_connection(factory, sock=sock, ssl=context, server_hostname=name))[1]
        hosts = LOCALHOST if target.host == "localhost" else (target.host,)
        for host in hosts[:-1]:
            try:
                return (await loop.create_connection(factory, host, target.port, ssl=context, server_hostname=name))[1]
            except ConnectionRefusedError:
                continue
        return (await loop.create_connection(factory, hosts[-1], target.port, ssl=context, server_hostname=name))[1]


def why_unreachable(target: Target, err: BaseException, timeout: float) -> str:
    """One plain sentence for a failed :func:`dial`."""
    place = target.place
    if isinstance(err, TimeoutError):
        return f"{place} did not accept a connection within {timeout:g} s"
    if isinstance(err, ssl.SSLCertVerificationError):
        return f"the certificate of {place} is not trusted ({err.verify_message}); see --no-target-tls-verify"
    if isinstance(err, ssl.SSLError):
        return f"{place} does not speak TLS ({err.reason or err})"
    if isinstance(err, socket.gaierror):
        return f"the name {target.host} cannot be resolved"
    if isinstance(err, (ConnectionResetError, BrokenPipeError)):
        return f"{place} accepted the connection and reset it at once"
    if target.kind == "unix" and isinstance(err, FileNotFoundError):
        return f"there is no socket at {place}"
    # On localhost the last address tried is ::1, which may be missing (EADDRNOTAVAIL, EAFNOSUPPORT) on this machine.
    if isinstance(err, (ConnectionRefusedError, FileNotFoundError)) or target.host == "localhost":
        return f"nothing listens on {place}"
    if isinstance(err, OSError):
        return f"{place} cannot be reached ({err.strerror or err})"
    return f"{place} cannot be reached ({type(err).__name__})"
