"""Client certificates and resumed sessions: what a handshake checked counts for that host, that authority, and no longer."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from cryptography.x509.oid import ExtendedKeyUsageOID

from portico.relay.server import Relay
from portico.relay.tls_port import TlsPort
from tests.relay.authorities import authority, client_ca_pem, client_certificate
from tests.relay.doubles import Client, ScriptedAgent, grant, port, row, session_token


def policy(ca: str | None) -> dict[str, Any]:
    return {} if ca is None else {"client_certificates": {"ca": client_ca_pem(ca)}}


def get(host: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {host}.localhost\r\n\r\n".encode()


def client(certificate: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority("localhost").certificate_pem.decode())
    if certificate is not None:
        context.load_cert_chain(certificate)
    return context


def stats(relay: Relay) -> Any:
    found = relay.servers[2]
    assert isinstance(found, TlsPort)
    return found.stats


@pytest.fixture
def relay_settings(tmp_path: Path) -> dict[str, Any]:
    """With a CA that clients know."""
    issuer = authority("localhost")
    folder = tmp_path / "ca"
    folder.mkdir()
    (folder / "ca.pem").write_bytes(issuer.certificate_pem)
    (folder / "ca.key").write_bytes(issuer.key_pem(b"pass"))
    from portico.settings import Secret

    return {"dev_ca_dir": folder, "dev_ca_passphrase": Secret("pass")}


@pytest.fixture
async def agent(relay: Relay) -> AsyncIterator[ScriptedAgent]:
    """Tunnels: ``open`` asks for nothing, ``mine`` and ``other`` for certificates of an authority each."""
    scripted = await ScriptedAgent().connect(port(relay, 0), session_token())
    for bind, (name, ca) in enumerate((("open", None), ("mine", "mine"), ("other", "other")), start=1):
        await scripted.online(grant(name, policy=policy(ca)), bind)
    yield scripted
    scripted.close()


async def visit(relay: Relay, name: str, context: ssl.SSLContext) -> Client:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port(relay, 2), ssl=context, server_hostname=f"{name}.localhost"
    )
    return Client(reader, writer)


async def asked(relay: Relay, name: str, context: ssl.SSLContext) -> tuple[int, str]:
    """Status and code of one request."""
    visitor = await visit(relay, name, context)
    visitor.send(get(name))
    status, fields, _ = await visitor.response()
    visitor.writer.close()
    return status, b"".join(fields.get(b"portico-error", [])).decode()


class TestClientCertificates:
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_none_is_401_and_the_right_one_passes(
        self, relay: Relay, agent: ScriptedAgent, tmp_path: Path, version: ssl.TLSVersion
    ) -> None:
        without, with_one = client(), client(client_certificate("mine", tmp_path))
        for context in (without, with_one):
            context.maximum_version = version
        assert await asked(relay, "mine", without) == (401, "edge.auth_required")
        assert await asked(relay, "mine", with_one) == (200, "")
        assert await asked(relay, "open", with_one) == (200, "")
        assert await asked(relay, "open", without) == (200, "")
        assert len(agent.streams) == 3

    async def test_with_a_password_beside_it_each_is_asked_for_when_it_helps(
        self, relay: Relay, agent: ScriptedAgent, tmp_path: Path
    ) -> None:
        users = [{"name": "alice", "digest": PasswordHasher(time_cost=1, memory_cost=64).hash("secret")}]
        agent.bind(grant("mine", policy={**policy("mine"), "basic_auth": {"users": users}}, policy_version=1), 2)
        await agent.until(lambda: relay.agents.by_host[b"mine.localhost"].policy_version == 1)
        good = b"\r\nAuthorization: Basic " + base64.b64encode(b"alice:secret") + b"\r\n\r\n"
        visitor = await visit(relay, "mine", client())
        visitor.send(get("mine").replace(b"\r\n\r\n", good))
        status, fields, body = await visitor.response()
        assert (status, fields[b"portico-error"], fields[b"connection"]) == (401, [b"edge.auth_required"], [b"close"])
        assert b"www-authenticate" not in fields and b"certificate of an authority" in body
        visitor = await visit(relay, "mine", client(client_certificate("mine", tmp_path)))
        visitor.send(get("mine"))
        status, fields, body = await visitor.response()
        assert (status, fields[b"portico-error"]) == (401, [b"edge.auth_required"])
        assert b"www-authenticate" in fields and b"certificate of an authority" not in body
        visitor.send(get("mine").replace(b"\r\n\r\n", good))
        assert (await visitor.response())[0] == 200
        assert len(agent.streams) == 1

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    @pytest.mark.parametrize("kind", ["foreign", "server"])
    async def test_a_wrong_one_fails_the_handshake(
        self, relay: Relay, agent: ScriptedAgent, tmp_path: Path, version: ssl.TLSVersion, kind: str
    ) -> None:
        """Its own alert, and no request passes: in TLS 1.3 the client may have sent one before it hears of it."""
        path = (
            client_certificate("other", tmp_path)
            if kind == "foreign"
            else client_certificate("mine", tmp_path, ExtendedKeyUsageOID.SERVER_AUTH)
        )
        context = client(path)
        context.maximum_version = version
        with pytest.raises(ssl.SSLError, match=r"ALERT_UNKNOWN_CA|ALERT_UNSUPPORTED_CERTIFICATE|ALERT_BAD_CERTIFICATE"):
            visitor = await visit(relay, "mine", context)
            visitor.send(get("mine"))
            await visitor.response()
        await asyncio.sleep(0.05)
        assert not agent.streams
        assert stats(relay).failures["client_certificate"] == 1

    async def test_every_request_of_a_connection_is_asked(
        self, relay: Relay, agent: ScriptedAgent, tmp_path: Path
    ) -> None:
        """A certificate counts for the host of the handshake alone, also one of the same authority."""
        visitor = await visit(relay, "mine", client(client_certificate("mine", tmp_path)))
        for host, status in (("mine", 200), ("other", 421), ("open", 421), ("mine", 200)):
            visitor.send(get(host))
            assert (await visitor.response())[0] == status
        visitor = await visit(relay, "open", client(client_certificate("mine", tmp_path)))
        visitor.send(get("mine"))
        assert (await visitor.response())[0] == 421
        assert len(agent.streams) == 2

    async def test_without_a_name_no_certificate_is_asked_for(
        self, relay: Relay, agent: ScriptedAgent, tmp_path: Path
    ) -> None:
        context = client(client_certificate("mine", tmp_path))
        context.check_hostname = False
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 2), ssl=context, server_hostname="")
        visitor = Client(reader, writer)
        visitor.send(get("mine"))
        assert (await visitor.response())[0] in (401, 421)
        assert not agent.streams

    @pytest.mark.parametrize("change", ["grant", "row"])
    async def test_another_authority_while_a_connection_is_kept(
        self, relay: Relay, agent: ScriptedAgent, tmp_path: Path, change: str
    ) -> None:
        """What was verified against the old one counts no more; the connection ends, so that the next one is asked anew."""
        visitor = await visit(relay, "mine", client(client_certificate("mine", tmp_path)))
        for _ in range(3):  # also by the short way of repeated requests
            visitor.send(get("mine"))
            assert (await visitor.response())[0] == 200
        streams = len(agent.streams)
        if change == "grant":
            agent.bind(grant("mine", policy=policy("other"), policy_version=1), 2)
        else:
            changed = row("mine", policy=policy("other"), policy_version=1)
            relay.snapshot.apply({"type": "delta", "version": 2, "changes": [{"kind": "tunnel", "tunnel": changed}]})
        await agent.until(lambda: relay.agents.by_host[b"mine.localhost"].policy_version == 1)
        visitor.send(get("mine"))
        status, fields, _ = await visitor.response()
        assert (status, fields[b"portico-error"]) == (401, [b"edge.auth_required"])
        assert fields[b"connection"] == [b"close"]
        assert await visitor.rest() == b""
        assert len(agent.streams) == streams
        assert await asked(relay, "mine", client(client_certificate("other", tmp_path))) == (200, "")

    async def test_a_policy_that_begins_to_ask(self, relay: Relay, agent: ScriptedAgent, tmp_path: Path) -> None:
        visitor = await visit(relay, "open", client(client_certificate("mine", tmp_path)))
        visitor.send(get("open"))
        assert (await visitor.response())[0] == 200
        agent.bind(grant("open", policy=policy("mine"), policy_version=1), 1)
        await agent.until(lambda: relay.agents.by_host[b"open.localhost"].policy_version == 1)
        visitor.send(get("open"))
        assert (await visitor.response())[0] == 401
        assert await visitor.rest() == b""
        assert await asked(relay, "open", client(client_certificate("mine", tmp_path))) == (200, "")


def resume(
    port: int, name: str, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> tuple[ssl.SSLSession | None, bool, bytes]:
    """One connection with the blocking module, which asyncio's does not let have a session: the session that it may go on with,
    whether it went on with the given one, and the status line of a request."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as sock,
        context.wrap_socket(sock, server_hostname=f"{name}.localhost", session=session) as spoken,
    ):
        spoken.sendall(get(name))
        line = spoken.recv(65_536).partition(b"\r\n")[0]
        return spoken.session, bool(spoken.session_reused), line.split(b" ")[1]


