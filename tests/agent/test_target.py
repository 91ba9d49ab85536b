"""TARGET as people type it."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest

from portico.agent.target import Target, parse_target, parse_tcp_target, tls_context, why_unreachable
from portico.errors import Problem


@pytest.mark.parametrize(
    ("text", "url", "place", "authority"),
    [
        ("8000", "http://localhost:8000", "localhost:8000", "localhost:8000"),
        ("app.test:81", "http://app.test:81", "app.test:81", "app.test:81"),
        ("[::1]:3000", "http://[::1]:3000", "[::1]:3000", "[::1]:3000"),
        ("http://APP.test", "http://app.test", "app.test:80", "app.test"),
        ("https://app.test/", "https://app.test", "app.test:443", "app.test"),
        ("https://10.0.0.1:8443", "https://10.0.0.1:8443", "10.0.0.1:8443", "10.0.0.1:8443"),
        ("unix:/run/app.sock", "unix:/run/app.sock", "/run/app.sock", "localhost"),
        ("unix:///run/app.sock", "unix:/run/app.sock", "/run/app.sock", "localhost"),
    ],
)
def test_valid(text: str, url: str, place: str, authority: str) -> None:
    target = parse_target(text)
    assert (target.url, target.place, target.authority) == (url, place, authority)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    assert parse_target(f"file://{tmp_path}/a%20b").path == str(tmp_path / "a b")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "add a port"), ("0", "1 to 65535"), ("65536", "1 to 65535"), ("99999999999999", "1 to 65535"),
        ("localhost", "add a port"), ("app:x", "add a port"), (":80", "no valid host"),
        ("a b:80", "no valid host"), ("-x:80", "no valid host"),
        ("http://", "no valid host"), ("http://h:99999", "ut of range"), ("http://h/path", "a path"), ("h:80/path", "a path"),
        ("http://h?x", "a path"), ("http://u:p@h", "credentials"), ("ftp://h", "the scheme"), ("tcp://h:1", "the scheme"),
        ("unix:run.sock", "absolute"), ("file:dir", "absolute"), ("file://host/dir", "another machine"),
        ("file:///no/such/dir", "not a folder"), ("[::zz]:80", "no valid host"), ("./site", "file:///dir"),
    ],
)  # fmt: skip
def test_refused(text: str, why: str) -> None:
    with pytest.raises(Problem) as caught:
        parse_target(text)
    assert caught.value.code == "target.invalid" and why in caught.value.detail


def test_tls_is_verified_except_on_this_machine() -> None:
    assert tls_context(parse_target("app.test:80"), None) is None
    for text, choice, mode in (
        ("https://app.test", None, ssl.CERT_REQUIRED),
        ("https://app.test", False, ssl.CERT_NONE),
        ("https://localhost", None, ssl.CERT_NONE),
        ("https://127.0.0.2", None, ssl.CERT_NONE),
        ("https://localhost", True, ssl.CERT_REQUIRED),
        ("https://localhost.evil.test", None, ssl.CERT_REQUIRED),
    ):
        context = tls_context(parse_target(text), choice)
        assert context is not None and context.verify_mode == mode, text


@pytest.mark.parametrize(
    ("err", "words"),
    [
        (ConnectionRefusedError(), "nothing listens on app:80"),
        (TimeoutError(), "app:80 did not accept a connection within 3 s"),
        (socket.gaierror(-2, "x"), "the name app cannot be resolved"),
        (ConnectionResetError(), "app:80 accepted the connection and reset it at once"),
        (BrokenPipeError(), "app:80 accepted the connection and reset it at once"),
        (OSError(113, "No route to host"), "app:80 cannot be reached (No route to host)"),
    ],
)
def test_words(err: OSError, words: str) -> None:
    assert why_unreachable(Target("tcp", "app", 80), err, 3.0) == words


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("22", "tcp://localhost:22"),
        (" 5432 ", "tcp://localhost:5432"),
        ("db.internal:5432", "tcp://db.internal:5432"),
        ("tcp://10.0.0.2:22", "tcp://10.0.0.2:22"),
        ("TCP://[::1]:22/", "tcp://[::1]:22"),
        ("80", "tcp://localhost:80"),  # no default port is left out
        ("unix:/run/app.sock", "unix:/run/app.sock"),
        ("unix:///run/app.sock", "unix:/run/app.sock"),
    ],
)
def test_targets_of_tcp_tunnels(text: str, url: str) -> None:
    target = parse_tcp_target(text)
    assert target.url == url and target.raw and not target.tls


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "tcp://",
        "tcp://host",
        "http://host:80",
        "https://host",
        "file:///tmp",
        "file:x",
        "0",
        "65536",
        "a/b:1",
    ],
)
def test_what_is_none_of_a_tcp_tunnel(text: str) -> None:
    with pytest.raises(Problem) as refused:
        parse_tcp_target(text)
    assert refused.value.code == "target.invalid" and "tcp://host:port" in refused.value.hint
