"""The benchmark of the way of a video: each arm reads what it can, and its tables say so."""

from bench import clips, media


async def test_all_ways_to_the_engine_are_measured(engine, store, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "CACHE", tmp_path)
    served = media.Clips()
    try:
        with media.arms(media.Arm(engine), store, served) as arms:
            without = {name: arm for name, arm in arms.items() if name != media.TORCHCODEC}
            results = await media.measured(without, served, media.TINY, model="tiny")
    finally:
        served.close()
    names = [media.FILE, media.INLINE, media.OPENCV]
    h264, av1 = media.TINY.kinds
    assert list(results.seconds) == [h264, av1]
    assert all(results.seconds[h264][name] > 0 for name in names)
    assert [name for name in names if results.seconds[av1][name] is None] == [media.OPENCV]  # which has no AV1 decoder
    assert all(results.processor[h264][name] > 0 for name in names[:2])  # that of the gateways
    assert all(20 < results.peaks[kind] < 2048 for kind in results.peaks)
    assert list(results.rates) == [h264]
    assert {number: set(rates) for number, rates in results.rates[h264].items()} == {1: set(names), 2: set(names)}
    assert list(results.decoding) == [h264, av1]
    assert all(0 < needed < 60 and 0 < whole < 60 for whole, needed in results.decoding.values())
    first, second, third, fourth, line = media.table(results, "a machine").split("\n\n")
    assert [len(row.split("|")) for row in first.splitlines()] == [8] * 4
    assert [len(row.split("|")) for row in second.splitlines()] == [7] * 4
    assert [len(row.split("|")) for row in third.splitlines()] == [8] * 4
    assert [len(row.split("|")) for row in fourth.splitlines()] == [6] * 4
    assert "| av1 240p 2 s |" in first
    assert first.count("not read") == 1
    assert line == "a machine\n"
