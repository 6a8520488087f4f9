"""Every family of language models goes the whole way: assembled, trained, saved, loaded, asked.

Rows of `tiny.LLMS` read packed batches; those of `tiny.PADDED_LLMS` refuse them by name.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from llava_train import load_model, load_recipe
from llava_train.data.batch import BatchReader, ImageReader
from llava_train.data.micro_batches import Cut, deal
from llava_train.errors import RecipeError
from llava_train.inference import Prompt, answer, batch_inputs, message, read_pictures, shape_of, stop_ids
from llava_train.model.assemble import Assembly, with_spec
from llava_train.model.attention import use_packed_attention
from llava_train.model.checkpoint import WEIGHTS, save_model
from llava_train.model.costs import costs_of
from llava_train.model.memory import measure_kept
from llava_train.model.tuning import apply_tuning, is_adapter, part_of
from llava_train.training.material import prepare
from llava_train.training.objective import Objective
from llava_train.training.setup import build
from tests import tiny
from tests.model import measured
from tests.model.test_checkpoint import logits
from tests.model.test_memory import estimate, really, run_of
from tests.training.test_objective import assert_same, make_records

ROWS = list(range(8))


@pytest.fixture(scope="module", params=[*tiny.LLMS, *tiny.PADDED_LLMS])
def folder(request: pytest.FixtureRequest, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and its parts, with an LLM of the family that the folder is named for."""
    made = tmp_path_factory.mktemp("families") / request.param
    made.mkdir()
    for name in ("vision", "data"):
        (made / name).symlink_to(parts / name)
    tiny.make_llm(made / "llm", request.param)
    return made


@pytest.fixture(scope="module")
def assembly(folder: Path) -> Assembly:
    return build(load_recipe(tiny.make_recipe(folder)))


def tuned(folder: Path, mode: str) -> Assembly:
    """With every trained weight, adapters too, moved from where it began."""
    recipe = load_recipe(tiny.make_recipe(folder), [f"tune.llm.mode={mode}"])
    assembly = build(recipe)
    lora = apply_tuning(assembly.model, recipe.tune, recipe.seed)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in assembly.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    assembly.model.eval()
    assembly = with_spec(assembly, lora=lora)
    return with_spec(assembly, llm=replace(assembly.spec.llm, included=mode == "full"))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about pictures, some with the same beginning."""
    return make_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def material(folder: Path, records: Path):
    """The records as the family's own tokenizer has them."""
    recipe = load_recipe(tiny.make_recipe(folder, data__train=[{"path": str(records)}], data__validation_fraction=0.0))
    assembly = build(recipe)
    return prepare(recipe).train, ImageReader(shape_of(assembly.spec, assembly.image_processor))


