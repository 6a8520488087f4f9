"""What a recipe reads: its prepared sets, what of them is held out, and the batches in the order of the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_train.data.batch import BatchReader, ImageReader, StepDataset, load_steps
from llava_train.data.encode import Encoder
from llava_train.data.features import FeatureReader, forget_features
from llava_train.data.micro_batches import Cut, MicroBatch, waste
from llava_train.data.mixture import Mixture, Share, capped, mix
from llava_train.data.pictures.media import Media
from llava_train.data.plan import Plan
from llava_train.data.preparing.prepare import prepare_set
from llava_train.data.preparing.prepared import PreparedSet
from llava_train.data.preparing.source import Source
from llava_train.data.records.hub import hub_files
from llava_train.errors import DataError, RecipeError
from llava_train.inference import shape_of
from llava_train.model.assemble import Assembly
from llava_train.model.costs import Costs
from llava_train.recipe import Recipe, SourceSettings
from llava_train.storage import expand_paths, is_remote
from llava_train.training.engines.ranks import Ranks
from llava_train.training.loop import Course
from llava_train.training.parts import encoders_of, template_of
from llava_train.training.signals import shield_worker

_SLACK = 1.125
"""Positions of a micro-batch by those of `micro_batch_size` average samples: without slack, a step of as many samples
would mostly need another one, half empty."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a recipe reads: the training set with its mixture and, where it holds some out, the validation set.

    `tokenizer` is the digest of the tokenizer they were made with; features, where a recipe has them made, are those of
    the pictures of either set.
    """

    train: PreparedSet
    validation: PreparedSet | None
    mixture: Mixture
    validation_rows: np.ndarray
    tokenizer: str
    train_features: FeatureReader | None = None
    validation_features: FeatureReader | None = None


def sources_of(
    recipe: Recipe, settings: Sequence[SourceSettings] | None = None, encoders: dict[str, Encoder] | None = None
) -> list[Source]:
    """Sources of a recipe (`data.train` unless `settings` are given), each with its encoder and its files."""
    settings = recipe.data.train if settings is None else settings
    encoders = encoders or encoders_of(recipe)
    sources = [_source(each, encoders[template_of(each, recipe)], recipe) for each in settings]
    return [replace(source, name=_own_name(number, sources)) for number, source in enumerate(sources)]


def _own_name(number: int, sources: list[Source]) -> str:
    """A source's name; the second of a name is "name (2)"."""
    name = sources[number].name
    before = sum(source.name == name for source in sources[:number])
    return f"{name} ({before + 1})" if before else name


def _source(settings: SourceSettings, encoder: Encoder, recipe: Recipe) -> Source:
    if settings.hub:
        name, root = settings.hub, Path(settings.image_root or ".").expanduser()
        files = hub_files(settings.hub, settings.subset, settings.split)
    else:
        name = str(settings.path)
        files = expand_paths(str(Path(name).expanduser()) if name.startswith("~") else name)
        beside = "." if is_remote(files[0]) else str(Path(files[0]).parent)
        root = Path(settings.image_root if settings.image_root is not None else beside).expanduser()
    if settings.image_aspect_ratio and not isinstance(encoder.image_tokens, int):
        try:
            encoder.image_tokens.reshaped(settings.image_aspect_ratio)
        except RecipeError as error:
            raise RecipeError(f"data: source {settings.name or name}: {error}") from error
    turned = recipe.data.exif_orientation if settings.exif_orientation is None else settings.exif_orientation
    return Source(
        settings.name or name,
        tuple(files),
        encoder,
        Media(root, settings.allow_links, settings.allow_http, turned, settings.video_frames),
        settings.format,
        settings.verify,
        settings.policy,
        settings.max_skipped,
        settings.duplicates,
        settings.image_aspect_ratio,
    )


def prepare_in_turn(recipe: Recipe, ranks: Ranks) -> Prepared:
    """Rank 0 prepares; the others then find the set in the cache. No weights are loaded for it."""
    mine = prepare(recipe) if ranks.is_main else None
    ranks.barrier()
    return mine or prepare(recipe)


def prepare(recipe: Recipe, rebuild: bool = False) -> Prepared:
    """Make (or find) the prepared sets of a recipe, without loading any weights."""
    if not recipe.data.train:
        raise RecipeError("data.train: names no source of training data")
    cache, workers = Path(recipe.data.cache_dir).expanduser(), recipe.data.prepare_workers
    encoders = encoders_of(recipe)
    tokenizer = next(iter(encoders.values())).tokenizer_digest
    train_set = prepare_set(sources_of(recipe, None, encoders), cache, "train", workers, rebuild)
    if rebuild:
        forget_features(cache, train_set)
    rows = [train_set.rows_of_source(number) for number in range(len(recipe.data.train))]
    shares = [Share(source.cap, source.repeat, source.weight) for source in recipe.data.train]
    if recipe.data.validation:
        sources = sources_of(recipe, recipe.data.validation, encoders)
        held_out = prepare_set(sources, cache, "validation", workers, rebuild)
        if rebuild:
            forget_features(cache, held_out)
        taken = [
            capped(held_out.rows_of_source(number), source.cap, recipe.seed, number)
            for number, source in enumerate(recipe.data.validation)
        ]
        return Prepared(train_set, held_out, mix(rows, shares, recipe.seed), np.concatenate(taken), tokenizer)
    kept, held = _hold_out(rows, recipe.data.validation_fraction, recipe.seed)
    return Prepared(train_set, train_set if len(held) else None, mix(kept, shares, recipe.seed), held, tokenizer)


