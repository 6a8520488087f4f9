"""Language models with real weights, from assets/ (scripts/get_offline_assets.py) or the folder LLAVA_TRAIN_ASSETS."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava_train import load_model, load_recipe
from llava_train.data.batch import BatchReader, ImageReader
from llava_train.data.micro_batches import Cut, deal
from llava_train.inference import shape_of
from llava_train.model.attention import use_packed_attention
from llava_train.model.checkpoint import save_model
from llava_train.model.llm import load_llm, load_tokenizer
from llava_train.model.tuning import apply_tuning
from llava_train.training.material import prepare
from llava_train.training.objective import Objective
from llava_train.training.setup import build
from tests import tiny
from tests.conftest import REPOSITORY
from tests.model.test_checkpoint import logits

ASSETS = Path(os.environ.get("LLAVA_TRAIN_ASSETS") or REPOSITORY / "assets")
ROWS = [0, 1, 2, 3]


@pytest.mark.corpus(reason="loads models of 135 and 270 million weights several times")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "asset"), [("smollm2", "smollm2-135m-instruct"), ("gemma3", "gemma3-270m")])
def test_a_real_llm_goes_the_whole_way(workplace: Path, tmp_path: Path, name: str, asset: str) -> None:
    file = ASSETS / asset / "model.gguf"
    if not file.is_file():
        pytest.skip(f"no {file}: python scripts/get_offline_assets.py --only {name}")
    pytest.importorskip("gguf")
    folder = tmp_path / "real"  # read in seconds, the GGUF file in a minute
    load_llm(str(file), "sdpa").save_pretrained(folder)
    load_tokenizer(str(file)).save_pretrained(folder)
    model = {"vision": str(workplace / "vision"), "llm": str(folder)}
    tune = {"llm": {"mode": "lora", "learning_rate": 1e-3}, "lora": {"r": 8, "alpha": 16, "dropout": 0.0}}
    recipe = load_recipe(tiny.make_recipe(workplace, model=model, tune=tune))
    assembly = build(recipe)

    bare = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = assembly.tokenizer("The capital of France is Paris, and that of Italy is", return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = assembly.model(input_ids=ids).logits, bare(input_ids=ids).logits
    assert torch.equal(ours[..., : theirs.shape[-1]], theirs)
    assert "Rome" in assembly.tokenizer.decode(theirs[0, -1].topk(3).indices)
    del bare

    attention = assembly.model.model.language_model.config._attn_implementation
    use_packed_attention(assembly.model.model.language_model)
    lora, prepared = apply_tuning(assembly.model, recipe.tune, recipe.seed), prepare(recipe).train
    images, cut = ImageReader(shape_of(assembly.spec, assembly.image_processor)), Cut(4, "tokens", 1000, share=True)
    (batch,) = map(BatchReader(prepared, images, 0, cut), deal(ROWS, prepared.sizes, 1, cut)[0])
    trained = [parameter for parameter in assembly.model.parameters() if parameter.requires_grad]
    optimizer, objective, losses = torch.optim.AdamW(trained, lr=1e-3), Objective(assembly.model), []
    for _ in range(3):
        loss = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert losses[2] < losses[1]

    assembly.model.eval()
    assembly.model.model.language_model.config._attn_implementation = attention
    saved = tmp_path / "saved"
    saved.mkdir()
    save_model(replace(assembly, spec=replace(assembly.spec, lora=lora)), saved)
    loaded = load_model(saved)
    assert torch.equal(logits(loaded), logits(assembly))
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
