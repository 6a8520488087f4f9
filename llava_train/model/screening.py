"""What a folder must not hold, whoever made it: it is screened before a library reads it (docs/security.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llava_train.errors import CheckpointError, RecordError
from llava_train.files import inside, regular_file

_CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
_TEXTS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja")
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_CONFIG_BYTES = 4_000_000
_MOST_HEADER_BYTES = 16_000_000  # room for more than 100,000 tensors in one file; the format allows 100 MB


def screen_configs(path: str | Path, may_run_code: bool | None = None) -> None:
    """Look at the configurations in a folder before a library does. A hub id, which is no folder, is passed over.

    Args:
        path: the folder.
        may_run_code: `model.trust_remote_code` for a language model, which alone has that choice.

    Raises:
        CheckpointError: a key that brings code or leads to other weights, what is no JSON, a file that is none
            (a pipe, a device), or a link that leaves the folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if _there(folder, "adapter_config.json"):
        raise CheckpointError(f"{folder / 'adapter_config.json'}: these are LoRA adapters; merge them into their model")
    for name in filter(lambda name: _there(folder, name), _TEXTS):
        own_file(folder, name)
    for name in filter(lambda name: _there(folder, name), _CONFIGS):
        for key, value in _entries(read_config(folder, name)):
            if key == "auto_map" and not may_run_code:
                raise CheckpointError(
                    f"{folder / name}: auto_map names code to run ({shown(value)}); {_way(may_run_code)}"
                )
            if key == "transformers_weights" or (key.endswith("attn_implementation") and "/" in str(value)):
                raise CheckpointError(f"{folder / name}: {key}: {shown(value)} leads elsewhere; remove the key")


def _way(may_run_code: bool | None) -> str:
    remove = "remove the key to load the folder with a class of transformers"
    if may_run_code is None:
        return f"{remove}: model.trust_remote_code is for the folder of the language model only"
    return f"{remove}, or set model.trust_remote_code: true if you have read that code and trust it"


def screen_weights(path: str | Path) -> None:
    """Look at the weights of a folder before a library does: safetensors alone, whole, and in the folder.

    Raises CheckpointError as `screen_configs` does, and for weights that are pickles, a damaged header, an index
    that names what is no file of the folder, and more layers than tensors.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    names = ["model.safetensors"] if _there(folder, "model.safetensors") else _shards(folder)
    tensors = sum(count_tensors(folder, name) for name in names)
    if names and _there(folder, "config.json"):
        screen_layers(read_config(folder, "config.json"), tensors, folder / "config.json")


def screen_layers(config: Any, tensors: int, place: Path) -> None:
    """CheckpointError for a configuration of more layers than there are tensors of weights for them."""
    for key, value in _entries(config):
        if key in ("num_hidden_layers", "n_layer", "n_layers") and isinstance(value, int) and value > tensors:
            raise CheckpointError(f"{place}: {key}: {value} layers, but the weights are {tensors} tensors")


def _shards(folder: Path) -> list[str]:
    if _there(folder, _INDEX):
        names = read_config(folder, _INDEX, 16 * _MOST_CONFIG_BYTES).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{folder / _INDEX}: weight_map does not name a file for each tensor")
        return sorted(set(names.values()))
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder}: its weights are pickles ({shown(pickles)}), which can run code when they are read; convert "
            "them to safetensors once (transformers: from_pretrained, then save_pretrained; see docs/security.md)"
        )
    return []


def count_tensors(folder: Path, name: str) -> int:
    """Number of tensors in a safetensors file of a folder, whose header is checked. Raises CheckpointError."""
    file = own_file(folder, name)
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: is no safetensors file, and no other weights are read")
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if header > _MOST_HEADER_BYTES:
        raise CheckpointError(f"{file}: no safetensors file: its header would have {header:,} bytes")
    try:
        with safe_open(str(file), framework="pt") as weights:
            return len(weights.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error


def read_config(folder: Path, name: str, most: int = _MOST_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file of a folder, of `most` bytes. Raises CheckpointError."""
    file = own_file(folder, name)
    if file.stat().st_size > most:
        raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes; a file of its kind has at most {most:,}")
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"), parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds a {type(values).__name__}, not an object of keys")
    return values


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is no number")
    return float(text)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values at every depth."""
    if isinstance(value, dict):
        yield from value.items()
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(each)


def _there(folder: Path, name: str) -> bool:
    return (folder / name).is_symlink() or (folder / name).exists()


def own_file(folder: Path, name: str) -> Path:
    """A regular file of the folder itself, or of the hub's cache, where a folder is links to `blobs`."""
    root, relative = folder.resolve(), name
    if root.parent.name == "snapshots":
        root, relative = root.parents[1], f"snapshots/{root.name}/{name}"
    try:
        regular_file(inside(root, relative), name, "file")
    except RecordError as error:
        fault = str(error).removeprefix(f"{name}: ")
        if error.cause == "file_missing":
            fault = "is missing"
        elif "leads outside" in fault or "must be a path" in fault:
            fault = "leads out of the folder; put the file itself there"
        raise CheckpointError(f"{folder / name}: {fault}") from error
    return folder / name


def shown(value: Any) -> str:
    """A value as messages show it."""
    return str(value)[:200]
