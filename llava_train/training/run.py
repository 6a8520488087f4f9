"""A run from its recipe: set up, train, leave a model behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from llava_train.data.preparing.composition import composition_table, epoch_line
from llava_train.errors import CheckpointError, RecipeError, StoppedError, StorageError, TrainingError
from llava_train.files import atomic_folder, ensure_space, flush, storage_faults, write_whole
from llava_train.model.checkpoint import model_entries, save_model
from llava_train.model.spec import MANIFEST
from llava_train.recipe import Recipe, load_recipe
from llava_train.tensorfile import in_file_order
from llava_train.training.checkpoints.constants import changed_keys, constants_of
from llava_train.training.checkpoints.manifest import steps_of
from llava_train.training.checkpoints.mirror import Mirror
from llava_train.training.checkpoints.resuming import forget
from llava_train.training.checkpoints.saving import Saver, sweep_unfinished
from llava_train.training.checkpoints.shards import shard_bytes
from llava_train.training.engines.choice import require_engine
from llava_train.training.engines.ranks import Ranks, join_ranks
from llava_train.training.failure import report_failure
from llava_train.training.lock import require_shared, sole_run
from llava_train.training.loop import Hooks, run_loop
from llava_train.training.material import course_of, epoch_of
from llava_train.training.monitor import METRICS, Monitor, read_rows, say, write_run_report
from llava_train.training.parts import fitted
from llava_train.training.setup import Setup, set_up, state_facts
from llava_train.training.signals import deferred_stop
from llava_train.training.state import RunState
from llava_train.training.watch import Limits, Watch, watching

RECIPE = "recipe.yaml"


def train(recipe: Recipe, fresh: bool = False, allowed: Sequence[str] = ()) -> Path:
    """Run a recipe to its end, from its newest checkpoint if it has one. Returns the run folder.

    `fresh` starts over, removing what the run folder holds of an earlier run; `allowed` names what may have changed
    since the checkpoint. Raises RecipeError, DataError, CheckpointError, StorageError or TrainingError.
    """
    recipe, folder = fitted(recipe), Path(recipe.output).expanduser()
    ranks = join_ranks(recipe)
    require_engine(recipe, ranks)
    limits = Limits(behind_s=recipe.engine.stall_seconds)
    with watching(ranks.rank, ranks.world_size, ranks.device, limits) as watch, sole_run(folder, ranks.is_main):
        with watch.patient():
            require_shared(folder, ranks)
            finished = ranks.agree(int(ranks.is_main and not fresh and _finished(recipe, folder, allowed)))
        if not finished:
            mirror = Mirror(folder, recipe.checkpoint)
            with watch.patient():
                setup = _open(recipe, ranks, folder, mirror, fresh, allowed)
            _train(recipe, setup, folder, mirror, watch)
    return folder


def _open(recipe: Recipe, ranks: Ranks, folder: Path, mirror: Mirror, fresh: bool, allowed: Sequence[str]) -> Setup:
    """All that comes before the first step."""
    if ranks.is_main:
        sweep_unfinished(folder)
        mirror.open(fresh)
    ranks.barrier()
    setup = set_up(recipe, ranks, folder, allowed, fresh=fresh)
    if ranks.is_main:
        if fresh:  # not before everything has been found good
            forget(folder)
        _announce(recipe, setup)
        _check_room(recipe, setup, folder)
        _write_recipe(folder, recipe)
    return setup


def _train(recipe: Recipe, setup: Setup, folder: Path, mirror: Mirror, watch: Watch) -> None:
    state, engine, ranks = setup.state, setup.engine, setup.engine.ranks
    course = course_of(recipe, setup.assembly, setup.prepared, setup.costs, ranks, state.step)
    monitor = Monitor(recipe, folder, setup.plan.total_steps, state.step, ranks.is_main)
    saver = Saver(folder, engine, recipe.checkpoint, partial(state_facts, setup), mirror)
    keep_best = partial(_write_model, setup, folder / "best")
    try:
        with deferred_stop() as stop:
            hooks = Hooks(saver, keep_best, stop, partial(report_failure, folder, ranks), watch)
            run_loop(recipe, engine, setup.groups, course, state, monitor, hooks)
    except (StoppedError, TrainingError):  # which every rank raises
        with watch.patient():
            with suppress(StorageError):  # it was said; the message is what ended the run
                mirror.wait()
            ranks.barrier()  # the others may not leave while rank 0 uploads
        raise
    finally:
        course.steps.close()  # its workers: an error that is kept would keep them, too, and the exit waits for them
        monitor.close()
    with watch.patient():
        _write_model(setup, folder / "final", state)
        if ranks.is_main:
            write_run_report(folder, recipe)
            mirror.wait()
            mirror.send_model(folder / "final")
        ranks.barrier()


def _finished(recipe: Recipe, folder: Path, allowed: Sequence[str]) -> bool:
    """Whether the run folder holds this very run, finished. Raises RecipeError where it holds another one.

    What may change on resume may differ here, too; a change that is `allowed` by name makes the run go on.
    """
    if not (folder / "final" / MANIFEST).is_file():
        return False
    before = constants_of(load_recipe(folder / RECIPE)) if (folder / RECIPE).is_file() else {}
    changed = changed_keys(before, constants_of(recipe))
    if changed and set(changed) <= set(allowed):
        return False
    if changed:
        raise RecipeError(
            f"{folder}: holds a finished run of another recipe ({', '.join(changed[:5])}); choose another output "
            "folder (output=...), start over with --fresh, or go on with --allow-change KEY"
        )
    rows = read_rows(folder / METRICS) if (folder / METRICS).is_file() else []
    if rows:
        write_run_report(folder, recipe)
    say(f"{folder}: finished at step {rows[-1]['step'] if rows else '?'}; nothing is left to do")
    return True


def _write_recipe(folder: Path, recipe: Recipe) -> None:
    text = recipe.to_yaml()
    with storage_faults(folder / RECIPE, len(text)):
        write_whole(folder / RECIPE, text)
        flush(folder)


def _announce(recipe: Recipe, setup: Setup) -> None:
    data, plan, engine = setup.prepared, setup.plan, setup.engine
    info = data.train.info
    say(setup.table)
    say(f"engine: {engine.description} on {engine.ranks.device.type}, precision {engine.precision} ({setup.why})")
    if setup.memory:
        say(str(setup.memory))
    say(composition_table(info))
    say(epoch_line(epoch_of(data)))
    say(
        f"data: {data.mixture.size:,} samples an epoch, {len(data.validation_rows):,} held out, "
        f"{info['mean_length']:.0f} tokens on average, {info['longest']} at most, "
        f"{info['truncated_samples']:,} truncated; {setup.assembly.spec.image_tokens} tokens an image"
    )
    pairs = sum(source["pairs"] for source in info["sources"])
    if pairs:
        say(f"data: {pairs:,} preference pairs: trained on the chosen answers")
    say(f"plan: {plan.total_steps:,} steps of {plan.global_batch_size} samples -> {recipe.output}")
    if setup.state.step:
        say(f"resuming after step {setup.state.step}")


def _check_room(recipe: Recipe, setup: Setup, folder: Path) -> None:
    """Before the first step: room for the checkpoints that will be kept, the best and the final model."""
    model = sum(entry.nbytes for entry in model_entries(setup.assembly, setup.layout)) + 20_000_000
    settings, total = recipe.checkpoint, setup.plan.total_steps
    kept = settings.keep_last + 1 + int(settings.keep_best)
    if settings.keep_every:
        kept += total // settings.keep_every
    saved = min(kept, -(-total // settings.save_every)) if settings.save_every else 0
    missing = max(0, saved - len(steps_of(folder)))
    needed = 3 * model + missing * shard_bytes(sum(group.size for group in setup.groups))
    ensure_space(folder, needed, f"this run ({missing} checkpoints, best and final model)")


def _write_model(setup: Setup, folder: Path, state: RunState) -> None:
    """Write the model; every rank helps to gather what is spread, rank 0 writes."""
    engine = setup.engine
    if not engine.ranks.is_main and not engine.saves:
        return  # rank 0 has every weight
    entries = model_entries(setup.assembly, setup.layout, engine.whole)
    if not engine.ranks.is_main:
        for entry in in_file_order(entries):
            entry.get()
        return
    try:
        with atomic_folder(folder) as temporary:
            save_model(setup.assembly, temporary, entries)
    except OSError as error:
        raise CheckpointError(f"{folder}: the model of step {state.step} cannot be written: {error}") from error
