"""Secrets come from the environment or a file of their own, and have no default."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

from portico import settings
from portico.errors import Problem
from portico.settings import ApiSettings, RelaySettings, Secret


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that holds a secret, as an operator makes it."""
    path = tmp_path / "key"
    path.write_text("tnl_rly_1\n")
    path.chmod(0o600)
    return path


def refusal(**arguments: object) -> str:
    """What loading a relay's settings says."""
    with pytest.raises(Problem) as refused:
        settings.load(RelaySettings, table="relay", **arguments)  # type: ignore[arg-type]
    assert refused.value.code == "config.invalid"
    assert "tnl_rly" not in refused.value.line()
    return refused.value.line()


class TestSecretsInFiles:
    def test_in_the_environment(self, secret: Path) -> None:
        found = settings.load(RelaySettings, environ={"PORTICO_RELAY_KEY_FILE": str(secret)})
        assert found.relay_key == Secret("tnl_rly_1")
        assert "tnl" not in repr(found)

    @pytest.mark.parametrize(("text", "value"), [("a b\r\n\n", "a b"), (" a ", " a "), ("a\nb\n", "a\nb")])
    def test_only_the_newline_at_the_end_goes(self, secret: Path, text: str, value: str) -> None:
        secret.write_text(text)
        assert settings.secret_in_file("x", secret).reveal() == value

    def test_in_the_settings_file_beside_it(self, secret: Path, tmp_path: Path) -> None:
        file = tmp_path / "portico.toml"
        file.write_text('[relay]\nrelay_key_file = "key"\nregion = "eu"\n')
        found = settings.load(RelaySettings, table="relay", file=file, environ={})
        assert found.relay_key == Secret("tnl_rly_1") and found.region == "eu"
        found = settings.load(RelaySettings, table="relay", file=file, environ={"PORTICO_RELAY_KEY": "other"})
        assert found.relay_key == Secret("other"), "the environment goes before the file"

    def test_as_a_credential_of_systemd(self, tmp_path: Path) -> None:
        """systemd gives the service's account access by an access list, which shows as group's right."""
        (tmp_path / "relay_key").write_text("tnl_rly_2\n")
        (tmp_path / "relay_key").chmod(0o440)
        assert settings.load(RelaySettings, environ={"CREDENTIALS_DIRECTORY": str(tmp_path)}).relay_key == Secret(
            "tnl_rly_2"
        )
        (tmp_path / "relay_key").chmod(0o444)
        assert settings.load(RelaySettings, environ={"CREDENTIALS_DIRECTORY": str(tmp_path)}).relay_key == Secret(
            "tnl_rly_2"
        )

    def test_two_sources_are_refused(self, secret: Path, tmp_path: Path) -> None:
        both = {"PORTICO_RELAY_KEY": "tnl_rly_3", "PORTICO_RELAY_KEY_FILE": str(secret)}
        assert "given twice: PORTICO_RELAY_KEY and PORTICO_RELAY_KEY_FILE" in refusal(environ=both)
        (tmp_path / "relay_key").write_text("tnl_rly_2\n")
        both = {"CREDENTIALS_DIRECTORY": str(tmp_path), "PORTICO_RELAY_KEY_FILE": str(secret)}
        assert "PORTICO_RELAY_KEY_FILE and the credential relay_key" in refusal(environ=both)
        file = tmp_path / "portico.toml"
        file.write_text('[relay]\nrelay_key_file = "key"\nrelay_key = "tnl_rly_4"\n')
        file.chmod(0o600)
        assert "given twice: relay_key and relay_key_file" in refusal(file=file, environ={})

    def test_an_empty_variable_is_no_source(self, secret: Path) -> None:
        environ = {"PORTICO_RELAY_KEY": "", "PORTICO_RELAY_KEY_FILE": str(secret)}
        assert settings.load(RelaySettings, environ=environ).relay_key == Secret("tnl_rly_1")

    @pytest.mark.parametrize(
        ("mode", "taken"), [(0o600, True), (0o400, True), (0o640, True), (0o644, False), (0o602, False)]
    )
    def test_who_may_read_it(self, secret: Path, mode: int, taken: bool) -> None:
        secret.chmod(mode)
        environ = {"PORTICO_RELAY_KEY_FILE": str(secret)}
        if taken:
            assert settings.load(RelaySettings, environ=environ).relay_key
        else:
            said = refusal(environ=environ)
            assert "by every user" in said and f"chmod 600 {secret}" in said

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"", "is empty"),
            (b"\n\n", "is empty"),
            (b"a\0b", "is empty"),
            (b"\xff", "is not text"),
            (b"a" * 65_537, "longer"),
        ],
    )
    def test_what_holds_no_secret(self, secret: Path, data: bytes, says: str) -> None:
        secret.write_bytes(data)
        assert says in refusal(environ={"PORTICO_RELAY_KEY_FILE": str(secret)})

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        assert "No such file" in refusal(environ={"PORTICO_RELAY_KEY_FILE": str(tmp_path / "none")})
        assert "Is a directory" in refusal(environ={"PORTICO_RELAY_KEY_FILE": str(tmp_path)})

    def test_a_settings_file_with_a_secret_is_private_too(self, tmp_path: Path) -> None:
        file = tmp_path / "portico.toml"
        file.write_text('[relay]\nrelay_key = "tnl_rly_4"\n')
        file.chmod(0o644)
        assert f"{file} can be read by every user" in refusal(file=file, environ={})
        file.chmod(0o640)
        assert settings.load(RelaySettings, table="relay", file=file, environ={}).relay_key == Secret("tnl_rly_4")
        file.write_text('[agent]\nproxy_url = "http://proxy.example:3128"\n')
        file.chmod(0o644)
        assert settings.load(settings.AgentSettings, table="agent", file=file, environ={}).proxy_url, "no secret in it"
        file.write_text('[agent]\nproxy_url = "http://me:word@proxy.example:3128"\n')
        with pytest.raises(Problem, match="every user"):
            settings.load(settings.AgentSettings, table="agent", file=file, environ={})

    def test_other_settings_have_no_such_file(self, tmp_path: Path) -> None:
        file = tmp_path / "portico.toml"
        file.write_text('[relay]\nregion_file = "x"\n')
        assert "unknown key" in refusal(file=file, environ={})


class TestMissingSecrets:
    @pytest.mark.parametrize("cls", [ApiSettings, RelaySettings, settings.WorkerSettings, settings.MigrateSettings])
    def test_no_process_starts_without(self, cls: type) -> None:
        with pytest.raises(Problem, match=r"is required; set PORTICO_.*_FILE to a file"):
            settings.load(cls, environ={})

    def test_nor_with_an_empty_one(self) -> None:
        assert "is empty" in refusal(environ={"PORTICO_RELAY_KEY": ""})

    def test_no_secret_has_a_default(self) -> None:
        """Whoever runs one knows nobody else's."""
        for name in settings.CLASSES:
            cls = getattr(settings, name)
            hints = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                if hints[field.name] is Secret or Secret in typing.get_args(hints[field.name]):
                    assert field.default in (None, dataclasses.MISSING), field.name
                    assert f"{field.name}_file" not in hints, f"{field.name}_file is its file"
