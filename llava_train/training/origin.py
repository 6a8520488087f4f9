"""Where in a model a number that is not finite comes from."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn


def first_module(model: nn.Module, forward: Callable[[], torch.Tensor]) -> str:
    """The first module whose output is not finite in `forward`, with what went into it."""
    found: list[str] = []

    def watch(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        whole = [tensor for tensor in _tensors(output) if tensor.is_floating_point()]
        bad = 0 if found else sum(int((~tensor.isfinite()).sum()) for tensor in whole)
        if bad:
            own = sum(int((~weight.isfinite()).sum()) for weight in module.parameters(recurse=False))
            found.append(
                f"{name} ({type(module).__name__}): {bad:,} of {sum(map(torch.numel, whole)):,} values; its input: "
                f"{', '.join(map(_range, _tensors([args, kwargs])))}"
                + f"; {own:,} of its own weights are not finite"
                * bool(own)
            )

    hooks = [
        module.register_forward_hook(partial(watch, name), with_kwargs=True) for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return "the outputs of all modules are finite: it is the cross entropy of its logits that is not"
    return f"the first module whose output is not finite is {found[0]}"


def first_backward(forward: Callable[[], torch.Tensor], grads: Callable[[], list[tuple[str, torch.Tensor]]]) -> str:
    """Where a gradient that is not finite begins though the loss of `forward` is finite; `grads` are the weights'."""
    with warnings.catch_warnings(record=True) as told, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            forward().backward()
        except RuntimeError as error:
            operation = re.search(r"Function '(\w+)' returned nan", str(error))
            if not operation:
                raise
            return f"only its gradient is not finite; {operation[1]} is first to return nan{_made_at(told)}"
    value, name = max((float(grad.abs().max()), name) for name, grad in grads())
    return f"only its gradient overflows: the largest is {value:.3g}, of {name}"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested arguments or outputs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _range(tensor: torch.Tensor) -> str:
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    return f"{kind} from {float(tensor.min()):.4g} to {float(tensor.max()):.4g}" if tensor.numel() else kind


def _made_at(told: list[warnings.WarningMessage]) -> str:
    """Where the forward pass made the operation that anomaly detection blames: the innermost line outside torch."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', "".join(str(each.message) for each in told))
    outside = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame[0]]
    if not outside:
        return ""
    path, line, function = outside[-1]
    return f" (made in {function}, {path}:{line})"
