"""Every template of the package, and which tokenizer it goes with."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_train.data.templates.fit import check_template, choose_template, resolve_template, stop_token
from llava_train.data.templates.marking import PROBES, answer_spans, rendering
from llava_train.data.templates.template import declared, load_template, portable, strip_marks, template_names
from llava_train.errors import DataError
from llava_train.model.llm import add_image_token

MESSAGES = [
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "yes"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *MESSAGES]
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA = ("<start_of_turn>", "<end_of_turn>")
PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
INST = ("[INST]", "[/INST]")
LLAMA_EDGES = ("<s>", "</s>")

FITS = {
    # What stands for each LLM: control tokens, (BOS, EOS), text of its own chat template.
    "chatml": [
        (CHATML, ("<|endoftext|>", "<|endoftext|>"), None),
        (CHATML, (None, "<|im_end|>"), "<|im_start|>"),
        ((*CHATML, *INST), ("<s>", "<|im_end|>"), "<|im_start|>"),
        ((*CHATML, *LLAMA3), ("<|begin_of_text|>", "<|im_end|>"), "<|im_start|>"),
        ((*CHATML, *LLAMA3), ("<|begin_of_text|>", "<|im_end|>"), None),
    ],
    "llama3": [
        (LLAMA3, ("<|begin_of_text|>", "<|end_of_text|>"), None),
        (LLAMA3, ("<|begin_of_text|>", "<|eot_id|>"), "<|start_header_id|>"),
        ((*CHATML, *LLAMA3), ("<|begin_of_text|>", "<|eot_id|>"), "<|start_header_id|>"),
    ],
    "gemma": [(GEMMA, ("<bos>", "<eos>"), None), (GEMMA, ("<bos>", "<eos>"), "<start_of_turn>")],
    "phi3": [(PHI3, ("<s>", "<|endoftext|>"), None)],
    "llava_llama_2": [((), LLAMA_EDGES, "[INST] <<SYS>>")],
    "mistral": [((), LLAMA_EDGES, "[INST] "), (INST, LLAMA_EDGES, None)],
    "vicuna_v1": [((), LLAMA_EDGES, None), ((), LLAMA_EDGES, "<|user|>")],
}


def tokenizer_with(tokens=(), edges=LLAMA_EDGES, own: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and control tokens."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {key: token for key, token in zip(("bos_token", "eos_token"), edges) if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    add_image_token(tokenizer)
    tokenizer.chat_template = own
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """One that every template goes with."""
    return tokenizer_with([*CHATML, *LLAMA3, *GEMMA, *PHI3])


def render(tokenizer, template: str, messages: list, generate: bool = False) -> str:
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=generate
    )


def labelled(tokenizer, template: str, messages: list) -> str:
    """The tokens that get a label, as text."""
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return tokenizer.decode([i for i, said in zip(encoded["input_ids"], encoded["assistant_masks"]) if said])


def parts(messages: list) -> list:
    """The same messages with their content as a list of parts."""

    def split(text: str) -> list:
        shown = text.startswith("<image>\n")
        return [{"type": "image"}] * shown + [{"type": "text", "text": text.removeprefix("<image>\n")}]

    return [{**each, "content": split(each["content"])} for each in messages]


@pytest.mark.parametrize("messages", [MESSAGES, SYSTEM], ids=["rounds", "system"])
@pytest.mark.parametrize("name", template_names())
class TestEveryTemplate:
    def test_marked_unmarked_and_portable_render_alike(self, tokenizer, name: str, messages: list) -> None:
        template = load_template(name)
        for generate in (False, True):
            expected = render(tokenizer, template, messages, generate)
            assert render(tokenizer, strip_marks(template), messages, generate) == expected
            assert render(tokenizer, portable(template), messages, generate) == expected
            assert render(tokenizer, portable(template), parts(messages), generate) == expected
        assert "generation" not in strip_marks(template).replace("add_generation_prompt", "")

    def test_prefix_preserving_and_prompt_is_a_prefix(self, tokenizer, name: str, messages: list) -> None:
        template = load_template(name)
        whole = render(tokenizer, template, messages)
        for end in range(1, len(messages)):
            if messages[end - 1]["role"] != "system":
                asks = messages[end - 1]["role"] == "user"
                assert whole.startswith(render(tokenizer, template, messages[:end], generate=asks))

    def test_every_text_is_written_once(self, tokenizer, name: str, messages: list) -> None:
        whole = render(tokenizer, load_template(name), messages)
        dropped = {"system", "user"} if name == "plain" else set()  # captions have no questions, by design
        for each in messages:
            assert whole.count(each["content"]) == (each["role"] not in dropped)
        assert whole.count("<image>") == 1

    def test_answers_and_their_stop_are_supervised_and_nothing_else(self, tokenizer, name: str, messages: list):
        template = load_template(name)
        stop = stop_token(template, tokenizer) or ""
        text, spans = rendering(template, tokenizer, messages)
        said = "".join(text[slice(*span)] for span in spans)
        assert [each.strip() for each in said.split(stop or "\n")] == ["A cat.", "yes", ""]


@pytest.mark.parametrize("name", template_names())
def test_a_template_declares_its_stop_and_what_it_declares_is_so(tokenizer, name: str) -> None:
    template = load_template(name)
    assert "stop" in declared(template)
    check_template(template, tokenizer, name)
    if declared(template)["stop"] == "none":
        assert stop_token(template, tokenizer) is None
        return
    undeclared = template.replace("stop:", "")
    assert stop_token(undeclared, tokenizer) == stop_token(template, tokenizer)
    assert stop_token(strip_marks(template), tokenizer) == stop_token(template, tokenizer)
    for messages in PROBES:  # a prompt leads to its answer, and the marks begin there and end with the stop
        assert rendering(template, tokenizer, messages) == answer_spans(template, tokenizer, messages)


@pytest.mark.parametrize("name", template_names())
def test_labels_are_the_answers_and_their_stop(tokenizer, name: str) -> None:
    template = load_template(name)
    stop = stop_token(template, tokenizer) or "\n"
    assert [each.strip() for each in labelled(tokenizer, template, MESSAGES).split(stop)] == ["A cat.", "yes", ""]


@pytest.mark.parametrize("name", sorted(set(template_names()) - {"plain"}))
def test_auto_chooses_each_template_for_its_tokenizers(name: str) -> None:
    for fit in FITS[name]:
        tokenizer = tokenizer_with(*fit)
        assert choose_template(tokenizer) == name
        assert resolve_template("auto", tokenizer) == (name, load_template(name))


def test_auto_without_a_fit_lists_the_choices() -> None:
    tokenizer = tokenizer_with(["<|user|>"], ("<|endoftext|>", "<|endoftext|>"))
    with pytest.raises(DataError, match=r"template: auto: .*choose one of chatml, .*, vicuna_v1, tokenizer"):
        choose_template(tokenizer)
    with pytest.raises(DataError, match=r"<\|im_end\|>, <\|im_start\|>, which .* choose one of chatml"):
        resolve_template("chatml", tokenizer)


@pytest.mark.parametrize(
    ("name", "fit", "message"),
    [
        ("chatml", ((), LLAMA_EDGES), r"<\|im_end\|>, <\|im_start\|>, which .* use data.template: vicuna_v1, or auto"),
        ("llama3", ((), LLAMA_EDGES), r"writes <\|end_header_id\|>, <\|eot_id\|>, <\|start_header_id\|>, which"),
        ("gemma", (CHATML, (None, "<|im_end|>")), r"<start_of_turn>, which .* use data.template: chatml, or auto"),
        ("phi3", (["<|user|>", "<|assistant|>"], LLAMA_EDGES), r"it writes <\|end\|>, which"),
        ("llama3", ((*LLAMA3, *CHATML), ("<s>", "<|im_end|>")), r"its EOS '<\|im_end\|>'; use data.template: chatml"),
        ("llava_llama_2", (CHATML, (None, "<|im_end|>")), "cannot be rendered: 'bos_token' is undefined"),
        ("vicuna_v1", (CHATML, (None, None)), "cannot be rendered: .*eos_token"),
        ("tokenizer", ((), LLAMA_EDGES), "carries no chat template"),
        ("vicuna_v2", ((), LLAMA_EDGES), "did you mean 'vicuna_v1'"),
    ],
)
def test_a_template_that_does_not_go_with_the_tokenizer(name: str, fit: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve_template(name, tokenizer_with(*fit))


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("chatml", ("<|endoftext|>", "<|endoftext|>")),
        ("chatml", LLAMA_EDGES),
        ("llama3", ("<|begin_of_text|>", "<|end_of_text|>")),
        ("gemma", ("<bos>", "<eos>")),
        ("phi3", ("<s>", "<|endoftext|>")),
        ("vicuna_v1", (None, "<|im_end|>")),
        ("plain", (None, "<|im_end|>")),
    ],
)
def test_an_eos_that_ends_documents_need_not_be_the_stop(name: str, edges: tuple) -> None:
    assert resolve_template(name, tokenizer_with([*CHATML, *LLAMA3, *GEMMA, *PHI3], edges))[0] == name


MINE = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- generation -%}{{- m.content -}}INSIDE{%- endgeneration -%}OUTSIDE"
    "{%- else -%}Q: {{ m.content }} A: {%- endif -%}{%- endfor -%}"
)


@pytest.mark.parametrize(
    ("header", "inside", "outside", "fault"),
    [
        ("", "</s>", "", None),
        ("{#- mine\nstop: eos_token\n-#}\n", "</s>", "", None),
        ("{# mine\n  stop: <|im_end|>\n#}\n", "<|im_end|>", "\n", None),
        ("{#- stop: none -#}", "", "", None),
        ("{#-\ntokens: none\n-#}", "<|hi|></s>", "", "'<|hi|></s>', which is not one control token"),
        ("{#-\ntokens: none\nstop: </s>\n-#}", "<|hi|></s>", "", None),
        ("{#-\ntokens: </s> <|ho|>\n-#}", "<|hi|></s>", "", "writes <|ho|>, which"),
        ("", "<|hi|></s>", "", "writes <|hi|>, which"),
        ("", "", "</s>", "no stop follows the answer inside its generation marks"),
        ("", "###", "", "'###', which is not one control token"),
        ("{#- stop: </s> -#}", "", "</s>", "generation marks do not end with its stop '</s>'"),
    ],
)
def test_a_file_of_the_user(tmp_path: Path, header: str, inside: str, outside: str, fault: str | None) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(header + MINE.replace("INSIDE", inside).replace("OUTSIDE", outside))
    tokenizer = tokenizer_with(CHATML)
    if fault is None:
        name, text = resolve_template(str(path), tokenizer)
        assert (name, text) == (str(path), path.read_text())
        assert render(tokenizer, strip_marks(text), MESSAGES) == render(tokenizer, text, MESSAGES)
        return
    with pytest.raises(DataError) as caught:
        resolve_template(str(path), tokenizer)
    assert fault in str(caught.value)
    assert f"template {path}: " in str(caught.value)
    assert "vicuna_v1" in str(caught.value) or "chatml" in str(caught.value)


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
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        load_template(str(path))
    path.write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    assert load_template(str(path)) == load_template("tokenizer", own=path.read_text())


def test_marks_on_lines_of_their_own_leave_no_trace(tokenizer) -> None:
    template = (
        "{# a #}\n{% for m in messages %}\n  {% generation %}\n{{ m.content }}\n  {% endgeneration %}\nx\n{% endfor %}"
    )
    assert render(tokenizer, strip_marks(template), MESSAGES) == render(tokenizer, template, MESSAGES)
