"""The ACME client against the real Pebble: accounts, orders, challenges, certificates; and against answers that are none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from portico.control.domains import acme_client, acme_errors
from portico.control.domains.acme_client import Client, Limits, Order
from portico.control.domains.acme_errors import AcmeError
from tests import pebble
from tests.ports import free_port


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pebble.Pebble]:
    """Half of the nonces are refused although they are good."""
    folder = tmp_path_factory.mktemp("pebble")
    rough = {"PEBBLE_WFE_NONCEREJECT": "50", "PEBBLE_WFE_ORDERS_PER_PAGE": "2"}
    with pebble.running(folder, free_port(), free_port(), environment=rough) as running:
        yield running


@pytest.fixture
async def client(ca: pebble.Pebble) -> AsyncIterator[Client]:
    made = Client(ca.directory, acme_client.new_key(), context=ca.context(), limits=Limits(nonce_retries=40))
    yield made
    await made.close()


def csr(*names: str) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
    return builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(
        serialization.Encoding.DER
    )


async def prove(client: Client, ca: pebble.Pebble, order: Order) -> Order:
    """By DNS-01, which needs nobody but the DNS server."""
    for url in order.authorizations:
        found = await client.authorization(url)
        if found.status == "valid":
            continue
        (challenge,) = [one for one in found.challenges if one.kind == "dns-01"]
        digest = hashes.Hash(hashes.SHA256())
        digest.update(client.key_authorization(challenge.token).encode())
        ca.say(
            "set-txt",
            host=f"_acme-challenge.{found.name}.",
            value=acme_client.b64encode(digest.finalize()).decode(),
        )
        await client.respond(challenge.url)
    async with asyncio.timeout(60):
        while (order := await client.order(order.url)).status == "pending":
            await asyncio.sleep(0.05)
    return order


async def issued(client: Client, ca: pebble.Pebble, *names: str) -> str:
    order = await prove(client, ca, await client.new_order(names))
    assert order.status == "ready", order
    order = await client.finalize(order, csr(*names))
    async with asyncio.timeout(60):
        while order.certificate is None:
            await asyncio.sleep(0.05)
            order = await client.order(order.url)
    return await client.certificate(order.certificate)


async def test_a_certificate_is_had_although_half_of_the_nonces_are_refused(ca: pebble.Pebble, client: Client) -> None:
    account, _ = await client.register(["ops@example.com"], agree=True)
    assert account.startswith("https://")
    chain = x509.load_pem_x509_certificates((await issued(client, ca, "one.example.com", "*.example.com")).encode())
    names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert sorted(names.get_values_for_type(x509.DNSName)) == ["*.example.com", "one.example.com"]
    assert len(chain) > 1


async def test_registering_again_is_the_same_account(client: Client) -> None:
    first = await client.register([], agree=True)
    assert await client.register([], agree=True) == first


async def test_an_order_whose_answer_was_lost_is_found_again(client: Client) -> None:
    _, orders = await client.register([], agree=True)
    assert orders is not None
    known = [(await client.new_order([f"n{number}.example.com"])).url for number in range(3)]
    lost = await client.new_order(["lost.example.com"])
    assert await client.lost_order(orders, ["other.example.com"], known) is None
    found = await client.lost_order(orders, ["lost.example.com"], known)
    assert found is not None and found.url == lost.url
    assert await client.lost_order(orders, ["lost.example.com"], [*known, lost.url]) is None
    assert await client.lost_order(None, ["lost.example.com"], known) is None


async def test_an_order_that_somebody_finalized_is_not_the_lost_one(ca: pebble.Pebble, client: Client) -> None:
    """It was that of who had the name before, whose rows are gone: its certificate is for a key that nobody has."""
    _, orders = await client.register([], agree=True)
    await issued(client, ca, "before.example.com")
    assert await client.lost_order(orders, ["before.example.com"], []) is None


async def test_a_ca_that_says_a_byte_now_and_then_has_no_longer_than_others() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/dir"
    client = Client(url, acme_client.new_key(), limits=Limits(timeout_seconds=0.5))
    try:
        async with asyncio.timeout(60):
            with pytest.raises(AcmeError) as refused:
                await client.directory()
        assert refused.value.code == "ca_unreachable"
    finally:
        await client.close()
        server.close()


async def test_what_the_ca_refuses_has_a_code_of_ours(client: Client) -> None:
    await client.register([], agree=True)
    with pytest.raises(AcmeError) as refused:
        await client.new_order(["blocked-domain.example"])
    assert refused.value.code == "rejected_identifier" and not refused.value.transient
    with pytest.raises(AcmeError) as refused:
        await client.new_order(["x.example.com"], profile="no-such-profile")
    assert refused.value.code in ("invalid_profile", "malformed")


async def test_without_an_account_nothing_is_ordered(client: Client) -> None:
    with pytest.raises(AcmeError, match="account_unknown"):
        await client.new_order(["x.example.com"])


async def test_terms_that_nobody_agreed_to_make_no_account(client: Client) -> None:
    with pytest.raises(AcmeError) as refused:
        await client.register([], agree=False)
    assert not refused.value.transient


async def test_a_renewal_window_is_read_and_one_that_is_none_is_refused(ca: pebble.Pebble, client: Client) -> None:
    await client.register([], agree=True)
    chain = await issued(client, ca, "ari.example.com")
    leaf = x509.load_pem_x509_certificate(chain.encode())
    known_as = acme_client.certificate_id(leaf)
    window = await client.window(known_as)
    assert window is not None and leaf.not_valid_before_utc < window.start < window.end < leaf.not_valid_after_utc
    assert window.wait is not None and window.wait > 0
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
    said = '{"suggestedWindow": {"start": "%s", "end": "%s"}, "explanationURL": "https://example.com/why"}'
    ca.suggest(chain, said % (start.isoformat(), (start + timedelta(minutes=5)).isoformat()))
    window = await client.window(known_as)
    assert window is not None and (window.start, window.explanation) == (start, "https://example.com/why")
    wrong = ("[]", "{", '{"suggestedWindow": 7}', said % ("yesterday", "tomorrow"),
             said % (start.isoformat(), start.isoformat()), said % ("9999-01-01T00:00:00Z", "9999-01-02T00:00:00Z"))  # fmt: skip
    for text in wrong:
        ca.suggest(chain, text)
        with pytest.raises(AcmeError) as refused:
            await client.window(known_as)
        assert refused.value.code == "ca_unreadable" and refused.value.transient


async def test_a_revoked_certificate_is_to_be_renewed_at_once(ca: pebble.Pebble, client: Client) -> None:
    await client.register([], agree=True)
    leaf = x509.load_pem_x509_certificate((await issued(client, ca, "gone.example.com")).encode())
    await client.revoke(leaf.public_bytes(serialization.Encoding.DER), 1)
    window = await client.window(acme_client.certificate_id(leaf))
    assert window is not None and window.end < datetime.now(UTC)
    with pytest.raises(AcmeError) as refused:
        await client.revoke(leaf.public_bytes(serialization.Encoding.DER), 1)
    assert refused.value.code == "already_revoked"


async def test_an_account_that_exists_elsewhere_is_bound(tmp_path: Path) -> None:
    with pebble.running(tmp_path, free_port(), free_port(), external_account=True) as ca:
        client = Client(ca.directory, acme_client.new_key(), context=ca.context())
        try:
            assert (await client.directory()).external_account
            with pytest.raises(AcmeError) as refused:
                await client.register([], agree=True)
            assert refused.value.code == "external_account_required"
            account, _ = await client.register([], agree=True, binding=pebble.EAB)
            assert account
        finally:
            await client.close()


async def _answering(*answers: bytes) -> tuple[asyncio.Server, str]:
    """A CA without TLS that gives these answers, one a connection, the last for good."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(left.pop(0) if len(left) > 1 else left[0])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/dir"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "ca_unreadable"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "ca_unreadable"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + b"x" * 900, "ca_unreadable"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n", "ca_error"),
        (b"HTTP/1.1 503 Busy\r\nRetry-After: 120\r\nContent-Length: 0\r\n\r\n", "server_internal"),
        (b"HTTP/1.1 429 Slow\r\nRetry-After: 120\r\nContent-Length: 0\r\n\r\n", "ca_busy"),
        (b"", "ca_unreachable"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", "ca_unreachable"),
    ],
)  # fmt: skip
async def test_answers_of_no_ca_are_errors_of_ours(answer: bytes, code: str) -> None:
    server, url = await _answering(answer)
    client = Client(url, acme_client.new_key(), limits=Limits(answer_max_bytes=500, timeout_seconds=10))
    try:
        with pytest.raises(AcmeError) as refused:
            await client.directory()
        assert refused.value.code == code
        if b"Retry-After" in answer:
            assert refused.value.retry_after == 120
    finally:
        await client.close()
        server.close()


