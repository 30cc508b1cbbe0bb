"""Rates of the operations that a training step consists of, each at the model's own sizes.

Shapes: N tokens of a micro-batch, C width, M width of an output, R tokens of a chunk of the loss,
V vocabulary, W vocabulary padded to a multiple of 128.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from bench import steps, worker
from bench.gpu.setting import Setting
from bench.gpu.smoke import BACKENDS, packed_qkv
from bench.train import MICRO_BATCH
from mygpt.distributed import autocast, compute_dtype
from mygpt.loss import IGNORED, LinearCrossEntropy, chunk_rows

Figures = Iterator[tuple[str, float, float]]  # name, seconds, FLOP or 0
SECONDS = 0.2  # per figure, at least


def run(setting: Setting) -> None:
    """Note the milliseconds and TFLOP/s of every operation, one group after the other."""
    groups = (rates, block_products, head_products, attention, losses)
    worker.measure({group.__name__: (turn_of, group, setting) for group in groups}, 1, setting.note)


def turn_of(group: Callable[[Setting], Figures], setting: Setting) -> worker.Turn:
    """A turn that measures one group."""
    return lambda: {"figures": [figure(*one) for one in group(setting)]}


def figure(name: str, seconds: float, flop: float) -> dict[str, Any]:
    """One line of the table."""
    rate = round(flop / seconds / 1e12, 3) if flop else None
    return {"what": name, "ms": round(1000 * seconds, 4), "tflops": rate}


def seconds_of(call: Callable[[], object]) -> float:
    """Median duration of a call; torch's timer waits for the device."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=SECONDS).median


def random(setting: Setting, *shape: int) -> Tensor:
    """Normal numbers in the dtype of matrix products, on the device."""
    device = torch.device(setting.device)
    return torch.randn(*shape, device=device).to(compute_dtype(device))


def rates(setting: Setting) -> Figures:
    """A large square product, in short bursts and over two seconds."""
    size = 8192 if setting.on_gpu else 1024
    flop = 2 * float(size) ** 3
    found = steps.product_rates(setting.device, size, 2 if setting.on_gpu else 0.2)
    for name, rate in found.items():
        yield f"{size} × {size} × {size}, {name}", flop / rate, flop


def block_products(setting: Setting) -> Figures:
    """The twelve products of a block: each layer forward, its input's and its weight's gradient."""
    c = setting.config.model
    n = MICRO_BATCH[setting.device] * c.block_size
    layers = {
        "c_attn": (c.n_embed, 3 * c.n_embed),
        "attention's c_proj": (c.n_embed, c.n_embed),
        "c_fc": (c.n_embed, c.n_hidden),
        "MLP's c_proj": (c.n_hidden, c.n_embed),
    }
    for name, (k, m) in layers.items():
        x, weight, grad = random(setting, n, k), random(setting, m, k), random(setting, n, m)
        flop = 2.0 * n * k * m
        yield f"{name}, forward", seconds_of(partial(F.linear, x, weight)), flop
        yield f"{name}, input gradient", seconds_of(partial(torch.mm, grad, weight)), flop
        yield f"{name}, weight gradient", seconds_of(partial(torch.mm, grad.T, x)), flop


def head_products(setting: Setting) -> Figures:
    """The head's three products, by number of columns, chunk size and dtype of the result."""
    c = setting.config.model
    vocab, chunk = c.vocab_size, chunk_rows(setting.device)
    padded = vocab + -vocab % 128
    for columns in (vocab, padded):
        x, weight = random(setting, chunk, c.n_embed), random(setting, columns, c.n_embed)
        flop = 2.0 * chunk * c.n_embed * columns
        yield f"logits {chunk} × {columns}", seconds_of(partial(F.linear, x, weight)), flop
    for rows in (chunk // 2, chunk, 2 * chunk, 4 * chunk):
        x, grad = random(setting, rows, c.n_embed), random(setting, rows, padded)
        flop = 2.0 * rows * c.n_embed * padded
        yield f"input gradient, {rows} rows", seconds_of(partial(torch.mm, grad, weight)), flop
        total = torch.zeros(padded, c.n_embed, device=setting.device)
        add: Callable[[], object] = partial(_add_product, total, grad, x)
        yield f"weight gradient, {rows} rows, added to fp32", seconds_of(add), flop
        if setting.on_gpu:
            add = partial(torch.addmm, total, grad.T, x, out_dtype=torch.float32)
            yield f"weight gradient, {rows} rows, fp32 from addmm", seconds_of(add), flop


def _add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    total.add_(grad.T @ x)


def attention(setting: Setting) -> Figures:
    """Causal attention forward and backward, by kernel, in the layout that the model has."""
    c, device = setting.config.model, torch.device(setting.device)
    shape = (MICRO_BATCH[setting.device], c.n_heads, c.block_size)
    parts = packed_qkv(*shape, setting.device, compute_dtype(device))
    q, k, v = (part.requires_grad_() for part in parts)
    flop = 2.0 * math.prod(shape) * c.block_size * 64  # causal: half of the scores, 2 products
    for name in BACKENDS:
        with sdpa_kernel(getattr(SDPBackend, name)):
            forward = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
            try:
                y = forward()
            except RuntimeError:  # this device has no such kernel
                continue
            yield f"{name.lower()}, forward", seconds_of(forward), flop
            backward = partial(torch.autograd.grad, y, (q, k, v), y.detach(), retain_graph=True)
            yield f"{name.lower()}, backward", seconds_of(backward), 2.5 * flop


def losses(setting: Setting) -> Figures:
    """The loss of one chunk and its gradients: ours and torch's, compiled and not."""
    c, device = setting.config.model, torch.device(setting.device)
    rows = chunk_rows(device.type)
    x, weight = random(setting, rows, c.n_embed).float(), random(setting, c.vocab_size, c.n_embed)
    x, weight = x.requires_grad_(), weight.float().requires_grad_()
    targets = torch.randint(c.vocab_size, (rows,), device=device)
    flop = 6.0 * rows * c.n_embed * c.vocab_size
    ours, compiled = LinearCrossEntropy(), LinearCrossEntropy()
    means: dict[str, Callable[..., Tensor]] = {"torch's": _torch_mean, "ours": ours.mean}
    if setting.on_gpu:  # where it is used; a CPU takes long to compile
        compiled.compile()
        means |= {"torch's, compiled": torch.compile(_torch_mean), "ours, compiled": compiled.mean}
    for name, mean in means.items():
        step = partial(_loss_step, mean, x, weight, targets)
        yield f"loss and gradients of {rows} tokens, {name}", seconds_of(step), flop


def _torch_mean(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORED)


def _loss_step(mean: Callable[..., Tensor], x: Tensor, weight: Tensor, targets: Tensor) -> None:
    with autocast(x.device):
        value = mean(x, weight, targets)
    torch.autograd.grad(value, (x, weight))
