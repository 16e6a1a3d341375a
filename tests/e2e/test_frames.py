"""Frames files in real engines: the same prompts and answers as the videos that the frames were taken from."""

import base64
import re

import httpx
import numpy as np
import pytest
from vllm.multimodal.media import MediaConnector
from vllm.transformers_utils.processor import get_video_processor_cls_name

from aot_vllm.adapters.description import describe_engine
from aot_vllm.adapters.telemetry import METER
from demo.tiny_checkpoints import checkpoint
from server.engines.profile import read_profile
from server.media.shape import VideoShape
from tests.e2e.engines import Answer, free_port, process, serve_command
from tests.frames.files import data_url, frames_file
from tests.frames.rules import tokens_of
from tests.server.clips import clip

MODELS = ["tiny", "qwen2.5-vl", "qwen3-vl", "qwen3.5"]
RATE = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that engines may read media from."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def engine(start_engine, name, folder):
    return start_engine(name, video_pruning_rate=RATE, allowed_local_media_path=str(folder))


def ask(engine, *urls, **kwargs):
    """Answer a chat about these videos, given by URL as in a request to a server."""
    from vllm import SamplingParams

    media = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": "What happens?"}]}]
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=0)
    (output,) = engine.llm.chat(messages, sampling, use_tqdm=False, mm_processor_kwargs=kwargs or None)
    return Answer(
        prompt_tokens=len(output.prompt_token_ids),
        tokens=tuple(output.outputs[0].token_ids),
        logprobs=tuple(next(iter(step.values())).logprob for step in output.outputs[0].logprobs),
        prompt=tuple(output.prompt_token_ids),
    )


def loaded(engine, content):
    """Return frames and metadata as vLLM's own loader takes them from a video for this engine's model."""
    processor = get_video_processor_cls_name(engine.llm.model_config)
    url = "data:video/mp4;base64," + base64.b64encode(content).decode()
    return MediaConnector().fetch_video(url, video_processor=processor).media


def placed(folder, content, name):
    path = folder / name
    path.write_bytes(content)
    return path.as_uri()


def handed_over(engine, content, **fields):
    """Return the frames file of a video, with what vLLM's own loader takes from it."""
    frames, metadata = loaded(engine, content)
    told = {"indices": metadata["frames_indices"], "fps": metadata["fps"], "total": metadata["total_num_frames"]}
    return frames_file(frames, **told, **fields)


VIDEOS = {
    "40 frames": {"frames": 40, "fps": 8},
    "all of its frames": {"frames": 4, "fps": 2},
    "an odd number of frames": {"frames": 33, "fps": 13, "size": (96, 64)},
    "two frames": {"frames": 2, "fps": 25, "size": (80, 112)},
}


@pytest.mark.parametrize("case", VIDEOS)
def test_a_frames_file_has_the_prompt_and_the_answer_of_its_video(engine, folder, case):
    content = clip(**VIDEOS[case])
    video = ask(engine, placed(folder, content, "clip.mp4"))
    for url in (
        placed(folder, handed_over(engine, content), "clip.frames"),
        data_url(handed_over(engine, content, compression="zlib")),
    ):
        assert ask(engine, url) == video
    if case == "40 frames":
        whole = ask(engine, (folder / "clip.mp4").as_uri(), aot_retention=1)
        assert ask(engine, url, aot_retention=1) == whole
        assert whole.prompt_tokens > video.prompt_tokens


def test_what_a_gateway_counts_is_what_the_prompt_then_has(engine, folder):
    config = engine.llm.llm_engine.vllm_config
    told = describe_engine(config, models=["m"], request_kwargs_trusted=True, prompt_tokens_details=True)
    rules = read_profile(told).video_rules
    model = config.model_config.hf_config
    video_token = model.video_token_index if hasattr(model, "video_token_index") else model.video_token_id
    text = ask(engine).prompt_tokens
    for frames, height, width in [(2, 64, 96), (5, 61, 97), (12, 120, 80)]:
        pictures = np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        shape = VideoShape(frames, height, width)
        url = data_url(frames_file(pictures, total=100))
        for retention in (RATE, 0.1, 1.0):
            answer = ask(engine, url, aot_retention=retention)
            after = shape.tokens_after(rules, retention)
            assert answer.prompt.count(video_token) == after
            estimate = text + after + shape.text_around(rules)
            assert abs(answer.prompt_tokens - estimate) <= frames  # a digit more or less in each timestamp
        assert after == shape.tokens_before(rules)


def seconds(engine, answer):
    """Return the timestamps in a prompt."""
    text = engine.llm.get_tokenizer().decode(answer.prompt)
    return re.findall(r"<([0-9.]+) seconds>", text)


def test_videos_of_different_rates_in_one_request_keep_their_own_metadata(engine, name, folder):
    contents = [clip(frames=40, fps=8), clip(frames=40, fps=20, size=(96, 64))]
    videos = [placed(folder, content, f"{index}.mp4") for index, content in enumerate(contents)]
    files = [placed(folder, handed_over(engine, content), f"{i}.frames") for i, content in enumerate(contents)]
    answer = ask(engine, *videos)
    assert ask(engine, *files) == answer
    assert ask(engine, videos[0], files[1]) == answer
    assert ask(engine, *files[::-1]) == ask(engine, *videos[::-1])
    if name in ("qwen3-vl", "qwen3.5"):
        expected = []
        for content in contents:
            told = loaded(engine, content)[1]
            pairs = zip(told["frames_indices"][::2], told["frames_indices"][1::2], strict=True)
            expected += [f"{(one + other) / 2 / told['fps']:.1f}" for one, other in pairs]
        assert seconds(engine, answer) == expected


