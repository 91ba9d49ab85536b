"""DNS-01: wildcards by delegation, by a program and by signed updates, and where nothing of ours may be written."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.tsig
import pytest
from cryptography import x509

from portico.control.domains import acme_dns01
from portico.control.domains.acme_errors import AcmeError
from portico.errors import Problem
from portico.settings import ApiSettings, Secret
from tests.control.domains.issuing import Desk
from tests.pebble import Pebble

ZONE = "acme.example.net"
SETTINGS = ApiSettings(database_url=Secret("unused"), master_key=Secret("unused"))
HOOK = """#!{python}
import json, sys, urllib.request
verb, name, value = sys.argv[1:]
body = {{"host": name + "."}} | ({{"value": value}} if verb == "present" else {{}})
path = {{"present": "/set-txt", "cleanup": "/clear-txt"}}[verb]
urllib.request.urlopen(urllib.request.Request("{control}" + path, json.dumps(body).encode())).read()
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


class ByManagement:
    """Writes into the DNS server of the tests."""

    def __init__(self, ca: Pebble) -> None:
        self.ca = ca
        self.said: list[tuple[str, str, str]] = []

    async def present(self, zone: str, name: str, value: str) -> None:
        self.said.append(("present", zone, name))
        await asyncio.to_thread(self.ca.say, "set-txt", host=f"{name}.", value=value)

    async def cleanup(self, zone: str, name: str, value: str) -> None:
        self.said.append(("cleanup", zone, name))
        await asyncio.to_thread(self.ca.say, "clear-txt", host=f"{name}.")


async def delegated(at: Desk, name: str, label: str, to: str | None = None) -> Any:
    domain = await at.domain(name, challenge_delegation=label)
    base = name.removeprefix("*.")
    at.ca.say("set-cname", host=f"_acme-challenge.{base}.", target=to or f"{label}.{ZONE}.")
    return domain


async def test_a_wildcard_that_delegates_its_challenge(at: Desk) -> None:
    at.provider = provider = ByManagement(at.ca)
    domain = await delegated(at, "*.wild.example.com", "d1")
    await at.issue(challenge_zone=ZONE, acme_dns="exec", acme_dns_program=Path("/bin/false"))
    (order,) = await at.orders(domain)
    assert (order["state"], order["challenge"]) == ("issued", "dns-01"), order["error_detail"]
    (version,) = await at.chain(domain)
    leaf = x509.load_pem_x509_certificate(version["chain_pem"].encode())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["*.wild.example.com"]
    assert provider.said == [("present", ZONE, f"d1.{ZONE}"), ("cleanup", ZONE, f"d1.{ZONE}")]


async def test_a_wildcard_where_names_are_proved_otherwise(at: Desk) -> None:
    """Nothing else proves a wildcard, whatever `acme_challenges` prefers for other names."""
    at.provider = ByManagement(at.ca)
    domain = await delegated(at, "*.only.example.com", "d4")
    away = Path("/bin/false")
    await at.issue(challenge_zone=ZONE, acme_dns="exec", acme_dns_program=away, acme_challenges=("http-01",))
    (order,) = await at.orders(domain)
    assert (order["state"], order["challenge"]) == ("issued", "dns-01"), order["error_detail"]


async def test_a_program_writes_the_record(at: Desk, tmp_path: Path) -> None:
    program, log = tmp_path / "hook", tmp_path / "said"
    program.write_text(HOOK.format(python=sys.executable, control=at.ca.control, log=str(log)))
    program.chmod(0o755)
    domain = await delegated(at, "*.hook.example.com", "d2")
    await at.issue(challenge_zone=ZONE, acme_dns="exec", acme_dns_program=program)
    (order,) = await at.orders(domain)
    assert order["state"] == "issued", order["error_detail"]
    said = [line.split() for line in log.read_text().splitlines()]
    assert [(verb, name) for verb, name, _ in said] == [("present", f"d2.{ZONE}"), ("cleanup", f"d2.{ZONE}")]


