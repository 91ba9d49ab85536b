"""The document describes what is served, and the check notices what would break a client."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tools import openapi

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return dict(json.loads(openapi.generate()))


def test_the_committed_document_is_current() -> None:
    assert openapi.CONTRACT.read_text(encoding="utf-8") == openapi.generate()


async def test_it_is_served_as_committed(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    answer = await client.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == document


def test_every_operation_answers_errors_with_the_problem_document(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "application/problem+json" in operation["responses"]["default"]["content"], (method, path)
            assert operation.get("description"), (method, path)


def _edit(document: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> list[str]:
    edited = copy.deepcopy(document)
    change(edited)
    return list(openapi.breaking(document, edited))


def _key_body(d: dict[str, Any]) -> Any:
    return d["components"]["schemas"]["KeyBody"]


def _whoami(d: dict[str, Any]) -> Any:
    return d["components"]["schemas"]["WhoAmI"]


class TestBreaking:
    def test_nothing_changed(self, document: dict[str, Any]) -> None:
        assert _edit(document, lambda d: None) == []

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda d: d["paths"].pop("/v1/whoami"), "/v1/whoami: removed"),
            (lambda d: d["paths"]["/v1/api-keys"].pop("post"), "POST /v1/api-keys: removed"),
            (lambda d: _whoami(d)["properties"].pop("permissions"), ".permissions: removed"),
            (lambda d: _whoami(d)["required"].remove("kind"), ".kind: may be absent now"),
            (lambda d: _whoami(d)["properties"]["kind"].update(type="integer"), ".kind: is integer"),
            (lambda d: d["components"]["schemas"]["UserRef"]["properties"].pop("email"), ".user.email: removed"),
            (lambda d: _key_body(d)["required"].append("scopes"), ".scopes: now required"),
            (lambda d: _key_body(d)["properties"]["kind"].update(enum=["api"]), ".kind: fewer values"),
            (lambda d: _key_body(d)["properties"]["name"].update(maxLength=10), ".name: maxLength is now 10"),
            (lambda d: _key_body(d)["properties"]["name"].update(type="integer"), ".name: takes integer"),
            (lambda d: _key_body(d)["properties"].pop("expires_at"), ".expires_at: no longer taken"),
            (
                lambda d: d["paths"]["/v1/audit"]["get"]["parameters"][0].update(required=True),
                "is now required",
            ),
            (lambda d: d["paths"]["/v1/audit"]["get"]["responses"].pop("200"), "response 200 removed"),
        ],
    )
    def test_is_noticed(self, document: dict[str, Any], change: Callable[[Any], None], expected: str) -> None:
        assert any(expected in line for line in _edit(document, change)), _edit(document, change)

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d["paths"].update({"/v1/new": {"get": {"responses": {}}}}),
            lambda d: _whoami(d)["properties"].update(extra={"type": "string"}),
            lambda d: _key_body(d)["properties"].update(extra={"type": "string"}),
            lambda d: _key_body(d)["properties"]["kind"].update(enum=["agent", "api", "relay"]),
            lambda d: _key_body(d)["properties"]["name"].update(maxLength=200),
        ],
    )
    def test_additions_are_free(self, document: dict[str, Any], change: Callable[[Any], None]) -> None:
        assert _edit(document, change) == []


class TestTool:
    def test_check_fails_on_a_broken_base(
        self, document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = copy.deepcopy(document)
        base["paths"]["/v1/gone"] = {"get": {"responses": {}}}
        file = tmp_path / "base.json"
        file.write_text(json.dumps(base), encoding="utf-8")
        assert openapi.check(file) == 1
        assert "breaks clients: /v1/gone: removed" in capsys.readouterr().out

    def test_check_fails_when_stale(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: dict[str, Any], capsys: Any
    ) -> None:
        stale = tmp_path / "openapi.json"
        stale.write_text("{}", encoding="utf-8")
        base = tmp_path / "base.json"
        base.write_text(json.dumps(document), encoding="utf-8")
        monkeypatch.setattr(openapi, "CONTRACT", stale)
        assert openapi.check(base) == 1
        assert "stale" in capsys.readouterr().out
