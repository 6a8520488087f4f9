"""Faster kernels for the stock decoder: torch.compile a layer at a time, and Liger's."""

from __future__ import annotations

from transformers import LlavaForConditionalGeneration

from llava_train.errors import RecipeError


def compile_layers(model: LlavaForConditionalGeneration) -> None:
    """torch.compile of each decoder layer, in place, once for all lengths; compiled when it first runs.

    A layer at a time compiles in the time of one, and leaves names, checkpoints and hooks of engines as they are. The
    attention of packed rows stays outside: it is a kernel of its own.
    """
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)


def use_liger(model: LlavaForConditionalGeneration) -> None:
    """Liger's norms, rotary embedding and gated MLP (Triton) in the decoder, in place. RecipeError where it has none.

    Its loss is left out: only supervised positions reach our head, which Liger's would multiply with all.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance
    except ImportError as error:
        raise RecipeError(f"speed.liger: {error}; pip install liger-kernel") from error
    decoder = model.model.language_model
    if decoder.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise RecipeError(f"speed.liger: Liger has no kernels for {decoder.config.model_type!r}; set speed.liger=false")
    _apply_liger_kernel_to_instance(decoder, cross_entropy=False, fused_linear_cross_entropy=False)
