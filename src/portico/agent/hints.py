"""The target refuses the visitor's Host, as development servers do: say once which option helps.

Nothing here runs for a request that is answered well: `Exchange.respond` looks at the status, and only a 400 or 403 gets a
stream that lets the first bytes of its body be seen on their way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from portico.agent.forward import Exchange
    from portico.wire.stream import Stream

#: Bytes of a body that are looked at: Rails says it below a style sheet.
LOOK_BYTES: Final = 16_384
#: Answers that are looked at, then it was something else.
LOOKS: Final = 20

#: Vite and what is built on it · webpack-dev-server, Starlette · Django · Rails · ASP.NET Core.
_REFUSALS: Final = re.compile(
    rb"blocked request\. this host|invalid host header|disallowedhost|blocked hosts?:|invalid hostname", re.IGNORECASE
)


class HostHint:
    """Watches the refusals of one tunnel's target; ``tell`` is called once at most."""

    def __init__(self, place: str, tell: Callable[[str], None]) -> None:
        self._place = place
        self._tell: Callable[[str], None] | None = tell
        self._looks_left = LOOKS

    def look(self, exchange: Exchange, fields: list[bytes]) -> None:
        """Look at the answer that begins, unless enough were looked at, or its body is compressed."""
        if self._looks_left <= 0 or b"content-encoding" in (name.lower() for name in fields[1::2]):
            return
        self._looks_left -= 1
        exchange.stream = cast("Stream", _Glass(exchange, exchange.stream, self))

    def refused(self, start: bytes) -> bool:
        """Whether a body that begins so is the refusal of a Host; the first one is told."""
        if _REFUSALS.search(start) is None:
            return False
        tell, self._tell, self._looks_left = self._tell, None, 0
        if tell is not None:
            tell(
                f"{self._place} refuses the visitor's Host: start the tunnel with --host-header rewrite "
                "(portico.yml: host_header: rewrite), or allow the host there"
            )
        return True


class _Glass:
    """A stream, seen through: what is sent on it is looked at first. It takes itself away when it has seen enough."""

    def __init__(self, exchange: Exchange, stream: Stream, hint: HostHint) -> None:
        self.__dict__.update(_exchange=exchange, _stream=stream, _hint=hint, _start=b"")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._stream, name, value)

    def send_data(self, data: bytes | memoryview, end: bool = False) -> None:
        start = self._start + bytes(data[: LOOK_BYTES - len(self._start)])
        self.__dict__["_start"] = start
        if self._hint.refused(start) or len(start) >= LOOK_BYTES:
            self._exchange.stream = self._stream
        self._stream.send_data(data, end)
