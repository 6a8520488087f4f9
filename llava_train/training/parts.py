"""What a recipe's model is made of as far as data need to know, from configurations alone: no weights are loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from llava_train.data.encode import Encoder
from llava_train.data.pictures.processors import build_image_processor, tile_processor
from llava_train.data.pictures.shapes import Shape
from llava_train.data.pictures.shaping import build_shape
from llava_train.data.templates.fit import resolve_template
from llava_train.errors import RecipeError
from llava_train.inference import shape_of
from llava_train.model.assemble import Seen, architecture_of, image_tokens_of, picture_options, see
from llava_train.model.checkpoint import model_folder
from llava_train.model.families.table import FAMILIES
from llava_train.model.llm import add_image_token, load_tokenizer
from llava_train.model.originals.loading import is_original, original_facts, require_frame
from llava_train.model.spec import MANIFEST, ModelSpec, read_spec
from llava_train.model.stock import read_stock, stock_spec
from llava_train.model.towers.loading import vision_sources
from llava_train.recipe import ModelSettings, Recipe, SourceSettings
from llava_train.training.monitor import say


def _composition(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """The family of a recipe's model, and its connector's options, from configurations alone."""
    if not recipe.init_from:
        return architecture_of(recipe.model), recipe.model.connector_options
    folder = model_folder(recipe.init_from)
    if (folder / MANIFEST).is_file():
        spec = read_spec(folder)
        return spec.architecture, spec.connector_options
    if is_original(folder):
        return original_facts(folder, *lacking_parts(recipe))[2].architecture, {}
    return str(read_stock(folder)[0].model_type), {}


def fitted(recipe: Recipe) -> Recipe:
    """The recipe without what its model cannot do and nobody has to know beforehand: packed rows, shared beginnings.

    RecipeError for a feature cache that it cannot have.
    """
    architecture, options = _composition(recipe)
    speed = recipe.speed
    if recipe.data.feature_cache and not tokens_of(recipe)[1].separable:
        raise RecipeError(
            f"data.feature_cache: holds one square picture, which is not what a {architecture} model sees; set it "
            "to false"
        )
    if speed.packing and not FAMILIES[architecture].packs:
        say(f"speed.packing: a {architecture} model reads padded rows; packing is off")
        speed = replace(speed, packing=False, micro_batch_tokens=None)
    if speed.packing and speed.share_prefix and options.get("instruction"):
        say("speed.share_prefix: the connector reads a picture anew for each question; sharing is off")
        speed = replace(speed, share_prefix=False)
    return replace(recipe, speed=speed)


def lacking_parts(recipe: Recipe) -> tuple[str | None, str | None]:
    """LLM and encoder that a recipe names for an `init_from` of the original code, whose folders may lack them."""
    vision = recipe.model.vision
    return recipe.model.llm or None, vision if isinstance(vision, str) and vision else None


def tokens_of(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Shape, str]:
    """The tokenizer of a recipe, how its pictures become tokens, and its family, from configurations alone."""
    if recipe.init_from:
        folder = model_folder(recipe.init_from)
        if (folder / MANIFEST).is_file():
            spec, tokenizer = read_spec(folder), load_tokenizer(str(folder))
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        elif is_original(folder):
            tokenizer, processor, spec = original_facts(folder, *lacking_parts(recipe))
        else:
            config, tokenizer, processor = read_stock(folder)
            spec = stock_spec(folder, config, processor)
        spec, processor = retiled(recipe.model, spec, processor)
        return tokenizer, shape_of(spec, processor), spec.architecture
    model = recipe.model
    seen, architecture = see(model), architecture_of(model)
    tokenizer = load_tokenizer(model.llm, model.llm_revision, model.trust_remote_code)
    add_image_token(tokenizer)
    shape = build_shape(architecture, processor_of(model, seen), image_tokens_of(model, seen), picture_options(model))
    return tokenizer, shape, architecture


def retiled(model: ModelSettings, spec: ModelSpec, processor: Any) -> tuple[ModelSpec, Any]:
    """Spec and image processor with the tiles that a recipe asks of a model which saw one square picture so far."""
    asked, tiled = model.image_aspect_ratio, model.image_aspect_ratio.startswith("anyres")
    decided = {
        "model.fusion": model.fusion != "tokens" and spec.architecture != "llava_cross_attention",
        "model.image_aspect_ratio": tiled and spec.architecture != "llava" and asked != spec.image_aspect_ratio,
    }
    for key in (key for key, other in decided.items() if other):
        found = f"{spec.architecture} model ({spec.image_aspect_ratio})"
        raise RecipeError(f"{key}: init_from is a {found}, which decides this: remove the key")
    if spec.architecture != "llava" or not tiled:
        return spec, processor
    tiles = tile_processor(processor, model.image_aspect_ratio, spec.image_size, model.image_grid_pinpoints)
    changes: dict[str, Any] = {
        "architecture": architecture_of(model),
        "image_aspect_ratio": model.image_aspect_ratio,
        "picture_options": picture_options(model),
    }
    return replace(spec, **changes), tiles


def processor_of(model: ModelSettings, seen: Seen) -> Any:
    """The image processor of a model that is assembled from parts."""
    folder, revision = vision_sources(model.vision, model.vision_revision)[0]
    size, points = seen.shape.image_size, model.image_grid_pinpoints
    return build_image_processor(folder, model.image_aspect_ratio, size, revision, points)


def encoders_of(recipe: Recipe) -> dict[str, Encoder]:
    """The encoder of every template that the recipe or a source of it names; they share one tokenizer."""
    tokenizer, shape, architecture = tokens_of(recipe)
    family, length = FAMILIES[architecture], recipe.data.max_length
    names = {template_of(source, recipe) for source in (*recipe.data.train, *recipe.data.validation)}
    templates = {name: resolve_template(name, tokenizer)[1] for name in sorted(names)}
    for template in templates.values():
        require_frame(tokenizer, template)
    return {
        name: Encoder(tokenizer, template, shape, length, family.marker, family.image_token, family.line_end)
        for name, template in templates.items()
    }


def template_of(settings: SourceSettings, recipe: Recipe) -> str:
    """The template of a source."""
    return settings.template or recipe.data.template
