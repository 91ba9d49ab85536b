"""`GET /v1/events` for tests of its readers: newest first, pages, `since`, an outage on request."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.agent.api_server import Answer, TestApi, problem

START = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


class EventApi(TestApi):
    """A :class:`TestApi` with a history; ``add`` makes something happen, ``asked`` keeps the questions."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []
        self.asked: list[dict[str, list[str]]] = []
        self.routes["GET /v1/tunnels"] = lambda body: (200, {"data": self.tunnels(), "next_cursor": None})

    def tunnels(self) -> list[dict[str, Any]]:
        names = dict.fromkeys(event["name"] for event in self.events)
        return [
            {"id": f"tun_{name}", "name": name, "state": "online", "url": f"http://{name}.localhost"} for name in names
        ]

    def add(self, name: str, kind: str, seconds: float, **details: Any) -> str:
        """An event ``seconds`` after the start."""
        key = f"evt_{len(self.events):04}"
        at = (START + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")
        self.events.append(
            {"id": key, "at": at, "tunnel": f"tun_{name}", "name": name, "kind": kind, "details": details}
        )
        return key

    def find(self, method: str, path: str) -> Any:
        parts = urlsplit(path)
        if (method, parts.path) == ("GET", "/v1/events"):
            return lambda body: self.answer(parse_qs(parts.query))
        return super().find(method, parts.path)

    def answer(self, query: dict[str, list[str]]) -> Answer:
        self.asked.append(query)
        wanted = query.get("tunnel")
        if wanted and not set(wanted) <= {row["id"] for row in self.tunnels()}:
            return problem(404, "tunnel.not_found", "there is no such tunnel")
        since = datetime.fromisoformat(query.get("since", ["2000-01-01T00:00:00Z"])[0])
        rows = [
            event
            for event in sorted(self.events, key=lambda e: str(e["id"]), reverse=True)
            if datetime.fromisoformat(event["at"]) >= since
            and (not wanted or event["tunnel"] in wanted)
            and event["id"] < query.get("cursor", ["z"])[0]
        ]
        limit = int(query["limit"][0])
        return 200, {"data": rows[:limit], "next_cursor": rows[limit - 1]["id"] if len(rows) > limit else None}
