import queue
import time
from pathlib import Path
from threading import Event

import pytest
import torch

from llava_train import load_model
from llava_train.data.pictures.images import open_image
from llava_train.inference import Prompt, answer, message, read_pictures
from llava_train.serving.batching import Engine, Job
from llava_train.serving.decoding import End, Failure, Piece, Sampling
from tests import tiny_vlms

WAIT_S = 60


class Listener:
    """What came of a job."""

    def __init__(self, engine: Engine, prompt: Prompt, sampling: Sampling, limit: int) -> None:
        self.events: queue.Queue = queue.Queue()
        self.job = Job(prompt, sampling, limit, self.events.put)
        self.engine = engine

    def submit(self) -> "Listener":
        self.engine.submit(self.job)
        return self

    def result(self) -> tuple[str, End | Failure]:
        text = ""
        while isinstance(event := self.events.get(timeout=WAIT_S), Piece):
            text += event.text
        return text, event


def prompts(assembly, folder: Path) -> list[Prompt]:
    """Other texts, other lengths, none to two pictures."""
    made = []
    for count, text in (
        (1, "What colour is it?"),
        (0, "Say yes."),
        (2, "Which one is red, the first one?"),
        (1, "Hm?"),
    ):
        pictures = read_pictures(assembly, [open_image(folder, f"{number}.png") for number in range(count)])
        made.append(Prompt((message("user", text, count),), pictures))
    return made


def steps_of(assembly, wait: Event | None = None) -> list[int]:
    """Rows of each forward pass from now on; each waits for an event, if there is one."""
    rows: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple, options: dict) -> None:
        given = options.get("input_ids")
        rows.append(len(given if given is not None else options["inputs_embeds"]))
        if wait is not None:
            assert wait.wait(WAIT_S)

    rows_hook = assembly.model.register_forward_pre_hook(count, with_kwargs=True)
    steps_of.hooks.append(rows_hook)
    return rows


steps_of.hooks = []


@pytest.fixture(autouse=True)
def _no_hooks_stay():
    yield
    while steps_of.hooks:
        steps_of.hooks.pop().remove()


@pytest.fixture
def engines():
    made: list[Engine] = []

    def make(assembly, max_batch: int) -> Engine:
        made.append(Engine(assembly, max_batch))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_together_as_alone_each_with_its_own_settings(kind: str, parts: Path, engines, request) -> None:
    assembly = request.getfixturevalue(kind)
    settings = [
        (Sampling(), 20),
        (Sampling(temperature=0.8, top_p=0.9, seed=5), 30),
        (Sampling(stops=("e",)), 40),
        (Sampling(temperature=1.0, seed=6, logprobs=1), 7),
    ]
    engine = engines(assembly, 4)
    jobs = list(zip(prompts(assembly, parts / "data"), settings))
    alone = [Listener(engine, prompt, *how).submit().result() for prompt, how in jobs]
    rows = steps_of(assembly)
    listeners = [Listener(engine, prompt, *how).submit() for prompt, how in jobs]
    assert [each.result() for each in listeners] == alone
    assert set(rows) == {4}
    assert len({text for text, _ in alone}) == 4
    assert alone[0][0] == answer(assembly, [jobs[0][0]], 20)[0]
    assert alone[2][1].reason == "stop" and "e" not in alone[2][0]


def test_models_that_do_not_mix_numbers_of_pictures(parts: Path, tmp_path: Path, engines) -> None:
    assembly = load_model(tiny_vlms.make_mllama(tmp_path / "mllama"))
    engine = engines(assembly, 4)
    asked = prompts(assembly, parts / "data")
    alone = [Listener(engine, prompt, Sampling(), 5).submit().result() for prompt in asked]
    rows = steps_of(assembly)
    listeners = [Listener(engine, prompt, Sampling(), 5).submit() for prompt in asked]
    assert [each.result() for each in listeners] == alone
    assert sorted({*rows}) == [1, 2]  # the two questions with one picture go together


def test_who_is_not_waited_for_frees_its_row(ours, parts: Path, engines) -> None:
    engine, wait = engines(ours, 2), Event()
    steps = steps_of(ours, wait)
    prompt = prompts(ours, parts / "data")[1]
    gone, stays, left, after = (Listener(engine, prompt, Sampling(), limit) for limit in (150, 4, 9, 3))
    for each in (gone, stays, left, after):
        each.submit()
    while not steps:
        time.sleep(0.01)
    engine.cancel(gone.job)
    engine.cancel(left.job)  # never begun
    assert engine.waiting == 1
    wait.set()
    assert stays.result()[1] == End("length", 4)
    assert after.result()[1] == End("length", 3)
    assert len(steps) <= 4 + 3  # 150 were asked for
    assert gone.events.empty() or isinstance(gone.events.get(), Piece)
    assert left.events.empty()


def test_a_batch_that_fails_is_not_the_last(ours, parts: Path, engines, capsys) -> None:
    engine = engines(ours, 2)
    prompt = prompts(ours, parts / "data")[1]
    hook = ours.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel")))
    text, event = Listener(engine, prompt, Sampling(), 3).submit().result()
    hook.remove()
    assert (text, event) == ("", Failure("the model failed: RuntimeError"))
    assert "no kernel" in capsys.readouterr().err
    assert Listener(engine, prompt, Sampling(), 3).submit().result()[1] == End("length", 3)


def test_draining_refuses_who_waits_and_cuts_who_is_late(ours, parts: Path, engines) -> None:
    engine, wait = engines(ours, 1), Event()
    steps = steps_of(ours, wait)
    prompt = prompts(ours, parts / "data")[1]
    running, waiting, late = (Listener(engine, prompt, Sampling(), 150) for _ in range(3))
    running.submit()
    while not steps:
        time.sleep(0.01)
    waiting.submit()
    engine.drain(0.0)
    assert waiting.result()[1].status == late.submit().result()[1].status == 503
    assert not engine.alive
    wait.set()
    assert running.result()[1] == Failure("the server is shutting down", 503)
    engine.close(WAIT_S)
    assert len(steps) < 150
