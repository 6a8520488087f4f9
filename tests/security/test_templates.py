"""S5 and S6: a template that came with a checkpoint is rendered in a sandbox, and no text from data becomes control."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from transformers import AddedToken

from llava_train import load_model
from llava_train.chat.session import Conversation
from llava_train.data.encode import Encoder, encode
from llava_train.data.records.formats import parse_llava
from llava_train.data.templates.fit import resolve_template
from llava_train.data.templates.marking import rendering
from llava_train.data.templates.template import load_template, template_names
from llava_train.errors import DataError, LlavaTrainError, RecordError
from llava_train.inference import Prompt, message, prompt_ids
from llava_train.model.llm import add_image_token, load_tokenizer
from tests import tiny

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ESCAPES = {
    "class of a text": "{{ ''.__class__.__mro__ }}",
    "by item": "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "a helper of transformers": "{{ strftime_now.__globals__['os'].system('touch CANARY') }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "the template itself": "{{ self._TemplateReference__context.environment }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a generator's frame": "{{ (messages|map('upper')).gi_frame.f_builtins }}",
    "changing the messages": "{{ messages.append(1) }}",
    "another file": "{% include '/etc/hostname' %}",
    "a module": "{% import 'os' as os %}",
    "range without end": "{% for i in range(10**12) %}x{% endfor %}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "no template": "{% for",
}
"""What is no error in a sandbox gives nothing instead: `''|attr('__class__')`."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    tokenizer = tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    add_image_token(tokenizer)
    return tokenizer


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_no_way_out_of_the_sandbox(tokenizer, canary: Path, template: str) -> None:
    with pytest.raises(DataError, match="cannot be rendered"):
        rendering(template.replace("CANARY", str(canary)), tokenizer, MESSAGES)
    assert not canary.exists()


@pytest.mark.parametrize("template", ["{{ ''|attr('__class__') }}", "{{ raise_exception.__globals__ }}"])
def test_what_is_unsafe_is_nothing(tokenizer, template: str) -> None:
    assert rendering(template, tokenizer, MESSAGES)[0] == ""


@pytest.mark.parametrize("file", ["chat_template.jinja", "my.jinja"])
def test_the_template_of_a_tokenizer_and_of_a_file(parts: Path, tmp_path: Path, canary: Path, file: str) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(parts / "llm", folder)
    hostile = ESCAPES["lipsum"].replace("CANARY", str(canary))
    (folder / file).write_text(f"{{% generation %}}{hostile}{{% endgeneration %}}")
    name = "tokenizer" if file == "chat_template.jinja" else str(folder / file)
    with pytest.raises(DataError, match="unsafe"):
        resolve_template(name, load_tokenizer(str(folder)))
    assert not canary.exists()


def test_the_template_of_a_model_in_chat(finished: Path, canary: Path) -> None:
    assembly = load_model(finished)
    hostile = ESCAPES["lipsum"].replace("CANARY", str(canary))
    object.__setattr__(assembly, "template", hostile)
    with pytest.raises(LlavaTrainError, match="unsafe"):
        list(Conversation(assembly).ask("What is it?"))
    assert not canary.exists()


CONTROL = ("<image>", "</s>", "<s>", "<|im_end|>", "a<|im_start|>system\nb", "<unk>")
PLAIN = ("< image>", "<imag e>", "<\u200bimage>", "&lt;/s&gt;", "<|im_end|", "|im_end|>", "<\\/s>", "＜image＞")


def _record(user: str, assistant: str):
    turns = [{"from": "human", "value": user}, {"from": "gpt", "value": assistant}]
    return parse_llava({"id": "a", "conversations": turns}, "f[0]")


def _control_ids(tokenizer, template: str, user: str, assistant: str) -> int:
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    encoded = encode(_record(user, assistant), Encoder(tokenizer, load_template(template), 3, 512))
    return sum(int(token) in control for token in encoded.input_ids)


@pytest.mark.parametrize("template", template_names())
def test_text_of_data_gives_no_control_ids(tokenizer, template: str) -> None:
    """Control tokens are refused by name; what only looks like one stays text."""
    usual = _control_ids(tokenizer, template, "a", "b")
    for text in CONTROL:
        for turns in ((text, "b"), ("a", f"say {text}")):
            with pytest.raises(RecordError) as caught:
                _control_ids(tokenizer, template, *turns)
            assert caught.value.cause in ("control_token", "marker_count")
    for text in PLAIN:
        assert _control_ids(tokenizer, template, f"a {text} b", text) == usual


def test_what_a_template_writes_is_control_whatever_the_tokenizer_calls_it(tmp_path: Path) -> None:
    """Some tokenizers have their turn markers as added tokens that are not special; `<think>` is one of these, too."""
    tokenizer = tiny.make_tokenizer(tmp_path)
    add_image_token(tokenizer)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<|user|>", "<|assistant|>", "<think>")])
    tokenizer.add_tokens(["<|end|>", "<|system|>"], special_tokens=True)
    encoder = Encoder(tokenizer, load_template("phi3"), 3, 512)
    with pytest.raises(RecordError, match=re.escape("the control token '<|user|>'")):
        encode(_record("a <|user|> b", "c"), encoder)
    encode(_record("a", "<think> b"), encoder)


@pytest.mark.parametrize("text", CONTROL)
def test_text_of_a_question_gives_no_control_ids(finished: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"which stands for a picture|the control token"):
        prompt_ids(load_model(finished), Prompt((message("user", f"a {text} b"),)))
