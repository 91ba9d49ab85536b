"""Listening sockets: bound with useful refusals, or inherited."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from portico.errors import Problem
from portico.kit import notify, sockets
from portico.kit.sockets import bind_tcp, describe, inherited, port_of


def test_a_bound_socket_queues_connections_before_anybody_accepts() -> None:
    with bind_tcp("127.0.0.1", 0) as sock, socket.create_connection(("127.0.0.1", port_of(sock)), timeout=2) as client:
        client.sendall(b"early")
        served, _ = sock.accept()
        with served:
            assert served.recv(5) == b"early"


def test_accepted_connections_are_asked_whether_they_live() -> None:
    with bind_tcp("127.0.0.1", 0) as sock, socket.create_connection(("127.0.0.1", port_of(sock)), timeout=2):
        served, _ = sock.accept()
        with served:
            assert served.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == sockets.KEEPALIVE[0]


def test_a_taken_port_is_named_with_the_option_that_changes_it() -> None:
    with bind_tcp("127.0.0.1", 0) as sock:
        with pytest.raises(Problem) as caught:
            bind_tcp("127.0.0.1", port_of(sock), what="public HTTP", option="--http-port")
        assert caught.value.code == "up.port_taken"
        line = caught.value.line()
        assert f"port {port_of(sock)} (public HTTP) is taken" in line and "--http-port" in line


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(Problem) as caught:
        bind_tcp("192.0.2.1", 0)
    assert caught.value.code == "up.address_unavailable"
    with pytest.raises(Problem) as caught:
        bind_tcp("no such host", 0)
    assert caught.value.code == "up.address_unavailable"


def test_a_number_that_is_no_port_is_a_setting_error() -> None:
    with pytest.raises(Problem) as caught:
        bind_tcp("127.0.0.1", 70000, option="--http-port")
    assert caught.value.code == "config.invalid" and "--http-port" in caught.value.detail


def test_a_port_that_needs_a_privilege_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", denied)
    with pytest.raises(Problem) as caught:
        bind_tcp("127.0.0.1", 80, option="--http-port")
    assert caught.value.code == "up.port_denied" and "CAP_NET_BIND_SERVICE" in caught.value.hint


def test_a_child_inherits_by_name() -> None:
    code = (
        "import sys; from portico.kit.sockets import inherited\n"
        "found = inherited(sys.argv[1]); conn, _ = (found['public'].setblocking(True), found['public'].accept())[1]\n"
        "conn.sendall(','.join(found).encode()); conn.close()"
    )
    with bind_tcp("127.0.0.1", 0) as public, bind_tcp("127.0.0.1", 0) as control:
        given = {"public": public, "control": control}
        child = subprocess.Popen(
            [sys.executable, "-c", code, describe(given)], pass_fds=[sock.fileno() for sock in given.values()]
        )
        with socket.create_connection(("127.0.0.1", port_of(public)), timeout=10) as client:
            client.settimeout(10)
            assert client.recv(64) == b"public,control"
        assert child.wait(10) == 0


def test_nothing_given_is_nothing_inherited() -> None:
    assert inherited("") == {}


@pytest.mark.parametrize("value", ["public", "public=x", "=5", "public=99999"])
def test_a_malformed_list_is_refused(value: str) -> None:
    with pytest.raises(Problem) as caught:
        inherited(value)
    assert caught.value.code == "config.invalid" and "listen_fds" in caught.value.detail


def test_inherited_sockets_are_not_passed_on() -> None:
    with bind_tcp("127.0.0.1", 0) as sock:
        duplicate = os.dup(sock.fileno())
        os.set_inheritable(duplicate, True)
        found = sockets.inherited(f"public={duplicate}")
        assert os.get_inheritable(duplicate) is False
        found["public"].close()


class TestNotify:
    def test_says_ready_then_stopping_and_closes(self) -> None:
        read_end, write_end = os.pipe()
        notify.ready(write_end)
        assert os.read(read_end, 64) == b"READY=1\n"
        notify.stopping(write_end)
        assert os.read(read_end, 64) == b"STOPPING=1\n"
        assert os.read(read_end, 64) == b"", "the descriptor must be closed"
        os.close(read_end)

    def test_a_supervisor_that_is_gone_does_not_matter(self) -> None:
        read_end, write_end = os.pipe()
        os.close(read_end)
        notify.ready(write_end)
        notify.stopping(write_end)
        notify.ready(None)
