"""Certificates of custom domains at a real relay: held ready, switched to, refused, kept on disk; the control plane is small."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from portico.errors import Problem
from portico.kit import keyfiles
from portico.kit.envelope import Keys
from portico.relay.sealed import Trust
from portico.relay.server import Relay
from portico.relay.vault import NO_KEY
from portico.settings import RelaySettings, Secret
from tests.relay.authorities import authority, certificate, trusting
from tests.relay.doubles import KEY, port
from tests.relay.edge_api import EdgeApi, Stream
from tests.relay.sealing import SIGNER, Sealed, attach, change, key_files, row, sealed

HOST = "app.example.com"


class Control:
    """The control plane: what is on the stream, and what it hands out."""

    def __init__(self, api: EdgeApi) -> None:
        self.api, self.store = api, attach(api)
        self.rows: dict[str, dict[str, Any]] = {}
        self.version = 1
        self.open: list[Stream] = []
        api.scripts = [self._script]

    async def _script(self, stream: Stream) -> None:
        await stream.head()
        self.open.append(stream)
        await stream.line(self.snapshot())
        while True:
            await asyncio.sleep(0.5)
            await stream.line({"type": "heartbeat", "version": self.version, "time": 0})

    def snapshot(self) -> dict[str, Any]:
        state = {
            "keys": [KEY.public_jwk()], "tunnels": [], "ended": [], "organizations": [],
            "certificates": list(self.rows.values()),
        }  # fmt: skip
        return {"type": "snapshot", "version": self.version, "time": 0, "state": state}

    async def tell(self, active: Sealed | None = None, staged: Sealed | None = None) -> None:
        """The stream says how a domain stands."""
        told = change(active, staged)
        self.rows[told["certificate"]["domain"]] = told["certificate"]
        await self.delta(told)

    async def delta(self, *changes: dict[str, Any]) -> None:
        self.version += 1
        for stream in self.open:
            await stream.line({"type": "delta", "version": self.version, "changes": list(changes)})

    async def said(self, version: Sealed, state: str) -> dict[str, Any]:
        """Wait until the relay says so of a version."""

        def there() -> bool:
            return (self.store.last(version) or {}).get("state") == state

        try:
            await self.api.until(there, 30)
        except TimeoutError:
            raise AssertionError(f"last said: {self.store.last(version)}") from None
        return self.store.last(version) or {}


@pytest.fixture
async def control() -> AsyncIterator[Control]:
    api = EdgeApi()
    await api.start()
    yield Control(api)
    await api.stop()


Start = Callable[..., Awaitable[Relay]]


@pytest.fixture
async def start(control: Control, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts relays on one state folder."""
    running: list[Relay] = []

    async def go(**more: Any) -> Relay:
        given = key_files(tmp_path) | {"public_port": 0, "https_port": 0, "control_port": 0, "exempt_loopback": True}
        given |= {"api_url": control.api.url, "state_dir": tmp_path / "state", "drain_seconds": 0.1}
        relay = Relay(RelaySettings(relay_key=Secret("tnl_rly_unused"), **{**given, **more}))
        running.append(relay)
        await relay.start()
        return relay

    yield go
    for relay in running:
        await relay.stop()


async def served(relay: Relay, host: str = HOST) -> str | None:
    """The fingerprint that a TLS client sees; ``None`` when the relay has nothing for the name. It verifies the chain."""
    context = trusting(authority("example.com"), authority("other.test"))
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port(relay, 2), ssl=context, server_hostname=host)
    except (ssl.SSLError, ConnectionError):
        return None
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return hashlib.sha256(found).hexdigest()


def kept(tmp_path: Path, domain: str = "dom_1") -> Path:
    return tmp_path / "state" / "certificates" / f"{domain}.json"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def serving(control: Control, start: Start, **more: Any) -> tuple[Relay, Sealed]:
    """A relay that serves version 1."""
    relay, first = await start(**more), sealed(version=1)
    control.store.add(first)
    await control.tell(staged=first)
    await control.said(first, "staged")
    await control.tell(active=first)
    await control.said(first, "active")
    return relay, first