def test_the_same_frames_again_are_found_in_the_caches_whatever_their_name(engine, folder):
    content = handed_over(engine, clip(frames=48, fps=8))
    first = ask(engine, placed(folder, content, "first.frames"))
    reductions = METER.statistics()["reductions"]
    again = [placed(folder, content, "second.frames"), data_url(content), (folder / "first.frames").as_uri()]
    assert [ask(engine, url) for url in again] == [first] * 3
    assert METER.statistics()["reductions"] == reductions
    ask(engine, data_url(handed_over(engine, clip(frames=48, fps=9))))
    assert METER.statistics()["reductions"] == reductions + 1


def test_frames_outlive_the_name_of_their_file(engine, folder):
    content = handed_over(engine, clip(frames=24, fps=8))
    url = placed(folder, content, "short-lived.frames")
    answer = ask(engine, url)
    (folder / "short-lived.frames").unlink()
    with pytest.raises(FileNotFoundError):
        ask(engine, url)
    assert ask(engine, data_url(content)) == answer


def test_one_frame_given_twice_is_a_video_for_every_model(engine, name):
    frame = np.random.default_rng(3).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    twice = frames_file(frame.repeat(2, axis=0), indices=[0, 0], fps=10.0)
    answer = ask(engine, data_url(twice))
    assert len(answer.tokens) == 4
    once = data_url(frames_file(frame, fps=10.0))
    if name in ("qwen3-vl", "qwen3.5"):
        assert seconds(engine, answer) == ["0.0"]
        with pytest.raises(ValueError, match=r"^Failed to apply Qwen3VLProcessor"):
            ask(engine, once)
        assert ask(engine, data_url(twice)) == answer
    else:
        assert len(ask(engine, once).tokens) == 4


@pytest.mark.parametrize("name", ["tiny", "qwen3-vl"], scope="function")
def test_frames_are_read_without_a_pruning_rate(start_engine, folder, name):
    engine = start_engine(name, allowed_local_media_path=str(folder))
    content = clip(frames=40, fps=8)
    video = ask(engine, placed(folder, content, "clip.mp4"))
    assert ask(engine, placed(folder, handed_over(engine, content), "clip.frames")) == video


KEY = {"authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def server(tmp_path_factory, folder):
    port = free_port()
    command = serve_command(
        checkpoint("qwen3-vl"),
        port,
        f"--video-pruning-rate={RATE}",
        "--served-model-name=first",
        "--api-key=secret",
        f"--allowed-local-media-path={folder}",
        '--media-io-kwargs={"video": {"fps": 4}}',
    )
    address, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("engine") / "log"
    with process(command, health=f"{address}/health", log=log), httpx.Client(base_url=address, timeout=60) as client:
        yield client


def chat(server, *urls):
    media = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    content = [*media, {"type": "text", "text": "What happens?"}]
    body = {"model": "first", "messages": [{"role": "user", "content": content}], "max_tokens": 2, "temperature": 0}
    return server.post("/v1/chat/completions", json=body, headers=KEY)


@pytest.mark.any_runner
def test_what_a_server_tells_is_guarded_by_its_key_and_counts_as_its_headers_do(server, folder):
    assert server.get("/v1/aot/engine").status_code == 401
    assert server.get("/v1/aot/engine", headers={"authorization": "Bearer other"}).status_code == 401
    answer = server.get("/v1/aot/engine", headers=KEY)
    assert answer.status_code == 200
    engine = answer.json()
    assert (engine["architecture"], engine["models"]) == ("Qwen3VLForConditionalGeneration", ["first"])
    assert engine["sampling"] == {"rule": "qwen3_vl", "fps": 4, "min_frames": 4, "max_frames": 768}
    assert (engine["reduction"]["active"], engine["reduction"]["retention"]) == (True, RATE)
    assert (engine["request_kwargs_trusted"], engine["prompt_tokens_details"]) == (True, True)
    assert (engine["context_length"], engine["limits"]["videos"]) == (8192, 3)

    for frames, height, width in [(2, 64, 96), (5, 61, 97), (8, 200, 120)]:
        pictures = np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        for url in (
            placed(folder, frames_file(pictures, total=100), "pictures.frames"),
            data_url(frames_file(pictures, total=100, compression="zlib")),
        ):
            answer = chat(server, url)
            assert answer.status_code == 200, answer.text
            headers = [int(answer.headers[f"x-aot-video-tokens-{stage}"]) for stage in ("before", "after")]
            assert tuple(headers) == tokens_of(engine, frames=frames, height=height, width=width)


@pytest.mark.any_runner
def test_a_bad_frames_file_is_a_client_error_that_says_why_and_the_server_goes_on(server, folder):
    good = frames_file(np.zeros((4, 64, 64, 3), np.uint8))
    told = "frames of 4 x 64 x 64 x 3 must take 49152 bytes, got 49151"
    for url in (placed(folder, good[:-1], "bad.frames"), data_url(good[:-1])):
        answer = chat(server, url)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, told)
    assert chat(server, placed(folder, good, "good.frames")).status_code == 200


@pytest.mark.any_runner
def test_a_frames_file_that_is_gone_is_vllms_500_as_with_any_file(server, folder):
    """Documents vLLM 0.32: after an `OSError` it also closes the connection, without saying so in the response."""
    for name in ("gone.frames", "gone.mp4"):
        with httpx.Client(base_url=server.base_url, timeout=60) as client:
            assert chat(client, (folder / name).as_uri()).status_code == 500
