"""Tokenizer and template of a folder in the original LLaVA layout.

Its `<image>` was never in a vocabulary (the original code cuts the text there and writes -200), so it is added here.
Where `mm_use_im_start_end` is set, every picture stands between `<im_start>` and `<im_end>`, which the original writes
into the text: here a template does.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from llava_train.data.templates.fit import AUTO, resolve_template
from llava_train.data.templates.template import OWN
from llava_train.errors import CheckpointError, DataError, RecipeError
from llava_train.model.llm import IMAGE_TOKEN, add_image_token, load_tokenizer
from llava_train.model.originals.config import Original

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
        return load_tokenizer(str(original.folder))
    except CheckpointError as error:
        if (original.folder / "tokenizer.model").exists() and not (original.folder / "tokenizer.json").exists():
            raise CheckpointError(
                f"{error}; a tokenizer.model is converted with: pip install sentencepiece protobuf"
            ) from error
        raise


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
