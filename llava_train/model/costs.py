"""What a model costs to compute: FLOPs of its parts, from the shapes of their weights. 1 MAC is 2 FLOP.

Counted are products of matrices alone: norms, activations, softmax and the optimizer are left out, as is usual for
model FLOPs utilisation. Dense decoders only: of a mixture of experts, every expert that is a linear layer is counted.

Shapes: P positions, V vision width times feature layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from llava_train.model.cross.blocks import Reading
from llava_train.model.families.table import family_of
from llava_train.model.towers.features import image_features

_LINEAR = ("aten.mm", "aten.addmm", "aten.convolution")
"""Operators of layers with weights; the others that are counted multiply activations with one another."""
_ADAPTERS = (".lora_A.default", ".lora_B.default")
"""How the names of LoRA's layers end"""


@dataclass(frozen=True)
class Work:
    """FLOPs of a forward pass through a part, or of a unit of it.

    Attributes:
        linear: products with weights that are no adapters.
        attention: products of activations with one another.
        adapters: products with LoRA weights.
    """

    linear: float = 0.0
    attention: float = 0.0
    adapters: float = 0.0

    @property
    def forward(self) -> float:
        """All of it."""
        return self.linear + self.attention + self.adapters

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """The sum with `times` the other's."""
        parts = ((self.linear, other.linear), (self.attention, other.attention), (self.adapters, other.adapters))
        return Work(*(one + times * two for one, two in parts))

    def needed(self, mode: str, below: bool) -> float:
        """Forward and backward where the part trains as `mode` says ("frozen", "lora" or "full").

        `below`: whether something trains that this part reads from. Gradients of inputs cost a forward pass of the
        linear layers and two of the attention, those of weights another one of what trains. That the lowest layer of
        the lowest part that trains needs no gradient of its input is not subtracted.
        """
        total = self.forward
        if below or mode != "frozen":
            total += self.linear + self.adapters + 2 * self.attention
        if mode == "full":
            total += self.linear
        if mode != "frozen":
            total += self.adapters
        return total


@dataclass(frozen=True)
class Counts:
    """What passed through the model, without padding.

    Attributes:
        tokens: positions of the decoder, those of images among them.
        pairs: (query, key) pairs of one decoder layer that its mask allows; T (T + 1) / 2 for a sample of T tokens.
        images: pictures that the tower saw.
        supervised: positions with a label.
    """

    tokens: float
    pairs: float
    images: float
    supervised: float


@dataclass(frozen=True)
class Costs:
    """FLOPs of a forward pass by unit.

    Attributes:
        token: linear layers of the decoder, a token.
        pair: attention of all decoder layers, a (query, key) pair.
        image: the tower up to the feature layer, an image.
        connector: the connector, an image.
        head: the LM head, a supervised position.
        looking: gated layers of cross-attention, a token; all tokens are taken to see a picture.
    """

    token: Work
    pair: float
    image: Work
    connector: Work
    head: float
    looking: Work = Work()

    @property
    def image_in_tokens(self) -> float:
        """How many tokens cost as much in the decoder's linear layers as an image in tower and connector (forward)."""
        return (self.image.forward + self.connector.forward) / self.token.forward

    @property
    def pair_in_tokens(self) -> float:
        """The same for a (query, key) pair."""
        return self.pair / self.token.forward


def costs_of(model: PreTrainedModel, image_size: int | None = None) -> Costs:
    """Costs of a model as it is, adapters included; its weights may be on the meta device.

    Call it before weights are spread over ranks. `image_size` in pixels, where it is not the tower's own. Of a family
    that is not `measured`, tower and connector count as nothing.
    """
    text = model.config.text_config
    layers = model.model.language_model.layers
    linear, adapters = _weights(layers)
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tower = connector = looking = Work()
    if family_of(model).measured:
        size = image_size or model.config.vision_config.image_size
        tower, features_1PV = _counted(model, image_features, (1, 3, size, size))
        shape = tuple(features_1PV.shape)
        connector, states_1PD = _counted(model, lambda whole, x: whole.model.multi_modal_projector(x), shape)
        if hasattr(model.model, "cross_attention"):
            looking, once = _looking(model, states_1PD.shape)
            connector = connector.plus(once)
    return Costs(
        token=Work(2.0 * linear, adapters=2.0 * adapters),
        pair=4.0 * text.num_attention_heads * head_width * len(layers),
        image=tower,
        connector=connector,
        head=2.0 * model.lm_head.weight.numel(),
        looking=looking,
    )


