"""Accounts: whether their address is verified, and how a password is set, forgotten and changed.

A link by mail proves that mail to the address reaches whoever opens it. It is a token with one use and a short life, of which we
keep a digest. An account whose address was never verified may be a stranger's who typed somebody else's address first: who opens
a link to it takes it over, and everything that let the stranger in ends. So a link alone verifies nothing: whoever follows it is
signed in to the account, or chooses its password anew.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import exc as sa_exc

from portico.control.access import Caller, check_step_up
from portico.control.audit import service as audit
from portico.control.identity import account_store, factor_store, invitation_store, standing, store, throttle
from portico.control.identity.keys import Keys
from portico.control.identity.letters import Letters
from portico.control.identity.passwords import Passwords
from portico.control.identity.step_up import StepUp
from portico.control.identity.throttle import Bucket
from portico.errors import Problem
from portico.kit import networks
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx, is_unique_violation
from portico.kit.ids import check_token, digest, new_token
from portico.settings import ApiSettings

# Token kinds by purpose.
_KIND: Final = {"verify": "ev", "reset": "pr", "change": "ec"}
_COMPANY: Final = "Others are members of its organizations: look at who they are."


class _Undo(Exception):
    """Ends a part of a transaction whose work is only there to take as long."""


class Accounts:
    """The verbs on one's own account that mail and passwords take part in."""

    def __init__(
        self,
        settings: ApiSettings,
        db: Database,
        clock: Clock,
        passwords: Passwords,
        keys: Keys,
        step_up: StepUp,
        letters: Letters,
    ) -> None:
        self._settings = settings
        self._db = db
        self._clock = clock
        self._passwords = passwords
        self._keys = keys
        self._step_up = step_up
        self._letters = letters

    # --- the address

    async def address(self, reader: Reader, caller: Caller) -> dict[str, Any]:
        """The person's ``{email, verified}``."""
        person = await account_store.user(reader, caller.user_id or "")
        assert person is not None  # who has a session
        return {"email": person.email, "verified": person.email_verified_at is not None}

    async def welcome(self, tx: Tx, caller: Caller, user_id: str, email: str, organization: str) -> None:
        """Mail the link that verifies the address of an account; ``organization`` by name, empty for none."""
        token = await self._token(tx, "verify", user_id, email)
        await self._letters.verify(tx, caller, email, organization, token)

    async def resend(self, caller: Caller) -> None:
        """Mail another. Raises ``auth.throttled``, ``auth.email_verified``."""
        user_id = caller.user_id or ""
        await throttle.count(self._db, [self._mails(f"verify mail {user_id}")])
        async with self._db.transaction() as tx:
            person = await account_store.lock_user(tx, user_id)
            assert person is not None  # who has a session
            if person.email_verified_at is not None:
                raise Problem("auth.email_verified")
            organization = await store.organization(tx, caller.organization) if caller.organization else None
            await self.welcome(tx, caller, user_id, person.email, organization.name if organization else "")
            await audit.record(tx, caller, "user.verify_mail", user_id)

    async def verify_email(self, caller: Caller, token: str, user_id: str | None, password: str | None = None) -> str:
        """Note that the address that got ``token`` is its account's; returns it.

        ``user_id``: whose session the link was followed in. Anybody else gives a new ``password`` and takes the account over, as
        by ``reset``. Raises ``auth.link_invalid``, ``auth.link_unproved`` (the link stays good), ``auth.password_weak``.
        """
        hashed = None if password is None else await self._hashed("verify", token, password)
        async with self._db.transaction() as tx:
            person = await self._use_own(tx, "verify", token)
            if person.id == user_id:
                if person.email_verified_at is None:
                    await self._verified(tx, caller, person)
            elif hashed is None:
                raise Problem("auth.link_unproved")  # rolls back: the link is not used up
            elif person.email_verified_at is not None:
                raise Problem("auth.link_invalid")  # nobody's to take over; a forgotten password has another link
            else:
                await self._set_anew(tx, caller, person, hashed)
        return str(person.email)

    async def follows_own(self, reader: Reader, token: str, user_id: str | None) -> bool:
        """Whether a link to verify an address, or to change it, is of the account of ``user_id``."""
        for purpose, kind in _KIND.items():
            if user_id is not None and check_token(token) == kind:
                row = await account_store.token(reader, digest(token), purpose, self._clock.wall())
                return row is not None and row.user_id == user_id
        return False

    async def _verified(self, tx: Tx, caller: Caller, person: Any) -> None:
        await account_store.update_user(tx, person.id, email_verified_at=self._clock.wall())
        home = await account_store.home(tx, person.id)
        await audit.record(tx, caller, "user.verify_email", person.id, organization=home)

    async def change_email(self, caller: Caller, email: str) -> None:
        """Mail a link to ``email``, which becomes the account's address when it is followed, and tell the old one.

        Whether another account has it shows to nobody but who reads that mail. Raises ``auth.throttled``, ``auth.session_ended``.
        """
        user_id = caller.user_id or ""
        # To one address so many from one network: who asks from elsewhere, for an address of theirs, is not kept from it.
        to = self._mails(f"change mail to {email} from {networks.network(caller.address)}")
        await throttle.count(self._db, [self._mails(f"change mail {user_id}"), to])
        async with self._db.transaction() as tx:
            person = await standing.hold_person(tx, caller)
            await account_store.drop_tokens(tx, user_id, "change")
            token = await self._token(tx, "change", user_id, email)
            await self._letters.change_address(tx, caller, email, person.email, token)
            # While the old address is still the way back.
            await self._letters.tell(tx, caller, person.email, "email_asked", detail=f"It is to be {email}.")
            await audit.record(tx, caller, "user.change_email_mail", user_id, details={"email": email})

    async def confirm_email(self, caller: Caller, token: str, user_id: str | None) -> str:
        """Make the address that got ``token`` the account's; returns it. The old address is told, its links are void.

        ``user_id``: whose session the link was followed in. Of another account, which somebody wants to have this address, the
        reader of the mail learns nothing, and does nothing for it. Raises ``auth.link_invalid``, ``auth.link_unproved``,
        ``auth.email_taken``.
        """
        now = self._clock.wall()
        try:
            async with self._db.transaction() as tx:
                row, person = await self._use(tx, "change", token)
                if person.id != user_id:
                    raise Problem("auth.link_unproved")  # rolls back: the link is not used up
                await account_store.update_user(tx, person.id, email=row.email, email_verified_at=now)
                await account_store.drop_tokens(tx, person.id, "verify", "reset", "sign_in")
                home = await account_store.home(tx, person.id)
                facts = {"email": row.email}  # erasable, as only members of this name are
                await audit.record(tx, caller, "user.change_email", person.id, details=facts, organization=home)
                await self._letters.tell(tx, caller, person.email, "email", detail=f"It is {row.email} now.")
        except sa_exc.IntegrityError as err:
            if is_unique_violation(err, "users_email_key"):
                raise Problem("auth.email_taken") from None
            raise
        return str(row.email)

    # --- the password

    async def forgot(self, caller: Caller, email: str) -> None:
        """Mail a link to set a new password, if there is such an account; nobody learns from here whether there is.

        For an unknown address the same is written, and undone. Raises ``auth.throttled`` by network alone: an address that got
        its few mails of the window gets no more, and the answer stays the same.
        """
        s = self._settings
        network = f"forgot {networks.network(caller.address)}"
        await throttle.count(self._db, [Bucket(network, s.resets_per_address, s.sign_in_failure_window_seconds)])
        try:
            await throttle.count(self._db, [self._mails(f"reset mail {email}")])
        except Problem:  # its owner has links that work already
            return
        async with self._db.transaction() as tx:
            row = await store.user_by_email(tx, email, caller.address)
            known = row is not None and row.disabled_at is None
            try:
                async with tx.savepoint():
                    token = await self._token(tx, "reset", row.id if row is not None and known else None, email)
                    verified = row is not None and row.email_verified_at is not None
                    await self._letters.reset(tx, caller, email, token, verified=verified)
                    if not known:
                        raise _Undo
            except _Undo:
                pass
            # Of an unknown address nothing is kept but that somebody asked.
            target, home = (row.id, row.organization_id) if row is not None and known else (None, None)
            await audit.record(tx, caller, "user.forgot_password", target, organization=home)

    async def reset(self, caller: Caller, token: str, password: str) -> str:
        """Set a new password by the link that was mailed; returns the address. Second steps stay.

        Every session, waiting device and other link of the account ends. An account whose address was not verified is taken
        over: its keys, second steps, passkeys and open invitations end, too.

        Raises ``auth.link_invalid``, ``auth.password_weak``.
        """
        hashed = await self._hashed("reset", token, password)
        async with self._db.transaction() as tx:
            person = await self._use_own(tx, "reset", token)
            await self._set_anew(tx, caller, person, hashed)
        return str(person.email)

    async def _hashed(self, purpose: str, token: str, password: str) -> str:
        """The digest of a password that is to be set by a link. Raises ``auth.link_invalid``, ``auth.password_weak``."""
        async with self._db.read() as reader:  # before argon2 runs for it
            if check_token(token) != _KIND[purpose]:
                raise Problem("auth.link_invalid")
            found = await account_store.token(reader, digest(token), purpose, self._clock.wall())
        if found is None:
            raise Problem("auth.link_invalid")
        self._passwords.accept(password, found.email)
        return await self._passwords.hash(password)

    async def _set_anew(self, tx: Tx, caller: Caller, person: Any, hashed: str) -> None:
        """Set the password of a held person who followed a link; one whose address was not verified takes the account over."""
        now, taken_over = self._clock.wall(), person.email_verified_at is None
        facts: dict[str, Any] = {"taken_over": taken_over}
        others = False
        if taken_over:  # first, since whoever ends keys and sessions of a person holds the keys first
            facts |= await self._take_over(tx, person.id, now)
            others = await account_store.has_company(tx, person.id)
            await account_store.update_user(tx, person.id, email_verified_at=now)
        facts["sessions"] = await self._set_password(tx, person.id, hashed, None, "the password was reset", now)
        home = await account_store.home(tx, person.id)
        await audit.record(tx, caller, "user.reset_password", person.id, details=facts, organization=home)
        what, detail = ("taken_over", _COMPANY if others else "") if taken_over else ("reset", "")
        await self._letters.tell(tx, caller, person.email, what, detail=detail)

    async def change_password(self, caller: Caller, current: str, password: str) -> None:
        """Set a new password, knowing the current one; every other session ends.

        Who has a second step must have taken it a short time ago. Raises ``auth.step_up_required``, ``auth.proof_invalid``,
        ``auth.password_weak``, ``auth.throttled``, ``auth.session_ended``.
        """
        user_id, now = caller.user_id or "", self._clock.wall()
        if caller.second_factor:  # the password alone is what a thief may have
            check_step_up(caller, now, self._settings.step_up_seconds)
        async with self._db.read() as reader:
            known = await account_store.user(reader, user_id)
        assert known is not None
        self._passwords.accept(password, known.email)
        await self._step_up.check_password(caller, current, "user.change_password")
        hashed = await self._passwords.hash(password)
        async with self._db.transaction() as tx:
            person = await standing.hold_person(tx, caller)
            if person.password_hash != known.password_hash:
                raise Problem("auth.session_ended")  # reset or changed in this moment
            reason = "the password was changed"
            ended = await self._set_password(tx, user_id, hashed, caller.session_id, reason, now)
            await audit.record(tx, caller, "user.change_password", user_id, details={"sessions": ended})
            await self._letters.tell(tx, caller, person.email, "password")

    async def _set_password(
        self, tx: Tx, user_id: str, hashed: str, kept: str | None, reason: str, now: datetime
    ) -> int:
        """Store the digest of a held person; end what the old password, and links to set one, let in."""
        await account_store.update_user(tx, user_id, password_hash=hashed)
        await account_store.drop_tokens(tx, user_id, "reset", "sign_in")
        await account_store.drop_begun(tx, user_id)
        return await account_store.end_other_sessions(tx, user_id, kept, reason, now)

    async def _take_over(self, tx: Tx, user_id: str, now: datetime) -> dict[str, int]:
        """End what whoever made an unverified account left in it to come back by. Members whom they let in stay: they may be
        a person's own, who never verified their address; the mail points at them."""
        await factor_store.drop_totp(tx, user_id)
        passkeys = await factor_store.drop_passkeys(tx, user_id)
        keys = await account_store.lock_keys(tx, user_id)
        await self._keys.end_all_of(tx, keys)
        invitations = await invitation_store.revoke_by(tx, user_id, now)
        return {"keys": len(keys), "passkeys": passkeys, "invitations": invitations}

    # --- links

    async def _token(self, tx: Tx, purpose: str, user_id: str | None, email: str) -> str:
        token, now = new_token(_KIND[purpose]), self._clock.wall()
        s = self._settings
        life = s.password_reset_seconds if purpose == "reset" else s.email_verification_seconds
        row = {"digest": digest(token), "purpose": purpose, "user_id": user_id, "email": email, "created_at": now}
        await account_store.insert_token(tx, {**row, "expires_at": now + timedelta(seconds=life)})
        return token

    async def _use(self, tx: Tx, purpose: str, token: str) -> tuple[Any, Any]:
        """Use a link up: its row, and the person, held. Raises ``auth.link_invalid``.

        The person is held first, so that of all links to one account one is used at a time.
        """
        now = self._clock.wall()
        row = (
            await account_store.token(tx, digest(token), purpose, now) if check_token(token) == _KIND[purpose] else None
        )
        person = await account_store.lock_user(tx, row.user_id) if row is not None else None
        if person is None or person.disabled_at is not None:
            raise Problem("auth.link_invalid")
        row = await account_store.use_token(tx, digest(token), purpose, now)
        if row is None:
            raise Problem("auth.link_invalid")
        return row, person

    async def _use_own(self, tx: Tx, purpose: str, token: str) -> Any:
        """As ``_use``, for a link that is void once the account has another address than it was sent to; the person."""
        row, person = await self._use(tx, purpose, token)
        if person.email != row.email:
            raise Problem("auth.link_invalid")
        return person

    def _mails(self, name: str) -> Bucket:
        return Bucket(name, self._settings.account_mails_per_window, self._settings.account_mail_window_seconds)
