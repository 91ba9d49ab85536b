"""What the server processes have alike, and how their settings are put together.

The settings of a process are one frozen dataclass with slots. A large one is composed of parts, each of which is one subject: a
dataclass without methods and with empty ``__slots__``, which is never made alone. The fields of a process are those of its bases
from the last one to the first, so `ProcessSettings`, its first base, is the end of its table in docs/reference/limits.md. A key
is one name in all of them, whatever part it stands in.

The comment above a field is its row there (written by tools/reference.py): unit and reason; ``# == Title`` begins a section.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class ProcessSettings:
    """What a relay, an API process and a worker have alike."""

    __slots__ = ()

    # == Process
    # Lowest level of log records that are written.
    log_level: str = "INFO"
    # Address of the listener for metrics and health; never a public one: they are about all tenants.
    metrics_host: str = "127.0.0.1"
    # TCP port of that listener (`/metrics` for Prometheus, `/healthz`, `/readyz`); none: there is no such listener.
    metrics_port: int | None = None
    # Listening sockets inherited from a supervisor, as name=fd,… (a relay's: `public=5,https=6,control=7`), as `portico up` sets
    # it; a listener that is not named is opened by the process itself.
    listen_fds: str = ""
    # Descriptor on which a supervisor is told that the process is ready, and that it drains; none when started by hand.
    notify_fd: int | None = None
