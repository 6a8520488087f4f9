"""An export proves itself: what was written is loaded in a fresh process and compared with the model it was made of.

The probe is one picture with one question, and the same question without a picture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_train.errors import ExportError
from llava_train.inference import Prompt, batch_inputs, message, prompt_ids, read_pictures, render, stop_ids
from llava_train.model.assemble import Assembly

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference of a logit, relative to the largest logit."""
QUESTION = "What is in the picture?"
GREEDY_TOKENS = 16
PROBE = Path(__file__).parent / "stock_probe.py"


@dataclass(frozen=True)
class Asked:
    """A question as a model sees and answers it.

    Attributes:
        prompt: rendered text, one marker a picture.
        ids: of the prompt, pictures expanded.
        logits: (T, vocabulary) of the prompt, float32.
        greedy: up to 16 tokens of the answer.
        steps: (16, vocabulary), the logits that chose them; empty where they are not known.
    """

    prompt: str
    ids: list[int]
    logits: torch.Tensor
    greedy: list[int]
    steps: torch.Tensor


@dataclass(frozen=True)
class Reference:
    """What the model says before it is exported, in the precision it was loaded in.

    Attributes:
        model_class: name of its class.
        image: the picture of `asked["image"]`.
        asked: `image` and `text`; a template that says nothing without a picture (`plain`) has no `text`.
    """

    model_class: str
    image: Image.Image
    asked: dict[str, Asked]


