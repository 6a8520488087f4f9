import hashlib
import os
import re
from pathlib import Path

import pytest

from llava_train import load_recipe, train
from llava_train.errors import RecipeError
from llava_train.training.lock import require_shared, sole_run
from tests import tiny
from tests.training.threaded import together


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_run_on_a_folder_is_refused_and_touches_nothing(workplace: Path, fresh: bool) -> None:
    recipe = load_recipe(tiny.make_recipe(workplace), ["optimization.max_steps=2"])
    run = train(recipe)
    before = contents(run)
    with sole_run(run, is_main=True):
        held = contents(run)
        with pytest.raises(
            RecipeError, match=rf"another run \(process {os.getpid()} on .*, since .*\) is at work here"
        ):
            train(recipe, fresh=fresh)
        assert contents(run) == held
    assert {name: held[name] for name in before if name != ".lock"} == {n: v for n, v in before.items() if n != ".lock"}
    with pytest.raises(RecipeError, match="holds a finished run of another recipe"):
        train(load_recipe(tiny.make_recipe(workplace), ["optimization.max_steps=3"]))


def test_other_ranks_do_not_lock(tmp_path: Path) -> None:
    with sole_run(tmp_path / "run", is_main=True), sole_run(tmp_path / "run", is_main=False):
        pass
    with sole_run(tmp_path / "run", is_main=True):
        pass


def test_ranks_that_share_a_folder_go_on(tmp_path: Path) -> None:
    assert together(3, lambda ranks: require_shared(tmp_path, ranks)) == [None] * 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["", "17"])
def test_a_rank_that_sees_another_folder_stops_them_all(tmp_path: Path, left: str) -> None:
    """Three ranks, of which the last sees another disk under the name; an earlier run may have left its mark there."""
    folders = [tmp_path / "shared", tmp_path / "shared", tmp_path / "own"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    if left:
        (tmp_path / "own" / ".shared").write_text(left)
    found = together(3, lambda ranks: require_shared(folders[ranks.rank], ranks))
    assert all(isinstance(fault, RecipeError) for fault in found)
    for fault in found[:2]:
        assert re.fullmatch(rf"{tmp_path}/shared: is not one folder for all ranks; put `output` .*", str(fault))
    assert f"{tmp_path}/own: is not one folder for all ranks (rank 2 on " in str(found[2])
    assert list((tmp_path / "shared").iterdir()) == []
