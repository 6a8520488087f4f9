"""Tokenizer and template of a folder in the original LLaVA layout.

Its `<image>` was never in a vocabulary (the original code cuts the text there and writes -200), so it is added here.
Where `mm_use_im_start_end` is set, every picture stands between `<im_start>` and `<im_end>`, which the original writes
into the text: here a template does.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from llava_train.data.templates.fit import AUTO, resolve_template
from llava_train.data.templates.template import OWN, load_template, template_names
from llava_train.errors import CheckpointError, DataError, RecipeError
from llava_train.model.llm import IMAGE_TOKEN, add_image_token, load_tokenizer
from llava_train.model.originals.config import Original
from llava_train.model.rebuild import TEMPLATE
from llava_train.model.screening import own_file

_PATCH, _START, _END = "<im_patch>", "<im_start>", "<im_end>"
_FRAMED = f"{_START}{IMAGE_TOKEN}{_END}"
_FRAMING = (
    "{%- set framed = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set framed.messages = framed.messages + [{'role': message['role'], "
    f"'content': message['content'] | replace('{IMAGE_TOKEN}', '{_FRAMED}')}}] -%}}"
    "{%- endfor -%}"
    "{%- set messages = framed.messages -%}\n"
)


def original_tokenizer(original: Original) -> PreTrainedTokenizerBase:
    """The tokenizer with `<image>`. Raises CheckpointError."""
    if original.base is not None:
        return original_tokenizer(original.base)
    tokenizer = _own(original) if original.kind == "full" else _of_llm(original)
    if original.framed:
        _frame(original, tokenizer)
    add_image_token(tokenizer)
    longest = original.values.get("tokenizer_model_max_length")
    if isinstance(longest, int) and longest > 0:
        tokenizer.model_max_length = longest
    return tokenizer


def template_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(name, text with marks) of the template that goes with the tokenizer: `plain` where none does."""
    try:
        return resolve_template(OWN if _framed(tokenizer) else AUTO, tokenizer)
    except DataError:
        return resolve_template("plain", tokenizer)


def template_in(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(name, text) of the template that an export of ours wrote into the folder, or what `template_of` gives.

    The name is `tokenizer` where the text is none of our templates.
    """
    file = folder / TEMPLATE
    if not file.is_file():
        return template_of(tokenizer)
    text = own_file(folder, TEMPLATE).read_text(encoding="utf-8")
    return next((name for name in template_names() if load_template(name) == text), OWN), text


def require_frame(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """RecipeError for a template that leaves out the tokens around a picture that a model was trained with."""
    if _framed(tokenizer) and _FRAMED not in template:
        raise RecipeError(
            f"data.template: this model was trained with {_FRAMED} for every picture (mm_use_im_start_end); take "
            "data.template: tokenizer, which writes that, or a template of your own that does"
        )


def _framed(tokenizer: PreTrainedTokenizerBase) -> bool:
    return _FRAMED in str(tokenizer.chat_template)


def _own(original: Original) -> PreTrainedTokenizerBase:
    try:
        # With a configuration of its own: the library would read one of a kind that it does not know.
        tokenizer = AutoTokenizer.from_pretrained(original.folder, config=PretrainedConfig(), trust_remote_code=False)
    except Exception as error:  # what is wrong with a folder comes as many types
        fault = CheckpointError(f"{original.folder}: no tokenizer can be read from here: {error}")
        if (original.folder / "tokenizer.model").exists() and not (original.folder / "tokenizer.json").exists():
            fault = CheckpointError(f"{fault}; a tokenizer.model is converted with: pip install sentencepiece protobuf")
        raise fault from error
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise CheckpointError(f"{original.folder}: {kind} is a slow tokenizer; exact labels need a fast one")
    return tokenizer


def _of_llm(original: Original) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(original.llm)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} (the language model of {original.folder}; model.llm names a local copy)"
        ) from error


def _frame(original: Original, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the tokenizer's template write the tokens around each picture; the vocabulary must have their rows."""
    own = [_PATCH] if original.values.get("mm_use_im_patch_token", True) else []
    tokenizer.add_tokens([*own, _START, _END], special_tokens=True)
    rows = original.values.get("vocab_size")
    if not isinstance(rows, int) or max(tokenizer.convert_tokens_to_ids([_START, _END])) >= rows:
        raise CheckpointError(
            f"{original.config}: mm_use_im_start_end: the vocabulary of {rows} rows has none for {_START} and {_END}"
        )
    _, template = template_of(tokenizer)
    header, end, body = template.rpartition("\n-#}\n")
    tokenizer.chat_template = f"{header}{end}{_FRAMING}{body}"
