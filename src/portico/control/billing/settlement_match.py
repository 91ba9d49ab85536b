"""What a sink says was settled, against what we have recorded: pure functions, without a clock and without a database.

    L1  totals by currency      gross, refunds, disputes, adjustments, fees, net
    L2  counts by currency      lines of each kind
    L3  lines                   by kind and the provider's reference

Signs: a payment is positive, a refund and a withdrawn dispute are negative; a fee is what the provider keeps, so positive when it
costs and negative when it is given back; ``net = amount - fee``. A delta is theirs less ours: positive when the sink has more.
Everything is compared currency by currency and never added across currencies. What is not stated (``None``) is not compared.

Amounts may differ by the tolerance of their currency, 0 minor units by default; counts and references may not differ at all.
Errors that cancel out in the totals are found in the lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from typing import Any, Final, Literal

Kind = Literal["payment", "refund", "dispute", "adjustment", "fee"]
KINDS: Final[tuple[Kind, ...]] = ("payment", "refund", "dispute", "adjustment", "fee")
#: Members of totals, in minor units.
FIELDS: Final[tuple[str, ...]] = ("gross", "refunds", "disputes", "adjustments", "fees", "net")
_OF_KIND: Final[Mapping[str, str]] = {
    "payment": "gross", "refund": "refunds", "dispute": "disputes", "adjustment": "adjustments",
}  # fmt: skip
Class = Literal["missing", "extra", "amount", "fee", "currency", "fx"]
CLASSES: Final[tuple[Class, ...]] = ("missing", "extra", "amount", "fee", "currency", "fx")
Verdict = Literal["matched", "delta", "failed"]
#: Why a receipt cannot be compared at all.
REASONS: Final = ("unknown_export", "unknown_period", "currency_set", "inconsistent")
#: Findings that a report keeps; all of them are counted.
MAX_FINDINGS: Final = 1000


@dataclass(frozen=True, slots=True)
class Line:
    """Something that was settled. ``aliases``: other references of the provider's to it (a charge has a payment intent).

    With ``original_*``, the provider has exchanged it: ``amount_minor`` of ``currency`` is what became of it at ``rate``, a
    decimal number of units of ``currency`` for one unit of ``original_currency``.
    """

    ref: str
    kind: Kind
    currency: str
    amount_minor: int
    fee_minor: int | None = None
    aliases: tuple[str, ...] = ()
    original_currency: str | None = None
    original_minor: int | None = None
    rate: str | None = None

    @property
    def compared_currency(self) -> str:
        """The currency in which it was recorded by us."""
        return self.original_currency or self.currency


@dataclass(slots=True)
class Totals:
    """What the lines of one currency come to."""

    gross: int = 0
    refunds: int = 0
    disputes: int = 0
    adjustments: int = 0
    fees: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def net(self) -> int:
        """What reaches the bank."""
        return self.gross + self.refunds + self.disputes + self.adjustments - self.fees

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    def add(self, kind: str, amount: int, fee: int, count: int = 1) -> None:
        """Add a line."""
        if kind == "fee":
            self.fees -= amount
        else:
            name = _OF_KIND[kind]
            setattr(self, name, getattr(self, name) + amount)
        self.fees += fee
        self.counts[kind] = self.counts.get(kind, 0) + count

    def document(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS} | {"count": self.count, "counts": dict(self.counts)}


@dataclass(frozen=True, slots=True)
class Stated:
    """The totals that a receipt states for a currency; ``None``: it does not say."""

    gross: int | None = None
    refunds: int | None = None
    disputes: int | None = None
    adjustments: int | None = None
    fees: int | None = None
    net: int | None = None
    count: int | None = None

    @property
    def empty(self) -> bool:
        """Whether it says that there was nothing."""
        return not any(getattr(self, name) for name in (*FIELDS, "count"))


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference. ``currency`` is ours where we have the line."""

    found: Class
    ref: str
    kind: str
    currency: str
    ours_minor: int | None
    theirs_minor: int | None
    delta_minor: int

    def document(self) -> dict[str, Any]:
        return {
            "found": self.found, "ref": self.ref, "kind": self.kind, "currency": self.currency,
            "ours_minor": self.ours_minor, "theirs_minor": self.theirs_minor, "delta_minor": self.delta_minor,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compared:
    """One currency: both totals, and how far each of theirs is off. ``delta_bps``: of our net; none when that is 0."""

    currency: str
    ours: dict[str, Any]
    theirs: dict[str, Any]
    deltas: dict[str, int]
    delta_minor: int
    delta_bps: int | None
    fx_delta_minor: int
    tolerance_minor: int

    def document(self) -> dict[str, Any]:
        return {
            "currency": self.currency, "ours": self.ours, "theirs": self.theirs, "deltas": self.deltas,
            "delta_minor": self.delta_minor, "delta_bps": self.delta_bps, "fx_delta_minor": self.fx_delta_minor,
            "tolerance_minor": self.tolerance_minor,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """What a comparison came to. ``level``: the deepest that was compared. ``counts``: findings by class, those beyond
    ``MAX_FINDINGS`` too."""

    verdict: Verdict
    level: int
    reason: str | None = None
    detail: str | None = None
    currencies: tuple[Compared, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def document(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict, "level": self.level, "reason": self.reason, "detail": self.detail,
            "currencies": [each.document() for each in self.currencies],
            "counts": {name: self.counts.get(name, 0) for name in CLASSES},
            "findings": [each.document() for each in self.findings],
        }  # fmt: skip


def failed(reason: str, detail: str) -> Report:
    """A receipt that cannot be compared."""
    return Report("failed", 0, reason, detail)


def basis_points(delta: int, of: int) -> int | None:
    """``delta`` in ten-thousandths of ``of``'s size, rounded half to even; ``None`` of nothing."""
    return None if of == 0 else round(Fraction(delta * 10_000, abs(of)))


def exchanged(minor: int, rate: str, from_exponent: int, to_exponent: int) -> int:
    """An amount at a rate, in minor units of the other currency, rounded half to even."""
    value = Decimal(minor).scaleb(to_exponent - from_exponent) * Decimal(rate)
    return int(value.quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


class Grouped:
    """Lines by kind and reference; several of one are taken together (a dispute is withdrawn, and reinstated)."""

    __slots__ = ("amount", "count", "currency", "fee", "mixed")

    def __init__(self, currency: str) -> None:
        self.currency, self.amount, self.count = currency, 0, 0
        self.fee: int | None = 0
        self.mixed = False

    def add(self, currency: str, amount: int, fee: int | None) -> None:
        """Add a line."""
        self.mixed = self.mixed or currency != self.currency
        self.amount += amount
        self.fee = None if fee is None or self.fee is None else self.fee + fee
        self.count += 1


class Ours:
    """Our side, as it is read: lines by reference, and what is wrong when they have two currencies."""

    def __init__(self) -> None:
        self.lines: dict[tuple[str, str], Grouped] = {}
        #: Other references of ours to the same, and the one that it is kept under.
        self.aliases: dict[tuple[str, str], str] = {}

    def add(
        self, ref: str, kind: str, currency: str, amount_minor: int, fee_minor: int | None, alias: str | None = None
    ) -> None:
        """Add what an event recorded. What moves nothing (an invoice of 0) is in no provider's books."""
        if amount_minor == 0 and not fee_minor:
            return
        if alias is not None and alias != ref:
            self.aliases.setdefault((kind, alias), ref)
        found = self.lines.get((kind, ref))
        if found is None:
            found = self.lines[kind, ref] = Grouped(currency)
        found.add(currency, amount_minor, fee_minor)

    def charge(self, ref: str, currency: str, fee_minor: int) -> None:
        """A fee of a payment that was told later. One in another currency is no part of what the payment comes to."""
        known = self.known("payment", (ref,))
        line = self.lines.get(("payment", known)) if known is not None else None
        if line is not None and line.currency == currency:
            line.fee = (line.fee or 0) + fee_minor

    @classmethod
    def of(cls, lines: Iterable[Line]) -> Ours:
        """From lines, for tests and small cases."""
        made = cls()
        for line in lines:
            made.add(line.ref, line.kind, line.currency, line.amount_minor, line.fee_minor)
        return made

    def known(self, kind: str, refs: Iterable[str]) -> str | None:
        """The reference that we keep it under, by the first of ``refs`` that we know."""
        for ref in refs:
            if (kind, ref) in self.lines:
                return ref
            if (found := self.aliases.get((kind, ref))) is not None:
                return found
        return None

    def totals(self) -> dict[str, Totals]:
        """By currency."""
        return _totals(self.lines)


def _totals(lines: Mapping[tuple[str, str], Grouped]) -> dict[str, Totals]:
    found: dict[str, Totals] = {}
    for (kind, _), each in lines.items():
        found.setdefault(each.currency, Totals()).add(kind, each.amount, each.fee or 0, each.count)
    return found


def compare(
    ours: Ours,
    theirs: Sequence[Line] | None,
    stated: Mapping[str, Stated],
    tolerances: Mapping[str, int] | None = None,
    exponents: Mapping[str, int] | None = None,
) -> Report:
    """The verdict on a receipt. ``theirs``: its lines, ``None`` when it has totals alone; ``stated``: its totals by currency."""
    tolerances, exponents = tolerances or {}, exponents or {}
    if theirs is not None and (wrong := _inconsistent(theirs, stated)):
        return failed("inconsistent", wrong)
    grouped, fx = _group(ours, theirs or ())
    our_totals = ours.totals()
    named = {currency for currency, each in stated.items() if not each.empty} | {
        line.compared_currency for line in theirs or () if line.amount_minor or line.fee_minor
    }
    # What was exchanged is stated in the currency that it became, and compared in the one that it was.
    became = {line.currency for line in theirs or () if line.original_currency not in (None, line.currency)}
    named -= became - {line.compared_currency for line in theirs or ()}
    if not our_totals and named:
        return failed("unknown_period", "nothing is recorded for this account and period")
    if named != set(our_totals):
        return failed("currency_set", f"the receipt has {_list(named)}, recorded is {_list(our_totals)}")
    their_totals = _totals(grouped) if theirs is not None else None
    findings = [] if theirs is None else [*_lines(ours, grouped, tolerances), *_fx(fx, tolerances, exponents)]
    compared = tuple(
        _currency(currency, our_totals[currency], their_totals, stated, tolerances, findings)
        for currency in sorted(our_totals)
    )
    off = any(_off(each) for each in compared)
    counts: dict[str, int] = {}
    for finding in findings:
        counts[finding.found] = counts.get(finding.found, 0) + 1
    findings.sort(key=lambda each: (-abs(each.delta_minor), each.found, each.kind, each.ref))
    verdict: Verdict = "delta" if off or findings else "matched"
    return Report(verdict, 2 if theirs is None else 3, None, None, compared, counts, tuple(findings[:MAX_FINDINGS]))


def _list(currencies: Iterable[str]) -> str:
    return ", ".join(sorted(currencies)) or "none"


def _inconsistent(theirs: Sequence[Line], stated: Mapping[str, Stated]) -> str | None:
    """How a receipt contradicts itself: its totals are not those of its lines."""
    found: dict[str, Totals] = {}
    for line in theirs:
        found.setdefault(line.currency, Totals()).add(line.kind, line.amount_minor, line.fee_minor or 0)
    for currency, each in sorted(stated.items()):
        own = found.get(currency, Totals())
        for name in (*FIELDS, "count"):
            said = getattr(each, name)
            if said is not None and said != getattr(own, name):
                return f"{name} of {currency} is stated as {said}, its lines come to {getattr(own, name)}"
    unstated = sorted(set(found) - set(stated)) if stated else []
    return f"there are lines in {', '.join(unstated)}, and no totals" if unstated else None


def _group(ours: Ours, theirs: Sequence[Line]) -> tuple[dict[tuple[str, str], Grouped], list[Line]]:
    """Their lines under the references that we know them by; and those that were exchanged."""
    found: dict[tuple[str, str], Grouped] = {}
    fx: list[Line] = []
    for line in theirs:
        if line.amount_minor == 0 and not line.fee_minor:
            continue
        ref = ours.known(line.kind, (line.ref, *line.aliases)) or line.ref
        each = found.get((line.kind, ref))
        if each is None:
            each = found[line.kind, ref] = Grouped(line.compared_currency)
        if line.original_currency is not None and line.original_minor is not None:
            fx.append(line)
            # Its fee was taken in the other currency: it is not ours to compare.
            known = ours.lines.get((line.kind, ref))
            each.add(line.compared_currency, line.original_minor, known.fee if known is not None else None)
        else:
            each.add(line.currency, line.amount_minor, line.fee_minor)
            if line.fee_minor is None and (known := ours.lines.get((line.kind, ref))) is not None:
                each.fee = known.fee
    return found, fx


def _lines(ours: Ours, theirs: Mapping[tuple[str, str], Grouped], tolerances: Mapping[str, int]) -> Iterable[Finding]:
    for key, own in ours.lines.items():
        kind, ref = key
        other = theirs.get(key)
        if other is None:
            net = own.amount - (own.fee or 0)
            yield Finding("missing", ref, kind, own.currency, net, None, -net)
            continue
        if other.currency != own.currency or other.mixed or own.mixed:
            yield Finding("currency", ref, kind, own.currency, own.amount, other.amount, other.amount - own.amount)
            continue
        tolerance = tolerances.get(own.currency, 0)
        if abs(other.amount - own.amount) > tolerance:
            yield Finding("amount", ref, kind, own.currency, own.amount, other.amount, other.amount - own.amount)
        if own.fee is not None and other.fee is not None and abs(other.fee - own.fee) > tolerance:
            yield Finding("fee", ref, kind, own.currency, own.fee, other.fee, other.fee - own.fee)
    for key, other in theirs.items():
        if key not in ours.lines:
            net = other.amount - (other.fee or 0)
            yield Finding("extra", key[1], key[0], other.currency, None, net, net)


def _fx(lines: Iterable[Line], tolerances: Mapping[str, int], exponents: Mapping[str, int]) -> Iterable[Finding]:
    """Amounts that are not what their own rate makes of them."""
    for line in lines:
        if line.rate is None or line.original_currency is None or line.original_minor is None:
            continue
        exponent = exponents.get(line.original_currency, 2), exponents.get(line.currency, 2)
        wanted = exchanged(line.original_minor, line.rate, *exponent)
        if abs(delta := line.amount_minor - wanted) > tolerances.get(line.currency, 0):
            yield Finding("fx", line.ref, line.kind, line.compared_currency, wanted, line.amount_minor, delta)


def _currency(
    currency: str, ours: Totals, theirs: Mapping[str, Totals] | None, stated: Mapping[str, Stated],
    tolerances: Mapping[str, int], findings: Iterable[Finding],
) -> Compared:  # fmt: skip
    own = ours.document()
    if theirs is not None:
        other = theirs.get(currency, Totals()).document()
    else:
        said = stated.get(currency, Stated())
        other = {name: value for name in (*FIELDS, "count") if (value := getattr(said, name)) is not None}
    deltas: dict[str, int] = {name: other[name] - own[name] for name in (*FIELDS, "count") if name in other}
    if theirs is not None:
        for kind in sorted({*own["counts"], *other["counts"]}):
            deltas[f"count.{kind}"] = other["counts"].get(kind, 0) - own["counts"].get(kind, 0)
    delta = deltas.get("net", 0)
    fx = sum(each.delta_minor for each in findings if each.found == "fx" and each.currency == currency)
    return Compared(currency, own, other, deltas, delta, basis_points(delta, ours.net), fx, tolerances.get(currency, 0))


def _off(each: Compared) -> bool:
    return any(
        value != 0 if name.startswith("count") else abs(value) > each.tolerance_minor
        for name, value in each.deltas.items()
    )
