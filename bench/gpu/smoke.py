"""Is the device's arithmetic right? Each check compares with an oracle, in a process of its own.

Shapes: N tokens, V vocabulary, C width, B batch, H heads, T tokens.
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import feeds, worker
from bench.gpu.runner import Setting
from mygpt import loss
from mygpt.config import GPTConfig
from mygpt.distributed import autocast, compute_dtype
from mygpt.doctor import verify_resume
from mygpt.generate import Sampling, generate
from mygpt.model import GPT, manual_attention
from shards.loader import TokenLoader

SHAPE = GPTConfig(block_size=64, vocab_size=1031, n_layers=2, n_heads=2, n_embed=128)
VOCAB, NEW_TOKENS = 50257, 24
BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
# Relative errors of results, by dtype of the matrix products.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
Errors = dict[str, float]


def run(setting: Setting) -> None:
    """Note for each check its errors and the bound on them, and whether it passed; all at once."""
    makers = [{check.__name__: (partial, judged, check, setting)} for check in CHECKS]
    with ThreadPoolExecutor(len(makers)) as pool:
        list(pool.map(lambda maker: worker.measure(maker, 1, setting.note), makers))


def judged(check: Callable[[Setting], Errors], setting: Setting) -> dict[str, Any]:
    """The errors of a check, and whether all of them are within the bound for the device."""
    torch.manual_seed(0)
    bound = BOUND[compute_dtype(torch.device(setting.device))]
    errors = check(setting)
    return {"errors": errors, "bound": bound, "passed": all(e <= bound for e in errors.values())}


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the expected norm; infinite if anything is not finite."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    relative = ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    return relative if relative < float("inf") else float("inf")


def gradients(setting: Setting) -> Errors:
    """Loss and gradients of a small model, eager and compiled, against float64 on the CPU.

    Compiled on a GPU only: train.py compiles nowhere else, and a CPU takes minutes. There it needs
    65,536 tokens: for fewer, torch.compile writes other kernels for the norms than for training.
    """
    oracle = GPT(SHAPE).double()
    tokens = torch.randint(SHAPE.vocab_size, (1024 if setting.on_gpu else 4, SHAPE.block_size + 1))
    expected, errors = _backward(oracle, tokens), {}
    for name in ("eager", "compiled")[: 1 + setting.on_gpu]:
        model = GPT(SHAPE)
        model.load_state_dict(oracle.state_dict())
        model.to(setting.device)
        if name == "compiled":
            model.compile()
        errors[f"{name}, loss"] = error_of(_backward(model, tokens.to(setting.device)), expected)
        pairs = zip(model.named_parameters(), oracle.parameters(), strict=True)
        errors |= {f"{name}, {p}": error_of(_grad(a), _grad(b)) for (p, a), b in pairs}
    return dict(sorted(errors.items(), key=lambda item: -item[1])[:6])


def _backward(model: GPT, tokens: Tensor) -> Tensor:
    """The loss () of tokens (B, T + 1), whose gradients the model then has."""
    with autocast(tokens.device):
        _, value = model(tokens[:, :-1], tokens[:, 1:])
    value.backward()
    return value


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def cross_entropy(setting: Setting) -> Errors:
    """The fused loss against torch's in float64, with ignored targets and an odd last chunk."""
    n, width = loss.chunk_rows(setting.device) + 37, 64
    x, weight = torch.randn(n, width), torch.randn(VOCAB, width) / 4
    targets = torch.randint(VOCAB, (n,)).masked_fill(torch.rand(n) < 0.2, loss.IGNORED)
    expected = _with_gradients(x.double(), weight.double(), targets, torch_mean)
    errors: Errors = {}
    for name in ("eager", "compiled")[: 1 + setting.on_gpu]:
        fused = loss.LinearCrossEntropy()
        if name == "compiled":
            fused.compile()
        here = (x.to(setting.device), weight.to(setting.device), targets.to(setting.device))
        actual = _with_gradients(*here, fused.mean)
        parts = zip(("loss", "x", "weight"), actual, expected, strict=True)
        errors |= {f"{name}, {part}": error_of(a, b) for part, a, b in parts}
    return errors


