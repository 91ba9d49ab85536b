"""A provider's own history, in any order, any event again and again, by workers that die anywhere: it ends in one and the same
subscription, plan and ledger, and after every prefix the ledger sums to zero.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import Phase, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from portico import settings as loading
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings
from tests.control.billing.histories import History, Mortal, Retold, matters, record, wipe
from tests.control.billing.shop import SIMULATORS

#: More than the statements of any event.
_FAR = 150


@pytest.fixture(params=list(SIMULATORS))
def history(request: pytest.FixtureRequest) -> History:
    return record(request.param)


@pytest.fixture
def settings(database_url: str, history: History) -> ApiSettings:
    given = {"database_url": database_url, "master_key": new_master_key(), "default_plan": "free"}
    return loading.load(ApiSettings, environ={}, overrides=given | dict(history.settings))


@pytest.fixture
async def mortal(app: Any, database_url: str) -> AsyncIterator[Mortal]:
    await wipe(app.state.db)
    made = Mortal(database_url)
    yield made
    await made.close()


async def in_order(app: Any, mortal: Mortal, history: History) -> Retold:
    """Told once, as it happened."""
    retold = await Retold.begin(app, mortal, history)
    await retold.page()
    for at in range(len(history.told)):
        await retold.tell(at)
    return retold


async def test_any_order_any_repetition_any_crash(app: Any, mortal: Mortal, history: History) -> None:
    count = len(history.told)
    wanted = await (await in_order(app, mortal, history)).end()
    assert (wanted["waiting"], wanted["dunning"], wanted["plan"]) == ([], [], [("free", 1, None)])
    assert wanted["subscription"][0][1] == "canceled" and len(wanted["payments"]) >= 2
    assert {"contra_revenue", "payment_fees", "provider_clearing"} <= {row[0] for row in wanted["ledger"]}
    tellings = st.tuples(st.booleans(), st.one_of(st.none(), st.integers(0, _FAR)))
    orders = st.lists(st.integers(0, count), max_size=8).flatmap(
        lambda again: st.permutations([*range(count + 1), *again])
    )
    loop = asyncio.get_running_loop()

    async def run(order: list[int], how: list[tuple[bool, int | None]], *, mixed: bool) -> None:
        retold, opened = await Retold.begin(app, mortal, history), False
        for at, (late, place) in zip(order, how, strict=True):
            if at < count:
                await retold.tell(at, late=late and mixed, dies_at=() if place is None else (place,))
            elif not opened:
                opened = True
                await retold.page()
        end = await retold.end()
        if not mixed:
            assert end == wanted
        assert matters(end) == matters(wanted)

    # What fails is long already, and a shorter one takes minutes to find.
    @effort(max_examples=3, phases=(Phase.generate,))
    @given(st.data(), orders, st.booleans())
    def check(data: st.DataObject, order: list[int], mixed: bool) -> None:
        how = data.draw(st.lists(tellings, min_size=len(order), max_size=len(order)))
        asyncio.run_coroutine_threadsafe(run(order, how, mixed=mixed), loop).result(600)

    await asyncio.to_thread(check)
    # And the two that everybody thinks of: backwards, and all of it seen only when it was over.
    nothing: list[tuple[bool, int | None]] = [(False, None)] * (count + 1)
    await run([*reversed(range(count + 1))], nothing, mixed=False)
    await run([count, *range(count)], [(True, None)] * (count + 1), mixed=True)


async def test_a_worker_dies_at_every_statement(app: Any, mortal: Mortal, history: History) -> None:
    """At each of an event's statements in turn, its COMMIT among them, for each type of event that the history has; the next one
    to look finds nothing of it. The end is that of a life without deaths."""
    wanted = await (await in_order(app, mortal, history)).end()
    retold, seen = await Retold.begin(app, mortal, history), set[str]()
    order = [*range(len(history.told))]
    random.Random(len(order)).shuffle(order)
    for number, at in enumerate(order):
        if number == 2:
            await retold.page()
        if history.told[at].type in seen:
            await retold.tell(at)
            continue
        seen.add(history.told[at].type)
        await retold.put(at)
        before, visited = await retold.traces(), 0
        while not await retold.attempt(at, dies_at=visited):
            assert await retold.traces() == before, (history.told[at].type, visited)
            visited += 1
        assert mortal.count == visited > 5, "each index was one at which it died, and after the last it lived"
    assert await retold.end() == wanted
    assert seen == {told.type for told in history.told}
