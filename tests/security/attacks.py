"""Hostile files, made on the spot: what somebody might put where a part, a model or a checkpoint is read.

`WEIGHTS` take the place of a weights file; `CONFIGS` and the lists after it change a folder around it. Code that any
of them would run makes the file CANARY; what leads out of a folder leads to a sibling that would load.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

Place = Callable[[Path, Path], None]
"""(file or folder to harm, canary) -> None."""


@dataclass(frozen=True)
class Attack:
    """A hostile file.

    Attributes:
        name: what the test is called.
        place: puts it there.
        says: what the refusal names, besides the path (a regular expression).
    """

    name: str
    place: Place
    says: str = ""


class Runs:
    """Makes a file when it is unpickled: by `posix.system`, or by a name that is resolved while it is read."""

    def __init__(self, canary: Path, how: str) -> None:
        self.canary, self.how = canary, how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch '{self.canary}'",)
        return _Resolved(), (f"touch '{self.canary}'",)


class _Resolved:
    def __reduce__(self):
        import pkgutil

        return pkgutil.resolve_name, ("os:system",)

    def __call__(self) -> None: ...


def hostile_pickle(canary: Path, how: str = "system") -> bytes:
    return pickle.dumps(Runs(canary, how))


def hostile_torch_zip(canary: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": Runs(canary, "system")}, stream)
    return stream.getvalue()


@lru_cache
def zip_bomb() -> bytes:
    """A checkpoint in torch's zip layout whose one tensor of 256 MB is 1 MB of deflated zeros."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(256):
                member.write(bytes(1 << 20))
    return stream.getvalue()


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file in the format's layout around any header: a value, or text that need not be JSON."""
    text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


