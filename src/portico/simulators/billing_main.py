"""All three simulators in one process, for ``portico up --demo-billing``.

    await serve(folder, webhooks="http://127.0.0.1:7000/v1/billing/webhooks", sockets={"stripe": …, "razorpay": …, "paypal": …})

What they know is in ``folder`` (stripe.json, …), so that they go on after a restart. Once they listen,
``settings.json`` there has the
platform's settings that make it use them, as environment variables.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from portico.simulators.billing_server import ProviderSimulator
from portico.simulators.paypal import PayPalSimulator
from portico.simulators.razorpay import RazorpaySimulator
from portico.simulators.stripe import StripeSimulator

KINDS: Final[tuple[type[ProviderSimulator], ...]] = (StripeSimulator, RazorpaySimulator, PayPalSimulator)
SETTINGS_FILE: Final = "settings.json"
_ROOT_FILE: Final = "paypal-root.pem"


async def serve(
    folder: Path, *, webhooks: str, sockets: Mapping[str, socket.socket], ready: Callable[[], None] = lambda: None
) -> None:
    """Until SIGTERM or SIGINT."""
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, over.set)
    async with AsyncExitStack() as stack:
        found: dict[str, str] = {}
        for kind in KINDS:
            listener = sockets.get(kind.name)
            simulator = kind(
                webhook_url=f"{webhooks}/{kind.name}", state=folder / f"{kind.name}.json", listener=listener
            )
            await stack.enter_async_context(simulator)
            found |= simulator.settings()
            if isinstance(simulator, PayPalSimulator):
                (folder / _ROOT_FILE).write_text(simulator.root, encoding="ascii")
                found["paypal_cert_ca_file"] = str(folder / _ROOT_FILE)
        _write(folder / SETTINGS_FILE, {f"PORTICO_{name.upper()}": value for name, value in found.items()})
        ready()
        await over.wait()


def _write(path: Path, document: Mapping[str, str]) -> None:
    """Whole or not at all, for the owner alone: there are keys in it."""
    partial = path.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.write_text(json.dumps(document, indent=2), encoding="utf-8")
    partial.replace(path)
