import io
from pathlib import Path

import pytest

from llava_train import Conversation, load_model
from llava_train.chat.terminal import converse, one_shot


@pytest.fixture(scope="module")
def assembly(finished: Path):
    return load_model(finished)


def test_commands(assembly, parts: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    picture = parts / "data" / "1.png"
    lines = [
        "What colour is it?",
        "/image also_nowhere.png",
        f"/image '{picture}'",
        "And this?",
        "/regenerate",
        "/save",
        f"/save {tmp_path}/talk.json",
        "/clear",
        "/regenerate",
        f"/load {tmp_path}/nothing.json",
        f"/load {tmp_path}/talk.json",
        "/transcript",
        "/unknown",
        "/quit",
        "never read",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    conversation = Conversation(assembly, max_new_tokens=3)
    converse(conversation, ["nowhere.png", str(picture)])
    out, err = capsys.readouterr()
    assert "never read" not in out + err
    for note in ("\nnowhere.png: no such image", "also_nowhere.png: no such image", "started over", "no question yet"):
        assert note in err
    assert f"{tmp_path}/nothing.json: cannot be read" in err
    assert err.count("/load FILE.json goes on with one") == 3
    assert [turn["images"] for turn in conversation.transcript()] == [1, 0, 1, 0]
    said = [turn["text"] for turn in conversation.transcript()]
    assert out.splitlines()[-4:] == [
        "user: <image> What colour is it?",
        f"assistant: {said[1]}",
        "user: <image> And this?",
        f"assistant: {said[3]}",
    ]


def test_ctrl_c_stops_the_answer_only(assembly, monkeypatch, capsys) -> None:
    lines = iter(["Say yes.", KeyboardInterrupt(), "/transcript"])

    def read() -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def stopped(self: Conversation, text: str):
        yield "ye"
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(Conversation, "ask", stopped)
    converse(Conversation(assembly))
    out, err = capsys.readouterr()
    assert "(answer stopped)" in err
    assert "(/quit ends)" in err
    assert out == "ye"


def test_one_prompt(assembly, capsys) -> None:
    one_shot(Conversation(assembly, max_new_tokens=3), "Say yes.")
    assert capsys.readouterr().out.endswith("\n")
