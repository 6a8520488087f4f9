"""Small models straight from their configurations, batches of chosen sizes, and what really lies in memory."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaConfig, LlavaForConditionalGeneration, PretrainedConfig

from llava_train.data.batch import Batch, batch_of
from llava_train.data.collate import pack, pad
from llava_train.data.encode import IGNORE
from llava_train.data.pictures.shapes import Picture
from llava_train.model.assemble import widths
from llava_train.model.attention import use_packed_attention
from llava_train.model.connectors import build_connector
from llava_train.model.tuning import apply_tuning
from llava_train.recipe import LoraSettings, PartTuning, TuneSettings
from tests import tiny

IMAGE = 5
"""Id of the image token"""
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}


def llava(
    modes: Mapping[str, str],
    llm: str = "llama",
    tower: str = "clip",
    connector: str = "mlp2x_gelu",
    dropout: float = 0.0,
    packed: bool = True,
    text: Mapping[str, Any] = SIZES,
    options: Mapping[str, Any] | None = None,
    **config: Any,
) -> LlavaForConditionalGeneration:
    """A model with random weights, tuned as `modes` says; LoRA of rank 4."""
    text_config = tiny.LLMS[llm][1](**{**tiny.LLMS[llm][2], "vocab_size": 128, "pad_token_id": 0, **text})
    vision_config = tiny.TOWERS[tower][1](**tiny.TOWERS[tower][2])
    return tuned(text_config, vision_config, modes, connector, dropout, packed, options, **config)


def tuned(
    text: PretrainedConfig,
    vision: PretrainedConfig,
    modes: Mapping[str, str],
    connector: str = "mlp2x_gelu",
    dropout: float = 0.0,
    packed: bool = True,
    options: Mapping[str, Any] | None = None,
    rank: int = 4,
    **config: Any,
) -> LlavaForConditionalGeneration:
    """The model of two configurations."""
    strategy = "full" if "siglip" in vision.model_type else "default"
    config = {"vision_feature_layer": -2, "vision_feature_select_strategy": strategy, **config}
    whole = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        tie_word_embeddings=bool(text.tie_word_embeddings),
        **config,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(whole)
    model.model.multi_modal_projector = build_connector(connector, widths(whole), whole, dict(options or {}))
    if packed:
        use_packed_attention(model.model.language_model)
    parts = {part: PartTuning(modes.get(part, "frozen")) for part in ("vision", "connector", "llm")}
    apply_tuning(model, TuneSettings(**parts, lora=LoraSettings(rank, 2 * rank, dropout)), seed=0)
    return model


class Row:
    """Tokens of a sample: a picture, text, and some supervised positions at the end."""

    def __init__(self, length: int, image_tokens: int, supervised: int) -> None:
        self.input_ids = np.full(length, 7, dtype=np.int64)
        self.input_ids[:image_tokens] = IMAGE
        self.labels = np.full(length, IGNORE, dtype=np.int64)
        self.labels[length - supervised :] = 9


def batch(
    model: LlavaForConditionalGeneration, lengths: list[int], supervised: int = 5, image_tokens: int = 4
) -> Batch:
    """A micro-batch of samples with a picture each, packed if the model reads it so."""
    rows = [Row(length, image_tokens, supervised) for length in lengths]
    weights = [1 / sum(lengths)] * len(rows)
    is_packed = model.model.language_model.config._attn_implementation == "llava_train"
    collated = pack([(0, [row]) for row in rows], weights) if is_packed else pad(rows, weights, 0)
    size = model.config.vision_config.image_size
    pixels = torch.rand(len(rows), 3, size, size, generator=torch.Generator().manual_seed(0))
    return batch_of(
        collated, [Picture(each[None]) for each in pixels], [str(number) for number in range(len(rows))], {}
    )


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors made in it that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(a.untyped_storage()) for a in args if isinstance(a, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in before and storage not in self._known:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size
