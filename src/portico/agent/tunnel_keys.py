"""The keys of `portico.yml`, in one table: what the file is checked against, what its errors say and what its page shows.

A key whose part of the platform does not exist yet is here too, with the sentence that refuses it: nothing that a person
writes down is passed over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from portico.agent import policies
from portico.agent.durations import parse_duration
from portico.agent.target import Target, parse_target, parse_tcp_target, parse_tls_target
from portico.errors import Problem

T = TypeVar("T")

VERSION = 1
#: The names by which the file is found where none is given.
FILE_NAMES = ("portico.yml", "portico.yaml")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def check_name(text: str) -> str:
    """A tunnel's name or a subdomain: the API takes the same ones."""
    if _LABEL.fullmatch(text) is None:
        raise ValueError(f"{text[:80]!r} is not 1 to 63 lower-case letters, digits and inner hyphens")
    return text


def _text(text: str, folder: Path) -> str:
    if not text:
        raise ValueError("is empty")
    return text


def _switch(text: str, folder: Path) -> bool:
    if text.lower() not in _SWITCH:
        raise ValueError(f"{text!r} is not true or false")
    return _SWITCH[text.lower()]


def _version(text: str, folder: Path) -> int:
    if text != str(VERSION):
        other = "; versions 2 and 3 are ngrok's: see the page “Coming from ngrok”" if text in ("2", "3") else ""
        raise ValueError(f"{text!r} is not a version of this file; write version: {VERSION}{other}")
    return VERSION


def _log_level(text: str, folder: Path) -> str:
    if text.upper() not in LOG_LEVELS:
        raise ValueError(f"{text!r} is not one of {', '.join(LOG_LEVELS)}")
    return text.upper()


def _server(text: str, folder: Path) -> str:
    from portico.agent.api import server_url

    return _worded(server_url, text)


def _web_addr(text: str, folder: Path) -> str:
    from portico.agent.inspector import listening_address
    from portico.settings import AgentSettings

    # Whether other machines may reach it is a setting of this machine, and checked when the page is opened.
    _worded(lambda value: listening_address(AgentSettings(web_addr=value, web_allow_remote=True)), text)
    return text


def _proxy(text: str, folder: Path) -> str:
    from portico.agent import proxy

    if text in proxy.OFF:
        return text
    if "@" in text:
        raise ValueError("a password does not belong into a file that is shared; put the URL into PORTICO_PROXY_URL")
    _worded(proxy.parse, text)
    return text


def _path(text: str, folder: Path) -> Path:
    return folder / Path(text).expanduser()


def _environment(text: str, folder: Path) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is None:
        raise ValueError(f"{text[:40]!r} is not the name of an environment variable")
    return text


def _protocol(text: str, folder: Path) -> str:
    if text in PROTOCOLS:
        return text
    if text == "udp":
        raise ValueError(f"{text} tunnels do not exist yet; there is: {', '.join(PROTOCOLS)}")
    raise ValueError(f"{text[:40]!r} is not a protocol; there is: {', '.join(PROTOCOLS)}")


def _target(text: str, folder: Path) -> Target:
    """A TARGET; a relative path is one below the file's folder."""
    return _worded(parse_target, _below(text, folder))


def _tcp_target(text: str, folder: Path) -> Target:
    return _worded(parse_tcp_target, _below(text, folder))


def _tls_target(text: str, folder: Path) -> Target:
    return _worded(parse_tls_target, _below(text, folder))


def _alpn(text: str, folder: Path) -> tuple[str, ...]:
    from portico.agent.tls_files import alpn_names

    return alpn_names(text)


def _below(text: str, folder: Path) -> str:
    for scheme in ("file:", "unix:"):
        if text.startswith((scheme + "./", scheme + "../")):
            return f"{scheme}{(folder / text[len(scheme) :]).resolve()}"
    return text


def _short_for_policy(name: str, many: bool) -> Callable[[str, Path], str]:
    """Of a key that is short for a policy: its text, when a policy can be made of it."""

    def read(text: str, folder: Path) -> str:
        short: dict[str, Any] = {name: [text] if many else text}
        policies.compiled(policies.Sugar(**short))
        return text

    return read


def _number(low: int, high: int) -> Callable[[str, Path], int]:
    def read(text: str, folder: Path) -> int:
        if not text.isdecimal() or not text.isascii() or not low <= int(text) <= high:
            raise ValueError(f"{text[:40]!r} is not a number from {low} to {high}")
        return int(text)

    return read


