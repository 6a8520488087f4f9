"""Pictures by reference: what a source may name, what settles into what, and that nothing else is ever read."""

import http.server
import io
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llava_train.data.pictures import media as media_module
from llava_train.data.pictures.images import LEVELS
from llava_train.data.pictures.media import Media, check_picture, fetch, located, name_of, open_picture, settle
from llava_train.data.sample import ImageRef
from llava_train.errors import RecordError

EXAMPLES = Path(__file__).parents[1] / "examples"


def png(width: int = 5) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 3)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def media(tmp_path: Path) -> Media:
    """A root with a picture `a b.png` and a video `clip.mp4`; `secret.png` lies outside."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "a b.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    shutil.copy(EXAMPLES / "pictures" / "clip.mp4", root / "clip.mp4")
    return Media(root, video_frames=3)


def fault(ref: ImageRef, media: Media, level: str = "none") -> RecordError:
    with pytest.raises(RecordError) as caught:
        check_picture(settle(ref, media)[0], media, level)
    return caught.value


HOSTILE = [
    "http://host/a.png", "HTTPS://host/a.png", "s3://bucket/a.png", "file:///etc/passwd", "/etc/passwd",
    "../secret.png", "x/../../secret.png", "link.png", "a\0.png", "\ud800.png",
]  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["file", "frame"])
@pytest.mark.parametrize("path", HOSTILE)
def test_what_leads_outside_is_hostile_at_every_level(media: Media, path: str, kind: str, level: str) -> None:
    error = fault(ImageRef(path, kind), media, level)
    assert (error.cause, error.hostile) == ("image_path", True)
    str(error).encode()
    with pytest.raises(RecordError):
        open_picture(ImageRef(path, kind, 0, 3), media)


def test_file_urls_are_paths_below_the_root(media: Media, tmp_path: Path) -> None:
    link = tmp_path / "linked_root"
    link.symlink_to(media.root)
    for root in (media.root, link):
        for base in (media.root, root):
            for head in ("file://", "FILE://", "file://localhost"):
                (ref,) = settle(ImageRef(f"{head}{base}/a%20b.png", "url"), replace(media, root=root))
                assert ref == ImageRef("a b.png")
                assert open_picture(ref, media).size == (5, 3)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "file://{root}/../secret.png", "file://{root}/%2e%2e/secret.png", "file://{root}/link.png",
        "file://{root}/a%00.png", "file://host{root}/a b.png", "file://[{root}", "file://", "file:///", "file://{root}x/a",
    ],
)  # fmt: skip
def test_file_urls_outside_the_root_are_hostile(media: Media, url: str) -> None:
    error = fault(ImageRef(url.format(root=media.root), "url"), media)
    assert (error.cause, error.hostile) == ("image_path", True)


def test_the_web_is_refused_unless_it_is_allowed(media: Media) -> None:
    error = fault(ImageRef("https://host/a.png", "url"), media)
    assert (error.cause, error.hostile) == ("image_url", True)
    assert "allow_http" in str(error)
    assert "\x1b" not in str(fault(ImageRef("http://host/\x1b[31m", "url"), media))
    with pytest.raises(RecordError, match="still on the web"):
        open_picture(ImageRef("https://host/a.png", "url"), media)


class Site(http.server.BaseHTTPRequestHandler):
    """`/a.png` is a picture; the rest is trouble."""

    def do_GET(self) -> None:
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        if self.path == "/none":
            self.send_error(404)
            return
        content = {"/a.png": png(), "/large": bytes(5000), "/short": b"cut"}.get(self.path, b"x")
        self.send_response(200)
        self.send_header("Content-Length", "900" if self.path == "/short" else str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_allowed_picture_is_fetched(media: Media, site: str) -> None:
    (ref,) = settle(ImageRef(f"{site}/a.png", "url"), replace(media, allow_http=True))
    assert ref == ImageRef("", "bytes", data=png())
    assert open_picture(ref, media).size == (5, 3)
    header = check_picture(ref, media, "header")
    assert header is not None and header.width == 5


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/none", "404"), ("/redirect", "redirect"), ("/large", "more than 1,000 bytes"), ("/short", "bytes are missing")],
)
def test_downloads_that_fail_are_named(site: str, monkeypatch: pytest.MonkeyPatch, path: str, reason: str) -> None:
    monkeypatch.setattr(media_module, "MAX_DOWNLOAD", 1000)
    with pytest.raises(RecordError, match=reason) as caught:
        fetch(site + path)
    assert str(caught.value).startswith(site + path)
    assert caught.value.cause == "image_url"


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/a", "http://", "http://[", "http://a b/\n", "http://\ud800/"])
def test_urls_that_lead_nowhere_are_named(url: str) -> None:
    with socket.socket() as closed:  # bound and not listening: refused
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(RecordError, match="cannot be fetched") as caught:
            fetch(url.format(port=closed.getsockname()[1]))
    str(caught.value).encode()


def test_a_slow_download_is_given_up(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "_DEADLINE_S", -1)
    with pytest.raises(RecordError, match="took more than"):
        fetch(f"{site}/a.png")


@pytest.mark.parametrize("named", ["clip.mp4", "clip"])
def test_a_video_settles_into_its_frames(media: Media, named: str) -> None:
    refs = settle(ImageRef(named, "frame"), media)
    assert refs == [ImageRef("clip.mp4", "frame", index, 3) for index in range(3)]
    assert settle(refs[0], media) == [refs[0]]
    reds = [open_picture(ref, media).getpixel((5, 5)) for ref in refs]
    assert [pixel[0] // 80 for pixel in reds if isinstance(pixel, tuple)] == [0, 1, 2]
    for level in LEVELS:
        header = check_picture(refs[0], media, level)
        assert (header and header.width) == (32 if level in ("header", "decode") else None)


@pytest.mark.parametrize("named", ["none.mp4", "v_none.id", "x" * 300, ""])
def test_a_video_that_is_not_there_is_named(media: Media, named: str) -> None:
    assert fault(ImageRef(named, "frame"), media, "exists").cause in ("video_missing", "image_path")


def test_pictures_are_found_by_every_kind_of_reference(media: Media, tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    shard.write_bytes(b"abc" + png(7) + b"def")
    refs = {
        "file": ImageRef("a b.png"),
        "bytes": ImageRef("", "bytes", data=png()),
        "span": located(ImageRef("", "span", 3, len(png(7))), str(shard), Path()),
        "blob": located(ImageRef("digest", "blob", 3, len(png(7))), "", shard),
    }
    for ref in refs.values():
        assert open_picture(ref, media).size[1] == 3
        assert check_picture(ref, media, "decode") is not None
        assert name_of(ref, media)
    for level in ("exists", "header"):
        gone = replace(refs["span"], path=str(tmp_path / "gone"))
        assert fault(gone, media, level).cause == "image_missing"
    assert fault(replace(refs["span"], at=90), media, "header").cause == "image_empty"
    assert fault(replace(refs["span"], size=9), media, "header").cause == "image_unreadable"
