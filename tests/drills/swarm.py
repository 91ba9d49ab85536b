"""Many agents in one process, each with a session, a connection and a tunnel of its own: `python -m tests.drills.swarm COUNT`.

Writes a JSON line whenever the number of agents that are online changed, at most ten times a second: ``online`` and ``at``
(monotonic time, the same in every process of a machine).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any, ClassVar

from portico.agent.api import Api
from portico.agent.client import Agent
from portico.agent.tunnel import Events, Tunnel
from portico.kit import loop
from portico.settings import AgentSettings, agent_settings
from portico.wire.session import Session
from portico.wire.stream import Sink, Stream

#: Agents that begin at once: the first start is not what is drilled.
STARTS_AT_ONCE = 20
PORTICO = "http://localhost:1"


class Answers:
    """Serves every request with its own name."""

    def __init__(self, name: str) -> None:
        self._body = name.encode()

    def on_request(self, stream: Stream, head: list[bytes], flags: int) -> Sink | None:
        stream.send_response(200, [b"OK", b"Content-Length", b"%d" % len(self._body)], end=False)
        stream.send_data(self._body, end=True)
        return None

    def quick(self, session: Session, ident: int, payload: bytes) -> None: ...

    def on_open(self, stream: Stream, info: dict[str, Any]) -> Sink | None:
        return None


class Seen(Events):
    """Which tunnels are online now, of all agents."""

    online: ClassVar[set[str]] = set()

    def tunnel(self, tunnel: Tunnel) -> None:
        if tunnel.state == "online":
            self.online.add(tunnel.name)
        else:
            self.online.discard(tunnel.name)


async def one(number: int, settings: AgentSettings, api: Api, starting: asyncio.Semaphore) -> None:
    name = f"swarm-{number}"
    agent = Agent(settings, api, [({"name": name}, Answers(name), PORTICO)], Seen())
    async with starting:
        running = asyncio.create_task(agent.run())
        started = asyncio.create_task(agent.started.wait())
        await asyncio.wait({running, started}, return_when=asyncio.FIRST_COMPLETED)
    await running


async def main(count: int) -> None:
    settings = agent_settings()
    api = Api(settings.server, settings.agent_key, settings)
    starting = asyncio.Semaphore(STARTS_AT_ONCE)
    agents = [asyncio.create_task(one(n, settings, api, starting)) for n in range(count)]
    said = -1
    while not any(task.done() for task in agents):
        if len(Seen.online) != said:
            said = len(Seen.online)
            print(json.dumps({"online": said, "at": time.monotonic()}), flush=True)
        await asyncio.sleep(0.1)
    for task in agents:
        if task.done():
            task.result()


if __name__ == "__main__":
    loop.run(main(int(sys.argv[1])))
