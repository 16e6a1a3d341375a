import asyncio
import contextlib
import os
import time

import pytest

from server.errors import Overloaded
from server.media.file import in_memory
from server.media.store import MediaStore


@contextlib.asynccontextmanager
async def held(store, data):
    with in_memory(max_bytes=10**6) as file:
        file.write(data)
        async with store.held(file, suffix=".mp4") as path:
            yield path


async def keep(store, data):
    async with held(store, data) as path:
        return path


def content(directory):
    return sorted(path.read_bytes()[:1] for path in directory.iterdir())


async def test_the_store_makes_room_by_dropping_what_was_used_longest_ago(tmp_path):
    store = MediaStore(tmp_path, max_bytes=250, max_age_seconds=1000)
    for age, letter in enumerate((b"a", b"b")):
        os.utime(await keep(store, letter * 100), (time.time() - 10 + age,) * 2)
    await keep(store, b"a" * 100)  # used again, so b is now the oldest
    await keep(store, b"c" * 100)
    assert content(tmp_path) == [b"a", b"c"]


async def test_the_store_never_drops_what_a_request_holds_at_this_gateway_or_at_another(tmp_path):
    store, other = (MediaStore(tmp_path, max_bytes=250, max_age_seconds=0.01) for _ in range(2))
    async with held(store, b"a" * 100) as path, held(other, b"b" * 100), held(other, b"a" * 100):
        for gateway in (store, other):
            with pytest.raises(Overloaded):
                await keep(gateway, b"c" * 100)
        await asyncio.sleep(0.02)
        await store.sweep()
        await other.sweep()
        assert content(tmp_path) == [b"a", b"b"]
        assert path.read_bytes() == b"a" * 100
    await store.sweep()
    assert list(tmp_path.iterdir()) == []


async def test_the_store_drops_what_is_too_old_and_nothing_that_is_not_its_own(tmp_path):
    store = MediaStore(tmp_path, max_bytes=10_000, max_age_seconds=50)
    old = await keep(store, b"x")
    young = await keep(store, b"y")
    foreign = tmp_path / "holiday.mp4"
    foreign.write_bytes(b"x")
    leftover = tmp_path / ".incoming-xyz"
    leftover.write_bytes(b"x")
    for path in (old, foreign, leftover):
        os.utime(path, (0, 0))
    await store.sweep()
    assert sorted(tmp_path.iterdir()) == sorted([young, foreign])


async def test_a_file_cut_short_by_a_crash_is_written_anew(tmp_path):
    store = MediaStore(tmp_path, max_bytes=1000, max_age_seconds=50)
    (await keep(store, b"x" * 10)).write_bytes(b"x" * 3)
    path = await keep(store, b"x" * 10)
    assert path.read_bytes() == b"x" * 10
    assert len(list(tmp_path.iterdir())) == 1


async def test_what_two_gateways_write_at_the_same_time_is_there_once_and_whole(tmp_path):
    stores = [MediaStore(tmp_path, max_bytes=10**7, max_age_seconds=50) for _ in range(4)]
    paths = await asyncio.gather(*(keep(store, b"x" * 500_000) for store in stores for _ in range(3)))
    assert set(paths) == set(tmp_path.iterdir())
    assert paths[0].read_bytes() == b"x" * 500_000


async def test_a_request_that_leaves_while_its_file_is_written_leaves_nothing_half_done(tmp_path):
    store = MediaStore(tmp_path, max_bytes=10**7, max_age_seconds=0.01)
    for _ in range(20):
        keeping = asyncio.create_task(keep(store, os.urandom(200_000)))
        await asyncio.sleep(0)
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
    assert all(path.stat().st_size == 200_000 for path in tmp_path.iterdir())
    await asyncio.sleep(0.02)
    await store.sweep()
    assert list(tmp_path.iterdir()) == []  # no request holds any of the files


async def test_sweeping_goes_on_after_requests_held_more_than_the_limit_or_the_directory_was_gone(tmp_path, caplog):
    directory = tmp_path / "store"
    directory.mkdir()
    full = MediaStore(directory, max_bytes=1000, max_age_seconds=50)
    lowered = MediaStore(directory, max_bytes=150, max_age_seconds=0.04)
    async with held(full, b"x" * 100) as first, held(full, b"y" * 100) as second:
        sweeping = asyncio.create_task(lowered.watch())
        await asyncio.sleep(0.1)
        assert not sweeping.done()
        assert first.exists()
        assert second.exists()
    directory.rename(tmp_path / "away")
    await asyncio.sleep(0.1)
    assert "could not be swept" in caplog.text
    (tmp_path / "away").rename(directory)
    async with asyncio.timeout(10):
        while list(directory.iterdir()):  # noqa: ASYNC110 - nothing tells when files are gone
            await asyncio.sleep(0.01)
    assert not sweeping.done()
    sweeping.cancel()
