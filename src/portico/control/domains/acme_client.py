"""Speaks ACME (RFC 8555) with one certificate authority, as one account. No database, no clock of its own.

The `acme` package's own client blocks a thread for each request, follows what servers name wherever it leads, and reads answers
of any size. So its signatures (``acme.jws`` over josepy) are used, and the transport is ours: ``kit/kept.py``, bounded in time
and size, with one retry loop for nonces. Every call is one step of an order: it is made once, and whoever calls decides about
another attempt. Raises :class:`AcmeError` alone.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

from acme import jws, messages
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.b64 import b64decode, b64encode
from josepy.jwa import ES256
from josepy.jwk import JWKEC

from portico.control.domains.acme_errors import UNREACHABLE, UNREADABLE, AcmeError, of_problem, retry_after
from portico.kit import kept

_JOSE: Final = "application/jose+json"
_USER_AGENT: Final = "portico (ACME; RFC 8555)"
#: Nonces that are kept: each is good for one request.
_NONCES: Final = 16
_URL_CHARS: Final = 2048
#: Pages of an account's list of orders that are looked through for an order whose answer was lost.
_ORDER_PAGES: Final = 20
_PEM_LINK: Final = "application/pem-certificate-chain"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may take."""

    timeout_seconds: float = 30.0
    answer_max_bytes: int = 1_048_576
    nonce_retries: int = 10


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; names of headers are lower-case. ``retry_after`` in seconds."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    retry_after: float | None

    def document(self) -> dict[str, Any]:
        """The JSON object that it is; raises ``ca_unreadable``."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise AcmeError(UNREADABLE, "the CA's answer is not a JSON object", retry_after=self.retry_after)
        return found


@dataclass(frozen=True, slots=True)
class Directory:
    """Where a CA does what, and what it is like (RFC 8555, 7.1.1; profiles; RFC 9773, 4.1)."""

    urls: Mapping[str, str]
    terms: str | None
    caa: tuple[str, ...]
    external_account: bool
    profiles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to prove control of a name (RFC 8555, 8)."""

    kind: str
    url: str
    token: str
    status: str
    error: AcmeError | None


@dataclass(frozen=True, slots=True)
class Authorization:
    """What has to be proved of one name. ``name`` is without ``*.``, ``wildcard`` says that it was there."""

    url: str
    name: str
    wildcard: bool
    status: str
    challenges: tuple[Challenge, ...]

    @property
    def failure(self) -> AcmeError | None:
        """Why it is invalid, when one of its challenges says so."""
        return next((one.error for one in self.challenges if one.error is not None), None)


@dataclass(frozen=True, slots=True)
class Order:
    """An order as the CA has it. ``wait``: seconds until it wants to be asked again."""

    url: str
    status: str
    names: tuple[str, ...]
    authorizations: tuple[str, ...]
    finalize: str
    certificate: str | None
    error: AcmeError | None
    wait: float | None


@dataclass(frozen=True, slots=True)
class Window:
    """When a CA wants a certificate renewed (RFC 9773, 4.2). ``wait``: seconds until it may be asked again."""

    start: datetime
    end: datetime
    explanation: str | None
    wait: float | None


@dataclass(slots=True)
class _Session:
    directory: Directory | None = None
    nonces: list[str] = field(default_factory=list)


