import asyncio
import contextlib

import pytest

from server.media.share import Shared


class Thing:
    """A shared resource that counts how often it was opened and closed. It opens only when the test lets it."""

    def __init__(self):
        self.opened = self.closed = self.given_up = 0
        self.gate = asyncio.Event()
        self.fault = None

    @contextlib.asynccontextmanager
    async def __call__(self):
        self.opened += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.fault is not None:
            raise self.fault
        try:
            yield self.opened
        finally:
            self.closed += 1


@pytest.fixture
def thing():
    return Thing()


async def hold(shared, thing, until=None, key="k"):
    async with shared.held(key, thing) as number:
        if until is not None:
            await until.wait()
        return number


async def test_those_who_ask_at_the_same_time_get_the_same_and_it_is_closed_behind_the_last(thing):
    shared, until = Shared(), asyncio.Event()
    holders = [asyncio.create_task(hold(shared, thing, event)) for event in (None, until, None)]
    await asyncio.sleep(0.01)
    thing.gate.set()
    assert await holders[0] == await holders[2] == 1
    assert thing.closed == 0
    until.set()
    assert await holders[1] == 1
    assert (thing.opened, thing.closed) == (1, 1)


async def test_who_asks_when_it_is_there_already_gets_a_new_one(thing):
    shared, until = Shared(), asyncio.Event()
    thing.gate.set()
    first = asyncio.create_task(hold(shared, thing, until))
    await asyncio.sleep(0.01)
    assert await hold(shared, thing) == 2
    until.set()
    assert await first == 1
    assert thing.closed == 2


async def test_different_keys_are_different_things(thing):
    shared = Shared()
    thing.gate.set()
    assert sorted(await asyncio.gather(*(hold(shared, thing, key=key) for key in "ab"))) == [1, 2]


@pytest.mark.parametrize("leaver", [0, 1])
async def test_one_who_leaves_early_changes_nothing_for_the_others(thing, leaver):
    shared = Shared()
    holders = [asyncio.create_task(hold(shared, thing)) for _ in range(2)]
    await asyncio.sleep(0.01)
    holders[leaver].cancel()
    await asyncio.sleep(0.01)
    thing.gate.set()
    assert await holders[1 - leaver] == 1
    assert (thing.opened, thing.closed, thing.given_up) == (1, 1, 0)


async def test_when_the_last_one_leaves_the_opening_is_given_up(thing):
    shared = Shared()
    holders = [asyncio.create_task(hold(shared, thing)) for _ in range(2)]
    await asyncio.sleep(0.01)
    for holder in holders:
        assert thing.given_up == 0
        holder.cancel()
        await asyncio.sleep(0.01)
    assert (thing.opened, thing.given_up) == (1, 1)
    thing.gate.set()
    assert await hold(shared, thing) == 2


async def test_what_fails_fails_for_all_and_is_tried_anew_by_the_next(thing):
    shared, thing.fault = Shared(), RuntimeError("no")
    thing.gate.set()
    results = await asyncio.gather(*(hold(shared, thing) for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["no"] * 3
    assert thing.opened == 1
    thing.fault = None
    assert await hold(shared, thing) == 2


async def test_one_who_is_cancelled_while_the_thing_closes_is_cancelled(thing):
    shared, closing = Shared(), asyncio.Event()
    thing.gate.set()

    @contextlib.asynccontextmanager
    async def slow_to_close():
        async with thing() as number:
            yield number
            await closing.wait()

    holder = asyncio.create_task(hold(shared, slow_to_close))
    await asyncio.sleep(0.01)
    holder.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holder
    closing.set()
    await asyncio.sleep(0.01)
    assert thing.closed == 1
