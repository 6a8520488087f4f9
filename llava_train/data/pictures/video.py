"""Videos: the size of one, and frames taken evenly from it, as RGB pictures. Needs PyAV (`llava-train[video]`).

Whatever is wrong with a video is a RecordError with a cause: video_missing, video_empty, video_unreadable,
image_too_large, image_strip, or image_path (hostile: what the path names is no file).

Frames are always counted, never believed from a header, and always decoded forward from the first one:
seeking gives other frames in files whose time stamps or key frames are not in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_train.data.pictures.images import MAX_PIXELS, check_size
from llava_train.errors import DataError, RecordError
from llava_train.files import regular_file

DEMUXERS = "mov,mp4,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,ogg,asf,gif,m4v,h264,hevc"
"""Containers that may be opened. Left out on purpose: play lists (hls, concat, dash), which open other files."""


@dataclass(frozen=True)
class VideoInfo:
    """Frames in the file (its packets: a codec with hidden ones may show fewer), pixels, and length in seconds."""

    frames: int
    width: int
    height: int
    seconds: float


def probe(path: Path, name: str) -> VideoInfo:
    """Size and length of a video, without decoding it. Raises RecordError, see the head of this file."""
    with _opened(path, name) as (container, stream):
        frames, seconds = _count(container, stream, name)
        return VideoInfo(frames, stream.width, stream.height, seconds)


def sample_frames(path: Path, name: str, count: int) -> list[Image.Image]:
    """`count` frames, RGB, taken evenly: `numpy.linspace(0, frames - 1, count, dtype=int)`.

    That is what Video-LLaVA and LLaVA-NeXT do: first and last frame included, rounded down; a video with fewer
    frames than `count` repeats some. The frames are not turned by the display matrix.
    One pass of decoding; no more than the `count` frames are held. Where the file shows another number of frames
    than it has packets, a second pass. Raises RecordError, see the head of this file: also where the file is cut
    off within a frame. Matroska and WebM cut off elsewhere cannot be told from shorter ones.
    """
    with _opened(path, name) as (container, stream):
        expected, _ = _count(container, stream, name)
    shown, kept = _decode(path, name, _evenly(expected, count))
    if shown != expected:
        _, kept = _decode(path, name, _evenly(shown, count))
    return [kept[index] for index in _evenly(shown, count)]


def read_frame(path: Path, name: str, at: int, size: int) -> Image.Image:
    """Frame `at` of the `size` frames of `sample_frames`. The frames of the last video read are remembered."""
    if not 0 <= at < size:
        raise DataError(f"{name}: frame {at} of {size}: count from 0")
    regular_file(path, name, "video")
    found = path.stat()
    return _remembered(path, name, size, found.st_mtime_ns, found.st_size)[at].copy()


@lru_cache(maxsize=1)
def _remembered(path: Path, name: str, size: int, changed: int, length: int) -> list[Image.Image]:
    return sample_frames(path, name, size)


def _evenly(frames: int, count: int) -> list[int]:
    return np.linspace(0, frames - 1, count, dtype=int).tolist()


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; what fails here or in the body is a RecordError."""
    av = _pyav()
    regular_file(path, name, "video")
    # The file and nothing else: what a play list or a reference names is not opened.
    options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
    try:
        with av.open(f"file:{path.absolute()}", options=options, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise RecordError(f"{name}: no video in it", "video_unreadable")
            stream = container.streams.video[0]
            check_size(stream.width, stream.height, name)
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # a stream may change its size later
            yield container, stream
    except RecordError:
        raise
    except Exception as error:  # FFmpeg's errors, and what PyAV raises about odd streams
        told = getattr(error, "strerror", None) or error
        reason = f"not a readable video ({type(error).__name__}: {told})"
        raise RecordError(f"{name}: {reason}", "video_unreadable") from error


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError('videos need PyAV: pip install "llava-train[video]"') from error
    return av


def _count(container: Any, stream: Any, name: str) -> tuple[int, float]:
    """Packets with data, and the seconds they cover."""
    frames, first, last = 0, None, 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise RecordError(f"{name}: cut off or corrupt at frame {frames}", "video_unreadable")
        frames += 1
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None:
            first = time if first is None else min(first, time)
            last = max(last, time + (packet.duration or 0))
    if not frames:
        raise RecordError(f"{name}: a video without frames", "video_empty")
    return frames, float((last - first) * stream.time_base) if first is not None else 0.0


def _decode(path: Path, name: str, wanted: list[int]) -> tuple[int, dict[int, Image.Image]]:
    """How many frames the file shows, and those of the `wanted` numbers that are among them."""
    chosen, kept, shown = set(wanted), {}, 0
    with _opened(path, name) as (container, stream):
        for frame in container.decode(stream):
            if shown in chosen:
                check_size(frame.width, frame.height, name)
                kept[shown] = frame.to_image()
            shown += 1
    if not shown:
        raise RecordError(f"{name}: a video without frames", "video_empty")
    return shown, kept