def step(assembly: Assembly, material, cut: Cut, attention: str = "auto"):
    """Loss and gradients of a step of all that trains."""
    prepared, images = material
    objective, reader = Objective(assembly.model, attention=attention), BatchReader(prepared, images, 0, cut)
    objective.zero_grad()
    losses = [objective(reader(batch)) for batch in deal(ROWS, prepared.sizes, 1, cut)[0]]
    sum(losses).backward()
    named = assembly.model.named_parameters()
    return float(sum(losses).detach()), {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_text_logits_are_the_bare_llms(folder: Path, assembly: Assembly) -> None:
    """Bit for bit, over more tokens than a window holds, whatever the LLM does around its decoder and its head."""
    bare = AutoModelForCausalLM.from_pretrained(folder / "llm").eval()
    ids = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = assembly.model(input_ids=ids).logits, bare(input_ids=ids).logits
    assert torch.equal(ours[..., : theirs.shape[-1]], theirs)
    tied = assembly.model.lm_head.weight is assembly.model.get_input_embeddings().weight
    assert tied == bool(bare.config.tie_word_embeddings)


def test_a_packed_step_is_the_padded_one(folder: Path, assembly: Assembly, material) -> None:
    """Loss and all gradients, with beginnings shared and not, by every attention that runs on a CPU."""
    decoder = assembly.model.model.language_model
    expected = step(assembly, material, Cut(4))
    if folder.name in tiny.PADDED_LLMS:
        with pytest.raises(RecipeError, match=r"speed\.packing=false"):
            use_packed_attention(decoder)
        return
    use_packed_attention(decoder)
    for share in (False, True):
        for kind in ("blocks", "dense"):
            assert_same(expected, step(assembly, material, Cut(4, "tokens", 400, share), kind))


def test_lora_sits_on_the_decoders_linear_layers_alone_and_learns(folder: Path, material) -> None:
    recipe = load_recipe(tiny.make_recipe(folder))
    assembly = build(recipe)
    bare = AutoModelForCausalLM.from_pretrained(folder / "llm").get_decoder()
    linear = {name for name, module in bare.named_modules() if isinstance(module, nn.Linear)}
    lora = apply_tuning(assembly.model, recipe.tune, recipe.seed)
    assert len(linear) >= 4 * bare.config.num_hidden_layers
    assert {name.removeprefix("model.language_model.") for name in lora.targets} == linear
    trained = {name: p for name, p in assembly.model.named_parameters() if p.requires_grad}
    assert {part_of(name) for name in trained} == {"connector", "llm"}
    assert all(is_adapter(name) == (part_of(name) == "llm") for name in trained)

    cut = Cut(4)
    if folder.name in tiny.LLMS:
        use_packed_attention(assembly.model.model.language_model)
        cut = Cut(4, "tokens", 400, share=True)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss, gradients = step(assembly, material, cut)
        optimizer.step()
        losses.append(loss)
    assert gradients.keys() == trained.keys()
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients.values())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("mode", ["frozen", "full", "lora"])
def test_a_trained_model_comes_back(folder: Path, tmp_path: Path, mode: str) -> None:
    assembly = tuned(folder, mode)
    save_model(assembly, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(logits(loaded), logits(assembly))
    assert type(loaded.model.lm_head) is type(assembly.model.lm_head)
    tied = loaded.model.config.tie_word_embeddings
    assert (loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight) == tied
    kept = load_file(tmp_path / WEIGHTS).keys()
    assert ("lm_head.weight" in kept) == (mode == "full" and not tied)
    assert ("new_rows.embedding" in kept) == (mode != "full")


def test_answers_with_a_cache_are_those_without(folder: Path) -> None:
    """Greedy, longer than a window, one prompt padded beside another."""
    assembly = tuned(folder, "full")
    pixels = read_pictures(assembly, [Image.new("RGB", (30, 40), "red")])[0]
    asked = [
        Prompt((message("user", "What colour is it?", 1),), (pixels,)),
        Prompt((message("user", "Is there a triangle, or a red circle, in the picture? Say yes or no."),)),
    ]
    expected = []
    for prompt in asked:
        inputs, new = batch_inputs(assembly, [prompt]), []
        del inputs["attention_mask"]
        while len(new) < 12 and not (new and new[-1] in stop_ids(assembly)):
            with torch.no_grad():
                made = assembly.model(**inputs, use_cache=False).logits[0, -1]
            new.append(int(made.argmax()))
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([new[-1:]])], dim=1)
        expected.append(assembly.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert answer(assembly, asked, 12) == expected
    assert any(expected)


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("gemma2", "gpt-neox", "stablelm") else pytest.param(name, marks=pytest.mark.corpus)
        for name in [*tiny.LLMS, *tiny.PADDED_LLMS]
    ],
)
def test_memory_and_costs_are_known(family: str) -> None:
    _, config_class, sizes = {**tiny.LLMS, **tiny.PADDED_LLMS}[family]
    text = config_class(vocab_size=128, pad_token_id=0, **{**sizes, "hidden_size": 64, "intermediate_size": 160})
    vision = tiny.TOWERS["clip"][1](**tiny.TOWERS["clip"][2])
    model = measured.tuned(text, vision, {"connector": "full", "llm": "lora"}, packed=family in tiny.LLMS)
    run = run_of(model, "bf16")
    alive, positions = really(model, run, supervised=5)
    assert estimate(model, measure_kept(model, run), positions, 5) == pytest.approx(alive, rel=0.03)
    layers = model.model.language_model.layers
    base = [p.numel() for name, p in layers.named_parameters() if p.ndim == 2 and not is_adapter(name)]
    assert costs_of(model).token.linear == 2 * sum(base)
