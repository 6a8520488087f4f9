"""Parts -> transformers' LlavaForConditionalGeneration, its tokenizer and image processor.

The stock class computes everything; only the module in its projector slot is ours when the connector is not
the two-layer MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlavaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llava_train.errors import RecipeError
from llava_train.model.connectors import (
    Widths,
    build_connector,
    connector_grid,
    connector_tokens,
    initialise_connector,
    lasting_options,
)
from llava_train.model.cross.fused import plan_blocks
from llava_train.model.families.tiles import tile_config
from llava_train.model.joining import Parts, fingerprint, join, put_together, require_weights
from llava_train.model.llm import add_image_token, grow_vocabulary, load_llm, load_tokenizer
from llava_train.model.spec import ModelSpec, PartSource
from llava_train.model.towers.loading import (
    VisionShape,
    check_features,
    load_vision_config,
    load_vision_tower,
    stock_features,
    vision_shape,
)
from llava_train.recipe import ModelSettings

_SHARED = (
    "vision_config",
    "text_config",
    "image_token_index",
    "projector_hidden_act",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""What the configurations of the LLaVA classes have in common"""


@dataclass(frozen=True)
class Assembly:
    """A model with what belongs to it.

    Attributes:
        model: transformers' class, or ours for cross-attention.
        tokenizer: knows `<image>`.
        image_processor: gives the tower's pixels.
        spec: what the model is made of.
        template: Jinja text with generation marks, or the stock folder's own.
        old_vocabulary: rows of the embeddings from here on were added by us (and are saved with the model).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    spec: ModelSpec
    template: str
    old_vocabulary: int


def assemble(settings: ModelSettings, template: str, template_name: str, image_processor: Any, seed: int) -> Assembly:
    """Build the model that a recipe names, with a fresh connector. Raises CheckpointError or RecipeError."""
    seen = see(settings)
    check_features(seen.config, seen.layer, seen.strategy)
    tokenizer = load_tokenizer(settings.llm, settings.llm_revision, settings.trust_remote_code)
    image_token_id = add_image_token(tokenizer)
    llm = load_llm(settings.llm, settings.attn_implementation, settings.llm_revision, settings.trust_remote_code)
    old_vocabulary = grow_vocabulary(llm, len(tokenizer), seed)
    tower = load_vision_tower(
        settings.vision,
        settings.vision_revision,
        settings.vision_feature_layer,
        settings.vision_feature_select_strategy,
    )
    architecture = architecture_of(settings)
    ids = (image_token_id, int(tokenizer.pad_token_id))
    points = getattr(image_processor, "image_grid_pinpoints", None)
    config = model_config(settings, replace(seen, config=tower.config), llm.config, ids, points)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = build_connector(settings.connector, widths(config), config, settings.connector_options)
        initialise_connector(settings.connector, connector, settings.connector_options)
    model = join(architecture, config, tower, llm, connector, seed)
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
        connector_options=lasting_options(settings.connector, settings.connector_options),
        image_size=seen.shape.image_size,
        image_tokens=image_tokens_of(settings, seen),
        image_aspect_ratio=settings.image_aspect_ratio,
        template=template_name,
        architecture=architecture,
        picture_options=picture_options(settings),
    )
    return Assembly(model, tokenizer, image_processor, spec, template, old_vocabulary)


def architecture_of(settings: ModelSettings) -> str:
    """The row of the table of families that a recipe's parts become."""
    if settings.fusion == "cross_attention":
        return "llava_cross_attention"
    if settings.image_aspect_ratio.startswith("anyres"):
        return "llava_next" if settings.image_aspect_ratio == "anyres" else "llava_onevision"
    return "llava"


def picture_options(settings: ModelSettings) -> dict[str, Any]:
    """Settings of the shape of pictures: see `llava_train.data.pictures.tiles`."""
    if architecture_of(settings) != "llava_onevision":
        return {}
    return {"most": int(settings.image_aspect_ratio.rpartition("_")[2]), "one_tile": settings.small_as_one_tile}


@dataclass(frozen=True)
class Seen:
    """What of the tower a recipe's connector reads: its configuration and shape, and what the model's class is told."""

    config: PretrainedConfig
    shape: VisionShape
    layer: int | list[int]
    strategy: str

    @property
    def positions(self) -> int:
        """Positions that reach the connector."""
        return self.shape.tokens(self.strategy)


def see(settings: ModelSettings) -> Seen:
    """From configurations alone. Raises CheckpointError or RecipeError."""
    layer, strategy = settings.vision_feature_layer, settings.vision_feature_select_strategy
    config = load_vision_config(settings.vision, settings.vision_revision, layer, strategy)
    return Seen(config, vision_shape(config, settings.image_size), *stock_features(config, layer, strategy))


