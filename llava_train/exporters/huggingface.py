"""Target `hf`: a folder that stock transformers, and what builds on it, loads as the class that the model is of.

Key names of LLaVA's classes are those of the long-lived dialect (`language_model.*`, `vision_tower.vision_model.*`,
`multi_modal_projector.*`): transformers reads it in every version, vLLM and LMDeploy read nothing else of a
CLIP tower. What `save_pretrained` of transformers 5.23 writes for a model built in memory is a mixture that
several back ends refuse.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_train.exporters.quantize import EXTRA, packed
from llava_train.exporters.quantize import TOLERANCE as ROUNDED
from llava_train.exporters.reading import write_reading
from llava_train.exporters.target import Request, Target
from llava_train.exporters.verify import TOLERANCE, Reference, verify
from llava_train.files import write_json
from llava_train.inference import stop_ids
from llava_train.model.assemble import Assembly
from llava_train.model.connectors import Linear
from llava_train.model.families.llava import Llava
from llava_train.model.families.table import family_of
from llava_train.model.llm import Head
from llava_train.model.towers.stack import TowersConfig

_NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose weights stand below `vision_model.` in the long-lived dialect."""


class HuggingFace(Target):
    """The class of transformers that a model is of, with everything old and new readers want."""

    summary = "transformers' own class (Llava, LlavaNext, LlavaOnevision, Qwen2-VL, Mllama); what most back ends read"
    quantizes = ("int8", "int4")

    def missing(self, request: Request) -> str | None:
        """What packs quantised weights."""
        if request.quantize is None or find_spec("compressed_tensors") is not None:
            return None
        return f"quantised weights need compressed-tensors, which is not installed: {EXTRA}"

    def refusal(self, assembly: Assembly) -> str | None:
        """Another class than transformers', or a part that its class has no place for."""
        return stock_refusal(assembly) or connector_refusal(assembly)

    def write(self, assembly: Assembly, folder: Path, request: Request) -> None:
        """Weights, configurations, processor and chat template."""
        model = assembly.model
        if not _is_whole(assembly):
            model.model.multi_modal_projector = stock_projector(assembly)
        model.generation_config.eos_token_id = stop_ids(assembly)
        with packed(model, request.quantize):
            model.save_pretrained(folder)
        if isinstance(family_of(model), Llava):
            rename_keys(folder, model.config.vision_config.model_type)
            _complete_config(folder)
        write_reading(assembly, folder)

    def prove(self, reference: Reference, folder: Path, request: Request) -> dict[str, Any]:
        """Stock transformers loads and asks it. A quantised one is compared with the model that was rounded alike."""
        if request.quantize is None:
            return verify(reference, folder, TOLERANCE[request.dtype])
        notes = ["transformers needs the package compressed-tensors to read it, and unpacks the weights in memory"]
        return {**verify(reference, folder, ROUNDED), "notes": notes}


def _is_whole(assembly: Assembly) -> bool:
    """Whether a model came as one of another family than LLaVA's own, so that all its parts have their places."""
    return assembly.spec.architecture != "llava" and assembly.spec.llm.kind == "llava"


def stock_refusal(assembly: Assembly) -> str | None:
    """Why transformers has no class for a model's encoder, head or fusion; None if it has."""
    model, architecture = assembly.model, assembly.spec.architecture
    if _is_whole(assembly):
        return None
    if not type(model).__module__.startswith("transformers."):
        return f"transformers has no class for a {architecture} model"
    text, kind = model.config.text_config.model_type, type(model).__name__
    if isinstance(model.config.vision_config, TowersConfig):
        return f"{kind} has one encoder, without registers and of a class of transformers"
    if getattr(model.lm_head, "bias", None) is not None:
        return f"a {text} head has a bias, for which {kind} has no place"
    if isinstance(model.lm_head, Head):
        return f"a {text} model caps or scales what its head gives, which {kind} leaves out"
    return None


def connector_refusal(assembly: Assembly) -> str | None:
    """Why the two layers of transformers' LLaVA classes cannot be a model's connector; None if they can."""
    if _is_whole(assembly):
        return None
    connector = assembly.model.model.multi_modal_projector
    if isinstance(connector, LlavaMultiModalProjector | Linear):
        return None
    return f"connector {assembly.spec.connector!r} has no place in its class, which has two layers or one"


def stock_projector(assembly: Assembly) -> LlavaMultiModalProjector:
    """The connector as the stock two-layer module; a linear one gets an identity as its second layer."""
    connector = assembly.model.model.multi_modal_projector
    if isinstance(connector, LlavaMultiModalProjector):
        return connector
    projector = LlavaMultiModalProjector(assembly.model.config).to(connector.linear.weight)
    projector.linear_1.load_state_dict(connector.linear.state_dict())
    with torch.no_grad():
        projector.linear_2.weight.copy_(torch.eye(len(projector.linear_2.weight)))
        projector.linear_2.bias.zero_()
    return projector


def long_lived_key(key: str, tower: str) -> str:
    """The dialect's name of a weight that `save_pretrained` wrote.

    >>> long_lived_key("vision_tower.encoder.layers.0.mlp.fc1.weight", "clip_vision_model")
    'vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight'
    """
    prefix, nested = "vision_tower.", "vision_tower.vision_model."
    if tower in _NESTED_TOWERS and key.startswith(prefix) and not key.startswith(nested):
        return nested + key.removeprefix(prefix)
    return key


def rename_keys(folder: Path, tower: str) -> None:
    """Rename the weights in the shards (and their index) of a saved folder, a shard at a time."""
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = {long_lived_key(key, tower): tensor for key, tensor in load_file(str(shard)).items()}
        save_file(tensors, str(shard), metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text(encoding="utf-8"))
        values["weight_map"] = {long_lived_key(key, tower): file for key, file in values["weight_map"].items()}
        write_json(index, values)


def _complete_config(folder: Path) -> None:
    """Say `rope_theta` in the old place too: readers before transformers 5 know no other and assume 10,000."""
    path = folder / "config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for part in ("text_config", "vision_config"):
        values[part].pop("_name_or_path", None)  # a path of this machine
    rope = values["text_config"].get("rope_parameters") or {}
    if "rope_theta" in rope:
        values["text_config"]["rope_theta"] = rope["rope_theta"]
    write_json(path, values)
