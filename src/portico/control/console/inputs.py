"""What people type into forms, held to the same rules as the API; a field that does not fit is named with its problem."""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from portico.control.identity.api import MailAddress, Name
from portico.errors import Problem

_EMAIL: Final[TypeAdapter[str]] = TypeAdapter(MailAddress)
_NAME: Final[TypeAdapter[str]] = TypeAdapter(Name)


def _invalid(field: str, what: str, hint: str) -> Problem:
    return Problem("request.invalid", what, hint=hint, field=field)


def email(fields: dict[str, str]) -> str:
    """The e-mail address; raises ``request.invalid``."""
    try:
        return _EMAIL.validate_python(fields.get("email", ""))
    except ValidationError:
        raise _invalid("email", "This is not an e-mail address", "It looks like ann@example.com.") from None


def name(fields: dict[str, str], field: str) -> str:
    """A name of up to 100 characters; raises ``request.invalid``."""
    try:
        return _NAME.validate_python(fields.get(field, ""))
    except ValidationError:
        raise _invalid(field, "This cannot be a name", "Use 1 to 100 characters that can be seen.") from None


def password(fields: dict[str, str], field: str = "password") -> str:
    """A password as typed, cut where the API would refuse it."""
    return fields.get(field, "")[:1024]


def credential(fields: dict[str, str]) -> dict[str, Any]:
    """What an authenticator answered, as our script sent it; raises ``console.form_rejected``."""
    try:
        found = json.loads(fields.get("credential", ""))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Problem("console.form_rejected", "the passkey did not arrive")
    return found
