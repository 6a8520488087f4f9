"""Pictures of a conversation: where they may come from, and how much of them."""

import base64
import http.server
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_train.chat import download as download_module
from llava_train.chat.download import is_public
from llava_train.chat.pictures import PictureLimits, read_picture
from llava_train.data.pictures.images import open_image
from llava_train.errors import DataError

OPEN = PictureLimits(max_bytes=5000, private=True)


def png(width: int = 5, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, 3), 1000 if mode == "I;16" else (9, 8, 7)).save(stream, "PNG")
    return stream.getvalue()


class Site(http.server.BaseHTTPRequestHandler):
    """A picture, and what can be wrong with one."""

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        leads = {
            "/once": "/a.png",
            "/loop": "/loop",
            "/file": "file:///etc/passwd",
            "/inside": f"http://127.0.0.2:{port}/a.png",
            "/3": "/2",
            "/2": "/once",
            "/4": "/3",
        }
        if self.path in leads:
            self._head(302, ("Location", leads[self.path]))
        elif self.path == "/none":
            self.send_error(404)
        elif self.path == "/page":
            self._head(200, ("Content-Type", "text/html"))
            self.wfile.write(b"<html>")
        elif self.path in ("/drip", "/headers", "/endless"):
            self._endless()
        else:
            content = {"/large": bytes(6000), "/text": b"no picture"}.get(self.path, png())
            more = 900 if self.path == "/short" else 0
            self._head(200, ("Content-Length", str(len(content) + more)))
            self.wfile.write(content)

    def _head(self, status: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _endless(self) -> None:
        if self.path != "/headers":
            self._head(200, ("Content-Type", "image/png"))
        piece, pause = (bytes(1000), 0) if self.path == "/endless" else (b"X", 0.02)
        try:
            while True:
                self.wfile.write(piece)
                time.sleep(pause)
        except OSError:
            self.server.given_up.set()

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.given_up = threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def site(server: http.server.ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def fault(source: str | Image.Image, limits: PictureLimits = OPEN) -> str:
    with pytest.raises(DataError) as caught:
        read_picture(source, limits)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_every_source_gives_the_same_picture(site: str, tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(png())
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    sources = [tmp_path / "a b.png", str(tmp_path / "a b.png"), url, f"{site}/a b.png?x=1#y", f"{site}/once"]
    sources.append(Image.new("RGB", (5, 3), (9, 8, 7)))
    for source in sources:
        picture = read_picture(source, OPEN)
        assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (5, 3), (9, 8, 7))


def test_grey_of_16_bits_is_the_same_in_memory_and_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(mode="I;16"))
    image = Image.open(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_picture(image)), np.asarray(open_image(tmp_path, "a.png")))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none", "404"),
        ("/large", "more than the 5,000 bytes"),
        ("/endless", "more than the 5,000 bytes"),
        ("/short", "900 bytes are missing"),
        ("/page", "text/html"),
        ("/text", "not a readable image"),
        ("/file", "leads to 'file:///etc/passwd'"),
        ("/loop", "more than 3 redirects"),
        ("/4", "more than 3 redirects"),
    ],
)
def test_what_a_server_does_wrong_is_named(site: str, path: str, reason: str) -> None:
    message = fault(site + path)
    assert reason in message
    assert message.startswith(site + path)


def test_three_redirects_are_followed(site: str) -> None:
    assert read_picture(f"{site}/3", OPEN).size == (5, 3)


def test_a_size_that_is_told_is_believed_at_once(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("http.client.HTTPResponse.read1", lambda *_: pytest.fail("read all the same"))
    assert "more than the 5,000 bytes" in fault(f"{site}/large")


@pytest.mark.parametrize("path", ["/drip", "/headers"])
def test_the_time_is_that_of_the_whole_download(server, site: str, path: str) -> None:
    server.given_up.clear()
    begun = time.monotonic()
    assert "took more than 0.3 seconds" in fault(site + path, PictureLimits(timeout_s=0.3, private=True))
    assert time.monotonic() - begun < 3
    assert server.given_up.wait(5), "the connection stayed open"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]", "0.0.0.0"])
def test_what_is_not_public_is_refused(site: str, host: str) -> None:
    port = site.rpartition(":")[2]
    assert "not public" in fault(f"http://{host}:{port}/a.png", PictureLimits())


def test_a_redirect_is_looked_at_anew(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    assert read_picture(f"{site}/once", PictureLimits()).size == (5, 3)
    assert "not public" in fault(f"{site}/inside", PictureLimits())


def test_the_connection_goes_where_was_looked(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that says something else the second time is not asked a second time."""
    answers = iter(["203.0.113.7", "127.0.0.1"])
    resolve = socket.getaddrinfo
    asked = []

    def changing(host: str, *arguments: object, **options: object) -> object:
        if host == "pictures.test":
            asked.append(host)
            host = next(answers)
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    monkeypatch.setattr(download_module, "is_public", lambda address: address == "203.0.113.7")
    fault(f"http://pictures.test:{site.rpartition(':')[2]}/a.png", PictureLimits(timeout_s=0.3))
    assert asked == ["pictures.test"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("64:ff9b::5db8:d822", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
    ],
)
def test_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("http://", "with a host"),
        ("http://[", "cannot be fetched"),
        ("http://a:b/", "cannot be fetched"),
        ("http://\ud800/", "cannot be fetched"),
        ("file:///etc/passwd", "file:// is not read"),
        ("s3://bucket/a.png", "s3:// is not read"),
        ("data:text/html;base64,AAAA", "must begin like"),
        ("data:image/png,AAAA", "must begin like"),
        ("data:image/png;base64,A*AA", "base64 is damaged"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64," + "A" * 9000, "more than the 5,000"),
        ("data:image/png;base64," + "A" * 80, "not a readable image"),
        ("a\0.png", "cannot be read"),
        ("~nobody-has-this-name/a.png", "cannot be read"),
        ("nowhere.png", "no such image"),
        ("/dev/zero", "a device"),
        ("", "a folder"),
        (Image.new("RGB", (4000, 1)), "a strip"),
    ],
)
def test_faults_of_the_source_itself(source: str | Image.Image, reason: str) -> None:
    message = fault(source)
    assert reason in message
    message.encode()
    assert "A" * 50 not in message


def test_limits_say_what_is_not_read(site: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "large.png").write_bytes(bytes(6000))
    assert "URLs are not read" in fault(f"{site}/a.png", PictureLimits(urls=False, private=True))
    assert "files are not read" in fault(str(tmp_path / "a.png"), PictureLimits(files=False))
    assert "6,000 bytes, more than" in fault(str(tmp_path / "large.png"))
