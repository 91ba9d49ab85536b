"""Which certificate authorities may issue for a name (RFC 8659).

The records that count are those of the name itself or, when it has none, of the closest name above it that has some; the root
is not asked. A wildcard is asked about by ``issuewild``, where there is any, else by ``issue``. An unknown property that is
marked critical forbids everybody, as section 4.1 has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from portico.control.domains.dns import Looks, common, verdict

_CRITICAL: Final = 128
_KNOWN: Final = frozenset({"issue", "issuewild", "iodef", "contactemail", "contactphone", "issuemail", "issuevmc"})


@dataclass(frozen=True, slots=True)
class Property:
    """One record: its flags, its tag in lower case, and its value."""

    flags: int
    tag: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Property:
        """Of the form in which ``dns.py`` gives a record."""
        flags, _, rest = text.partition(" ")
        tag, _, value = rest.partition(" ")
        return cls(int(flags), tag, value)

    @property
    def issuer(self) -> str:
        """The authority that an ``issue`` or ``issuewild`` names; empty: nobody."""
        return self.value.partition(";")[0].strip().rstrip(".").lower()


@dataclass(frozen=True, slots=True)
class Policy:
    """The records that count for a name, and where they are. ``known`` false: the DNS could not say, and a CA would refuse."""

    owner: str | None
    properties: tuple[Property, ...]
    known: bool = True

    def permits(self, identities: Iterable[str], *, wildcard: bool) -> bool:
        """Whether an authority that calls itself one of ``identities`` may issue."""
        if not self.known:
            return False
        if any(each.flags & _CRITICAL and each.tag not in _KNOWN for each in self.properties):
            return False
        wild = [each for each in self.properties if each.tag == "issuewild"] if wildcard else []
        relevant = wild or [each for each in self.properties if each.tag == "issue"]
        return not relevant or not {each.issuer for each in relevant}.isdisjoint(
            identity.lower() for identity in identities
        )


def climb(name: str) -> list[str]:
    """The names that are asked in turn: without ``*.``, up to the top-level domain."""
    labels = name.removeprefix("*.").split(".")
    return [".".join(labels[at:]) for at in range(len(labels))]


async def policy(looks: Looks, name: str) -> Policy:
    """What holds for a name. Any resolver that knows a record is believed: to be too careful costs one order less."""
    for owner in climb(name):
        answers = await looks.ask(owner, "CAA")
        texts: Sequence[str] = sorted({text for answer in answers for text in answer.values})
        if texts:
            return Policy(owner, tuple(Property.parse(text) for text in texts))
        if verdict(answers, lambda answer: answer.status in ("nodata", "nxdomain")) != "yes":
            why = common(answers)
            return Policy(owner, (), known=False) if why.status in ("failed", "loop") else Policy(owner, ())
    return Policy(None, ())