class TestResumption:
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_the_same_host_and_certificate(
        self, relay: Relay, agent: ScriptedAgent, version: ssl.TLSVersion
    ) -> None:
        context = client()
        context.maximum_version = version
        number = port(relay, 2)
        session, reused, status = await asyncio.to_thread(resume, number, "open", context)
        assert session is not None and session.has_ticket and not reused and status == b"200"
        _, reused, status = await asyncio.to_thread(resume, number, "open", context, session)
        assert reused and status == b"200"
        assert stats(relay).resumed == 1

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_a_ticket_without_a_check_is_not_taken_where_one_is_required(
        self, relay: Relay, agent: ScriptedAgent, tmp_path: Path, version: ssl.TLSVersion
    ) -> None:
        context = client()
        context.maximum_version = version
        number = port(relay, 2)
        session, _, _ = await asyncio.to_thread(resume, number, "open", context)
        _, reused, status = await asyncio.to_thread(resume, number, "mine", context, session)
        assert (reused, status) == (False, b"401")

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_a_session_ends_with_the_authority_that_it_was_checked_against(
        self, relay: Relay, agent: ScriptedAgent, tmp_path: Path, version: ssl.TLSVersion
    ) -> None:
        context = client(client_certificate("mine", tmp_path))
        context.maximum_version = version
        number = port(relay, 2)
        session, _, status = await asyncio.to_thread(resume, number, "mine", context)
        assert status == b"200" and (session is None or not session.has_ticket)
        agent.bind(grant("mine", policy=policy("other"), policy_version=1), 2)
        await agent.until(lambda: relay.agents.by_host[b"mine.localhost"].policy_version == 1)
        # Without its certificate, which would fail the handshake: only the session could get it in.
        bare = client()
        bare.maximum_version = version
        with pytest.raises(ssl.SSLError):
            await asyncio.to_thread(resume, number, "mine", context, session)
        _, reused, status = await asyncio.to_thread(resume, number, "mine", bare)
        assert (reused, status) == (False, b"401")

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_a_session_ends_with_its_certificate(
        self, relay: Relay, agent: ScriptedAgent, version: ssl.TLSVersion
    ) -> None:
        from tests.relay.authorities import certificate

        context = client()
        context.maximum_version = version
        number = port(relay, 2)
        session, _, _ = await asyncio.to_thread(resume, number, "open", context)
        relay.certificates.store.put("files", certificate("open.localhost", domain="localhost"))
        _, reused, status = await asyncio.to_thread(resume, number, "open", context, session)
        assert (reused, status) == (False, b"200")
