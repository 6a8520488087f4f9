#!/usr/bin/env python3
"""Compare our model and loss with what the original LLaVA code computed on a tiny model.

    python scripts/compare_reference.py DIR

DIR holds `llm/`, `vision/`, `mm_projector.safetensors`, `images/`, `records.json` and `expected.json` (losses and
gradient norms, for each template), `expected_<template>_projector_grads.safetensors`. Its ids and labels are fed
as they stand, images are read with `image_aspect_ratio pad`, everything in fp32. Prints the differences as JSON
and exits 1 above the tolerance (losses 1e-6 relative, gradients 1e-5 of their norm), 2 if DIR is not such a folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from llava_train.data.batch import Batch, batch_of
from llava_train.data.collate import pack, pad
from llava_train.data.encode import IGNORE
from llava_train.data.pictures.images import open_image
from llava_train.data.pictures.processors import build_image_processor, pixel_values
from llava_train.data.pictures.shapes import Picture
from llava_train.errors import LlavaTrainError
from llava_train.files import read_json
from llava_train.model.assemble import model_config, see, widths
from llava_train.model.attention import use_packed_attention
from llava_train.model.connectors import build_connector
from llava_train.model.joining import join
from llava_train.model.llm import load_llm
from llava_train.model.towers.loading import load_vision_tower
from llava_train.recipe import ModelSettings
from llava_train.training.objective import Objective

ORIGINAL_IMAGE = -200
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5


class Tokenised(NamedTuple):
    """One record of the reference, as `collate` takes it."""

    id: str
    input_ids: np.ndarray
    labels: np.ndarray


def build(folder: Path, expected: dict[str, Any]) -> Objective:
    """The reference's parts in the stock class, with our objective.

    The vocabulary must stay as it is, or new rows would join the softmax: an id that no record uses stands
    for the image.
    """
    settings = ModelSettings(vision=str(folder / "vision"), llm=str(folder / "llm"))
    tower, llm = load_vision_tower(settings.vision).float(), load_llm(settings.llm, "sdpa").float()
    used = {token for part in expected.values() for record in part["records"] for token in record["input_ids"]}
    image_id = max(set(range(llm.config.vocab_size)) - used)
    config = model_config(settings, see(settings), llm.config, (image_id, 0))
    connector = build_connector("mlp2x_gelu", widths(config), config, {})
    names = {"0": "linear_1", "2": "linear_2"}
    weights = {_renamed(key, names): value for key, value in load_file(folder / "mm_projector.safetensors").items()}
    connector.load_state_dict(weights, strict=True)
    return Objective(join("llava", config, tower, llm, connector, None))


def _renamed(key: str, names: dict[str, str]) -> str:
    layer, kind = key.split(".")[-2:]
    return f"{names[layer]}.{kind}"


def rows(folder: Path, records: list[dict[str, Any]], objective: Objective) -> tuple[list[Tokenised], list[Any]]:
    """Prepared rows (each -200 expanded to the image's tokens) and each record's pixels or None."""
    config = objective.model.config
    processor = build_image_processor(str(folder / "vision"), "pad", config.vision_config.image_size)
    images = {record["id"]: record.get("image") for record in read_json(folder / "records.json")}
    made, pixels = [], []
    for record in records:
        ids: list[int] = []
        labels: list[int] = []
        for token, label in zip(record["input_ids"], record["labels"]):
            repeat = config.image_seq_length if token == ORIGINAL_IMAGE else 1
            ids += [config.image_token_id if token == ORIGINAL_IMAGE else token] * repeat
            labels += [IGNORE if token == ORIGINAL_IMAGE else label] * repeat
        made.append(Tokenised(record["id"], np.array(ids), np.array(labels)))
        name = images[record["id"]]
        pixels.append(pixel_values([open_image(folder / "images", name)], processor)[0] if name else None)
    return made, pixels


def one_batch(made: list[Tokenised], pixels: list[Any], packed: bool) -> Batch:
    """One batch, padded or packed, in which every supervised token counts alike."""
    weights = [1.0 / sum(int((row.labels[1:] != IGNORE).sum()) for row in made)] * len(made)
    collated = pack([(0, [row]) for row in made], weights) if packed else pad(made, weights, pad_id=0)
    pictures = [Picture(each[None]) for each in pixels if each is not None]
    return batch_of(collated, pictures, [row.id for row in made], {})


def compare(folder: Path) -> dict[str, Any]:
    """Differences for each template of `expected.json`, with padded batches and with packed ones."""
    expected = read_json(folder / "expected.json")
    objective = build(folder, expected)
    padded = {name: _compare_template(folder, name, part, objective, False) for name, part in expected.items()}
    use_packed_attention(objective.model.model.language_model)
    return padded | {
        f"{name}_packed": _compare_template(folder, name, part, objective, True) for name, part in expected.items()
    }


def _compare_template(
    folder: Path, name: str, part: dict[str, Any], objective: Objective, packed: bool
) -> dict[str, Any]:
    made, pixels = rows(folder, part["records"], objective)
    pixel_differences, loss_differences = [0.0], []
    for row, pixel, record in zip(made, pixels, part["records"]):
        with torch.no_grad():
            loss = float(objective(one_batch([row], [pixel], packed)))
        loss_differences.append(abs(loss - record["loss"]) / record["loss"])
        if pixel is not None:
            pixel_differences.append(abs(float(pixel.mean()) - record["pixel_mean"]))
    objective.zero_grad()
    loss = objective(one_batch(made, pixels, packed))
    loss.backward()
    gradients = load_file(folder / f"expected_{name}_projector_grads.safetensors")
    names = {"0": "linear_1", "2": "linear_2"}
    ours = dict(objective.model.model.multi_modal_projector.named_parameters())
    squared = sum(float((ours[_renamed(k, names)].grad - g).double().pow(2).sum()) for k, g in gradients.items())
    norm = part["grad_norm"]
    llm = [p.grad for m in (objective.model.model.language_model, objective.model.lm_head) for p in m.parameters()]
    llm_norm = float(torch.stack([g.double().pow(2).sum() for g in llm]).sum().sqrt())
    return {
        "records": len(made),
        "record_loss": max(loss_differences),
        "batch_loss": abs(loss.item() - part["batch_loss"]) / part["batch_loss"],
        "projector_gradient": squared**0.5 / norm["mm_projector"],
        "llm_gradient_norm": abs(llm_norm - norm["language_model"]) / norm["language_model"],
        "pixel_mean": max(pixel_differences),
    }


def within(differences: dict[str, Any]) -> bool:
    """Whether every difference is inside its tolerance."""
    return all(
        max(part["record_loss"], part["batch_loss"]) <= LOSS_TOLERANCE
        and max(part["projector_gradient"], part["llm_gradient_norm"]) <= GRADIENT_TOLERANCE
        for part in differences.values()
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the reference")
    options = parser.parse_args(arguments)
    try:
        differences = compare(options.folder)
    except (OSError, KeyError, LlavaTrainError) as error:
        print(f"compare_reference: {options.folder}: {error}", file=sys.stderr)
        return 2
    equal = within(differences)
    print(json.dumps({"within_tolerance": equal, **differences}, indent=2))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
