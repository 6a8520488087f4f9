from pathlib import Path

import pytest

from llava_train.data.template import load_template, portable, strip_marks, template_names
from llava_train.errors import DataError
from tests import tiny

MESSAGES = [
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "yes"},
]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    *({"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES[1:]),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def render(tokenizer, template: str, messages: list, generate: bool = False) -> str:
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=generate
    )


@pytest.mark.parametrize("name", template_names())
def test_marked_unmarked_and_portable_render_alike(tokenizer, name: str) -> None:
    template = load_template(name)
    expected = render(tokenizer, template, MESSAGES)
    assert render(tokenizer, strip_marks(template), MESSAGES) == expected
    assert render(tokenizer, portable(template), MESSAGES) == expected
    assert render(tokenizer, portable(template), PARTS) == expected
    assert "generation" not in strip_marks(template).replace("add_generation_prompt", "")


@pytest.mark.parametrize("name", template_names())
def test_prefix_preserving_and_prompt_is_a_prefix(tokenizer, name: str) -> None:
    template = load_template(name)
    whole = render(tokenizer, template, MESSAGES)
    assert whole.startswith(render(tokenizer, template, MESSAGES[:2]))
    assert whole.startswith(render(tokenizer, template, MESSAGES[:3], generate=True))
    assert whole.startswith(render(tokenizer, template, MESSAGES[:1], generate=True))


@pytest.mark.parametrize("name", sorted(set(template_names()) - {"plain"}))
def test_answers_end_with_a_supervised_stop(tokenizer, name: str) -> None:
    stop = "<|im_end|>" if name == "chatml" else "</s>"
    encoded = tokenizer.apply_chat_template(
        MESSAGES, chat_template=load_template(name), return_dict=True, return_assistant_tokens_mask=True
    )
    said = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"]) if m]
    text = tokenizer.decode(said)
    assert text.count(stop) == 2
    assert [piece.strip() for piece in text.split(stop)] == ["A cat.", "yes", ""]


def test_a_template_must_say_what_is_supervised(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }}")
    with pytest.raises(DataError, match=r"no \{% generation %\} marks"):
        load_template(str(path))
    with pytest.raises(DataError, match="did you mean 'vicuna_v1'"):
        load_template("vicuna_v2")
    with pytest.raises(DataError, match="carries no chat template"):
        load_template("tokenizer")
    with pytest.raises(DataError, match="cannot be read"):
        load_template("nowhere.jinja")
    path.write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    assert load_template(str(path)) == load_template("tokenizer", own=path.read_text())