class TestTwoPhases:
    async def test_staged_is_not_served_and_the_switch_is_one_step(self, control: Control, start: Start) -> None:
        relay, first = await serving(control, start)
        assert await served(relay) == first.made.fingerprint
        second = sealed(version=2)
        control.store.add(second)
        await control.tell(active=first, staged=second)
        assert (await control.said(second, "staged"))["fingerprint"] == second.made.fingerprint
        assert relay.vault.counts() == {"served": 1, "staged": 1, "refused": 0, "behind": 0}
        assert await served(relay) == first.made.fingerprint
        # From here on nobody answers but the stream: what is held is enough.
        control.store.down = True
        await control.tell(active=second)
        await until(lambda: relay.vault._domains["dom_1"].floor == 2)
        assert await served(relay) == second.made.fingerprint
        control.store.down = False
        await control.said(second, "active")

    async def test_one_that_was_not_staged_is_caught_up_with(self, control: Control, start: Start) -> None:
        relay, first = await serving(control, start)
        second = sealed(version=2)
        control.store.down = True
        await control.tell(active=second)
        await until(relay.vault.behind)
        assert not relay.vault.ready() and not relay.control.ready()
        assert relay.vault.counts()["behind"] == 1
        assert await served(relay) == first.made.fingerprint
        control.store.add(second)
        control.store.down = False
        await control.said(second, "active")
        assert relay.control.ready() and await served(relay) == second.made.fingerprint

    async def test_a_removed_domain_is_served_no_more(self, control: Control, start: Start, tmp_path: Path) -> None:
        relay, first = await serving(control, start)
        await until(kept(tmp_path).exists)
        await control.delta({"kind": "certificate_removed", "domain": "dom_1"})
        await until(lambda: not len(relay.vault) and '"serving":null,"ready":null' in kept(tmp_path).read_text())
        assert await served(relay) is None
        # Nothing of what was served is left but its number.
        ends = int(first.made.not_after.timestamp())
        assert json.loads(kept(tmp_path).read_text()) == {
            "format": 1, "source": control.api.url, "floor": 1, "ends": ends, "serving": None, "ready": None,
        }  # fmt: skip

    async def test_a_removed_domain_does_not_come_back_older(
        self, control: Control, start: Start, tmp_path: Path
    ) -> None:
        """Who can write the stream removes the domain and names an older version, whose key may be known to others by now."""
        relay, first = await serving(control, start)
        third = sealed(version=3)
        control.store.add(third)
        await control.tell(active=third)
        await control.said(third, "active")
        for restart in (False, True):
            control.rows.clear()
            await control.delta({"kind": "certificate_removed", "domain": "dom_1"})
            await until(lambda: kept(tmp_path).exists() and '"serving":null,"ready":null' in kept(tmp_path).read_text())
            if restart:
                await relay.stop()
                control.open.clear()
                relay = await start()
                await until(lambda: bool(control.open))
            control.store.acks.clear()
            await control.tell(active=first)
            assert (await control.said(first, "failed"))["floor"] == 3
            assert await served(relay) is None
        control.rows.clear()
        await relay.stop()
        # When nothing of it could be served any more, nothing is kept.
        old = json.loads(kept(tmp_path).read_text()) | {"ends": 1}
        kept(tmp_path).write_text(json.dumps(old))
        await start()
        assert not kept(tmp_path).exists()

    async def test_many_domains_in_few_questions(self, control: Control, start: Start) -> None:
        versions = [sealed(f"h{n}.example.com", domain=f"dom_{n}") for n in range(120)]
        control.store.add(*versions)
        control.rows = {one.manifest.domain: row(one) for one in versions}
        relay = await start()
        # The port opened when all were there.
        assert len(relay.vault) == 120 and not relay.vault.behind()
        assert len(control.store.asked) == 3 and max(map(len, control.store.asked)) == 50
        assert await served(relay, "h77.example.com") == versions[77].made.fingerprint
        await until(
            lambda: {ack["state"] for ack in control.store.acks} == {"active"} and len(control.store.acks) >= 120
        )


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "why"),
        [
            (lambda: sealed(version=2, public=X25519PrivateKey.generate().public_key()), "no key that is here"),
            (lambda: sealed(version=2, region="us"), "does not open"),
            (lambda: sealed(version=2, signer=type(SIGNER).generate()), "unknown key"),
            (lambda: sealed("b.example.com", version=2, made=certificate("app.example.com")), "host name"),
            (lambda: sealed(version=2, made=certificate(HOST, days_ago=4000)), "ended"),
        ],
    )
    async def test_what_served_goes_on(
        self, control: Control, start: Start, make: Callable[[], Sealed], why: str
    ) -> None:
        relay, first = await serving(control, start)
        bad = make()
        control.store.add(bad)
        await control.tell(active=first, staged=bad)
        assert why in (await control.said(bad, "failed"))["reason"]
        await control.tell(active=bad)  # and if it is told to switch all the same
        await until(lambda: relay.snapshot.certificates["dom_1"].staged is None)
        await until(lambda: relay.vault.refusals == 1)
        assert await served(relay) == first.made.fingerprint
        assert relay.control.ready()

    async def test_a_step_back_is_refused_for_good(self, control: Control, start: Start, tmp_path: Path) -> None:
        relay, first = await serving(control, start)
        third = sealed(version=3)
        control.store.add(third)
        await control.tell(active=third)
        await control.said(third, "active")
        await control.tell(active=first)
        refusal = await control.said(first, "failed")
        assert "step back" in refusal["reason"] and refusal["floor"] == 3
        assert await served(relay) == third.made.fingerprint
        # Nor does it come by a snapshot after a restart, when the relay has nothing but its copy.
        control.store.acks.clear()
        await relay.stop()
        again = await start()
        assert (await control.said(first, "failed"))["floor"] == 3
        assert await served(again) == third.made.fingerprint

    async def test_another_certificate_under_a_number_that_served(self, control: Control, start: Start) -> None:
        relay, first = await serving(control, start)
        other = sealed(version=1, spoilt={"certificate": "crt_other"})
        other.bundle["certificate"] = "crt_other"
        control.store.add(other)
        await control.tell(active=other)
        assert "step back" in (await control.said(other, "failed"))["reason"]
        assert await served(relay) == first.made.fingerprint

    async def test_the_stream_and_the_manifest_disagree(self, control: Control, start: Start) -> None:
        relay, first = await serving(control, start)
        second, liar = sealed(version=2), sealed(version=2)
        control.store.add(second)  # under the same id as liar's
        await control.tell(active=first, staged=liar)
        assert "fingerprint" in (await control.said(liar, "failed"))["reason"]
        foreign = sealed(
            "x.other.test", version=5, domain="dom_2", made=certificate("x.other.test", domain="other.test")
        )
        control.store.bundles["crt_dom_1_5"] = foreign.bundle | {"certificate": "crt_dom_1_5"}
        row = {"domain": "dom_1", "hostname": HOST, "active": foreign.ref | {"id": "crt_dom_1_5"}}
        await control.delta({"kind": "certificate", "certificate": row})
        await until(lambda: "crt_dom_1_5" in relay.vault._domains["dom_1"].refused)
        assert await served(relay) == first.made.fingerprint and await served(relay, "x.other.test") is None

    async def test_the_stream_names_another_host(self, control: Control, start: Start) -> None:
        _, first = await serving(control, start)
        second = sealed(version=2)
        control.store.add(second)
        row = {"domain": "dom_1", "hostname": "other.example.com", "active": first.ref, "staged": second.ref}
        await control.delta({"kind": "certificate", "certificate": row})
        assert "host name" in (await control.said(second, "failed"))["reason"]

    async def test_a_relay_without_a_key_says_so(self, control: Control, start: Start) -> None:
        for more in ({"region_key_files": ()}, {"certificate_signers": ()}):
            control.store.acks.clear()
            relay, first = await start(**more), sealed()
            await control.tell(staged=first)
            assert (await control.said(first, "failed"))["reason"] == NO_KEY
            assert relay.control.ready()
            await relay.stop()

    async def test_a_key_file_that_others_can_read(self, start: Start, tmp_path: Path) -> None:
        key_files(tmp_path)
        path = (tmp_path / "region.key").rename(tmp_path / "readable.key")
        path.chmod(0o644)
        with pytest.raises(Problem, match=r"region_key_files: .* has mode 0644"):
            await start(region_key_files=(path,))
        with pytest.raises(Problem, match="certificate_signers"):
            await start(certificate_signers=("nonsense",))