def tensor(start: int = 0, end: int = 16, dtype: str = "F32", shape: object = (4,)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


_TWICE = (
    '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}'
)
_NAN = '{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'


def _weights(name: str, make: Callable[[Path], bytes]) -> Attack:
    def place(file: Path, canary: Path) -> None:
        file.write_bytes(make(canary))

    return Attack(name, place)


def _cut(file: Path, canary: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _huge_header(file: Path, canary: Path) -> None:
    """A fifth of the 100 MB that the format allows is 350,000 tensors of no bytes."""
    file.write_bytes(_many_names())


@lru_cache
def _many_names() -> bytes:
    entry = '"{:07}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    text = "{" + ",".join(map(entry.format, range(350_000))) + "}"
    return safetensors(text)


def _as_link(file: Path, canary: Path) -> None:
    outside = canary.with_name("outside.safetensors")
    shutil.move(file, outside)
    file.symlink_to(outside)


def _as_fifo(file: Path, canary: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _as_device(file: Path, canary: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


WEIGHTS = [
    _weights("pickle of posix.system", hostile_pickle),
    _weights("pickle of pkgutil.resolve_name", lambda canary: hostile_pickle(canary, "resolve")),
    _weights("torch checkpoint", hostile_torch_zip),
    _weights("zip bomb", lambda _: zip_bomb()),
    _weights("empty file", lambda _: b""),
    _weights("seven bytes", lambda _: b"\1\0\0\0\0\0\0"),
    _weights("header of 2^63 bytes", lambda _: safetensors({}, length=1 << 63)),
    _weights("header longer than the file", lambda _: safetensors({}, length=1_000_000)),
    _weights("header that is no JSON", lambda _: safetensors("import os")),
    _weights("header that is a list", lambda _: safetensors([])),
    _weights("header with NaN", lambda _: safetensors(_NAN, bytes(16))),
    _weights("header nested 100,000 deep", lambda _: safetensors('{"a":' * 100_000 + "1" + "}" * 100_000)),
    _weights("one name twice", lambda _: safetensors(_TWICE, bytes(32))),
    _weights("overlapping tensors", lambda _: safetensors({"a": tensor(), "b": tensor(8, 24)}, bytes(24))),
    _weights(
        "the same bytes a thousand times", lambda _: safetensors({f"{i}": tensor() for i in range(999)}, bytes(16))
    ),
    _weights("offsets beyond the file", lambda _: safetensors({"a": tensor(0, 1 << 40, "F32", [1 << 38])}, bytes(16))),
    _weights("a hole between tensors", lambda _: safetensors({"a": tensor(), "b": tensor(20, 36)}, bytes(36))),
    _weights("bytes behind the tensors", lambda _: safetensors({"a": tensor()}, bytes(32))),
    _weights("shape that does not fit its bytes", lambda _: safetensors({"a": tensor(shape=[1 << 20])}, bytes(16))),
    _weights("shape that overflows", lambda _: safetensors({"a": tensor(shape=[1 << 32, 1 << 32])}, bytes(16))),
    _weights("negative shape", lambda _: safetensors({"a": tensor(shape=[-4])}, bytes(16))),
    _weights("negative offset", lambda _: safetensors({"a": tensor(-16, 0)}, bytes(16))),
    _weights("unknown dtype", lambda _: safetensors({"a": tensor(dtype="PICKLE")}, bytes(16))),
    Attack("truncated", _cut),
    Attack("350,000 names", _huge_header),
    Attack("link out of the folder", _as_link),
    Attack("pipe", _as_fifo),
    Attack("link to a device", _as_device),
]


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    change(values)
    file.write_text(json.dumps(values))


def write_code(folder: Path, canary: Path) -> None:
    """The code that an `auto_map` below leads to: each class is there, and the module's first line harms."""
    text = f"open({str(canary)!r}, 'w').close()\n"
    for name, base in (
        ("Config", "PreTrainedConfig"),
        ("Model", "PreTrainedModel"),
        ("Tokenizer", "PreTrainedTokenizerFast"),
        ("Processor", "ProcessorMixin"),
        ("ImageProcessor", "BaseImageProcessor"),
    ):
        source = "transformers.image_processing_utils" if name == "ImageProcessor" else "transformers"
        text += f"from {source} import {base}\nclass {name}({base}):\n    model_type = 'hostile'\n"
    (folder / "hostile.py").write_text(text)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(canary)!r}, 'w').close()\ndef generate(*a): ...\n"
    )


_ANY = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForVision2Seq")


def _code_in(name: str, of: dict[str, str], **more: object) -> Place:
    def place(folder: Path, canary: Path) -> None:
        write_code(folder, canary)
        change_json(folder / name, lambda values: values.update({"auto_map": of, **more}))

    return place


def _code_in_a_part(folder: Path, canary: Path) -> None:
    write_code(folder, canary)
    change_json(folder / "config.json", lambda v: v.update(text_config={"auto_map": {"AutoConfig": "hostile.Config"}}))


def _text(name: str, text: str | bytes) -> Place:
    def place(folder: Path, canary: Path) -> None:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return place


def _config(name: str, **values: object) -> Attack:
    return Attack(
        name, lambda folder, _: change_json(folder / "config.json", lambda v: v.update(values)), "config.json"
    )


def _config_as(name: str, harm: Place) -> Attack:
    return Attack(name, lambda folder, canary: harm(folder / "config.json", canary), "config.json")


def _many_layers(folder: Path, canary: Path) -> None:
    def change(values: dict) -> None:
        for part in (values, values.get("text_config", {})):
            part["num_hidden_layers"] = 1_000_000

    change_json(folder / "config.json", change)


_MODEL_CODE = {"AutoConfig": "hostile.Config", **dict.fromkeys(_ANY, "hostile.Model")}
CODE = [
    Attack("code for an unknown type", _code_in("config.json", _MODEL_CODE, model_type="hostile"), "auto_map.*hostile"),
    Attack("code for a known type", _code_in("config.json", _MODEL_CODE), "auto_map.*hostile"),
    Attack("code of another repository", _code_in("config.json", {"AutoConfig": "a/b--hostile.Config"}), "auto_map"),
    Attack("code for a part", _code_in_a_part, "auto_map"),
    Attack(
        "code for a tokenizer",
        _code_in("tokenizer_config.json", {"AutoTokenizer": [None, "hostile.Tokenizer"]}, tokenizer_class="Tokenizer"),
        "tokenizer_config.json: auto_map",
    ),
    Attack(
        "code for a processor",
        _code_in("processor_config.json", {"AutoProcessor": "hostile.Processor"}, processor_class="Processor"),
        "processor_config.json: auto_map",
    ),
    Attack(
        "code for an image processor",
        _code_in("preprocessor_config.json", {"AutoImageProcessor": "hostile.ImageProcessor"}),
        "preprocessor_config.json: auto_map",
    ),
]
"""All are refused with a message that names `auto_map` and `model.trust_remote_code`."""

CONFIGS = [
    Attack("no JSON", _text("config.json", "import os"), "config.json"),
    Attack("not UTF-8", _text("config.json", b"\xff\xfe{}"), "config.json"),
    Attack("a list", _text("config.json", "[]"), "config.json"),
    Attack("nested 100,000 deep", _text("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000), "config.json"),
    Attack("20 MB of JSON", _text("config.json", "[" + "[]," * 7_000_000 + "[]]"), "config.json"),
    Attack("tokenizer nested 100,000 deep", _text("tokenizer_config.json", "[" * 100_000), "tokenizer_config.json"),
    _config("NaN", initializer_range=float("nan")),
    Attack("a million layers", _many_layers, "config.json"),
    _config("weights elsewhere", transformers_weights="adapter_model.bin"),
    _config("a kernel of the hub", attn_implementation="nobody/hostile-kernel"),
    _config_as("config as a pipe", _as_fifo),
    _config_as("config as a link out of the folder", _as_link),
]


def _pickle_only(folder: Path, canary: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(hostile_torch_zip(canary))


def _adapter(folder: Path, canary: Path) -> None:
    values = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": ["q_proj"], "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    (folder / "adapter_model.bin").write_bytes(hostile_torch_zip(canary))


def _index(target: str, prepare: Place = lambda folder, canary: None) -> Place:
    """The weights behind an index that names `target` for every tensor."""

    def place(folder: Path, canary: Path) -> None:
        prepare(folder, canary)
        names = [key for key, _ in _header(folder / "model.safetensors").items() if key != "__metadata__"]
        shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
        mapped = target.replace("OUTSIDE", str(folder.parent / "outside.safetensors"))
        values = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, mapped)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(values))

    return place


def _header(file: Path) -> dict:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def _pickle_shard(folder: Path, canary: Path) -> None:
    (folder / "shard.bin").write_bytes(hostile_torch_zip(canary))


FOLDERS = [
    Attack("pickles alone", _pickle_only, "pytorch_model.bin.*safetensors"),
    Attack("adapters", _adapter, "adapter_config.json"),
    Attack("index that leads up", _index("../outside.safetensors"), "outside.safetensors"),
    Attack("index that leads away", _index("OUTSIDE"), "outside.safetensors"),
    Attack("index of pickles", _index("shard.bin", _pickle_shard), "shard.bin"),
    Attack("index of nothing", _text("model.safetensors.index.json", "{}"), "index.json"),
]
"""For folders that transformers reads. The last needs the weights gone, which the test sees to."""


def _gguf(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


_LLAMA = _string(b"general.architecture") + struct.pack("<I", 8) + _string(b"llama")
_VAST = _string(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)
_LAYERS = _string(b"llama.block_count") + struct.pack("<II", 4, 1_000_000)
_ARRAYS = _string(b"x") + struct.pack("<IIQ", 9, 9, 1) * 20_000

GGUFS = [
    _weights("pickle", hostile_pickle),
    _weights("empty file", lambda _: b""),
    _weights("magic alone", lambda _: b"GGUF"),
    _weights("2^62 keys", lambda _: _gguf(0, 1 << 62)),
    _weights("2^62 tensors", lambda _: _gguf(1 << 62, 1, _LLAMA)),
    _weights("a name of 2^62 bytes", lambda _: _gguf(0, 1, struct.pack("<Q", 1 << 62))),
    _weights("an array of 2^62", lambda _: _gguf(0, 1, _string(b"x") + struct.pack("<IIQ", 9, 4, 1 << 62))),
    _weights("arrays nested 20,000 deep", lambda _: _gguf(0, 1, _ARRAYS)),
    _weights("a tensor of 2^80", lambda _: _gguf(1, 1, _LLAMA + _VAST)),
    _weights("a million layers", lambda _: _gguf(0, 2, _LLAMA + _LAYERS)),
    _weights("a million layers of as many tensors", lambda _: _gguf(1 << 62, 2, _LLAMA + _LAYERS)),
]
