import base64
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_train import Conversation, export, load_model
from llava_train.data.pictures.images import open_image
from llava_train.errors import DataError
from llava_train.inference import Prompt, answer, message, prompt_ids, read_pictures


@pytest.fixture(scope="module")
def assembly(finished: Path):
    return load_model(finished)


@pytest.fixture
def red(parts: Path) -> Path:
    return parts / "data" / "1.png"


@pytest.fixture
def blue(parts: Path) -> Path:
    return parts / "data" / "2.png"


def ids(conversation: Conversation) -> list[int]:
    return prompt_ids(conversation.assembly, conversation.prompt("And now?"))


def kept(conversation: Conversation) -> tuple:
    return [*conversation.turns], [*conversation.waiting]


def test_several_turns_remember_pictures_and_answers(assembly, red: Path, blue: Path) -> None:
    conversation = Conversation(assembly, max_new_tokens=4)
    first = "".join(conversation.start([red, blue], "What colours are they?"))
    conversation.show(red)
    "".join(conversation.ask("And these?", [blue]))
    "".join(conversation.ask("Are you sure?"))
    turns = conversation.transcript()
    assert [(turn["role"], turn["images"]) for turn in turns[::2]] == [("user", 2), ("user", 2), ("user", 0)]
    assert {turn["role"] for turn in turns[1::2]} == {"assistant"}
    assert turns[1]["text"] == first.strip()
    expected = (
        message("user", "What colours are they?", 2),
        message("assistant", turns[1]["text"]),
        message("user", "And these?", 2),
        message("assistant", turns[3]["text"]),
        message("user", "Are you sure?"),
        message("assistant", turns[5]["text"]),
        message("user", "And now?"),
    )
    prompt = conversation.prompt("And now?")
    assert prompt.messages == expected
    pixels = [picture.pixels for picture in prompt.pictures]
    assert torch.equal(pixels[0], pixels[2])
    assert torch.equal(pixels[1], pixels[3])
    assert not torch.equal(pixels[0], pixels[1])
    conversation.clear()
    assert conversation.transcript() == []


def test_start_forgets_what_was(assembly, red: Path, blue: Path) -> None:
    conversation = Conversation(assembly, max_new_tokens=2)
    "".join(conversation.ask("Say yes."))
    conversation.show(blue)
    "".join(conversation.start(str(red), "What colour is it?"))
    assert [turn["images"] for turn in conversation.transcript()] == [1, 0]
    assert conversation.waiting == []


def test_streaming_says_what_a_batch_says(assembly, red: Path) -> None:
    pictures = read_pictures(assembly, [open_image(red.parent, red.name)])
    prompt = Prompt((message("user", "What colour is it?", 1),), pictures)
    conversation = Conversation(assembly, max_new_tokens=6)
    assert "".join(conversation.start(red, "What colour is it?")).strip() == answer(assembly, [prompt], 6)[0]


def test_the_prompt_is_the_one_of_training(assembly, parts: Path) -> None:
    """The ids before the answer are those that `inspect` shows for the same record."""
    from llava_train.data.encode import Encoder, encode, expand
    from llava_train.data.pictures.media import Media
    from llava_train.data.pictures.shapes import Picture
    from llava_train.data.reading import read_samples

    sample = next(iter(read_samples(str(parts / "data" / "data.json"), Media(parts / "data"))))
    encoder = Encoder(assembly.tokenizer, assembly.template, assembly.spec.image_tokens, 256)
    encoded = encode(sample, encoder)
    input_ids, labels = expand(encoded.input_ids, encoded.spans, encoded.image_tokens, encoder.image_token_id)
    picture = Picture(torch.zeros(1), tokens=assembly.spec.image_tokens)
    prompt = Prompt((message("user", "What colour is it?", 1),), (picture,))
    ids = prompt_ids(assembly, prompt)
    assert input_ids[: len(ids)].tolist() == ids
    assert labels[len(ids)] != -100


def test_an_exported_folder_answers_alike(assembly, finished: Path, red: Path, tmp_path: Path) -> None:
    stock = load_model(export(finished, tmp_path / "hf", dtype="float32"))
    said = [
        "".join(Conversation(each, max_new_tokens=5).start(red, "What colour is it?")) for each in (assembly, stock)
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        (lambda talk: talk.ask("look: <image>"), "stands for a picture"),
        (lambda talk: talk.show("nowhere.png"), "no such image"),
        (lambda talk: talk.ask("What?", ["http://127.0.0.1:9/a.png"]), "not public"),
        (lambda talk: talk.start(["nowhere.png"], "What?"), "no such image"),
        (lambda talk: talk.start("data:image/png;base64,AAAA", "What?"), "not a readable image"),
    ],
)
def test_what_cannot_be_asked_changes_nothing(assembly, red: Path, do, reason: str) -> None:
    conversation = Conversation(assembly, max_new_tokens=2)
    "".join(conversation.start(red, "What colour is it?"))
    conversation.show(red)
    before = kept(conversation)
    with pytest.raises(DataError, match=reason):
        list(do(conversation) or ())
    assert kept(conversation) == before
    list(conversation.ask("And now?"))
    assert [turn["images"] for turn in conversation.transcript()] == [1, 0, 1, 0]


def test_an_answer_that_is_cut_off_changes_nothing_and_stops_the_model(assembly, red: Path, monkeypatch) -> None:
    conversation = Conversation(assembly, max_new_tokens=2)
    "".join(conversation.start(red, "What colour is it?"))
    conversation.max_new_tokens = 10**6
    monkeypatch.setattr("llava_train.inference.stop_ids", lambda _: None)  # an answer that does not end by itself
    conversation.show(red)
    before, threads = kept(conversation), threading.active_count()
    for pieces in (conversation.ask("And this?"), conversation.start(red, "And this?"), conversation.regenerate()):
        next(pieces)
        pieces.close()
        assert kept(conversation) == before
        assert threading.active_count() == threads
    pieces = conversation.ask("And this?")
    next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    assert (kept(conversation), threading.active_count()) == (before, threads)


