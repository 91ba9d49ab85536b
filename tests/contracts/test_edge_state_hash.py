"""The control plane's snapshot, as its own code writes it, is what the relay's code reads; and both take one hash."""

from __future__ import annotations

import json
from typing import Any

from portico.control.edge.hub import heartbeat_line
from portico.control.edge.state import EdgeState
from portico.kit.jwt import SigningKey
from portico.relay.snapshot import Snapshot


def state(now: float, *, ended: list[dict[str, Any]] | None = None) -> EdgeState:
    tunnels = [
        {
            "id": f"tun_{i:04}",
            "organization": "org_1",
            "hosts": [f"t{i}.localhost", f"t{i}.example.com"],
            "state": "active" if i % 3 else "stopped",
            "generation": i,
        }
        for i in reversed(range(2500))
    ]
    keys = [SigningKey.generate().public_jwk() for _ in range(2)]
    return EdgeState(41, now, keys, tunnels, ended or [])


async def test_the_relay_takes_the_hash_that_the_control_plane_sends() -> None:
    ends = [{"session": f"ses_{i}", "code": "session.revoked", "until": 2_000_000_000 + i} for i in reversed(range(5))]
    sent = state(1_900_000_000.5, ended=ends)
    line = json.loads(await sent.line())
    snapshot = Snapshot(wall=lambda: 1_900_000_000.0)
    snapshot.apply(line)
    assert (snapshot.version, len(snapshot)) == (41, 2500)
    assert snapshot.digest() == line["hash"] == await sent.digest()


async def test_they_agree_when_the_control_plane_has_forgotten_what_is_over() -> None:
    ends = [{"session": f"ses_{i}", "code": "session.revoked", "until": 2_000_000_000 + i} for i in range(5)]
    before = state(1_900_000_000.5, ended=ends)
    snapshot = Snapshot(wall=lambda: 2_000_000_000.0)
    snapshot.apply(json.loads(await before.line()))
    later = EdgeState(41, 2_000_000_002.25, before.keys, before.tunnels, ends[3:])
    beat = json.loads(heartbeat_line(41, later.time, await later.digest()).text)
    assert snapshot.digest() != beat["hash"]
    assert snapshot.digest(at=beat["time"]) == beat["hash"]
