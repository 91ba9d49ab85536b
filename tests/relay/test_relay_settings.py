from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from portico.errors import Problem
from portico.settings import RelaySettings, Secret, load
from portico.wire.frames import SESSION_WINDOW, STREAM_WINDOW


def test_a_relay_without_a_key_refuses_to_start() -> None:
    with pytest.raises(Problem, match="PORTICO_RELAY_KEY") as caught:
        load(RelaySettings, environ={})
    assert caught.value.code == "config.invalid"


def test_the_environment_sets_every_field_and_the_key_prints_masked() -> None:
    environ = {
        "PORTICO_RELAY_KEY": "tnl_rly_secret",
        "PORTICO_STATE_DIR": "/var/lib/relay",
        "PORTICO_EXEMPT_LOOPBACK": "true",
        "PORTICO_API_CA_FILE": "/etc/ca.pem",
        "PORTICO_PING_INTERVAL_SECONDS": "0.5",
    }
    settings = load(RelaySettings, environ=environ)
    assert settings.state_dir == Path("/var/lib/relay") and settings.api_ca_file == Path("/etc/ca.pem")
    assert settings.exempt_loopback is True and settings.ping_interval_seconds == 0.5
    assert "tnl_rly_secret" not in repr(settings)


def test_an_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "portico.toml"
    file.write_text("[relay]\nmax_head_byte = 1\n")
    with pytest.raises(Problem, match="max_head_byte"):
        load(RelaySettings, table="relay", file=file, environ={"PORTICO_RELAY_KEY": "x"})


def test_limits_agree_with_each_other() -> None:
    limits = RelaySettings(relay_key=Secret("x"))
    numbers = [getattr(limits, f.name) for f in dataclasses.fields(limits) if f.type in ("int", "float")]
    assert len(numbers) > 40 and all(number > 0 for number in numbers)
    assert STREAM_WINDOW <= limits.stream_window_max_bytes <= SESSION_WINDOW
    assert limits.max_head_bytes < 65536  # a head travels in one frame
    assert limits.edge_backoff_max_seconds <= 1.0  # revocations apply within 2 s of the control plane's return
