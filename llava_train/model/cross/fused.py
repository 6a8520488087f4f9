"""Pictures by cross-attention: gated blocks before some layers of a decoder, instead of tokens in its input.

Flamingo (arXiv 2204.14198) and Llama 3.2-Vision from parts: vision tower, connector and decoder are the stock ones and
keep their names. A block reads the connector's output and adds what it finds to the hidden states, times tanh(gate).
Gates begin at zero, where the model is the language model bit for bit. Positions that see no picture are left as they
were.

Shapes: B rows, T positions, D LLM width, I pictures of the batch in reading order, P positions of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

from llava_train.errors import CheckpointError, RecipeError
from llava_train.model.cross.blocks import GatedBlock, Reading, pictures_seen
from llava_train.model.screening import shown

OPTIONS: dict[str, int | None] = {"every": 4, "num_attention_heads": None, "feed_forward": 4}
"""`model.fusion_options`: a block before each `every`-th decoder layer (3, 7, 11, ...; 4 as in Flamingo-9B and
Llama 3.2-Vision), its heads (as many as the decoder's, and as wide), and the width of its feed-forward part in LLM
widths (4 as in Flamingo). At 7B these are eight blocks of 201M weights."""
_ARGUMENT = "pictures"
"""What the language model is called with, and hands on to its layers"""


@dataclass(frozen=True, eq=False)
class Pictures:
    """What the decoder's layers are called with: no module holds any of it.

    Attributes:
        blocks: by number of the layer that each one stands before.
        states: the connector's output, (I, P, D).
        reading: who sees which; None until it is known (`generate`).
        keys: of each block its `keys_values`, where they are made once for many calls.
        silent: see `GatedBlock.forward`.
    """

    blocks: Mapping[int, GatedBlock]
    states: torch.Tensor
    reading: Reading | None = None
    keys: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    silent: bool = False


def _before(
    number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook of decoder layer `number`: its block goes first; the layer itself sees nothing of pictures."""
    pictures: Pictures | None = kwargs.pop(_ARGUMENT, None)
    if pictures is not None and number in pictures.blocks:
        block = pictures.blocks[number]
        hidden = block(args[0], pictures.states, pictures.reading, pictures.keys.get(number), pictures.silent)
        args = (hidden, *args[1:])
    return args, kwargs


class CrossAttentionModel(LlavaModel):
    """LlavaModel whose pictures enter by `cross_attention`. `config.cross_attention` is that of `plan_blocks`."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        plan = config.cross_attention
        if plan["layers"] != sorted({*plan["layers"]} & {*range(config.text_config.num_hidden_layers)}):
            raise CheckpointError(
                f"config.json: cross_attention: layers: {shown(plan['layers'])}: not those of the LLM"
            )
        sizes = (plan["num_attention_heads"], plan["head_dim"], plan["feed_forward"])
        self.cross_attention = nn.ModuleList(GatedBlock(config.text_config.hidden_size, *sizes) for _ in plan["layers"])
        self.connect()
        self.post_init()

    def connect(self) -> None:
        """Let the layers of the language model call the blocks; once for each language model that is put in."""
        for number, layer in enumerate(getattr(self.language_model, "layers", None) or _deaf(self.language_model)):
            layer.register_forward_pre_hook(partial(_before, number), with_kwargs=True)

    @property
    def blocks(self) -> dict[int, GatedBlock]:
        """The blocks by number of the layer that each one stands before."""
        return dict(zip(self.config.cross_attention["layers"], self.cross_attention))

    def show(self, pixel_values: torch.Tensor) -> Pictures:
        """Pictures (I, 3, H, W) as the blocks read them, made once for any number of calls."""
        features = self.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        return self.read(torch.stack(tuple(features)))

    def read(self, pictures_IPD: torch.Tensor) -> Pictures:
        """The same from the connector's output."""
        states = pictures_IPD.to(self.language_model.dtype)
        return Pictures(self.blocks, states, keys={n: block.keys_values(states) for n, block in self.blocks.items()})

    def seen(self, input_ids: torch.Tensor | None, pictures: int) -> torch.Tensor:
        """`pictures_seen` of padded rows; ValueError where they do not show as many pictures as there are."""
        places = 0 if input_ids is None else int((input_ids == self.config.image_token_id).sum())
        if input_ids is None or places != pictures:
            raise ValueError(f"input_ids have {places} places for pictures, {pictures} were given")
        return pictures_seen(input_ids, self.config.image_token_id)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pictures: Pictures | None = None,
        seen: torch.Tensor | None = None,
        vision_feature_layer: None = None,
        vision_feature_select_strategy: None = None,
        image_sizes: None = None,
        mm_encoder_outputs: None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """As LlavaModel's, without the arguments of one call that the configuration decides.

        Args:
            input_ids: (B, T), one `<image>` a picture; or `inputs_embeds`.
            pixel_values: (I, 3, H, W) in reading order, with `input_ids`; ValueError where they do not fit.
            attention_mask: (B, T), 1 where a token stands.
            inputs_embeds: (B, T, D).
            pictures: instead of `pixel_values`: of `show` or `read`.
            seen: (B, T), see `pictures_seen`; by itself that of `input_ids`.
            kwargs: for the language model.
        """
        if pixel_values is not None:
            pictures = self.show(pixel_values)
        if pictures is not None:
            seen = self.seen(input_ids, len(pictures.states)) if seen is None else seen
            reading = Reading.of(seen, len(pictures.states))
            pictures = replace(pictures, reading=reading) if reading else None
        outputs = self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **kwargs,
            **({_ARGUMENT: pictures} if pictures else {}),
        )
        return LlavaModelOutputWithPast(**outputs)


