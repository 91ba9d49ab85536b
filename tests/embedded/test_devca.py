from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from portico.embedded import devca
from portico.embedded.devca import SystemStore
from portico.errors import Problem
from portico.kit.authority import Authority
from portico.relay import development
from portico.settings import Secret


class TestTheAuthority:
    def test_made_once_and_kept(self, tmp_path: Path) -> None:
        first = devca.ensure(tmp_path, "localhost")
        again = devca.ensure(tmp_path, "localhost")
        assert first.made and not again.made and again.fingerprint == first.fingerprint
        assert devca.existing(tmp_path, "localhost").fingerprint == first.fingerprint
        other = devca.ensure(tmp_path, "tunnels.example.com")
        assert other.fingerprint != first.fingerprint
        assert devca.ensure(tmp_path, "localhost").fingerprint == first.fingerprint, "each domain has its own"

    def test_its_key_is_private_and_encrypted(self, tmp_path: Path) -> None:
        ca = devca.ensure(tmp_path, "localhost")
        key = ca.certificate.with_name("ca.key")
        assert stat.S_IMODE(key.stat().st_mode) == 0o600 and stat.S_IMODE(ca.certificate.stat().st_mode) == 0o644
        assert b"ENCRYPTED PRIVATE KEY" in key.read_bytes()
        serialization.load_pem_private_key(key.read_bytes(), devca.passphrase(tmp_path).encode())
        with pytest.raises((TypeError, ValueError)):
            serialization.load_pem_private_key(key.read_bytes(), None)

    def test_a_relay_reads_it(self, tmp_path: Path) -> None:
        ca = devca.ensure(tmp_path, "localhost")
        found = development.authority(ca.certificate.parent, Secret(devca.passphrase(tmp_path)), "localhost")
        assert found.fingerprint == ca.fingerprint

    @pytest.mark.parametrize("fault", ["gone", "passphrase", "domain", "damaged"])
    def test_a_relay_that_cannot_goes_on_with_its_own(
        self, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        ca = devca.ensure(tmp_path, "localhost")
        folder, secret, domain = ca.certificate.parent, devca.passphrase(tmp_path), "localhost"
        if fault == "gone":
            ca.certificate.unlink()
        elif fault == "passphrase":
            secret = "another"
        elif fault == "domain":
            domain = "example.com"
        else:
            ca.certificate.write_text("garbage")
        found = development.authority(folder, Secret(secret), domain)
        assert found.fingerprint != ca.fingerprint
        assert "the development CA does not serve" in caplog.text

    @pytest.mark.parametrize("fault", ["key", "certificate", "master"])
    def test_another_when_it_is_damaged(self, tmp_path: Path, fault: str) -> None:
        ca = devca.ensure(tmp_path, "localhost")
        path = {
            "key": ca.certificate.with_name("ca.key"),
            "certificate": ca.certificate,
            "master": tmp_path / "master.key",
        }[fault]
        path.write_text("x" * 43)
        again = devca.ensure(tmp_path, "localhost")
        assert again.made and again.fingerprint != ca.fingerprint
        secret = devca.passphrase(tmp_path).encode()
        key = again.certificate.with_name("ca.key").read_bytes()
        assert Authority.read(again.certificate.read_bytes(), key, secret).fingerprint == again.fingerprint

    @pytest.mark.parametrize("domain", ["", "..", "a/b", "../x", "-a", "a" * 300, "Ä.example"])
    def test_a_domain_that_is_none(self, tmp_path: Path, domain: str) -> None:
        with pytest.raises(Problem, match="no host name") as refused:
            devca.ensure(tmp_path, domain)
        assert refused.value.code == "config.invalid"

    def test_none_of_another_users(self, tmp_path: Path) -> None:
        with pytest.raises(Problem, match="there is no development CA") as refused:
            devca.existing(tmp_path, "localhost")
        assert refused.value.code == "up.data_unusable"


class TestTheSystemsList:
    def store(self, folder: Path, exit_code: int = 0) -> SystemStore:
        """With a command that notes that it ran."""
        script = folder / "update"
        script.write_text(f"#!/bin/sh\nls {folder} > {folder}/ran\necho nothing works >&2\nexit {exit_code}\n")
        script.chmod(0o755)
        return SystemStore(folder, (str(script),))

    def test_in_and_out(self, tmp_path: Path) -> None:
        ca = devca.ensure(tmp_path, "localhost")
        folder = tmp_path / "store"
        folder.mkdir()
        store = self.store(folder)
        path = devca.trust(store, ca, "localhost")
        assert path.read_bytes() == ca.certificate.read_bytes() and path.suffix == ".crt"
        assert path.name in (folder / "ran").read_text()
        assert devca.distrust(store, "localhost") and not path.exists()
        assert path.name not in (folder / "ran").read_text()
        assert not devca.distrust(store, "localhost")

    def test_a_command_that_fails(self, tmp_path: Path) -> None:
        ca = devca.ensure(tmp_path, "localhost")
        with pytest.raises(Problem, match="failed: nothing works"):
            devca.trust(self.store(tmp_path, 3), ca, "localhost")

    def test_a_folder_that_takes_nothing(self, tmp_path: Path) -> None:
        ca = devca.ensure(tmp_path, "localhost")
        with pytest.raises(Problem, match="cannot write"):
            devca.trust(SystemStore(tmp_path / "none", ("true",)), ca, "localhost")
