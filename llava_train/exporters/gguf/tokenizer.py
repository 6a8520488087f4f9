"""The vocabulary in a GGUF file: byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`).

llama.cpp cuts text into words by a pre-tokenizer of its own, chosen by a name in the file. Its converter finds the name
by hashing how a text is tokenised; here the definition in `tokenizer.json` itself must be one of a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava_train.data.templates.fit import stop_token
from llava_train.data.templates.template import has_marks
from llava_train.inference import stop_ids
from llava_train.model.assemble import Assembly

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE: dict[tuple[str | None, ...], str] = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_LLAMA3, "only bytes"): "llama-bpe",
    (_QWEN2, "only bytes"): "qwen2",
    (_TEKKEN, "only bytes"): "tekken",
}
"""Steps of a byte-level pre-tokenizer -> llama.cpp's name. The patterns are those of the models' tokenizer.json."""
_IGNORES_MERGES = ("llama-bpe", "tekken")
"""Pre-tokenizers with which llama.cpp takes a word that is in the vocabulary whole, whatever the merges say"""
_NEVER = -1e6
"""Score of a token that no merge makes"""

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of tokens"""


def backend_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What would stand in `tokenizer.json`."""
    values: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return values


def tokenizer_refusal(assembly: Assembly) -> str | None:
    """Why llama.cpp cannot tokenise as a model does, as a clause; None if it can."""
    backend = backend_of(assembly.tokenizer)
    model = backend["model"]
    if model["type"] != "BPE":
        return f"its tokenizer is a {model['type']} one; byte-level and SentencePiece BPE are written"
    if _is_sentencepiece(backend):
        return None if _prefix(backend) is not None else f"SentencePiece with {_shown(backend)} is unknown to llama.cpp"
    name = pre_tokenizer(backend)
    if name is None:
        return f"llama.cpp has no pre-tokenizer like {_shown(backend)}; it has {', '.join(_PRE.values())}"
    if (backend["normalizer"] or {}).get("type", "NFC") != "NFC":
        return f"llama.cpp has no normalizer like {backend['normalizer']['type']}"
    if bool(model.get("ignore_merges")) != (name in _IGNORES_MERGES):
        return f"its tokenizer does not go by its merges as llama.cpp's {name} does"
    return None


def _shown(backend: Mapping[str, Any]) -> str:
    return json.dumps([backend["normalizer"], backend["pre_tokenizer"]], ensure_ascii=False)[:200]


def _is_sentencepiece(backend: Mapping[str, Any]) -> bool:
    return bool(backend["model"].get("byte_fallback"))


def _steps(part: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[inside]) if part["type"] == "Sequence" else [part]


def pre_tokenizer(backend: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of a byte-level pre-tokenizer; None if it has none."""
    steps = tuple(_step(each) for each in _steps(backend["pre_tokenizer"], "pretokenizers"))
    return _PRE.get(steps)


def _step(step: Mapping[str, Any]) -> str | None:
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes" if step.get("use_regex", True) else "only bytes"
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"].lower() == "isolated" and not step["invert"]:
        pattern: str | None = step["pattern"].get("Regex")
        return pattern
    return None


def _prefix(backend: Mapping[str, Any]) -> bool | None:
    """Whether SentencePiece writes a space before a text; None for a form that llama.cpp does not have."""
    normal = _steps(backend["normalizer"], "normalizers")
    spaces = [step for step in normal if step["type"] == "Replace" and step["pattern"].get("String") == " "]
    prepends = [step for step in normal if step["type"] == "Prepend" and step["prepend"] == "▁"]
    before = _steps(backend["pre_tokenizer"], "pretokenizers")
    if len(normal) != len(spaces) + len(prepends):
        return None
    if spaces and not before:
        return bool(prepends)
    # Gemma: after the replacement no space is left to split at.
    if spaces and not prepends and all(step["type"] == "Split" for step in before):
        return False
    if not normal and len(before) == 1 and before[0]["type"] == "Metaspace" and not before[0].get("split", True):
        # `first` is the beginning of a prompt, where our templates write a control token.
        return bool(before[0]["prepend_scheme"] == "always")
    return None


def begins_with_bos(assembly: Assembly, prompt: str) -> bool:
    """Whether a rendered prompt begins with the token that llama.cpp adds by itself if it is told to."""
    bos = assembly.tokenizer.bos_token
    return bool(bos) and prompt.startswith(str(bos))


def add_tokenizer(writer: Any, assembly: Assembly, adds_bos: bool) -> None:
    """Vocabulary as long as the embeddings, merges or scores, and which tokens begin and end a text."""
    tokenizer, backend = assembly.tokenizer, backend_of(assembly.tokenizer)
    tokens, kinds = _tokens(assembly, backend)
    if _is_sentencepiece(backend):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, backend))
        writer.add_add_space_prefix(bool(_prefix(backend)))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(backend))
        writer.add_token_merges([" ".join(merge) for merge in _merges(backend)])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    names = {"bos": tokenizer.bos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    # llama.cpp knows three ends of an answer by their places.
    names.update(zip(("eos", "eot", "eom"), ends(assembly)))
    for name, index in names.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(False)


def ends(assembly: Assembly) -> list[int]:
    """What ends an answer, the tokenizer's EOS and the template's stop first."""
    tokenizer = assembly.tokenizer
    stop = stop_token(assembly.template, tokenizer) if has_marks(assembly.template) else None
    first = [tokenizer.eos_token_id, None if stop is None else tokenizer.convert_tokens_to_ids(stop)]
    return [index for index in dict.fromkeys([*first, *stop_ids(assembly)]) if index is not None]


def _tokens(assembly: Assembly, backend: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    rows = len(assembly.model.get_input_embeddings().weight)
    tokens, kinds = [f"[PAD{index}]" for index in range(rows)], [_UNUSED] * rows
    for token, index in backend["model"]["vocab"].items():
        tokens[index], kinds[index] = token, _NORMAL
        if _is_sentencepiece(backend) and len(token) == 6 and token.startswith("<0x"):
            kinds[index] = _BYTE
    if backend["model"].get("unk_token"):
        kinds[backend["model"]["vocab"][backend["model"]["unk_token"]]] = _UNKNOWN
    for added in backend["added_tokens"]:
        index, special = added["id"], added["special"]
        if not (special and kinds[index] == _UNKNOWN):
            kinds[index] = _CONTROL if special else _USER
        # Those that are no control tokens are looked for in the text itself, where spaces are spaces.
        tokens[index] = added["content"] if special else added["content"].replace("▁", " ")
    return tokens, kinds


def _merges(backend: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in backend["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _scores(tokens: list[str], backend: Mapping[str, Any]) -> list[float]:
    """SentencePiece merges what makes the token of the highest score: the earlier its first merge, the higher."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(backend)):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else _NEVER for token in tokens]