def _worded(check: Callable[[str], T], text: str) -> T:
    """A check that raises a problem, as one that raises ``ValueError`` with its detail."""
    try:
        return check(text)
    except Problem as problem:
        raise ValueError(problem.detail.removeprefix("target ")) from None


#: What ``protocol`` may be.
PROTOCOLS = ("http", "tcp", "tls")


@dataclass(frozen=True, slots=True)
class Key:
    """One key. ``read`` makes its value of the text, or raises ``ValueError`` with a sentence.

    ``refusal``: why the key cannot be used. ``kind`` is what the page calls the value. ``only``: the
    protocols that have it, where not all do.
    """

    name: str
    kind: str = "text"
    read: Callable[[str, Path], Any] = _text
    about: str = ""
    default: str = ""
    example: str = ""
    required: bool = False
    refusal: str = ""
    only: tuple[str, ...] = ()
    #: ``one`` value, ``many`` (one, or a list of them), or a ``map``, which is left as the file has it.
    shape: str = "one"


def _domain(text: str, folder: Path) -> str:
    """A domain by its look; whether it is the organization's, the platform knows."""
    found = text.strip().rstrip(".")
    if not found or len(found) > 253 or "." not in found or any(c in found for c in "/:@ ") or not found.isprintable():
        raise ValueError(f"{text!r} is not a domain, such as www.example.com")
    return found


def _missing(name: str, sentence: str) -> Key:
    return Key(name, refusal=sentence)


TOP = (
    Key("version", "1", _version, "Version of this format.", example="1", required=True),
    Key(
        "server", "URL", _server, "Address of the API. The sign-in of this machine must be for it, unless a key is named.",
        "the one of `portico login`", "https://portico.example.com",
    ),
    Key("agent_key_env", "variable", _environment, "Environment variable that holds the agent key.", example="CI_TUNNEL_KEY"),
    Key("agent_key_file", "path", _path, "File that holds the agent key alone; a relative path is one below this file.",
        example="./agent.key"),
    Key("ca_file", "path", _path, "CA bundle for an https API or wss relay with a private CA.", "the public ones", "./ca.pem"),
    Key(
        "proxy_url", "URL", _proxy, "Proxy to the platform, with `http://`, `socks5://` or `socks5h://`; `none` for no proxy.",
        "HTTPS_PROXY, ALL_PROXY", "socks5h://10.0.0.1:1080",
    ),
    Key("region", "text", _text, "Preferred region.", "the platform chooses", "eu"),
    Key("log_level", "level", _log_level, "Lowest level of log records: " + ", ".join(LOG_LEVELS) + ".", "INFO", "WARNING"),
    Key("web_addr", "HOST:PORT or switch", _web_addr, "Address of the local page that shows requests, or `false` for none.",
        "127.0.0.1:4040", "false"),
    Key("tunnels", "map", about="Tunnels by name. A name is also the subdomain where `subdomain` says nothing else.",
        required=True),
    _missing("agent_key", "a key does not belong into a file that is shared; use agent_key_env or agent_key_file"),
)  # fmt: skip

