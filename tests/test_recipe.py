from pathlib import Path

import pytest

from llava_train import load_recipe
from llava_train.errors import RecipeError
from tests.conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml")) + sorted((REPOSITORY / "llava_train/demo").glob("*.yaml"))
COMPLETE = ["model.vision=v", "model.llm=l"]


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_config_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    overrides = COMPLETE if path.name in ("base.yaml", "stage1.yaml") else []
    recipe = load_recipe(path, overrides)
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_published_figures_of_llava_1_5_stage_2_lora() -> None:
    recipe = load_recipe(REPOSITORY / "configs/llava-1.5/13b-stage2-lora.yaml")
    assert recipe.model.vision == "openai/clip-vit-large-patch14-336"
    assert recipe.init_from == "runs/llava-1.5-13b-stage1"
    assert (recipe.tune.lora.r, recipe.tune.lora.alpha, recipe.tune.lora.dropout) == (128, 256, 0.05)
    assert (recipe.tune.llm.learning_rate, recipe.tune.connector.learning_rate) == (2e-4, 2e-5)
    assert (recipe.optimization.global_batch_size, recipe.optimization.warmup_ratio) == (128, 0.03)
    assert recipe.data.max_length == 2048
    assert recipe.engine.kind == "auto"


def test_all_faults_come_at_once_with_places_and_nearest_names(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model:\n  vision: v\n  llm: l\n  conector: linear\n"
        "optimization:\n  learning_rate: fast\n  epochs: [1]\n  schedule: cosinus\n"
        "data:\n  max_length: true\n  train: here\nsed: 1\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "7 faults" in message
    for expected in (
        ":4: model.conector: unknown key; did you mean 'connector'?",
        ":6: optimization.learning_rate: must be a number, not 'fast'",
        ":7: optimization.epochs",
        ":8: optimization.schedule: 'cosinus' is none of cosine, linear, constant",
        ":10: data.max_length: must be a whole number, not True",
        ":11: data.train: must be a list",
        ":12: sed: unknown key; did you mean 'seed'?",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "model.vision: name a vision encoder or set init_from"),
        ([*COMPLETE, "tune.connector.mode=frozen"], "every part is frozen"),
        ([*COMPLETE, "tune.connector.mode=lora"], "a connector trains full or is frozen"),
        ([*COMPLETE, "optimization.micro_batch_size=512"], "larger than global_batch_size 256"),
        ([*COMPLETE, "engine.kind=deepspeed"], "'deepspeed' is none of auto, ddp, deepspeed_zero1"),
        ([*COMPLETE, "engine.kind=ddp", "engine.deepspeed_config=x.json"], "is not read by engine.kind ddp"),
        ([*COMPLETE, "engine.offload=all"], "is DeepSpeed's"),
        ([*COMPLETE, "engine.kind=deepspeed_zero1", "engine.offload=optimizer"], "needs deepspeed_zero2 or"),
        ([*COMPLETE, "engine.kind=deepspeed_zero2", "engine.offload=all"], "the weights of ZeRO-2 stay on the device"),
        ([*COMPLETE, "engine.kind=fsdp2", "optimization.precision=fp16"], "no loss scale"),
        ([*COMPLETE, "engine.stall_seconds=0"], "must be above 0"),
        ([*COMPLETE, "checkpoint.keep_every=-1"], "must not be below 0"),
        ([*COMPLETE, "optimization.epochs=0"], "must be above 0"),
        ([*COMPLETE, "data.validation_fraction=0.1", "data.validation=[{path: x}]"], "not both"),
        ([*COMPLETE, "data.train=[{name: x}]"], r"data\.train\.0\.path: name the files \(path\) or a dataset"),
        ([*COMPLETE, "data.train=[{path: x, hub: y}]"], r"data\.train\.0\.hub: set either path or hub"),
        ([*COMPLETE, "data.train=[{path: x, weight: 2, repeat: 2}]"], "set either weight or repeat"),
        ([*COMPLETE, "data.train=[{path: x, repeat: 0}]"], r"data\.train\.0\.repeat: must be above 0"),
        ([*COMPLETE, "data.train=[{path: x}, {path: y, max_skipped: 2}]"], r"data\.train\.1\.max_skipped"),
        ([*COMPLETE, "data.train=[{path: x, repeat: .inf}]"], "must be a number"),
        ([*COMPLETE, "data.train=[{path: x, image_aspect_ratio: padd}]"], "must be pad, square, crop or nothing"),
        ([*COMPLETE, "data.prepare_workers=-1"], "must not be below 0, is -1"),
        ([*COMPLETE, "optimization.max_steps=0"], "must be above 0, not 0"),
        ([*COMPLETE, "data.train=[{path: x, policy: skp}]"], "'skp' is none of error, skip"),
        ([*COMPLETE, "data.validation=[{path: x, repeat: 2}]"], "weight and repeat are for training; use cap"),
    ],
)
def test_contradictions(tmp_path: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe(write(tmp_path, "name: x\n"), overrides)


def test_a_recipe_names_only_what_differs_from_its_base(tmp_path: Path) -> None:
    write(tmp_path, "seed: 5\nmodel: {vision: v, llm: l}\n", "base.yaml")
    recipe = load_recipe(write(tmp_path, "base: base.yaml\nmodel: {llm: other}\n"), ["optimization.learning_rate=2e-4"])
    assert (recipe.seed, recipe.model.vision, recipe.model.llm) == (5, "v", "other")
    assert recipe.optimization.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: recipe.yaml\n", "circle"),
        ("a: [\n", "not YAML"),
        ("- 1\n", "mapping"),
        ("base: nowhere.yaml\n", "nowhere.yaml"),
        ("base: 3\n", "base"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("override", ["seed", "=3", "seed.deep=1", "a=[", "data.train.0.path=x"])
def test_overrides_that_are_none(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, "seed: 1\nmodel: {vision: v, llm: l}\ndata: {train: []}\n"), [override])


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {vision: v, llm: l}\ndata: {train: [{path: a}]}\n")
    assert load_recipe(path, ["data.train.0.path=b"]).data.train[0].path == "b"


def test_a_section_changes_its_default_field_by_field(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "name: x\n"), [*COMPLETE, "tune.connector.learning_rate=1e-5"])
    assert (recipe.tune.connector.mode, recipe.tune.connector.learning_rate) == ("full", 1e-5)
