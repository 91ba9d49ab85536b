"""Sign-in: accounts, sessions, and who stands behind a credential.

A sign-in session is a family of refresh tokens, each good for one use. A token that comes back a second time means that
two parties hold it, so the whole family ends. There is no grace for concurrent uses: a thief could use it too.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import exc as sa_exc

from portico.control.access import UNVERIFIED_PERMISSIONS, Caller, in_standing, role_permissions
from portico.control.audit import service as audit
from portico.control.identity import account_store, operators, plans, store, support, throttle, tokens
from portico.control.identity import keys as key_rules
from portico.control.identity.accounts import Accounts
from portico.control.identity.browsers import Browsers
from portico.control.identity.device import DeviceFlow
from portico.control.identity.elsewhere import Elsewhere
from portico.control.identity.exports import Exports
from portico.control.identity.factors import Factors
from portico.control.identity.invitations import Invitations
from portico.control.identity.keys import Keys, NewKey
from portico.control.identity.letters import Letters
from portico.control.identity.members import Members
from portico.control.identity.org_standing import standing_of
from portico.control.identity.organizations import Organizations
from portico.control.identity.passkeys import Passkeys
from portico.control.identity.passwords import Passwords
from portico.control.identity.people import People
from portico.control.identity.plan_service import Plans
from portico.control.identity.proofs import Proofs
from portico.control.identity.quotas import Quotas
from portico.control.identity.roles import Roles
from portico.control.identity.second_step import SecondStep, SecondSteps
from portico.control.identity.sign_in import Client, SignedIn, SignIns
from portico.control.identity.signing_keys import SigningKeys
from portico.control.identity.step_up import StepUp
from portico.control.identity.support import Support
from portico.control.identity.throttle import Bucket
from portico.errors import Problem
from portico.kit import networks, pages
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx, is_unique_violation
from portico.kit.ids import check_token, digest, new_id
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

__all__ = ["Client", "Identity", "SecondStep", "SignedIn", "normal_email"]


@dataclass(slots=True)
class _LastUsed:
    """Key uses since they were last written: one statement a round of housekeeping instead of one a request."""

    at: dict[str, tuple[datetime, str | None]] = field(default_factory=dict)

    def take(self) -> list[tuple[str, datetime, str | None]]:
        taken, self.at = self.at, {}
        return [(key, *use) for key, use in taken.items()]


def normal_email(email: str) -> str:
    """The form in which addresses are compared and stored: look-alikes by compatibility (ｘ, ⅰ) are one address."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", email.strip()).lower())


