"""Plain vision transformers of open_clip and timm, weight by weight, and transformers' class for each.

Shapes: P positions, V width, M width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Plain:
    """A transformer whose layers are norm, attention, norm, MLP, and nothing else.

    Attributes:
        patch: convolution, weight (V, 3, p, p) and perhaps bias.
        cls: (V,), or None.
        positions: (P, V), CLS first.
        before: norm before the layers, or None.
        layers: each with ln1, ln2, q, k, v, out, fc1, fc2 (`.weight`, `.bias`).
        after: norm after the layers, or None where it is none of this width.
        head: SigLIP's pooling head as SiglipVisionModel names it, or None.
        heads, eps, activation: as a configuration of transformers says them.
    """

    patch: Weights
    cls: torch.Tensor | None
    positions: torch.Tensor
    before: Weights | None
    layers: list[Weights]
    after: Weights | None
    head: Weights | None
    heads: int
    eps: float
    activation: str


def plain_of(visual: nn.Module) -> Plain | None:
    """The weights of one of open_clip's vision towers, or None where it is no plain transformer."""
    trunk = getattr(visual, "trunk", visual)
    kind = f"{type(trunk).__module__}.{type(trunk).__name__}"
    try:
        if kind == "open_clip.transformer.VisionTransformer":
            return _open_clip(trunk)
        if kind == "timm.models.vision_transformer.VisionTransformer":
            return _timm(trunk)
    except _OtherError:
        pass
    return None


def to_stock(plain: Plain, image_size: int) -> Any:
    """transformers' model with these weights, or None where no class computes the same."""
    width, middle = plain.positions.shape[1], plain.layers[0]["fc1.weight"].shape[0]
    sizes = {
        "hidden_size": width,
        "intermediate_size": middle,
        "num_hidden_layers": len(plain.layers),
        "num_attention_heads": plain.heads,
        "image_size": image_size,
        "patch_size": plain.patch["weight"].shape[-1],
        "layer_norm_eps": plain.eps,
        "hidden_act": plain.activation,
    }
    if plain.cls is not None and plain.before is not None and "bias" not in plain.patch:
        model, state = CLIPVisionModel(CLIPVisionConfig(**sizes)), _clip(plain)
    elif plain.cls is not None and plain.before is None:
        model, state = ViTModel(ViTConfig(**sizes)), _vit(plain)
    elif plain.cls is None and plain.before is None:
        config = SiglipVisionConfig(**sizes, vision_use_head=plain.head is not None)
        model, state = SiglipVisionModel(config), _siglip(plain)
    else:
        return None
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    return model.eval()


class _OtherError(Exception):
    """The tower has something that a plain transformer does not."""


def _need(fits: bool) -> None:
    if not fits:
        raise _OtherError


def _activation(module: nn.Module) -> str:
    if isinstance(module, nn.GELU):
        return "gelu_pytorch_tanh" if module.approximate == "tanh" else "gelu"
    known = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"}
    _need(type(module).__name__ in known)
    return known[type(module).__name__]


def _of(module: nn.Module) -> Weights:
    return {name: tensor.detach() for name, tensor in module.named_parameters()}


def _named(**modules: nn.Module) -> Weights:
    return {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in _of(module).items()}


def _thirds(names: str, weight: torch.Tensor, bias: torch.Tensor) -> Weights:
    """Stacked projections apart."""
    parts = zip(names, weight.detach().chunk(3), bias.detach().chunk(3))
    return {key: tensor for name, w, b in parts for key, tensor in ((f"{name}.weight", w), (f"{name}.bias", b))}


def _scaled(layer: Weights, name: str, scale: Any) -> None:
    """A layer scale, or none, folded into the product before it."""
    if isinstance(scale, nn.Identity):
        return
    layer[f"{name}.weight"] = layer[f"{name}.weight"] * scale.gamma.detach()[:, None]
    layer[f"{name}.bias"] = layer[f"{name}.bias"] * scale.gamma.detach()


def _same(values: set[Any]) -> Any:
    _need(len(values) == 1)
    return values.pop()


def _open_clip(tower: Any) -> Plain:
    blocks = list(tower.transformer.resblocks)
    _need(all(type(block).__name__ == "ResidualAttentionBlock" and not hasattr(block, "ln_1_kv") for block in blocks))
    layers = []
    for block in blocks:
        layer = _named(
            ln1=block.ln_1, ln2=block.ln_2, out=block.attn.out_proj, fc1=block.mlp.c_fc, fc2=block.mlp.c_proj
        )
        layer |= _thirds("qkv", block.attn.in_proj_weight, block.attn.in_proj_bias)
        _scaled(layer, "out", block.ls_1)
        _scaled(layer, "fc2", block.ls_2)
        layers.append(layer)
    before = None if isinstance(tower.ln_pre, nn.Identity) else tower.ln_pre
    after = _of(tower.ln_post) if tower.attn_pool is None else None
    norms = [norm for block in blocks for norm in (block.ln_1, block.ln_2)] + ([before] if before else [])
    return Plain(
        patch=_of(tower.conv1),
        cls=tower.class_embedding.detach(),
        positions=tower.positional_embedding.detach(),
        before=_of(before) if before else None,
        layers=layers,
        after=after,
        head=None,
        heads=_same({block.attn.num_heads for block in blocks}),
        eps=_same({norm.eps for norm in norms}),
        activation=_same({_activation(block.mlp.gelu) for block in blocks}),
    )


