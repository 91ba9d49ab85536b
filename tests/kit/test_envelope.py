"""Envelopes of private keys: RFC 9180 by its own vectors, and everything that must not open."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from portico.errors import Problem
from portico.kit import envelope, jwt, keyfiles
from portico.kit.envelope import Binding, EnvelopeInvalid, Keys, Manifest
from portico.kit.jwt import KeySet, SigningKey

BINDING = Binding("crt_1", 7, "app.example.com", "ab" * 32)


def test_the_library_is_rfc_9180() -> None:
    """Appendix A.1.1 (DHKEM X25519, HKDF-SHA256, AES-128-GCM, base mode, sequence number 0). The library has associated data
    behind its public interface only, and the vectors have some; our own suite differs from this one in the length of the key."""
    recipient = X25519PrivateKey.from_private_bytes(
        bytes.fromhex("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8")
    )
    assert recipient.public_key().public_bytes_raw().hex() == (
        "3948cfe0ad1ddb695d780e59077195da6c56506b027329794ab02bca80815c4d"
    )
    encapsulated = bytes.fromhex("37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431")
    ciphertext = bytes.fromhex(
        "f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a"
    )
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)
    opened = openssl.hpke._decrypt_with_aad(
        suite,
        encapsulated + ciphertext,
        recipient,
        bytes.fromhex("4f6465206f6e2061204772656369616e2055726e"),
        b"Count-0",
    )
    assert opened == b"Beauty is truth, truth beauty"


class TestSealing:
    def test_what_was_sealed_comes_back(self) -> None:
        region = X25519PrivateKey.generate()
        sealed = envelope.seal(b"the key", BINDING)
        wrap = envelope.wrap(sealed.data_key, BINDING, "eu", region.public_key())
        assert len(wrap.wrapped) == envelope.WRAP_BYTES
        assert b"the key" not in sealed.content and sealed.data_key not in wrap.wrapped
        data_key = envelope.unwrap([wrap], BINDING, "eu", Keys([region]))
        assert envelope.open_sealed(sealed.content, data_key, BINDING) == b"the key"

    def test_each_version_has_a_data_key_of_its_own(self) -> None:
        first, second = envelope.seal(b"the key", BINDING), envelope.seal(b"the key", BINDING)
        assert first.data_key != second.data_key and first.content != second.content

    def test_a_data_key_never_prints(self) -> None:
        sealed = envelope.seal(b"the key", BINDING)
        assert sealed.data_key.hex() not in repr(sealed) and repr(sealed.data_key) not in repr(sealed)

    @pytest.mark.parametrize(
        "change",
        [{"certificate": "crt_2"}, {"version": 6}, {"version": 8}, {"hostname": "other.example.com"}, {"fingerprint": "cd" * 32}],
    )  # fmt: skip
    def test_nothing_opens_for_another_certificate(self, change: dict[str, object]) -> None:
        region = X25519PrivateKey.generate()
        sealed = envelope.seal(b"the key", BINDING)
        wrap = envelope.wrap(sealed.data_key, BINDING, "eu", region.public_key())
        other = dataclasses.replace(BINDING, **change)  # type: ignore[arg-type]
        with pytest.raises(EnvelopeInvalid, match="does not open"):
            envelope.unwrap([wrap], other, "eu", Keys([region]))
        with pytest.raises(EnvelopeInvalid, match="does not open"):
            envelope.open_sealed(sealed.content, sealed.data_key, other)

    def test_parts_of_a_binding_cannot_be_moved_into_each_other(self) -> None:
        one, other = Binding("a", 1, "b,c", "d"), Binding("a", 1, "b", "c,d")
        assert one.content() != other.content() and one.region("x", "y") != other.region("x", "y")
        assert one.content() != one.region("", "")

    def test_another_region_opens_nothing(self) -> None:
        eu, us = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        sealed = envelope.seal(b"the key", BINDING)
        wrap = envelope.wrap(sealed.data_key, BINDING, "eu", eu.public_key())
        with pytest.raises(EnvelopeInvalid, match="no key that is here"):
            envelope.unwrap([wrap], BINDING, "us", Keys([us]))
        with pytest.raises(EnvelopeInvalid, match="does not open"):  # the same key, registered for two regions
            envelope.unwrap([wrap], BINDING, "us", Keys([eu]))
        relabelled = dataclasses.replace(wrap, key_id=envelope.key_id(us.public_key()))
        with pytest.raises(EnvelopeInvalid, match="does not open"):
            envelope.unwrap([relabelled], BINDING, "eu", Keys([us]))

    @pytest.mark.parametrize("cut", [0, 1, 12, 27, -1])
    def test_what_is_cut_does_not_open(self, cut: int) -> None:
        region = X25519PrivateKey.generate()
        sealed = envelope.seal(b"the key", BINDING)
        wrap = envelope.wrap(sealed.data_key, BINDING, "eu", region.public_key())
        with pytest.raises(EnvelopeInvalid):
            envelope.open_sealed(sealed.content[:cut], sealed.data_key, BINDING)
        with pytest.raises(EnvelopeInvalid):
            Keys([region]).unwrap(wrap.key_id, wrap.wrapped[:cut], BINDING.region("eu", wrap.key_id))

    def test_a_data_key_of_the_wrong_length_is_refused(self) -> None:
        sealed = envelope.seal(b"the key", BINDING)
        with pytest.raises(EnvelopeInvalid):
            envelope.open_sealed(sealed.content, sealed.data_key[:5], BINDING)


MANIFEST = Manifest("dom_1", "crt_1", 7, "app.example.com", "ab" * 32, "cd" * 32, "ef" * 32, 1, 2)


class TestManifest:
    def test_round_trip(self) -> None:
        signer = SigningKey.generate()
        found = envelope.verify(MANIFEST.sign(signer), envelope.signers([signer.public_jwk()["x"]]))
        assert found == MANIFEST and found.binding == BINDING

    def test_the_longest_host_name_fits(self) -> None:
        signer = SigningKey.generate()
        longest = dataclasses.replace(
            MANIFEST, hostname="a" * 253, domain="d" * 64, certificate="c" * 64, version=2**53
        )
        assert envelope.verify(longest.sign(signer), KeySet.of([signer])) == longest

    def test_a_forged_one_is_refused(self) -> None:
        signer, forger = SigningKey.generate(), SigningKey.generate()
        keys = KeySet.of([signer])
        token = MANIFEST.sign(signer)
        head, body, signature = token.split(".")
        other = dataclasses.replace(MANIFEST, version=8).sign(signer).split(".")
        for forged in (
            MANIFEST.sign(forger),
            MANIFEST.sign(SigningKey(forger.seed(), signer.kid)),  # it claims to be signed by the right key
            f"{head}.{other[1]}.{signature}",
            f"{head}.{body}.",
            f"{head}.{body}",
            "",
        ):
            with pytest.raises(EnvelopeInvalid, match="manifest"):
                envelope.verify(forged, keys)

    def test_a_token_of_another_type_is_none(self) -> None:
        """Whoever holds the keys of sessions and grants must not be able to make a manifest of one of them."""
        signer = SigningKey.generate()
        claims = jwt.unverified(MANIFEST.sign(signer))
        with pytest.raises(EnvelopeInvalid, match="the type is not"):
            envelope.verify(signer.sign("portico-grant+jwt", claims), KeySet.of([signer]))

    @pytest.mark.parametrize("change", [{"version": "7"}, {"version": True}, {"hostname": None}, {"more": 1}])
    def test_a_signed_one_of_another_shape_is_refused(self, change: dict[str, object]) -> None:
        signer = SigningKey.generate()
        claims = jwt.unverified(MANIFEST.sign(signer)) | change
        with pytest.raises(EnvelopeInvalid, match="manifest"):
            envelope.verify(signer.sign(envelope.TYPE, claims), KeySet.of([signer]))


class TestKeyFiles:
    def _file(self, folder: Path, text: str, mode: int = 0o600) -> Path:
        path = folder / "key.pem"
        path.write_text(text)
        path.chmod(mode)
        return path

    def test_a_region_may_have_two_keys(self, tmp_path: Path) -> None:
        path = self._file(tmp_path, keyfiles.new_region_key() + "a note\n" + keyfiles.new_region_key())
        assert len(keyfiles.region_keys("region_key_files", (path,)).ids) == 2

    def test_no_public_half_looks_like_an_option(self, tmp_path: Path) -> None:
        for _ in range(300):  # one in 64 would
            _, public = keyfiles.region_keys(
                "region_key_files", (self._file(tmp_path, keyfiles.new_region_key()),)
            ).newest
            assert public.public_bytes_raw()[0] >> 2 != 62

    def test_the_workers_file(self, tmp_path: Path) -> None:
        keys = keyfiles.worker_keys("certificate_key_file", self._file(tmp_path, keyfiles.new_worker_keys()))
        assert envelope.verify(MANIFEST.sign(keys.signer), envelope.signers([keys.public])) == MANIFEST
        assert keys.opener.ids == [envelope.key_id(keys.own.public_key())]

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o660])
    def test_a_file_that_others_can_open_is_refused(self, tmp_path: Path, mode: int) -> None:
        path = self._file(tmp_path, keyfiles.new_region_key(), mode)
        with pytest.raises(Problem, match=r"region_key_files: .* has mode") as raised:
            keyfiles.region_keys("region_key_files", (path,))
        assert raised.value.code == "config.invalid"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
    def test_a_file_of_somebody_else_is_refused(self, tmp_path: Path) -> None:
        path = self._file(tmp_path, keyfiles.new_region_key())
        os.chown(path, 12345, -1)
        with pytest.raises(Problem, match="belongs to another user"):
            keyfiles.region_keys("region_key_files", (path,))

    def test_other_contents_are_refused(self, tmp_path: Path) -> None:
        for text in ("", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", keyfiles.new_worker_keys()):
            with pytest.raises(Problem, match="region_key_files"):
                keyfiles.region_keys("region_key_files", (self._file(tmp_path, text),))
        with pytest.raises(Problem, match="one Ed25519 key and one X25519 key"):
            keyfiles.worker_keys("certificate_key_file", self._file(tmp_path, keyfiles.new_region_key()))
        with pytest.raises(Problem, match="No such file"):
            keyfiles.region_keys("region_key_files", (tmp_path / "absent",))
        with pytest.raises(Problem, match=r"region_key_files"):
            keyfiles.region_keys("region_key_files", (tmp_path,))
