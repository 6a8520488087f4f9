"""Ollama's template says what ours says: its Go text is interpreted, with the few actions that it uses."""

import re
from pathlib import Path

import pytest

from llava_train.data.templates.template import load_template, portable, template_names
from llava_train.exporters.gguf.modelfile import derive, modelfile
from tests import tiny

_ACTION = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)
TALKS = [
    [("user", "Hi")],
    [("user", "What?"), ("assistant", "That."), ("user", "Why?")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho."), ("user", "So?")],
]


def go(template: str, turns: list[tuple[str, str]]) -> str:
    """Render as Ollama does: `.System` is the system text, `.Messages` are all messages."""
    parts = _ACTION.split(template)
    system = "".join(text for role, text in turns if role == "system")

    def run(at: int, dot: dict[str, str], live: bool) -> tuple[str, int]:
        out = parts[at] if live else ""
        while at + 1 < len(parts):
            action, at = parts[at + 1], at + 2
            if action == "end" or action.startswith("else"):
                return out, at - 2
            if action.startswith("range"):
                said = ""
                for role, text in turns:
                    one, end = run(at, {"Role": role, "Content": text}, live)
                    said += one
                at = end + 2
                out += said
            elif action.startswith("if"):
                done, chosen = False, ""
                while True:
                    test = action.removeprefix("else").strip()
                    true = not done and (
                        test == "" or (bool(system) if "System" in test else dot["Role"] == test.split('"')[1])
                    )
                    one, at = run(at, dot, live and true)
                    chosen, done = chosen + one, done or true
                    action, at = parts[at + 1], at + 2
                    if action == "end":
                        break
                out += chosen
            else:
                out += ({".System": system, ".Content": dot.get("Content", "")}[action]) if live else ""
            out += parts[at] if live else ""
        return out, at

    return run(0, {}, True)[0]


def ours(name: str, folder: Path):
    tokenizer, template = tiny.make_tokenizer(folder), portable(load_template(name))

    def render(turns) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )

    return render


@pytest.mark.parametrize("name", [name for name in template_names() if name != "plain"])
def test_the_go_template_says_what_ours_says(name: str, tmp_path: Path) -> None:
    render = ours(name, tmp_path)
    pieces = derive(render)
    assert pieces is not None
    for turns in TALKS:
        assert go(pieces.go(), turns) == render(turns)
        assert "<s>" + go(pieces.without("<s>").go(), turns) == render(turns) or not render(turns).startswith("<s>")


def test_a_template_that_is_more_than_texts_around_messages_has_none(tmp_path: Path) -> None:
    assert derive(ours("plain", tmp_path)) is None
    assert derive(lambda turns: f"{len(turns)} messages: " + "".join(text for _, text in turns)) is None


def test_a_modelfile_names_both_files_and_every_stop(tmp_path: Path) -> None:
    text = modelfile("model.gguf", "mmproj.gguf", derive(ours("chatml", tmp_path)), ["</s>", "<|im_end|>"])
    assert re.findall(r"^FROM \./(.*)$", text, re.MULTILINE) == ["model.gguf", "mmproj.gguf"]
    assert re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE) == ["</s>", "<|im_end|>"]
    assert "TEMPLATE" not in modelfile("model.gguf", "mmproj.gguf", None, [])
