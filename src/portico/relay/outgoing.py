"""How much of what was written a visitor has not taken yet, in our buffer and in the kernel's."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios


def untaken(transport: asyncio.Transport) -> int:
    """Bytes that were written to ``transport`` and that the other side's kernel has not acknowledged.

    Our own buffer shrinks in large steps only: a slow reader empties a third of the kernel's first (tcp(7), TIOCOUTQ). Where the
    kernel does not say, our buffer alone is counted.
    """
    waiting = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    try:
        return waiting + int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
    except (OSError, AttributeError):
        return waiting