def test_an_error_of_the_model_changes_nothing(assembly, red: Path, monkeypatch) -> None:
    conversation = Conversation(assembly, max_new_tokens=2)
    conversation.show(red)
    before = kept(conversation)
    monkeypatch.setattr(assembly.model.lm_head, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        "".join(conversation.ask("What colour is it?"))
    assert kept(conversation) == before


def test_the_last_question_is_answered_again(assembly, red: Path, blue: Path) -> None:
    conversation = Conversation(assembly, max_new_tokens=8, temperature=5.0, seed=1)
    with pytest.raises(DataError, match="no question yet"):
        conversation.regenerate()
    "".join(conversation.start(red, "What colour is it?"))
    conversation.show(blue)
    first = conversation.transcript()
    assert "".join(conversation.regenerate()).strip() == first[1]["text"]
    conversation.seed = 2
    "".join(conversation.regenerate())
    second = conversation.transcript()
    assert len(second) == len(first)
    assert second[0] == first[0]
    assert second[1] != first[1]
    assert len(conversation.waiting) == 1


def test_sampling(assembly, red: Path) -> None:
    def said(**settings: float) -> str:
        return "".join(Conversation(assembly, max_new_tokens=8, **settings).start(red, "What colour is it?"))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert said(temperature=5.0, seed=1) == said(temperature=5.0, seed=1) != said(temperature=5.0, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert said(temperature=5.0, seed=1, top_p=1e-9) == said()


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_settings_that_no_answer_can_have(assembly, settings: dict) -> None:
    (name,) = settings
    with pytest.raises(DataError, match=f"^{name}: "):
        Conversation(assembly, **settings)


def test_a_saved_conversation_goes_on_as_it_would_have(assembly, red: Path, blue: Path, tmp_path: Path) -> None:
    conversation = Conversation(assembly, max_new_tokens=4)
    encoded = "data:image/png;base64," + base64.b64encode(blue.read_bytes()).decode()
    "".join(conversation.start([red, Image.open(blue)], "What colours are they?"))
    "".join(conversation.ask("And this?", [encoded]))
    conversation.show(blue)
    conversation.save(tmp_path / "a" / "talk.json")
    shutil.move(tmp_path / "a", tmp_path / "b")
    again = Conversation.load(tmp_path / "b" / "talk.json", assembly, max_new_tokens=4)
    assert again.transcript() == conversation.transcript()
    assert ids(again) == ids(conversation)
    for one, other in zip(again.prompt("And now?").pictures, conversation.prompt("And now?").pictures, strict=True):
        assert torch.equal(one.pixels, other.pixels)
    assert "".join(again.ask("And now?")) == "".join(conversation.ask("And now?"))
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["talk-1.png", "talk-2.png", "talk.json"]
    assert str(red) in (tmp_path / "b" / "talk.json").read_text()


def test_pictures_that_are_gone_or_changed_are_named(assembly, red: Path, tmp_path: Path) -> None:
    shutil.copy(red, tmp_path / "red.png")
    conversation = Conversation(assembly, max_new_tokens=2)
    "".join(conversation.start([tmp_path / "red.png", Image.open(red)], "What colour is it?"))
    conversation.save(tmp_path / "talk.json")
    for name in ("red.png", "talk-1.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: is another picture"):
            Conversation.load(tmp_path / "talk.json", assembly)
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=f"{name}: no such image"):
            Conversation.load(tmp_path / "talk.json", assembly)
        shutil.copy(red, tmp_path / name)
    assert Conversation.load(tmp_path / "talk.json", assembly).transcript() == conversation.transcript()


@pytest.mark.parametrize(
    "content",
    [
        "nothing",
        "[]",
        "{}",
        '{"turns": [1], "waiting": []}',
        '{"turns": [{"role": "user", "text": "a", "images": []}], "waiting": []}',
        '{"turns": [{"role": "user", "text": 1, "images": []}, {"role": "assistant", "text": ""}], "waiting": []}',
        '{"turns": [], "waiting": [{"file": "../a.png", "sha256": ""}]}',
        '{"turns": [], "waiting": [{"url": "a.png", "sha256": ""}]}',
        '{"turns": [], "waiting": [{"path": 1, "sha256": ""}]}',
    ],
)
def test_files_that_are_no_conversations(assembly, tmp_path: Path, content: str) -> None:
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(DataError):
        Conversation.load(tmp_path / "talk.json", assembly)


def test_limits_are_those_of_the_conversation(assembly, red: Path) -> None:
    conversation = Conversation(assembly)
    conversation.limits = replace(conversation.limits, files=False)
    with pytest.raises(DataError, match="files are not read"):
        conversation.show(red)


def test_what_is_saved_can_be_read_by_others(assembly, red: Path, tmp_path: Path) -> None:
    conversation = Conversation(assembly, max_new_tokens=2)
    "".join(conversation.start(red, "What colour is it?"))
    conversation.save(tmp_path / "talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["role"] for turn in saved["turns"]] == ["user", "assistant"]
    assert saved["turns"][0]["images"][0]["path"] == str(red)


def test_a_template_that_says_nothing_without_a_picture_asks_for_one(assembly) -> None:
    captions = Conversation(replace(assembly, template="{{ '' }}"), max_new_tokens=2)
    with pytest.raises(DataError, match="says nothing without a picture; show one"):
        "".join(captions.ask("What is it?"))
    assert kept(captions) == ([], [])
