"""Parts -> transformers' LlavaForConditionalGeneration, its tokenizer and image processor.

The stock class computes everything; only the module in its projector slot is ours when the connector is not
the two-layer MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase

from llava_train.errors import CheckpointError, RecipeError
from llava_train.files import sha256_json
from llava_train.model.connectors import Widths, build_connector, connector_tokens
from llava_train.model.encoders import VisionShape, load_vision_config, load_vision_tower, vision_shape
from llava_train.model.llm import add_image_token, grow_vocabulary, load_llm, load_tokenizer
from llava_train.model.spec import ModelSpec, PartSource
from llava_train.recipe import ModelSettings


@dataclass(frozen=True)
class Assembly:
    """A model with what belongs to it.

    Attributes:
        model: the stock class.
        tokenizer: knows `<image>`.
        image_processor: gives the tower's pixels.
        spec: what the model is made of.
        template: Jinja text with generation marks, or the stock folder's own.
        old_vocabulary: rows of the embeddings from here on were added by us (and are saved with the model).
    """

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    spec: ModelSpec
    template: str
    old_vocabulary: int


def assemble(settings: ModelSettings, template: str, template_name: str, image_processor: Any, seed: int) -> Assembly:
    """Build the model that a recipe names, with a fresh connector. Raises CheckpointError or RecipeError."""
    vision_config = load_vision_config(settings.vision, settings.vision_revision)
    shape = vision_shape(vision_config, settings.image_size)
    check_features(settings, int(vision_config.num_hidden_layers), shape)
    tokenizer = load_tokenizer(settings.llm, settings.llm_revision, settings.trust_remote_code)
    image_token_id = add_image_token(tokenizer)
    llm = load_llm(settings.llm, settings.attn_implementation, settings.llm_revision, settings.trust_remote_code)
    old_vocabulary = grow_vocabulary(llm, len(tokenizer), seed)
    tower = load_vision_tower(settings.vision, settings.vision_revision)
    positions = shape.tokens(settings.vision_feature_select_strategy)
    config = llava_config(settings, tower, llm, image_token_id, int(tokenizer.pad_token_id), positions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = build_connector(settings.connector, widths(config), config, settings.connector_options)
    model = join(config, tower, llm, connector)
    require_weights(model)
    spec = ModelSpec(
        vision=PartSource(settings.vision, settings.vision_revision, fingerprint=fingerprint(tower)),
        llm=PartSource(
            settings.llm,
            settings.llm_revision,
            "gguf" if settings.llm.endswith(".gguf") else "hf",
            fingerprint=fingerprint(llm, old_vocabulary),
        ),
        connector=settings.connector,
        connector_options=settings.connector_options,
        image_size=shape.image_size,
        image_tokens=connector_tokens(settings.connector, positions, settings.connector_options),
        image_aspect_ratio=settings.image_aspect_ratio,
        template=template_name,
    )
    return Assembly(model, tokenizer, image_processor, spec, template, old_vocabulary)


def check_features(settings: ModelSettings, layers: int, shape: VisionShape) -> None:
    """RecipeError for a feature layer the tower does not have, or a CLS to drop where there is none."""
    chosen = settings.vision_feature_layer
    for layer in chosen if isinstance(chosen, list) else [chosen]:
        if not -(layers + 1) <= layer <= layers:
            raise RecipeError(f"model.vision_feature_layer: {layer}: this encoder has hidden states 0 to {layers}")
    if settings.vision_feature_select_strategy == "default" and not shape.leading:
        raise RecipeError(
            "model.vision_feature_select_strategy: 'default' drops the CLS position, which this encoder does not "
            "have: a patch would be lost; set it to 'full'"
        )


def llava_config(
    settings: ModelSettings,
    tower: PreTrainedModel,
    llm: PreTrainedModel,
    image_token_id: int,
    pad_token_id: int,
    positions: int,
) -> LlavaConfig:
    """The configuration of the joined model."""
    linear = settings.connector == "linear"
    return LlavaConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_index=image_token_id,
        image_seq_length=connector_tokens(settings.connector, positions, settings.connector_options),
        projector_hidden_act="linear" if linear else "gelu",
        vision_feature_layer=settings.vision_feature_layer,
        vision_feature_select_strategy=settings.vision_feature_select_strategy,
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
        pad_token_id=pad_token_id,
        bos_token_id=llm.config.bos_token_id,
        eos_token_id=llm.config.eos_token_id,
    )


def widths(config: LlavaConfig) -> Widths:
    """Widths of the connector of a configuration."""
    layers = config.vision_feature_layer
    count = len(layers) if isinstance(layers, list) else 1
    return Widths(config.vision_config.hidden_size * count, config.text_config.hidden_size)


def join(
    config: LlavaConfig, tower: PreTrainedModel, llm: PreTrainedModel, connector: nn.Module
) -> LlavaForConditionalGeneration:
    """Put loaded parts into the stock class; nothing is initialised twice."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = llm.get_decoder()
    model.model.multi_modal_projector = connector
    model.lm_head = llm.get_output_embeddings()
    model.generation_config = llm.generation_config
    model.generation_config.pad_token_id = config.pad_token_id
    model.config.text_config.vocab_size = model.lm_head.weight.shape[0]
    return model.eval()


def require_weights(model: nn.Module) -> None:
    """Raise CheckpointError, naming them, where weights of a joined model are empty still."""
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise CheckpointError(f"no part brings these weights: {', '.join(left[:10])}")


def fingerprint(part: nn.Module, rows: int | None = None) -> str:
    """A hash of a part's weights that is cheap at any size: names, shapes and an exact sum of each tensor's bits.

    `rows` limits embeddings and head to the rows that came with the checkpoint.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    described = []
    for name, tensor in sorted(part.state_dict().items()):
        grown = rows is not None and (name.endswith("embed_tokens.weight") or name.startswith("lm_head."))
        whole = tensor.detach()[:rows] if grown else tensor.detach()
        bits = whole.contiguous().view(integers[tensor.element_size()])
        described.append([name, list(whole.shape), int(bits.sum(dtype=torch.int64))])
    return sha256_json(described)[:16]


def with_spec(assembly: Assembly, **changes: Any) -> Assembly:
    """The same assembly with some fields of its spec changed."""
    return replace(assembly, spec=replace(assembly.spec, **changes))
