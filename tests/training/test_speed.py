"""Each switch of `speed:` changes how fast a run is, and not where it goes."""

from pathlib import Path
from typing import Any

import pytest

from llava_train import load_recipe, train
from llava_train.errors import RecipeError
from llava_train.training.monitor import read_rows
from tests import tiny
from tests.training.test_objective import make_records

SWITCHES = {
    "padded": ["speed.packing=false"],
    "small micro-batches": ["speed.micro_batch_tokens=140"],
    "beginnings not shared": ["speed.share_prefix=false"],
    "dense": ["speed.attention=dense"],
    "plain optimizer": ["speed.fused_optimizer=false"],
    "all recomputed": ["speed.recompute=full"],
    "some recomputed": ["speed.recompute=selective"],
    "chosen by memory": ["speed.recompute=auto"],
    "compiled": ["speed.compile=true"],
}
"""Against the defaults, which are packed, shared, fused, nothing recomputed"""


@pytest.fixture(scope="module")
def place(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    for name in ("vision", "llm"):
        (folder / name).symlink_to(parts / name)
    (folder / "data").mkdir()
    tiny.make_recipe(
        folder,
        data__train=[{"path": str(make_records(folder / "data"))}],
        data__group_by_image=True,
        tune__llm={"mode": "full", "learning_rate": 0.01},
        optimization__global_batch_size=8,
        optimization__max_steps=3,
    )
    return folder


@pytest.fixture(scope="module")
def curve(place: Path) -> list[dict[str, Any]]:
    return run(place, "default", [])


def run(place: Path, name: str, overrides: list[str]) -> list[dict[str, Any]]:
    output = place / name.replace(" ", "-")
    train(load_recipe(place / "recipe.yaml", [f"output={output}", *overrides]))
    return read_rows(output / "metrics.jsonl")


@pytest.mark.parametrize(
    "switch",
    [
        pytest.param(name, marks=pytest.mark.corpus(reason="compiles C++")) if name == "compiled" else name
        for name in SWITCHES
    ],
)
def test_a_switch_changes_no_curve(place: Path, curve: list[dict[str, Any]], switch: str) -> None:
    made = run(place, switch, SWITCHES[switch])
    for one, other in zip(curve, made, strict=True):
        for key in one.keys() - {"positions", "seconds", "stall"}:
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
    positions = [sum(row.get("positions", 0) for row in rows) for rows in (curve, made)]
    if switch in ("padded", "beginnings not shared", "small micro-batches"):
        assert positions[0] < positions[1]
    else:
        assert positions[0] == positions[1]


def test_stall_is_a_share(curve: list[dict[str, Any]]) -> None:
    assert all(0 <= row["stall"] < 1 for row in curve if "stall" in row)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("speed.liger=true", "run on a GPU alone"),
        ("speed.micro_batch_tokens=20", "less than the longest sample"),
        ("speed.attention=varlen", "CUDA"),
        ("speed.attention=flex", "CUDA"),
    ],
)
def test_what_cannot_be_is_refused_by_name(place: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(place, "refused", [override])
    assert not (place / "refused" / "metrics.jsonl").exists()