def _looking(model: PreTrainedModel, shape: torch.Size) -> tuple[Work, Work]:
    """All gated layers: a token that sees a picture, and a picture; `shape` is that of its states."""

    def call(whole: Any, hidden_1TD: torch.Tensor) -> torch.Tensor:
        states, pairs = hidden_1TD.new_empty(shape), torch.arange(hidden_1TD.shape[1])
        for block in whole.model.cross_attention:
            hidden_1TD = block(hidden_1TD, states, Reading(pairs, pairs[None], pairs))
        return hidden_1TD

    one, two = (_counted(model, call, (1, tokens, shape[-1]))[0] for tokens in (1, 2))
    return two.plus(one, -1), one.plus(one).plus(two, -1)


def step_flops(costs: Costs, counts: Counts, modes: Mapping[str, str]) -> dict[str, float]:
    """FLOPs that forward and backward need, by part ("vision", "connector", "llm", "head").

    `modes` says how "vision", "connector" and "llm" train. Needed: recompute, padding, and the tower's layers above
    the feature layer do not count, whether they were run or not.
    """
    vision, connector, llm = modes["vision"], modes["connector"], modes["llm"]
    under = vision != "frozen"
    inside = under or connector != "frozen"
    decoder = Work(costs.token.linear * counts.tokens, costs.pair * counts.pairs, costs.token.adapters * counts.tokens)
    head = Work(costs.head * counts.supervised)
    return {
        "vision": counts.images * costs.image.needed(vision, False),
        "connector": counts.images * costs.connector.needed(connector, under)
        + counts.tokens * costs.looking.needed(connector, inside or llm != "frozen"),
        "llm": decoder.needed(llm, inside),
        "head": head.needed("full" if llm == "full" else "frozen", inside or llm != "frozen"),
    }


def without_values(
    model: nn.Module, call: Callable[..., Any], *inputs: Any, dtypes: Mapping[str, torch.dtype], device: str = "cpu"
) -> tuple[Any, list[torch.Tensor]]:
    """`call(model, *inputs)` with weights and buffers of no values in place of the model's own: (result, weights).

    Inside a FakeTensorMode nothing is computed and nothing stored; the model may be on the meta device. Weights that
    `dtypes` does not name are float32; whether they train is as in the model.
    """
    named: dict[str, tuple[torch.Tensor, torch.dtype]] = {
        name: (tensor, dtypes.get(name, torch.float32)) for name, tensor in model.named_parameters()
    }
    named |= {name: (tensor, tensor.dtype) for name, tensor in model.named_buffers()}
    blank = {
        f"model.{name}": torch.empty(tensor.shape, dtype=dtype, device=device).requires_grad_(tensor.requires_grad)
        for name, (tensor, dtype) in named.items()
    }
    return functional_call(_Calling(model, call), blank, inputs), list(blank.values())


class _Calling(nn.Module):
    """A function of a model, as a module."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.model, *inputs)


def _counted(
    model: PreTrainedModel, call: Callable[..., torch.Tensor], shape: tuple[int, ...]
) -> tuple[Work, torch.Tensor]:
    """What torch counts while `call` handles an input of `shape`, and a result without values."""
    # Attention by its definition: not every fused kernel is one that torch counts.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result, _ = without_values(model, call, torch.empty(shape), dtypes={})
    counts = counter.get_flop_counts()
    linear = sum(flops for operator, flops in counts.get("Global", {}).items() if str(operator) in _LINEAR)
    adapters = sum(sum(flops.values()) for name, flops in counts.items() if name.endswith(_ADAPTERS))
    return Work(linear - adapters, counter.get_total_flops() - linear, adapters), result


def _weights(layers: nn.Module) -> tuple[int, int]:
    """Weights of the linear layers in `layers`: (those of the checkpoint, those of adapters). No biases."""
    sizes = {name: m.weight.numel() for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
    adapters = sum(size for name, size in sizes.items() if name.endswith(_ADAPTERS))
    return sum(sizes.values()) - adapters, adapters
