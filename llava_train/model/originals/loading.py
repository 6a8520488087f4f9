"""A checkpoint in the original LLaVA layout (`liuhaotian/llava-*`) as a model of ours.

Three kinds of folder are read, told apart by what they hold:

    full     all weights of the language model and the projector, sometimes the tower's (`model.vision_tower.`)
    stage1   `mm_projector.bin`; the language model comes from where it was trained on
    lora     `adapter_config.json`, adapters and `non_lora_trainables.bin`; merged into the model they belong to

What such a folder changed is then the model's own (`included`), so that the folder itself is not needed any more;
parts that it left alone are named, with their fingerprints, and read from where they lie again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llava_train.data.pictures.processors import build_image_processor
from llava_train.errors import CheckpointError, LlavaTrainError
from llava_train.model.assemble import Assembly, Seen, architecture_of, image_tokens_of, model_config, widths
from llava_train.model.connectors import build_connector
from llava_train.model.joining import fingerprint, join, require_weights
from llava_train.model.llm import IMAGE_TOKEN, attention_or_own, grow_vocabulary, load_llm
from llava_train.model.originals.config import (
    NON_LORA,
    PROJECTOR,
    TOWER,
    Original,
    is_original,
    read_original,
    text_config,
    vision_of,
)
from llava_train.model.originals.text import original_tokenizer, require_frame, template_in
from llava_train.model.originals.weights import Stored, fill, merge_adapters, stored, weight_files
from llava_train.model.screening import read_config
from llava_train.model.spec import ModelSpec, PartSource
from llava_train.model.stock import require_unchanged
from llava_train.model.towers.loading import load_vision_tower
from llava_train.recipe import ModelSettings

__all__ = ["is_original", "load_original", "original_facts", "require_frame"]


@dataclass
class _Parts:
    """A model's parts while they are put together.

    Attributes:
        modules: `llm`, `vision`, `connector` and, for tiles, `tiles` with the newline.
        settings, seen: how the tower's features are read.
        vision, llm: where they come from.
    """

    modules: nn.ModuleDict
    settings: ModelSettings
    seen: Seen
    vision: PartSource
    llm: PartSource


def original_facts(
    folder: Path, llm: str | None = None, vision: str | None = None
) -> tuple[PreTrainedTokenizerBase, Any, ModelSpec]:
    """Tokenizer with `<image>`, image processor, and what the model is made of: no weights are read.

    Arguments and errors are those of `load_original`.
    """
    original = read_original(folder, llm, vision)
    settings, seen = vision_of(original)
    tokenizer = original_tokenizer(original)
    processor = _processor(settings, seen)
    parts = PartSource(original.vision), PartSource(original.llm or str(folder))
    return tokenizer, processor, _spec(settings, seen, *parts, template_in(folder, tokenizer)[0])


def load_original(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    llm: str | None = None,
    vision: str | None = None,
) -> Assembly:
    """The model of a folder in the original layout; every key must fit.

    The template is the one that an export of ours wrote beside it; the layout itself names none, so otherwise it is the
    one that goes with the tokenizer (`auto`; `plain` if none does).

    Args:
        folder: see the head of this file.
        dtype: precision of all weights.
        attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
        llm: language model of a `stage1` or `lora` folder (for `lora`, a full folder in this layout too), in place
            of `_name_or_path` in its config.json or `base_model_name_or_path` in its adapter_config.json.
        vision: the tower in place of `mm_vision_tower`.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped keys (listed), a hostile file, a part that is not to be
            had, or an option that transformers' Llava classes do not have.
    """
    require_unchanged(folder)
    try:
        return _load(read_original(folder, llm, vision), dtype, attn_implementation)
    except LlavaTrainError:
        raise
    except Exception as error:  # what is wrong with a folder comes as many types
        raise CheckpointError(f"{folder}: the model cannot be built: {type(error).__name__}: {error}") from error


def _load(original: Original, dtype: torch.dtype, attn_implementation: str) -> Assembly:
    tokenizer = original_tokenizer(original)
    parts = _parts(original, dtype, attn_implementation)
    settings, seen, llm = parts.settings, parts.seen, parts.modules["llm"]
    old_vocabulary = grow_vocabulary(llm, len(tokenizer), seed=0)
    ids = (int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)), int(tokenizer.pad_token_id))
    config = model_config(settings, seen, llm.config, ids, settings.image_grid_pinpoints)
    architecture = architecture_of(settings)
    model = join(architecture, config, parts.modules["vision"], llm, parts.modules["connector"], None)
    if "tiles" in parts.modules:
        model.model.image_newline = parts.modules["tiles"].image_newline
    require_weights(model)
    name, template = template_in(original.folder, tokenizer)
    spec = _spec(settings, seen, parts.vision, parts.llm, name)
    return Assembly(model, tokenizer, _processor(settings, seen), spec, template, old_vocabulary)


def _spec(settings: ModelSettings, seen: Seen, vision: PartSource, llm: PartSource, template: str) -> ModelSpec:
    return ModelSpec(
        vision=vision,
        llm=llm,
        connector=settings.connector,
        connector_options={},
        image_size=seen.shape.image_size,
        image_tokens=image_tokens_of(settings, seen),
        image_aspect_ratio=settings.image_aspect_ratio,
        template=template,
        architecture=architecture_of(settings),
    )


def _processor(settings: ModelSettings, seen: Seen) -> Any:
    path, size, points = str(settings.vision), seen.shape.image_size, settings.image_grid_pinpoints
    return build_image_processor(path, settings.image_aspect_ratio, size, None, points)


def _parts(original: Original, dtype: torch.dtype, attn_implementation: str) -> _Parts:
    """The parts with all their weights, before the vocabulary grows."""
    own = stored(original.folder, _files(original))
    if original.base is not None:
        parts = _parts(original.base, dtype, attn_implementation)
        parts.settings = _on_base(original, parts.settings)
    else:
        parts = _untouched(original, own, dtype, attn_implementation)
    llm: Any = parts.modules["llm"]
    own_tower = any(TOWER in key for key in own.files)
    tied = "llm.lm_head.weight" if llm.config.tie_word_embeddings else ""
    required = _required(original, own_tower)
    names = _Names(parts)
    fill(parts.modules, own, names, lambda name: name.startswith(required) and name != tied)
    if tied:
        _tie(original, llm)
    if original.kind == "lora":
        layers = [f"llm.{name}" for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
        merge_adapters(parts.modules, original.folder, names, [name for name in layers if name != "llm.lm_head"])
    folder = str(original.folder)
    if original.kind != "stage1":
        parts.llm = PartSource(folder, included=True, fingerprint=fingerprint(llm))
    if own_tower:
        parts.vision = PartSource(original.vision, included=True, fingerprint=fingerprint(parts.modules["vision"]))
    return parts


def _files(original: Original) -> list[str]:
    """Files of the folder's own tensors, besides adapters."""
    if original.kind == "stage1":
        return [PROJECTOR]
    if original.kind == "lora":
        return [NON_LORA]
    names = weight_files(original.folder)
    if not names:
        raise CheckpointError(
            f"{original.folder}: holds no weights (pytorch_model.bin, model.safetensors, their shards, {PROJECTOR}, "
            f"or adapters with {NON_LORA})"
        )
    return names


