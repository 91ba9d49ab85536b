"""The transport of a connection that is gone: takes everything and does nothing.

uvloop's TLS keeps bound methods of a buffered protocol for good, so that a protocol which keeps its transport is a cycle, and its
OpenSSL buffers wait for the cyclic collector: hundreds of ended connections at a time, on a heap that then does not
shrink any more (25 KB for each new TLS connection, measured). A protocol that lets go at the end is freed at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


class Gone(asyncio.Transport):
    """See the module."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return True

    def close(self) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def write(self, data: bytes | bytearray | memoryview) -> None: ...
    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None: ...
    def write_eof(self) -> None: ...
    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...


GONE = Gone()
