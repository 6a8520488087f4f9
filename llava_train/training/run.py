"""A run from its recipe: prepare what it reads, build what it trains, train it, leave a model behind."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava_train.data.pictures.images import build_image_processor
from llava_train.data.plan import Plan
from llava_train.data.preparing.composition import composition_table, epoch_line
from llava_train.data.templates.fit import resolve_template
from llava_train.errors import CheckpointError, RecipeError
from llava_train.files import atomic_folder, ensure_space, sha256_json
from llava_train.model.assemble import Assembly, assemble, with_spec
from llava_train.model.checkpoint import load_model, merged, own_tensors, save_model
from llava_train.model.encoders import load_vision_config, vision_shape
from llava_train.model.llm import load_tokenizer
from llava_train.model.spec import MANIFEST
from llava_train.model.tuning import apply_tuning, cast_frozen, parameter_groups, tuning_table
from llava_train.recipe import Recipe
from llava_train.training.engine import Engine, make_engine
from llava_train.training.lock import sole_run
from llava_train.training.loop import Hooks, run_loop
from llava_train.training.material import Prepared, course_of, epoch_of, plan_of, prepare_in_turn
from llava_train.training.monitor import Monitor, say, write_run_report
from llava_train.training.objective import Objective
from llava_train.training.signals import deferred_stop
from llava_train.training.state import RunState, load_state, newest, retain, save_state, state_bytes


def train(recipe: Recipe, fresh: bool = False) -> Path:
    """Run a recipe to its end, from its newest checkpoint if it has one. Returns the run folder.

    `fresh` starts over, removing what the run folder holds of an earlier run. Raises RecipeError, DataError,
    CheckpointError, StorageError or TrainingError.
    """
    folder = Path(recipe.output).expanduser()
    engine = make_engine(recipe)
    if engine.is_main:
        ensure_space(folder, 1_000_000, "a run")
    with sole_run(folder, engine.is_main):
        _train(recipe, engine, folder, fresh)
    return folder


def _train(recipe: Recipe, engine: Engine, folder: Path, fresh: bool) -> None:
    _open_folder(folder, recipe, fresh, engine.is_main)
    engine.barrier()
    prepared = prepare_in_turn(recipe, engine)
    assembly, groups = _tune(recipe, build(recipe))
    plan = plan_of(recipe, prepared)
    if engine.is_main:
        _announce(recipe, engine, assembly, groups, prepared, plan)
        _check_room(recipe, assembly, groups, folder)
    optimization = recipe.optimization
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in groups],
        betas=(optimization.beta1, optimization.beta2),
        eps=optimization.epsilon,
    )
    engine.prepare(Objective(assembly.model).train(), optimizer)
    identity = _identity(recipe, prepared)
    state = load_state(folder, engine, groups, identity)
    if state.step and engine.is_main:
        say(f"resuming after step {state.step}")
    course = course_of(recipe, assembly, prepared, engine, state.step)
    monitor = Monitor(recipe, folder, plan.total_steps, state.step, engine.is_main)

    def save(now: RunState) -> None:
        save_state(folder, engine, groups, now, identity)
        if engine.is_main:
            retain(folder, recipe.checkpoint.keep_last)

    def keep_best(now: RunState) -> None:
        if engine.is_main:
            _write_model(assembly, folder / "best", now)

    try:
        with deferred_stop() as stop_asked:
            run_loop(recipe, engine, groups, course, state, monitor, Hooks(save, keep_best, stop_asked))
    finally:
        monitor.close()
    if engine.is_main:
        _write_model(assembly, folder / "final", state)
        write_run_report(folder, recipe)
    engine.barrier()
    engine.finish()


def build(recipe: Recipe) -> Assembly:
    """The model of a recipe: assembled from parts, or taken from `init_from` (its adapters folded in)."""
    if recipe.init_from:
        assembly = merged(load_model(recipe.init_from, torch.float32, recipe.model.attn_implementation))
        name, template = resolve_template(recipe.data.template, assembly.tokenizer)
        history = (*assembly.spec.history, recipe.init_from)
        assembly = with_spec(assembly, template=name, history=history)
        return replace(assembly, template=template)
    tokenizer = load_tokenizer(recipe.model.llm, recipe.model.llm_revision, recipe.model.trust_remote_code)
    name, template = resolve_template(recipe.data.template, tokenizer)
    config = load_vision_config(recipe.model.vision, recipe.model.vision_revision)
    size = vision_shape(config, recipe.model.image_size).image_size
    processor = build_image_processor(
        recipe.model.vision, recipe.model.image_aspect_ratio, size, recipe.model.vision_revision
    )
    return assemble(recipe.model, template, name, processor, recipe.seed)


def _open_folder(folder: Path, recipe: Recipe, fresh: bool, is_main: bool) -> None:
    """Make the run folder, or find it fit to continue."""
    if not is_main:
        return
    if fresh:
        for name in ("checkpoints", "final", "best", "metrics.jsonl"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if (folder / "final" / MANIFEST).is_file():
        raise RecipeError(
            f"{folder}: holds a finished run; choose another output folder (output=...) or start over with --fresh"
        )
    if (folder / "metrics.jsonl").exists() and newest(folder) is None:
        (folder / "metrics.jsonl").unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def _tune(recipe: Recipe, assembly: Assembly) -> tuple[Assembly, list[Any]]:
    """Mark what trains; the parts that train in full become the model's own."""
    if recipe.optimization.gradient_checkpointing:
        assembly.model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = apply_tuning(assembly.model, recipe.tune, recipe.seed)
    cast_frozen(assembly.model, recipe.optimization.precision)
    spec = assembly.spec
    spec = replace(
        spec,
        lora=lora,
        vision=replace(spec.vision, included=spec.vision.included or recipe.tune.vision.mode == "full"),
        llm=replace(spec.llm, included=spec.llm.included or recipe.tune.llm.mode == "full"),
    )
    return replace(assembly, spec=spec), parameter_groups(assembly.model, recipe.tune, recipe.optimization)


