"""The headers from which llm-d's router estimates the cost of a video."""

import base64

from tests.server.clips import clip
from tests.server.harness import CHAT, ask, ask_about, gateway

DURATION, RESOLUTION, FPS = (f"x-llm-d-video-{name}" for name in ("duration-seconds", "resolution", "fps"))


def url(**kinds) -> str:
    return "data:video/mp4;base64," + base64.b64encode(clip(**kinds)).decode()


async def test_a_video_is_described_with_its_duration_scaled_by_the_retention(engine):
    async with gateway(engine, llm_d_headers=True) as client:
        for request in (ask_about(url()), ask_about(url(), aot={"retention": 0.1})):
            assert (await client.post(CHAT, json=request)).status_code == 200
    whole, reduced = engine.request_headers
    assert (whole[DURATION], whole[RESOLUTION], whole[FPS]) == ("2.000", "64x48", "6.000")
    assert (reduced[DURATION], reduced[RESOLUTION], reduced[FPS]) == ("0.200", "64x48", "6.000")


async def test_of_several_videos_the_longest_is_described(engine):
    videos = [url(size=(96, 64)), url(frames=24), url(size=(32, 32))]
    request = ask_about(videos[0])
    parts = [{"type": "video_url", "video_url": {"url": video}} for video in videos]
    request["messages"][0]["content"] = [*parts, {"type": "text", "text": "Which?"}]
    async with gateway(engine, llm_d_headers=True) as client:
        assert (await client.post(CHAT, json=request)).status_code == 200
    [headers] = engine.request_headers
    assert (headers[DURATION], headers[RESOLUTION]) == ("4.000", "64x48")


async def test_a_clients_own_headers_reach_no_engine_and_text_has_none(engine):
    forged = {DURATION: "0.001", RESOLUTION: "1x1", FPS: "1"}
    async with gateway(engine, llm_d_headers=True) as client:
        assert (await client.post(CHAT, json=ask(), headers=forged)).status_code == 200
        assert (await client.post(CHAT, json=ask_about(url()), headers=forged)).status_code == 200
    text, video = engine.request_headers
    assert not {DURATION, RESOLUTION, FPS} & set(text)
    assert video[DURATION] == "2.000"


async def test_without_the_setting_engines_are_told_nothing(engine):
    async with gateway(engine) as client:
        assert (await client.post(CHAT, json=ask_about(url()))).status_code == 200
    assert not {DURATION, RESOLUTION, FPS} & set(engine.request_headers[0])
