"""The table of export targets."""

from __future__ import annotations

from llava_train.exporters.adapter import Adapter
from llava_train.exporters.gguf.target import Gguf
from llava_train.exporters.huggingface import HuggingFace
from llava_train.exporters.original.targets import Lora, Stage1, Whole
from llava_train.exporters.remote_code.target import RemoteCode
from llava_train.exporters.target import Target
from llava_train.registry import Registry

TARGETS: Registry[Target] = Registry("export target")
_ROWS: dict[str, type[Target]] = {
    "hf": HuggingFace,
    "gguf": Gguf,
    "remote-code": RemoteCode,
    "llava": Whole,
    "llava-stage1": Stage1,
    "llava-lora": Lora,
    "adapter": Adapter,
}
for _name, _target in _ROWS.items():
    TARGETS.register(_name)(_target())
