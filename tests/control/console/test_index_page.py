"""/ in a browser: what this is and how to go on, without a session and without a dead link."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import httpx

from portico.control.app import create_app


async def test_says_how_to_connect_a_machine(settings: Any, db: Any) -> None:
    settings = replace(
        settings, api_url="https://portico.example", public_url="https://t.example", base_domain="t.example"
    )
    app = create_app(settings, db=db)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "portico login --server https://portico.example\n" in page.text
    assert "portico http 8000" in page.text
    assert "https://NAME.t.example" in page.text
    assert "set-cookie" not in page.headers


async def test_every_link_leads_somewhere(client: httpx.AsyncClient) -> None:
    links = re.findall(r'href="([^"]+)"', (await client.get("/")).text)
    assert {"/device", "/openapi.json"} <= set(links)
    for link in links:
        assert (await client.get(link, follow_redirects=True)).status_code == 200, link


async def test_headers(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert (await client.head("/")).status_code == 200
