"""The policy of a tunnel in `portico.yml`: `policy` or `policy_file`, and the keys that are short for one.

Every fault has its place: in this file, or in the policy file that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import yaml

from portico.agent import policies
from portico.kit import marked
from portico.wire import policy, policy_check
from portico.wire.policy import Fault, PolicyInvalid

#: Keys that are short for a policy, as :class:`policies.Sugar` names them.
SHORT = ("basic_auth", "allow_cidr", "deny_cidr", "host_header")

At = Callable[[yaml.Node, str], None]
Place = Callable[[str, int, int, str, str], None]


def of_tunnel(
    values: dict[str, Any], nodes: Mapping[str, yaml.Node], protocol: str, at: At, place: Place
) -> dict[str, Any] | None:
    """The policy that the keys say, ``None`` for none; they are taken out of ``values``.

    ``at(node, message)`` and ``place(file, line, column, message, source line)`` take faults; with one the answer is of no use.
    """
    short = {key: values.pop(key) for key in SHORT if key in values}
    written = _written(values, nodes, at, place)
    if not short and written is None:
        return None
    first = nodes[next(key for key in ("policy", "policy_file", *SHORT) if key in nodes)]
    try:
        document = policy.canonical(policies.merged(written or {}, policies.compiled(policies.Sugar(**short))))
    except policies.SugarError as err:
        at(nodes.get(err.name, first), f"{err.name}: {err}")
    except policies.Contradiction as err:
        at(first, str(err))
    except PolicyInvalid as err:
        at(first, str(err))
    else:
        for fault in policy_check.check_protocol(document, protocol):
            at(first, f"{fault.path}: {fault.message}")
        return document
    return None


def _written(values: dict[str, Any], nodes: Mapping[str, yaml.Node], at: At, place: Place) -> dict[str, Any] | None:
    """What ``policy`` or the file of ``policy_file`` says."""
    if "policy" in nodes and "policy_file" in nodes:
        at(nodes["policy_file"], "policy_file: give policy or policy_file, not both")
    if "policy_file" in values:
        path = values["policy_file"]
        found = policies.read_file(path)
        lines = found.text.splitlines()
        for line, column, name, message in found.faults:
            if not line:
                at(nodes["policy_file"], f"policy_file: {path} {message}")
                continue
            source = lines[line - 1] if line <= len(lines) else ""
            place(str(path), line, column, f"{name}: {message}" if name else message, source)
        return found.document
    if "policy" in values:
        return _inline(values.pop("policy"), place)
    return None


def _inline(node: yaml.Node, place: Place) -> dict[str, Any]:
    found = marked.of_node(node)
    faults = [Fault(path, message) for path, message in found.faults]
    document: dict[str, Any] = {}
    if not faults:
        try:
            document = policy.canonical(found.value)
        except PolicyInvalid as err:
            faults = err.faults
    for line, column, path, message in policies.placed(found.marks, faults):
        place("", line, column, f"policy.{path}: {message}" if path else f"policy: {message}", "")
    return document
