"""The process with all three simulators, as `portico up --demo-billing` runs it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from portico.embedded.units import portico_argv


@contextmanager
def running(folder: Path, webhooks: str) -> Iterator[dict[str, str]]:
    """Start it and wait until it says that it is ready; its settings. SIGTERM must end it well."""
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        portico_argv("simulators", str(folder), webhooks),
        env=os.environ | {"PORTICO_NOTIFY_FD": str(theirs)},
        pass_fds=[theirs],
    )
    os.close(theirs)
    try:
        with open(ours, encoding="ascii") as ear:
            assert ear.readline() == "READY=1\n"
            yield json.loads((folder / "settings.json").read_text())
    finally:
        process.terminate()
        code = process.wait(60)
    assert code == 0


def test_what_they_know_outlives_the_process(tmp_path: Path) -> None:
    webhooks = "http://127.0.0.1:9/v1/billing/webhooks"
    with running(tmp_path, webhooks) as first:
        auth = (first["PORTICO_STRIPE_SECRET_KEY"], "")
        made = httpx.post(
            f"{first['PORTICO_STRIPE_API_URL']}/v1/customers", data={"email": "a@example.com"}, auth=auth
        ).json()
        body = {"plan_id": first["PORTICO_RAZORPAY_PLANS"].split(",")[0].removeprefix("pro="), "total_count": 3}
        keys = (first["PORTICO_RAZORPAY_KEY_ID"], first["PORTICO_RAZORPAY_KEY_SECRET"])
        sub = httpx.post(f"{first['PORTICO_RAZORPAY_API_URL']}/v1/subscriptions", json=body, auth=keys).json()
        root = Path(first["PORTICO_PAYPAL_CERT_CA_FILE"]).read_text()
        for name in ("settings.json", "stripe.json", "razorpay.json", "paypal.json"):
            mode = (tmp_path / name).stat().st_mode if (tmp_path / name).exists() else 0o600
            assert stat.S_IMODE(mode) == 0o600, f"{name} holds keys"
    with running(tmp_path, webhooks) as second:
        found = httpx.get(f"{second['PORTICO_STRIPE_API_URL']}/v1/customers/{made['id']}", auth=auth)
        assert found.json()["email"] == "a@example.com"
        again = httpx.get(f"{second['PORTICO_RAZORPAY_API_URL']}/v1/subscriptions/{sub['id']}", auth=keys)
        assert again.json()["status"] == "created"
        assert Path(second["PORTICO_PAYPAL_CERT_CA_FILE"]).read_text() == root
        same = [name for name in first if not name.endswith(("_API_URL", "_HOSTS"))]
        assert {name: first[name] for name in same} == {name: second[name] for name in same}


def test_each_simulator_needs_a_port(tmp_path: Path) -> None:
    ports = {f"PORTICO_{name}_PORT": "0" for name in ("HTTP", "HTTPS", "CONTROL", "API")}
    ended = subprocess.run(
        portico_argv("up", "--demo-billing", "--data", str(tmp_path / "home")),
        env=os.environ | ports | {"PORTICO_SIMULATOR_PORTS": "0,0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0 and "simulator_ports" in ended.stderr
