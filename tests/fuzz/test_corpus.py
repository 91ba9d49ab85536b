"""The fuzzers' corpus, replayed without a fuzzer; `make fuzz` looks for new inputs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


def inputs(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target: str) -> None:
    assert len(inputs(target)) >= 10
    for path in inputs(target):
        try:
            TARGETS[target](path.read_bytes())
        except Exception as err:
            pytest.fail(f"{path.relative_to(CORPUS)}: {type(err).__name__}: {err}")


@pytest.mark.parametrize("target", TARGETS)
def test_mutations_of_the_corpus(target: str) -> None:
    """A fixed walk around the corpus: cheap, and fails where coverage guidance would only confirm it."""
    chance = random.Random(20261123)
    seeds = [path.read_bytes() for path in inputs(target)]
    for _ in range(3000):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 8)):
            at = chance.randint(0, len(data))
            act = chance.randrange(4)
            if act == 0:
                data[at:at] = chance.randbytes(chance.randint(1, 12))
            elif act == 1:
                del data[at : at + chance.randint(1, 12)]
            elif act == 2 and data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            else:
                other = chance.choice(seeds)
                data[at:] = other[chance.randint(0, len(other)) :]
        try:
            TARGETS[target](bytes(data))
        except Exception as err:
            pytest.fail(f"{type(err).__name__}: {err} for {bytes(data).hex()}")
