"""Tensors of a folder in the original LLaVA layout: listed with their shapes first, then put into a model.

Files are mapped into memory and copied tensor by tensor, so the most that is held at once is about the model.
Pickles (`.bin`) are read by torch's restricted unpickler, which builds tensors and runs nothing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from llava_train.errors import CheckpointError
from llava_train.model.screening import count_tensors, own_file, read_config
from llava_train.model.towers.loading import key_report

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Buffers that old versions of transformers saved, and that are computed today."""
_MOST_INDEX_BYTES = 64_000_000
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Stored:
    """The tensors in files of a folder, without what is computed: the file and the shape of each."""

    folder: Path
    files: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of one of the files, mapped from the disk."""
        return {key: value for key, value in _read(self.folder, name).items() if self.files.get(key) == name}


def weight_files(folder: Path) -> list[str]:
    """Names of the files with a whole model's weights, safetensors before pickles; empty if there are none."""
    for name in _WHOLE:
        if (folder / name).exists():
            return [name]
        index = f"{name}.index.json"
        if (folder / index).exists():
            named = read_config(folder, index, _MOST_INDEX_BYTES).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
                raise CheckpointError(f"{folder / index}: weight_map does not name a file for each tensor")
            return sorted(set(named.values()))
    return []


def stored(folder: Path, names: Iterable[str]) -> Stored:
    """What lies in these files. Raises CheckpointError for a file that is damaged, hostile, or no file of tensors."""
    files: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        for key, tensor in _read(folder, name).items():
            if key.endswith(_COMPUTED):
                continue
            if key in files:
                raise CheckpointError(f"{folder}: {key} lies in both {files[key]} and {name}")
            files[key], shapes[key] = name, tuple(tensor.shape)
    return Stored(folder, files, shapes)


