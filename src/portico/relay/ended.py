"""What an agent is told of the end of its session: what happened, and what to do about it.

The code names the reason; an agent shows the text as it is, so it must be enough for whoever reads a terminal.
"""

from __future__ import annotations

from typing import Final

_WHY: Final = {
    "session.ended": "its agent, or somebody with the agent's key, ended this session; start the agent again",
    "session.revoked": "the agent key was revoked or lost its rights; sign in again with: portico login",
    "organization.suspended": "the operator of this platform suspended the organization; ask them why (portico whoami)",
    "organization.deleting": "the organization is about to be deleted; an owner can still take that back",
}


def why_ended(code: str) -> str:
    """One line for a code that the control plane gave."""
    return _WHY.get(code, "the platform ended this session")
