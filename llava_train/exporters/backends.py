"""Which back ends take an export, and with which command: one table for the report, the card and `serve`.

What each reads was taken from its code and, where it runs on a CPU, proved by `scripts/prove_backends.py`;
docs/backends.md has the versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_train.exporters.target import Request
from llava_train.model.assemble import Assembly

_LLAVA = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
)
_QWEN = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
_TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Written:
    """What a back end asks of an export.

    Attributes:
        target: name of the target.
        model_class: of transformers, or ours.
        tower, llm: `model_type` of the encoder's configuration and of the language model's.
        strategy: which positions of the encoder are read, `default` (no CLS) or `full`; "" where a class has none.
        quantize: `int8`, `int4` or None.
    """

    target: str
    model_class: str
    tower: str
    llm: str
    strategy: str
    quantize: str | None


@dataclass(frozen=True)
class BackEnd:
    """A reader of exports.

    Attributes:
        name: as it calls itself.
        commands: target -> how it is started; `{folder}` is the export.
        refusal: why it does not take an export of such a target, as a clause.
    """

    name: str
    commands: Mapping[str, str]
    refusal: Callable[[Written], str | None] = field(default=lambda export: None)


def written(assembly: Assembly, target: str, request: Request) -> Written:
    """The facts about a model that is written by a target."""
    config = assembly.model.config
    return Written(
        target,
        type(assembly.model).__name__,
        str(config.vision_config.model_type),
        str(config.text_config.model_type),
        str(getattr(config, "vision_feature_select_strategy", "")),
        request.quantize,
    )


def _vllm(export: Written) -> str | None:
    if export.model_class in _LLAVA and export.tower not in _TOWERS:
        return f"vLLM's LLaVA classes have CLIP and SigLIP, not a {export.tower}"
    if export.model_class not in _LLAVA + _QWEN:
        return f"vLLM has no {export.model_class}"
    return None


def _sglang(export: Written) -> str | None:
    if export.target == "hf" and export.model_class == _LLAVA[0] and export.strategy == "default":
        return (
            "SGLang refuses vision_feature_select_strategy 'default' in transformers' layout: export with --to llava "
            "for it"
        )
    return None


def _lmdeploy(export: Written) -> str | None:
    if export.quantize:
        return "LMDeploy has its own quantised weights (lmdeploy lite)"
    if export.model_class in _LLAVA and export.tower != "clip_vision_model":
        return f"LMDeploy's LLaVA classes have CLIP, not a {export.tower}"
    if export.model_class not in _LLAVA[:2] + _QWEN:
        return f"LMDeploy has no {export.model_class}"
    return None


BACK_ENDS: tuple[BackEnd, ...] = (
    BackEnd(
        "transformers",
        {
            "hf": "AutoModelForImageTextToText.from_pretrained({folder!r})",
            "remote-code": "AutoModelForImageTextToText.from_pretrained({folder!r}, trust_remote_code=True)",
        },
    ),
    BackEnd("transformers serve", {"hf": "transformers serve {folder}"}),
    BackEnd("vLLM", {"hf": "vllm serve {folder}"}, _vllm),
    BackEnd(
        "SGLang",
        {
            "hf": "python -m sglang.launch_server --model-path {folder}",
            "llava": "python -m sglang.launch_server --model-path {folder}",
        },
        _sglang,
    ),
    BackEnd("LMDeploy", {"hf": "lmdeploy serve api_server {folder} --backend pytorch"}, _lmdeploy),
    BackEnd("llama.cpp", {"gguf": "llama-server -m {folder}/model.gguf --mmproj {folder}/mmproj.gguf"}),
    BackEnd("Ollama", {"gguf": "ollama create NAME -f {folder}/Modelfile && ollama run NAME"}),
    BackEnd(
        "the original LLaVA code", {"llava": "python -m llava.serve.cli --model-path {folder} --image-file PICTURE"}
    ),
    BackEnd("PEFT", {"adapter": "PeftModel.from_pretrained(base, {folder!r})"}),
)


def readers(export: Written, folder: str) -> list[dict[str, Any]]:
    """A row for each back end that reads the target: `name`, and `command`, or `why` it does not take this model."""
    rows: list[dict[str, Any]] = []
    for each in BACK_ENDS:
        if export.target in each.commands:
            why = each.refusal(export)
            own = {"why": why} if why else {"command": each.commands[export.target].format(folder=folder)}
            rows.append({"name": each.name, **own})
    return rows
