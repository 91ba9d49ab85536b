"""What is asked by the thousand at once is answered past the framework's routing.

Finding a route and preparing its call costs as much as the busiest routes cost themselves. A shortcut is the same function under
the same address, called with what it surely understands; everything else (another content type, a body that does not fit, an
``Idempotency-Key``) it leaves to the route, which is declared as every other, in the OpenAPI document and under its tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope

from portico.control.requests import refuse_unstorable

#: The answer, or ``None`` where the route has to decide; gets what the address's groups matched.
Act = Callable[..., Awaitable[Response | None]]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Shortcut:
    """POST requests to addresses that match ``path`` whole go to ``act(request, *groups)``."""

    path: str
    act: Act


class Shortcuts:
    """All of an app's."""

    def __init__(self, found: Iterable[Shortcut] = ()) -> None:
        self._found = [(re.compile(each.path), each.act) for each in found]

    async def answer(self, scope: Scope, receive: Receive) -> tuple[Response | None, Receive]:
        """The answer, if there is a shortcut and it takes the request; and how what is left of the request is received."""
        if scope["method"] != "POST":
            return None, receive
        for path, act in self._found:
            if (found := path.fullmatch(scope["path"])) is None:
                continue
            request = Request(scope, receive)
            response = await act(request, *found.groups())
            if response is None and hasattr(request, "_body"):
                receive = _again(await request.body(), receive)
            return response, receive
        return None, receive


async def document(request: Request, model: type[Model]) -> Model | None:
    """The JSON body as ``model``; ``None`` where the framework has to say what is wrong with it, or another rule applies."""
    headers = request.headers
    if headers.get("content-type") != "application/json" or "idempotency-key" in headers:
        return None
    body = await request.body()
    try:
        refuse_unstorable(body)
        return model.model_validate(json.loads(body))
    except (RequestValidationError, ValueError, RecursionError):
        return None


def _again(body: bytes, receive: Receive) -> Receive:
    """``receive`` for whoever reads a body that was read already."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