def _timm(tower: Any) -> Plain:
    blocks, plain = list(tower.blocks), {"Block", "Attention", "Mlp", "LayerNorm"}
    for block in blocks:
        kinds = {type(each).__name__ for each in (block, block.attn, block.mlp, block.norm1, block.norm2)}
        extras = [getattr(block.attn, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
        extras.append(getattr(block.mlp, "norm", None))
        _need(kinds <= plain and all(each is None or isinstance(each, nn.Identity) for each in extras))
        _need(block.attn.qkv.bias is not None and block.attn.proj.in_features == block.attn.qkv.in_features)
    _need(tower.pos_embed is not None and not tower.num_reg_tokens and isinstance(tower.patch_embed.norm, nn.Identity))
    _need(not (tower.no_embed_class and tower.has_class_token))
    layers = []
    for block in blocks:
        layer = _named(ln1=block.norm1, ln2=block.norm2, out=block.attn.proj, fc1=block.mlp.fc1, fc2=block.mlp.fc2)
        layer |= _thirds("qkv", block.attn.qkv.weight, block.attn.qkv.bias)
        _scaled(layer, "out", block.ls1)
        _scaled(layer, "fc2", block.ls2)
        layers.append(layer)
    before = None if isinstance(tower.norm_pre, nn.Identity) else tower.norm_pre
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)] + ([before] if before else [])
    return Plain(
        patch=_of(tower.patch_embed.proj),
        cls=tower.cls_token.detach()[0, 0] if tower.has_class_token else None,
        positions=tower.pos_embed.detach()[0],
        before=_of(before) if before else None,
        layers=layers,
        after=None if isinstance(tower.norm, nn.Identity) else _of(tower.norm),
        head=_pooling(tower.attn_pool) if type(tower.attn_pool).__name__ == "AttentionPoolLatent" else None,
        heads=_same({block.attn.num_heads for block in blocks}),
        eps=_same({norm.eps for norm in norms}),
        activation=_same({_activation(block.mlp.act) for block in blocks}),
    )


def _pooling(pool: Any) -> Weights | None:
    """timm's attention pooling as SiglipVisionModel's head; None where it pools in another way."""
    if pool.pos_embed is not None or pool.latent_len != 1 or pool.mlp is None or isinstance(pool.q, nn.Identity):
        return None
    return {
        "probe": pool.latent.detach(),
        "attention.in_proj_weight": torch.cat([pool.q.weight, pool.kv.weight]).detach(),
        "attention.in_proj_bias": torch.cat([pool.q.bias, pool.kv.bias]).detach(),
        **_named(**{"attention.out_proj": pool.proj, "layernorm": pool.norm, "mlp.fc1": pool.mlp.fc1}),
        **_named(**{"mlp.fc2": pool.mlp.fc2}),
    }


_CLIP = {
    "ln1": "layer_norm1", "ln2": "layer_norm2", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "out": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}  # fmt: skip
_VIT = {
    "ln1": "layernorm_before", "ln2": "layernorm_after", "q": "attention.q_proj", "k": "attention.k_proj",
    "v": "attention.v_proj", "out": "attention.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}  # fmt: skip


def _layers(plain: Plain, prefix: str, names: dict[str, str]) -> Weights:
    state = {}
    for number, layer in enumerate(plain.layers):
        for key, tensor in layer.items():
            name, _, kind = key.partition(".")
            state[f"{prefix}.{number}.{names[name]}.{kind}"] = tensor
    return state


def _norm(plain: Plain, name: str) -> Weights:
    """The norm after the layers; one that changes nothing where there is none. No feature comes from it."""
    width = plain.positions.shape[1]
    weights = plain.after or {"weight": torch.ones(width), "bias": torch.zeros(width)}
    return {f"{name}.{key}": tensor for key, tensor in weights.items()}


def _clip(plain: Plain) -> Weights:
    assert plain.cls is not None and plain.before is not None
    return {
        "embeddings.class_embedding": plain.cls,
        "embeddings.patch_embedding.weight": plain.patch["weight"],
        "embeddings.position_embedding.weight": plain.positions,
        **{f"pre_layrnorm.{key}": tensor for key, tensor in plain.before.items()},
        **_layers(plain, "encoder.layers", _CLIP),
        **_norm(plain, "post_layernorm"),
    }


def _with_bias(patch: Weights) -> Weights:
    return {"bias": torch.zeros(len(patch["weight"])), **patch}


def _siglip(plain: Plain) -> Weights:
    return {
        **{f"embeddings.patch_embedding.{key}": tensor for key, tensor in _with_bias(plain.patch).items()},
        "embeddings.position_embedding.weight": plain.positions,
        **_layers(plain, "encoder.layers", _CLIP),
        **_norm(plain, "post_layernorm"),
        **{f"head.{key}": tensor for key, tensor in (plain.head or {}).items()},
    }


def _vit(plain: Plain) -> Weights:
    assert plain.cls is not None
    width = plain.positions.shape[1]
    return {
        "embeddings.cls_token": plain.cls[None, None],
        "embeddings.position_embeddings": plain.positions[None],
        **{f"embeddings.patch_embeddings.projection.{key}": t for key, t in _with_bias(plain.patch).items()},
        **_layers(plain, "layers", _VIT),
        **_norm(plain, "layernorm"),
        "pooler.dense.weight": torch.zeros(width, width),  # open_clip has none
        "pooler.dense.bias": torch.zeros(width),
    }
