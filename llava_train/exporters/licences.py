"""Licences of parts and data that models are often made of, as their publishers state them.

A table of facts for the model card: what is not in it, and brings no licence of its own, is called unknown.
"""

from __future__ import annotations

import re
from pathlib import Path

PARTS = (
    (r"openai/clip-", "MIT (the code's; the weights' card names none)"),
    (r"google/siglip", "Apache-2.0"),
    (r"facebook/dinov2", "Apache-2.0"),
    (r"facebook/dinov3", "DINOv3 License"),
    (r"laion/", "MIT"),
    (r"lmsys/vicuna-.*-v1\.5|meta-llama/Llama-2", "Llama 2 Community License"),
    (r"meta-llama/(Meta-)?Llama-3\.2", "Llama 3.2 Community License"),
    (r"meta-llama/(Meta-)?Llama-3\.1", "Llama 3.1 Community License"),
    (r"meta-llama/(Meta-)?Llama-3", "Meta Llama 3 Community License"),
    (r"llava-hf/llava-1\.5|liuhaotian/llava-v1\.5", "Llama 2 Community License"),
    (r"mistralai/Mistral-7B", "Apache-2.0"),
    (r"Qwen/Qwen2(\.5)?-(VL-)?(3B|72B)", "Qwen licence"),
    (r"Qwen/Qwen[23]", "Apache-2.0"),
    (r"google/gemma", "Gemma Terms of Use"),
    (r"microsoft/[Pp]hi", "MIT"),
    (r"HuggingFaceTB/SmolLM", "Apache-2.0"),
)
"""Pattern at the start of a hub id -> licence."""

DATA = (
    (r"blip_laion_cc_sbu_558k", "captions as CC-3M, LAION, SBU and BLIP; pictures only to reproduce the work"),
    (r"chat\.json|cc3m_595k", "captions as CC-3M and BLIP; pictures only to reproduce the work"),
    (r"llava_instruct_(150k|80k)|llava_v1_5_mix665k", "CC-BY-4.0 and OpenAI's terms of use; pictures: their owners'"),
    (r"sharegpt4v", "CC-BY-NC-4.0 and OpenAI's terms of use"),
    (r"llava_med", "CC-BY-NC-4.0 and OpenAI's terms of use, research only"),
    (r"slake", "CC-BY-4.0"),
    (r"vqa.?rad", "CC0-1.0"),
    (r"path.?vqa", "MIT; pictures belong to their publishers"),
    (r"easy.?vqa", "MIT"),
)
"""Pattern in the name of a file or a set on the hub, in small letters -> licence."""
UNKNOWN = "unknown: ask its source"


def part_licence(path: str) -> str:
    """Licence of an encoder or a language model by its hub id, or by the card in its folder.

    >>> part_licence("google/siglip-so400m-patch14-384")
    'Apache-2.0'
    """
    card = Path(path) / "README.md"
    if card.is_file():
        found = re.search(
            r"^license(?:_name)?:\s*([\w.+-]+)\s*$", card.read_text(encoding="utf-8", errors="replace"), re.M
        )
        if found and found[1] != "other":
            return found[1]
    return next((licence for pattern, licence in PARTS if re.match(pattern, path)), UNKNOWN)


def data_licence(name: str) -> str:
    """Licence of a set of records by its name."""
    return next((licence for pattern, licence in DATA if re.search(pattern, name.lower())), UNKNOWN)
