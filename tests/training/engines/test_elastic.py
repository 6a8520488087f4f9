"""A run that moves between numbers of processes and engines sees the same samples and loses nothing."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from llava_train import load_recipe
from llava_train.model.checkpoint import WEIGHTS
from tests import tiny
from tests.training.engines.jobs import outcome
from tests.training.engines.launching import run_jobs
from tests.training.engines.test_engines import STAGES, assert_same_curve
from tests.training.test_run import rows_of

pytestmark = [
    pytest.mark.slow(reason="starts launchers with two and four processes"),
    pytest.mark.timeout(700),
]

# (processes, engine, last step before the stop): 1 -> 2 -> 4 -> 2 -> 1 over eight steps.
CHAINS = {
    "lora": [(1, "ddp", 2), (2, "deepspeed_zero2", 4), (4, "deepspeed_zero3", 6), (2, "ddp", 7), (1, "ddp", 8)],
    "full": [(1, "ddp", 1), (2, "fsdp2", 3), (4, "deepspeed_zero1", 5), (2, "deepspeed_zero3", 7), (1, "ddp", 8)],
}
ASYNCHRONOUS = {"full": ["checkpoint.asynchronous=true", "checkpoint.save_every=1"]}


@pytest.fixture(scope="module")
def place(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<chain>/` and `<chain>-alone/`: the runs of two chains, and what one process makes of the same recipes."""
    folder = tmp_path_factory.mktemp("elastic")
    for name in ("vision", "llm", "data"):
        (folder / name).symlink_to(parts / name)
    recipe = str(tiny.make_recipe(folder))

    def job(chain: str, output: str, *overrides: str, **more: object) -> dict:
        return {"recipe": recipe, "overrides": [f"output={folder}/{output}", *STAGES[chain], *overrides], **more}

    for chain in CHAINS:
        (folder / f"{chain}-alone").mkdir()
        assert outcome(job(chain, f"{chain}-alone", record=True)) == "done"
        (folder / chain).mkdir()
    for links in zip(*CHAINS.values()):
        jobs = [
            job(chain, chain, f"engine.kind={kind}", *ASYNCHRONOUS.get(chain, []), stop_after=last, record=True)
            for chain, (_, kind, last) in zip(CHAINS, links)
        ]
        ranks = links[0][0]
        done = run_jobs(jobs, ranks, folder) if ranks > 1 else [outcome(each) for each in jobs]
        assert done == ["stopped"] * len(jobs), links
        for chain in CHAINS:
            keep_ids(folder / chain, ranks)
    return folder


def keep_ids(run: Path, ranks: int) -> None:
    """Add the steps of one launch to the run's own list, the samples of all ranks together."""
    files = [run / f"ids-{rank}.jsonl" for rank in range(ranks)]
    with (run / "ids.jsonl").open("a") as stream:
        for lines in zip(*(file.read_text().splitlines() for file in files)):
            stream.write(json.dumps(sorted(name for line in lines for name in json.loads(line))) + "\n")
    for file in files:
        file.unlink()


@pytest.mark.parametrize("chain", CHAINS)
def test_samples_losses_and_weights_are_those_of_one_process(place: Path, chain: str) -> None:
    keep_ids(place / f"{chain}-alone", 1)
    wanted = (place / f"{chain}-alone" / "ids.jsonl").read_text()
    assert (place / chain / "ids.jsonl").read_text() == wanted
    assert len(wanted.splitlines()) == 8
    one = [row for row in rows_of(place / f"{chain}-alone") if "loss" in row]
    assert_same_curve(one, [row for row in rows_of(place / chain) if "loss" in row])
    assert outcome({"recipe": str(place / "recipe.yaml"), "overrides": overrides(place, chain)}) == "done"
    final = load_file(place / chain / "final" / WEIGHTS)
    for key, tensor in load_file(place / f"{chain}-alone" / "final" / WEIGHTS).items():
        assert_close(final[key], tensor, rtol=1e-4, atol=2e-6)


def overrides(place: Path, chain: str) -> list[str]:
    return [f"output={place / chain}", *STAGES[chain]]


def test_the_stopped_run_names_its_engine(place: Path) -> None:
    states = sorted((place / "full" / "checkpoints").glob("step-*/state.json"))
    assert json.loads(states[-1].read_text())["engine"] == "one process"
    assert load_recipe(place / "full" / "recipe.yaml").engine.kind == "auto"
