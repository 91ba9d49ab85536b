"""What a strict, slow path made of exact bytes, kept for when the same bytes come again.

Clients and servers repeat themselves: the fields of a connection's requests, the heads of an app's answers. A memo never
parses: the same bytes were read by the one strict parser before, and mean what they meant then.
"""

from __future__ import annotations

from typing import Generic, TypeVar

V = TypeVar("V")


class Memo(dict[bytes, V], Generic[V]):
    """Bytes → value, bounded in entries and in the size of a key. Full, it begins anew: what is in use is back at once.

    ``worth`` says whether to remember: from the second sighting on, so that bytes that never come again (an ``ETag``, a
    ``Set-Cookie``) cost a number and not an entry.
    """

    def __init__(self, most: int, longest_bytes: int) -> None:
        super().__init__()
        self._most = most
        self.longest_bytes = longest_bytes
        self._seen: set[int] = set()

    def worth(self, key: bytes) -> bool:
        """Whether ``key`` was seen before and may be remembered."""
        if len(key) > self.longest_bytes:
            return False
        mark = hash(key)
        if mark in self._seen:
            return True
        if len(self._seen) >= 4 * self._most:
            self._seen.clear()
        self._seen.add(mark)
        return False

    def remember(self, key: bytes, value: V) -> None:
        """Keep ``value`` for ``key``."""
        if len(self) >= self._most:
            self.clear()
        self[key] = value
