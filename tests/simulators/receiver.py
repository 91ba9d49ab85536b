"""Where simulators deliver to in tests: keeps headers and bodies as they came, and answers what it is told."""

from __future__ import annotations

import json
from typing import Any

from portico.simulators.webhooks import WebhookReceiver


class Received(WebhookReceiver):
    """A receiver whose messages are JSON."""

    @property
    def address(self) -> str:
        return self.url.replace("localhost", "127.0.0.1")

    @property
    def documents(self) -> list[Any]:
        return [json.loads(got.body) for got in self.got]

    def clear(self) -> None:
        self.got.clear()
