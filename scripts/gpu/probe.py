"""What the device is, and the peak that utilisation is measured against: a large product of matrices in bf16."""

from __future__ import annotations

import inspect
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gpu.meter import Send
from gpu.ours import Conditioned

SHEET = {
    "GB200": 2500,
    "B200": 2250,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "GH200": 989,
    "H200 NVL": 835,
    "H200": 989,
    "H100": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
}
"""Dense bf16 TFLOP/s of data sheets, by what the device's name contains; the first that fits counts."""
REPEATS, WARMUP = 10, 3


def probe(run: Conditioned, send: Send) -> None:
    """Sends versions, the device, `peak_tflops` (measured) and `sheet_tflops` (of the data sheet, None: unknown)."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        **{package: _version(package) for package in ("transformers", "peft", "accelerate", "triton")},
        "varlen_attn": _varlen(),
        "device": platform.processor() or platform.machine(),
        "sheet_tflops": None,
    }
    if run.place.type == "cuda":
        own = torch.cuda.get_device_properties(run.place)
        facts |= {
            "device": own.name,
            "memory_gb": own.total_memory / 1e9,
            "capability": f"{own.major}.{own.minor}",
            "cuda": torch.version.cuda,
            "sheet_tflops": next((peak for name, peak in SHEET.items() if name in own.name), None),
        }
    send(facts)
    send({**facts, "peak_tflops": product(run)})


def product(run: Conditioned) -> float:
    """TFLOP/s of a product of two square matrices of random values: the mean of ten after three."""
    size, device = run.shape.product, run.place
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for number in range(WARMUP + REPEATS):
        if number == WARMUP:
            _wait(device)
            started = time.perf_counter()
        torch.mm(a, b)
    _wait(device)
    return 2 * size**3 * REPEATS / (time.perf_counter() - started) / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _varlen() -> str:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return f"none: {error}"
    return str(list(inspect.signature(varlen_attn).parameters))