def _hold_out(rows: list[np.ndarray], fraction: float, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Take `fraction` of each source's rows out, by chance: what is left of each, and what was taken of all."""
    if not fraction:
        return rows, np.array([], dtype=int)
    kept, held = [], []
    for number, part in enumerate(rows):
        order = np.random.default_rng((seed, number, 3)).permutation(part)
        count = round(fraction * len(part))
        held.append(np.sort(order[:count]))
        kept.append(np.sort(order[count:]))
    taken = np.concatenate(held)
    if not len(taken):
        total = sum(map(len, rows))
        raise DataError(f"data.validation_fraction: {fraction} of {total} samples is none; raise it, or set it to 0")
    for number, part in enumerate(kept):
        if not len(part):
            raise DataError(
                f"data.validation_fraction: {fraction} leaves data.train.{number} no sample to train on "
                f"({len(rows[number])} in all); lower it, or name validation sources"
            )
    return kept, taken


def epoch_of(prepared: Prepared) -> list[dict[str, Any]]:
    """What each source brings to an epoch: its samples in it, about how many tokens, and their share."""
    lengths, parts = prepared.train.lengths, prepared.mixture.parts
    tokens = [float(lengths[part.rows].mean()) * part.count for part in parts]
    return [
        {"source": source["name"], "samples": part.count, "tokens": round(own), "share": own / sum(tokens)}
        for source, part, own in zip(prepared.train.info["sources"], parts, tokens)
    ]


def plan_of(recipe: Recipe, prepared: Prepared) -> Plan:
    """The order of a run: a function of the training set's mixture and the recipe."""
    optimization = recipe.optimization
    return Plan.of(
        prepared.mixture,
        optimization.global_batch_size,
        optimization.epochs,
        optimization.max_steps,
        recipe.seed,
        prepared.train.prefix_keys if recipe.data.group_by_image else None,
    )


def cut_of(recipe: Recipe, prepared: PreparedSet, costs: Costs | None = None) -> Cut:
    """How a step of a set is cut into micro-batches; `costs` of the model balance what ranks have to do.

    Raises RecipeError where a sample is longer than a micro-batch may be.
    """
    size, normalization = recipe.optimization.micro_batch_size, recipe.optimization.loss_normalization
    if not recipe.speed.packing:
        return Cut(size, normalization)
    longest, budget = int(prepared.lengths.max()), recipe.speed.micro_batch_tokens
    if budget is not None and budget < longest:
        raise RecipeError(f"speed.micro_batch_tokens: {budget} is less than the longest sample has, {longest} tokens")
    budget = budget or max(longest, math.ceil(_SLACK * size * float(prepared.lengths.mean())))
    costly = (costs.pair_in_tokens, costs.image_in_tokens) if costs else (0.0, 0.0)
    return Cut(size, normalization, budget, recipe.speed.share_prefix, *costly)


def padding_of(recipe: Recipe, prepared: Prepared) -> dict[str, float]:
    """Share of positions that are padding: steps cut as they come (`random`), by length (`planned`), the difference
    (`avoided`); and the positions that the recipe's own cut computes for each token (`packed`)."""
    shares = waste(plan_of(recipe, prepared), prepared.train.sizes, cut_of(recipe, prepared.train))
    return {**shares, "avoided": shares["random"] - shares["planned"]}


def readers_of(
    recipe: Recipe, assembly: Assembly, prepared: Prepared, costs: Costs | None
) -> tuple[BatchReader, BatchReader | None]:
    """What reads micro-batches of the training set, and of the validation set if there is one."""
    images, pad_id = (
        ImageReader(shape_of(assembly.spec, assembly.image_processor)),
        int(assembly.tokenizer.pad_token_id),
    )
    cut = cut_of(recipe, prepared.train, costs)
    held_out = prepared.validation
    return (
        BatchReader(prepared.train, prepared.train_features or images, pad_id, cut),
        BatchReader(held_out, prepared.validation_features or images, pad_id, cut) if held_out is not None else None,
    )


def course_of(
    recipe: Recipe, assembly: Assembly, prepared: Prepared, costs: Costs | None, ranks: Ranks, first_step: int
) -> Course:
    """The plan of a run with its batches from `first_step` on, for this rank."""
    plan = plan_of(recipe, prepared)
    reader, held_out = readers_of(recipe, assembly, prepared, costs)
    dataset = StepDataset(reader, plan, ranks.rank, ranks.world_size)
    steps = load_steps(dataset, first_step, recipe.data.num_workers, shield_worker)
    if held_out is None:
        return Course(plan, steps, None)
    mine = _shares(prepared.validation_rows.tolist(), recipe.optimization.micro_batch_size, ranks)
    return Course(plan, steps, lambda: map(held_out, mine))


def _shares(rows: list[int], size: int, ranks: Ranks) -> list[MicroBatch]:
    """This rank's held-out micro-batches, as many as every other rank's: the last may be a row of no weight."""
    share = rows[ranks.rank :: ranks.world_size]
    batches = [share[start : start + size] for start in range(0, len(share), size)]
    filling = math.ceil(math.ceil(len(rows) / ranks.world_size) / size) - len(batches)
    real = [MicroBatch(tuple(batch), (1.0,) * len(batch)) for batch in batches]
    return real + [MicroBatch((rows[0],), (0.0,))] * filling