class CrossAttentionForConditionalGeneration(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration around CrossAttentionModel."""

    def __init__(self, config: LlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = CrossAttentionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pictures: Pictures | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' `generate`; prompts may be left-padded, each with its own pictures in reading order.

        Pictures, in pixels or as of `CrossAttentionModel.read`, are looked at once. New tokens see what the last
        position of their prompt sees.
        """
        prompt = kwargs.pop("input_ids", inputs)
        if pixel_values is not None:
            pictures = self.model.show(pixel_values)
        if pictures is not None:
            kwargs |= {"pictures": pictures, "seen": self.model.seen(prompt, len(pictures.states))}
        return super().generate(prompt, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *, pictures: Any = None, seen: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What a step of `generate` calls `forward` with; `seen` as of the prompt."""
        made: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if pictures is None or seen is None:
            return made
        new = made["input_ids"].shape[1]
        grown = torch.cat([seen, seen[:, -1:].expand(-1, input_ids.shape[1] - seen.shape[1])], dim=1)
        return {**made, "pictures": pictures, "seen": grown[:, -new:]}


def decoder_inputs(
    model: CrossAttentionForConditionalGeneration,
    pictures_IPD: torch.Tensor,
    seen_BT: torch.Tensor,
    connected: bool = False,
) -> dict[str, Any]:
    """What the language model is called with, besides its usual arguments, to see pictures.

    Args:
        model: the model.
        pictures_IPD: the connector's output, in the precision of the embeddings.
        seen_BT: of `pictures_seen`; with -1 alone, `pictures_IPD` may be blank ones.
        connected: if no position sees a picture, run the blocks all the same and add nothing, so that all their
            weights and `pictures_IPD` have a gradient, of zero. Without it nothing is run then.
    """
    reading = Reading.of(seen_BT, len(pictures_IPD))
    if reading is None and not connected:
        return {}
    known = reading or Reading.first(len(pictures_IPD), pictures_IPD.device)
    return {_ARGUMENT: Pictures(model.model.blocks, pictures_IPD, known, silent=reading is None)}


def plan_blocks(text_config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """`config.cross_attention` for a decoder: numbers of the layers that have a block before them, and its sizes.

    Raises RecipeError for `options` that are not those of `OPTIONS`.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        known = ", ".join(OPTIONS)
        raise RecipeError(f"model.fusion_options: unknown option {', '.join(unknown)}; it takes {known}")
    heads = text_config.num_attention_heads
    chosen = {**OPTIONS, "num_attention_heads": heads, **options}
    for name, value in chosen.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RecipeError(f"model.fusion_options: {name}: {value!r}: must be a whole number from 1 on")
    layers, every = int(text_config.num_hidden_layers), chosen["every"]
    if every > layers:
        raise RecipeError(f"model.fusion_options: every: {every}: the language model has {layers} layers")
    return {
        "layers": list(range(every - 1, layers, every)),
        "num_attention_heads": chosen["num_attention_heads"],
        "head_dim": getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
        "feed_forward": chosen["feed_forward"],
    }


def complete_blocks(model: CrossAttentionForConditionalGeneration, seed: int | None) -> None:
    """Blocks for a model around whose empty ones (on the meta device) other parts were put, in place.

    They are drawn from `seed`, the same on every machine, with gates at zero; without a seed they stay empty, to be
    loaded. RecipeError for a decoder that does not let its layers see pictures.
    """
    if seed is not None:
        _require_arguments(model.model.language_model)
        deviation = float(getattr(model.config.text_config, "initializer_range", 0.02))
        _draw(model.model.cross_attention, deviation, seed)
    model.model.connect()


def _draw(blocks: nn.ModuleList, deviation: float, seed: int) -> None:
    """Fresh weights for empty blocks: float32, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    blocks.to_empty(device="cpu")
    for parameter_name, parameter in blocks.named_parameters():
        if parameter_name.endswith("_gate"):
            nn.init.zeros_(parameter)
        elif parameter_name.endswith("_norm.weight"):
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=deviation, generator=generator)


class _ArrivedError(Exception):
    """A layer was called with what the language model was called with."""


def _require_arguments(decoder: PreTrainedModel) -> None:
    """RecipeError for a decoder that keeps an argument from its layers. Nothing but its first layer's call is made."""

    def arrive(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args and _ARGUMENT in kwargs:
            raise _ArrivedError

    try:
        handle = decoder.layers[0].register_forward_pre_hook(arrive, with_kwargs=True, prepend=True)
        try:
            weight = next(decoder.parameters())
            embeddings = torch.zeros(1, 1, decoder.config.hidden_size, dtype=weight.dtype, device=weight.device)
            decoder(inputs_embeds=embeddings, use_cache=False, **{_ARGUMENT: ()})
        finally:
            handle.remove()
    except _ArrivedError:
        return
    except TypeError:  # it takes no further arguments
        pass
    _deaf(decoder)


def _deaf(decoder: nn.Module) -> NoReturn:
    raise RecipeError(f"model.fusion: {type(decoder).__name__} does not let its layers see pictures; set it to tokens")