TUNNEL = (
    Key("protocol", "name", _protocol, "What the tunnel carries: " + ", ".join(PROTOCOLS) + ".", "http", "http"),
    Key(
        "addr", "TARGET", _target,
        "What visitors reach: `8000`, `host:port`, `http(s)://host[:port]`, `unix:/path` or `file:///dir`. "
        "`unix:./path` and `file:./dir` are below this file's folder. For tcp and tls: a port, `host:port` or `unix:/path`.",
        example="8000", required=True,
    ),
    Key("subdomain", "name", lambda text, folder: check_name(text), "Subdomain of the URL.", "the tunnel's name", "shop",
        only=("http", "tls")),
    Key(
        "host_header", "rule", _short_for_policy("host_header", many=False),
        "Host that the target sees: `preserve` (the visitor's), `rewrite` (its own), or a name.", "preserve", "rewrite",
        only=("http",),
    ),
    Key(
        "target_tls_verify", "switch", _switch, "Check the certificate of an https target.",
        "yes, except on this machine", "false", only=("http",),
    ),
    Key("remote_port", "port", _number(1, 65_535), "Public port, of the platform's range.", "a free one", "7105",
        only=("tcp",)),
    Key("proxy_protocol", "1 or 2", _number(1, 2), "Tell the target each visitor's address by a PROXY header of this version.",
        "no header", "2", only=("tcp", "tls")),
    Key("tls_cert", "path", _path, "PEM file with certificate and chain: the agent ends the visitors' TLS with it, and `addr` "
        "gets plain bytes. Read again when it changes.", "TLS passes through to `addr`", "./fullchain.pem", only=("tls",)),
    Key("tls_key", "path", _path, "PEM file with its private key, not encrypted; only with `tls_cert`.", "none", "./privkey.pem",
        only=("tls",)),
    Key("tls_alpn", "names", _alpn, "Protocols that are offered to visitors by ALPN, best first, with commas between them; only "
        "with `tls_cert`.", "none", "http/1.1", only=("tls",)),
    Key("inspect", "switch", _switch, "Keep requests for the local page.", "true", "false"),
    Key("ttl", "duration", lambda text, folder: parse_duration(text),
        "The tunnel ends itself this long after it came online, such as `90s`, `15m` or `1h30m`.", "it stays", "2h"),
    _missing("pool", "several agents behind one tunnel do not exist yet; one agent serves a tunnel, another takes over"),
    Key("domain", "name", _domain, "Domain of your own that leads to the tunnel, once it is verified (`portico domains`).",
        "none", "www.example.com", only=("http", "tls")),
    Key("basic_auth", "NAME:PASSWORD or list", _short_for_policy("basic_auth", many=True),
        "Visitors need one of these passwords. A file that is shared is no place for one: `policy_file` can name one that is "
        "not.", "nobody needs one", "alice:secret", only=("http",), shape="many"),
    Key("allow_cidr", "network or list", _short_for_policy("allow_cidr", many=True),
        "Only visitors from these networks are let in.", "everybody", "[10.0.0.0/8, 2001:db8::/32]", shape="many"),
    Key("deny_cidr", "network or list", _short_for_policy("deny_cidr", many=True),
        "Visitors from these networks are kept out, also where `allow_cidr` names them.", "nobody", "192.0.2.0/24", shape="many"),
    Key("policy", "map", _text, "The whole policy ([policy.md](policy.md)); the three keys above and `host_header` add to it.",
        "the one that the tunnel has", "{concurrency: 20}", shape="map"),
    Key("policy_file", "path", _path, "File with the policy, YAML or JSON, in the place of `policy`; read again when it changes.",
        "none", "./policy.yml"),
)  # fmt: skip


def keys_of(protocol: str) -> tuple[Key, ...]:
    """The keys of a tunnel of this protocol; those of another one are refused."""
    read = {"tcp": _tcp_target, "tls": _tls_target}.get(protocol, _target)
    return tuple(
        replace(key, read=read) if key.name == "addr"
        else key if not key.only or protocol in key.only
        else replace(key, refusal=f"only a tunnel with protocol: {' or '.join(key.only)} has it")
        for key in TUNNEL
    )  # fmt: skip


#: What people of other tunnels type, and what it is called here (`-`: there is no such thing, with the reason).
OTHER_NAMES = {
    "top": {
        "endpoints": "tunnels", "ingress": "tunnels", "proxies": "tunnels", "apps": "tunnels",
        "authtoken": "agent_key_env", "auth_token": "agent_key_env", "token": "agent_key_env", "api_key": "agent_key_env",
        "credentials-file": "agent_key_file", "connect_url": "server", "server_addr": "server", "serverAddr": "server",
        "connect_cas": "ca_file", "loglevel": "log_level", "proxyURL": "proxy_url",
    },
    "tunnel": {
        "proto": "protocol", "type": "protocol", "schemes": "protocol",
        "upstream": "addr", "target": "addr", "service": "addr", "port": "addr", "localPort": "addr", "local_port": "addr",
        "url": "subdomain", "hostname": "domain", "hostnames": "domain", "customDomains": "domain",
        "remotePort": "remote_port", "remote_addr": "remote_port",
        "hostHeader": "host_header", "host-header": "host_header", "hostHeaderRewrite": "host_header",
        "httpHostHeader": "host_header", "verify_upstream_tls": "target_tls_verify", "noTLSVerify": "target_tls_verify",
        "pooling_enabled": "pool", "loadBalancer": "pool", "traffic_policy": "policy", "auth": "basic_auth",
        "crt": "tls_cert", "crtPath": "tls_cert", "key": "tls_key", "keyPath": "tls_key",
        "httpUser": "basic_auth", "cidr_allow": "allow_cidr", "cidr_deny": "deny_cidr", "deadline": "ttl",
    },
}  # fmt: skip
#: Keys that hold other keys elsewhere; here those stand one level higher.
UNNEST = {"agent": "its keys stand at the top of the file here"}
