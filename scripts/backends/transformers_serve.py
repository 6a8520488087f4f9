#!/usr/bin/env python3
"""An `hf` export behind `transformers serve`: a chat completion with a picture over HTTP, whole and streamed.

    python scripts/backends/transformers_serve.py --work runs/backends

Its environment has no torchvision: the command decodes pictures with torchvision's own codecs where that is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import FailedError, chat, environment, free_port, main, same_text, server, step
from transformers_stock import NEWEST, pins

MODELS = ("llama-clip", "qwen2-siglip")


def prove(work: Path, environments: Path) -> dict[str, Any]:
    """What the JSON says."""
    from models import answer_text, exported, make_model

    from llava_train.exporters.verify import GREEDY_TOKENS, QUESTION

    python = environment(environments, f"transformers-{NEWEST}", pins(NEWEST))
    answers = {}
    for name in MODELS:
        tiny = make_model(work, name)
        folder, port = exported(tiny), free_port()
        command = [python.parent / "transformers", "serve", folder, "--device", "cpu", "--dtype", "float32"]
        with server([*command, "--port", str(port)], port, work / f"serve-{name}.log") as address:
            for shown, image in (("image", tiny.reference.image), ("text", None)):
                wanted = answer_text(folder, tiny.reference.asked[shown].greedy)
                for stream in (False, True):
                    with step(f"{name}: {shown}{', streamed' * stream}"):
                        got = chat(address, str(folder), QUESTION, image, GREEDY_TOKENS, stream)
                    if not same_text(got, wanted):
                        raise FailedError(f"{name}, {shown}, stream={stream}: it says {got!r}, not {wanted!r}")
                answers[f"{name} {shown}"] = wanted
    return {"version": NEWEST, "equal_tokens": True, "answers": answers}


if __name__ == "__main__":
    sys.exit(main("transformers-serve", __doc__ or "", prove))