@pytest.mark.parametrize("target", ["other.example.org.", f"somebody-elses.{ZONE}.", f"d3.{ZONE}.example.org."])
async def test_an_alias_to_anything_but_its_own_label_is_not_followed(at: Desk, target: str) -> None:
    at.provider = provider = ByManagement(at.ca)
    domain = await delegated(at, "*.other.example.com", "d3", target)
    before = at.ca.orders()
    await at.issue(challenge_zone=ZONE, acme_dns="exec", acme_dns_program=Path("/bin/false"))
    (order,) = await at.orders(domain)
    assert (order["state"], order["error_code"]) == ("failed", "not_delegated")
    assert provider.said == [] and at.ca.orders() == before


async def test_a_wildcard_where_nobody_writes_records(at: Desk) -> None:
    domain = await at.domain("*.none.example.com")
    await at.issue()
    assert [(each["state"], each["error_code"]) for each in await at.orders(domain)] == [("failed", "no_challenge")]


class TestPlace:
    def of(self, name: str, chain: tuple[str, ...] = (), **settings: Any) -> Any:
        control = dataclasses.replace(SETTINGS, **{"challenge_zone": ZONE, **settings})
        return acme_dns01.place(control, SimpleNamespace(name=name, challenge_delegation="d1"), chain)

    def test_where_the_records_go(self) -> None:
        assert self.of("*.a.example.com", (f"d1.{ZONE}",)) == (ZONE, f"d1.{ZONE}")
        assert self.of("a.example.com", ("x.example.com", f"d1.{ZONE}")) == (ZONE, f"d1.{ZONE}")
        assert self.of("a.example.com") is None
        assert self.of("a.example.com", acme_dns_zones=("example.com",)) == (
            "example.com",
            "_acme-challenge.a.example.com",
        )
        assert self.of("aexample.com", acme_dns_zones=("example.com",)) is None
        assert self.of("a.example.com", ("elsewhere.example.org",), acme_dns_zones=("example.com",)) is None


class TestPrograms:
    def provider(self, program: Path, **settings: Any) -> acme_dns01.Provider:
        found = acme_dns01.provider(
            dataclasses.replace(SETTINGS, acme_dns="exec", acme_dns_program=program, **settings)
        )
        assert found is not None
        return found

    def script(self, folder: Path, text: str) -> Path:
        path = folder / "hook"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    async def test_no_shell_reads_the_arguments_and_nothing_of_ours_is_in_its_environment(self, tmp_path: Path) -> None:
        said = tmp_path / "said"
        program = self.script(tmp_path, f'printf "%s\\n" "$@" > {said}; env >> {said}')
        await self.provider(program).present("z", "a.example.com", "x; touch /tmp/owned `id` $(id)")
        lines = said.read_text().splitlines()
        assert lines[:3] == ["present", "a.example.com", "x; touch /tmp/owned `id` $(id)"]
        assert not [line for line in lines[3:] if line.split("=")[0] not in ("PATH", "PWD", "SHLVL", "_", "OLDPWD")]

    @pytest.mark.parametrize(
        ("text", "why"), [("echo no zone >&2; exit 3", "ended with 3: no zone"), ("sleep 60", "longer than")]
    )
    async def test_a_program_that_fails_or_hangs(self, tmp_path: Path, text: str, why: str) -> None:
        program = self.script(tmp_path, text)
        with pytest.raises(AcmeError, match=why) as refused:
            await self.provider(program, acme_dns_seconds=1.0 if "sleep" in text else 30.0).present("z", "a", "v")
        assert refused.value.code == "dns_provider"

    async def test_a_program_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(AcmeError, match="cannot be run"):
            await self.provider(tmp_path / "nothing").present("z", "a", "v")

    @pytest.mark.parametrize(
        "settings",
        [
            {"acme_dns": "exec"}, {"acme_dns": "exec", "acme_dns_program": Path("relative")}, {"acme_dns": "magic"},
            {"acme_dns": "rfc2136"}, {"acme_dns": "rfc2136", "acme_dns_server": "127.0.0.1:no"},
            {"acme_dns": "rfc2136", "acme_dns_server": "127.0.0.1", "acme_dns_key": Secret("not base64!")},
            {
                "acme_dns": "rfc2136", "acme_dns_server": "127.0.0.1", "acme_dns_key": Secret("AAAA"),
                "acme_dns_key_algorithm": "x",
            },
        ],
    )  # fmt: skip
    def test_settings_that_make_no_provider(self, settings: dict[str, Any]) -> None:
        with pytest.raises(Problem) as refused:
            acme_dns01.provider(dataclasses.replace(SETTINGS, **settings))
        assert refused.value.code == "config.invalid"


