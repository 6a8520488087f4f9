"""Target `remote-code`: a folder that transformers loads with `trust_remote_code=True`, with the code in it.

The code is one file made of our own classes (`bundle`), those that this model uses; what loads it needs torch and
transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, ProcessorMixin

from llava_train import __version__
from llava_train.data.templates.template import portable
from llava_train.exporters.reading import counting as counting_of
from llava_train.exporters.reading import write_template
from llava_train.exporters.remote_code import modeling, processing, stand_ins
from llava_train.exporters.remote_code.bundle import Place, bundle
from llava_train.exporters.target import Request, Target
from llava_train.exporters.verify import TOLERANCE, Reference, verify
from llava_train.files import read_json, write_json
from llava_train.inference import message, render, stop_ids
from llava_train.model.assemble import Assembly
from llava_train.model.connectors import connector_class
from llava_train.model.connectors.blip2 import read_sizes
from llava_train.model.families.questions import reads_text
from llava_train.model.llm import IMAGE_TOKEN, Head
from llava_train.model.towers.stack import TowersConfig
from llava_train.model.towers.trunk import OpenClipTrunk

MODELING, PROCESSING = "modeling_llava_train", "processing_llava_train"
SHARD = "5GB"
"""Most bytes of a file of weights."""
_OWN_TO_A_CLASS = ("model_type", "architectures", "dtype", "transformers_version", "_name_or_path")
_STAND_INS = stand_ins.__name__
_INSTEAD: dict[Place, Place] = {
    (OpenClipTrunk.__module__, OpenClipTrunk.__name__): (_STAND_INS, "OpenClipTrunk"),
    (read_sizes.__module__, read_sizes.__name__): (_STAND_INS, "read_sizes"),
}
_WITHOUT = ("TowersConfig.of", "*.initialise", "*.lasting")
"""What only makes a model"""
_MODELING_HEADER = """The classes that this model is made of: torch and transformers are all they need.

    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)"""
_PROCESSING_HEADER = "The processor of this model: prompts and pictures -> ids and pixels."
_ORIGIN = f"""\
Written by llava_train {__version__} from its own sources, of which it holds what this model uses; the comments say
where each part is from. Copyright of llava_train's authors; Apache-2.0.
"""


class _Layout(NamedTuple):
    """The classes of an exported folder."""

    config: type[PretrainedConfig]
    model: Any
    processor: type[ProcessorMixin]


_LAYOUTS = {
    "llava": _Layout(
        modeling.LlavaTrainConfig, modeling.LlavaTrainForConditionalGeneration, processing.LlavaTrainProcessor
    ),
    "llava_next": _Layout(
        modeling.LlavaTrainNextConfig,
        modeling.LlavaTrainNextForConditionalGeneration,
        processing.LlavaTrainNextProcessor,
    ),
    "llava_onevision": _Layout(
        modeling.LlavaTrainOnevisionConfig,
        modeling.LlavaTrainOnevisionForConditionalGeneration,
        processing.LlavaTrainOnevisionProcessor,
    ),
    "llava_cross_attention": _Layout(
        modeling.LlavaTrainConfig, modeling.LlavaTrainCrossForConditionalGeneration, processing.LlavaTrainProcessor
    ),
}
"""Kinds of model that are carried, by their rows in the table of families."""
_INSTRUCTED = _Layout(
    modeling.LlavaTrainConfig,
    modeling.LlavaTrainInstructedForConditionalGeneration,
    processing.LlavaTrainInstructedProcessor,
)
"""Of a `llava` whose connector reads the question."""


class RemoteCode(Target):
    """A folder with its own modelling file: any connector, encoders side by side, any head, cross-attention."""

    summary = "transformers with trust_remote_code=True: whatever its own classes have no place for"

    def refusal(self, assembly: Assembly) -> str | None:
        """Another family than LLaVA's, or a part whose code is not ours or transformers'."""
        model, architecture = assembly.model, assembly.spec.architecture
        if architecture not in _LAYOUTS:
            return f"a {architecture} model is of a class of transformers as it is: take target 'hf'"
        if any(isinstance(module, OpenClipTrunk) for module in model.modules()):
            return "an encoder runs in open_clip's own code, which no modelling file can hold"
        if reads_text(model) and architecture != "llava":
            return f"connector {assembly.spec.connector!r} reads the question, which is told to a llava model alone"
        if reads_text(model) and not answer_begins(assembly):
            return "its chat template does not say where a question ends, which its connector reads"
        decoder = type(model.model.language_model)
        if not decoder.__module__.startswith("transformers."):
            return f"{decoder.__name__} is code of the language model's own folder"
        return None

    def write(self, assembly: Assembly, folder: Path, request: Request) -> None:
        """Weights, configuration, code, processor and chat template."""
        layout = _layout(assembly)
        with torch.device("meta"):
            model = layout.model(_config(assembly, request))
        model.load_state_dict(assembly.model.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = assembly.model.generation_config
        model.generation_config.eos_token_id = stop_ids(assembly)
        model.save_pretrained(folder, max_shard_size=SHARD)
        (folder / f"{MODELING}.py").write_text(modeling_source(assembly), encoding="utf-8")
        processor = _source([(processing.__name__, layout.processor.__name__)], _PROCESSING_HEADER)
        (folder / f"{PROCESSING}.py").write_text(processor, encoding="utf-8")
        _write_processor(assembly, folder)

    def prove(self, reference: Reference, folder: Path, request: Request) -> dict[str, Any]:
        """Stock transformers loads and asks it, with the folder's code and without ours."""
        kind = read_json(folder / "config.json")["architectures"][0]
        return verify(reference, folder, TOLERANCE[request.dtype], kind, trust_remote_code=True)


