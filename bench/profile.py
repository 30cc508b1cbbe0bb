"""Where the time of our training step goes: torch's profiler, summed up by what a reader knows.

python -m bench.train --preset small --profile
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from bench import table
from bench.steps import Size, ours
from mygpt.config import GPTConfig

STEPS = 3
HEAD_PRODUCTS, HEAD_LOSS = "head: matrix products", "head: softmax, loss, gradient"
BLOCK_PRODUCTS, ATTENTION = "blocks: matrix products", "blocks: attention"
NORMS, OPTIMIZER, CLIPPING = "blocks: norms, GELU, sums", "AdamW", "norm of the gradient, clipping"
OTHER = "everything else"


def profile(shape: GPTConfig, rows: int, device: str, compiled: bool) -> list[dict[str, Any]]:
    """Milliseconds a step and share of each part of our step, the longest first."""
    on_gpu = device == "cuda"
    step = ours(Size(shape, rows, device), compiled or on_gpu)
    for number in range(STEPS):
        step(number)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(
        activities=activities,
        record_shapes=True,
        acc_events=True,  # there is one cycle; torch 2.11 warns without
    ) as profiler:
        for number in range(STEPS):
            step(number)
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a GPU's kernel, whose time the operator that started it has already
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        sizes = {n for dims in event.input_shapes if isinstance(dims, list) for n in dims}
        spent[part(event.key.lower(), sizes, shape)] += micros / 1000 / STEPS
    total = sum(spent.values())
    return [
        {"part": name, "ms": round(ms, 1), "share": round(ms / total, 3)}
        for name, ms in sorted(spent.items(), key=lambda item: -item[1])
    ]


def part(kernel: str, sizes: Sequence[int] | set[int], shape: GPTConfig) -> str:
    """Which part of the step an operator belongs to, by its name and the sizes of what it reads."""
    has_vocab = any(shape.vocab_size <= n < shape.vocab_size + 128 for n in sizes)
    if "adam" in kernel:
        return OPTIMIZER
    if any(word in kernel for word in ("foreach", "linalg_vector_norm")):
        return CLIPPING
    if any(word in kernel for word in ("attention", "flash", "fmha")):
        return ATTENTION
    if any(word in kernel for word in ("mm", "gemm", "cutlass", "nvjet")):
        return HEAD_PRODUCTS if has_vocab else BLOCK_PRODUCTS
    if has_vocab:
        return HEAD_LOSS
    if any(word in kernel for word in ("layer_norm", "gelu", "add", "triton", "compiled", "copy_")):
        return NORMS
    return OTHER


def as_text(parts: Sequence[Mapping[str, Any]]) -> str:
    """A table for people."""
    rows = [(one["part"], f"{one['ms']:,.1f}", f"{one['share']:.0%}") for one in parts]
    return table.as_text(("", "ms a step", "share"), rows)
