"""The comparison with full decodes: what is right agrees, and each kind of disagreement is told."""

from dataclasses import replace

import pytest

from bench import full_decode, media_corpus
from bench.media_corpus import AGREE, BY_RATE, DISAGREE, REFUSED, UNIFORM, Corpus, differences, expected, run, summary
from tests.server.reader.recordings import animation, busy, recording, shown_by
from tests.server.reader.test_damage import places

GOP_12 = (("g", "12"), ("bf", "0"), ("slices", "1"))


def without_a_picture(matroska, number):
    """An H.264 video in which a packet is full of padding: it counts as a frame, and frames behind need its picture."""
    at, size = places(matroska)[number]
    at = matroska.index((size - 4).to_bytes(4, "big"), at)
    padding = (size - 4).to_bytes(4, "big") + b"\x0c" + b"\xff" * (size - 6) + b"\x80"
    return matroska[:at] + padding + matroska[at + size :]


FILES = {
    "plain.mp4": lambda: recording("mp4", "libx264"),
    "deep/turned.mp4": lambda: shown_by(recording("mp4", "libx264", 48, draw=busy), 0, 1, -1, 0),
    "deep/animation.webp": lambda: animation(),
    "lying.mkv": lambda: without_a_picture(recording("matroska", "libx264", encoder=GOP_12), 7),
    "no_video.mp4": lambda: recording("mp4", "", has_video=False, sound_seconds=1),
    "words.txt": lambda: b"nothing to see",
}


async def test_a_line_tells_of_each_file_that_disagrees_or_is_refused(tmp_path, capsys):
    for name, make in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(make())
    results = await run(tmp_path, [tmp_path / name for name in FILES], seconds=60, jobs=2)
    assert [result.outcome for result in results] == [AGREE, AGREE, AGREE, DISAGREE, REFUSED, REFUSED]
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == {"lying.mkv", "no_video.mp4", "words.txt"}
    assert lines["lying.mkv"].startswith("disagree: 24 frames, 21 in a full decode")
    assert "refused: invalid_video: the file holds no video stream" in lines["no_video.mp4"]
    assert "refused: invalid_media: the data is text, not a video" in lines["words.txt"]
    told = summary(results)
    assert "6 files: 4 taken, 2 refused" in told
    assert "3 agree with a full decode, 1 disagree, 0 could not be compared" in told


async def test_a_full_decode_that_takes_too_long_is_given_up(tmp_path):
    file = tmp_path / "plain.mp4"
    file.write_bytes(recording("mp4", "libx264"))
    (result,) = await run(tmp_path, [file], seconds=0.001, jobs=1)
    assert result.outcome == media_corpus.NOT_COMPARED
    assert "24 frames; no full decode within 0.001 seconds" in result.text


@pytest.fixture
async def read(tmp_path):
    """What was read of a video, the pictures, and its full decode."""
    file = tmp_path / "plain.mp4"
    file.write_bytes(recording("mp4", "libx264"))
    corpus = Corpus(seconds=60, jobs=1)
    try:
        yield *(await corpus._read(file, UNIFORM)), full_decode.decode(str(file))
    finally:
        await corpus.close()


async def test_what_is_wrong_is_told(read):
    reading, pictures, whole = read
    assert differences(reading, UNIFORM, pictures, whole) == ""
    for change, words in (
        ({"frames": 25}, "25 frames, 24 in a full decode"),
        ({"width": 64, "height": 128}, "64 x 128, 128 x 64 in a full decode"),
        ({"duration_seconds": 3.5}, "3.500 seconds, 3.000 in a full decode"),
    ):
        wrong = replace(reading, facts=replace(reading.facts, **change))
        assert differences(wrong, UNIFORM, pictures, whole) == words
    indices = [*range(23), 22]
    wrong = replace(reading, header=replace(reading.header, frames_indices=indices))
    assert f"frames {indices} were chosen" in differences(wrong, UNIFORM, pictures, whole)
    assert "other pictures: 22 (nearest 23" in differences(wrong, UNIFORM, pictures, whole)
    swapped = [pictures[1], pictures[0], *pictures[2:]]
    assert differences(reading, UNIFORM, swapped, whole).startswith("other pictures: 0 (nearest 1, ")


def test_packets_that_cannot_be_decoded_may_count():
    whole = full_decode.Decoded(frames=2, errors=1, thumbnails=[[0] * 144, [200] * 144])
    black, white = media_corpus.np.zeros((8, 8, 3), "u1"), media_corpus.np.full((8, 8, 3), 200, "u1")
    assert media_corpus.mistaken([0, 2], [black, white], whole, lost=1) == []
    assert media_corpus.mistaken([0, 2], [white, black], whole, lost=1) != []


@pytest.mark.parametrize(
    ("frames", "seconds", "sampling", "right"),
    [
        (3, 1, UNIFORM, [0, 1, 2]),
        (100, 4, UNIFORM, [index * 99 // 31 for index in range(32)]),
        (96, 4, BY_RATE, [0, 14, 27, 41, 54, 68, 81, 95]),
        (1, 1, BY_RATE, [0, 0]),
        (3, 1, BY_RATE, [0, 1, 2]),
    ],
)
def test_models_look_at_certain_frames(frames, seconds, sampling, right):
    assert expected(frames, seconds, sampling) == right
