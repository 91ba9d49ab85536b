"""Many agents, or one with many tunnels, in one process: `python -m bench.fleet JSON`; real agents, many to a process.

The JSON: ``server``, ``key``, ``prefix``, ``agents``, ``tunnels`` (of each agent), ``port`` (the local app). When every tunnel is
online it prints one JSON line, ``seconds`` that took and the ``hosts``, and stays until it is asked to end.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from dataclasses import dataclass

from portico import settings
from portico.agent.api import Api
from portico.agent.client import Agent
from portico.agent.forward import Forwarder
from portico.agent.stats import Stats
from portico.agent.target import parse_target
from portico.agent.tunnel import Events
from portico.kit import loop
from portico.settings import AgentSettings, Secret

#: Agents of one process that connect at the same time.
AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Fleet:
    """What the process is asked for."""

    server: str
    key: str
    prefix: str
    agents: int
    tunnels: int
    port: int


async def serve(asked: Fleet) -> None:
    config = settings.load(AgentSettings, overrides={})
    api = Api(asked.server, Secret(asked.key), config)
    target = parse_target(str(asked.port))
    stats = Stats()
    began = time.perf_counter()
    agents: list[Agent] = []
    tasks: list[asyncio.Task[None]] = []
    room = asyncio.Semaphore(AT_ONCE)

    async def start(number: int) -> None:
        names = [f"{asked.prefix}-{number * asked.tunnels + n}" for n in range(asked.tunnels)]
        served = [({"protocol": "http", "name": name}, Forwarder(target, config, stats), target.url) for name in names]
        agent = Agent(config, api, served, Events())
        agents.append(agent)
        async with room:
            tasks.append(asyncio.create_task(agent.run()))
            while not all(tunnel.state == "online" for tunnel in agent.tunnels):
                if tasks[-1].done():
                    tasks[-1].result()
                await asyncio.sleep(0.01)

    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    await asyncio.gather(*(start(number) for number in range(asked.agents)))
    hosts = [tunnel.url.split("//")[1].split(":")[0].rstrip("/") for agent in agents for tunnel in agent.tunnels]
    print(json.dumps({"seconds": time.perf_counter() - began, "hosts": hosts}), flush=True)
    await over.wait()
    for agent in agents:
        agent.stop()
    await asyncio.gather(*tasks, return_exceptions=True)
    await api.aclose()


if __name__ == "__main__":
    loop.run(serve(Fleet(**json.loads(sys.argv[1]))))