def probe_picture(size: int) -> Image.Image:
    """A picture of seeded noise, wider than high, so that padding and cropping are part of the check."""
    noise = np.random.default_rng(0).integers(0, 256, (size, size * 3 // 2, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def reference_of(assembly: Assembly) -> Reference:
    """Ask a model the probe's questions."""
    image = probe_picture(assembly.spec.image_size)
    asked = {name: _ask(assembly, images) for name, images in (("image", [image]), ("text", []))}
    return Reference(type(assembly.model).__name__, image, {k: each for k, each in asked.items() if each is not None})


def _ask(assembly: Assembly, images: list[Image.Image]) -> Asked | None:
    prompt = Prompt((message("user", QUESTION, len(images)),), read_pictures(assembly, images))
    text = render(assembly, prompt.messages)
    if not text:
        return None
    model, inputs = assembly.model, batch_inputs(assembly, [prompt])
    with torch.inference_mode():
        logits = model(**inputs).logits[0].float().cpu()
        out: Any = model.generate(
            **inputs,
            max_new_tokens=GREEDY_TOKENS,
            do_sample=False,
            eos_token_id=stop_ids(assembly),
            pad_token_id=assembly.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
    steps = torch.cat([step.float().cpu() for step in out.logits])
    greedy = out.sequences[0, -len(steps) :].tolist()
    return Asked(text, prompt_ids(assembly, prompt), logits, greedy, steps)


def compare(reference: Reference, found: Mapping[str, Asked], tolerance: float, faults: list[str]) -> dict[str, Any]:
    """What a report says of two sets of answers.

    Args:
        reference: the model's.
        found: those of what was written; the `steps` of them are not read.
        tolerance: largest difference of a logit, relative to the largest logit of the reference (at least 1).
        faults: what else is wrong (missing keys, another class): told together.

    Raises:
        ExportError: with all faults. A greedy token may differ where the model itself can hardly tell the two apart:
        their logits lie within twice the tolerance; the report then counts the tokens up to there.
    """
    faults, differences, equal = list(faults), {}, {}
    faults += [f"{name}: a prompt that the model does not have" for name in found.keys() - reference.asked.keys()]
    for name, ours in reference.asked.items():
        theirs = found.get(name)
        if theirs is None:
            faults.append(f"{name}: no answer")
        elif ours.prompt != theirs.prompt:
            faults.append(f"{name}: the prompt renders as {theirs.prompt!r}, not {ours.prompt!r}")
        elif ours.ids != theirs.ids:
            faults.append(f"{name}: the prompt's ids differ")
        else:
            scale = ours.logits.abs().max().clamp_min(1.0)
            differences[name] = float((ours.logits - theirs.logits).abs().max() / scale)
            if not differences[name] <= tolerance:  # catches NaN, too
                faults.append(f"{name}: logits differ by {differences[name]:.2e} (at most {tolerance:g})")
            equal[name] = _equal_tokens(ours, theirs.greedy)
            if equal[name] < len(ours.greedy) and _gap(ours, theirs.greedy, equal[name]) > 2 * tolerance * scale:
                faults.append(f"{name}: greedy tokens are {theirs.greedy}, not {ours.greedy}")
    if faults:
        raise ExportError(f"the export does not match the model: {'; '.join(faults)}")
    return {
        "verified": True,
        "max_logit_difference": differences,
        "tolerance": tolerance,
        "prompts_equal": True,
        "greedy_tokens_equal": equal,
        "greedy_tokens": {name: len(ours.greedy) for name, ours in reference.asked.items()},
    }


def _equal_tokens(ours: Asked, theirs: list[int]) -> int:
    pairs = zip(ours.greedy, theirs)
    return next((place for place, (one, two) in enumerate(pairs) if one != two), min(len(ours.greedy), len(theirs)))


def _gap(ours: Asked, theirs: list[int], place: int) -> float:
    """How much more likely (in logits) our token is than theirs, at the first place where they differ."""
    if place >= len(theirs):
        return float("inf")  # they stopped, we went on
    logits = ours.steps[place]
    return float(logits[ours.greedy[place]] - logits[theirs[place]])


def answers_of(
    command: Callable[[Path, Path], list[str]], image: Image.Image, failure: str
) -> tuple[dict[str, Any], dict[str, Asked]]:
    """The probe's questions to a fresh process: what it says of itself, and its answers.

    Args:
        command: of the paths of the picture and of the safetensors file that it writes, with `NAME.ids`, `.logits`,
            `.greedy` of each prompt. It prints one JSON last: `prompts`, and `our_package` where that must be false.
        image: the picture.
        failure: how the message begins if the process fails.

    Raises ExportError with the last line of what the process said.
    """
    with TemporaryDirectory() as scratch:
        picture, out = Path(scratch) / "probe.png", Path(scratch) / "answers.safetensors"
        image.save(picture)
        # transformers copies a folder's code before it runs it: not to where older copies may lie.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        done = subprocess.run(command(picture, out), capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise ExportError(f"{failure}: {last[0]}")
        said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        tensors = load_file(str(out))
    if said.pop("our_package", False):
        raise ExportError("the check imported llava_train: it proves nothing")

    def asked(name: str, prompt: str) -> Asked:
        ids, logits, greedy = (tensors[f"{name}.{part}"] for part in ("ids", "logits", "greedy"))
        return Asked(prompt, ids.tolist(), logits, greedy.tolist(), torch.empty(0))

    return said, {name: asked(name, prompt) for name, prompt in said["prompts"].items() if prompt}


def ask_stock(
    folder: Path, image: Image.Image, python: str = sys.executable, trust_remote_code: bool = False
) -> tuple[dict[str, Any], dict[str, Asked]]:
    """The probe's questions to a folder as stock transformers loads it, in a fresh process without our package.

    Returns what the process says of itself (missing, unexpected, class, transformers) and its answers.
    Raises ExportError if it cannot load the folder.
    """
    flags = ["--trust-remote-code"] if trust_remote_code else []

    def command(picture: Path, out: Path) -> list[str]:
        # -I leaves the current folder and PYTHONPATH out.
        return [python, "-I", str(PROBE), str(folder.absolute()), str(picture), QUESTION, str(out), *flags]

    return answers_of(command, image, "stock transformers cannot load the export")


def verify(
    reference: Reference,
    folder: Path,
    tolerance: float,
    model_class: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare a folder, as stock transformers loads it, with the model it was made from.

    `model_class` is what it must be loaded as; by default what the model is. Raises ExportError naming what differs.
    """
    stock, found = ask_stock(folder, reference.image, trust_remote_code=trust_remote_code)
    expected = model_class or reference.model_class
    faults = [f"{kind} keys: {', '.join(stock[kind][:10])}" for kind in ("missing", "unexpected") if stock[kind]]
    if stock["class"] != expected:
        faults.append(f"it is loaded as a {stock['class']}, not a {expected}")
    report = compare(reference, found, tolerance, faults)
    loaded = f"transformers {stock['transformers']}: {stock['class']} in a fresh process"
    return {**report, "loaded_with": loaded}