def test_retry_after_is_read_in_both_forms_and_bounded() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert acme_errors.retry_after("60", now) == 60
    assert acme_errors.retry_after("Thu, 01 Jan 2026 00:02:00 GMT", now) == 120
    assert acme_errors.retry_after("Wed, 31 Dec 2025 00:00:00 GMT", now) == 0
    assert acme_errors.retry_after("999999999", now) == acme_errors.RETRY_MAX_SECONDS
    for text in ("", "soon", "-5", "1.5", "1e9", "9" * 40):
        assert acme_errors.retry_after(text, now) is None
    assert acme_errors.retry_after(None, now) is None


def test_codes_come_of_types_and_details_never_decide() -> None:
    one = {"type": "urn:ietf:params:acme:error:rateLimited", "detail": "too many, see req 17 at 12:00\r\nX: y"}
    other = one | {"detail": "too many, see req 18 at 12:01"}
    found = acme_errors.of_problem(one, 429, 60.0)
    assert found.code == acme_errors.of_problem(other, 429).code == "rate_limited"
    assert "\n" not in found.detail and found.retry_after == 60.0
    part = {"type": "urn:ietf:params:acme:error:caa", "detail": "CAA forbids"}
    compound = {"type": "urn:ietf:params:acme:error:compound", "detail": "several", "subproblems": [part, 7]}
    assert acme_errors.of_problem(compound, 403).code == "caa"
    assert acme_errors.of_problem({"type": "urn:ietf:params:acme:error:constructor"}, 400).code == "ca_error"
    assert acme_errors.of_problem("no object", 502).code == "server_internal"
    assert len(acme_errors.of_problem({"detail": "x" * 9999}, 400).detail) == acme_errors.DETAIL_CHARS