class Client:
    """One account at one CA. ``account``: its URL, once there is one. ``close`` at the end."""

    def __init__(
        self,
        directory: str,
        key: ec.EllipticCurvePrivateKey,
        *,
        account: str | None = None,
        context: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.directory_url = directory
        self.account = account
        self.limits = limits or Limits()
        self._key = JWKEC(key=key)
        self._session = _Session()
        self._plain = urlsplit(directory).scheme == "http"
        self._http = kept.Client(
            context or ssl.create_default_context(),
            kept.Limits(self.limits.timeout_seconds, self.limits.answer_max_bytes),
            {"User-Agent": _USER_AGENT},
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._http.close()

    # -- what is there

    async def directory(self) -> Directory:
        """What the CA offers; read once."""
        if self._session.directory is None:
            self._session.directory = _directory((await self._request("GET", self.directory_url)).document())
        return self._session.directory

    async def window(self, certificate_id: str) -> Window | None:
        """When to renew a certificate; ``None`` from a CA that does not say. ``certificate_id``: RFC 9773, 4.1."""
        base = (await self.directory()).urls.get("renewalInfo")
        if base is None:
            return None
        return _window(await self._request("GET", f"{base.rstrip('/')}/{certificate_id}"))

    # -- the account

    async def register(
        self, contacts: Sequence[str], *, agree: bool, binding: tuple[str, str] | None = None
    ) -> tuple[str, str | None]:
        """The account of the key, made if there is none: its URL, and that of its list of orders (RFC 8555, 7.3).

        ``binding``: key id and HMAC key (base64url) of an account that the CA's customer has with it (7.3.4).
        """
        directory = await self.directory()
        payload: dict[str, Any] = {"termsOfServiceAgreed": agree}
        if contacts:
            payload["contact"] = [f"mailto:{contact}" for contact in contacts]
        if binding is not None:
            payload["externalAccountBinding"] = self._binding(directory, binding)
        answer = await self._post(directory.urls["newAccount"], payload, anonymous=True)
        self.account = self._url(answer.headers.get("location"))
        orders = answer.document().get("orders")
        return self.account, self._url(orders) if isinstance(orders, str) else None

    def _binding(self, directory: Directory, binding: tuple[str, str]) -> dict[str, Any]:
        made = messages.ExternalAccountBinding.from_data(
            self._key.public_key(), binding[0], binding[1], messages.Directory(dict(directory.urls)), "HS256"
        )
        return dict(made)

    # -- orders

    async def new_order(
        self, names: Sequence[str], *, profile: str | None = None, replaces: str | None = None
    ) -> Order:
        """Order a certificate for ``names``. ``replaces``: the id of the certificate that it renews (RFC 9773, 5)."""
        payload: dict[str, Any] = {"identifiers": [{"type": "dns", "value": name} for name in names]}
        if profile is not None:
            payload["profile"] = profile
        if replaces is not None:
            payload["replaces"] = replaces
        answer = await self._post((await self.directory()).urls["newOrder"], payload)
        return self._order(self._url(answer.headers.get("location")), answer)

    async def order(self, url: str) -> Order:
        """An order as it is now."""
        return self._order(url, await self._post(url, None))

    async def lost_order(self, orders: str | None, names: Sequence[str], known: Sequence[str]) -> Order | None:
        """The open order for exactly ``names`` that is none of ``known``: the one whose answer we did not live to see. One that
        was finalized is not it: who had the name before did that, with a key of theirs.

        ``orders``: the account's list (7.1.2.1), which some CAs do not have; those hand out the same order again when it is
        asked for anew.
        """
        wanted, seen, page = sorted(names), set(known), orders
        for _ in range(_ORDER_PAGES):
            if page is None:
                return None
            answer = await self._post(page, None)
            listed = answer.document().get("orders")
            urls = [url for url in listed if isinstance(url, str)] if isinstance(listed, list) else []
            for url in urls:
                if url in seen:
                    continue
                found = await self.order(self._url(url))
                if sorted(found.names) == wanted and found.status in ("pending", "ready"):
                    return found
            page = self._next(answer)
        return None

    async def authorization(self, url: str) -> Authorization:
        """What has to be proved, and how that stands."""
        return self._authorization(url, (await self._post(url, None)).document())

    async def respond(self, challenge: str) -> None:
        """Tell the CA that a challenge can be looked at (7.5.1)."""
        await self._post(challenge, {})

    async def finalize(self, order: Order, csr_der: bytes) -> Order:
        """Ask for the certificate of an order that is ready (7.4)."""
        answer = await self._post(order.finalize, {"csr": b64encode(csr_der).decode("ascii")})
        return self._order(order.url, answer)

    async def certificate(self, url: str) -> str:
        """The chain in PEM form, leaf first (7.4.2)."""
        answer = await self._post(url, None, accept=_PEM_LINK)
        try:
            return answer.body.decode("ascii")
        except UnicodeDecodeError:
            raise AcmeError(UNREADABLE, "the certificate chain is not PEM") from None

    async def revoke(self, certificate_der: bytes, reason: int = 0) -> None:
        """Revoke a certificate of this account (7.6); ``reason``: RFC 5280, 5.3.1."""
        payload = {"certificate": b64encode(certificate_der).decode("ascii"), "reason": reason}
        await self._post((await self.directory()).urls["revokeCert"], payload)

    def key_authorization(self, token: str) -> str:
        """What answers a challenge with ``token`` (8.1). Nothing of it is secret."""
        thumbprint = b64encode(self._key.public_key().thumbprint()).decode("ascii")
        return f"{token}.{thumbprint}"

    # -- requests

    async def _post(self, url: str, payload: Any, *, anonymous: bool = False, accept: str | None = None) -> Answer:
        """A signed request; ``payload`` None: POST-as-GET (6.3). A nonce that is refused is exchanged for another (6.5)."""
        body = b"" if payload is None else json.dumps(payload).encode()
        headers = {"Content-Type": _JOSE} | ({"Accept": accept} if accept else {})
        for tries in range(self.limits.nonce_retries + 1):
            try:
                return await self._request(
                    "POST", url, self._signed(url, body, await self._nonce(), anonymous), headers
                )
            except AcmeError as err:
                if err.code != "bad_nonce" or tries == self.limits.nonce_retries:
                    raise
        raise AssertionError("unreachable")

    def _signed(self, url: str, body: bytes, nonce: str, anonymous: bool) -> bytes:
        kid = None if anonymous else self.account
        if kid is None and not anonymous:
            raise AcmeError("account_unknown", "the account is not registered yet")
        try:
            raw = b64decode(nonce)
        except (ValueError, TypeError):
            raise AcmeError("bad_nonce", "the CA's nonce cannot be read") from None
        made = jws.JWS.sign(body, key=self._key, alg=ES256, nonce=raw, url=url, kid=kid)
        text: str = made.json_dumps()
        return text.encode()

    async def _nonce(self) -> str:
        if self._session.nonces:
            return self._session.nonces.pop()
        await self._request("HEAD", (await self.directory()).urls["newNonce"])
        if not self._session.nonces:
            raise AcmeError(UNREADABLE, "the CA gave no nonce")
        return self._session.nonces.pop()

    async def _request(
        self, method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        where = self._url(url)
        try:
            got = await self._http.request(method, where, body, headers)
        except kept.TooLong:
            most = self.limits.answer_max_bytes
            detail = f"the CA's answer has more than {most} bytes (acme_answer_max_bytes)"
            raise AcmeError(UNREADABLE, detail) from None
        except OSError as err:
            why = "no whole answer in time" if isinstance(err, TimeoutError) else str(err) or type(err).__name__
            raise AcmeError(UNREACHABLE, f"{urlsplit(where).hostname} cannot be asked: {why}"[:300]) from None
        if (nonce := got.headers.get("replay-nonce")) is not None and len(nonce) < 256:
            self._session.nonces = [*self._session.nonces[-_NONCES:], nonce]
        asked = got.headers.get("retry-after")
        wait = retry_after(asked, datetime.now(UTC)) if asked is not None else None
        answer = Answer(got.status, got.headers, got.body, wait)
        if not 200 <= answer.status < 300:
            raise _refusal(answer)
        return answer

    def _url(self, value: Any) -> str:
        """A URL that the CA names, if it may be called: CAs speak TLS, and only one that was set without it does not."""
        if not isinstance(value, str) or len(value) > _URL_CHARS:
            raise AcmeError(UNREADABLE, "the CA's answer lacks an address")
        found = urljoin(self.directory_url, value)
        if urlsplit(found).scheme != ("http" if self._plain else "https") or not urlsplit(found).hostname:
            raise AcmeError(UNREADABLE, "the CA names an address without TLS")
        return found

    def _next(self, answer: Answer) -> str | None:
        for link in answer.headers.get("link", "").split(","):
            where, _, facts = link.partition(">")
            relations = {fact.strip().lower().replace('"', "") for fact in facts.split(";")}
            if where.strip().startswith("<") and "rel=next" in relations:
                return self._url(where.strip()[1:])
        return None

    # -- reading

    def _order(self, url: str, answer: Answer) -> Order:
        found = answer.document()
        error = found.get("error")
        names = [one.get("value") for one in _dicts(found.get("identifiers"))]
        certificate = found.get("certificate")
        return Order(
            url=url,
            status=_word(found.get("status")),
            names=tuple(name for name in names if isinstance(name, str)),
            authorizations=tuple(self._url(one) for one in _list(found.get("authorizations"))),
            finalize=self._url(found.get("finalize")),
            certificate=self._url(certificate) if certificate is not None else None,
            error=of_problem(error, 0) if error is not None else None,
            wait=answer.retry_after,
        )

    def _authorization(self, url: str, found: Mapping[str, Any]) -> Authorization:
        identifier = found.get("identifier")
        name = identifier.get("value") if isinstance(identifier, dict) else None
        if not isinstance(name, str):
            raise AcmeError(UNREADABLE, "an authorization names nothing")
        return Authorization(
            url=url,
            name=name,
            wildcard=found.get("wildcard") is True,
            status=_word(found.get("status")),
            challenges=tuple(self._challenge(one) for one in _dicts(found.get("challenges"))),
        )

    def _challenge(self, found: Mapping[str, Any]) -> Challenge:
        error, token = found.get("error"), found.get("token")
        return Challenge(
            kind=_word(found.get("type")),
            url=self._url(found.get("url")),
            token=token if isinstance(token, str) and _is_token(token) else "",
            status=_word(found.get("status")),
            error=of_problem(error, 0) if error is not None else None,
        )


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key for an account."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A key as text, for sealing."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """The key of such text."""
    found = serialization.load_pem_private_key(pem, None)
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ValueError("not a key on an elliptic curve")
    return found


def _refusal(answer: Answer) -> AcmeError:
    try:
        document: Any = json.loads(answer.body)
    except (ValueError, RecursionError):
        document = None
    return of_problem(document, answer.status, answer.retry_after)


def _directory(found: Mapping[str, Any]) -> Directory:
    urls = {name: url for name, url in found.items() if isinstance(url, str)}
    if missing := {"newNonce", "newAccount", "newOrder", "revokeCert"} - urls.keys():
        raise AcmeError(UNREADABLE, f"that is no ACME directory: it lacks {', '.join(sorted(missing))}")
    meta = found.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    profiles, terms = meta.get("profiles"), meta.get("termsOfService")
    return Directory(
        urls=urls,
        terms=terms if isinstance(terms, str) else None,
        caa=tuple(name.lower() for name in _list(meta.get("caaIdentities")) if isinstance(name, str)),
        external_account=meta.get("externalAccountRequired") is True,
        profiles=tuple(sorted(profiles)) if isinstance(profiles, dict) else (),
    )


def _window(answer: Answer) -> Window:
    """Raises ``ca_unreadable`` for what is none: a start that is not before its end is none (RFC 9773, 4.2)."""
    document = answer.document()
    found = document.get("suggestedWindow")
    found = found if isinstance(found, dict) else {}
    start, end = _moment(found.get("start")), _moment(found.get("end"))
    if start is None or end is None or end <= start:
        raise AcmeError(UNREADABLE, "the CA's renewal window is none", retry_after=answer.retry_after)
    explanation = document.get("explanationURL")
    shown = explanation if isinstance(explanation, str) and explanation.startswith("https://") else None
    return Window(start, end, shown[:_URL_CHARS] if shown else None, answer.retry_after)


def _moment(value: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return found if found is not None and found.tzinfo is not None and 2000 < found.year < 2200 else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in _list(value) if isinstance(one, dict)]


def _word(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 64 else ""


def _is_token(value: str) -> bool:
    """base64url, as RFC 8555 (8.3) has it: it becomes part of a path and of a file's content."""
    return 0 < len(value) <= 256 and all(c.isascii() and (c.isalnum() or c in "-_") for c in value)


def certificate_id(leaf: x509.Certificate) -> str:
    """How RFC 9773 (4.1) names a certificate: its authority's key identifier and its serial number, as DER has them.

    Raises ``ca_unreadable`` for a certificate that does not say who signed it.
    """
    try:
        issuer = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        issuer = None
    if issuer is None:
        raise AcmeError(UNREADABLE, "the certificate does not name the key of its issuer")
    number = leaf.serial_number
    serial = number.to_bytes(number.bit_length() // 8 + 1, "big")  # with the leading zero of a positive INTEGER
    return f"{b64encode(issuer).decode('ascii')}.{b64encode(serial).decode('ascii')}"
