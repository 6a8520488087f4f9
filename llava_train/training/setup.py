"""Everything of a run that stands before its first step: data, model, engine, plan, and what it goes on from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava_train.data.plan import Plan
from llava_train.data.templates.fit import resolve_template
from llava_train.inference import shape_of
from llava_train.model.assemble import Assembly, assemble, retile, see, with_spec
from llava_train.model.attention import use_packed_attention
from llava_train.model.checkpoint import Own, load_model, merged, own_layout, weights_digest
from llava_train.model.costs import Costs, Work, costs_of
from llava_train.model.families.table import FAMILIES
from llava_train.model.joining import fingerprint
from llava_train.model.kernels import compile_layers, use_liger
from llava_train.model.llm import load_tokenizer
from llava_train.model.memory import Conditions, measure_kept
from llava_train.model.originals.loading import require_frame
from llava_train.model.tuning import Group, apply_tuning, parameter_groups, planned_dtypes, tuning_table
from llava_train.recipe import Recipe
from llava_train.training.checkpoints.constants import constants_of, flatten
from llava_train.training.checkpoints.resuming import load_state, newest, require_same_run
from llava_train.training.engines.base import Engine
from llava_train.training.engines.choice import Load, device_memory, make_engine
from llava_train.training.engines.ranks import Ranks
from llava_train.training.features import with_features
from llava_train.training.material import Prepared, cut_of, plan_of, prepare_in_turn
from llava_train.training.objective import LOGITS_BYTES, Objective
from llava_train.training.parts import lacking_parts, processor_of, retiled
from llava_train.training.recompute import (
    Memory,
    MicroBatch,
    Spread,
    apply_recompute,
    plan_memory,
    resident_bytes,
)
from llava_train.training.state import RunState


@dataclass(frozen=True, eq=False)
class Setup:
    """A run that is ready for its next step.

    Attributes:
        engine: has the model in its hands.
        why: why it is this engine.
        assembly: the model with what belongs to it; its weights may be spread over ranks.
        layout: what of it a model folder holds.
        table: what trains, for the start.
        costs: FLOPs of the model's parts.
        memory: what the run needs, by estimate, where that decides what is recomputed.
        identity: what must not change on resume.
        state: where the run stands.
    """

    engine: Engine
    why: str
    assembly: Assembly
    layout: dict[str, Own]
    groups: list[Group]
    table: str
    prepared: Prepared
    plan: Plan
    costs: Costs
    memory: Memory | None
    identity: dict[str, Any]
    state: RunState


def set_up(
    recipe: Recipe,
    ranks: Ranks,
    folder: Path,
    allowed: Sequence[str] = (),
    before: int | None = None,
    fresh: bool = False,
) -> Setup:
    """Prepare, build, place, and go on from the newest checkpoint in `folder`. Writes nothing into it.

    With `before`, from the newest of a step before that one; `fresh` goes on from none. Every rank calls
    it. Raises what `train` raises.
    """
    prepared = prepare_in_turn(recipe, ranks)
    checkpoint = None if fresh else newest(folder, ranks, before)
    assembly = _tuned(recipe, build(recipe))
    identity = identity_of(recipe, prepared, assembly)
    if checkpoint is not None:
        require_same_run(checkpoint, identity, allowed)
    groups = parameter_groups(assembly.model, recipe.tune, recipe.optimization)
    costs = costs_of(assembly.model, assembly.spec.image_size)
    planned = planned_dtypes(assembly.model, recipe.optimization.precision)
    engine, why = make_engine(recipe, ranks, _load(assembly, planned))
    if recipe.data.feature_cache:
        prepared, costs = with_features(recipe, prepared, assembly, ranks), replace(costs, image=Work())
    dtypes = engine.dtypes(planned)
    layout = own_layout(assembly, dtypes)
    table = tuning_table(assembly.model, recipe.tune, groups, dtypes)
    memory = _sped_up(recipe, assembly, prepared, engine, dtypes)
    objective = Objective(
        assembly.model, engine.shards_weights, recipe.speed.attention, recipe.data.feature_cache
    ).train()
    engine.place(objective, dtypes)
    if recipe.speed.compile:
        compile_layers(assembly.model)
    engine.attach(objective, groups, recipe.optimization)
    state = load_state(checkpoint, engine, groups) if checkpoint is not None else RunState()
    plan = plan_of(recipe, prepared)
    return Setup(engine, why, assembly, layout, groups, table, prepared, plan, costs, memory, identity, state)


def build(recipe: Recipe) -> Assembly:
    """The model of a recipe: assembled from parts, or taken from `init_from` (its adapters folded in)."""
    if recipe.init_from:
        attention, parts = recipe.model.attn_implementation, lacking_parts(recipe)
        assembly = merged(load_model(recipe.init_from, torch.float32, attention, *parts))
        if assembly.spec.llm.kind == "llava" and weights_digest(recipe.init_from) is None:
            source = replace(assembly.spec.llm, fingerprint=fingerprint(assembly.model))
            assembly = with_spec(assembly, vision=source, llm=source)
        name, template = resolve_template(recipe.data.template, assembly.tokenizer)
        require_frame(assembly.tokenizer, template)
        spec, processor = retiled(recipe.model, assembly.spec, assembly.image_processor)
        if spec is not assembly.spec:
            assembly = retile(replace(assembly, spec=spec, image_processor=processor), recipe.seed)
        history = (*assembly.spec.history, recipe.init_from)
        assembly = with_spec(assembly, template=name, history=history)
        return replace(assembly, template=template)
    tokenizer = load_tokenizer(recipe.model.llm, recipe.model.llm_revision, recipe.model.trust_remote_code)
    name, template = resolve_template(recipe.data.template, tokenizer)
    processor = processor_of(recipe.model, see(recipe.model))
    return assemble(recipe.model, template, name, processor, recipe.seed)


def _tuned(recipe: Recipe, assembly: Assembly) -> Assembly:
    """Mark what trains; the parts that train in full become the model's own."""
    if recipe.speed.packing:
        use_packed_attention(assembly.model.model.language_model)
    lora = apply_tuning(assembly.model, recipe.tune, recipe.seed)
    spec = assembly.spec
    return with_spec(
        assembly,
        lora=lora,
        vision=replace(spec.vision, included=spec.vision.included or recipe.tune.vision.mode == "full"),
        llm=replace(spec.llm, included=spec.llm.included or recipe.tune.llm.mode == "full"),
    )


