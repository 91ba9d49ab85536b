"""HTTPS of `portico up`, by programs that check certificates, with nothing but its own authority."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl

import pytest

from tests.system.platform import Up
from tests.system.targets import Request, app

pytestmark = [pytest.mark.system, pytest.mark.realtime]


async def curl(up: Up, *args: str) -> tuple[int, str]:
    """Exit status, and what it printed."""
    command = (shutil.which("curl") or "curl", "-sS", "--max-time", "10", "--noproxy", "*", *args)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


async def test_curl_with_the_development_authority(up: Up, host: str, target: socket.socket) -> None:
    """A name below a single label is matched by no wildcard: it has a certificate of its own, made when it is asked for."""
    ca, url = up.credentials["dev_ca_file"], f"https://{host}:{up.https_port}/"

    async def answer(request: Request) -> None:
        await request.respond(f"by {','.join(request.values('X-Forwarded-Proto'))}".encode())

    async with app(target, which=answer):
        assert await curl(up, "--cacert", ca, f"{url}which") == (0, "by https")
        assert await curl(up, "--cacert", ca, "--tls-max", "1.2", f"{url}which") == (0, "by https")
        # Nothing is trusted by itself.
        assert (await curl(up, f"{url}which"))[0] == 60
    status, page = await curl(up, "--cacert", ca, "-H", "Accept: text/html", f"https://localhost:{up.https_port}/")
    assert status == 0 and "<html" in page
    assert (await curl(up, "--cacert", ca, f"https://127.0.0.1:{up.https_port}/"))[0] == 0


async def test_a_wrong_name_is_told_so(up: Up) -> None:
    context = ssl.create_default_context(cafile=up.credentials["dev_ca_file"])
    with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
        await asyncio.open_connection("127.0.0.1", up.https_port, ssl=context, server_hostname="bank.example.com")


async def test_plain_http_on_the_port_is_told_so(up: Up) -> None:
    status, page = await curl(up, "-i", f"http://127.0.0.1:{up.https_port}/")
    assert status == 0 and " 400 " in page.splitlines()[0] and "this port speaks TLS" in page
