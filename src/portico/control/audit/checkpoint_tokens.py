"""What a checkpoint says, and whether a log agrees with it. Without a database, so that the command line can ask, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from portico.control.audit.chain import Fault
from portico.kit import jwt

TYP: Final = "portico-audit+jwt"
#: Of the statement that retention deleted the rows up to a number: the same claims.
ANCHOR_TYP: Final = "portico-audit-anchor+jwt"


def read(token: str, known: jwt.KeySet, typ: str = TYP) -> dict[str, Any]:
    """The claims of a checkpoint, or of an anchor. Raises ``jwt.InvalidToken``."""
    claims = jwt.verify(token, known, typ=typ)
    if not (isinstance(claims.get("chain"), str) and isinstance(claims.get("seq"), int)):
        raise jwt.InvalidToken("a checkpoint without chain or seq")
    if not isinstance(claims.get("hash"), str):
        raise jwt.InvalidToken("a checkpoint without a hash")
    return claims


def fault_of(claims: Mapping[str, Any], hashes: Mapping[int, str], head: int) -> Fault | None:
    """What a checkpoint says against the rows with these ``hashes`` by number, in a chain that ends at ``head``."""
    seq = claims["seq"]
    if seq > head:
        return Fault(head + 1, "truncated", f"a checkpoint of number {seq} was signed, the log ends at {head}")
    found = hashes.get(seq)
    if found is not None and found != claims["hash"]:
        return Fault(seq, "checkpoint", "another hash was signed for this number: rows were hashed anew")
    return None
