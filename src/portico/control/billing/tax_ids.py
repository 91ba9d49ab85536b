"""Tax ids of customers: whether one can be right, by its country's own rules (length, letters, check digits).

That is what can be known without asking the country's register: ``how`` says so on the record that an auditor reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from stdnum import exceptions, get_cc_module

from portico.control.billing.tax import EU
from portico.errors import Problem

#: What a check proves.
FORMAT: Final = "format"


def check(country: str, value: str, now: datetime) -> dict[str, Any]:
    """The id as it is kept: compact, with what was checked. Raises ``billing.tax_id_invalid``."""
    module = get_cc_module(country.lower(), "vat")
    if module is None:
        raise Problem("billing.tax_id_invalid", f"tax ids of {country} are not known here", country=country)
    try:
        compact = str(module.validate(value))
    except exceptions.ValidationError as err:
        raise Problem("billing.tax_id_invalid", f"not a tax id of {country}: {err}", country=country) from None
    prefix = "EL" if country == "GR" else country
    written = f"{prefix}{compact.removeprefix(prefix)}" if country in EU else compact
    return {"country": country, "value": written, "valid": True, "how": FORMAT, "checked_at": now.isoformat()}


def best(profile: Any) -> dict[str, Any] | None:
    """The id that counts: one of the country in which the customer is."""
    ids: Sequence[dict[str, Any]] = profile.tax_ids if profile is not None else ()
    return next((each for each in ids if each["valid"] and each["country"] == profile.country), None)