class Identity:
    """Identity's verbs. One per process; wired in ``app.py``."""

    def __init__(
        self,
        settings: ApiSettings,
        db: Database,
        clock: Clock,
        sealer: Sealer,
        signing_keys: SigningKeys,
        passwords: Passwords,
    ) -> None:
        self.settings = settings
        self.db = db
        self.clock = clock
        self.signing_keys = signing_keys
        self.passwords = passwords
        self.quotas = Quotas(settings, clock)
        self.plans = Plans(self.quotas)
        self.keys = Keys(settings, clock, self.quotas)
        self.members = Members(settings, clock, self.keys)
        self.roles = Roles(self.quotas, clock, self.members)
        self.organizations = Organizations(settings, clock)
        self.exports = Exports(settings, clock)
        self.device = DeviceFlow(settings, db, clock, self.keys)
        self.browsers = Browsers(settings, db, clock)
        self.elsewhere = Elsewhere(db, clock)
        letters = Letters(settings, sealer, clock)
        self.people = People(settings, clock, self.keys, letters)
        self.support = Support(settings, clock, letters)
        self.sign_ins = SignIns(settings, clock, signing_keys, self.browsers)
        self.invitations = Invitations(settings, db, clock, passwords, self.sign_ins, self.quotas, self.members)
        self.factors = Factors(settings, db, clock, sealer, letters)
        self.passkeys = Passkeys(settings, db, clock, self.sign_ins, letters)
        proofs = Proofs(settings, db, clock, self.factors, self.passkeys, letters)
        self.second_steps = SecondSteps(settings, db, clock, self.sign_ins, self.passkeys, proofs)
        self.step_up = StepUp(settings, db, clock, passwords, self.passkeys, proofs)
        self.accounts = Accounts(settings, db, clock, passwords, self.keys, self.step_up, letters)
        self._last_used = _LastUsed()

    # --- accounts

    async def register(
        self, caller: Caller, email: str, password: str, organization: str, client: Client, *, cookie: bool = False
    ) -> SignedIn:
        """An account, its organization, and a first session.

        Raises ``auth.registration_closed``, ``auth.password_weak``, ``auth.email_taken``, ``auth.throttled``.
        """
        if not self.settings.registration_open:
            raise Problem("auth.registration_closed")
        email = normal_email(email)
        self.passwords.accept(password, email)
        window = self.settings.sign_in_failure_window_seconds
        address = Bucket(
            f"register {networks.network(caller.address)}", self.settings.registrations_per_address, window
        )
        await throttle.count(self.db, [address])
        hashed = await self.passwords.hash(password)
        try:
            async with self.db.transaction() as tx:
                user_id, _ = await self.create_account(tx, caller, email, hashed, organization)
                person = await self.sign_ins.hold(tx, user_id)
                assert person is not None  # made above
                await self.accounts.welcome(tx, caller, user_id, email, organization)
                return await self.sign_ins.open(tx, person, client, ("pwd",), cookie=cookie)
        except sa_exc.IntegrityError as err:
            if is_unique_violation(err, "users_email_key"):
                raise Problem("auth.email_taken") from None
            raise

    async def create_account(
        self, tx: Tx, caller: Caller, email: str, password_hash: str, organization: str, *, verified: bool = False
    ) -> tuple[str, str]:
        """Insert a person who owns a new organization; returns both ids. ``verified``: the address is known to be theirs."""
        user_id, organization_id = new_id("usr"), new_id("org")
        user: dict[str, Any] = {"id": user_id, "email": email, "password_hash": password_hash}
        user["email_verified_at"] = self.clock.wall() if verified else None
        plan = plans.starting(self.settings.default_plan)
        await store.insert_account(tx, user, {"id": organization_id, "name": organization, **plan}, "owner")
        facts = {"email": email}
        await audit.record(tx, caller, "user.register", user_id, details=facts, organization=organization_id)
        facts = {"name": organization, "owner": user_id}
        await audit.record(
            tx, caller, "organization.create", organization_id, details=facts, organization=organization_id
        )
        return user_id, organization_id

    async def login(
        self, caller: Caller, email: str, password: str, client: Client, *, cookie: bool = False
    ) -> SignedIn | SecondStep:
        """A session for the right password, or the second step where the person has set one up.

        Raises ``auth.credentials_invalid`` or ``auth.throttled``.

        An unknown address costs the same work and answers the same. ``cookie`` sessions live in a browser (`browsers`).
        """
        email = normal_email(email)
        async with self.db.read() as reader:
            row = await store.user_by_email(reader, email, caller.address)
        buckets = self._sign_in_buckets(email, caller.address, known=row is not None and row.known_address)
        await throttle.count(self.db, buckets)
        fits, better = await self.passwords.verify(password, row.password_hash if row else None)
        if row is None or not fits or row.disabled_at is not None:
            # The same write for a known and an unknown account; the address itself is not kept for unknown ones.
            await audit.refused(
                self.db,
                caller,
                "user.login",
                row.id if row else None,
                organization=row.organization_id if row else None,
            )
            raise Problem("auth.credentials_invalid")
        async with self.db.transaction() as tx:
            person = await self.sign_ins.hold(tx, row.id)
            # Looked at again under its lock: since the password was read it may have been replaced, its owner removed.
            if person is not None and person.password_hash == row.password_hash:
                await throttle.forgive(tx, buckets)
                if better:
                    await store.set_password_hash(tx, row.id, better)
                if (second := await self.second_steps.begin(tx, person)) is not None:
                    return second
                return await self.sign_ins.open(tx, person, client, ("pwd",), caller=caller, cookie=cookie)
        await audit.refused(self.db, caller, "user.login", row.id, organization=row.organization_id)
        raise Problem("auth.credentials_invalid")

    def _sign_in_buckets(self, email: str, address: str | None, *, known: bool) -> list[Bucket]:
        """``known``: the account signed in from there before. The limit per account, which anybody can fill, is then
        not asked, so that a person is not kept out by strangers; the other two hold."""
        s = self.settings
        window, network = s.sign_in_failure_window_seconds, networks.network(address)
        buckets = [
            Bucket(f"login {email} {network}", s.sign_in_failures_per_pair, window),
            Bucket(f"login from {network}", s.sign_in_failures_per_address, window),
        ]
        return buckets if known else [*buckets, Bucket(f"login {email}", s.sign_in_failures_per_account, window)]

    # --- sessions

    async def refresh(self, caller: Caller, token: str) -> SignedIn:
        """A new access and refresh token for one unused refresh token.

        Raises ``auth.token_invalid``, ``auth.token_expired``, ``auth.session_ended``; ``auth.refresh_reused`` ends the
        session with it.
        """
        if check_token(token) != "rt":
            raise Problem("auth.token_invalid", "this is not a refresh token")
        now = self.clock.wall()
        async with self.db.transaction() as tx:
            row = await store.lock_refresh_token(tx, digest(token))
            refusal = _refresh_refusal(row, now)
            if refusal is None:
                assert row is not None
                return await self._rotate(tx, row, digest(token), now)
            if refusal == "auth.refresh_reused" and row is not None:
                await account_store.drop_begun(tx, row.user_id)
                await store.end_sessions(tx, row.user_id, row.session_id, "refresh token reused", now)
                await audit.record(
                    tx,
                    caller,
                    "session.refresh",
                    row.session_id,
                    "refused",
                    {"reason": "reused", "user": row.user_id},
                    organization=row.organization_id,
                )
        raise Problem(refusal)

    async def _rotate(self, tx: Tx, row: Any, used: bytes, now: datetime) -> SignedIn:
        await store.use_refresh_token(tx, used, row.session_id, now)
        refresh = await self.sign_ins.refresh_token(tx, row.session_id, now, row.session_expires_at)
        access = await self.sign_ins.access_token(tx, row.user_id, row.session_id, row.organization_id, now)
        person, organization = await self._names(tx, row.user_id, row.organization_id)
        return SignedIn(
            row.user_id,
            person,
            row.organization_id,
            organization,
            row.session_id,
            access,
            refresh,
            self.settings.access_token_seconds,
        )

    async def _names(self, reader: Reader, user_id: str, organization_id: str | None) -> tuple[str, str | None]:
        person = await store.user(reader, user_id)
        assert person is not None  # foreign key
        organization = await store.organization(reader, organization_id) if organization_id is not None else None
        return person.email, organization.name if organization is not None else None

    async def switch(self, tx: Tx, caller: Caller, organization: str) -> dict[str, Any]:
        """An access token of the caller's session for another organization of the person's. Raises ``request.not_found``.

        The session's refresh token stays good, and goes on in that organization.
        """
        _person(caller)
        row = await self.organizations.switch(tx, caller, organization)
        now = self.clock.wall()
        token = await self.sign_ins.access_token(tx, caller.user_id or "", caller.session_id or "", organization, now)
        return {
            "organization": {"id": row.id, "name": row.name},
            "session": caller.session_id,
            "access_token": token,
            "expires_in": self.settings.access_token_seconds,
        }

    async def logout(self, tx: Tx, caller: Caller) -> None:
        """End the credential that was presented: a person's session, or the agent key of one machine."""
        if caller.kind == "person":
            await self.end_session(tx, caller, caller.session_id or "")
        elif caller.kind == "agent_key":
            await self.keys.revoke(tx, caller, caller.id)
        else:
            raise Problem("auth.forbidden", "revoke this key where it was made", permission="keys:write")

    async def sessions(self, reader: Reader, caller: Caller, page: pages.PageRequest) -> dict[str, Any]:
        """A page of the person's own live sessions."""
        before = page.after[0] if page.after else None
        rows = await store.sessions(reader, _person(caller), page.limit + 1, before, self.clock.wall())

        def render(row: Any) -> dict[str, Any]:
            names = (
                "id",
                "user_agent",
                "address",
                "created_at",
                "last_used_at",
                "expires_at",
                "authenticated_at",
                "methods",
            )
            return {**{name: getattr(row, name) for name in names}, "current": row.id == caller.session_id}

        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), render)
        return document

    async def end_session(self, tx: Tx, caller: Caller, session: str) -> None:
        """End one of the person's own sessions; another one than this with what it began. Raises ``request.not_found``."""
        if session != caller.session_id:
            await account_store.lock_user(tx, _person(caller))
            await account_store.drop_begun(tx, _person(caller))
        if not await store.end_sessions(tx, _person(caller), session, "ended by its person", self.clock.wall()):
            raise Problem("request.not_found", "there is no such session")
        await audit.record(tx, caller, "session.end", session)

    async def end_all_sessions(self, tx: Tx, caller: Caller, *, keep_current: bool = False) -> None:
        """End every session of the person, with what they began; this one too, unless ``keep_current``."""
        await account_store.lock_user(tx, _person(caller))
        await account_store.drop_begun(tx, _person(caller))
        kept = caller.session_id if keep_current else None
        ended = await account_store.end_other_sessions(
            tx, _person(caller), kept, "ended by its person", self.clock.wall()
        )
        await audit.record(tx, caller, "session.end_all", caller.user_id, details={"sessions": ended})

    async def device_key(self, caller: Caller, device_code: str) -> tuple[NewKey, dict[str, str], dict[str, str]]:
        """The agent key of an approved device, once, with its person and organization; else a ``device.…`` problem."""
        made, organization_id, user_id = await self.device.poll(caller, device_code)
        async with self.db.read() as reader:
            email, organization = await self._names(reader, user_id, organization_id)
        return made, {"id": user_id, "email": email}, {"id": organization_id, "name": organization or ""}

    # --- who is calling

    async def authenticate(self, reader: Reader, credential: str, address: str | None = None) -> Caller:
        """The caller behind a bearer credential (``access.Authenticator``); a revoked one is refused at once."""
        if credential.startswith("tnl_"):
            return await self._key_caller(reader, credential, address)
        keys = await self.signing_keys.key_set(reader)
        now = self.clock.wall()
        claims = tokens.verify(credential, keys, now.timestamp(), self.settings.token_leeway_seconds)
        row = await store.session_by_id(reader, claims.session, claims.organization)
        if row is not None and row["user_id"] != claims.user:
            raise Problem("auth.token_invalid")
        row = self._live(row, now)
        return self._person_of(row, now)

    async def browser(self, secret: str) -> Caller:
        """The person whose browser sends this cookie; raises ``auth.session_ended``. Puts the session's end off."""
        async with self.db.read() as reader:
            now = self.clock.wall()
            row = self._live(await self.browsers.session(reader, secret), now)
        await self.browsers.keep_alive(row)
        return self._person_of(row, now)

    @staticmethod
    def _live(row: Any | None, now: datetime) -> Any:
        """The row of a session, if it and its person stand; raises ``auth.session_ended``."""
        if row is None or row["ended_at"] is not None or row["disabled_at"] is not None or row["outside"]:
            raise Problem("auth.session_ended")
        if row["expires_at"] <= now:
            raise Problem("auth.session_ended", "the sign-in session has reached its end")
        return row

    def _person_of(self, row: Any, now: datetime) -> Caller:
        """The caller behind a live session."""
        unverified = self._must_verify(row)
        standing = standing_of(row)
        return Caller(
            "person",
            row["user_id"],
            row["organization_id"],
            in_standing(_held(row, unverified=unverified), standing),
            standing=standing,
            standing_reason=self._told(row),
            user_id=row["user_id"],
            session_id=row["id"],
            authenticated_at=row["authenticated_at"],
            methods=tuple(row["methods"]),
            unverified=unverified,
            second_factor=row["second_factor"],
            platform_operator=operators.holds(row["operator_grant"], row["operator_until"], now),
        )

    def _told(self, row: Any) -> str | None:
        """What people of a suspended organization are told: why, and whom to ask."""
        if (reason := row["suspended_reason"]) is None:
            return None
        contact = self.settings.operator_contact
        return f"the organization is suspended: {reason}" + (f"; ask {contact}" if contact else "")

    def _must_verify(self, row: Any) -> bool:
        return self.settings.require_verified_email and row["email_verified_at"] is None

    async def _key_caller(self, reader: Reader, text: str, address: str | None) -> Caller:
        kind = check_token(text)
        if kind == "sup":
            return await support.authenticate(reader, text, self.clock.wall())
        row = await store.key_by_digest(reader, digest(text)) if kind in ("agt", "sk", "opr") else None
        if row is None or key_rules.TOKEN_KIND[row["kind"]] != kind:
            raise Problem("auth.key_invalid")
        found = self.key_bearer(row, address)
        self.note_use(row["id"], address)
        return found

    def note_use(self, key_id: str, address: str | None) -> None:
        """A key was used now; written later."""
        self._last_used.at[key_id] = (self.clock.wall(), address)

    def key_bearer(self, row: Any, address: str | None) -> Caller:
        """The caller behind the row of a key, as ``store.key_by_digest`` has it; raises when it is none now or from there."""
        left = row["role"] is None and row["kind"] != "operator"  # its maker is no member any more
        if row["revoked_at"] is not None or row["disabled_at"] is not None or left:
            raise Problem("auth.key_revoked")
        now = self.clock.wall()
        if row["expires_at"] is not None and row["expires_at"] <= now:
            raise Problem("auth.key_invalid", "the key has expired")
        if row["allowed_cidrs"] and not networks.allows(row["allowed_cidrs"], address):
            self.elsewhere.note(row, address)
            raise Problem("auth.address_denied")
        operator = row["kind"] == "operator"
        allowed = key_rules.permissions(row["kind"], row["scopes"])
        unverified = not operator and self._must_verify(row)
        if not operator:  # a key may never do more than its maker may now
            allowed &= _held(row, unverified=unverified)
        standing = standing_of(row)
        return Caller(
            "operator" if operator else "agent_key" if row["kind"] == "agent" else "api_key",
            row["id"],
            row["organization_id"],
            in_standing(allowed, standing),
            standing=standing,
            standing_reason=self._told(row),
            user_id=row["user_id"],
            unverified=unverified,
            platform_operator=operator,
            expires_at=row["expires_at"],
            cidrs=tuple(row["allowed_cidrs"]),
        )

    async def whoami(self, reader: Reader, caller: Caller) -> dict[str, Any]:
        """What the bearer of a credential may know about itself."""
        person = await store.user(reader, caller.user_id) if caller.user_id else None
        organization = await store.organization(reader, caller.organization) if caller.organization else None
        key = await store.key(reader, caller.id) if caller.kind in ("agent_key", "api_key", "operator") else None
        return {
            "kind": caller.kind,
            "user": {"id": person.id, "email": person.email} if person else None,
            "organization": {"id": organization.id, "name": organization.name, "plan": organization.plan}
            if organization
            else None,
            "key": {"id": key.id, "name": key.name, "prefix": key.prefix} if key else None,
            "session": caller.session_id,
            "permissions": sorted(caller.permissions),
            "platform_operator": caller.platform_operator,
        }

    async def account(self, reader: Reader, caller: Caller) -> dict[str, Any]:
        """The caller's organization and person as agent sessions report them: ``{organization, user, plan}``."""
        organization = await store.organization(reader, caller.org)
        assert organization is not None  # foreign key
        person = await store.user(reader, caller.user_id) if caller.user_id else None
        return {
            "organization": {"id": organization.id, "name": organization.name},
            "user": person.email if person else None,
            "plan": organization.plan,
        }

    async def write_last_used(self) -> None:
        """Write when keys were last used. Called by housekeeping and at the end of the process."""
        if taken := self._last_used.take():
            async with self.db.transaction() as tx:
                await store.touch_keys(tx, taken)


def _person(caller: Caller) -> str:
    if caller.kind != "person" or caller.user_id is None:
        raise Problem("auth.forbidden", "sign-in sessions belong to people; a key has none", permission="session")
    return caller.user_id


def _held(row: Any, *, unverified: bool) -> frozenset[str]:
    held = role_permissions(row["role"], row["role_permissions"])
    return held & UNVERIFIED_PERMISSIONS if unverified else held


def _refresh_refusal(row: Any, now: datetime) -> str | None:
    """Why a refresh token is refused, as a code; ``None`` when it is good. Reuse is told from mere expiry first."""
    if row is None:
        return "auth.token_invalid"
    if row.ended_at is not None or row.disabled_at is not None:
        return "auth.session_ended"
    if row.used_at is not None:
        return "auth.refresh_reused"
    if row.expires_at <= now or row.session_expires_at <= now:
        return "auth.token_expired"
    return None
