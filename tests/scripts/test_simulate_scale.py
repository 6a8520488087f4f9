"""The simulation deals as a run does, counts what it deals, and its formulas are those of its help."""

import json

import numpy as np
import pytest

from llava_train.data.micro_batches import Cut, Sizes, deal, positions_of
from scripts import simulate_scale
from scripts.simulate_scale import Case, Hardware, Model, as_they_come, counted, cuts, instructions, timed

MODEL = Model(100, {"instructions": 80}, 5, {"instructions": np.array([10.0, 0.01, 400.0, 1.0])}, 1e-3, 40.0)
FAST = Hardware(400.0, 10.0, 0.5, 1e3)


def rows_of(gpus: int, batch: int, per_image: float = 1.0) -> dict[str, dict]:
    sizes = instructions(4000, per_image)
    case = Case("instructions", sizes, MODEL, FAST, 2, 16)
    budget = int(18 * sizes.lengths.mean())
    return {way: case.row(way, cut, gpus, batch) for way, cut in cuts(MODEL, 16, budget, per_image > 1).items()}


def test_packed_steps_have_no_padding_and_keep_ranks_alike() -> None:
    rows = rows_of(16, 256)
    assert rows["packed"]["pad"] == 0 < rows["length"]["pad"] < rows["random"]["pad"] < 0.6
    assert rows["packed"]["round"] < 1.01 < 1.2 < min(rows["random"]["round"], rows["length"]["round"])
    assert 1.5 * rows["packed"]["compute"] < min(rows["random"]["compute"], rows["length"]["compute"])


def test_sharing_saves_pictures_and_splits_what_one_rank_would_wait_for() -> None:
    rows = rows_of(64, 256, 1.95)
    assert rows["shared"]["pad"] < -0.3
    assert 1.2 * rows["shared"]["compute"] < rows["packed"]["compute"]
    assert rows["shared"]["step"] < 1.4


def test_too_few_samples_are_filled_up() -> None:
    assert rows_of(16, 10)["packed"]["fill"] == rows_of(16, 10)["random"]["fill"] == 6
    assert [len(own) for own in as_they_come(list(range(10)), 4, 2)] == [2, 2, 2, 2]


def test_a_micro_batch_is_counted_by_hand() -> None:
    ones = np.ones(3, dtype=int)
    sizes = Sizes(
        np.array([12, 14, 5]), 2 * ones, np.array([1, 1, 0]), np.array([10, 10, 0]), ones, np.array([7, 7, 0])
    )
    assert counted((0, 1, 2), sizes, Cut(3)) == (3 * 14, 3 * 14 * 15 / 2, 2, 6)
    assert counted((0, 1, 2), sizes, Cut(3, budget=99)) == (31, 78 + 105 + 15, 2, 6)
    assert counted((0, 1, 2), sizes, Cut(3, budget=99, share=True)) == (21, 78 + 105 + 15 - 55, 1, 6)


def test_positions_are_those_that_training_reports() -> None:
    sizes = instructions(256, 1.95)
    for cut in (Cut(8), Cut(8, budget=6400, share=True)):
        dealt = deal(range(256), sizes, 4, cut)
        mine = sum(counted(each.samples, sizes, cut)[0] for own in dealt for each in own)
        assert mine == sum(positions_of(own, sizes, cut) for own in dealt)


def test_rings_by_hand() -> None:
    # 100 weights: 200 bytes gathered twice; 80 gradients of 4 bytes summed, under DDP for all ranks.
    assert FAST.ring(1000, 4) == pytest.approx(1000 * 3 / 4 / 400)
    assert FAST.ring(1000, 16, messages=2) == pytest.approx(1000 * 15 / 16 / 80 + 2 * 15 * 0.5)
    hops = (2 * 5 + 5 * 0.8) * 3 * 0.5
    assert FAST.gather(MODEL, 80, 4) == pytest.approx((400 + 320) * 3 / 4 / 400 + hops)
    assert FAST.reduce(80, 4) == pytest.approx(640 * 3 / 4 / 400)


def test_times_by_hand() -> None:
    # Rounds take 4 and 3 seconds, rank 1 six in all.
    row = timed(np.array([[4.0, 1.0], [3.0, 3.0]]), gather=3.5, reduce=5.0, samples=12)
    assert row["round"] == pytest.approx(7 / 5.5)
    assert row["step"] == pytest.approx(6 / 5.5)
    assert (row["compute"], row["gather"], row["zero3_bare"]) == (7, 7, 0.5)
    assert row["zero3_left"] == pytest.approx(1 - 7 / 7.5)
    assert row["zero3_rate"] == pytest.approx(12 / 2 / 7.5)
    assert row["ddp_bare"] == pytest.approx(5 / 11)
    assert row["ddp_rate"] == pytest.approx(12 / 2 / (6 + 5 - 3))


def test_the_command_ends_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpus", "8", "16", "--samples", "2000", "--steps", "1", "--grouped"]
    assert simulate_scale.main(arguments) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert figures["weights"] == pytest.approx(7.06e9, rel=0.01)
    assert figures["trained"]["captions"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    ways = {kind: [(row["gpus"], row["way"]) for row in rows] for kind, rows in figures["rows"].items()}
    assert ways["captions"] == [(gpus, way) for gpus in (8, 16) for way in ("random", "length", "packed")]
    assert ways["instructions"][3:4] == [(8, "shared")]
    # A sample of 600 tokens needs 16.3 teraflops in stage 1; two micro-batches of ranks that are alike.
    packed = figures["rows"]["captions"][2]
    assert packed["compute"] == pytest.approx(16 * 16.3e12 / (989e12 * 0.4), rel=0.02)
    assert sum("packed" in line for line in shown) == 6


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--mfu", "0"], "above 0"),
        (["--gpus", "8", "0"], "above 0"),
        (["--micro-batch-tokens", "900"], "longest sample"),
    ],
)
def test_what_cannot_be_is_told(wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        simulate_scale.main([*wrong, "--samples", "2000", "--data", "instructions"])
    assert said in f"{stopped.value}{capsys.readouterr().err}"
