"""The table of families, by the name that a model's manifest and configuration give (`model_type`)."""

from __future__ import annotations

from transformers import PreTrainedModel

from llava_train.model.families.base import Family
from llava_train.model.families.cross import CrossAttention
from llava_train.model.families.llava import Llava
from llava_train.model.families.mllama import Mllama
from llava_train.model.families.qwen_vl import Qwen2VL, Qwen25VL
from llava_train.model.families.tiles import LlavaNext, LlavaOnevision
from llava_train.registry import Registry

FAMILIES: Registry[Family] = Registry("kind of model")
_ROWS: dict[str, type[Family]] = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_onevision": LlavaOnevision,
    "llava_cross_attention": CrossAttention,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "mllama": Mllama,
}
for _name, _family in _ROWS.items():
    FAMILIES.register(_name)(_family())


def family_of(model: PreTrainedModel) -> Family:
    """The family of a loaded model, by its class."""
    return next(FAMILIES[name] for name in FAMILIES if FAMILIES[name].model_class is type(model))
