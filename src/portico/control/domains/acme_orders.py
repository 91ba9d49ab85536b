"""One order of a certificate, as a chain of recorded steps that any worker can go on with.

    new ─► probing ─► ordering ─► authorizing ─► publishing ─► validating ─► ready ─► finalizing ─► downloading ─► issued
     │  relays have    the CA is   what is to      relays or      the CA       key,     the CA        the vault
     │  a test token   asked once  be proved       DNS have it    looks        sealed   issues        has it
     └────────────────────────────────► failed, canceled

Each step reads the row, calls out without a transaction, and records what came of it under its lease token: a worker that died is
followed by another at the same step. What may not happen twice is prepared for: before the certificate authority (CA) is asked
for an order, the row says so (``asked``), and who finds that looks for the order whose answer was lost before it asks again; the
private key is stored, sealed, before the CA signs it; all other calls are harmless when they are repeated.

A failure that another attempt may mend gives the job back (:class:`Retry`); any other ends the order, and the schedule of the
domain says when the next one may be made (``acme_schedule.py``).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography import x509

from portico.control import changes, fleet
from portico.control.domains import acme_budget, acme_dns01, acme_keys, acme_schedule, acme_store, lifecycle, service
from portico.control.domains import store as domain_store
from portico.control.domains.acme_accounts import Accounts
from portico.control.domains.acme_cas import DNS, HTTP, TLS_ALPN, Ca
from portico.control.domains.acme_client import Authorization, Client, Order, certificate_id
from portico.control.domains.acme_dns01 import Provider
from portico.control.domains.acme_errors import AcmeError
from portico.control.domains.acme_preflight import CAA_FORBIDS, UNREADY, Preflight
from portico.control.domains.dns import verdict
from portico.control.domains.lifecycle import NewEvent
from portico.control.domains.names import NameRules
from portico.control.domains.vault import CertificateRefused, Vault
from portico.kit.db import Database, Tx
from portico.kit.ids import new_id
from portico.kit.keyfiles import WorkerKeys
from portico.kit.queue import Retry, Work
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

#: States of a name for which certificates are had.
WANTED: Final = ("verified", "active")
#: Seconds between two looks whether relays have something.
_RELAY_LOOK: Final = 0.1
#: Of our own tokens; those of CAs have at least 128 bits of entropy.
_TOKEN_BYTES: Final = 24
BUDGET_SPENT: Final = "budget_spent"
_BAD_CERTIFICATE: Final = "bad_certificate"


@dataclass(frozen=True, slots=True)
class Parts:
    """What orders are worked on with; one per process."""

    settings: ApiSettings
    db: Database
    accounts: Accounts
    cas: Sequence[Ca]
    preflight: Preflight
    provider: Provider | None
    vault: Vault
    keys: WorkerKeys
    rules: NameRules


class _Failed(Exception):
    """The order is over. ``validated``: the CA looked at the name, and counts it."""

    def __init__(self, error: AcmeError, *, validated: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.validated = validated


async def run(parts: Parts, work: Work) -> None:
    """The handler of the queue: everything that is left of one order."""
    await _Run(parts, work).go()


class _Unwanted(Exception):
    """The name was lost, or wants no certificate any more, since the step began."""


class _Run:
    """One worker at one order."""

    def __init__(self, parts: Parts, work: Work) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._work = work
        self._row: Any = None
        self._domain: Any = None

    async def go(self) -> None:
        steps: Mapping[str, Callable[[], Awaitable[None]]] = {
            "new": self._prepare,
            "probing": self._probe,
            "ordering": self._order,
            "authorizing": self._authorize,
            "publishing": self._publish,
            "validating": self._validate,
            "ready": self._make_key,
            "finalizing": self._finalize,
            "downloading": self._download,
        }
        while await self._load():
            await self._heed()
            if self._work.finished:
                return
            try:
                await steps[self._row.state]()
            except AcmeError as err:
                await self._trouble(err)
            except _Failed as failed:
                await self._fail(failed.error, validated=failed.validated)
            except _Unwanted:
                continue  # what is loaded next says so

    async def _load(self) -> bool:
        """The row as it is now; false when nothing is left to do."""
        if self._work.finished:
            return False
        async with self._parts.db.read() as reader:
            self._row = await acme_store.order(reader, self._work.id)
            if self._row is None or self._row.state in acme_store.ENDS:
                return False
            self._domain = await service.find(reader, self._row.domain_id)
        if self._domain is None:
            return False
        if not _wants(self._domain):
            await self._cancel()
            return False
        return True

    async def _heed(self) -> None:
        """A CA that wants to be left alone is, by every order: it waits, or ends for one elsewhere when that takes long."""
        seconds = await self._left_alone()
        if seconds > 0 and not self._work.finished:
            raise Retry(seconds, f"{self._row.directory} wants to be left alone for {seconds:.0f} s")

    async def _left_alone(self) -> float:
        """Seconds for which the CA is to be left alone; the order is over when that is long, and another CA can be asked."""
        async with self._parts.db.read() as reader:
            pauses = await acme_store.pauses(reader)
        seconds = pauses.get(self._row.directory, 0.0)
        if seconds > 0 and self._elsewhere(pauses):
            why = f"{self._row.directory} wants to be left alone for {seconds:.0f} s, and another authority is asked"
            await self._fail(AcmeError(acme_schedule.PAUSED, why))
        return seconds

    def _elsewhere(self, pauses: Mapping[str, float]) -> bool:
        """Whether another CA is to be asked than that of this order, which is left alone for long."""
        row, cas = self._row, self._parts.cas
        if not cas:
            return False
        found = acme_schedule.place(self._settings, cas, row.ca, pauses, staging_first=row.staging)
        return found.directory != row.directory and pauses.get(row.directory, 0.0) > self._settings.acme_wait_seconds

    # -- before the CA is asked

    async def _prepare(self) -> None:
        """Choose how the name is proved; see that the CA may issue; let relays have a token of ours to be asked for."""
        kind = self._kind(await self._failures())
        await self._check_caa()
        if kind == DNS:
            if await self._txt_place() is None:
                detail = (
                    f"_acme-challenge.{self._row.name.removeprefix('*.')} does not lead to a zone that is written here"
                )
                raise _Failed(AcmeError("not_delegated", detail))
            await self._spend(kind)
            return
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        async with self._work.step() as tx:
            await self._answer(tx, kind, [(self._row.name, token, f"{token}.{secrets.token_urlsafe(_TOKEN_BYTES)}")])
            await acme_store.update(tx, self._row.id, state="probing", challenge=kind)

    async def _failures(self) -> int:
        async with self._parts.db.read() as reader:
            found = await acme_store.schedule(reader, self._row.domain_id)
        return found.failures if found is not None else 0

    def _kind(self, failures: int) -> str:
        """The way to prove the name: the first that is possible, the next one after each failure."""
        wildcard, active = self._row.name.startswith("*."), self._domain.hostname_status == "active"
        usable = {
            HTTP: active and not wildcard,
            TLS_ALPN: active and not wildcard,
            DNS: self._parts.provider is not None,
        }
        wanted = (DNS,) if wildcard else self._settings.acme_challenges
        possible = [kind for kind in wanted if usable[kind]]
        if DNS in possible and len(possible) > 1 and not self._delegated():
            possible.remove(DNS)
        if not possible:
            raise _Failed(AcmeError("no_challenge", "no way of acme_challenges can prove this name as things are"))
        return possible[failures % len(possible)]

    def _delegated(self) -> bool:
        """Whether the last look at the DNS found the alias that lets us answer DNS-01."""
        found = (self._domain.dns_findings or {}).get("delegation", {})
        return bool(found.get("state") == "ok")

    async def _check_caa(self) -> None:
        async with self._parts.accounts.anonymous(self._row.directory) as client:
            identities = (await client.directory()).caa
        wildcard = self._row.name.startswith("*.")
        if identities and not await self._parts.preflight.permits(self._row.name, identities, wildcard=wildcard):
            detail = f"the CAA records of {self._row.name} do not let {identities[0]} issue"
            raise _Failed(AcmeError(CAA_FORBIDS, detail))

    async def _probe(self) -> None:
        """Ask for our own token as a CA would, at every address of the name. One look that finds something wrong decides nothing:
        the name led here a moment ago, and what ails may be a resolver, or this machine."""
        await self._everywhere()
        (row,) = await self._told()
        for pause in (*self._settings.acme_reach_again_seconds, None):
            try:
                await self._parts.preflight.reached(row["type"], row["host"], row["token"], row["key_authorization"])
                break
            except AcmeError:
                if pause is None:
                    raise
            await asyncio.sleep(pause)
        await self._spend(self._row.challenge)

    async def _told(self) -> Sequence[Any]:
        async with self._parts.db.read() as reader:
            text = "SELECT type, host, token, key_authorization FROM acme_challenges WHERE order_id = $1"
            rows: Sequence[Any] = await reader.raw.fetch(text, self._row.id)
        return rows

    async def _spend(self, kind: str) -> None:
        """Take what the order costs from the budget, or end it until there is enough."""
        claims = [] if self._row.replaces else self._claims()
        try:
            async with self._work.step() as tx:
                await self._take(tx, claims)
                await self._silence(tx)
                await acme_store.update(tx, self._row.id, state="ordering", challenge=kind, asked=0)
        except acme_budget.Spent as spent:
            raise _Failed(AcmeError(BUDGET_SPENT, str(spent), retry_after=spent.seconds)) from None

    def _claims(self) -> list[acme_budget.Claim]:
        registrable = self._parts.rules.known(self._row.name).registrable
        return acme_budget.of_order(self._settings, [self._row.name], registrable, staging=self._row.staging)

    async def _take(self, tx: Tx, claims: Sequence[acme_budget.Claim]) -> None:
        failures = acme_budget.of_failure(self._settings, self._row.name, staging=self._row.staging)
        if (seconds := await acme_budget.wait(tx, self._row.directory, [failures])) > 0:
            raise acme_budget.Spent(failures, seconds)
        await acme_budget.take(tx, self._row.directory, claims)

    # -- the order

    async def _order(self) -> None:
        row = self._row
        async with self._client() as client:
            found: Order | None = None
            if row.asked:
                async with self._parts.db.read() as reader:
                    known = await acme_store.known_orders(reader, row.domain_id)
                listed = await self._parts.accounts.orders_url(row.directory)
                found = await client.lost_order(listed, [row.name], known)
            if found is None:
                found = await self._ask(client)
        async with self._work.step() as tx:
            await acme_store.update(tx, row.id, state="authorizing", order_url=found.url)
            await self._tell(tx, "renewal" if row.renewal else "issuance", "started" if row.renewal else "requested")

    async def _ask(self, client: Client) -> Order:
        """Ask for an order; that it is asked for is recorded first, and what asking again may cost is taken."""
        row = self._row
        try:
            async with self._work.step() as tx:
                if row.asked:
                    await acme_budget.take(tx, row.directory, [] if row.replaces else self._claims())
                await acme_store.update(tx, row.id, asked=row.asked + 1)
        except acme_budget.Spent as spent:
            raise _Failed(AcmeError(BUDGET_SPENT, str(spent), retry_after=spent.seconds)) from None
        profile = next((ca.profile for ca in self._parts.cas if ca.directory == row.directory), None)
        async with self._work.call():
            try:
                return await client.new_order([row.name], profile=profile, replaces=row.replaces)
            except AcmeError as err:
                if err.code != "already_replaced" or row.replaces is None:
                    raise
        # Somebody renewed it in between: an order like any other, at the price of one.
        try:
            async with self._work.step() as tx:
                await self._take(tx, self._claims())
                await acme_store.update(tx, row.id, replaces=None)
        except acme_budget.Spent as spent:
            raise _Failed(AcmeError(BUDGET_SPENT, str(spent), retry_after=spent.seconds)) from None
        async with self._work.call():
            return await client.new_order([row.name], profile=profile)

    async def _authorize(self) -> None:
        """See what is to be proved, and let relays have the answers."""
        async with self._client() as client:
            order = await client.order(self._row.order_url)
            self._check(order)
            if order.status != "pending":
                await self._next("ready")
                return
            proofs = []
            for url in order.authorizations:
                found = await client.authorization(url)
                if found.status == "valid":
                    continue
                proofs.append(await self._proof(client, found))
        async with self._work.step() as tx:
            if self._row.challenge != DNS:
                answers = [(proof["host"], proof["token"], proof["authorization"]) for proof in proofs]
                await self._answer(tx, self._row.challenge, answers)
            await acme_store.update(tx, self._row.id, state="publishing", proofs=proofs)

    async def _proof(self, client: Client, found: Authorization) -> dict[str, Any]:
        if found.status not in ("pending", "processing"):
            raise _Failed(
                found.failure or AcmeError("unauthorized", f"the authorization of {found.name} is {found.status}")
            )
        challenge = next((one for one in found.challenges if one.kind == self._row.challenge and one.token), None)
        if challenge is None:
            raise _Failed(AcmeError("no_challenge", f"the CA does not offer {self._row.challenge} for {found.name}"))
        authorization = client.key_authorization(challenge.token)
        proof = {
            "authorization_url": found.url, "challenge_url": challenge.url, "host": found.name, "token": challenge.token,
            "authorization": authorization,
        }  # fmt: skip
        if self._row.challenge == DNS:
            place = await self._txt_place()
            if place is None:
                raise _Failed(AcmeError("not_delegated", f"_acme-challenge.{found.name} does not lead here any more"))
            proof |= {"zone": place[0], "txt": place[1], "value": acme_dns01.value_of(authorization)}
        return proof

    async def _txt_place(self) -> tuple[str, str] | None:
        """Where the TXT record goes: where `_acme-challenge` of the name leads, if that is ours to write."""
        base = self._row.name.removeprefix("*.")
        answers = await self._parts.preflight.looks.ask(f"_acme-challenge.{base}", "TXT")
        chains = {answer.chain for answer in answers if answer.sure}
        if len(chains) != 1:  # resolvers that disagree: a change is on its way
            return None
        return acme_dns01.place(self._settings, self._domain, chains.pop())

    async def _publish(self) -> None:
        """Wait until whoever the CA may ask has the answers."""
        if self._row.challenge == DNS:
            await self._present()
        else:
            await self._everywhere()
        async with self._work.step() as tx:
            await acme_store.update(tx, self._row.id, state="validating")
            await self._tell(tx, "validation", "started")

    async def _present(self) -> None:
        provider = self._provider()
        for proof in self._row.proofs:
            async with self._work.call():
                await provider.present(proof["zone"], proof["txt"], proof["value"])
        until = time.monotonic() + self._settings.acme_dns_seen_seconds
        while not all([await self._seen(proof) for proof in self._row.proofs]):
            if time.monotonic() > until:
                raise AcmeError("dns_provider", f"resolvers do not see {self._row.proofs[0]['txt']} yet")
            await asyncio.sleep(self._settings.acme_poll_seconds)

    async def _seen(self, proof: Mapping[str, Any]) -> bool:
        answers = await self._parts.preflight.looks.ask(proof["txt"], "TXT")
        return verdict(answers, lambda answer: proof["value"] in answer.values) == "yes"

    def _provider(self) -> Provider:
        if self._parts.provider is None:
            raise _Failed(AcmeError("no_challenge", "nobody writes TXT records any more (acme_dns)"))
        return self._parts.provider

    async def _validate(self) -> None:
        """Tell the CA to look, and wait for what it finds."""
        async with self._client() as client:
            for proof in self._row.proofs:
                found = await client.authorization(proof["authorization_url"])
                waiting = any(one.url == proof["challenge_url"] and one.status == "pending" for one in found.challenges)
                if found.status == "pending" and waiting:
                    async with self._work.call():
                        await client.respond(proof["challenge_url"])
            for proof in self._row.proofs:
                await self._validated(client, proof["authorization_url"])
            await self._until(client, ("ready", "valid"))
        await self._cleanup()
        async with self._work.step() as tx:
            await self._silence(tx)
            await acme_store.update(tx, self._row.id, state="ready")
            await self._tell(tx, "validation", "succeeded")

    async def _validated(self, client: Client, url: str) -> None:
        until = time.monotonic() + self._settings.acme_patience_seconds
        while True:
            found = await client.authorization(url)
            if found.status == "valid":
                return
            if found.status not in ("pending", "processing"):
                error = found.failure or AcmeError(
                    "unauthorized", f"the authorization of {found.name} is {found.status}"
                )
                raise _Failed(error, validated=True)
            if time.monotonic() > until:
                raise Retry(self._settings.acme_poll_max_seconds, f"the CA has not looked at {found.name} yet")
            await asyncio.sleep(self._settings.acme_poll_seconds)

    async def _until(self, client: Client, wanted: Sequence[str]) -> Order:
        """The order when it has one of these states."""
        until = time.monotonic() + self._settings.acme_patience_seconds
        while True:
            order = await client.order(self._row.order_url)
            self._check(order)
            if order.status in wanted:
                return order
            if time.monotonic() > until:
                raise Retry(self._settings.acme_poll_max_seconds, f"the CA has the order as {order.status} still")
            pause = order.wait if order.wait is not None else self._settings.acme_poll_seconds
            await asyncio.sleep(min(max(0.05, pause), self._settings.acme_poll_max_seconds))

    def _check(self, order: Order) -> None:
        if order.status == "invalid":
            raise _Failed(
                order.error or AcmeError("unauthorized", "the CA has declared the order invalid"), validated=True
            )

    # -- the certificate

    async def _make_key(self) -> None:
        made = await asyncio.to_thread(acme_keys.make, self._parts.keys, self._row.id, [self._row.name])
        async with self._work.step() as tx:
            await acme_store.update(tx, self._row.id, state="finalizing", **made)

    async def _finalize(self) -> None:
        async with self._client() as client:
            order = await client.order(self._row.order_url)
            self._check(order)
            if order.status == "pending":
                await self._next("authorizing")
                return
            if order.status == "ready":
                async with self._work.call():
                    order = await client.finalize(order, self._row.csr)
            order = await self._until(client, ("valid",))
        if order.certificate is None:
            raise AcmeError("ca_unreadable", "a valid order without a certificate")
        await self._next("downloading", certificate_url=order.certificate)

    async def _download(self) -> None:
        row = self._row
        async with self._client() as client:
            chain = await client.certificate(row.certificate_url)
        try:
            leaf = x509.load_pem_x509_certificates(chain.encode())[0]
        except ValueError:
            raise AcmeError("ca_unreadable", "what the CA gave is no certificate") from None
        if row.staging:
            async with self._work.done() as tx:
                await acme_store.end(tx, row.id, "issued")
                await acme_schedule.rehearsed(tx, row)
            return
        try:
            async with self._work.done() as tx:
                await self._still_wanted(tx)
                key = acme_keys.take(self._parts.keys, row)
                version = await self._parts.vault.store(tx, row.domain_id, [row.name], chain.encode(), key)
                renews = await acme_schedule.issued(tx, self._settings, row, leaf)
                await acme_store.end(tx, row.id, "issued", revision=version.version)
                await self._tell(
                    tx, "renewal" if row.renewal else "issuance", "succeeded", revision=version.version, serial=version.serial,
                    fingerprint=version.fingerprint, issuer=version.issuer, not_before=version.not_before,
                    not_after=version.not_after, renews_at=renews, ari_id=_named(leaf),
                )  # fmt: skip
        except CertificateRefused as err:
            raise _Failed(AcmeError(_BAD_CERTIFICATE, str(err))) from None
        log.info("certificate issued", extra={"f": {"domain": row.domain_id, "name": row.name, "ca": row.directory}})

    async def _still_wanted(self, tx: Tx) -> None:
        """Hold the domain for as long as the transaction lasts. Somebody may have proved the name as theirs while the CA was
        asked: what was removed with the old hold must not come back."""
        found = await domain_store.find(tx, self._row.domain_id, lock=True)
        if found is None or not _wants(found):
            raise _Unwanted

    # -- common

    def _client(self) -> AbstractAsyncContextManager[Client]:
        return self._parts.accounts.client(self._row.directory)

    async def _next(self, state: str, **values: Any) -> None:
        async with self._work.step() as tx:
            await acme_store.update(tx, self._row.id, state=state, **values)

    async def _everywhere(self) -> None:
        """Until every healthy relay has applied the edge stream as it is now; there must be one."""
        until = time.monotonic() + self._settings.acme_relays_seconds
        async with self._parts.db.read() as reader:
            version = await changes.newest(reader)
        while True:
            async with self._parts.db.read() as reader:
                healthy = await fleet.healthy(reader, self._settings.relay_lease_seconds)
            behind = [relay.name for relay in healthy if relay.version < version]
            if healthy and not behind:
                return
            if time.monotonic() > until:
                why = f"{', '.join(behind[:5])} did not apply it" if healthy else "no relay is healthy"
                raise AcmeError("relays_behind", f"a challenge is not at every relay: {why}")
            await asyncio.sleep(_RELAY_LOOK)

    async def _answer(self, tx: Tx, kind: str, answers: Sequence[tuple[str, str, str]]) -> None:
        """Let relays answer challenges: host, token, authorization."""
        until = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=self._settings.acme_challenge_seconds)
        rows = [
            {
                "id": new_id("chl"), "order_id": self._row.id, "type": kind, "host": host, "token": token,
                "key_authorization": authorization, "until": until,
            }
            for host, token, authorization in answers
        ]  # fmt: skip
        await self._silence(tx)
        await acme_store.add_challenges(tx, rows)
        changes.append(tx, *(changes.challenge(acme_store.edge_row(row)) for row in rows))

    async def _silence(self, tx: Tx) -> None:
        """Relays answer nothing more for this order."""
        gone = await acme_store.take_challenges(tx, self._row.id)
        changes.append(tx, *(changes.challenge_removed(each) for each in gone))

    async def _cleanup(self) -> None:
        """Take TXT records away. One that stays is harmless: its token is used up."""
        if self._row.challenge != DNS or self._parts.provider is None:
            return
        for proof in self._row.proofs:
            if "zone" not in proof:
                continue
            try:
                async with self._work.call():
                    await self._parts.provider.cleanup(proof["zone"], proof["txt"], proof["value"])
            except AcmeError as err:
                log.warning("a TXT record stays", extra={"f": {"name": proof["txt"], "why": err.detail}})

    async def _trouble(self, err: AcmeError) -> None:
        """Give the order back, or end it."""
        row, wait = self._row, err.retry_after or 0.0
        # A limit (`rate_limited`) is one of this name as likely as of the account: it holds nobody else's order.
        if wait and err.status in (429, 503) and err.code != "rate_limited":
            async with self._work.step() as tx:
                await acme_store.pause(tx, row.directory, wait)
            await self._left_alone()
            if self._work.finished:
                return
        if err.code == "account_unknown":
            async with self._parts.db.transaction() as tx:
                await acme_store.forget_account(tx, row.directory)
        patient = err.transient or err.code in ("relays_behind", "account_unknown", "dns_provider")
        if (
            err.code == "rate_limited" and row.order_url is not None
        ):  # what is placed is worth waiting for, but not for long
            patient = not self._elsewhere({row.directory: wait})
        if not patient or self._work.attempt >= self._work.limits.max_attempts:
            await self._fail(err)
            return
        raise Retry(max(wait, self._work.limits.pause(self._work.attempt)), str(err)[:300])

    async def _fail(self, err: AcmeError, *, validated: bool = False) -> None:
        """The end of this order; when there is another one is the schedule's to say."""
        row = self._row
        await self._cleanup()
        async with self._work.done() as tx:
            await self._silence(tx)
            if validated:
                claim = acme_budget.of_failure(self._settings, row.name, staging=row.staging)
                await acme_budget.note(tx, row.directory, claim)
            retry_at = await acme_schedule.failed(tx, self._settings, self._parts.cas, row, err)
            await acme_store.end(tx, row.id, "failed", error_code=err.code, error_detail=err.detail)
            if err.code != acme_schedule.PAUSED:  # another CA is asked at once: nothing has happened to the domain
                kind, action = _as_event(row, err, validated=validated)
                await self._tell(tx, kind, action, error_code=err.code, error_detail=err.detail, retry_at=retry_at)
        facts = {"domain": row.domain_id, "name": row.name, "ca": row.directory, "code": err.code, "why": err.detail}
        log.warning("no certificate", extra={"f": facts})

    async def _cancel(self) -> None:
        """The name wants no certificate any more."""
        await self._cleanup()
        async with self._work.done() as tx:
            await self._silence(tx)
            await acme_store.end(tx, self._row.id, "canceled")
            await acme_schedule.rest(tx, self._row.domain_id)

    async def _tell(self, tx: Tx, kind: str, action: str, **facts: Any) -> None:
        """What happened, as an event of the domain's certificate. A rehearsal at a staging is none."""
        row = self._row
        if row.staging and action not in ("failed", "denied", "rate_limited"):
            return
        revision = facts.pop("revision", row.revision)
        provenance = {"acmeDirectory": row.directory} | ({"acmeOrderUrl": row.order_url} if row.order_url else {})
        event = NewEvent(
            row.domain_id, kind, action, revision=revision, object=row.id, key=f"{row.id}.{kind}.{action}",
            provenance=provenance, **facts,
        )  # fmt: skip
        await lifecycle.record(tx, event)


def _wants(domain: Any) -> bool:
    """Whether a certificate is had for the domain."""
    return domain.hostname_status in WANTED and domain.tls_mode == "terminate" and domain.frozen is None


def _as_event(row: Any, err: AcmeError, *, validated: bool) -> tuple[str, str]:
    """Which event a failure is."""
    if err.code in ("rate_limited", BUDGET_SPENT):
        return "issuance", "rate_limited"
    if validated or err.code in UNREADY:
        return "validation", "failed"
    if row.renewal:
        return "renewal", "failed"
    return "issuance", "denied" if err.code in ("rejected_identifier", "caa") else "failed"


def _named(leaf: x509.Certificate) -> str | None:
    try:
        return certificate_id(leaf)
    except AcmeError:
        return None
