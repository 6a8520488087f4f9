import io
import json
from pathlib import Path

import pytest
import torch

from llava_train import Chat, export, load_model
from llava_train.chat.terminal import converse, one_shot
from llava_train.data.pictures.images import open_image
from llava_train.errors import DataError
from llava_train.inference import Prompt, answer, message, prompt_ids, read_pictures


@pytest.fixture(scope="module")
def assembly(finished: Path):
    return load_model(finished)


def test_several_turns_remember_pictures_and_answers(assembly, parts: Path) -> None:
    chat = Chat(assembly, max_new_tokens=4)
    chat.show(parts / "data" / "1.png")
    first = "".join(chat.ask("What colour is it?"))
    chat.show(parts / "data" / "2.png")
    "".join(chat.ask("And this?"))
    turns = chat.transcript()
    assert [(turn["role"], turn["images"]) for turn in turns] == [
        ("user", 1),
        ("assistant", 0),
        ("user", 1),
        ("assistant", 0),
    ]
    assert turns[1]["text"] == first.strip()
    chat.clear()
    assert chat.transcript() == []


def test_streaming_says_what_a_batch_says(assembly, parts: Path) -> None:
    pictures = read_pictures(assembly, [open_image(parts / "data", "1.png")])
    prompt = Prompt((message("user", "What colour is it?", 1),), pictures)
    chat = Chat(assembly, max_new_tokens=6)
    chat.show(parts / "data" / "1.png")
    assert "".join(chat.ask("What colour is it?")).strip() == answer(assembly, [prompt], 6)[0]


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


def test_an_exported_folder_answers_alike(assembly, finished: Path, parts: Path, tmp_path: Path) -> None:
    stock = load_model(export(finished, tmp_path / "hf", dtype="float32"))
    said = []
    for each in (assembly, stock):
        chat = Chat(each, max_new_tokens=5)
        chat.show(parts / "data" / "1.png")
        said.append("".join(chat.ask("What colour is it?")))
    assert said[0] == said[1]


def test_a_picture_marker_in_the_text_is_refused_and_changes_nothing(assembly) -> None:
    chat = Chat(assembly)
    with pytest.raises(DataError, match="stands for a picture"):
        "".join(chat.ask("look: <image>"))
    with pytest.raises(DataError, match="no such image"):
        chat.show("nowhere.png")
    assert chat.transcript() == []


def test_terminal_commands(assembly, parts: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    lines = [
        f"/image {parts}/data/1.png",
        "What colour is it?",
        "/image nowhere.png",
        "/save",
        f"/save {tmp_path}/talk.json",
        "/clear",
        "/unknown",
        "/quit",
        "never read",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    converse(Chat(assembly, max_new_tokens=3))
    out, err = capsys.readouterr()
    assert "never read" not in out + err
    assert "nowhere.png: no such image" in err
    assert "started over" in err
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["images"] == [f"{parts}/data/1.png"]
    assert [turn["role"] for turn in saved["turns"]] == ["user", "assistant"]
    one_shot(Chat(assembly, max_new_tokens=3), "Say yes.")
    assert capsys.readouterr().out.endswith("\n")
