"""The model of a folder of ours around its weights: parts from their sources, or empty where the folder holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from llava_train.errors import CheckpointError
from llava_train.model.assemble import Assembly, widths
from llava_train.model.connectors import build_connector
from llava_train.model.families.table import FAMILIES
from llava_train.model.joining import Parts, fingerprint, join, put_together
from llava_train.model.llm import attention_or_own, grow_vocabulary, load_llm
from llava_train.model.spec import ModelSpec, PartSource
from llava_train.model.stock import load_stock
from llava_train.model.towers.loading import reload_vision_tower
from llava_train.model.tuning import add_lora

TEMPLATE = "training_template.jinja"


def rebuild(folder: Path, spec: ModelSpec, attn_implementation: str) -> Assembly:
    """The model around its weights: parts from their sources, or empty where the folder includes them."""
    config = FAMILIES[spec.architecture].model_class.config_class.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    build = _from_stock if "llava" in (spec.llm.kind, spec.vision.kind) else _from_parts
    model, old_vocabulary = build(config, spec, len(tokenizer), attn_implementation)
    if spec.lora:
        add_lora(model, spec.lora)
    template = (folder / TEMPLATE).read_text(encoding="utf-8")
    return Assembly(model, tokenizer, image_processor, spec, template, old_vocabulary)


def _from_parts(
    config: PretrainedConfig, spec: ModelSpec, tokens: int, attn_implementation: str
) -> tuple[PreTrainedModel, int]:
    """A model of parts, and the rows of its embeddings that came with the LLM."""
    old_vocabulary = 0
    if spec.llm.included:
        llm = _empty(config.text_config, causal=True, attn_implementation=attn_implementation)
    else:
        llm, old_vocabulary = _source_llm(spec.llm, tokens, attn_implementation)
    if spec.vision.included:
        tower = _empty(config.vision_config, causal=False, attn_implementation="sdpa")
    else:
        tower = reload_vision_tower(config.vision_config, spec.vision.path, spec.vision.revision)
        _same(spec.vision, fingerprint(tower))
    connector = build_connector(spec.connector, widths(config), config, spec.connector_options)
    config.text_config, config.vision_config = llm.config, tower.config
    return join(spec.architecture, config, tower, llm, connector, None), old_vocabulary


def _from_stock(
    config: PretrainedConfig, spec: ModelSpec, tokens: int, attn_implementation: str
) -> tuple[PreTrainedModel, int]:
    """A model that began as a folder in transformers' layout, which is read unless nothing is left of it."""
    if not (spec.llm.included and spec.vision.included):
        source = spec.vision if spec.llm.included else spec.llm
        stock = load_stock(Path(str(source.path)), torch.float32, attn_implementation)
        if source.fingerprint:
            _same(source, fingerprint(stock.model))
        if isinstance(stock.model, FAMILIES[spec.architecture].model_class):
            return stock.model, stock.old_vocabulary
        return put_together(spec.architecture, config, Parts.of(stock.model), None), stock.old_vocabulary
    if attention_or_own(attn_implementation):
        config._attn_implementation = attn_implementation
    with init_empty_weights(include_buffers=False):  # the weights come from the file, unread until they are used
        return FAMILIES[spec.architecture].model_class._from_config(config, dtype=torch.float32), 0


def _empty(config: Any, causal: bool, attn_implementation: str) -> Any:
    kind = AutoModelForCausalLM if causal else AutoModel
    with init_empty_weights(include_buffers=False):  # the weights come from the file, unread until they are used
        return kind.from_config(config, dtype=torch.float32, attn_implementation=attention_or_own(attn_implementation))


def _source_llm(source: PartSource, tokens: int, attn_implementation: str) -> tuple[Any, int]:
    llm = load_llm(str(source.path), attn_implementation, source.revision)
    old = int(llm.get_input_embeddings().weight.shape[0])
    _same(source, fingerprint(llm, old))
    grow_vocabulary(llm, tokens, seed=0)
    return llm, old


def _same(source: PartSource, found: str) -> None:
    if source.fingerprint and source.fingerprint != found:
        raise CheckpointError(
            f"{source.path}: these are not the weights this model was trained on "
            f"(fingerprint {found}, expected {source.fingerprint})"
        )
