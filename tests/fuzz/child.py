"""One fuzzer process (started by run.py; a fuzzer never returns): `python -m tests.fuzz.child TARGET REPLAY [libFuzzer options]`.

REPLAY is an executable that starts this same command again: libFuzzer starts itself anew while it merges a corpus.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["portico"]):
    from tests.fuzz.targets import TARGETS

target, replay, *options = sys.argv[1:]
atheris.Setup([replay, *options], TARGETS[target])
atheris.Fuzz()
