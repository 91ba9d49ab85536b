"""Passkeys (WebAuthn level 3): registered, used to sign in without name or password, as a second step, and for step-up.

An authenticator signs a challenge of ours. Challenges are kept here, each for one purpose and one session, and are gone with
their first use, whatever comes of it. The authenticator must have verified its user (PIN, finger): a passkey is two factors.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import logging
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import webauthn
from sqlalchemy import exc as sa_exc
from webauthn.helpers import options_to_json_dict
from webauthn.helpers.structs import (
    AuthenticatorSelectionCriteria,
    PublicKeyCredentialDescriptor,
    ResidentKeyRequirement,
    UserVerificationRequirement,
)

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity import account_store, factor_store, standing, throttle
from portico.control.identity.letters import Letters
from portico.control.identity.sign_in import Client, SignedIn, SignIns
from portico.control.identity.throttle import Bucket
from portico.errors import Problem
from portico.kit import networks
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx, is_unique_violation
from portico.kit.ids import new_id
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

Purpose = Literal["register", "sign_in", "second_step", "step_up"]
_CHALLENGE_BYTES: Final = 32
_TRANSPORTS: Final = frozenset({"ble", "cable", "hybrid", "internal", "nfc", "smart-card", "usb"})


@dataclass(frozen=True, slots=True)
class Signed:
    """An answer of an authenticator to a challenge of ours that nobody answered before; its signature is unchecked."""

    credential: dict[str, Any]
    credential_id: bytes
    challenge: bytes


@dataclass(frozen=True, slots=True)
class Site:
    """Whom authenticators bind passkeys to: the domain, and the origins of pages that may ask."""

    rp_id: str
    origins: tuple[str, ...]


def site(settings: ApiSettings) -> Site:
    """By ``api_url``. A loopback address stands for ``localhost``, since passkeys belong to names; others have none.

    Raises ``passkey.unavailable``.
    """
    url = urlsplit(settings.api_url)
    host, port = url.hostname or "", f":{url.port}" if url.port is not None else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return Site(host, (f"{url.scheme}://{host}{port}",))
    if not address.is_loopback:
        raise Problem("passkey.unavailable", f"passkeys belong to a domain, and this installation is at {host}")
    return Site("localhost", (f"{url.scheme}://localhost{port}",))


class Passkeys:
    """The verbs on passkeys."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock, sign_ins: SignIns, letters: Letters) -> None:
        self._settings = settings
        self._db = db
        self._clock = clock
        self._sign_ins = sign_ins
        self._letters = letters

    # --- one's own

    async def listing(self, reader: Reader, caller: Caller) -> list[dict[str, Any]]:
        """The person's passkeys, oldest first."""
        return [_render(row) for row in await factor_store.passkeys_of(reader, caller.user_id or "")]

    async def registration(self, tx: Tx, caller: Caller) -> dict[str, Any]:
        """What a browser hands to ``navigator.credentials.create``.

        Raises ``passkey.unavailable``, ``passkey.limit_reached``.
        """
        user_id = caller.user_id or ""
        person = await standing.hold_person(tx, caller)
        found = await self._room(tx, user_id)
        made = webauthn.generate_registration_options(
            rp_id=site(self._settings).rp_id,
            rp_name=self._settings.service_name,
            user_name=person.email,
            user_display_name=person.email,
            user_id=user_id.encode(),
            challenge=await self._challenge(tx, "register", caller.session_id, user_id),
            timeout=self._settings.passkey_challenge_seconds * 1000,
            authenticator_selection=AuthenticatorSelectionCriteria(
                resident_key=ResidentKeyRequirement.REQUIRED, user_verification=UserVerificationRequirement.REQUIRED
            ),
            exclude_credentials=[PublicKeyCredentialDescriptor(id=row.credential_id) for row in found],
        )
        return options_to_json_dict(made)

    async def register(self, caller: Caller, credential: dict[str, Any], name: str) -> dict[str, Any]:
        """Keep the passkey that a browser made for :meth:`registration`.

        Raises ``passkey.rejected``, ``passkey.exists``, ``passkey.limit_reached``, ``passkey.unavailable``.
        """
        at = site(self._settings)
        user_id, signed = caller.user_id or "", await self.take(credential, "register", caller.session_id)
        try:
            if signed is None:
                raise ValueError("the challenge is unknown, used or expired")
            verified = webauthn.verify_registration_response(
                credential=signed.credential,
                expected_challenge=signed.challenge,
                expected_rp_id=at.rp_id,
                expected_origin=list(at.origins),
                require_user_verification=True,
            )
        except Exception as err:  # what the library raises for bytes of anybody's making is not one kind
            log.info("passkey rejected", extra={"f": {"why": f"{type(err).__name__}: {err}"[:200]}})
            await audit.refused(self._db, caller, "passkey.create", user_id)
            raise Problem("passkey.rejected") from None
        now = self._clock.wall()
        row: dict[str, Any] = {
            "id": new_id("psk"),
            "user_id": user_id,
            "name": name,
            "credential_id": verified.credential_id,
            "public_key": verified.credential_public_key,
            "sign_count": verified.sign_count,
            "transports": _transports(signed.credential),
            "aaguid": verified.aaguid,
            "backed_up": verified.credential_backed_up,
            "created_at": now,
        }
        try:
            async with self._db.transaction() as tx:
                person = await standing.hold_person(tx, caller)
                await self._room(tx, user_id)
                await factor_store.insert_passkey(tx, row)
                await audit.record(tx, caller, "passkey.create", row["id"], details={"name": name})
                await self._letters.tell(tx, caller, person.email, "passkey_on", detail=name)
        except sa_exc.IntegrityError as err:
            if is_unique_violation(err, "passkeys_credential_id_key"):
                raise Problem("passkey.exists") from None
            raise
        return {**{key: row[key] for key in ("id", "name", "backed_up", "created_at")}, "last_used_at": None}

    async def rename(self, tx: Tx, caller: Caller, passkey: str, name: str) -> dict[str, Any]:
        """Call one of one's passkeys something else. Raises ``request.not_found``."""
        row = await self._own(tx, caller, passkey)
        await factor_store.update_passkey(tx, row.id, name=name)
        await audit.record(tx, caller, "passkey.update", row.id, details={"name": name, "before": row.name})
        return {**_render(row), "name": name}

    async def remove(self, tx: Tx, caller: Caller, passkey: str) -> None:
        """Forget one of one's passkeys. Raises ``request.not_found``, ``passkey.last_way_in``."""
        user_id = caller.user_id or ""
        person = await standing.hold_person(tx, caller)
        row = await self._own(tx, caller, passkey)
        if person.password_hash is None and len(await factor_store.passkeys_of(tx, user_id)) == 1:
            raise Problem("passkey.last_way_in")
        await factor_store.drop_passkeys(tx, user_id, row.id)
        await audit.record(tx, caller, "passkey.delete", row.id, details={"name": row.name})
        await self._letters.tell(tx, caller, person.email, "passkey_off", detail=row.name)

    async def _own(self, tx: Tx, caller: Caller, passkey: str) -> Any:
        row = await factor_store.lock_passkey(tx, caller.user_id or "", passkey)
        if row is None:
            raise Problem("request.not_found", "there is no such passkey")
        return row

    async def _room(self, tx: Tx, user_id: str) -> Any:
        """The passkeys of a person who is held; raises ``passkey.limit_reached``."""
        found = await factor_store.passkeys_of(tx, user_id)
        if len(found) >= (limit := self._settings.passkeys_per_person):
            raise Problem("passkey.limit_reached", f"a person has at most {limit} passkeys", limit=limit)
        return found

    # --- signing in

    async def sign_in_options(self, caller: Caller) -> dict[str, Any]:
        """What a browser hands to ``navigator.credentials.get`` to sign in without a name.

        Raises ``auth.throttled``, ``passkey.unavailable``.
        """
        await throttle.count(self._db, [self._bucket("passkey options", caller)])
        async with self._db.transaction() as tx:
            return await self.options(tx, "sign_in", None, None)

    async def sign_in(
        self, caller: Caller, credential: dict[str, Any], client: Client, *, cookie: bool = False
    ) -> SignedIn:
        """The session of whoever the passkey belongs to. Raises ``auth.passkey_invalid``, ``auth.throttled``."""
        buckets = [self._bucket("passkey", caller)]
        await throttle.count(self._db, buckets)
        signed = await self.take(credential, "sign_in", None)
        row = None
        if signed is not None:
            async with self._db.read() as reader:
                row = await factor_store.passkey_by_credential(reader, signed.credential_id)
        if signed is not None and row is not None:
            async with self._db.transaction() as tx:
                person = await self._sign_ins.hold(tx, row.user_id)
                if person is not None and await self.fits(tx, person.id, signed):
                    await throttle.forgive(tx, buckets)
                    return await self._sign_ins.open(tx, person, client, ("passkey",), caller=caller, cookie=cookie)
        async with self._db.read() as reader:
            home = await account_store.home(reader, row.user_id) if row is not None else None
        details, target = {"reason": "passkey"}, row.user_id if row is not None else None
        await audit.refused(self._db, caller, "user.login", target, details, organization=home)
        raise Problem("auth.passkey_invalid")

    def _bucket(self, what: str, caller: Caller) -> Bucket:
        s = self._settings
        name = f"{what} from {networks.network(caller.address)}"
        return Bucket(name, s.sign_in_failures_per_address, s.sign_in_failure_window_seconds)

    # --- what others build on

    async def options(self, tx: Tx, purpose: Purpose, bound_to: str | None, user_id: str | None) -> dict[str, Any]:
        """What a browser hands to ``navigator.credentials.get``; for a known person, with the ids of their passkeys."""
        own = await factor_store.passkeys_of(tx, user_id) if user_id is not None else []
        made = webauthn.generate_authentication_options(
            rp_id=site(self._settings).rp_id,
            challenge=await self._challenge(tx, purpose, bound_to, user_id),
            timeout=self._settings.passkey_challenge_seconds * 1000,
            allow_credentials=[PublicKeyCredentialDescriptor(id=row.credential_id) for row in own],
            user_verification=UserVerificationRequirement.REQUIRED,
        )
        return options_to_json_dict(made)

    async def _challenge(self, tx: Tx, purpose: Purpose, bound_to: str | None, user_id: str | None) -> bytes:
        challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        expires = self._clock.wall() + timedelta(seconds=self._settings.passkey_challenge_seconds)
        row = {"challenge": challenge, "purpose": purpose, "bound_to": bound_to, "user_id": user_id}
        await factor_store.insert_challenge(tx, {**row, "expires_at": expires})
        return challenge

    async def take(self, credential: dict[str, Any], purpose: Purpose, bound_to: str | None) -> Signed | None:
        """Use up the challenge that ``credential`` answers; ``None`` when it is none of ours, used, or another's.

        In a transaction of its own: an answer that turns out wrong has used it up, too.
        """
        try:
            client_data = json.loads(_bytes(credential["response"]["clientDataJSON"]))
            challenge, credential_id = _bytes(client_data["challenge"]), _bytes(credential["rawId"])
        except (KeyError, TypeError, ValueError, RecursionError):
            return None
        async with self._db.transaction() as tx:
            row = await factor_store.take_challenge(tx, challenge, purpose, bound_to, self._clock.wall())
        return Signed(credential, credential_id, challenge) if row is not None else None

    async def fits(self, tx: Tx, user_id: str, signed: Signed) -> bool:
        """Whether a passkey of this person signed. Notes its use, and its counter, which must have gone up."""
        row = await factor_store.passkey_by_credential(tx, signed.credential_id)
        row = await factor_store.lock_passkey(tx, user_id, row.id) if row is not None else None
        if row is None or not _is_handle_of(signed.credential, user_id):
            return False
        at = site(self._settings)
        try:
            verified = webauthn.verify_authentication_response(
                credential=signed.credential,
                expected_challenge=signed.challenge,
                expected_rp_id=at.rp_id,
                expected_origin=list(at.origins),
                credential_public_key=row.public_key,
                credential_current_sign_count=row.sign_count,
                require_user_verification=True,
            )
        except Exception as err:  # see register
            log.info("passkey refused", extra={"f": {"passkey": row.id, "why": f"{type(err).__name__}: {err}"[:200]}})
            return False
        changed = {"sign_count": verified.new_sign_count, "backed_up": verified.credential_backed_up}
        await factor_store.update_passkey(tx, row.id, **changed, last_used_at=self._clock.wall())
        return True


def _bytes(text: Any) -> bytes:
    """Of base64url without padding, and of nothing else. Raises ``ValueError`` and ``TypeError``."""
    if not isinstance(text, str) or len(text) > 8192:
        raise TypeError("not base64url")
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _is_handle_of(credential: dict[str, Any], user_id: str) -> bool:
    """Whether the user handle, where the authenticator gives one, is this person's (WebAuthn, 7.2 step 6)."""
    handle = credential["response"].get("userHandle")
    try:
        return handle is None or _bytes(handle) == user_id.encode()
    except (TypeError, ValueError):
        return False


def _transports(credential: dict[str, Any]) -> list[str]:
    found = credential["response"].get("transports")
    return sorted({t for t in found if isinstance(t, str)} & _TRANSPORTS) if isinstance(found, list) else []


def _render(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("id", "name", "backed_up", "created_at", "last_used_at")}
