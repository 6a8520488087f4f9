"""Target `adapter`: LoRA adapters and the connector as a PEFT folder over a stock model, which it names.

`PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folder)` is the trained model. Names are
those of transformers' class in memory; the configuration is written by PEFT. A trained connector is a module to save
(`modules_to_save`), which vLLM refuses (`vllm/lora/peft_helper.py`): it takes the folder where the connector stayed
what it was in the base.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file

from llava_train.exporters.reading import write_reading
from llava_train.exporters.target import Request, Target
from llava_train.exporters.verify import QUESTION, TOLERANCE, Reference, answers_of, compare
from llava_train.model.assemble import Assembly
from llava_train.model.originals.weights import weight_files
from llava_train.model.screening import own_file, read_config
from llava_train.model.tuning import PEFT_PREFIX, part_of

PROBE = Path(__file__).parent / "adapter_probe.py"
_CONNECTORS = ("model.multi_modal_projector", "model.visual.merger", "model.visual.deepstack_merger_list")
"""Modules that PEFT can save as they are."""


class Adapter(Target):
    """Adapters over a folder or hub id of a stock class that a run started from."""

    summary = "a PEFT folder (LoRA and connector) over the published model that a run started from"
    merges = False

    def refusal(self, assembly: Assembly) -> str | None:
        """No adapters, no stock model to name as the base, or something trained that PEFT has no place for."""
        return _base_refusal(assembly) or _trained_refusal(assembly)

    def write(self, assembly: Assembly, folder: Path, request: Request) -> None:
        """adapter_config.json and adapter_model.safetensors; tokenizer, template and processor as training had them."""
        spec, changed = assembly.spec, changed_connector(assembly)
        assert spec.lora is not None, "refused without"
        base, revision = hub_source(str(spec.llm.path))
        kind = type(assembly.model)
        config = LoraConfig(
            r=spec.lora.r,
            lora_alpha=spec.lora.alpha,
            lora_dropout=spec.lora.dropout,
            target_modules=sorted(spec.lora.targets),
            modules_to_save=[each.removesuffix(".") for each in _whole(changed)] or None,
            base_model_name_or_path=base,
            revision=revision,
            inference_mode=True,
        )
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config.target_modules = sorted(spec.lora.targets)  # PEFT makes a set of it, whose order changes
        config.save_pretrained(str(folder))
        kept = _whole(changed)
        saved = {n: w for n, w in assembly.model.state_dict().items() if ".lora_" in n or n.startswith(kept)}
        tensors = {f"{PEFT_PREFIX}{n.replace('.default', '')}": w.detach().cpu().contiguous() for n, w in saved.items()}
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        write_reading(assembly, folder)

    def prove(self, reference: Reference, folder: Path, request: Request) -> dict[str, Any]:
        """Stock transformers and PEFT load base and adapters in a fresh process."""
        options = read_config(folder, "adapter_config.json")
        own = [str(folder.absolute()), str(request.dtype).removeprefix("torch.")]

        def command(picture: Path, out: Path) -> list[str]:
            return [sys.executable, "-I", str(PROBE), *own, str(picture), QUESTION, str(out)]

        said, found = answers_of(command, reference.image, "stock transformers and PEFT cannot load the export")
        faults = [f"{kind} keys: {', '.join(said[kind][:10])}" for kind in ("missing", "unexpected") if said[kind]]
        if said["class"] != reference.model_class:
            faults.append(f"its base is a {said['class']}, not a {reference.model_class}")
        report = compare(reference, found, TOLERANCE[request.dtype], faults)
        base = {key: options[key] for key in ("base_model_name_or_path", "revision", "modules_to_save")}
        loaded = f"{said['versions']}: {said['class']} in a fresh process"
        return {**report, **base, "loaded_with": loaded, "notes": [_base_note(options)]}


def _base_note(options: dict[str, Any]) -> str:
    """What the card says of the base, without a path of this machine."""
    base, revision = str(options["base_model_name_or_path"]), options["revision"]
    if not Path(base).is_absolute():
        return f"the base is {base}" + (f", commit {revision}" if revision else "")
    return f"the base is {Path(base).name}, named in adapter_config.json by its whole path: change that elsewhere"


def hub_source(path: str) -> tuple[str, str | None]:
    """(hub id, revision) of a folder in the hub's cache; (whole path, None) of any other.

    >>> hub_source("/c/models--llava-hf--llava-1.5-7b-hf/snapshots/8c85e9a4d626b7b908448be32c1ba5ad79b95e76")
    ('llava-hf/llava-1.5-7b-hf', '8c85e9a4d626b7b908448be32c1ba5ad79b95e76')
    """
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/?$", path)
    return (f"{found[1]}/{found[2]}", found[3]) if found else (str(Path(path).absolute()), None)


def changed_connector(assembly: Assembly) -> list[str]:
    """Names of the connector's weights that are not what they are in the base."""
    weights = {
        name.replace(".base_layer.", "."): weight
        for name, weight in assembly.model.state_dict().items()
        if part_of(name) == "connector" and ".lora_" not in name
    }
    folder, same = Path(str(assembly.spec.llm.path)), set()
    for file in weight_files(folder):
        with safe_open(str(own_file(folder, file)), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                name = key if key in weights else f"model.{key}"  # the long-lived dialect has no `model.` here
                if name in weights and _same(opened.get_tensor(key), weights[name]):
                    same.add(name)
    return sorted(weights.keys() - same)


def _same(stored: torch.Tensor, weight: torch.Tensor) -> bool:
    return stored.shape == weight.shape and torch.equal(stored.to(weight.dtype), weight.cpu())


def _whole(changed: list[str]) -> tuple[str, ...]:
    """Beginnings of the names in the modules that hold a changed weight: PEFT saves modules as a whole."""
    return tuple(f"{each}." for each in _CONNECTORS if any(name.startswith(f"{each}.") for name in changed))


def _base_refusal(assembly: Assembly) -> str | None:
    spec = assembly.spec
    if spec.lora is None:
        return "it has no adapters"
    if spec.llm.kind != "llava" or spec.vision.kind != "llava":
        return (
            "it was built from parts, so that no model can be named as its base: export its stage 1 with --to hf and "
            "start stage 2 from that folder (init_from)"
        )
    if not Path(str(spec.llm.path)).is_dir():
        return f"its base {spec.llm.path} is not there any more"
    kind = read_config(Path(str(spec.llm.path)), "config.json").get("model_type")
    if kind != spec.architecture:
        return f"its base is a {kind} model and this one a {spec.architecture}"
    return None


def _trained_refusal(assembly: Assembly) -> str | None:
    spec = assembly.spec
    full = [name for name, part in (("language model", spec.llm), ("encoder", spec.vision)) if part.included]
    if full:
        return f"its {' and '.join(full)} was trained in full, not with adapters; --to hf merges"
    if int(assembly.model.get_input_embeddings().weight.shape[0]) > assembly.old_vocabulary:
        return "its vocabulary has rows that its base does not have; --to hf merges"
    changed = changed_connector(assembly)
    loose = [name for name in changed if not name.startswith(tuple(f"{each}." for each in _CONNECTORS))]
    if loose:
        return f"PEFT saves whole modules, and {', '.join(loose[:3])} was trained, which is none; --to hf merges"
    targets = spec.lora.targets if spec.lora else ()
    if changed and any(part_of(name) == "connector" for name in targets):
        return "its connector has adapters and was trained besides"
    return None
