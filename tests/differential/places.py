"""Targets and the ways to them: directly, and through an HTTP and an HTTPS tunnel of one agent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.differential.exact import Way
from tests.differential.verdicts import Verdicts
from tests.system.platform import Account, Child, Up


class Tunnels(Child):
    """``portico start`` with an HTTP tunnel ``name`` to each address."""

    def __init__(self, where: Account, folder: Path, addresses: dict[str, str], **settings: object) -> None:
        config = folder / "portico.yml"
        rows = "".join(f"  {name}:\n    addr: {address}\n" for name, address in addresses.items())
        config.write_text(f"version: 1\ntunnels:\n{rows}", encoding="utf-8")
        own = {"server": where.api_url, "agent_key": where.agent_key, "config_dir": folder / "config"}
        args = ["start", "--all", "--config", str(config), "--json"]
        super().__init__("agent-start", args, folder, own | settings)
        count = len(addresses)
        self.wait_for(lambda: self.out.count('"event": "online"') >= count, 30, f"{count} tunnels")


@dataclass(frozen=True)
class Place:
    """The ports of the targets by name, and the platform in front of them."""

    up: Up
    ports: dict[str, int]
    verdicts: Verdicts

    def host(self, target: str) -> str:
        """The Host of every request to ``target``, also of direct ones."""
        return f"{target}.localhost:{self.up.http_port}"

    def ways(self, target: str) -> tuple[Way, Way, Way]:
        """Direct, by HTTP, by HTTPS."""
        return (
            Way("direct", self.ports[target]),
            Way("http", self.up.http_port),
            Way("https", self.up.https_port, f"{target}.localhost"),
        )
