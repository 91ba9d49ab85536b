"""Where the agent's settings came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from portico import settings


def test_where_each_value_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTICO_CONFIG_DIR", str(tmp_path))
    (tmp_path / "portico.toml").write_text('[agent]\nregion = "eu"\nlog_level = "DEBUG"\nserver = "a.example"\n')
    monkeypatch.setenv("PORTICO_LOG_LEVEL", "ERROR")
    assert settings.agent_sources({"server": "b.example", "region": None}) == {
        "server": "command line",
        "region": f"{tmp_path}/portico.toml",
        "log_level": "PORTICO_LOG_LEVEL",
        "config_dir": "PORTICO_CONFIG_DIR",
    }
