"""open_clip's models as encoders: `open_clip:ARCH/TAG`, or `open_clip:ARCH/path/to/weights.safetensors` (or .pt).

Each is converted once into an ordinary folder (config.json, model.safetensors, preprocessor_config.json) in the cache,
below $LLAVA_TRAIN_CACHE or ~/.cache/llava_train, and that folder is used from then on. The conversion is a process of
its own (`open_clip_convert`): open_clip imports torchvision, and what transformers' image processors compute depends on
whether that is there. A .pt file is read with weights_only.

open_clip may lie in a folder of its own, which $LLAVA_TRAIN_OPEN_CLIP names (pip install --target): so it comes beside
a torch that its newest torchvision was not built for.
"""

from __future__ import annotations

import copy
import fcntl
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llava_train.errors import CheckpointError, RecordError
from llava_train.files import ensure_space, regular_file, sha256_json

PREFIX = "open_clip:"
SIDECAR = "open_clip_config.json"
"""Beside weights: their own configuration of model and pictures, as open_clip publishes it."""
_FOLDER = "LLAVA_TRAIN_OPEN_CLIP"
_INSTALL = "install it: pip install 'llava-train[open-clip]'"
_FILES = (".safetensors", ".pt", ".pth", ".bin")
_VERSION = 1  # of what a conversion writes
_kept: list[Any] = []


def resolve(path: str) -> str:
    """The folder of a converted open_clip model, which is converted now unless it was before; any other path as it is.

    Raises CheckpointError: no such model, tag or file; open_clip is missing; its weights do not fit.
    """
    if not path.startswith(PREFIX):
        return path
    arch, _, source = path.removeprefix(PREFIX).partition("/")
    if not arch or not source:
        raise CheckpointError(f"{path}: write {PREFIX}ARCH/TAG, or {PREFIX}ARCH/path/to/weights.safetensors")
    target = _cache() / f"{arch}-{_identity(path, arch, source)}"
    if not (target / "config.json").is_file():
        ensure_space(target, 0, "converted encoders")
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{target.name}.lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several ranks one converts, the others wait for it
            if not (target / "config.json").is_file():
                _convert(path, arch, source, target)
    return str(target)


def _cache() -> Path:
    root = os.environ.get("LLAVA_TRAIN_CACHE") or "~/.cache/llava_train"
    return Path(root).expanduser() / "open_clip"


def _identity(path: str, arch: str, source: str) -> str:
    """A short hash of what is converted: a tag, or a file as it is now with the configuration beside it."""
    described: list[Any] = [_VERSION, arch, source]
    if is_file(source):
        file = Path(source).expanduser().absolute()
        try:
            regular_file(file, str(file), "file")
        except RecordError as error:
            raise CheckpointError(f"{path}: {error}") from error
        beside = file.with_name(SIDECAR)
        text = beside.read_text(encoding="utf-8") if beside.is_file() else ""
        state = file.stat()
        described += [str(file), state.st_size, state.st_mtime_ns, text]
    return sha256_json(described)[:16]


def is_file(source: str) -> bool:
    """Whether what stands behind the architecture is a file and no tag."""
    return source.endswith(_FILES) or "/" in source


def _convert(path: str, arch: str, source: str, target: Path) -> None:
    folder = os.environ.get(_FOLDER)
    if not (Path(folder) / "open_clip").is_dir() if folder else importlib.util.find_spec("open_clip") is None:
        raise CheckpointError(f"{path}: open_clip is not installed{f' in {folder}' if folder else ''}; {_INSTALL}")
    command = [sys.executable, "-m", "llava_train.model.towers.open_clip_convert", arch, source, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise CheckpointError(f"{path}: {lines[-1].removeprefix('error: ')}")


def import_open_clip() -> Any:
    """The package, wherever it lies. Raises CheckpointError with the line that installs it."""
    folder = os.environ.get(_FOLDER)
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        _import_torchvision()
        import open_clip
    except ImportError as error:
        raise CheckpointError(f"open_clip cannot be imported ({error}); {_INSTALL}") from error
    return open_clip


def _import_torchvision() -> None:
    """torchvision, also one that was built for another torch: what open_clip uses of it are transforms alone."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(operators)
        import torchvision  # noqa: F401


def build_visual(vision_cfg: dict[str, Any], embed_dim: int, quick_gelu: bool) -> torch.nn.Module:
    """open_clip's vision tower with weights of no meaning: its text tower, which may need a download, is not made."""
    import_open_clip()
    from open_clip.model import _build_vision_tower

    cfg = copy.deepcopy(vision_cfg)
    if "timm_model_name" in cfg:
        cfg["timm_model_pretrained"] = False
    return _build_vision_tower(embed_dim, cfg, quick_gelu)
