"""httpx without what the agent never uses: its own command line (which brings rich and pygments) and HTTP/2.

Both are optional to httpx and httpcore, which import them when they are installed, and they are: for our own purposes. That is
a sixth of the time until `portico http` asks the API for its session.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_UNUSED = ("httpx._main", "httpcore._async.http2", "httpcore._sync.http2")


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """In the block importing one of ``names`` raises ``ImportError``, unless it is there already."""
    held_back = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(held_back))  # type: ignore[arg-type]  # None: "there is no such module"
    try:
        yield
    finally:
        for name in held_back:
            del sys.modules[name]


with _without(_UNUSED):
    import httpcore
    import httpx

__all__ = ["httpcore", "httpx"]
