"""Videos: even frames equal to a full decode, in several containers; what is broken is named."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_train.data.pictures import video
from llava_train.data.pictures.video import probe, read_frame, sample_frames
from llava_train.errors import DataError, RecordError

av = pytest.importorskip("av")
CODECS = {
    "a.mp4": ("mpeg4", {}),
    "b.avi": ("mpeg4", {"bf": "2"}),
    "c.mp4": ("libx264", {"bf": "3", "g": "10"}),
    "d.mkv": ("libx264", {}),
    "e.webm": ("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "f.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
}


def make_video(path: Path, frames: int, side: int = 32) -> Path:
    """`frames` pictures at 10 a second, no two alike; skips the test where the encoder is not there."""
    codec, options = CODECS[path.name]
    if codec not in av.codecs_available:
        pytest.skip(f"no encoder {codec}")
    container_options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.full((side, side, 3), number * 8 % 256, np.uint8)
            pixels[:, : number % side + 1] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def all_frames(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("frames", [3, 30])
def test_frames_are_those_of_a_full_decode(tmp_path: Path, name: str, frames: int) -> None:
    path = make_video(tmp_path / name, frames)
    everything = all_frames(path)
    assert len(everything) == frames
    info = probe(path, "v")
    assert (info.frames, info.width, info.height) == (frames, 32, 32)
    assert info.seconds == pytest.approx(frames / 10, abs=0.11)
    for count in (1, 4, 8, 30, 40):
        wanted = [everything[index].tobytes() for index in np.linspace(0, frames - 1, count, dtype=int)]
        sampled = sample_frames(path, "v", count)
        assert [image.tobytes() for image in sampled] == wanted
        assert {(image.mode, image.size) for image in sampled} == {("RGB", (32, 32))}
        assert [read_frame(path, "v", at, count).tobytes() for at in range(count)] == wanted


def test_a_video_that_changed_is_read_again(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 3)
    first = read_frame(path, "v", 1, 2)
    first.paste((0, 0, 0), (0, 0, 32, 32))  # the reader's own copy
    assert read_frame(path, "v", 1, 2).tobytes() == all_frames(path)[2].tobytes()
    make_video(path, 9)
    assert read_frame(path, "v", 1, 2).tobytes() == all_frames(path)[8].tobytes()
    for at in (-1, 2):
        with pytest.raises(DataError, match="count from 0"):
            read_frame(path, "v", at, 2)


@pytest.mark.parametrize(("packets", "shown"), [(12, 9), (5, 9)])
def test_frames_are_counted_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packets: int, shown: int
) -> None:
    path = make_video(tmp_path / "a.mp4", shown)
    monkeypatch.setattr(video, "_count", lambda *_: (packets, 1.0))
    everything = all_frames(path)
    wanted = [everything[index].tobytes() for index in np.linspace(0, shown - 1, 4, dtype=int)]
    assert [image.tobytes() for image in sample_frames(path, "v", 4)] == wanted


def test_a_header_that_lies_about_frames_is_not_believed(tmp_path: Path) -> None:
    path = make_video(tmp_path / "b.avi", 7)
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"avih", 24), (b"strh", 40)):  # dwTotalFrames, dwLength
        at = data.index(mark) + offset
        assert int.from_bytes(data[at : at + 4], "little") in (7, 8)
        data[at : at + 4] = (9_000).to_bytes(4, "little")
    path.write_bytes(data)
    assert probe(path, "v").frames == 7
    assert len({image.tobytes() for image in sample_frames(path, "v", 7)}) == 7


def test_only_the_frames_asked_for_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4", 30)
    made = []
    monkeypatch.setattr(video, "check_size", lambda *_: made.append(1))  # once for a stream, once for a frame kept
    assert len(sample_frames(path, "v", 4)) == 4
    assert len(made) == 2 + 4


UNUSABLE = {
    "empty": (lambda data: b"", "video_empty"),
    "text": (lambda data: b"no video\n" * 40, "video_unreadable"),
    "half": (lambda data: data[: len(data) // 2], "video_unreadable"),
    "tail": (lambda data: data[:-40], "video_unreadable"),
    "head": (lambda data: data[:20], "video_unreadable"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("read", [probe, lambda path, name: sample_frames(path, name, 4)])
def test_what_cannot_be_used_is_named_with_its_cause(tmp_path: Path, kind: str, read) -> None:
    path = make_video(tmp_path / "a.mp4", 8)
    change, cause = UNUSABLE[kind]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RecordError, match=r"^clip 7: ") as caught:
        read(path, "clip 7")
    assert (caught.value.cause, caught.value.hostile) == (cause, False)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="v: no such video") as caught:
        probe(tmp_path / "none.mp4", "v")
    assert caught.value.cause == "video_missing"
    with pytest.raises(RecordError, match="v: a folder") as caught:
        read_frame(tmp_path, "v", 0, 1)
    assert (caught.value.cause, caught.value.hostile) == ("image_path", True)


def test_a_play_list_opens_no_other_file(tmp_path: Path) -> None:
    other = make_video(tmp_path / "a.mp4", 3)
    lists = [f"ffconcat version 1.0\nfile {other.name}\n", f"#EXTM3U\n#EXTINF:3,\n{other.name}\n#EXT-X-ENDLIST\n"]
    for number, text in enumerate(lists):
        path = tmp_path / f"list{number}.mp4"
        path.write_text(text)
        with pytest.raises(RecordError, match="not a readable video"):
            probe(path, "v")
    assert len(all_frames(tmp_path / "list0.mp4")) == 3  # what FFmpeg does unless it is told


def test_too_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(video, "MAX_PIXELS", 100)
    with pytest.raises(RecordError, match="v: not a readable video"):  # by the decoder, in the midst of a stream
        sample_frames(path, "v", 2)
    monkeypatch.setattr("llava_train.data.pictures.images.MAX_PIXELS", 100)
    with pytest.raises(RecordError, match="32 x 32 pixels, more than the 100 allowed") as caught:
        probe(path, "v")
    assert caught.value.cause == "image_too_large"


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(RecordError, match="no video in it"):
        probe(path, "v")


def test_pyav_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r'pip install "llava-train\[video\]"'):
        probe(tmp_path / "a.mp4", "v")


BROKEN = """
import faulthandler, sys
from pathlib import Path
from llava_train.data.pictures.video import sample_frames
from llava_train.errors import RecordError

for path in sorted(Path(sys.argv[1]).iterdir()):
    faulthandler.dump_traceback_later(20, exit=True)
    try:
        assert len(sample_frames(path, "v", 3)) == 3
    except RecordError as error:
        assert error.cause.startswith(("video_", "image_")) and not error.hostile, error
"""


def test_broken_videos_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for name in ("a.mp4", "b.avi", "d.mkv", "e.webm"):
        whole = make_video(tmp_path / name, 6).read_bytes()
        for seed in range(20):
            chance, data = random.Random(seed), bytearray(whole)
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            (tmp_path / "broken" / f"{seed}-{name}").write_bytes(data)
    command = [sys.executable, "-c", BROKEN, str(tmp_path / "broken")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
