"""What the packets of an audio clip say."""

import os

from server.reader.facts import Facts, Limits, ReadError
from server.reader.opening import AUDIO_CODECS, DECODERS
from server.reader.packets import check_duration

BYTES_PER_SAMPLE = 4


def read_audio(descriptor: int, demuxer: str, limits: Limits) -> Facts:
    """Return the facts about the audio clip in an open file, decoding nothing.

    Raises ReadError if it is not one that is taken, and av.FFmpegError if it is a broken one.
    """
    import av

    options = {"codec_whitelist": DECODERS, "protocol_whitelist": "none"}
    os.lseek(descriptor, 0, os.SEEK_SET)
    with (
        os.fdopen(descriptor, "rb", closefd=False) as file,
        av.open(file, "r", format=demuxer, options=options, metadata_errors="replace") as container,
    ):
        stream = next((stream for stream in container.streams if isinstance(stream, av.AudioStream)), None)
        if stream is None or stream.codec_context is None or not stream.time_base:
            raise ReadError("the file holds no audio stream")
        codec = stream.codec_context.codec.canonical_name
        if codec not in AUDIO_CODECS:
            raise ReadError(f"the audio is in {codec}; taken are {', '.join(AUDIO_CODECS)}")
        measured = sum(packet.duration or 0 for packet in container.demux(stream)) * float(stream.time_base)
        claimed = float((stream.duration or 0) * stream.time_base)
        seconds = max(measured, claimed)
        check_duration("audio", seconds, limits, code="audio_too_long")
        samples = seconds * stream.codec_context.sample_rate * stream.codec_context.channels
        return Facts(
            container.format.name, codec, duration_seconds=seconds, decoded_bytes=int(samples * BYTES_PER_SAMPLE)
        )
