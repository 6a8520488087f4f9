"""Which back ends take an export, and with which command: one table for the report, the card and `serve`.

What each reads was taken from its code and, where it runs on a CPU, proved by `scripts/prove_backends.py`;
docs/backends.md has the versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from shlex import quote
from typing import Any

from llava_train.exporters.table import TARGETS
from llava_train.exporters.target import Request
from llava_train.model.assemble import Assembly
from llava_train.model.families.questions import reads_text

_LLAVA = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
)
_QWEN = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
_TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class ExportFacts:
    """What a back end asks of an export.

    Attributes:
        target: name of the target.
        model_class: of transformers, or ours.
        tower, llm: `model_type` of the encoder's configuration and of the language model's.
        connector: name in our registry.
        quantize: `int8`, `int4` or None.
        reads_text: whether the connector reads the question.
        whole_modules: whether an adapter folder brings modules that were trained whole (the connector).
    """

    target: str
    model_class: str
    tower: str
    llm: str
    connector: str
    quantize: str | None
    reads_text: bool = False
    whole_modules: bool = False


@dataclass(frozen=True)
class BackEnd:
    """A reader of exports.

    Attributes:
        name: as it calls itself.
        commands: target -> how it is started; `{folder}` is the export.
        refusal: why it does not take an export of such a target, as a clause.
        options: what its command needs besides for some models.
    """

    name: str
    commands: Mapping[str, str]
    refusal: Callable[[ExportFacts], str | None] = field(default=lambda export: None)
    options: Callable[[ExportFacts], str] = field(default=lambda export: "")


def facts_of(assembly: Assembly, target: str, request: Request) -> ExportFacts:
    """The facts about a model that is written by a target."""
    config = assembly.model.config
    return ExportFacts(
        target,
        type(assembly.model).__name__,
        str(config.vision_config.model_type),
        str(config.text_config.model_type),
        assembly.spec.connector,
        request.quantize,
        reads_text(assembly.model),
    )


def _vllm(export: ExportFacts) -> str | None:
    if export.whole_modules:
        return "vLLM takes no adapters with modules trained whole (modules_to_save): serve a merged --to hf export"
    if export.target == "remote-code":
        return _vllm_transformers(export)
    if export.connector == "linear":
        return "vLLM's projector has no layers without an activation between them, which a linear one is written as"
    if export.model_class in _LLAVA and export.tower not in _TOWERS:
        return f"vLLM's LLaVA classes have CLIP and SigLIP, not a {export.tower}"
    if export.model_class not in _LLAVA + _QWEN:
        return f"vLLM has no {export.model_class}"
    return None


def _vllm_options(export: ExportFacts) -> str:
    """Our exports of LLaVA-OneVision's class have no part for videos, which vLLM otherwise tries at its start."""
    onevision = export.target == "hf" and export.model_class == _LLAVA[2]
    return """ --limit-mm-per-prompt '{"image": 4, "video": 0}'""" if onevision else ""


def _vllm_transformers(export: ExportFacts) -> str | None:
    """vLLM runs a folder's own code through its transformers back end, which gives pictures to the model alone."""
    if export.model_class != _LLAVA[0]:
        return f"vLLM's transformers back end was not proved with {export.model_class}"
    if export.reads_text:
        return "vLLM's transformers back end does not tell the connector the question"
    return None


def _sglang(export: ExportFacts) -> str | None:
    if export.target == "hf" and export.model_class in _LLAVA:
        advice = "" if export.quantize else ": export with --to llava for it"
        return f"SGLang reads the original layout of LLaVA, not transformers'{advice}"
    if export.target == "llava" and export.connector != "mlp2x_gelu":
        return f"SGLang's projector has two layers with GELU between, and this one is {export.connector!r}"
    if export.target == "llava" and export.llm != "llama":
        return "SGLang asks transformers for the configuration, which has no such model_type: see docs/backends.md"
    return None


def _lmdeploy(export: ExportFacts) -> str | None:
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
    BackEnd(
        "vLLM",
        {
            "hf": "vllm serve {folder}",
            "remote-code": "vllm serve {folder} --trust-remote-code --model-impl transformers",
            "adapter": "vllm serve BASE --enable-lora --max-lora-rank 64 --lora-modules mine={folder}",
        },
        _vllm,
        _vllm_options,
    ),
    BackEnd(
        "SGLang",
        {
            "hf": "python -m sglang.launch_server --model-path {folder}",
            "llava": "cd {folder} && python -m sglang.launch_server --model-path .",
        },
        _sglang,
    ),
    BackEnd("LMDeploy", {"hf": "lmdeploy serve api_server {folder} --backend pytorch"}, _lmdeploy),
    BackEnd("llama.cpp", {"gguf": "llama-server -m {folder}/model.gguf --mmproj {folder}/mmproj.gguf --jinja"}),
    BackEnd("Ollama", {"gguf": "ollama create NAME -f {folder}/Modelfile && ollama run NAME"}),
    BackEnd(
        "the original LLaVA code",
        {
            "llava": 'cd {folder} && python -m llava.serve.cli --model-path "$PWD" --image-file PICTURE',
            "llava-stage1": "python llava/train/train_mem.py --pretrain_mm_mlp_adapter {folder}/mm_projector.bin",
            "llava-lora": "python -m llava.serve.cli --model-path {folder} --model-base BASE --image-file PICTURE",
        },
    ),
    BackEnd("PEFT", {"adapter": "PeftModel.from_pretrained(base, {folder!r})"}),
)


def readers(export: ExportFacts, folder: str) -> list[dict[str, Any]]:
    """A row for each back end that reads the target: `name`, and `command`, or `why` it does not take this model."""
    rows: list[dict[str, Any]] = []
    for each in BACK_ENDS:
        if export.target in each.commands:
            why = each.refusal(export)
            command = each.commands[export.target].format(folder=quote(folder)) + each.options(export)
            rows.append({"name": each.name, **({"why": why} if why else {"command": command})})
    return rows


def vllm_command(assembly: Assembly, model: str) -> str:
    """How a loaded model is served by vLLM: the command, with an export before it where `model` is not as transformers
    wrote it; or why it cannot be."""
    why = TARGETS["hf"].refusal(assembly) or _vllm(facts_of(assembly, "hf", Request(assembly.model.dtype)))
    if why:
        return f"vLLM cannot serve this model ({why}); docs/backends.md says what can"
    if assembly.spec.llm.kind == "llava" and not assembly.spec.history:
        return f"vllm serve {quote(model)} --dtype bfloat16"
    return f"llava-train export {quote(model)} EXPORT, then vllm serve EXPORT --dtype bfloat16"