def _required(original: Original, own_tower: bool) -> tuple[str, ...]:
    """Beginnings of the names that the folder must bring: what nothing else has."""
    if original.base is not None:
        return ()
    if original.kind != "full":
        return ("connector.", "tiles.")
    return ("llm.", "connector.", "tiles.", "vision.") if own_tower else ("llm.", "connector.", "tiles.")


def _untouched(original: Original, own: Stored, dtype: torch.dtype, attn_implementation: str) -> _Parts:
    """The parts as they lie elsewhere, and empty ones for what the folder itself has."""
    full, sources = original.kind == "full", (original.llm, original.vision)
    settings, seen = vision_of(original, own.files if full else ())
    if full:
        llm = _empty(AutoModelForCausalLM, text_config(original, len(own.files)), dtype, attn_implementation)
        _set_ends(llm, original.folder)
    else:
        llm = load_llm(original.llm, attn_implementation)
    if full and any(TOWER in key for key in own.files):
        tower = _empty(AutoModel, seen.config, dtype, "sdpa")
    else:
        tower = load_vision_tower(original.vision)
    prints = [None if next(part.parameters()).is_meta else fingerprint(part) for part in (llm, tower)]
    joined = model_config(settings, seen, llm.config, (0, 0), settings.image_grid_pinpoints)
    connector = build_connector(settings.connector, widths(joined), joined, {})
    modules = nn.ModuleDict({"llm": llm.to(dtype), "vision": tower.to(dtype), "connector": connector.to(dtype)})
    if settings.image_aspect_ratio == "anyres":
        modules["tiles"] = nn.Module()
        modules["tiles"].image_newline = nn.Parameter(torch.empty(llm.config.hidden_size, dtype=dtype))
    kind = "gguf" if original.llm.endswith(".gguf") else "hf"
    return _Parts(
        modules,
        settings,
        replace(seen, config=tower.config),
        vision=PartSource(sources[1], fingerprint=prints[1]),
        llm=PartSource(sources[0], None, kind, fingerprint=prints[0]),  # type: ignore[arg-type]
    )


