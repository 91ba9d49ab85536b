"""What visitors are shown while parts of the platform are killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType


class Watch:
    """Clients at some ports, again and again: what each saw, in order, without repetitions. A handshake that fails is an outage.

    ``look`` says what a client at a port is shown now (a fingerprint), ``None`` for nothing; it may raise ``OSError``.
    """

    def __init__(self, ports: Sequence[int], look: Callable[[int], str | None]) -> None:
        self._look = look
        self.seen: dict[int, list[str]] = {port: [] for port in ports}
        self.failed: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._watch, args=(port,)) for port in ports]

    def _watch(self, port: int) -> None:
        while not self._over.is_set():
            try:
                found = self._look(port)
            except OSError as err:
                found = None
                self.failed.append(f"{port}: {err}")
            if found is None:
                self.failed.append(f"{port}: no certificate")
            elif not self.seen[port] or self.seen[port][-1] != found:
                self.seen[port].append(found)
            time.sleep(0.01)

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
