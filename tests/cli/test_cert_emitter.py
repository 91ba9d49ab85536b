"""The emitter: what it makes of feeds, and that nothing is lost on the way to a real API."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from portico.agent import cert_emitter
from portico.agent.cert_emitter import Known
from portico.agent.cert_spool import Spool
from portico.cli import cert_emitter as program
from portico.control.access import Caller
from portico.control.domains import event_store
from portico.control.domains.sources import Wanted
from tests.control.domains.certificates import issued
from tests.control.edge.live import Api, api_settings

NAMES = ["www.example.com", "example.com"]


def certificate(revision: int, ready: str, *more: dict[str, Any], uid: str = "u1") -> dict[str, Any]:
    return {
        "kind": "Certificate",
        "metadata": {"uid": uid, "namespace": "web", "name": "www", "resourceVersion": "7"},
        "spec": {"dnsNames": NAMES, "issuerRef": {"name": "letsencrypt"}},
        "status": {
            "revision": revision,
            "notAfter": "2030-04-01T00:00:00Z",
            "notBefore": "2030-01-01T00:00:00Z",
            "renewalTime": "2030-03-01T00:00:00Z",
            "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": "2030-01-01T00:00:05Z"}, *more],
        },
    }


def issuing(reason: str, status: str = "False", at: str = "2030-01-02T00:00:00Z") -> dict[str, Any]:
    return {"type": "Issuing", "status": status, "reason": reason, "message": "no", "lastTransitionTime": at}


def challenge(state: str, uid: str = "c1", **more: Any) -> dict[str, Any]:
    about = {"metadata": {"uid": uid}, "spec": {"dnsName": "example.com", **more}}
    return {"kind": "Challenge", **about, "status": {"state": state, "reason": "NXDOMAIN"}}


def pairs(known: Known, *feed: Any) -> list[str]:
    return [each.pair for document in feed for each in cert_emitter.read(document, known)]


def test_a_certificates_way() -> None:
    known = Known()
    assert pairs(known, certificate(0, "False", issuing("Issuing", "True"))) == [], "a start is no issue"
    issued = ["issuance.succeeded"] * 2 + ["deployment.succeeded"] * 2
    renewed = ["renewal.succeeded"] * 2 + ["deployment.succeeded"] * 2
    assert pairs(known, certificate(1, "True")) == issued, "one for each name, and it is in its Secret"
    assert pairs(known, certificate(1, "True"), certificate(1, "False"), certificate(1, "True")) == []
    failed = certificate(1, "True", issuing("Failed"))
    assert pairs(known, failed, failed) == ["renewal.failed"] * 2
    assert pairs(known, certificate(1, "True", issuing("Failed", at="2030-01-03T00:00:00Z"))) == ["renewal.failed"] * 2
    assert pairs(known, {"type": "MODIFIED", "object": certificate(2, "True")}) == renewed
    assert pairs(known, {"type": "DELETED", "object": certificate(3, "True")}) == []
    assert pairs(Known(), certificate(0, "False", issuing("Denied"))) == ["issuance.denied"] * 2
    assert pairs(Known(), {"kind": "List", "items": [certificate(5, "True")]}) == renewed


def request(chain: bytes, revision: int, uid: str = "u1") -> dict[str, Any]:
    return {
        "kind": "CertificateRequest",
        "metadata": {
            "uid": f"r{revision}", "ownerReferences": [{"kind": "Certificate", "uid": uid}],
            "annotations": {"cert-manager.io/certificate-revision": str(revision)},
        },
        "status": {"certificate": base64.b64encode(chain).decode(), "conditions": [{"type": "Ready", "status": "True"}]},
    }  # fmt: skip


def test_the_request_says_which_certificate_it_is() -> None:
    known, (first, _), (second, key) = Known(), issued("www.example.com"), issued("www.example.com")
    assert pairs(known, request(first, 1), request(second + key, 2)) == [], "not in use before its Certificate is ready"
    told = list(cert_emitter.read(certificate(2, "True"), known))
    leaf = x509.load_pem_x509_certificates(second)[0]
    assert {each.certificate["serial"] for each in told} == {f"{leaf.serial_number:x}"}
    assert {each.certificate["fingerprintSha256"] for each in told} == {leaf.fingerprint(hashes.SHA256()).hex()}
    assert {each.certificate["notAfter"] for each in told} == {"2030-04-01T00:00:00Z"}
    bodies = [cert_emitter.body(each, "e", "s", "c", "p", 1, "now") for each in told]
    assert not [body for body in bodies if b"PRIVATE" in body]
    (other, *_) = cert_emitter.read(certificate(3, "True"), known)
    assert "serial" not in other.certificate, "that of another revision is not told"
    for junk in (request(b"no certificate", 4), {"kind": "CertificateRequest"}, request(b"\xff", 4)):
        assert pairs(known, junk) == []


def test_certmagics_storage(tmp_path: Path) -> None:
    chain, key = issued("www.example.com")
    folder = tmp_path / "storage/certificates/acme/www.example.com"
    folder.mkdir(parents=True)
    (folder / "www.example.com.crt").write_bytes(chain)
    (folder / "www.example.com.key").write_bytes(key)
    (tmp_path / "outside.crt").write_bytes(chain)
    (folder / "link.crt").symlink_to(folder / "www.example.com.key")
    storage = tmp_path / "storage"

    def told(path: str, root: Path | None = storage) -> list[str | None]:
        data = {"identifier": "www.example.com", "certificate_path": path}
        feed = {"name": "cert_obtained", "data": data}
        found = cert_emitter.read(feed, Known(), lambda path: program.chain_in(root, path))
        return [each.certificate.get("serial") for each in found]

    serial = f"{x509.load_pem_x509_certificates(chain)[0].serial_number:x}"
    assert told("certificates/acme/www.example.com/www.example.com.crt") == [serial, serial]
    for path in ("../outside.crt", "certificates/acme/www.example.com/link.crt", "none.crt", ""):
        assert told(path) == [None, None], path
    assert told("certificates/acme/www.example.com/www.example.com.crt", None) == [None, None]


def test_orders_challenges_and_the_rest() -> None:
    known = Known()
    order = {
        "kind": "Order",
        "metadata": {"uid": "o1"},
        "spec": {"dnsNames": NAMES[:1]},
        "status": {"state": "errored"},
    }
    assert pairs(known, order, order) == ["issuance.failed"]
    assert pairs(known, challenge("pending"), challenge("invalid"), challenge("valid", "c2")) == [
        "validation.failed", "validation.succeeded",
    ]  # fmt: skip
    (wild,) = cert_emitter.read(challenge("valid", "c3", wildcard=True), known)
    assert wild.hostname == "*.example.com"
    for noise in ({"kind": "Event", "reason": "Issuing"}, {}, [], "x", None, {"kind": "Pod"}):
        assert pairs(known, noise) == []


def test_certmagic() -> None:
    known = Known()
    feed = [
        {"name": name, "data": {"identifier": "Example.com", **more}}
        for name, more in (
            ("cert_obtaining", {}), ("cert_obtained", {"renewal": False}), ("cert_obtaining", {"renewal": True}),
            ("cert_failed", {"renewal": True, "error": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"}),
            ("cert_ocsp_revoked", {}), ("tls_get_certificate", {}),
        )
    ]  # fmt: skip
    loaded = {"name": "cached_managed_cert", "data": {"sans": ["example.com", "Other.example.com"]}}
    feed += [loaded, loaded]
    found = [each for document in feed for each in cert_emitter.read(document, known)]
    assert [(each.pair, each.revision) for each in found] == [
        ("issuance.requested", 1), ("issuance.succeeded", 1), ("deployment.succeeded", 1), ("renewal.started", 2),
        ("renewal.failed", 2), ("revocation.succeeded", 1), ("deployment.succeeded", 1),
    ]  # fmt: skip
    assert found[-1].hostname == "other.example.com", "it had its certificate before anybody listened"
    assert found[4].error == {"code": "certmagic_failed", "detail": "[removed]"}


def test_documents_of_a_stream() -> None:
    text = json.dumps({"a": "}{"}, indent=2) + "\n" + json.dumps({"b": 1}) + '\n{"c": '
    seen, rest = [], ""
    for at in range(0, len(text), 3):
        found, rest = cert_emitter.documents(rest + text[at : at + 3])
        seen += found
    assert (seen, rest) == ([{"a": "}{"}, {"b": 1}], '{"c": ')
    with pytest.raises(ValueError, match="not JSON"):
        cert_emitter.documents("error: no server")
    with pytest.raises(ValueError, match="no end"):
        cert_emitter.documents('{"a": "' + "x" * cert_emitter.MAX_DOCUMENT_BYTES)


async def test_to_a_real_api_across_restarts(
    database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = tmp_path / "feed.json"
    feed.write_text("\n".join(json.dumps(each, indent=1) for each in (certificate(1, "True"), challenge("invalid"))))
    async with Api(api_settings(database_url)).running() as api:
        state = api.app.state
        async with state.db.transaction() as tx:
            wanted = Wanted("k8s", "production", ["eu-1"], [], ["*.example.com", "example.com"])
            made = await state.cert_sources.create(tx, Caller("operator", "installation", None), wanted, None)
        key = tmp_path / "key"
        key.write_text(made["key"]["secret"] + "\n")
        key.chmod(0o600)

        def run(url: str, codec: str, given: Path | str = feed) -> Callable[[], int]:
            arguments = [
                str(given), "--server", url, "--source", made["id"], "--cluster", "eu-1", "--environment", "production",
                "--key-file", str(key), "--key-id", made["key"]["id"], "--spool", str(tmp_path / "spool"), "--codec", codec,
            ]  # fmt: skip
            return lambda: program.main([*arguments, "--drain", "0.2" if ":1/" in url + "/" else "60"])

        assert await asyncio.to_thread(run("http://127.0.0.1:1", "standard")) == 75, "nobody is there"
        spool = Spool(tmp_path / "spool")
        assert [path.stat().st_mode & 0o777 for path in spool.waiting()] == [0o600] * 5
        assert await asyncio.to_thread(run(api.url, "http")) == 0
        assert spool.waiting() == []
        async with state.db.read() as reader:
            rows = await event_store.listing(reader, {"source": made["id"]}, 10, None)
        assert sorted((row.callback_class, row.hostname) for row in rows) == [
            ("deployment", "example.com"), ("deployment", "www.example.com"), ("issuance", "example.com"),
            ("issuance", "www.example.com"), ("validation", "example.com"),
        ]  # fmt: skip
        assert sorted(row.sequence for row in rows) == [1, 2, 3, 4, 5], "the feed came twice and was told once"
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(certificate(2, "True")).encode())))
        assert await asyncio.to_thread(run(api.url, "compact", "-")) == 0
        spool.add([(99, "cev_x", b"{}")], spool.known())
        assert await asyncio.to_thread(run(api.url, "standard")) == 0
        assert [path.name for path in (tmp_path / "spool" / "refused").iterdir()] == ["0000000099.json"]
        assert made["key"]["secret"] not in capsys.readouterr().err
    key.chmod(0o644)
    assert await asyncio.to_thread(run("http://127.0.0.1:1", "standard")) == 1, "a key that everybody can read"
