import contextlib

import pytest
from prometheus_client import CollectorRegistry

from server.engines.pool import EnginePool
from server.engines.profile import UniformSampling, read_profile
from server.engines.session import EngineSession
from server.observe.metrics import Metrics
from tests.server.engine_double import EngineDouble
from tests.server.engines.profiles import ONEVISION, QWEN


def test_a_profile_is_read_with_the_rules_for_handing_over_frames():
    rules = read_profile(ONEVISION).video_rules
    assert rules.sampling == UniformSampling(rule="uniform", num_frames=32)
    assert (rules.size.height, rules.tokens.per_unit, rules.max_frames) == (384, 196, 32)
    assert read_profile(QWEN).video_rules.size.factor == 28


@pytest.mark.parametrize("left_out", ["sampling", "size", "tokens", "max_frames"])
def test_without_one_of_the_rules_there_are_none(left_out):
    assert read_profile({**ONEVISION, left_out: None}).video_rules is None


def test_another_frames_format_is_another_language():
    assert read_profile({**ONEVISION, "frames_format": 2}).video_rules is None


def test_what_later_plugins_tell_besides_is_passed_over():
    more = {**ONEVISION, "later": 1, "size": {**ONEVISION["size"], "later": 1}}
    assert read_profile(more) == read_profile(ONEVISION)


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"detail": "Not Found"},
        {**ONEVISION, "sampling": {"rule": "random"}},
        {**ONEVISION, "sampling": {"rule": "uniform", "num_frames": 0}},
        {**ONEVISION, "size": {"rule": "fixed", "height": -1, "width": 3}},
        {**ONEVISION, "max_frames": "many"},
    ],
)
def test_what_makes_no_sense_is_no_profile(content):
    assert read_profile(content) is None


@contextlib.asynccontextmanager
async def pool_of(*engines):
    async with EngineSession(connect_seconds=1) as session:
        metrics = Metrics(CollectorRegistry())
        urls = [engine.url for engine in engines]
        yield EnginePool(urls, session=session, metrics=metrics, health_seconds=60, read_seconds=5)


async def test_the_pool_reads_profiles_at_health_checks_and_has_rules_where_its_engines_agree():
    async with (
        EngineDouble(profile=ONEVISION).serving() as one,
        EngineDouble(profile=ONEVISION).serving() as other,
        pool_of(one, other) as pool,
    ):
        assert pool.video_rules("llava") is None
        await pool.check()
        assert pool.video_rules("llava") == read_profile(ONEVISION).video_rules
        assert pool.video_rules("unknown") is None
        for profile in (None, QWEN, {**ONEVISION, "frames_format": 2}):  # a rolling upgrade, from either end
            other.profile = profile
            await pool.check()
            assert pool.video_rules("llava") is None
            rules = read_profile(ONEVISION).video_rules
            assert {pool.choose("llava", rules=rules).url for _ in range(4)} == {one.url}
            assert {pool.choose("llava").url for _ in range(4)} == {one.url, other.url}
        one.healthy = False
        other.profile = ONEVISION
        await pool.check()
        assert pool.video_rules("llava") == rules


@pytest.mark.parametrize("profile", ["nonsense", [], {"object": "aot.engine"}])
async def test_an_engine_that_answers_nonsense_is_up_and_served_videos_as_they_are(profile):
    async with EngineDouble(profile=profile).serving() as engine, pool_of(engine) as pool:
        await pool.check()
        assert pool.any_healthy
        assert pool.video_rules("llava") is None
