"""Routes of one's own account: /auth/step-up.

They open their own transactions, since they hash passwords and their refusals write counters that must outlive the refusal; so
they take no Idempotency-Key.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, model_validator

from portico.control.identity.api import Body, Password, Person, Service
from portico.control.identity.step_up import Proof
from portico.control.requests import JsonRoute

router = APIRouter(prefix="/auth", tags=["account"], route_class=JsonRoute)

Method = Literal["pwd", "otp", "recovery", "passkey"]


class StepUpBody(Body):
    """A proof of who one is; exactly one member."""

    password: Password | None = None

    @model_validator(mode="after")
    def _one(self) -> StepUpBody:
        if len(self.model_fields_set) != 1:
            raise ValueError("send exactly one proof")
        return self


class ProvenAnswer(BaseModel):
    """When the person of this session last proved who they are, and by what."""

    authenticated_at: datetime
    methods: list[Method]


@router.post("/step-up", response_model=ProvenAnswer)
async def step_up(body: StepUpBody, service: Service, who: Person) -> Any:
    """Prove again who one is, for acts that ask for a recent sign-in (`auth.step_up_required`)."""
    return await service.step_up.prove(who, Proof(password=body.password))
