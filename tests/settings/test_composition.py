"""Every process has the settings of all its parts, each of them once, and pays for no other process's."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

from portico import settings

MODULES = [
    importlib.import_module(found.name) for found in pkgutil.iter_modules(settings.__path__, "portico.settings.")
]
PROCESSES = {name: getattr(settings, name) for name in settings.CLASSES}


def own_fields(cls: type) -> list[str]:
    return list(inspect.get_annotations(cls))


@pytest.mark.parametrize("name", PROCESSES)
def test_no_part_hides_a_setting_of_another(name: str) -> None:
    """A second field of one name would silently replace the first, with its default."""
    cls = PROCESSES[name]
    keys = [key for part in cls.__mro__[:-1] for key in own_fields(part)]
    assert sorted(keys) == sorted(field.name for field in dataclasses.fields(cls))


def test_every_part_is_of_a_process() -> None:
    made = [cls for module in MODULES for cls in vars(module).values() if dataclasses.is_dataclass(cls)]
    used = {part for cls in PROCESSES.values() for part in cls.__mro__}
    assert {cls.__name__ for cls in made if cls not in used} == set()


@pytest.mark.parametrize("name", PROCESSES)
def test_a_setting_that_does_not_exist_cannot_be_read_or_made(name: str) -> None:
    """Slots in every part: an instance has no dictionary in which a misspelt name could hide."""
    cls = PROCESSES[name]
    assert cls.__dictoffset__ == 0


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'NoSettings'"):
        _ = settings.NoSettings  # type: ignore[attr-defined]


def test_an_agent_makes_no_settings_of_servers() -> None:
    code = (
        "import sys; from portico.settings import agent_settings; print(*(m for m in sys.modules if '.settings.' in m))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ran.stdout.split()) == {
        f"portico.settings.{name}" for name in ("agent", "environment", "loading", "secrets")
    }
