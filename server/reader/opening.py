"""Opens videos: which demuxers and decoders may run, and which stream is the video."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from server.reader.facts import Limits, ReadError

if TYPE_CHECKING:
    from av import Packet, VideoStream
    from av.container import InputContainer

    VideoPacket = Packet[VideoStream]

VIDEO_CODECS = (
    *("h264", "hevc", "vp8", "vp9", "av1"),
    *("h263", "flv1", "gif", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "prores", "theora"),
    *("msmpeg4v2", "msmpeg4v3", "vc1", "wmv1", "wmv2", "wmv3"),
)
AUDIO_CODECS = ("aac", "alac", "flac", "mp3", "opus", "vorbis", "pcm_f32le", "pcm_s16le", "pcm_s24le", "pcm_u8")
# libav's own list, of its names for decoders: it opens some before it says what a file holds.
DECODERS = ",".join((*VIDEO_CODECS, "flv", "msmpeg4", "libdav1d", *AUDIO_CODECS, "mp3float", "libopus", "libvorbis"))
READ_BYTES = 2**18


@contextmanager
def opened(
    descriptor: int, demuxer: str, limits: Limits, *, threads: int = 1
) -> Iterator[tuple["InputContainer", "VideoStream", Iterator["VideoPacket"]]]:
    """Give the container, its video, ready to be decoded by so many threads, and its packets; the file stays open.

    The demuxer is given, never guessed, and opens nothing else: neither playlists nor scripts are ever followed.
    Raises ReadError if there is no video of a codec that is taken, and av.FFmpegError if the file is a broken one.
    """
    import av  # the gateway's own process never loads the decoders

    options = {
        "codec_whitelist": DECODERS,
        "protocol_whitelist": "none",
        "max_pixels": str(limits.max_pixels),
        "threads": "1",
    }
    os.lseek(descriptor, 0, os.SEEK_SET)
    with (
        os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file,
        av.open(
            file, "r", format=demuxer, options=options, buffer_size=READ_BYTES, metadata_errors="replace"
        ) as container,
    ):
        stream = _video_stream(container, limits, threads)
        for other in container.streams:
            if other is not stream:
                other.discard = av.stream.Discard.all
        yield container, stream, (packet for packet in container.demux(stream) if packet.size)


def _video_stream(container: "InputContainer", limits: Limits, threads: int) -> "VideoStream":
    from av import VideoStream
    from av.codec.context import ThreadType
    from av.stream import Disposition

    stream = next(
        (
            stream
            for stream in container.streams
            if isinstance(stream, VideoStream) and not stream.disposition & Disposition.attached_pic
        ),
        None,
    )
    if stream is None:
        raise ReadError("the file holds no video stream")
    if "enc_key_id" in stream.metadata:  # of Matroska, whose packets don't tell
        raise ReadError("the video is encrypted")
    context = stream.codec_context
    codec = "an unknown codec" if context is None else context.codec.canonical_name
    if codec not in VIDEO_CODECS:
        raise ReadError(f"the video is in {codec}; taken are {', '.join(VIDEO_CODECS)}")
    context.options = {"max_pixels": str(limits.max_pixels)}
    context.thread_count = threads
    context.thread_type = ThreadType.FRAME  # several frames at once: slices, encoders seldom write more than one of
    return stream
