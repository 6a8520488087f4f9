"""Weight names against the loading code of a back end that has no CPU engine: its LLaVA file out of its wheel, run.

The file is imported as it is. What it imports of its own package are stand-ins: layers of PyTorch for its parallel
layers, a recorder for its language model (whose weights must have the names that a checkpoint of that decoder has), and
empty classes for all that is not needed to load.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import NotRunError, pip, step
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

WHEELS = "LLAVA_TRAIN_WHEELS"
Names = Mapping[str, Any]


def find_wheel(package: str, version: str, kept: Path) -> Path:
    """The wheel, from the folder that `LLAVA_TRAIN_WHEELS` names, from `kept`, or downloaded into it."""
    for folder in filter(None, (os.environ.get(WHEELS), kept)):
        for wheel in sorted(Path(folder).glob(f"{package}-{version}-*.whl")):
            return wheel
    kept.mkdir(parents=True, exist_ok=True)
    with step(f"download {package} {version}"), tempfile.TemporaryDirectory(dir=kept) as scratch:
        pip(Path(sys.executable), "download", "--no-deps", "-d", scratch, f"{package}=={version}")
        (wheel,) = Path(scratch).glob("*.whl")
        return wheel.rename(kept / wheel.name)


def read(wheel: Path, name: str) -> str:
    """A source file of a wheel. NotRunError if another version moved it."""
    with zipfile.ZipFile(wheel) as archive:
        if name not in archive.namelist():
            raise NotRunError(f"{wheel.name} has no {name}")
        return archive.read(name).decode()


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of a package that hold the given names, and an empty class under every other."""

    def __init__(self, package: str, given: Names) -> None:
        self.package, self.given = package, given

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module, given = ModuleType(spec.name), self.given

        def lookup(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return given.get(name) or type(name, (), {})

        module.__getattr__ = lookup  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def _take_out(package: str) -> dict[str, ModuleType]:
    """Forget what is imported of a package; our script may bear its name."""
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


def load_module(wheel: Path, file: str, given: Names) -> ModuleType:
    """A module of a wheel, beside stand-ins."""
    name = file.removesuffix(".py").replace("/", ".")
    source = read(wheel, file)
    package = name.partition(".")[0]
    finder = _StandIns(package, given)
    before = _take_out(package)
    sys.meta_path.insert(0, finder)
    try:
        spec = importlib.machinery.ModuleSpec(name, finder, origin=f"{wheel.name}/{file}")
        module = importlib.util.module_from_spec(spec)
        del module.__getattr__
        sys.modules[name] = module
        exec(compile(source, f"{wheel.name}/{file}", "exec"), module.__dict__)
    finally:
        sys.meta_path.remove(finder)
        _take_out(package)
        sys.modules.update(before)
    return module


class Record:
    """Which parameter got which weight, and what found no place."""

    def __init__(self) -> None:
        self.filled: dict[int, set[Any]] = {}
        self.unplaced: list[str] = []
        self.count = 0

    def put(self, parameter: nn.Parameter, weight: torch.Tensor, shard_id: Any = None) -> None:
        """In place of a back end's own loader: takes note, and looks at the shape where nothing is joined."""
        if shard_id is None and parameter.shape != weight.shape:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} for one of {tuple(parameter.shape)}")
        self.count += 1
        self.filled.setdefault(id(parameter), set()).add(shard_id)

    def unfilled(self, model: nn.Module) -> list[str]:
        """Parameters that got nothing, or not all of their parts."""
        parts = {name: {"q", "k", "v"} if ".qkv_proj." in name else {None} for name, _ in model.named_parameters()}
        return [name for name, each in model.named_parameters() if self.filled.get(id(each), set()) != parts[name]]


class Decoder(nn.Module):
    """Stands for a language model: knows the names and shapes of a checkpoint of that decoder, and loads by them."""

    def __init__(self, config: Any, record: Record) -> None:
        super().__init__()
        with torch.device("meta"):
            decoder = AutoModelForCausalLM.from_config(config)
        self.model, self.record = decoder.model, record
        if not config.tie_word_embeddings:
            self.lm_head = decoder.lm_head

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take them by name."""
        own = dict(self.named_parameters())
        for name, weight in weights:
            if name in own:
                self.record.put(own[name], weight)
            else:
                self.record.unplaced.append(f"language_model: {name}")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of an export."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def place(model: Any, tensors: Mapping[str, torch.Tensor], record: Record) -> dict[str, Any]:
    """Run a model's own `load_weights`; says how many weights found their place, and what did not."""
    try:
        model.load_weights(tensors.items())
    except KeyError as error:  # there it stops
        record.unplaced.append(str(error.args[0]))
    return {"placed": record.count, "of": len(tensors), "unplaced": record.unplaced}
