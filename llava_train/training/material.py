"""What a recipe reads: its prepared sets, what of them is held out, and the batches in the order of the plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_train.data.batch import Batch, BatchReader, ImageReader, StepDataset, load_steps
from llava_train.data.encode import Encoder
from llava_train.data.plan import MicroBatch, Plan
from llava_train.data.prepare import PreparedSet, Source, prepare_set
from llava_train.data.template import load_template
from llava_train.errors import DataError, RecipeError
from llava_train.model.assemble import Assembly
from llava_train.model.checkpoint import load_stock, model_folder
from llava_train.model.connectors import connector_tokens
from llava_train.model.encoders import load_vision_config, vision_shape
from llava_train.model.llm import add_image_token, load_tokenizer
from llava_train.model.spec import MANIFEST, read_spec
from llava_train.recipe import Recipe, SourceSettings
from llava_train.training.engine import Engine
from llava_train.training.loop import Course


@dataclass(frozen=True)
class Prepared:
    """What a recipe reads: the training set and, where it holds some out, the validation set."""

    train: PreparedSet
    validation: PreparedSet | None
    train_rows: tuple[int, ...]
    validation_rows: tuple[int, ...]


def encoder_of(recipe: Recipe) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of a recipe and its image settings, from configurations and tokenizer alone."""
    if recipe.init_from:
        folder = model_folder(recipe.init_from)
        if (folder / MANIFEST).is_file():
            spec, tokenizer = read_spec(folder), load_tokenizer(str(folder))
        else:
            stock = load_stock(folder)
            spec, tokenizer = stock.spec, stock.tokenizer
        image_tokens, size = spec.image_tokens, spec.image_size
    else:
        model = recipe.model
        shape = vision_shape(load_vision_config(model.vision, model.vision_revision), model.image_size)
        tokenizer = load_tokenizer(model.llm, model.llm_revision, model.trust_remote_code)
        add_image_token(tokenizer)
        positions = shape.tokens(model.vision_feature_select_strategy)
        image_tokens, size = connector_tokens(model.connector, positions, model.connector_options), shape.image_size
    template = load_template(recipe.data.template, tokenizer.chat_template)
    settings = {"size": size, "exif_orientation": recipe.data.exif_orientation}
    return Encoder(tokenizer, template, image_tokens, recipe.data.max_length), settings


def prepare_in_turn(recipe: Recipe, engine: Engine) -> Prepared:
    """Rank 0 prepares; the others then find the set in the cache. No weights are loaded for it."""
    if engine.is_main:
        prepare(recipe)
    engine.barrier()
    return prepare(recipe)


def prepare(recipe: Recipe) -> Prepared:
    """Make (or find) the prepared sets of a recipe, without loading any weights."""
    encoder, images = encoder_of(recipe)
    if not recipe.data.train:
        raise RecipeError("data.train: names no source of training data")
    cache = Path(recipe.data.cache_dir)
    train_set = prepare_set(_sources(recipe.data.train), encoder, images, cache, "train")
    rows = tuple(range(len(train_set)))
    if recipe.data.validation:
        held_out = prepare_set(_sources(recipe.data.validation), encoder, images, cache, "validation")
        return Prepared(train_set, held_out, rows, tuple(range(len(held_out))))
    count = round(recipe.data.validation_fraction * len(rows))
    if recipe.data.validation_fraction and not 0 < count < len(rows):
        raise DataError(
            f"data.validation_fraction: {recipe.data.validation_fraction} of {len(rows)} samples is {count}"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    held, kept = tuple(sorted(order[:count])), tuple(sorted(order[count:]))
    return Prepared(train_set, train_set if count else None, kept, held)


def _sources(settings: list[SourceSettings]) -> list[Source]:
    return [
        Source(Path(s.path), Path(s.image_root) if s.image_root is not None else Path(s.path).parent, s.format)
        for s in settings
    ]


def plan_of(recipe: Recipe, prepared: Prepared) -> Plan:
    """The order of a run: a function of the training set's size and the recipe."""
    optimization = recipe.optimization
    return Plan.of(
        len(prepared.train_rows),
        optimization.global_batch_size,
        optimization.epochs,
        optimization.max_steps,
        recipe.seed,
    )


def course_of(recipe: Recipe, assembly: Assembly, prepared: Prepared, engine: Engine, first_step: int) -> Course:
    """The plan of a run with its batches from `first_step` on, for this rank."""
    plan = plan_of(recipe, prepared)
    pad_id = int(assembly.tokenizer.pad_token_id)
    images = ImageReader(assembly.image_processor, recipe.data.exif_orientation)
    micro = (recipe.optimization.micro_batch_size, recipe.optimization.loss_normalization)
    reader = BatchReader(prepared.train, images, pad_id)
    dataset = StepDataset(reader, plan, prepared.train_rows, (engine.rank, engine.world_size), micro)
    steps = load_steps(dataset, first_step, recipe.data.num_workers)
    if prepared.validation is None:
        return Course(plan, steps, None)
    held_out = BatchReader(prepared.validation, images, pad_id)
    mine = prepared.validation_rows[engine.rank :: engine.world_size]

    def validation() -> Iterator[Batch]:
        size = recipe.optimization.micro_batch_size
        for start in range(0, len(mine), size):
            rows = mine[start : start + size]
            yield held_out(MicroBatch(rows, (0.0,) * len(rows)))

    return Course(plan, steps, validation)