def _sped_up(
    recipe: Recipe, assembly: Assembly, prepared: Prepared, engine: Engine, dtypes: dict[str, torch.dtype]
) -> Memory | None:
    """Switch on what `speed` asks of a model before it is placed; the estimate, where recompute follows from one."""
    memory, setting = None, recipe.speed.recompute
    count = len(assembly.model.model.language_model.layers) if setting == "full" else 0
    if setting in ("auto", "selective") and not FAMILIES[assembly.spec.architecture].measured:
        count = len(assembly.model.model.language_model.layers)  # what it keeps is not known: as little as can be
    elif setting in ("auto", "selective"):
        memory = memory_of(recipe, assembly, prepared, engine, dtypes)
        count = memory.recomputed
    apply_recompute(assembly.model, count)
    if recipe.speed.liger:
        use_liger(assembly.model)
    return memory


def memory_of(
    recipe: Recipe, assembly: Assembly, prepared: Prepared, engine: Engine, dtypes: dict[str, torch.dtype]
) -> Memory:
    """What a process will need for the largest micro-batch, and how many layers are recomputed for it."""
    sizes, device = prepared.train.sizes, engine.ranks.device
    cut = cut_of(recipe, prepared.train)
    tokens = cut.budget or cut.size * int(sizes.lengths.max())
    images = math.ceil(tokens * float((sizes.images / sizes.lengths).max()))
    if not shape_of(assembly.spec, assembly.image_processor).separable:  # tiles: half of one may be padding
        images = math.ceil(2 * tokens / assembly.spec.image_tokens)
    logits = LOGITS_BYTES // (4 * assembly.model.lm_head.out_features)
    batch = MicroBatch(tokens, images, min(tokens, max(1, logits)))
    length = math.ceil(float(sizes.lengths.mean())) if cut.budget else int(sizes.lengths.max())
    seen, size = engine.seen(dtypes), assembly.spec.image_size
    conditions = Conditions(seen, engine.autocast, device.type, length, recipe.speed.attention, size)
    kept = measure_kept(assembly.model, conditions)
    spread = Spread(**dict.fromkeys(engine.spreads, engine.ranks.world_size))
    resident = resident_bytes(assembly.model, dtypes, spread)
    layers = len(assembly.model.model.language_model.layers)
    return plan_memory(recipe.speed.recompute, kept, layers, batch, resident, device_memory(device))


def _load(assembly: Assembly, dtypes: dict[str, torch.dtype]) -> Load:
    """What the model asks of memory."""
    named = dict(assembly.model.named_parameters())
    frozen = sum(p.numel() * dtypes[name].itemsize for name, p in named.items() if not p.requires_grad)
    return Load(frozen, sum(p.numel() for p in named.values() if p.requires_grad))


def identity_of(recipe: Recipe, prepared: Prepared, assembly: Assembly) -> dict[str, Any]:
    """What must not change on resume: see `constants_of`; of the data what is in them, not where they lie."""
    values: dict[str, Any] = {
        key: value for key, value in constants_of(recipe).items() if key not in ("data.train", "data.validation")
    }
    values["tokenizer"] = prepared.tokenizer
    values["weights"] = {"vision": assembly.spec.vision.fingerprint, "llm": assembly.spec.llm.fingerprint}
    if recipe.init_from:
        digest, whole = weights_digest(recipe.init_from), assembly.spec.llm.kind == "llava"  # the latter's is of it all
        values["weights"]["init_from"] = digest or (None if whole else fingerprint(assembly.model))
    values["data.train"] = prepared.train.contents
    values["data.mixture"] = [[s.weight, s.repeat, s.cap] for s in recipe.data.train]
    values["data.validation"] = prepared.validation.contents if prepared.validation else None
    return flatten(values)


def state_facts(setup: Setup) -> dict[str, Any]:
    """What state.json says beside the place of the run."""
    ranks = setup.engine.ranks
    return {
        "world_size": ranks.world_size,
        "engine": setup.engine.description,
        "scale": setup.engine.scale_state(),
        "identity": setup.identity,
    }
