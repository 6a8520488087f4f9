"""The recipe: what a run is, as frozen values read from YAML plus `key=value` overrides.

A recipe names only what differs from its `base:` (a path relative to the YAML file). The shape is the
dataclasses below; how YAML becomes them, and how every fault is reported at once, is `llava_train.parsing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from llava_train.contradictions import contradictions
from llava_train.errors import RecipeError
from llava_train.parsing import Fault, build, read_layers

Mode = Literal["frozen", "full", "lora"]


@dataclass(frozen=True)
class ModelSettings:
    """Which parts make the model. `vision` and `llm` are folders or hub ids; `llm` may be a GGUF file.

    Several `vision` encoders stand side by side: their features are joined position by position. `image_aspect_ratio`
    may also be `anyres` (tiles, LLaVA-NeXT) or `anyres_max_N` (LLaVA-OneVision); `image_grid_pinpoints` are then the
    sizes in pixels, height and width, that a picture is fitted into. `fusion: cross_attention` lets the decoder look at
    pictures through gated layers of its own instead of reading them as tokens.
    """

    vision: str | list[str] = ""
    llm: str = ""
    vision_revision: str | None = None
    llm_revision: str | None = None
    connector: str = "mlp2x_gelu"
    connector_options: dict[str, Any] = field(default_factory=dict)
    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    image_size: int | None = None
    image_aspect_ratio: str = "pad"
    image_grid_pinpoints: list[list[int]] | None = None
    small_as_one_tile: bool = False
    fusion: Literal["tokens", "cross_attention"] = "tokens"
    fusion_options: dict[str, Any] = field(default_factory=dict)
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SourceSettings:
    """One source of a mixture: files of records, and how they are treated. See docs/data.md.

    `path` is a file, a glob, `shard-{000..331}.tar`, a folder, or a URL that fsspec knows; `hub` a dataset id (or
    folder) for `datasets.load_dataset`. Image paths in records are relative to `image_root`.
    """

    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    name: str | None = None
    format: str = "auto"
    image_root: str | None = None
    template: str | None = None
    image_aspect_ratio: Literal["pad", "square", "crop"] | None = None
    exif_orientation: bool | None = None
    video_frames: int = 8
    weight: float | None = None
    repeat: float = 1.0
    cap: int | None = None
    policy: Literal["error", "skip"] = "error"
    max_skipped: float = 0.001
    duplicates: Literal["id", "content", "allow"] = "id"
    verify: Literal["none", "exists", "header", "decode"] = "header"
    allow_links: bool = False
    allow_http: bool = False


@dataclass(frozen=True)
class DataSettings:
    """What is trained on, and how a record becomes tokens. `prepare_workers` 0 is one a core.

    `feature_cache` sends each picture once through the frozen tower, before the first step, and keeps what comes out.
    `group_by_image` brings samples about one picture into the same step, where `speed.share_prefix` makes use of it.
    """

    template: str = "auto"
    train: list[SourceSettings] = field(default_factory=list)
    validation: list[SourceSettings] = field(default_factory=list)
    validation_fraction: float = 0.0
    max_length: int = 2048
    group_by_image: bool = False
    exif_orientation: bool = False
    cache_dir: str = "runs/prepared"
    feature_cache: bool = False
    prepare_workers: int = 0
    num_workers: int = 2


@dataclass(frozen=True)
class PartTuning:
    """How one part trains. Without a rate of its own it uses `optimization.learning_rate`.

    `layer_decay` multiplies the rate once for each layer further from the part's last one.
    """

    mode: Mode = "frozen"
    learning_rate: float | None = None
    layer_decay: float | None = None


@dataclass(frozen=True)
class LoraSettings:
    """LoRA on every linear layer of a part (defaults: LLaVA-1.5 `finetune_lora.sh`)."""

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05


@dataclass(frozen=True)
class TuneSettings:
    """What trains: a value a part, never a stage number."""

    vision: PartTuning = field(default_factory=PartTuning)
    connector: PartTuning = field(default_factory=lambda: PartTuning("full"))
    llm: PartTuning = field(default_factory=PartTuning)
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass(frozen=True)
class OptimizationSettings:
    """Steps, rates and numbers. A step is `global_batch_size` samples on any number of devices."""

    learning_rate: float = 1e-3
    global_batch_size: int = 256
    micro_batch_size: int = 8
    epochs: float = 1.0
    max_steps: int | None = None
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    loss_normalization: Literal["tokens", "samples", "micro_batch"] = "tokens"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"


@dataclass(frozen=True)
class SpeedSettings:
    """What makes a run faster and changes nothing of what it computes. See docs/performance.md.

    `packing` puts samples end to end instead of padding them; `micro_batch_tokens` is the most that a micro-batch then
    takes (null: `micro_batch_size` samples of the set's mean length). `share_prefix` computes a beginning that samples
    of a micro-batch have in common, their picture with it, once. `attention` is that of packed rows.
    """

    packing: bool = True
    micro_batch_tokens: int | None = None
    share_prefix: bool = True
    attention: Literal["auto", "blocks", "flex", "varlen", "dense"] = "auto"
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    fused_optimizer: bool = True
    compile: bool = False
    liger: bool = False


@dataclass(frozen=True)
class EngineSettings:
    """Who runs the step: `auto` takes the plainest engine that fits into memory (see `training/engines/choice.py`).

    `offload` moves the optimizer, or the weights as well, to the CPU (DeepSpeed). `stall_seconds` is how long a rank
    may keep the others waiting within a step before the run ends.
    """

    kind: Literal["auto", "ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"] = "auto"
    offload: Literal["none", "optimizer", "all"] = "none"
    deepspeed_config: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    stall_seconds: float = 52.0


@dataclass(frozen=True)
class CheckpointSettings:
    """When state is saved and how much of it is kept. `save_every` steps; 0 saves only the final model.

    Kept are the last `keep_last`, every `keep_every`-th step (0: none), and with `keep_best` that of the best
    validation loss. `asynchronous` writes beside the next steps; `remote` is a URL (s3://..., gs://...) that each
    checkpoint is copied to.
    """

    save_every: int = 500
    keep_last: int = 2
    keep_every: int = 0
    keep_best: bool = False
    asynchronous: bool = False
    remote: str | None = None


@dataclass(frozen=True)
class MonitorSettings:
    """What is reported, and where. `eval_every` steps; 0 evaluates only at the end."""

    eval_every: int = 500
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "llava_train"


@dataclass(frozen=True)
class Recipe:
    """One run: a stage is a recipe, not code."""

    name: str = "run"
    output: str = "runs/run"
    seed: int = 42
    init_from: str | None = None
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tune: TuneSettings = field(default_factory=TuneSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, as YAML and JSON hold them."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The resolved recipe: every key, no `base`; loading it gives this recipe again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its bases and `dotted.key=value` overrides.

    Raises RecipeError that lists every fault: unknown keys (with the nearest valid name), wrong types and
    contradictions, each with `file:line`.

    >>> load_recipe("configs/demo/stage1.yaml", ["seed=7"]).seed  # doctest: +SKIP
    7
    """
    values, places = read_layers(Path(path), overrides)
    faults: list[Fault] = []
    recipe = build(Recipe, values, (), places, faults)
    if not faults:
        faults = [Fault(key, message) for key, message in contradictions(recipe)]
    if faults:
        lines = [f"  {places.of(fault.key)}: {'.'.join(fault.key)}: {fault.message}" for fault in faults]
        count = f"{len(faults)} fault" + ("s" if len(faults) > 1 else "")
        raise RecipeError(f"{path}: {count} in the recipe\n" + "\n".join(lines))
    assert isinstance(recipe, Recipe)
    return recipe