class TestRestart:
    async def test_without_a_control_plane(self, control: Control, start: Start, tmp_path: Path) -> None:
        relay, first = await serving(control, start)
        await until(lambda: kept(tmp_path).exists() and '"serving":{' in kept(tmp_path).read_text())
        await relay.stop()
        await control.api.stop()
        again = await start()
        assert await served(again) == first.made.fingerprint

    async def test_the_copy_is_sealed(self, control: Control, start: Start, tmp_path: Path) -> None:
        _, first = await serving(control, start)
        await until(kept(tmp_path).exists)
        lines = [line for line in first.key_pem().splitlines() if b"---" not in line]
        for path in tmp_path.rglob("*"):
            if path.is_file() and path.name != "region.key":
                data = path.read_bytes()
                assert not any(line in data for line in lines), path
        assert kept(tmp_path).stat().st_mode & 0o777 == 0o600

    async def test_a_staged_version_survives_and_is_switched_to(
        self, control: Control, start: Start, tmp_path: Path
    ) -> None:
        relay, first = await serving(control, start)
        second = sealed(version=2)
        control.store.add(second)
        await control.tell(active=first, staged=second)
        await control.said(second, "staged")
        await until(lambda: kept(tmp_path).exists() and '"ready":{' in kept(tmp_path).read_text())
        await relay.stop()
        # It was switched to while the relay was away: the relay serves nothing older once it is there again.
        control.open.clear()
        await control.tell(active=second)
        control.store.asked.clear()
        again = await start()
        assert await served(again) == second.made.fingerprint
        assert not control.store.asked  # it was there already

    @pytest.mark.parametrize("cut", [0, 10, 200, -20])
    async def test_a_truncated_copy_is_asked_for_anew(
        self, control: Control, start: Start, tmp_path: Path, cut: int
    ) -> None:
        relay, first = await serving(control, start)
        await until(kept(tmp_path).exists)
        await relay.stop()
        kept(tmp_path).write_bytes(kept(tmp_path).read_bytes()[:cut])
        again = await start()
        assert await served(again) == first.made.fingerprint

    @pytest.mark.parametrize("member", ["sealed", "chain", "manifest", "wraps", "version"])
    async def test_a_copy_that_was_changed_is_not_served(
        self, control: Control, start: Start, tmp_path: Path, member: str
    ) -> None:
        relay, _ = await serving(control, start)
        await until(lambda: kept(tmp_path).exists() and '"serving":{' in kept(tmp_path).read_text())
        await relay.stop()
        await control.api.stop()
        copy = json.loads(kept(tmp_path).read_text())
        other = sealed(version=9)
        copy["serving"][member] = other.bundle[member]
        kept(tmp_path).write_text(json.dumps(copy))
        again = await start()
        assert await served(again) is None

    @pytest.mark.parametrize("change", ["facts", "mark", "signer", "region key"])
    async def test_what_has_no_mark_of_this_relay_is_looked_at_as_if_it_came_anew(
        self, control: Control, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        """Facts that somebody wrote, a mark of another, or a relay that trusts and holds something else than when it marked."""
        relay, first = await serving(control, start)
        await until(lambda: kept(tmp_path).exists() and '"serving":{' in kept(tmp_path).read_text())
        await relay.stop()
        await control.api.stop()
        looked: list[str] = []
        real = Trust.hold
        monkeypatch.setattr(Trust, "hold", lambda *given, **more: (looked.append("anew"), real(*given, **more))[1])
        again = await start()
        assert await served(again) == first.made.fingerprint and not looked
        await again.stop()
        copy, more = json.loads(kept(tmp_path).read_text()), dict[str, Any]()
        match change:
            case "facts":
                copy["serving"]["facts"] |= {"names": ["victim.example.com"], "not_after": 2**40}
            case "mark":
                copy["serving"]["mark"] = Keys([X25519PrivateKey.generate()]).mark(b"x").hex()
            case "signer":
                more = {"certificate_signers": (type(SIGNER).generate().public_jwk()["x"],)}
            case "region key":
                other = tmp_path / "other.key"
                other.write_text(keyfiles.new_region_key())
                other.chmod(0o600)
                more = {"region_key_files": (other,)}
        kept(tmp_path).write_text(json.dumps(copy))
        again = await start(**more)
        usable = change in ("facts", "mark")
        assert looked == ["anew"] and await served(again) == (first.made.fingerprint if usable else None)
        assert await served(again, "victim.example.com") is None

    async def test_a_copy_of_another_control_plane_is_left_alone(
        self, control: Control, start: Start, tmp_path: Path
    ) -> None:
        relay, _ = await serving(control, start)
        await until(kept(tmp_path).exists)
        await relay.stop()
        again = await start(api_url="http://127.0.0.1:9")
        assert await served(again) is None

    async def test_everything_is_said_again_to_a_new_stream(self, control: Control, start: Start) -> None:
        _, first = await serving(control, start)
        control.store.acks.clear()
        control.open.pop().cut()
        await control.said(first, "active")
