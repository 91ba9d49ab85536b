"""How providers are spoken to: one client with limits, requests made again under their idempotency key, and a breaker.

    answer = await wire.send("POST", "/v1/subscriptions", headers=…, body=…, again=True)

``again``: whether the same request may be sent twice, since it changes nothing or carries an idempotency key. Nothing else is
ever sent twice. What is answered goes to the adapter, 4xx and all; ``Problem`` is raised where no usable answer was had
(``billing.provider_unreachable``, ``_busy``, ``_circuit_open``, ``_unreadable``).

Redirects are not followed, and nothing of the environment is heeded (proxies, certificate files): settings decide.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from portico.control.billing import provider_errors as errors
from portico.control.billing.circuit import Circuit
from portico.errors import Problem
from portico.settings import ApiSettings

#: Answers that another attempt may mend, of a request that may be made again.
_LATER: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Of these, the ones that say that the provider is in trouble, not that we ask too much.
_TROUBLE: Final = frozenset({408, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def document(self, provider: str) -> dict[str, Any]:
        """Its JSON object; an empty body is an empty one. ``billing.provider_unreadable``: it is none."""
        if not self.body:
            return {}
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            raise errors.unreadable(provider, "it is not JSON") from None
        if not isinstance(found, dict):
            raise errors.unreadable(provider, "it is no JSON object")
        return found


@dataclass(frozen=True, slots=True)
class Limits:
    """What a call may take. See the settings ``billing_…``."""

    connect_seconds: float = 5.0
    timeout_seconds: float = 20.0
    call_seconds: float = 25.0
    retries: int = 3
    retry_min_seconds: float = 0.5
    retry_max_seconds: float = 5.0
    answer_max_bytes: int = 8_388_608
    connections: int = 16
    circuit_failures: int = 5
    circuit_seconds: float = 30.0

    @classmethod
    def of(cls, settings: ApiSettings) -> Limits:
        """Those of the settings."""
        return cls(
            settings.billing_connect_seconds, settings.billing_timeout_seconds, settings.billing_call_seconds,
            settings.billing_retries, settings.billing_retry_min_seconds, settings.billing_retry_max_seconds,
            settings.billing_answer_max_bytes, settings.billing_connections, settings.billing_circuit_failures,
            settings.billing_circuit_seconds,
        )  # fmt: skip


class Wire:
    """The way to one provider's API. For one event loop; the adapter closes it."""

    def __init__(self, provider: str, url: str, limits: Limits, ca_file: Path | None = None) -> None:
        self.provider, self.limits = provider, limits
        self.circuit = Circuit(limits.circuit_failures, limits.circuit_seconds)
        self._url = url.rstrip("/")
        self._http = httpx.AsyncClient(
            verify=_context(ca_file) if urlsplit(url).scheme == "https" else False,
            timeout=httpx.Timeout(limits.timeout_seconds, connect=limits.connect_seconds),
            limits=httpx.Limits(
                max_connections=limits.connections, max_keepalive_connections=limits.connections, keepalive_expiry=20
            ),
            follow_redirects=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Let go of connections."""
        await self._http.aclose()

    async def send(
        self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None = None, again: bool
    ) -> Answer:
        """One call. ``path`` begins with a slash, or is a whole address of this API. Raises as the module says."""
        if not self.circuit.enter():
            raise errors.circuit_open(self.provider, self.circuit.wait)
        try:
            async with asyncio.timeout(self.limits.call_seconds):
                answer = await self._tried(method, self._address(path), headers, body, again)
        except TimeoutError:
            self.circuit.bad()
            raise errors.unreachable(self.provider, f"no answer within {self.limits.call_seconds:g} s") from None
        except Problem as problem:
            (self.circuit.bad if problem.code == "billing.provider_unreachable" else self.circuit.good)()
            raise
        except BaseException:
            self.circuit.gone()
            raise
        if answer.status in _TROUBLE:
            self.circuit.bad()
        else:
            self.circuit.good()
        if answer.status in _LATER:
            raise errors.busy(self.provider, answer.status)
        return answer

    def _address(self, path: str) -> str:
        if path.startswith("/"):
            return f"{self._url}{path}"
        if not path.startswith(f"{self._url}/"):  # a link that an answer names leads nowhere else, with our keys
            raise errors.unreadable(self.provider, "it names an address that is not its own")
        return path

    async def _tried(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, again: bool
    ) -> Answer:
        attempt = 0
        while True:
            more = again and attempt < self.limits.retries
            try:
                answer = await self._once(method, url, headers, body)
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as err:
                if not more:
                    raise errors.unreachable(self.provider, _why(err)) from None
                pause = self._pause(attempt, None)
            else:
                pause = self._pause(attempt, answer.headers.get("retry-after"))
                if not more or pause is None or not self._later(answer):
                    return answer
            attempt += 1
            await asyncio.sleep(pause or 0.0)

    def _later(self, answer: Answer) -> bool:
        # Stripe says itself whether another attempt makes sense (its idempotency layer repeats a stored 500 for ever).
        asked = answer.headers.get("stripe-should-retry")
        if asked in ("true", "false"):
            return asked == "true"
        return answer.status in _LATER

    def _pause(self, attempt: int, retry_after: str | None) -> float | None:
        """Seconds before the next attempt (full jitter); ``None`` when the provider asks for more than we wait for."""
        limits = self.limits
        bound = min(limits.retry_max_seconds, limits.retry_min_seconds * 2**attempt)
        drawn = random.uniform(bound / 10, bound)  # noqa: S311 - spreads load
        if retry_after is None or not retry_after.strip().isdigit():
            return drawn
        asked = float(retry_after.strip()[:9])
        return None if asked > limits.retry_max_seconds else max(asked, drawn)

    async def _once(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        request = self._http.build_request(method, url, content=body, headers=dict(headers))
        response = await self._http.send(request, stream=True)
        try:
            read = bytearray()
            async for chunk in response.aiter_bytes():
                read += chunk
                if len(read) > self.limits.answer_max_bytes:
                    raise errors.unreadable(
                        self.provider,
                        f"it has more than {self.limits.answer_max_bytes} bytes (billing_answer_max_bytes)",
                    )
        finally:
            await response.aclose()
        return Answer(response.status_code, response.headers, bytes(read))


def _why(err: BaseException) -> str:
    return str(err) or type(err).__name__


@functools.lru_cache(maxsize=4)
def _context(path: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as err:
        raise Problem("config.invalid", f"setting billing_ca_file: {err}", key="billing_ca_file") from None
