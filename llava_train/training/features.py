"""The feature cache: every picture of a run goes once through the frozen tower, before the first step.

What the tower computes of a picture is the same in every step of every run, so it is kept in bf16 (see
`llava_train.data.features`) and the tower is not run again. All samples of a set are covered, `cap` left out, however
few steps a run has: the next run finds them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from llava_train.data.batch import ImageReader, load_steps
from llava_train.data.features import FEATURES, FeatureReader, FeatureStore, PictureBatches, Pictures, Writer
from llava_train.data.preparing.prepared import PreparedSet
from llava_train.files import sha256_json
from llava_train.inference import shape_of
from llava_train.model.assemble import Assembly
from llava_train.model.joining import fingerprint
from llava_train.model.towers.features import feature_shape, image_features
from llava_train.model.towers.loading import vision_shape
from llava_train.model.tuning import PRECISIONS
from llava_train.recipe import Recipe
from llava_train.training.engines.ranks import Ranks
from llava_train.training.material import Prepared
from llava_train.training.monitor import say
from llava_train.training.signals import shield_worker


def with_features(recipe: Recipe, prepared: Prepared, assembly: Assembly, ranks: Ranks) -> Prepared:
    """The same material, its pictures read as features; those that are not in the cache are made.

    Every rank calls it, before weights are placed: each runs the tower on its share. Raises RecordError for a picture
    that cannot be read any more, and StorageError.
    """
    train, held_out = prepared.train, prepared.validation
    trained = np.concatenate([part.rows for part in prepared.mixture.parts])
    rows = [trained, prepared.validation_rows] if held_out is train else [trained]
    made = replace(prepared, train_features=_reader(recipe, train, np.concatenate(rows), assembly, ranks))
    if held_out is None:
        return made
    if held_out is train:
        return replace(made, validation_features=made.train_features)
    return replace(made, validation_features=_reader(recipe, held_out, prepared.validation_rows, assembly, ranks))


def _reader(
    recipe: Recipe, prepared: PreparedSet, samples: np.ndarray, assembly: Assembly, ranks: Ranks
) -> FeatureReader:
    pictures = Pictures.of(prepared, samples)
    config = assembly.model.config
    taken = vision_shape(config.vision_config, assembly.spec.image_size)
    positions, width = taken.tokens(config.vision_feature_select_strategy), feature_shape(assembly.model)[1]
    shape = (len(pictures), positions, width)
    store = FeatureStore(
        Path(recipe.data.cache_dir).expanduser() / FEATURES, _inputs(recipe, prepared, samples, assembly), shape
    )
    # Rank 0 alone looks: what another machine sees of a folder may be older.
    seen = store.open() if ranks.is_main else np.zeros(shape[0], dtype=bool)
    missing = np.flatnonzero(ranks.total(seen.astype(float).tolist()))
    size = f"{len(pictures):,} pictures of {positions} x {width}, {len(pictures) * store.row_bytes / 1e9:.1f} GB"
    say(f"features: {size} in {store.path}; {len(missing):,} are to be made")
    if len(missing):
        # Neighbours stay together: they may lie in one row group of a table, or in one video.
        share = np.array_split(missing, ranks.world_size)[ranks.rank]
        reader = ImageReader(shape_of(assembly.spec, assembly.image_processor))
        reader.budget = 0  # each picture comes once
        dataset = PictureBatches(prepared, pictures, share, reader, recipe.optimization.micro_batch_size)
        _make(recipe, assembly, store, dataset, ranks)
    return FeatureReader(store, pictures)


def _inputs(recipe: Recipe, prepared: PreparedSet, samples: np.ndarray, assembly: Assembly) -> dict[str, Any]:
    """All that features depend on: the pictures by the set's contents and the samples that are used."""
    config, spec = assembly.model.config, assembly.spec
    known = None if spec.vision.included else spec.vision.fingerprint
    return {
        "tower": known or fingerprint(assembly.model.model.vision_tower),
        "vision_config": _lasting(config.vision_config),
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "image_processor": json.loads(assembly.image_processor.to_json_string()),
        "image_size": spec.image_size,
        "precision": recipe.optimization.precision,
        "set": prepared.contents,
        "samples": sha256_json(np.unique(samples).tolist()),
    }


def _lasting(config: Any) -> dict[str, Any]:
    """A tower's configuration without what changes with the place that it lies in."""
    values: dict[str, Any] = json.loads(config.to_json_string())
    return {name: value for name, value in values.items() if name not in ("_name_or_path", "transformers_version")}


def _make(recipe: Recipe, assembly: Assembly, store: FeatureStore, dataset: PictureBatches, ranks: Ranks) -> None:
    """Run the tower on this rank's share; come back when all ranks have."""
    model, precision = assembly.model, recipe.optimization.precision
    total, hidden = len(dataset.numbers), not ranks.is_main
    bar = tqdm(desc="features", total=total, unit="picture", dynamic_ncols=True, file=sys.stderr, disable=hidden)
    with (
        Writer(store, dataset.numbers, ranks.rank) as writer,
        _at_work(model.model.vision_tower, PRECISIONS[precision], ranks.device),
        nullcontext() if precision == "fp32" else torch.autocast(ranks.device.type, PRECISIONS[precision]),
        bar,
        closing(load_steps(dataset, 0, recipe.data.num_workers, shield_worker)) as batches,
    ):
        for pixels in batches:
            writer.write(image_features(model, pixels.to(ranks.device, non_blocking=True)))
            bar.update(len(pixels))
    ranks.barrier()
    if ranks.is_main:
        store.close()
    ranks.barrier()


@contextmanager
def _at_work(tower: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """The tower on the device in the precision of the run while the body runs; then as it was."""
    own = [(weight, weight.data) for weight in tower.parameters()]
    try:
        for weight, data in own:
            weight.data = data.to(device, dtype)
        tower.to(device)  # buffers keep their precision
        yield
    finally:
        for weight, data in own:
            weight.data = data
        tower.to("cpu")
