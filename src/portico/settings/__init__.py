"""Settings: frozen values per process, from the command line over the environment over a file over defaults.

A settings class is a frozen dataclass; its field names are the keys of its table in ``portico.toml`` and, upper-cased
behind ``PORTICO_``, its environment variables. An unknown key in the file, or a value of the wrong type, refuses
with the key's name. No module but those of this package reads the environment.

    from portico.settings import ApiSettings, Secret, load

`secrets` and `loading` are how a value gets here; `process` says how the classes are put together; `environment` is what the
environment says besides. The other modules are the settings of a process, or of one subject of the API's.
"""

from __future__ import annotations

import importlib
import typing

from portico.settings.environment import (
    activated_sockets,
    color_wanted,
    debug_enabled,
    default_data_dir,
    default_demo_dir,
    default_state_dir,
    proxy_environment,
    screen_wanted,
    secret_from_environment,
)
from portico.settings.loading import load, read_table
from portico.settings.secrets import (
    SECRET_FILE_MAX_BYTES,
    Secret,
    check_private,
    is_secret,
    mounted_secret,
    secret_file_variables,
    secret_in_file,
)

if typing.TYPE_CHECKING:
    from portico.settings.agent import AgentSettings, agent_environment, agent_settings, agent_sources
    from portico.settings.api import ApiSettings
    from portico.settings.platform import MigrateSettings, PlatformSettings, SimulatorSettings
    from portico.settings.relay import RelaySettings
    from portico.settings.worker import WorkerSettings

__all__ = [
    "CLASSES",
    "SECRET_FILE_MAX_BYTES",
    "AgentSettings",
    "ApiSettings",
    "MigrateSettings",
    "PlatformSettings",
    "RelaySettings",
    "Secret",
    "SimulatorSettings",
    "WorkerSettings",
    "activated_sockets",
    "agent_environment",
    "agent_settings",
    "agent_sources",
    "check_private",
    "color_wanted",
    "debug_enabled",
    "default_data_dir",
    "default_demo_dir",
    "default_state_dir",
    "is_secret",
    "load",
    "mounted_secret",
    "proxy_environment",
    "read_table",
    "screen_wanted",
    "secret_file_variables",
    "secret_from_environment",
    "secret_in_file",
]

# Modules that are read when something of them is asked for: to make a dataclass of hundreds of fields takes milliseconds, and no
# process needs all of them.
_HOMES = {
    "RelaySettings": "relay",
    "ApiSettings": "api",
    "PlatformSettings": "platform",
    "MigrateSettings": "platform",
    "SimulatorSettings": "platform",
    "WorkerSettings": "worker",
    "AgentSettings": "agent",
    "agent_environment": "agent",
    "agent_settings": "agent",
    "agent_sources": "agent",
}
#: The names of the settings classes, in the order of docs/reference/limits.md.
CLASSES = tuple(name for name in _HOMES if name[0].isupper())

if not typing.TYPE_CHECKING:

    def __getattr__(name: str) -> typing.Any:
        """What stands in `_HOMES`, at its first use (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