def torch_mean(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy () of x @ weight.T in torch's own operations."""
    return F.cross_entropy(x @ weight.T, targets, ignore_index=loss.IGNORED)


def _with_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, mean: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    """Loss () and the gradients of x (N, C) and weight (V, C)."""
    x, weight = (part.detach().clone().requires_grad_() for part in (x, weight))
    with autocast(x.device):
        value = mean(x, weight, targets)
    return value, *torch.autograd.grad(value, (x, weight))


def attention(setting: Setting) -> Errors:
    """Each attention kernel of torch that this device has, against textbook attention."""
    dtype = compute_dtype(torch.device(setting.device))
    q, k, v = packed_qkv(2, 2, 200, "cpu", torch.float64)
    expected = manual_attention(q, k, v, None, 0.0, is_causal=True)
    errors = {}
    for name in BACKENDS:
        a, b, c = (part.to(setting.device, dtype) for part in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, name)):
            try:
                y = F.scaled_dot_product_attention(a, b, c, is_causal=True)
            except RuntimeError as error:
                print(f"{name}: {error}")  # this device has no such kernel
                continue
        errors[name.lower()] = error_of(y, expected)
    return errors


def packed_qkv(
    batch: int, heads: int, tokens: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Random q, k, v (B, H, T, 64) as the model has them: views of one product (B, T, 3, H, 64)."""
    qkv = torch.randn(batch, tokens, 3, heads, 64, device=device, dtype=dtype)
    return tuple(qkv.permute(2, 0, 3, 1, 4))


@torch.no_grad()
def decoding(setting: Setting) -> Errors:
    """Greedy texts, with the cache and CUDA graphs: how far below the largest logit a choice is.

    Relative to the largest logit of the whole text read at once, without a cache.
    """
    model, prompts = GPT(SHAPE).to(setting.device).eval(), [[7, 11, 13], [17]]
    for parameter in model.h.parameters():
        parameter.mul_(5)  # at first a token hardly attends to others
    errors = {}
    for dtype in {torch.float32, compute_dtype(torch.device(setting.device))}:
        model.to(dtype)
        texts = generate(model, prompts, Sampling(NEW_TOKENS, temperature=0.0))
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([[*prompt, *text]], device=setting.device)
            logits = model(ids[:, :-1])[0][0, len(prompt) - 1 :].float()  # (T, V)
            chosen = logits.gather(1, ids[0, len(prompt) :, None])  # (T, 1)
            largest = logits.amax(1, keepdim=True)
            below = ((largest - chosen) / largest.abs()).max().item()
            errors[f"{dtype}, prompt of {len(prompt)}"] = below
    return errors


def loader(setting: Setting) -> Errors:
    """Share of batches that differ between the loader of the device and the CPU's, after seeks too.

    The memory of a batch is read only after more batches were handed out.
    """
    with tempfile.TemporaryDirectory() as folder:
        feeds.build(Path(folder), 300_000, 3)
        own, plain = (
            TokenLoader(folder, "train", 4, 256, device=d) for d in (setting.device, "cpu")
        )
        differing = list(_differing(own, plain))
    return {"differing batches": sum(differing) / len(differing)}


def _differing(own: TokenLoader, plain: TokenLoader) -> Iterator[bool]:
    start = own.state_dict()
    for count in (40, 90):
        ours, theirs = ([next(feed) for _ in range(count)] for feed in (own, plain))
        for a, b in zip(ours, theirs, strict=True):
            yield not all(one.cpu().equal(other) for one, other in zip(a, b, strict=True))
        own.load_state_dict(start)
        plain.load_state_dict(start)


def resume(setting: Setting) -> Errors:
    """1 if a stopped and resumed run of train.py differs in any bit from one never stopped."""
    with tempfile.TemporaryDirectory() as folder:
        data, runs = Path(folder, "data"), Path(folder, "runs")
        data.mkdir()
        runs.mkdir()
        feeds.build(data, 300_000, 2)
        flags = ["--data", str(data), "--device", setting.device, "--val-tokens", "128"]
        tiny = ["tiny", *flags, "--no-compile"]  # three times: compilation would take too long
        comparison, difference = next(verify_resume.differences(runs, tiny, steps=4))
    print(f"{comparison}: {difference or 'equal'}")
    return {comparison: float(bool(difference))}


CHECKS = (gradients, cross_entropy, attention, decoding, loader, resume)