def _announce(recipe: Recipe, engine: Any, assembly: Assembly, groups: list[Any], data: Prepared, plan: Plan) -> None:
    info = data.train.info
    say(tuning_table(assembly.model, recipe.tune, groups))
    say(f"engine: {engine.description}")
    say(composition_table(info))
    say(epoch_line(epoch_of(data)))
    say(
        f"data: {data.mixture.size:,} samples an epoch, {len(data.validation_rows):,} held out, "
        f"{info['mean_length']:.0f} tokens on average, {info['longest']} at most, "
        f"{info['truncated_samples']:,} truncated; {assembly.spec.image_tokens} tokens an image"
    )
    pairs = sum(source["pairs"] for source in info["sources"])
    if pairs:
        say(f"data: {pairs:,} preference pairs: trained on the chosen answers")
    say(f"plan: {plan.total_steps:,} steps of {plan.global_batch_size} samples -> {recipe.output}")


def _check_room(recipe: Recipe, assembly: Assembly, groups: list[Any], folder: Path) -> None:
    """Before the first step: room for the checkpoints that will be kept, the best and the final model."""
    model = sum(tensor.nbytes for tensor in own_tensors(assembly).values()) + 20_000_000
    checkpoints = (recipe.checkpoint.keep_last + 1) * state_bytes(groups) if recipe.checkpoint.save_every else 0
    ensure_space(folder, 3 * model + checkpoints, "this run (checkpoints, best and final model)")


def _identity(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """What must not change on resume. Where it runs and what it reports may."""
    values = recipe.to_dict()
    for free in ("name", "output", "engine", "checkpoint", "monitor"):
        values.pop(free)
    for free in ("cache_dir", "prepare_workers", "num_workers", "train", "validation"):
        values["data"].pop(free)
    values["data.train"] = prepared.train.contents
    values["data.mixture"] = [[s.weight, s.repeat, s.cap] for s in recipe.data.train]
    values["data.validation"] = prepared.validation.contents if prepared.validation else None
    flat = _flatten(values)
    return {"recipe_sha256": sha256_json(flat), **flat}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _write_model(assembly: Assembly, folder: Path, state: RunState) -> None:
    try:
        with atomic_folder(folder) as temporary:
            save_model(assembly, temporary)
    except OSError as error:
        raise CheckpointError(f"{folder}: the model of step {state.step} cannot be written: {error}") from error
