#!/usr/bin/env python3
"""Compare our ids and labels with vectors that another implementation made.

    python scripts/compare_tokens.py VECTORS.jsonl TOKENIZER_DIR

Each line of the vectors: `{"template", "record", "input_ids", "labels"}`, where `template` is `v1`, `plain`
or `llava_llama_2`, `record` is LLaVA JSON, and an image is one -200. Prints JSON (`vectors`, `equal`,
`first_difference`) and exits 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llava_train.data.encode import Encoder, encode, expand
from llava_train.data.records.formats import parse_llava
from llava_train.data.templates.template import load_template
from llava_train.errors import DataError, LlavaTrainError
from llava_train.model.llm import add_image_token

OUR_NAME = {"v1": "vicuna_v1"}
"""The original's conversation names, where ours differ."""
ORIGINAL_IMAGE = -200


def compare(vectors: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Encode each record and count the vectors whose ids and labels are both equal."""
    add_image_token(tokenizer)
    equal, first = 0, None
    for number, vector in enumerate(vectors):
        difference = _difference(vector, tokenizer)
        equal += difference is None
        if difference and first is None:
            first = {"vector": number, "template": vector["template"], **difference}
    return {"vectors": len(vectors), "equal": equal, "first_difference": first}


def _difference(vector: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    template = load_template(OUR_NAME.get(vector["template"], vector["template"]))
    encoder = Encoder(tokenizer, template, image_tokens=1, max_length=1 << 20)
    try:
        ours = encode(parse_llava(vector["record"], "vector"), encoder)
    except DataError as error:
        return {"error": str(error)}
    expanded, labels = expand(ours.input_ids, ours.spans, ours.image_tokens, encoder.image_token_id)
    ids = [ORIGINAL_IMAGE if token == encoder.image_token_id else token for token in expanded.tolist()]
    for name, mine, theirs in (
        ("input_ids", ids, vector["input_ids"]),
        ("labels", labels.tolist(), vector["labels"]),
    ):
        if mine != theirs:
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
            return {"in": name, "at": at, "ours": mine[at : at + 8], "theirs": theirs[at : at + 8]}
    return None


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help="JSONL file of vectors")
    parser.add_argument("tokenizer", type=Path, help="folder with tokenizer.json")
    options = parser.parse_args(arguments)
    try:
        vectors = [json.loads(line) for line in options.vectors.read_text(encoding="utf-8").splitlines() if line]
        if not vectors:
            raise DataError(f"{options.vectors}: holds no vector")
        tokenizer = AutoTokenizer.from_pretrained(str(options.tokenizer))
    except (OSError, ValueError, LlavaTrainError) as error:
        print(f"compare_tokens: {error}", file=sys.stderr)
        return 2
    result = compare(vectors, tokenizer)
    print(json.dumps(result, ensure_ascii=False))
    return 0 if result["equal"] == result["vectors"] else 1


if __name__ == "__main__":
    sys.exit(main())
