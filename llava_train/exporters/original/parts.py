"""What stands beside the weights in a folder of the original: tokenizer, template, generation settings, the encoder."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from llava_train.data.templates.template import portable
from llava_train.exporters.original.config import is_framed
from llava_train.exporters.original.layout import hub_name, is_shortened
from llava_train.exporters.reading import complete_tokenizer
from llava_train.files import write_json
from llava_train.inference import stop_ids
from llava_train.model.assemble import Assembly
from llava_train.model.llm import IMAGE_TOKEN, PAD_TOKEN, add_image_token, load_tokenizer
from llava_train.model.rebuild import TEMPLATE

_SENTENCEPIECE = "tokenizer.model"


def write_tokenizer(assembly: Assembly, folder: Path) -> int:
    """Write the tokenizer as it was before `<image>` came: the original cuts the text there and writes -200.

    Where an import would not add the very same tokens again (a vocabulary that had `<image>` from the start), the
    tokenizer stays whole. The original reads a Llama's `tokenizer.model`, which comes along where its source has it.
    Returns how many ids there are.
    """
    tokenizer = copy.deepcopy(assembly.tokenizer)
    tokenizer.chat_template = None if is_framed(assembly) else portable(assembly.template)
    tokenizer.save_pretrained(folder)
    complete_tokenizer(folder)
    ours = _vocabulary(tokenizer)
    saved = {path: path.read_bytes() for path in folder.glob("tokenizer*.json")}
    _without_ours(folder)
    bare = load_tokenizer(str(folder))
    count = len(bare)
    add_image_token(bare)
    if _vocabulary(bare) != ours:
        for path, data in saved.items():
            path.write_bytes(data)
        count = len(tokenizer)
    sentencepiece = _sentencepiece(assembly)
    if sentencepiece is not None:
        shutil.copyfile(sentencepiece, folder / _SENTENCEPIECE)
    return count


def _vocabulary(tokenizer: Any) -> Any:
    added = {number: str(token.__getstate__()) for number, token in tokenizer.added_tokens_decoder.items()}
    return tokenizer.get_vocab(), added, tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token


def _without_ours(folder: Path) -> None:
    """Take `<image>`, and a `<pad>` behind it, out of a saved tokenizer."""
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    added = sorted(values["added_tokens"], key=lambda token: token["id"])
    gone = [PAD_TOKEN] if added and added[-1]["content"] == PAD_TOKEN else []
    gone += [IMAGE_TOKEN] if [each["content"] for each in added][-1 - len(gone) :][:1] == [IMAGE_TOKEN] else []
    if IMAGE_TOKEN not in gone:
        return
    values["added_tokens"] = [each for each in values["added_tokens"] if each["content"] not in gone]
    write_json(file, values)
    own = json.loads(settings.read_text(encoding="utf-8"))
    own = {key: value for key, value in own.items() if value not in gone}
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(own.get(key), list):
            own[key] = [each for each in own[key] if each not in gone]
    write_json(settings, own)


def _sentencepiece(assembly: Assembly) -> str | Path | None:
    path = str(assembly.spec.llm.path)
    if hub_name(path) and not Path(path).exists():
        found = try_to_load_from_cache(path, _SENTENCEPIECE, revision=assembly.spec.llm.revision)
        return found if isinstance(found, str) else None
    file = Path(path) / _SENTENCEPIECE
    return file if file.is_file() else None


def write_training_template(assembly: Assembly, folder: Path) -> None:
    """The template, which the layout has no place for: our import takes it from here, the original passes it over."""
    (folder / TEMPLATE).write_text(assembly.template, encoding="utf-8")


def write_generation(assembly: Assembly, folder: Path, tokens: int) -> None:
    """generation_config.json; a padding token that an import adds is left to it."""
    values = assembly.model.generation_config.to_diff_dict()
    values["eos_token_id"] = stop_ids(assembly)
    if (values.get("pad_token_id") or 0) >= tokens:
        del values["pad_token_id"]
    write_json(folder / "generation_config.json", {k: v for k, v in values.items() if v is not None})


def write_tower(assembly: Assembly, folder: Path) -> str:
    """Write the encoder into a folder of its own inside `folder`, with its image processor. Returns its name.

    The original and SGLang tell CLIP from SigLIP by the name. A SigLIP that lacks its last layer gets one that nobody
    reads: the original takes off the last one.
    """
    tower: Any = assembly.model.model.vision_tower
    kind = tower.config.model_type
    name = f"{kind.partition('_')[0]}-vision-tower"
    if is_shortened(assembly):
        tower = _with_a_last_layer(tower)
    tower.save_pretrained(folder / name)
    _nest(folder / name)
    write_json(folder / name / "preprocessor_config.json", _processor(assembly))
    return name


def _nest(folder: Path) -> None:
    """Put `vision_model.` before the weights' names, as transformers before 5 reads them."""
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = {_nested(key): tensor for key, tensor in load_file(str(shard)).items()}
        save_file(tensors, str(shard), metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text(encoding="utf-8"))
        values["weight_map"] = {_nested(key): file for key, file in values["weight_map"].items()}
        write_json(index, values)


def _nested(key: str) -> str:
    return f"vision_model.{key.removeprefix('vision_model.')}"


def _with_a_last_layer(tower: PreTrainedModel) -> PreTrainedModel:
    """The tower, whose own layers are shared, with one more layer of zeros."""
    config = copy.deepcopy(tower.config)
    config.num_hidden_layers += 1
    with torch.device("meta"):
        longer = type(tower)(config)
    longer = longer.to(tower.dtype)
    weights = tower.state_dict()
    for key, empty in longer.state_dict().items():
        weights.setdefault(key, torch.zeros(empty.shape, dtype=empty.dtype))
    longer.load_state_dict(weights, strict=True, assign=True)
    return longer


def _processor(assembly: Assembly) -> dict[str, Any]:
    """The encoder's own way to bring a picture to its size: CLIP cuts the centre out, SigLIP stretches."""
    own, size = assembly.image_processor, assembly.spec.image_size
    box = {"height": size, "width": size}
    values = {
        "do_convert_rgb": True,
        "do_normalize": bool(own.do_normalize),
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(own.image_mean),
        "image_std": list(own.image_std),
        "resample": int(own.resample),
        "rescale_factor": own.rescale_factor,
    }
    if assembly.model.config.vision_config.model_type.startswith("siglip"):
        return {"image_processor_type": "SiglipImageProcessor", **values, "size": box}
    cut = {"do_center_crop": True, "crop_size": box, "size": {"shortest_edge": size}}
    return {"image_processor_type": "CLIPImageProcessor", **values, **cut}
