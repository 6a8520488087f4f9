"""The page as a browser shows it, and as HTTP clients meet it. Needs Gradio; the browser is Debian's chromium."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

pytest.importorskip("gradio", minversion="6", reason="needs gradio 6 (pip install 'llava-train[web]')")
import uvicorn
from starlette.testclient import TestClient

from llava_train.chat import session
from llava_train.data.pictures.images import open_image
from llava_train.inference import Prompt, answer, message, read_pictures
from llava_train.web.server import build_app
from llava_train.web.talk import Settings

QUESTION = "What colour is it?"
TOKENS = 24
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def expected(assembly, folder: Path, name: str) -> str:
    pictures = read_pictures(assembly, [open_image(folder, name)])
    return answer(assembly, [Prompt((message("user", QUESTION, 1),), pictures)], TOKENS)[0]


@pytest.fixture(scope="module")
def app(assembly, other, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
    yield build_app([("ours", assembly), ("other", other)], Settings(max_new_tokens=TOKENS))
    patch.undo()


@contextmanager
def served(app) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def address(app) -> Iterator[str]:
    with served(app) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    # Chromium's sandbox is not for root.
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser.new_context()  # one for all: what a page consists of is loaded once
        browser.close()


class Visitor:
    """Somebody with a browser; `requests` are the addresses it asked for, `errors` what went wrong in its scripts."""

    def __init__(self, browser, address: str) -> None:
        self.page = browser.new_page()
        self.page.set_default_timeout(30_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#question textarea")

    def ask(self, text: str, picture: Path | None = None) -> None:
        if picture is not None:
            self.page.set_input_files("#question input[type=file]", picture)
            self.page.wait_for_selector("#question .thumbnail-item, #question img")
        self.page.fill("#question textarea", text)
        self.page.click("#question [data-testid=submit-button]")

    def answers(self) -> list[str]:
        return [each.text_content() or "" for each in self.page.query_selector_all("[data-testid=bot] .chatbot")]

    def reads(self, *texts: str) -> None:
        """Wait until these are the answers."""
        self.until(lambda: [" ".join(each.split()) for each in self.answers()], [" ".join(t.split()) for t in texts])

    def warned(self, text: str) -> None:
        self.page.locator(".toast-body", has_text=text).first.wait_for()

    def until(self, look, wanted) -> None:
        begun = time.monotonic()
        while (found := look()) != wanted:
            assert time.monotonic() - begun < 30, f"{found!r} is not {wanted!r}"
            self.page.wait_for_timeout(50)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()


@pytest.fixture
def visitor(browser, address: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, address)
    yield visitor
    assert {each.split("/")[2] for each in visitor.requests if each[:4] == "http"} == {address.split("/")[2]}
    assert visitor.errors == []
    visitor.page.close()


def test_two_models_answer_a_question_about_a_picture(visitor: Visitor, assembly, other, parts: Path) -> None:
    both = [expected(each, parts / "data", "1.png") for each in (assembly, other)]
    assert both[0] != both[1] and all(both)
    visitor.ask(QUESTION, parts / "data" / "1.png")
    visitor.reads(*both)
    loaded = "(e) => e.complete && e.naturalWidth > 0"
    assert [each.evaluate(loaded) for each in visitor.page.query_selector_all(".message img")] == [True, True]
    assert visitor.page.input_value("#question textarea") == ""
    visitor.press("Regenerate")
    visitor.page.wait_for_timeout(500)
    visitor.reads(*both)
    visitor.press("New conversation")
    visitor.reads()
    visitor.press("Regenerate")
    visitor.warned("no question yet")


def test_visitors_do_not_hear_each_other(visitor: Visitor, browser, address: str, assembly, other, parts: Path) -> None:
    second = Visitor(browser, address)
    visitor.ask(QUESTION, parts / "data" / "1.png")
    second.ask(QUESTION, parts / "data" / "2.png")
    visitor.reads(*(expected(each, parts / "data", "1.png") for each in (assembly, other)))
    second.reads(*(expected(each, parts / "data", "2.png") for each in (assembly, other)))
    second.page.close()


def test_what_cannot_be_asked_is_a_warning_and_changes_nothing(visitor: Visitor, parts: Path, tmp_path: Path) -> None:
    visitor.ask("look: <image>")
    visitor.warned("ours: the text holds '<image>', which stands for a picture")
    visitor.until(lambda: visitor.page.input_value("#question textarea"), "look: <image>")
    broken = tmp_path / "broken.png"
    broken.write_bytes((parts / "data" / "1.png").read_bytes()[:60])
    visitor.ask("What is it?", broken)
    visitor.warned("broken.png: ")
    assert visitor.page.input_value("#question textarea") == "What is it?"
    assert str(tmp_path) not in visitor.page.content() and "uploads" not in visitor.page.inner_text("body")
    assert visitor.answers() == []


def endless(ended: threading.Semaphore):
    """An answer without end, in place of `stream`; `ended` counts those that were ended."""

    def stream(*_: object) -> Iterator[str]:
        try:
            for number in count():
                yield f"word{number} "
                time.sleep(0.05)
        finally:
            ended.release()

    return stream


def test_stop_ends_the_answer_and_the_page_goes_on(visitor: Visitor, monkeypatch) -> None:
    ended = threading.Semaphore(0)
    monkeypatch.setattr(session, "stream", endless(ended))
    visitor.ask("Go on and on.")
    visitor.until(lambda: len(visitor.answers()), 2)
    visitor.press("Stop")
    for _ in range(2):
        assert ended.acquire(timeout=10)
    monkeypatch.setattr(session, "stream", lambda *_: (each for each in ["yes"]))
    visitor.ask("And now?")
    visitor.until(lambda: visitor.answers()[1::2], ["yes", "yes"])
    assert all(each.startswith("word0") for each in visitor.answers()[::2])


def test_a_visitor_who_leaves_stops_the_answer(browser, address: str, monkeypatch) -> None:
    ended = threading.Semaphore(0)
    monkeypatch.setattr(session, "stream", endless(ended))
    visitor = Visitor(browser, address)
    visitor.ask("Go on and on.")
    visitor.until(lambda: len(visitor.answers()), 2)
    visitor.page.close()
    for _ in range(2):
        assert ended.acquire(timeout=20)


def test_boxes_and_markup_in_an_answer(visitor: Visitor, parts: Path, monkeypatch) -> None:
    text = "<b>A</b> ![](http://example.com/a.png) shape [0.1, 0.2, 0.5, 0.8]"
    monkeypatch.setattr(session, "stream", lambda *_: (each for each in [text]))
    visitor.ask("Where is it?", parts / "data" / "1.png")
    visitor.reads(text, text)
    visitor.until(lambda: len(visitor.page.query_selector_all(".bot img")), 2)
    width = "(e) => e.decode().then(() => e.naturalWidth)"
    assert [each.evaluate(width) for each in visitor.page.query_selector_all(".bot img")] == [512, 512]


def test_only_who_may_comes_in(assembly) -> None:
    client = TestClient(build_app([("ours", assembly)]), base_url="http://localhost:7860")
    assert client.get("/", headers={"host": "attacker.example:7860"}).status_code == 403
    upload = {"files": ("a.png", b"x")}
    for origin, status in (("https://attacker.example", 403), ("null", 403), ("http://localhost:7860", 200)):
        assert client.post("/gradio_api/upload", files=upload, headers={"origin": origin}).status_code == status
    found = client.get("/")
    assert found.status_code == 200
    assert "default-src 'self'" in found.headers["content-security-policy"]
    assert client.get("/config").status_code == 200
    locked = build_app([("ours", assembly)], auth=("me", "secret"), hosts=None)
    client = TestClient(locked, base_url="http://any.example")
    assert client.get("/config").status_code == 401
    assert client.post("/gradio_api/upload", files=upload).status_code == 401
    assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
    assert client.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
    assert client.get("/config").status_code == 200


def test_no_file_of_the_server_and_no_other_server_can_be_had(app) -> None:
    client = TestClient(app, base_url="http://localhost")
    for path in ("/etc/passwd", str(Path(session.__file__)), "http://localhost:1/", "../../etc/passwd"):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
    config = client.get("/config").json()
    assert not config["analytics_enabled"]
    assert {each["api_visibility"] for each in config["dependencies"]} == {"private"}
    asked = next(each["id"] for each in config["dependencies"] if each["targets"][0][1] == "submit")
    for path, url in (("/etc/passwd", None), ("http://127.0.0.1:1/a.png", None), ("x", "http://127.0.0.1:1/a.png")):
        file = {"path": path, "url": url, "meta": {"_type": "gradio.FileData"}}
        call = {"data": [{"text": "?", "files": [file]}, None], "fn_index": asked, "session_hash": "s"}
        assert client.post("/gradio_api/run/predict", json=call).status_code >= 400
