"""contracts/openapi.json: written from the code, checked for staleness and for changes that break a client.

    python tools/openapi.py --write           write the document
    python tools/openapi.py --check           fail when the committed document is stale or breaks the base
    python tools/openapi.py --check --base F  compare with F instead of the document at git HEAD

A change breaks a client when it takes something away that a client may use (a path, an operation, a response, a property
of a response, a value of a request's enum) or asks for something that it does not send (a required property or parameter,
a narrower type). Additions to responses and optional additions to requests are free.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ROOT / "contracts" / "openapi.json"
_METHODS = ("get", "put", "post", "delete", "patch", "head", "options")
_MAX_DEPTH = 40


def generate() -> str:
    """The document of the code as it is, in canonical form."""
    from portico.control import openapi
    from portico.control.app import create_app
    from portico.kit.sealing import new_master_key
    from portico.settings import ApiSettings, Secret

    # Nothing is opened: the pool connects on first use, and the document does not depend on settings.
    settings = ApiSettings(Secret("postgresql://nobody@localhost/none"), Secret(new_master_key()))
    app = create_app(settings)
    try:
        return json.dumps(openapi.document(app), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    finally:
        app.state.passwords.close()


def committed() -> dict[str, Any] | None:
    """The document at git HEAD; ``None`` when there is none (a new contract, or no checkout)."""
    found = subprocess.run(["git", "show", "HEAD:contracts/openapi.json"], cwd=ROOT, capture_output=True, check=False)
    return dict(json.loads(found.stdout)) if found.returncode == 0 else None


def breaking(base: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What a client of ``base`` would notice in ``new``, one line each."""
    for path, operations in base.get("paths", {}).items():
        if path not in new.get("paths", {}):
            yield f"{path}: removed"
            continue
        for method in (m for m in _METHODS if m in operations):
            where = f"{method.upper()} {path}"
            if method not in new["paths"][path]:
                yield f"{where}: removed"
                continue
            yield from _operation(where, base, operations[method], new, new["paths"][path][method])


def _operation(
    where: str, base: dict[str, Any], old: dict[str, Any], new: dict[str, Any], now: dict[str, Any]
) -> Iterator[str]:
    yield from _parameters(where, base, old, new, now)
    old_body, now_body = _content(old.get("requestBody")), _content(now.get("requestBody"))
    if now_body is not None and old_body is None and now["requestBody"].get("required"):
        yield f"{where}: now requires a body"
    if old_body is not None and now_body is not None:
        yield from _request(f"{where} body", base, old_body, new, now_body, 0)
        if now["requestBody"].get("required") and not old["requestBody"].get("required"):
            yield f"{where}: the body is now required"
    for status, response in old.get("responses", {}).items():
        if status not in now.get("responses", {}):
            yield f"{where}: response {status} removed"
            continue
        old_answer, now_answer = _content(response), _content(now["responses"][status])
        if old_answer is not None and now_answer is None:
            yield f"{where}: response {status} has no content any more"
        elif old_answer is not None and now_answer is not None:
            yield from _response(f"{where} {status}", base, old_answer, new, now_answer, 0)


def _parameters(
    where: str, base: dict[str, Any], old: dict[str, Any], new: dict[str, Any], now: dict[str, Any]
) -> Iterator[str]:
    before = {(p["in"], p["name"]): p for p in old.get("parameters", [])}
    after = {(p["in"], p["name"]): p for p in now.get("parameters", [])}
    for key, parameter in before.items():
        if key in after:
            name = f"{where} parameter {key[1]}"
            yield from _request(name, base, parameter.get("schema", {}), new, after[key].get("schema", {}), 0)
        else:
            yield f"{where}: parameter {key[1]} removed"
    for key, parameter in after.items():
        if parameter.get("required") and not before.get(key, {}).get("required"):
            yield f"{where}: parameter {key[1]} is now required"


