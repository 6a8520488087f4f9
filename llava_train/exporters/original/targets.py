"""Targets `llava`, `llava-stage1` and `llava-lora`.

The last two write `.bin` files, by `torch.save`: pickles, of named tensors and nothing else. The original code reads
no other kind (`torch.load` of `mm_projector.bin` and `non_lora_trainables.bin`). They load with `weights_only=True`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from llava_train.errors import ExportError
from llava_train.exporters.original import layout
from llava_train.exporters.original.config import named_source, original_config
from llava_train.exporters.original.parts import write_generation, write_tokenizer, write_tower, write_training_template
from llava_train.exporters.original.proof import prove
from llava_train.exporters.target import Request, Target
from llava_train.exporters.verify import TOLERANCE, Reference
from llava_train.files import write_json
from llava_train.model.assemble import Assembly
from llava_train.model.originals.config import ADAPTERS, NON_LORA, PROJECTOR, is_original
from llava_train.model.screening import read_config
from llava_train.model.tuning import PEFT_PREFIX, linear_layers, part_of

_SHARD = "5GB"
_DECODER = "model.language_model."


class Whole(Target):
    """A whole model in the original layout: `LlavaLlamaForCausalLM` and its like.

    An encoder that was not trained and lies on the hub is named by its id, as upstream does. Any other one is written
    into a folder beside the weights, so that the export stands alone; one that was trained is among the weights too
    (`unfreeze_mm_vision_tower`, upstream's way).
    """

    summary = "the original LLaVA layout (LlavaLlamaForCausalLM and its like); SGLang and the original code read it"

    def refusal(self, assembly: Assembly) -> str | None:
        """What the original has no place for."""
        return layout.refusal(assembly)

    def write(self, assembly: Assembly, folder: Path, request: Request) -> None:
        """Weights in shards of 5 GB, config.json, tokenizer without `<image>`, the encoder where no hub has it."""
        trained = assembly.spec.vision.included or layout.is_shortened(assembly)
        tensors = layout.model_tensors(assembly, trained)
        tower = _on_hub(assembly) or write_tower(assembly, folder)
        tokens = write_tokenizer(assembly, folder)
        write_training_template(assembly, folder)
        write_generation(assembly, folder, tokens)
        rows = len(tensors["model.embed_tokens.weight"])
        changes = {"unfreeze_mm_vision_tower": trained}
        write_json(folder / "config.json", original_config(assembly, tower, rows, request.dtype, **changes))
        _save_shards(tensors, folder)

    def prove(self, reference: Reference, folder: Path, request: Request) -> dict[str, Any]:
        """Our importer loads it in a fresh process; another export of that is the same bit for bit."""
        return {**prove(reference, folder, TOLERANCE[request.dtype]), "notes": _notes(folder, "`llava`")}


class Stage1(Target):
    """The projector alone, over a language model and an encoder that were not touched."""

    summary = "the projector as the original's stage 1 leaves it (mm_projector.bin); its stage 2 starts from it"

    def refusal(self, assembly: Assembly) -> str | None:
        """Besides what no folder of the original can hold: anything else that was trained."""
        return layout.refusal(assembly) or _stage1_refusal(assembly)

    def write(self, assembly: Assembly, folder: Path, request: Request) -> None:
        """`mm_projector.bin`, and config.json that names the language model and the encoder."""
        config = _partial_config(assembly, request, tune_mm_mlp_adapter=True)
        write_json(folder / "config.json", config)
        write_training_template(assembly, folder)
        _save_bin(layout.connector_tensors(assembly), folder / PROJECTOR)

    def prove(self, reference: Reference, folder: Path, request: Request) -> dict[str, Any]:
        """Our importer loads it, with the parts that it names, in a fresh process."""
        return {**prove(reference, folder, TOLERANCE[request.dtype]), "notes": _notes(folder)}


class Lora(Target):
    """Adapters of the language model and the projector, over a base that was not touched."""

    summary = "the original's LoRA folder: adapters and non_lora_trainables.bin over a base that it names"
    merges = False

    def refusal(self, assembly: Assembly) -> str | None:
        """Besides what no folder of the original can hold: no adapters, or anything else that was trained."""
        return layout.refusal(assembly) or _lora_refusal(assembly)

    def write(self, assembly: Assembly, folder: Path, request: Request) -> None:
        """Adapters, config.json and `non_lora_trainables.bin`."""
        spec = assembly.spec
        assert spec.lora is not None, "refused without"
        write_json(folder / "config.json", _partial_config(assembly, request))
        options = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": named_source(str(spec.llm.path)),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": spec.lora.alpha,
            "lora_dropout": spec.lora.dropout,
            "modules_to_save": None,
            "r": spec.lora.r,
            "target_modules": adapted_modules(assembly, _DECODER),
        }
        write_json(folder / ADAPTERS, options)
        write_training_template(assembly, folder)
        named = {n: w for n, w in assembly.model.state_dict().items() if ".lora_" in n}
        adapters = {f"{PEFT_PREFIX}{layout.original_key(n.replace('.default', ''))}": w for n, w in named.items()}
        save_file(_own(adapters), str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        others = {f"{PEFT_PREFIX}{key}": weight for key, weight in layout.connector_tensors(assembly).items()}
        _save_bin(others, folder / NON_LORA)

    def prove(self, reference: Reference, folder: Path, request: Request) -> dict[str, Any]:
        """Our importer loads it over its base in a fresh process."""
        try:
            report = prove(reference, folder, TOLERANCE[request.dtype])
        except ExportError as error:
            base = read_config(folder, ADAPTERS)["base_model_name_or_path"]
            raise ExportError(f"{error} (over {base}, which must be what the adapters were trained on)") from error
        return {**report, "notes": _notes(folder, "`llava` and `lora`")}


def adapted_modules(assembly: Assembly, prefix: str) -> list[str]:
    """`target_modules` of the adapters: last names where these mean the adapted layers of the decoder and no others,
    as the original writes them; otherwise whole names, after `prefix`."""
    assert assembly.spec.lora is not None, "asked of a model with adapters"
    adapted = set(assembly.spec.lora.targets)
    layers = {name.removesuffix(".base_layer") for name in linear_layers(assembly.model, "llm") if ".lora_" not in name}
    short = {name.rpartition(".")[2] for name in adapted}
    if {name for name in layers if name.rpartition(".")[2] in short} == adapted:
        return sorted(short)
    return sorted(f"model.{name.removeprefix(prefix)}" for name in adapted)


def _on_hub(assembly: Assembly) -> str | None:
    """The encoder's id on the hub, where the original, SGLang and our importer all find it by that."""
    source, kind = assembly.spec.vision, assembly.model.config.vision_config.model_type.partition("_")[0]
    name = layout.hub_name(source.path) if source.kind == "hf" else None
    return name if name and kind in name and not Path(name).exists() else None


def _partial_config(assembly: Assembly, request: Request, **changes: Any) -> dict[str, Any]:
    """config.json of a folder that names its language model and its encoder."""
    spec = assembly.spec
    rows = read_config(Path(spec.llm.path), "config.json")["vocab_size"] if spec.llm.included else None  # type: ignore[arg-type]
    rows = rows or min(assembly.old_vocabulary, int(assembly.model.get_input_embeddings().weight.shape[0]))
    tower, base = named_source(str(spec.vision.path)), named_source(str(spec.llm.path))
    return original_config(assembly, tower, rows, request.dtype, _name_or_path=base, **changes)


def _untouched_refusal(assembly: Assembly) -> str | None:
    spec = assembly.spec
    if spec.vision.included:
        return "its encoder was trained too, for which such a folder has no place"
    if spec.vision.kind == "llava" or spec.llm.kind != "hf":
        return "it names a language model and an encoder in folders of their own, and this model began otherwise"
    return None


def _stage1_refusal(assembly: Assembly) -> str | None:
    if assembly.spec.llm.included:
        return "its language model was trained too, or came with it: that folder holds a projector alone"
    if not layout.connector_tensors(assembly):
        return f"its connector {assembly.spec.connector!r} has no weights"
    return _untouched_refusal(assembly)


def _lora_refusal(assembly: Assembly) -> str | None:
    spec = assembly.spec
    if spec.lora is None:
        return "it has no adapters"
    parts = {part_of(name) for name in spec.lora.targets} - {"llm"}
    if parts:
        return f"its {' and '.join(sorted(parts))} has adapters too; that folder holds those of the language model"
    if spec.llm.included and not is_original(Path(str(spec.llm.path))):
        return "its language model was trained in full before, so that no base can be named; use llava, which merges"
    return _untouched_refusal(assembly)


def _notes(folder: Path, name: str = "") -> list[str]:
    """What a report tells people: what the folder's `name` must hold for the original code, and paths to mind."""
    notes = [f"the original code wants {name} in the folder's name, and the template by --conv-mode"] if name else []
    tower = Path(read_config(folder, "config.json")["mm_vision_tower"])
    if tower.is_absolute():
        notes.append("config.json names parts by whole paths on the machine that wrote it; change them elsewhere")
    elif (folder / tower).is_dir():
        notes.append(f"mm_vision_tower is relative ({tower}): start the original code and SGLang inside the folder")
    return notes


def _save_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD
    )
    for name, keys in plan.filename_to_tensors.items():
        save_file(_own({key: tensors[key] for key in keys}), str(folder / name), metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _save_bin(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Named tensors, each with a storage of its own and nothing else, as a pickle that `weights_only` reads."""
    torch.save(_own(tensors), path)


def _own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