class Zone:
    """A name server that takes signed updates of one zone."""

    def __init__(self, key: dns.tsig.Key) -> None:
        self.keyring = {key.name: key}
        self.records: set[tuple[str, str]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
        answer: dns.message.Message
        try:
            update: Any = dns.message.from_wire(wire, keyring=self.keyring)
            answer = dns.message.make_response(update)
            answer.set_rcode(self._apply(update))
        except (dns.tsig.PeerError, dns.exception.DNSException):
            answer = dns.message.make_response(
                dns.message.from_wire(wire, ignore_trailing=True, continue_on_error=True, keyring=False)
            )
            answer.set_rcode(dns.rcode.NOTAUTH)
        out = answer.to_wire()
        writer.write(len(out).to_bytes(2) + out)
        writer.close()

    def _apply(self, update: Any) -> dns.rcode.Rcode:
        if update.opcode() != dns.opcode.UPDATE or not update.had_tsig:
            return dns.rcode.REFUSED
        if update.zone[0].name != dns.name.from_text(ZONE):
            return dns.rcode.NOTZONE
        for rrset in update.update:
            for item in rrset:
                entry = (rrset.name.to_text(omit_final_dot=True), b"".join(item.strings).decode())
                if rrset.deleting == dns.rdataclass.NONE:
                    self.records.discard(entry)
                else:
                    assert (rrset.rdtype, rrset.ttl) == (dns.rdatatype.TXT, 60)
                    self.records.add(entry)
        return dns.rcode.NOERROR


async def test_updates_are_signed_and_a_wrong_key_changes_nothing() -> None:
    secret = b"0123456789abcdef0123456789abcdef"
    zone = Zone(dns.tsig.Key("portico.", secret, "hmac-sha256"))
    server = await asyncio.start_server(zone.serve, "127.0.0.1", 0)

    def made(key: bytes) -> acme_dns01.Provider:
        found = acme_dns01.provider(dataclasses.replace(
            SETTINGS, acme_dns="rfc2136", acme_dns_server=f"127.0.0.1:{server.sockets[0].getsockname()[1]}",
            acme_dns_key_name="portico", acme_dns_key=Secret(base64.b64encode(key).decode()), acme_dns_seconds=10.0,
        ))  # fmt: skip
        assert found is not None
        return found

    try:
        provider = made(secret)
        await provider.present(ZONE, f"d1.{ZONE}", "one")
        await provider.present(ZONE, f"d1.{ZONE}", "two")
        assert zone.records == {(f"d1.{ZONE}", "one"), (f"d1.{ZONE}", "two")}
        await provider.cleanup(ZONE, f"d1.{ZONE}", "one")
        assert zone.records == {(f"d1.{ZONE}", "two")}
        with pytest.raises(AcmeError) as refused:
            await provider.present("example.org", "d1.example.org", "x")
        assert refused.value.code == "dns_provider"
        with pytest.raises(AcmeError):
            await made(b"x" * 32).present(ZONE, f"d1.{ZONE}", "three")
        assert zone.records == {(f"d1.{ZONE}", "two")}
    finally:
        server.close()
    with pytest.raises(AcmeError, match="not taken"):
        await provider.present(ZONE, f"d1.{ZONE}", "late")