def _on_base(original: Original, base: ModelSettings) -> ModelSettings:
    """The settings of an adapted model: its base's, with its own way to show pictures."""
    own, _ = vision_of(original)
    if own.connector != base.connector:
        raise CheckpointError(f"{original.config}: mm_projector_type: {own.connector}, but its base: {base.connector}")
    return replace(base, image_aspect_ratio=own.image_aspect_ratio, image_grid_pinpoints=own.image_grid_pinpoints)


def _empty(kind: Any, config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str) -> Any:
    with init_empty_weights(include_buffers=False):  # the weights come from the folder's files
        return kind.from_config(config, dtype=dtype, attn_implementation=attention_or_own(attn_implementation))


def _set_ends(llm: PreTrainedModel, folder: Path) -> None:
    """What ends a text: of its generation settings, which published folders get wrong in part, the tokens alone."""
    if (folder / "generation_config.json").exists():
        values = read_config(folder, "generation_config.json")
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(llm.generation_config, key, values.get(key, getattr(llm.generation_config, key)))


def _tie(original: Original, llm: PreTrainedModel) -> None:
    head, embedding = llm.get_output_embeddings(), llm.get_input_embeddings()
    if not head.weight.is_meta and not torch.equal(head.weight, embedding.weight):
        raise CheckpointError(
            f"{original.config}: tie_word_embeddings: lm_head.weight is not model.embed_tokens.weight"
        )
    head.weight = embedding.weight


class _Names:
    """Keys of the original layout -> names in `_Parts.modules`."""

    def __init__(self, parts: _Parts) -> None:
        self._nested = any(name.startswith("vision_model.") for name in parts.modules["vision"].state_dict())
        self._layers = {"mlp2x_gelu": {"0": "linear_1", "2": "linear_2"}, "linear": {"": "linear"}}.get(
            parts.settings.connector, {}
        )

    def __call__(self, key: str) -> str:
        """`model.mm_projector.2.bias` -> `connector.linear_2.bias`; the adapters' prefixes are passed over."""
        key = key.removeprefix("base_model.")
        key = key.removeprefix("model.") if key.startswith(("model.model.", "model.lm_head.")) else key
        if key.startswith(TOWER):
            inner = key.removeprefix(TOWER).removeprefix("vision_model.")
            return f"vision.vision_model.{inner}" if self._nested else f"vision.{inner}"
        if key.startswith("model.mm_projector."):
            layer, _, kind = key.removeprefix("model.mm_projector.").rpartition(".")
            return f"connector.{self._layers.get(layer, f'layers.{layer}')}.{kind}"
        return "tiles.image_newline" if key == "model.image_newline" else f"llm.{key}"
