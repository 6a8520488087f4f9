"""Model folders: what inference needs, strict in both directions.

A folder of ours holds `llava_train.json` (the manifest), `config.json`, the tokenizer, the image processor, the
chat template and `weights.safetensors`: the weights that differ from the parts' sources, nothing twice. A stock
`LlavaForConditionalGeneration` folder loads too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llava_train.errors import CheckpointError, LlavaTrainError
from llava_train.files import ensure_space, read_json, sha256_file, write_json
from llava_train.model.assemble import Assembly
from llava_train.model.joining import require_weights
from llava_train.model.llm import set_rows
from llava_train.model.originals.loading import is_original, load_original
from llava_train.model.rebuild import TEMPLATE, rebuild
from llava_train.model.screening import (
    count_tensors,
    own_file,
    read_config,
    screen_configs,
    screen_layers,
)
from llava_train.model.spec import MANIFEST, ModelSpec, read_spec
from llava_train.model.stock import from_hub, load_stock
from llava_train.model.towers.loading import key_report
from llava_train.model.tuning import merge_lora, part_of
from llava_train.tensorfile import Entry, write_tensors

WEIGHTS = "weights.safetensors"
_NEW_ROWS = ("new_rows.embedding", "new_rows.head")


@dataclass(frozen=True)
class Own:
    """A tensor that a model folder holds: which weight it is, from which row on, and how it lies there."""

    weight: str
    first_row: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def own_layout(assembly: Assembly, dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, Own]:
    """What the parts' sources do not have: trained parts, the connector, adapters, new rows of the vocabulary.

    Asked before an engine spreads the weights, whose shapes are then no longer theirs. `dtypes` are the precisions
    that frozen weights will have; what trains is written in float32.
    """
    spec, model = assembly.spec, assembly.model
    included = {"vision": spec.vision.included, "connector": True, "llm": spec.llm.included}
    tied = model.config.tie_word_embeddings
    trains = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}

    def own(name: str, tensor: torch.Tensor, first_row: int = 0) -> Own:
        dtype = torch.float32 if dtypes and name in trains else (dtypes or {}).get(name, tensor.dtype)
        rows = (tensor.shape[0] - first_row, *tensor.shape[1:]) if first_row else tensor.shape
        return Own(name, first_row, tuple(rows), dtype)

    layout = {
        name: own(name, tensor)
        for name, tensor in model.state_dict().items()
        if (included[part_of(name)] or ".lora_" in name) and not (tied and name == "lm_head.weight")
    }
    if not spec.llm.included:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        weights = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        for key, weight in zip(_NEW_ROWS, weights):
            if weight.shape[0] > assembly.old_vocabulary:
                layout[key] = own(names[id(weight)], weight, assembly.old_vocabulary)
    return layout


def model_entries(
    assembly: Assembly,
    layout: Mapping[str, Own],
    whole: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
) -> list[Entry]:
    """The tensors of a model folder, each to be had when it is written. `whole` gathers what ranks share."""
    model = assembly.model
    named = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}

    def get(own: Own) -> torch.Tensor:
        tensor = whole(named[own.weight])
        return (tensor[own.first_row :] if own.first_row else tensor).to(own.dtype)

    return [Entry(key, own.dtype, own.shape, partial(get, own)) for key, own in layout.items()]


def save_model(assembly: Assembly, folder: Path, entries: list[Entry] | None = None) -> None:
    """Write a model folder of ours into `folder` (which exists). Raises StorageError if it does not fit.

    `entries` come from `model_entries`; without them the model must be whole in this process.
    """
    entries = model_entries(assembly, own_layout(assembly)) if entries is None else entries
    ensure_space(folder, sum(entry.nbytes for entry in entries) + 20_000_000, "the model")
    digest = write_tensors(folder / WEIGHTS, entries)
    assembly.model.config.save_pretrained(folder)
    assembly.model.generation_config.save_pretrained(folder)
    assembly.tokenizer.save_pretrained(folder)
    assembly.image_processor.save_pretrained(folder)
    (folder / TEMPLATE).write_text(assembly.template, encoding="utf-8")
    others = [path for path in sorted(folder.iterdir()) if path.name not in (MANIFEST, WEIGHTS)]
    files = {WEIGHTS: digest, **{path.name: sha256_file(path) for path in others}}
    write_json(folder / MANIFEST, {**assembly.spec.to_dict(), "files": files})


def model_folder(path: str | Path) -> Path:
    """The folder that holds the model: a run's `final/`, the folder itself, or what the hub has by that name.

    Raises CheckpointError.
    """
    folder = Path(path)
    if not folder.is_dir():
        return from_hub(
            str(path), "a model is a run folder, an export, a folder of a model that we know, or its hub id"
        )
    if (folder / "final" / MANIFEST).is_file():
        return folder / "final"
    if (folder / MANIFEST).is_file() or (folder / "config.json").is_file():
        return folder
    if (folder / "recipe.yaml").is_file():
        raise CheckpointError(f"{path}: this run has no final/ yet; let it finish (llava-train train resumes it)")
    if any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{path}: holds GGUF files, which are for llama.cpp and Ollama; name what they were made of"
        )
    raise CheckpointError(f"{path}: is no model: it has neither {MANIFEST} nor config.json")


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    llm: str | None = None,
    vision: str | None = None,
) -> Assembly:
    """Load a run folder, a model folder of ours, or one in transformers' or the original's layout. Every key must fit.

    Args:
        path: the folder, or the id of a model on the hub.
        dtype: precision of all weights.
        attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
        llm, vision: where an original's folder that lacks these parts has them from.

    Raises:
        CheckpointError: no model, missing or unexpected keys (listed), damaged or changed files.
    """
    folder = model_folder(path)
    if not (folder / MANIFEST).is_file():
        if is_original(folder):
            return load_original(folder, dtype, attn_implementation, llm, vision)
        return load_stock(folder, dtype, attn_implementation)
    screen_configs(folder)
    spec = read_spec(folder)
    _verify_files(folder, spec)
    tensors = _read_weights(folder / WEIGHTS)
    try:
        assembly = rebuild(folder, spec, attn_implementation)
        _fill(assembly, tensors, folder)
    except LlavaTrainError:
        raise
    except Exception as error:  # what is wrong with a folder comes as many types
        raise CheckpointError(f"{folder}: the model cannot be rebuilt: {type(error).__name__}: {error}") from error
    assembly.model.to(dtype).eval()
    return assembly


def merged(assembly: Assembly) -> Assembly:
    """The same model with its adapters folded in; the parts that had some are then its own."""
    if assembly.spec.lora is None:
        return assembly
    adapted = {part_of(name) for name in assembly.spec.lora.targets}
    merge_lora(assembly.model)
    spec = assembly.spec
    spec = replace(
        spec,
        lora=None,
        vision=replace(spec.vision, included=spec.vision.included or "vision" in adapted),
        llm=replace(spec.llm, included=spec.llm.included or "llm" in adapted),
    )
    return replace(assembly, spec=spec)


def weights_digest(path: str | Path) -> str | None:
    """sha256 of the weights in a model folder of ours, as its manifest says; None for a stock Llava folder."""
    manifest = model_folder(path) / MANIFEST
    return str(read_json(manifest)["files"][WEIGHTS]) if manifest.is_file() else None


def _verify_files(folder: Path, spec: ModelSpec) -> None:
    files = read_config(folder, MANIFEST).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST}: files: must name the sha256 of each file: damaged")
    for name, digest in files.items():
        try:
            path = own_file(folder, name)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / MANIFEST}: a file that it lists: {error}") from error
        if sha256_file(path) != digest:
            raise CheckpointError(f"{path}: does not match its sha256 in {MANIFEST}: changed or damaged")
    config, tensors = read_config(folder, "config.json"), count_tensors(folder, WEIGHTS)
    for part, key in ((spec.llm, "text_config"), (spec.vision, "vision_config")):
        if part.included:
            screen_layers(config.get(key), tensors, folder / "config.json")


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def _fill(assembly: Assembly, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Put the stored tensors into the model; every tensor must find its place and every place its tensor."""
    expected = own_layout(assembly)
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    mismatched = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    if missing or unexpected or mismatched:
        report = key_report(missing, {"unexpected_keys": unexpected, "mismatched_keys": mismatched})
        raise CheckpointError(f"{folder / WEIGHTS}: the weights do not fit the model: {report}")
    rows = [tensors.pop(key) for key in _NEW_ROWS if key in tensors]
    if rows:
        set_rows(assembly.model, assembly.old_vocabulary, rows[0], rows[1])
    assembly.model.load_state_dict(tensors, strict=False, assign=True)
    if assembly.model.config.tie_word_embeddings:
        assembly.model.lm_head.weight = assembly.model.get_input_embeddings().weight
    require_weights(assembly.model)
