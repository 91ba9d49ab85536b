"""Invitations: a mail to one address with a token, good once and for some days, that makes whoever accepts it a member.

Nobody becomes a member without accepting. An invitation is bound to the address it was sent to: a signed-in person accepts it
when that is the address of their account, and a new person registers with it; the token in the mail proves that the address
is theirs. Whoever invited must, when it is accepted, still be able to: a member who was removed, disabled or given a
lesser role leaves no door behind. Inviting says nothing about whether the address has an account.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from sqlalchemy import exc as sa_exc

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity import account_store, invitation_store, roster, standing, store, throttle
from portico.control.identity.members import Members, not_above
from portico.control.identity.org_standing import check_standing
from portico.control.identity.org_standing import standing as stands
from portico.control.identity.passwords import Passwords
from portico.control.identity.quotas import Quotas
from portico.control.identity.sign_in import Client, SignedIn, SignIns
from portico.control.identity.throttle import Bucket
from portico.control.notifications import mail
from portico.control.notifications.mail import Mail
from portico.errors import Problem
from portico.kit import networks, pages
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx, is_unique_violation
from portico.kit.ids import check_token, digest, new_id, new_token
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

_DAY: Final = 86_400
_HOUR: Final = 3600


class Invitations:
    """The verbs on invitations."""

    def __init__(
        self,
        settings: ApiSettings,
        db: Database,
        clock: Clock,
        passwords: Passwords,
        sign_ins: SignIns,
        quotas: Quotas,
        members: Members,
    ) -> None:
        self._members = members
        self._settings = settings
        self._db = db
        self._clock = clock
        self._passwords = passwords
        self._sign_ins = sign_ins
        self._quotas = quotas
        self._sealer = Sealer(settings.master_key)

    # -- of the organization

    async def listing(self, reader: Reader, caller: Caller, page: pages.PageRequest) -> dict[str, Any]:
        """A page of the invitations that nobody accepted or revoked yet, newest first."""
        before = page.after[0] if page.after else None
        rows = await invitation_store.listing(reader, caller.org, page.limit + 1, before)
        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), self._render)
        return document

    async def create(self, tx: Tx, caller: Caller, email: str, role_id: str) -> dict[str, Any]:
        """Invite an address. Raises ``auth.forbidden``, ``request.not_found``, ``request.invalid``, ``invitation.member``,
        ``invitation.exists``, ``invitation.limit_reached``, ``quota.exceeded``, ``auth.throttled``, and
        ``auth.step_up_required`` for a role with power over others."""
        held = await standing.hold(tx, caller, ("members:write",))
        role = await self._role(tx, caller, role_id)
        not_above(held, role.permissions)
        self._members.check_giving(caller, role.permissions)
        try:
            mail.address(email)
        except ValueError:
            raise Problem("invitation.address_invalid") from None
        if await roster.has_address(tx, caller.org, email):
            raise Problem("invitation.member")
        now, limit = self._clock.wall(), self._settings.max_open_invitations_per_organization
        if await invitation_store.count_open(tx, caller.org, now) >= limit:
            detail = f"an organization has at most {limit} invitations open"
            raise Problem("invitation.limit_reached", detail, limit=limit)
        await self._quotas.claim(tx, caller.org, "members")
        await invitation_store.revoke_expired(tx, caller.org, email, now)
        invitation, token = new_id("inv"), new_token("inv")
        row = {
            "id": invitation,
            "organization_id": caller.org,
            "email": email,
            "role": role.id,
            "invited_by": caller.user_id,
            "digest": digest(token),
            "created_at": now,
            "sent_at": now,
            "expires_at": now + self._life,
        }
        if not await invitation_store.add(tx, row):
            raise Problem("invitation.exists")
        return await self._send(tx, caller, invitation, token, 1, "invitation.create")

    async def resend(self, tx: Tx, caller: Caller, invitation: str) -> dict[str, Any]:
        """Mail it again with another token; the one before is void, the days begin anew, and the caller vouches for it now.

        Raises as ``create`` does.
        """
        held = await standing.hold(tx, caller, ("members:write",))
        row = await self._one(tx, caller, invitation)
        permissions = (await self._role(tx, caller, row.role)).permissions
        not_above(held, permissions)
        self._members.check_giving(caller, permissions)
        now, token = self._clock.wall(), new_token("inv")
        sends = await invitation_store.sent_again(
            tx, row.id, digest(token), caller.user_id or "", now, now + self._life
        )
        return await self._send(tx, caller, invitation, token, sends, "invitation.resend")

    async def revoke(self, tx: Tx, caller: Caller, invitation: str) -> None:
        """Take it back: its token is void. Raises ``request.not_found``, ``auth.forbidden``."""
        held = await standing.hold(tx, caller, ("members:write",))
        row = await self._one(tx, caller, invitation)
        role = await roster.role(tx, caller.org, row.role)
        not_above(held, role.permissions if role is not None else frozenset())
        await invitation_store.revoke(tx, caller.org, row.id, self._clock.wall())
        await audit.record(tx, caller, "invitation.revoke", row.id, details={"email": row.email})

    @property
    def _life(self) -> timedelta:
        return timedelta(days=self._settings.invitation_days)

    async def _send(self, tx: Tx, caller: Caller, invitation: str, token: str, sends: int, act: str) -> dict[str, Any]:
        row, organization = await self._one(tx, caller, invitation), await store.organization(tx, caller.org)
        assert organization is not None  # held
        s = self._settings
        buckets = [
            Bucket(f"invitations of {caller.org}", s.invitations_per_organization, _HOUR),
            Bucket(f"invitations of {caller.org} to {row.email}", s.invitation_mails_per_address, _DAY),
            Bucket(f"invitations to {row.email}", 4 * s.invitation_mails_per_address, _DAY),
        ]
        await throttle.count_within(tx, buckets)
        shown = self._render(row)
        facts = {
            "organization": organization.name,
            "role": shown["role_name"],
            "inviter": row.inviter,
            "link": f"{s.api_url.rstrip('/')}/invitation?token={token}",
            "until": f"{row.expires_at:%Y-%m-%d %H:%M} UTC",
        }
        key = f"invitation:{invitation}:{sends}"
        await mail.send(
            tx, self._sealer, Mail(key, row.email, "organization.invitation", facts, organization=caller.org)
        )
        await audit.record(tx, caller, act, invitation, details={"email": row.email, "role": shown["role_name"]})
        return shown

    async def _role(self, tx: Tx, caller: Caller, role_id: str) -> roster.HeldRole:
        role = await roster.role(tx, caller.org, role_id)
        if role is None:
            raise Problem("request.not_found", "there is no such role")
        return role

    @staticmethod
    async def _one(reader: Reader, caller: Caller, invitation: str) -> Any:
        row = await invitation_store.one(reader, caller.org, invitation)
        if row is None:
            raise Problem("request.not_found", "there is no such invitation")
        return row

    def _render(self, row: Any) -> dict[str, Any]:
        return {
            "id": row.id,
            "email": row.email,
            "role": row.role,
            "role_name": row.role_name or row.role,
            "invited_by": {"id": row.invited_by, "email": row.inviter},
            "created_at": row.created_at,
            "sent_at": row.sent_at,
            "expires_at": row.expires_at,
            "expired": row.expires_at <= self._clock.wall(),
        }

    # -- of the invited

    async def look(self, caller: Caller, token: str) -> dict[str, Any]:
        """What an invitation offers, to whoever has its token. Raises ``invitation.invalid``, ``auth.throttled``."""
        await self._count(caller)
        async with self._db.read() as reader:
            row = await self._standing(reader, token)
        return {
            "organization": {"id": row.organization_id, "name": row.organization_name},
            "email": row.email,
            "role_name": row.role_name or row.role,
            "invited_by": row.inviter,
            "expires_at": row.expires_at,
        }

    async def accept(self, tx: Tx, caller: Caller, token: str) -> dict[str, Any]:
        """Make the signed-in person a member; the organization. Raises ``invitation.invalid``, ``invitation.other_address``,
        ``invitation.member``, ``quota.exceeded``, and as ``check_standing``."""
        row = await self._hold(tx, token)
        person = await standing.hold_person(tx, caller)
        if person.email != row.email:
            raise Problem("invitation.other_address")
        if person.email_verified_at is None:  # the mail reached them
            await account_store.update_user(tx, person.id, email_verified_at=self._clock.wall())
        await self._join(tx, caller, row, token, person.id)
        return {"id": row.organization_id, "name": row.organization_name}

    async def register(
        self, caller: Caller, token: str, password: str, client: Client, *, cookie: bool = False
    ) -> SignedIn:
        """An account for the invited address, which is a member of the organization and owns none; and a first session.

        Raises ``invitation.invalid``, ``auth.password_weak``, ``auth.throttled``, ``auth.email_taken`` (sign in, then accept).
        """
        await self._count(caller)
        async with self._db.read() as reader:  # before argon2 runs for it
            email = (await self._standing(reader, token)).email
        self._passwords.accept(password, email)
        hashed = await self._passwords.hash(password)
        try:
            async with self._db.transaction() as tx:
                row = await self._hold(tx, token)
                now = self._clock.wall()
                user = {"id": new_id("usr"), "email": email, "password_hash": hashed, "email_verified_at": now}
                await store.insert_user(tx, user)
                facts = {"email": email}
                organization = row.organization_id
                await audit.record(tx, caller, "user.register", user["id"], details=facts, organization=organization)
                await self._join(tx, caller, row, token, user["id"])
                person = await self._sign_ins.hold(tx, user["id"])
                assert person is not None  # made just now
                return await self._sign_ins.open(tx, person, client, ("pwd",), cookie=cookie)
        except sa_exc.IntegrityError as err:
            if is_unique_violation(err, "users_email_key"):
                raise Problem("auth.email_taken", hint="Sign in to that account, and accept there.") from None
            raise

    async def _count(self, caller: Caller) -> None:
        s = self._settings
        name = f"invitation from {networks.network(caller.address)}"
        await throttle.count(self._db, [Bucket(name, s.registrations_per_address, s.sign_in_failure_window_seconds)])

    async def _standing(self, reader: Reader, token: str) -> Any:
        """The open invitation of a token, if it may still be accepted; raises ``invitation.invalid``."""
        row = await invitation_store.by_digest(reader, digest(token)) if check_token(token) == "inv" else None
        if row is None or row.accepted_at is not None or row.revoked_at is not None:
            raise Problem("invitation.invalid")
        if row.expires_at <= self._clock.wall():
            raise Problem("invitation.invalid", "the invitation has expired")
        role = await roster.role(reader, row.organization_id, row.role)
        inviter = await roster.member(reader, row.organization_id, row.invited_by)
        may = roster.role_in(inviter).permissions if inviter is not None else frozenset()
        able = inviter is not None and inviter.disabled_at is None and "members:write" in may
        if role is None or not able or role.permissions - may:
            raise Problem("invitation.invalid", "whoever invited you could not do so any more")
        return row

    async def _hold(self, tx: Tx, token: str) -> Any:
        """The same, with its organization held and standing well: nothing of this changes before the transaction ends."""
        organization = (await self._standing(tx, token)).organization_id
        await store.lock_organization(tx, organization)
        check_standing(await stands(tx, organization))
        return await self._standing(tx, token)

    async def _join(self, tx: Tx, caller: Caller, row: Any, token: str, user_id: str) -> None:
        now, organization = self._clock.wall(), row.organization_id
        # Open, it has a place among them already, if the plan still has one.
        await self._quotas.claim(tx, organization, "members", 0)
        if row.role == "owner":
            await self._members.room_to_own(tx, user_id)
        if not await roster.add(tx, organization, user_id, row.role):
            raise Problem("invitation.member")
        if not await invitation_store.accept(tx, row.id, digest(token), user_id, now):
            raise Problem("invitation.invalid")
        facts = {"user": user_id, "role": row.role_name or row.role, "invited_by": row.invited_by}
        await audit.record(tx, caller, "invitation.accept", row.id, details=facts, organization=organization)
