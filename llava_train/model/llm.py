"""The language model: loading a decoder and its tokenizer, its head, and making room for the image token.

Features of pictures take the place of embeddings as they are. Some decoders (Gemma) multiply their embeddings, in the
embedding module itself: pictures go past it, as in PaliGemma, and the connector learns the scale. What others
(Granite) do inside the decoder is done to pictures, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava_train.errors import CheckpointError
from llava_train.model.screening import screen_configs, screen_layers, screen_weights
from llava_train.model.towers.loading import key_report

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
_PAD_TO_MULTIPLE = 64

_AFTER_HEAD: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "logits_scaling": lambda logits, by: logits / by,  # Granite
    "logit_scale": lambda logits, by: logits * by,  # Cohere
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2
}
"""What LLMs do to their head's logits, by the name of its number in their configuration"""


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The fast tokenizer of an LLM folder, hub id or GGUF file. Raises CheckpointError."""
    folder, options = _where(path)
    screen_configs(folder, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=revision, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # what is wrong with a folder comes as many types
        raise CheckpointError(f"{path}: no tokenizer can be read from here: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{path}: {type(tokenizer).__name__} is a slow tokenizer; exact labels need a fast one")
    return tokenizer


def load_llm(
    path: str, attn_implementation: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A decoder LLM in its stored precision, with every weight found (CheckpointError lists what is not).

    A GGUF file is dequantised to float32 into a plain model of the same architecture. Attention is the one asked for,
    but eager where that is `sdpa` and the LLM has none (Gemma 2).
    """
    folder, options = _where(path)
    screen_configs(folder, trust_remote_code)
    if not options:
        screen_weights(folder)
    try:
        if options:
            _screen_gguf(Path(path))
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            revision=revision,
            dtype=torch.float32 if options else "auto",
            attn_implementation=attention_or_own(attn_implementation),
            trust_remote_code=trust_remote_code,
            use_safetensors=None if options else True,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        raise CheckpointError(f"{path}: {error}; pip install 'llava-train[gguf]'") from error
    except CheckpointError:
        raise
    except Exception as error:  # what is wrong with weights comes as many types
        raise CheckpointError(f"{path}: no language model can be read from here: {error}") from error
    missing = [key for key in info["missing_keys"] if not (key == "lm_head.weight" and _tied(model))]
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise CheckpointError(f"{path}: weights of the language model do not fit: {key_report(missing, info)}")
    _require_known_head(model, path)
    return _plain(model) if options else model


def attention_or_own(attn_implementation: str) -> str | None:
    """`attn_implementation` as transformers wants it: sdpa is what it takes by itself wherever the model has it."""
    return None if attn_implementation == "sdpa" else attn_implementation


class Head(nn.Linear):
    """An LM head that does to logits what its LLM does, in the stock Llava class, which adds nothing to its head.

    Attributes:
        after: (name of a row of `_AFTER_HEAD`, its number), in the order in which they are done.
    """

    def __init__(self, head: nn.Linear, after: tuple[tuple[str, float], ...]) -> None:
        """Takes over the weights of `head`."""
        with torch.device("meta"):
            super().__init__(head.in_features, head.out_features, head.bias is not None)
        self.weight, self.bias, self.after = head.weight, head.bias, after

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., vocabulary)."""
        logits = super().forward(hidden)
        for name, number in self.after:
            logits = _AFTER_HEAD[name](logits, number)
        return logits


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The LM head of an LLM, whose result are the LLM's logits."""
    numbers = ((name, getattr(model.config, name, None)) for name in _AFTER_HEAD)
    after = tuple((name, float(number)) for name, number in numbers if number is not None)
    head: nn.Linear = model.get_output_embeddings()
    return Head(head, after) if after else head


def _require_known_head(model: PreTrainedModel, path: str) -> None:
    """CheckpointError unless `head_of` gives the logits that the LLM makes of what its decoder gives."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    usual = model.base_model is decoder and hasattr(decoder, "layers") and isinstance(head, nn.Linear)
    if not usual or (_tied(model) and not hasattr(decoder, "embed_tokens")):
        raise CheckpointError(
            f"{path}: {type(model).__name__} is not made as Llava needs it: a decoder with `layers` and a linear head "
            "(where its weight is that of the embeddings, these must be called `embed_tokens`)"
        )
    generator = torch.Generator().manual_seed(0)
    hidden_12D = torch.randn(1, 2, head.in_features, generator=generator).to(head.weight)
    decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden_12D)
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, 2, dtype=torch.long, device=hidden_12D.device)).logits
            same = torch.equal(head_of(model)(hidden_12D), logits)
    finally:
        del decoder.forward
    if not same:
        raise CheckpointError(
            f"{path}: {type(model).__name__} does something to its head's logits that is not known here; add it to "
            "_AFTER_HEAD in llava_train/model/llm.py"
        )


def _tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _where(path: str) -> tuple[str, dict[str, Any]]:
    """(folder, options) as from_pretrained wants them; a `.gguf` path is a file in its folder."""
    if path.endswith(".gguf"):
        file = Path(path)
        if not file.is_file():
            raise CheckpointError(f"{path}: no such file")
        return str(file.parent), {"gguf_file": file.name}
    return path, {}


def _screen_gguf(file: Path) -> None:
    """CheckpointError for a file that speaks of more layers than it has room to describe tensors."""
    with file.open("rb") as stream:
        tensors = int.from_bytes(stream.read(16)[8:], "little")
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    screen_layers(config.to_dict(), min(tensors, file.stat().st_size // 24), file)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The dequantised model without the mark that forbids saving it."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    clean.load_state_dict(model.state_dict(), strict=True)
    return clean


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Make `<image>` one special token, and give the tokenizer a padding token if it has none.

    Returns the id of `<image>`.
    """
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "right"
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def grow_vocabulary(model: PreTrainedModel, tokens: int, seed: int) -> int:
    """Grow embeddings and head to hold `tokens` ids, padded to a multiple of 64.

    New rows are drawn from a normal distribution with the mean of the old embeddings and 1e-5 times their
    covariance, for the head too, as transformers' `convert_llava_weights_to_hf.py` does. Nothing changes
    where the vocabulary is large enough already.

    Returns the vocabulary size before, from which on rows are new.
    """
    old = int(model.get_input_embeddings().weight.shape[0])
    if tokens <= old:
        return old
    rows = sample_rows(model.get_input_embeddings().weight.data, _padded(tokens) - old, seed)
    model.resize_token_embeddings(tokens, pad_to_multiple_of=_PAD_TO_MULTIPLE, mean_resizing=False)
    set_rows(model, old, rows, rows)
    return old


def set_rows(model: PreTrainedModel, start: int, embedding: torch.Tensor, head: torch.Tensor) -> None:
    """Write rows from `start` on into the embeddings and the head."""
    with torch.no_grad():
        model.get_input_embeddings().weight[start:] = embedding.to(model.get_input_embeddings().weight.dtype)
        model.get_output_embeddings().weight[start:] = head.to(model.get_output_embeddings().weight.dtype)


def _padded(tokens: int) -> int:
    return -(-tokens // _PAD_TO_MULTIPLE) * _PAD_TO_MULTIPLE


def sample_rows(embeddings: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(count, width) rows from N(mean, 1e-5 covariance) of the embeddings, in float64 on the CPU."""
    known = embeddings.double().cpu()
    mean = known.mean(0)
    centred = known - mean
    covariance = centred.T @ centred / len(known) * 1e-5
    # A root by eigenvectors stands a covariance of less than full rank, which Cholesky does not.
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()
    noise = torch.randn(count, known.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + noise @ root.T
