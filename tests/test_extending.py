"""docs/extending.md does what it says: its code is taken out of the page and run, in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_train.data.encode import Encoder, encode, expand
from llava_train.data.sample import Sample, Turn
from llava_train.data.templates.fit import resolve_template
from tests import tiny
from tests.conftest import REPOSITORY

GUIDE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
TRAIN = """
import sys
from pathlib import Path
from llava_train import load_model, load_recipe
from llava_train.training.run import train
from tests import tiny
folder = Path(sys.argv[1])
tiny.make_tower(folder / "vision", "ijepa")
recipe = tiny.make_recipe(
    folder,
    model__connector="gated",
    model__connector_options={"ratio": 3},
    model__vision_feature_select_strategy="full",
    optimization__max_steps=2,
)
model = load_model(train(load_recipe(recipe))).model
assert type(model.model.vision_tower).__name__ == "IJepaModel"
assert model.model.multi_modal_projector.gate.out_features == 3 * 32
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def test_a_new_encoder_and_a_new_connector_train(tmp_path: Path) -> None:
    code = "\n".join(block.replace("from __future__ import annotations\n", "") for block in blocks("python"))
    command = [sys.executable, "-c", code + TRAIN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_new_template_supervises_the_answer(tmp_path: Path) -> None:
    file = tmp_path / "zephyr.jinja"
    file.write_text(blocks("jinja")[0])
    tokenizer = tiny.make_tokenizer(tmp_path / "tokenizer")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    encoder = Encoder(tokenizer, resolve_template(str(file), tokenizer)[1], 1, 100)
    sample = Sample("a", (Turn("user", ("What?",)), Turn("assistant", ("A cat.",))))
    encoded = encode(sample, encoder)
    ids, labels = expand(encoded.input_ids, encoded.spans, (), encoder.image_token_id)
    assert tokenizer.decode(ids) == "<|user|>\nWhat?</s>\n<|assistant|>\nA cat.</s>\n"
    assert tokenizer.decode(labels[labels >= 0]) == "A cat.</s>"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:llava_train|tests)/[\w/]+(?:\.py|/))`", GUIDE))))
def test_every_place_that_it_names_is_there(path: str) -> None:
    assert (REPOSITORY / path).exists() or path == "llava_train/model/connectors/gated.py"
