"""What no recipe may say: values that are fine alone and wrong together, or out of range."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_train.recipe import DataSettings, ModelSettings, Recipe, SourceSettings


def contradictions(recipe: Recipe) -> list[tuple[tuple[str, ...], str]]:
    """Values that are fine alone and wrong together, or out of range: (key, what to do)."""
    model, data, tune, optimization = recipe.model, recipe.data, recipe.tune, recipe.optimization
    checks: list[tuple[bool, tuple[str, ...], str]] = [
        (not recipe.init_from and not model.vision, ("model", "vision"), "name a vision encoder or set init_from"),
        (not recipe.init_from and not model.llm, ("model", "llm"), "name a language model or set init_from"),
        *_model_faults(model, data),
        (
            tune.connector.layer_decay is not None,
            ("tune", "connector", "layer_decay"),
            "a connector has no such layers",
        ),
        *(
            fault
            for part, own in (("vision", tune.vision), ("llm", tune.llm))
            if own.layer_decay is not None
            for fault in (
                (not 0 < own.layer_decay <= 1, ("tune", part, "layer_decay"), "must be above 0 and at most 1"),
                (own.mode == "frozen", ("tune", part, "layer_decay"), "is for a part that trains; set its mode"),
            )
        ),
        (
            data.feature_cache and tune.vision.mode != "frozen",
            ("data", "feature_cache"),
            f"features are made once, of a frozen encoder: tune.vision.mode is {tune.vision.mode}",
        ),
        (tune.connector.mode == "lora", ("tune", "connector", "mode"), "a connector trains full or is frozen"),
        (
            {tune.vision.mode, tune.connector.mode, tune.llm.mode} == {"frozen"},
            ("tune",),
            "every part is frozen: nothing would train",
        ),
        (
            not 0 <= data.validation_fraction < 1,
            ("data", "validation_fraction"),
            "must be at least 0 and below 1",
        ),
        (
            bool(data.validation) and data.validation_fraction > 0,
            ("data", "validation_fraction"),
            "set either validation sources or a fraction, not both",
        ),
        (
            optimization.micro_batch_size > optimization.global_batch_size,
            ("optimization", "micro_batch_size"),
            f"larger than global_batch_size {optimization.global_batch_size}",
        ),
        (not 0 <= optimization.warmup_ratio < 1, ("optimization", "warmup_ratio"), "must be at least 0 and below 1"),
        (
            bool(recipe.engine.deepspeed_config) and recipe.engine.kind in ("ddp", "fsdp2"),
            ("engine", "deepspeed_config"),
            f"is not read by engine.kind {recipe.engine.kind}; name a deepspeed_zero kind, or auto",
        ),
        (
            recipe.engine.offload != "none" and not recipe.engine.kind.startswith("deepspeed"),
            ("engine", "offload"),
            f"is DeepSpeed's: engine.kind must be deepspeed_zero2 or deepspeed_zero3, not {recipe.engine.kind}",
        ),
        (
            recipe.engine.offload != "none" and recipe.engine.kind == "deepspeed_zero1",
            ("engine", "offload"),
            "needs deepspeed_zero2 or deepspeed_zero3",
        ),
        (
            recipe.engine.offload == "all" and recipe.engine.kind == "deepspeed_zero2",
            ("engine", "offload"),
            "the weights of ZeRO-2 stay on the device: offload the optimizer, or take deepspeed_zero3",
        ),
        (
            recipe.engine.kind == "fsdp2" and optimization.precision == "fp16",
            ("optimization", "precision"),
            "fsdp2 has no loss scale for fp16; use bf16",
        ),
        (
            not recipe.speed.packing and recipe.speed.micro_batch_tokens is not None,
            ("speed", "micro_batch_tokens"),
            "is for packed micro-batches; set speed.packing=true, or optimization.micro_batch_size instead",
        ),
        (not 0 <= tune.lora.dropout < 1, ("tune", "lora", "dropout"), "must be at least 0 and below 1"),
    ]
    positive = {
        ("data", "max_length"): data.max_length,
        ("optimization", "global_batch_size"): optimization.global_batch_size,
        ("optimization", "micro_batch_size"): optimization.micro_batch_size,
        ("optimization", "epochs"): optimization.epochs,
        ("optimization", "learning_rate"): optimization.learning_rate,
        ("optimization", "max_grad_norm"): optimization.max_grad_norm,
        ("tune", "lora", "r"): tune.lora.r,
        ("checkpoint", "keep_last"): recipe.checkpoint.keep_last,
        ("engine", "stall_seconds"): recipe.engine.stall_seconds,
    }
    checks += [(value <= 0, key, f"must be above 0, not {value}") for key, value in positive.items()]
    whole = {
        ("data", "num_workers"): data.num_workers,
        ("data", "prepare_workers"): data.prepare_workers,
        ("checkpoint", "save_every"): recipe.checkpoint.save_every,
        ("checkpoint", "keep_every"): recipe.checkpoint.keep_every,
        ("monitor", "eval_every"): recipe.monitor.eval_every,
    }
    checks += [(value < 0, key, f"must not be below 0, is {value}") for key, value in whole.items()]
    steps = optimization.max_steps
    checks.append((steps is not None and steps < 1, ("optimization", "max_steps"), f"must be above 0, not {steps}"))
    for part in ("train", "validation"):
        for index, source in enumerate(getattr(data, part)):
            checks += [(w, ("data", part, str(index), key), m) for w, key, m in _source_faults(source)]
    for index, source in enumerate(data.validation):
        shared = source.weight is not None or source.repeat != 1.0
        checks.append((shared, ("data", "validation", str(index)), "weight and repeat are for training; use cap"))
    return [(key, message) for wrong, key, message in checks if wrong]


def _model_faults(model: ModelSettings, data: DataSettings) -> list[tuple[bool, tuple[str, ...], str]]:
    tiled = model.image_aspect_ratio.startswith("anyres")
    points = model.image_grid_pinpoints or []
    return [
        (
            re.fullmatch(r"pad|square|crop|anyres|anyres_max_[1-9]\d?", model.image_aspect_ratio) is None,
            ("model", "image_aspect_ratio"),
            f"{model.image_aspect_ratio!r}: choose one of pad, square, crop, anyres, anyres_max_N (N tiles, e.g. 9)",
        ),
        (model.image_grid_pinpoints == [], ("model", "image_grid_pinpoints"), "is empty; remove it, or name sizes"),
        (bool(points) and not tiled, ("model", "image_grid_pinpoints"), "is for image_aspect_ratio anyres"),
        (
            any(len(point) != 2 or min(point) < 1 for point in points),
            ("model", "image_grid_pinpoints"),
            "must be pairs of height and width in pixels",
        ),
        (
            model.small_as_one_tile and not model.image_aspect_ratio.startswith("anyres_max_"),
            ("model", "small_as_one_tile"),
            "is for image_aspect_ratio anyres_max_N",
        ),
        (
            tiled and model.fusion != "tokens",
            ("model", "image_aspect_ratio"),
            "tiles are put together as tokens; with fusion cross_attention choose pad, square or crop",
        ),
        (
            bool(model.fusion_options) and model.fusion == "tokens",
            ("model", "fusion_options"),
            "are for fusion cross_attention",
        ),
        (tiled and data.feature_cache, ("data", "feature_cache"), "holds one square picture, not tiles"),
    ]


def _source_faults(source: SourceSettings) -> list[tuple[bool, str, str]]:
    return [
        (not source.path and not source.hub, "path", "name the files (path) or a dataset (hub)"),
        (bool(source.path) and bool(source.hub), "hub", "set either path or hub, not both"),
        (source.weight is not None and source.repeat != 1.0, "weight", "set either weight or repeat, not both"),
        (source.weight is not None and source.weight <= 0, "weight", "must be above 0"),
        (source.repeat <= 0, "repeat", "must be above 0"),
        (source.cap is not None and source.cap < 1, "cap", "must be at least 1"),
        (source.video_frames < 1, "video_frames", "must be at least 1"),
        (not 0 <= source.max_skipped <= 1, "max_skipped", "must be from 0 to 1"),
    ]