def _content(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """The schema of a body; every body here has one media type."""
    for media in (part or {}).get("content", {}).values():
        return dict(media.get("schema", {}))
    return None


def _resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        target: Any = document
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        schema = target
    return schema


def _types(document: dict[str, Any], schema: dict[str, Any]) -> set[str]:
    """The JSON types that a schema admits; empty: any."""
    schema = _resolve(document, schema)
    if "anyOf" in schema:
        branches = [_types(document, branch) for branch in schema["anyOf"]]
        return set().union(*branches) if all(branches) else set()
    kind = schema.get("type")
    found = set(kind) if isinstance(kind, list) else {kind} if kind else set()
    return found | {"integer"} if "number" in found else found


def _values(document: dict[str, Any], schema: dict[str, Any]) -> set[str] | None:
    schema = _resolve(document, schema)
    if "const" in schema:
        return {json.dumps(schema["const"])}
    return {json.dumps(value) for value in schema["enum"]} if "enum" in schema else None


def _branch(document: dict[str, Any], schema: dict[str, Any], kind: str) -> dict[str, Any]:
    """The object or array part of a schema, looking through references and nullable unions."""
    schema = _resolve(document, schema)
    for option in schema.get("anyOf", []):
        if kind in _types(document, option):
            return _branch(document, option, kind)
    return schema


def _request(
    where: str, base: dict[str, Any], old: dict[str, Any], new: dict[str, Any], now: dict[str, Any], depth: int
) -> Iterator[str]:
    """What a client may send: ``now`` must take everything that ``old`` took."""
    if depth > _MAX_DEPTH:
        return
    before, after = _types(base, old), _types(new, now)
    if after and (not before or before - after):
        yield f"{where}: takes {_list(after)}, took {_list(before)}"
        return
    old_values, now_values = _values(base, old), _values(new, now)
    if now_values is not None and (old_values is None or old_values - now_values):
        yield f"{where}: fewer values: {_list(now_values)}"
    old, now = _branch(base, old, "object"), _branch(new, now, "object")
    yield from _bounds(where, old, now)
    known = old.get("properties", {})
    for name in now.get("required", []):
        if name not in old.get("required", []):
            yield f"{where}.{name}: now required"
    for name, schema in known.items():
        if name in now.get("properties", {}):
            yield from _request(f"{where}.{name}", base, schema, new, now["properties"][name], depth + 1)
        elif now.get("additionalProperties") is False:
            yield f"{where}.{name}: no longer taken"
    old, now = _branch(base, old, "array"), _branch(new, now, "array")
    if "items" in old and "items" in now:
        yield from _request(f"{where}[]", base, old["items"], new, now["items"], depth + 1)


def _bounds(where: str, old: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in ("maximum", "maxLength", "maxItems"):
        if name in now and (name not in old or now[name] < old[name]):
            yield f"{where}: {name} is now {now[name]}"
    for name in ("minimum", "minLength", "minItems"):
        if name in now and now[name] > old.get(name, 0 if name != "minimum" else float("-inf")):
            yield f"{where}: {name} is now {now[name]}"
    if "pattern" in now and now["pattern"] != old.get("pattern"):
        yield f"{where}: another pattern"


def _response(
    where: str, base: dict[str, Any], old: dict[str, Any], new: dict[str, Any], now: dict[str, Any], depth: int
) -> Iterator[str]:
    """What a client may rely on: ``now`` must promise everything that ``old`` promised."""
    if depth > _MAX_DEPTH:
        return
    before, after = _types(base, old), _types(new, now)
    if before and (not after or after - before):
        yield f"{where}: is {_list(after)}, was {_list(before)}"
        return
    old, now = _branch(base, old, "object"), _branch(new, now, "object")
    for name, schema in old.get("properties", {}).items():
        if name not in now.get("properties", {}):
            yield f"{where}.{name}: removed"
            continue
        if name in old.get("required", []) and name not in now.get("required", []):
            yield f"{where}.{name}: may be absent now"
        yield from _response(f"{where}.{name}", base, schema, new, now["properties"][name], depth + 1)
    old, now = _branch(base, old, "array"), _branch(new, now, "array")
    if "items" in old and "items" in now:
        yield from _response(f"{where}[]", base, old["items"], new, now["items"], depth + 1)


def _list(values: set[str]) -> str:
    return " or ".join(sorted(values)) or "anything"


def check(base_file: Path | None) -> int:
    """Print what is wrong; returns the exit code."""
    text = generate()
    findings: list[str] = []
    if not CONTRACT.exists() or CONTRACT.read_text(encoding="utf-8") != text:
        findings.append("contracts/openapi.json is stale: run python tools/openapi.py --write")
    base = json.loads(base_file.read_text(encoding="utf-8")) if base_file else committed()
    if base is not None:
        findings += [f"breaks clients: {line}" for line in breaking(base, json.loads(text))]
    print("\n".join(findings), end="\n" if findings else "")
    return 1 if findings else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    parser.add_argument("--base", type=Path)
    arguments = parser.parse_args()
    if arguments.write:
        CONTRACT.write_text(generate(), encoding="utf-8")
        return 0
    return check(arguments.base)


if __name__ == "__main__":
    sys.exit(main())