def image_tokens_of(settings: ModelSettings, seen: Seen) -> int:
    """Tokens in the LLM of a square picture, or of one tile. RecipeError for tiles and a connector off their grid."""
    tokens = connector_tokens(settings.connector, seen.positions, settings.connector_options)
    if settings.image_aspect_ratio.startswith("anyres"):
        require_own_size(seen.config, seen.shape.image_size)
    if settings.image_aspect_ratio.startswith("anyres") and not on_own_grid(
        settings.connector, settings.connector_options, seen.positions, seen.shape
    ):
        raise RecipeError(
            f"model.image_aspect_ratio: {settings.image_aspect_ratio}: tiles are put together on the encoder's own "
            f"grid of {seen.shape.patches} patches; connector {settings.connector!r} gives {tokens} tokens of "
            f"{seen.positions} positions: take linear or mlp2x_gelu, and vision_feature_select_strategy 'default' "
            "where there is a CLS"
        )
    return 1 if settings.fusion == "cross_attention" else tokens


def model_config(
    settings: ModelSettings,
    seen: Seen,
    text_config: PretrainedConfig,
    ids: tuple[int, int],
    points: list[list[int]] | None = None,
) -> PretrainedConfig:
    """The configuration of the joined model. `ids` of the image token and of padding; `points` of tiles."""
    values: dict[str, Any] = {
        "vision_config": seen.config,
        "text_config": text_config,
        "image_token_index": ids[0],
        "projector_hidden_act": "linear" if settings.connector == "linear" else "gelu",
        "vision_feature_layer": seen.layer,
        "vision_feature_select_strategy": seen.strategy,
        "tie_word_embeddings": bool(text_config.tie_word_embeddings),
        "pad_token_id": ids[1],
        "bos_token_id": text_config.bos_token_id,
        "eos_token_id": text_config.eos_token_id,
    }
    architecture = architecture_of(settings)
    if architecture in ("llava_next", "llava_onevision"):
        return tile_config(architecture, values, settings.image_aspect_ratio, points or [])
    config = LlavaConfig(**values, image_seq_length=image_tokens_of(settings, seen))
    if architecture == "llava_cross_attention":
        config.cross_attention = plan_blocks(text_config, settings.fusion_options)
    return config


def widths(config: LlavaConfig) -> Widths:
    """Widths of the connector of a configuration."""
    layers = config.vision_feature_layer
    count = len(layers) if isinstance(layers, list) else 1
    return Widths(config.vision_config.hidden_size * count, config.text_config.hidden_size)


def on_own_grid(connector: str, options: dict[str, Any], positions: int, shape: VisionShape) -> bool:
    """Whether a connector's tokens lie on the grid of the encoder's patches, which tiles are put together on."""
    side = shape.image_size // shape.patch_size
    return connector_grid(connector, positions, options) == (side, side)


def require_own_size(config: PretrainedConfig, image_size: int) -> None:
    """RecipeError for tiles of another size than the encoder's own, by which the stock classes lay them out."""
    own = vision_shape(config).image_size
    if image_size != own:
        raise RecipeError(f"model.image_size: {image_size}: tiles have the encoder's own size, {own}; remove it")


def retile(assembly: Assembly, seed: int) -> Assembly:
    """A model that saw one square picture so far as the class of tiles that its spec names, with a fresh newline.

    So LLaVA-NeXT goes from stage 1 to stage 2. Raises RecipeError for a connector that leaves the encoder's grid.
    """
    spec, config = assembly.spec, assembly.model.config
    require_own_size(config.vision_config, spec.image_size)
    shape = vision_shape(config.vision_config, spec.image_size)
    positions = shape.tokens(config.vision_feature_select_strategy)
    if not on_own_grid(spec.connector, spec.connector_options, positions, shape):
        raise RecipeError(
            f"model.image_aspect_ratio: {spec.image_aspect_ratio}: tiles are put together on the encoder's own grid of "
            f"{shape.patches} patches; connector {spec.connector!r} of this model gives {spec.image_tokens} tokens"
        )
    points = assembly.image_processor.image_grid_pinpoints
    values = {name: getattr(config, name) for name in _SHARED}
    tiled = tile_config(spec.architecture, values, spec.image_aspect_ratio, points)
    return replace(assembly, model=put_together(spec.architecture, tiled, Parts.of(assembly.model), seed))


def with_spec(assembly: Assembly, **changes: Any) -> Assembly:
    """The same assembly with some fields of its spec changed."""
    return replace(assembly, spec=replace(assembly.spec, **changes))
