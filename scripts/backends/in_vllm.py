"""Started by vllm.py in vLLM's environment: answers questions with vLLM, offline.

Takes a JSON file, name -> `folder`, `picture`, `prompts` (`image` and `text`) and `processor` (its options); prints one
JSON, name -> prompt -> `prompt_ids`, `ids` and `steps`: for each token the likeliest ones with their log-probabilities.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import LLM, SamplingParams

TOKENS, TOP = 16, 5
LIMITS = {"image": 1, "video": 0}
"""An export has no part for videos; where a class could take them, vLLM would try one."""


def answer(folder: str, picture: str, prompts: dict[str, str], processor: dict[str, str]) -> dict[str, Any]:
    """The answers of one model."""
    model = LLM(
        folder,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        limit_mm_per_prompt=LIMITS,
        mm_processor_kwargs=processor,
    )
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=TOP)
    answers = {}
    for shown, prompt in prompts.items():
        given: dict[str, Any] = {"prompt": prompt}
        if shown == "image":
            given["multi_modal_data"] = {"image": Image.open(picture).convert("RGB")}
        result = model.generate([given], greedy, use_tqdm=False)[0]
        steps = [{token: each.logprob for token, each in step.items()} for step in result.outputs[0].logprobs]
        ids = {"prompt_ids": list(result.prompt_token_ids), "ids": list(result.outputs[0].token_ids)}
        answers[shown] = {**ids, "steps": steps}
    return answers


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps({name: answer(**each) for name, each in asked.items()}))