def _read(folder: Path, name: str) -> dict[str, torch.Tensor]:
    file = own_file(folder, name)
    if file.suffix == ".safetensors":
        count_tensors(folder, name)
        with safe_open(str(file), framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
    if file.suffix != ".bin":
        raise CheckpointError(f"{file}: weights of the original layout lie in .safetensors or .bin files")
    return _read_pickle(file)


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a `.bin` file, read with weights_only: anything else in it is refused."""
    zipped = zipfile.is_zipfile(file)
    try:
        if zipped:
            with zipfile.ZipFile(file) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise CheckpointError(f"{file}: is compressed, which torch.save never does")
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # what is wrong with a pickle comes as many types
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(
            f"{file}: is no file of tensors alone, and nothing else is read: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) and _plain(each) for key, each in values.items()):
        raise CheckpointError(f"{file}: holds more than named tensors")
    if sum(each.nbytes for each in values.values()) > 2 * file.stat().st_size:  # twice: tied weights have two names
        raise CheckpointError(f"{file}: its tensors would be larger than the file")
    return values


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def fill(module: nn.Module, source: Stored, place: Callable[[str], str], required: Callable[[str], bool]) -> None:
    """Copy stored tensors into a module (whose weights may be empty), in the module's precision.

    Args:
        module: what is filled.
        source: where the tensors lie.
        place: key of a stored tensor -> name in the module's state_dict.
        required: which names of the module must be found.

    Raises:
        CheckpointError: with the keys that are missing, unexpected or of another shape; nothing was copied then.
    """
    targets = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()}
    placed = {key: place(key) for key in source.files}
    unexpected = [key for key, name in placed.items() if name not in targets]
    mismatched = [
        f"{key} {source.shapes[key]} instead of {targets[name][0]}"
        for key, name in placed.items()
        if name in targets and source.shapes[key] != targets[name][0]
    ]
    missing = [name for name in targets.keys() - set(placed.values()) if required(name)]
    if missing or unexpected or mismatched:
        report = key_report(missing, {"unexpected_keys": unexpected, "mismatched_keys": mismatched})
        raise CheckpointError(f"{source.folder}: the weights do not fit its config.json: {report}")
    for file in sorted(set(source.files.values())):
        values = {placed[key]: tensor for key, tensor in source.tensors(file).items()}
        copies = {name: tensor.detach().to(targets[name][1], copy=True) for name, tensor in values.items()}
        module.load_state_dict(copies, strict=False, assign=True)


def merge_adapters(module: nn.Module, folder: Path, place: Callable[[str], str], targets: Iterable[str]) -> None:
    """Add PEFT's LoRA adapters of a folder to the weights of a module: W + alpha / r * B A, in float32.

    Args:
        module: has the weights.
        folder: holds adapter_config.json and adapter_model.safetensors or .bin.
        place: name of a weight in the original layout -> its name in the module.
        targets: names (in the module) of the linear layers that the adapters may sit on; those that
            `target_modules` names must all have theirs.

    Raises:
        CheckpointError: another kind of adapters, or adapters that do not fit.
    """
    options = read_config(folder, "adapter_config.json")
    alpha, rank = _scaling(options, folder / "adapter_config.json")
    name = "adapter_model.safetensors"
    source = stored(folder, [name if (folder / name).exists() else "adapter_model.bin"])
    tensors = {key: tensor for file in set(source.files.values()) for key, tensor in source.tensors(file).items()}
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    unexpected = []
    for key, tensor in tensors.items():
        layer, mark, half = key.removesuffix(".weight").removesuffix(".default").rpartition(".lora_")
        if mark and half in ("A", "B"):
            pairs.setdefault(place(f"{layer}.weight"), {})[half] = tensor
        else:
            unexpected.append(key)
    weights = dict(module.named_parameters())
    unexpected += [f"adapter of {layer}" for layer in pairs if layer not in weights]
    missing = [f"lora_{half} of {layer}" for layer, pair in pairs.items() for half in {"A", "B"} - pair.keys()]
    missing += [f"adapter of {layer}" for layer in _named(options, targets) if f"{layer}.weight" not in pairs]
    mismatched = [
        f"adapter of {layer}"
        for layer, pair in pairs.items()
        if layer in weights and len(pair) == 2 and not _fits(pair, weights[layer], rank)
    ]
    if missing or unexpected or mismatched or not pairs:
        report = key_report(missing, {"unexpected_keys": unexpected, "mismatched_keys": mismatched})
        raise CheckpointError(f"{folder}: the adapters do not fit the base model: {report or 'there are none'}")
    with torch.no_grad():
        for layer, pair in pairs.items():
            change = (pair["B"].float() @ pair["A"].float()) * (alpha / rank)
            weights[layer].copy_(weights[layer].float() + change)


def _scaling(options: dict[str, Any], place: Path) -> tuple[float, int]:
    """(alpha over its divisor times r, r) of plain LoRA, so that alpha / r scales; CheckpointError for other kinds."""
    kind, rank, alpha = options.get("peft_type"), options.get("r"), options.get("lora_alpha")
    if kind != "LORA" or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{place}: describes no LoRA adapters (peft_type, r, lora_alpha)")
    odd = [key for key in _UNSUPPORTED if options.get(key)]
    if options.get("bias", "none") != "none":
        odd.append("bias")
    if odd:
        raise CheckpointError(f"{place}: {', '.join(odd)}: only plain LoRA is merged; merge these adapters with peft")
    return (alpha * rank**0.5 if options.get("use_rslora") else alpha), rank


def _named(options: dict[str, Any], layers: Iterable[str]) -> list[str]:
    """Layers that `target_modules` names, where it is a list and stands for all layers of the model."""
    named = options.get("target_modules")
    if not isinstance(named, list) or options.get("layers_to_transform") is not None:
        return []
    return [layer for layer in layers if any(layer == each or layer.endswith(f".{each}") for each in named)]


def _fits(pair: dict[str, torch.Tensor], weight: torch.Tensor, rank: int) -> bool:
    return (
        weight.dim() == 2 and pair["A"].shape == (rank, weight.shape[1]) and pair["B"].shape == (weight.shape[0], rank)
    )
