"""What a visitor says to a model, with a real tiny model and no page."""

import html
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from llava_train import load_model
from llava_train.chat import session
from llava_train.errors import DataError
from llava_train.inference import Prompt, answer, message, read_pictures
from llava_train.web.talk import Question, Request, Settings, Talk, frame_of
from tests import tiny_vlms

SHORT = Settings(max_new_tokens=12)


@pytest.fixture
def kept() -> list[Image.Image]:
    return []


@pytest.fixture
def talk(assembly, kept: list[Image.Image]) -> Talk:
    def keep(image: Image.Image) -> str:
        kept.append(image)
        return f"{len(kept)}.png"

    return Talk(assembly, keep)


def question(parts: Path, text: str = "What colour is it?") -> Question:
    path = parts / "data" / "1.png"
    return Question(text, (Image.open(path).convert("RGB"),), (str(path),))


def said(talk: Talk) -> list[tuple[str, str]]:
    """(role, text or path) of every message."""
    contents = [(each["role"], each["content"][0]) for each in talk.shown]
    return [(role, html.unescape(content.get("text", content.get("path")))) for role, content in contents]


def speaking(monkeypatch: pytest.MonkeyPatch, *pieces: str | Exception) -> None:
    """Let the model say this."""

    def stream(*_: object) -> Iterator[str]:
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    monkeypatch.setattr(session, "stream", stream)


def test_an_answer_grows_to_what_the_model_says(talk: Talk, assembly, parts: Path) -> None:
    asked = question(parts)
    states = [html.unescape(shown[-1]["content"][0]["text"]) for shown in talk.answer(Request(asked), SHORT)]
    prompt = Prompt((message("user", asked.text, 1),), read_pictures(assembly, asked.images))
    assert len(states) > 3 and states[-1] == answer(assembly, [prompt], 12)[0]
    assert all(states[-1].startswith(each.strip()) for each in states)
    assert said(talk)[:2] == [("user", asked.paths[0]), ("user", asked.text)]


def test_the_next_question_follows_and_the_last_can_be_asked_again(talk: Talk, parts: Path, monkeypatch) -> None:
    list(talk.answer(Request(question(parts)), SHORT))
    first = said(talk)
    speaking(monkeypatch, "blue", " or so")
    list(talk.answer(Request(Question("And now?")), SHORT))
    assert said(talk) == [*first, ("user", "And now?"), ("assistant", "blue or so")]
    speaking(monkeypatch, "red")
    list(talk.answer(Request(), SHORT))
    assert said(talk) == [*first, ("user", "And now?"), ("assistant", "red")]
    talk.clear()
    assert said(talk) == [] and talk.length == 0
    with pytest.raises(DataError, match="no question yet"):
        list(talk.answer(Request(), SHORT))


def test_a_stopped_answer_stays_as_far_as_it_was_said(talk: Talk, parts: Path, monkeypatch) -> None:
    speaking(monkeypatch, "a red", " circle", " and", RuntimeError("never reached"))
    request = Request(question(parts))
    for number, _ in enumerate(talk.answer(request, SHORT)):
        if number == 1:
            request.stopped.set()
    assert said(talk)[-1] == ("assistant", "a red circle")
    prompts = []

    def stream(assembly, prompt: Prompt, *_: object) -> Iterator[str]:
        prompts.append(prompt)
        yield "yes"

    monkeypatch.setattr(session, "stream", stream)
    list(talk.answer(Request(Question("Sure?")), SHORT))
    texts = [part.get("text", "(picture)") for each in prompts[0].messages for part in each["content"]]
    assert texts == ["(picture)", "What colour is it?", "a red circle", "Sure?"]
    assert len(prompts[0].pictures) == 1


def test_what_fails_or_says_nothing_before_it_is_stopped_leaves_no_trace(talk: Talk, parts: Path, monkeypatch) -> None:
    speaking(monkeypatch, "yes")
    list(talk.answer(Request(question(parts)), SHORT))
    before = said(talk)
    speaking(monkeypatch, "well", RuntimeError("out of memory"))
    for request in (Request(question(parts, "Why?")), Request()):
        with pytest.raises(RuntimeError, match="out of memory"):
            list(talk.answer(request, SHORT))
        assert said(talk) == before
    speaking(monkeypatch, " ", "never read")
    request = Request(question(parts, "Why?"))
    request.stopped.set()
    list(talk.answer(request, SHORT))
    assert said(talk) == before
    monkeypatch.undo()
    with pytest.raises(DataError, match="stands for a picture"):
        list(talk.answer(Request(Question("look: <image>")), SHORT))
    with pytest.raises(DataError, match="temperature"):
        list(talk.answer(Request(Question("Why?")), Settings(temperature=-1)))
    assert said(talk) == before


def test_boxes_are_drawn_onto_the_last_picture(talk: Talk, parts: Path, kept, monkeypatch) -> None:
    speaking(monkeypatch, "A shape [0.1, 0.2", ", 0.5, 0.8].")
    list(talk.answer(Request(question(parts)), SHORT))
    assert said(talk)[-2:] == [("assistant", "A shape [0.1, 0.2, 0.5, 0.8]."), ("assistant", "1.png")]
    assert max(kept[0].size) == 512
    list(talk.answer(Request(Question("And here?", (Image.new("RGB", (600, 300)),), ("2.png",))), SHORT))
    assert kept[1].size == (600, 300)
    talk.clear()
    list(talk.answer(Request(Question("Without a picture?")), SHORT))
    assert len(kept) == 2


def test_text_is_shown_as_it_is(talk: Talk, monkeypatch) -> None:
    speaking(monkeypatch, "<b>&amp;")
    list(talk.answer(Request(Question("<i>")), SHORT))
    assert [each["content"][0]["text"] for each in talk.shown] == ["&lt;i&gt;", "&lt;b&gt;&amp;amp;"]


def test_an_empty_answer_is_seen(talk: Talk, monkeypatch) -> None:
    speaking(monkeypatch)
    list(talk.answer(Request(Question("Hm?")), SHORT))
    assert said(talk)[-1] == ("assistant", "(an empty answer)")


def test_numbers_refer_to_what_the_model_read(assembly, tmp_path: Path) -> None:
    wide = Image.new("RGB", (300, 100))
    padded = frame_of(assembly, wide)
    assert (padded.width, padded.height, padded.padded, padded.scale) == (300, 100, True, (1000, 1000))
    first = frame_of(load_model(tiny_vlms.make_qwen2_vl(tmp_path / "2")), wide)
    assert (first.padded, first.scale, first.marked) == (False, (1000, 1000), False)
    second = load_model(tiny_vlms.make_qwen2_5_vl(tmp_path / "2.5"))
    pixels, grid = read_pictures(second, [wide])[0][:2]
    across, down = frame_of(second, wide).scale
    assert (across % 28, down % 28) == (0, 0) and abs(across / down - 3) < 1
    assert pixels.shape[0] == (across // 14) * (down // 14), grid