def modeling_source(assembly: Assembly) -> str:
    """The modelling file of a model: our classes that it uses, and the classes that a folder is loaded as."""
    layout, connector = _layout(assembly), connector_class(assembly.spec.connector)
    entries = [(modeling.__name__, layout.model.__name__), (connector.__module__, connector.__name__)]
    if isinstance(assembly.model.config.vision_config, TowersConfig):
        entries.append((modeling.__name__, "OwnTowers"))
    return _source(entries, _MODELING_HEADER)


def answer_begins(assembly: Assembly) -> str:
    """What the chat template writes between a question and its answer; "" if it does not say."""
    question = "<question>"
    text = render(assembly, [message("user", question)])
    after = text.partition(question)[2]
    return after if after.strip() and text.count(question) == 1 else ""  # space alone stands elsewhere, too


def _layout(assembly: Assembly) -> _Layout:
    return _INSTRUCTED if reads_text(assembly.model) else _LAYOUTS[assembly.spec.architecture]


def _source(entries: list[Place], what: str) -> str:
    return f'"""{what}\n\n{_ORIGIN}"""\n\n{bundle(entries, _INSTEAD, _WITHOUT)}'


def _config(assembly: Assembly, request: Request) -> PretrainedConfig:
    """What `config.json` says: all that the classes are built from."""
    layout, model = _layout(assembly), assembly.model
    values = {name: value for name, value in model.config.to_dict().items() if name not in _OWN_TO_A_CLASS}
    head = model.lm_head
    config = layout.config(
        **values,
        connector=assembly.spec.connector,
        connector_options=assembly.spec.connector_options,
        head_bias=head.bias is not None,
        head_after=[list(each) for each in head.after] if isinstance(head, Head) else None,
    )
    config.dtype = request.dtype
    config.auto_map = {
        "AutoConfig": f"{MODELING}.{layout.config.__name__}",
        "AutoModel": f"{MODELING}.{layout.model.inner.__name__}",
        "AutoModelForImageTextToText": f"{MODELING}.{layout.model.__name__}",
        "AutoProcessor": f"{PROCESSING}.{layout.processor.__name__}",
    }
    return config


def _write_processor(assembly: Assembly, folder: Path) -> None:
    """What the processor counts tokens by, its parts, and the chat template."""
    name = _layout(assembly).processor.__name__
    if assembly.spec.architecture in ("llava_next", "llava_onevision"):
        counting = counting_of(assembly)
    else:
        counting = {"image_token": IMAGE_TOKEN, "image_tokens": assembly.spec.image_tokens}
    if reads_text(assembly.model):
        counting["answer_begins"] = answer_begins(assembly)
    own = {"processor_class": name, "auto_map": {"AutoProcessor": f"{PROCESSING}.{name}"}}
    template = portable(assembly.template)
    assembly.tokenizer.chat_template = template
    # Several prompts are answered at their right ends.
    assembly.tokenizer.padding_side = assembly.tokenizer.init_kwargs["padding_side"] = "left"
    assembly.tokenizer.save_pretrained(folder)
    assembly.image_processor.save_pretrained(folder)
    write_json(folder / "processor_config.json", {**counting, **own})
    write_template(template, folder)
