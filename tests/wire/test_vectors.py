"""The golden bytes of contracts/wire-vectors.json, valid and hostile."""

from __future__ import annotations

import json
from typing import Any

import pytest

from portico.wire import frames as f
from portico.wire.frames import WireError
from tests.wire.vectors import DOCUMENT, octets, session_in

VALID = DOCUMENT["valid"]
HOSTILE = DOCUMENT["hostile"]
KINDS = {name: value for value, name in f.NAMES.items()}


def latin(fields: list[bytes]) -> list[str]:
    return [field.decode("latin-1") for field in fields]


def decoded(kind: int, payload: bytes) -> dict[str, Any]:
    """The `fields` of a valid vector, by the codec."""
    if kind == f.REQUEST:
        bind, head = f.decode_request(payload)
        return {"bind": bind, "head": latin(head)}
    if kind in (f.RESPONSE, f.INTERIM):
        status, head = f.decode_response(payload)
        return {"status": status, "head": latin(head)}
    if kind == f.ANSWER:
        response, body = f.decode_answer(payload)
        return decoded(f.RESPONSE, response) | {"data": body.hex()}
    if kind == f.END:
        return {"trailers": latin(f.decode_trailers(payload))}
    if kind == f.RESET:
        code, detail = f.decode_reset(payload)
        return {"code": code, "detail": detail}
    if kind == f.OPEN:
        return {"bind": f.U32.unpack_from(payload)[0], "json": f.decode_json(kind, payload[4:])}
    if kind == f.CREDIT:
        return {"increment": f.U32.unpack(payload)[0]}
    if kind in (f.PING, f.PONG):
        return {"opaque": payload.hex()}
    if kind == f.DATA:
        return {"data": payload.hex()}
    return {} if kind == f.OPENED else {"json": f.decode_json(kind, payload)}


def encoded(vector: dict[str, Any]) -> bytes:
    """The bytes of a valid vector, by the codec."""
    kind, ident, flags, fields = KINDS[vector["type"]], vector["id"], vector["flags"], vector["fields"]
    head = [field.encode("latin-1") for field in fields.get("head", fields.get("trailers", []))]
    if kind == f.REQUEST:
        return f.frame(kind, ident, f.encode_request(fields["bind"], head), flags)
    if kind in (f.RESPONSE, f.INTERIM):
        return f.frame(kind, ident, f.encode_response(fields["status"], head), flags)
    if kind == f.ANSWER:
        begin = f.encode_answer(f.encode_response(fields["status"], head))
        return f.frame(kind, ident, begin + bytes.fromhex(fields["data"]), flags)
    if kind == f.END:
        return f.frame(kind, ident, f.encode_trailers(head), flags)
    if kind == f.RESET:
        return f.frame(kind, ident, f.encode_reset(fields["code"], fields["detail"]), flags)
    if kind == f.OPEN:
        return f.frame(kind, ident, f.U32.pack(fields["bind"]) + f.json_frame(kind, 0, fields["json"])[f.HEADER_SIZE :])
    if kind == f.CREDIT:
        return f.frame(kind, ident, f.U32.pack(fields["increment"]), flags)
    if "json" in fields:
        return f.json_frame(kind, ident, fields["json"])
    return f.frame(kind, ident, bytes.fromhex(fields.get("opaque", fields.get("data", ""))), flags)


def test_every_frame_type_has_a_valid_vector() -> None:
    assert {vector["type"] for vector in VALID} == set(f.NAMES.values())


@pytest.mark.parametrize("vector", VALID, ids=[vector["name"] for vector in VALID])
class TestValid:
    def test_header(self, vector: dict[str, Any]) -> None:
        raw = octets(vector["hex"])
        wanted = (KINDS[vector["type"]], vector["flags"], vector["id"], len(raw) - f.HEADER_SIZE)
        assert f.HEADER.unpack_from(raw) == wanted

    def test_decodes_to_its_fields(self, vector: dict[str, Any]) -> None:
        payload = octets(vector["hex"])[f.HEADER_SIZE :]
        assert decoded(KINDS[vector["type"]], payload) == vector["fields"]

    def test_encodes_to_its_bytes(self, vector: dict[str, Any]) -> None:
        assert encoded(vector) == octets(vector["hex"])


@pytest.mark.parametrize("vector", HOSTILE, ids=[vector["name"] for vector in HOSTILE])
class TestHostile:
    def test_is_refused_with_its_code(self, vector: dict[str, Any]) -> None:
        session, _ = session_in(vector["state"], vector["to"])
        with pytest.raises(WireError) as refused:
            session.receive(octets(vector["hex"]))
        assert refused.value.code == vector["code"], refused.value.detail

    def test_can_be_answered_and_leaves_nothing(self, vector: dict[str, Any]) -> None:
        session, _ = session_in(vector["state"], vector["to"])
        with pytest.raises(WireError) as refused:
            session.receive(octets(vector["hex"]))
        session.fail(refused.value.code, refused.value.detail)
        assert not session.streams
        assert not session.waiting
        last = session.take()[-1]
        assert last[0] == f.ERROR
        assert json.loads(bytes(last[f.HEADER_SIZE :]))["code"] == vector["code"]
