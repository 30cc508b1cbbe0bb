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
from bench.gpu.runner import Setting
from bench.gpu.smoke import BACKENDS, packed_qkv, torch_mean
from bench.train import MICRO_BATCH
from mygpt.distributed import autocast, compute_dtype
from mygpt.loss import LinearCrossEntropy, chunk_rows

Calls = Iterator[tuple[str, float, Callable[..., object]]]  # name, FLOP, what is timed
SECONDS = 0.2  # per figure, at least


def run(setting: Setting) -> None:
    """Note the milliseconds and TFLOP/s of every operation, one group after the other."""
    groups = (block_products, head_products, attention, losses)
    makers: dict[str, Any] = {"rates": (partial, rates, setting)}
    makers |= {group.__name__: (partial, timed, group, setting) for group in groups}
    worker.measure(makers, 1, setting.note)


def rates(setting: Setting) -> dict[str, Any]:
    """A large square product, in short bursts and over two seconds."""
    size = 8192 if setting.on_gpu else 1024
    flop = 2 * float(size) ** 3
    found = steps.product_rates(setting.device, size, 2 if setting.on_gpu else 0.2)
    name = f"{size} × {size} × {size}"
    return {"figures": [figure(f"{name}, {how}", flop, flop / r) for how, r in found.items()]}


def timed(group: Callable[[Setting], Calls], setting: Setting) -> dict[str, Any]:
    """Each call of a group: the median duration; torch's timer waits for the device."""
    figures = []
    for name, flop, call in group(setting):
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        figures.append(figure(name, flop, timer.blocked_autorange(min_run_time=SECONDS).median))
    return {"figures": figures}


def figure(name: str, flop: float, seconds: float) -> dict[str, Any]:
    """One line of the table."""
    return {"what": name, "ms": round(1000 * seconds, 4), "tflops": round(flop / seconds / 1e12, 3)}


def random(setting: Setting, *shape: int) -> Tensor:
    """Normal numbers in the dtype of matrix products, on the device."""
    device = torch.device(setting.device)
    return torch.randn(*shape, device=device).to(compute_dtype(device))


def block_products(setting: Setting) -> Calls:
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
        yield f"{name}, forward", flop, partial(F.linear, x, weight)
        yield f"{name}, input gradient", flop, partial(torch.mm, grad, weight)
        yield f"{name}, weight gradient", flop, partial(torch.mm, grad.T, x)


def head_products(setting: Setting) -> Calls:
    """The head's three products, by number of columns, chunk size and dtype of the result."""
    c = setting.config.model
    vocab, chunk = c.vocab_size, chunk_rows(setting.device)
    padded = vocab + -vocab % 128
    for columns in (vocab, padded):
        x, weight = random(setting, chunk, c.n_embed), random(setting, columns, c.n_embed)
        flop = 2.0 * chunk * c.n_embed * columns
        yield f"logits {chunk} × {columns}", flop, partial(F.linear, x, weight)
    for rows in (chunk // 2, chunk, 2 * chunk, 4 * chunk):
        x, grad = random(setting, rows, c.n_embed), random(setting, rows, padded)
        flop, name = 2.0 * rows * c.n_embed * padded, f"weight gradient, {rows} rows"
        yield f"input gradient, {rows} rows", flop, partial(torch.mm, grad, weight)
        total = torch.zeros(padded, c.n_embed, device=setting.device)
        yield f"{name}, added to fp32", flop, partial(_add_product, total, grad, x)
        if setting.on_gpu:
            fp32 = partial(torch.addmm, total, grad.T, x, out_dtype=torch.float32)
            yield f"{name}, fp32 from addmm", flop, fp32


def _add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    total.add_(grad.T @ x)


def attention(setting: Setting) -> Calls:
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
            yield f"{name.lower()}, forward", flop, forward
            backward = partial(torch.autograd.grad, y, (q, k, v), y.detach(), retain_graph=True)
            yield f"{name.lower()}, backward", 2.5 * flop, backward


def losses(setting: Setting) -> Calls:
    """The loss of one chunk and its gradients: ours and torch's, compiled and not."""
    c, rows = setting.config.model, chunk_rows(setting.device)
    sizes = ((rows, c.n_embed), (c.vocab_size, c.n_embed))
    x, weight = (random(setting, *size).float().requires_grad_() for size in sizes)
    targets = torch.randint(c.vocab_size, (rows,), device=setting.device)
    ours, compiled = LinearCrossEntropy(), LinearCrossEntropy()
    means: dict[str, Callable[..., Tensor]] = {"torch's": torch_mean, "ours": ours.mean}
    if setting.on_gpu:  # where it is used; a CPU takes long to compile
        compiled.compile()
        means |= {"torch's, compiled": torch.compile(torch_mean), "ours, compiled": compiled.mean}
    for name, mean in means.items():
        step = partial(_loss_step, mean, x, weight, targets)
        flop = 6.0 * rows * c.n_embed * c.vocab_size
        yield f"loss and gradients of {rows} tokens, {name}", flop, step


def _loss_step(mean: Callable[..., Tensor], x: Tensor, weight: Tensor, targets: Tensor) -> None:
    with autocast(x.device):
        value = mean(x, weight, targets)
    torch.autograd.grad(value, (x, weight))
