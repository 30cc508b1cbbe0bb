"""Fused linear cross entropy: the output projection and its loss, one chunk of tokens at a time.

For 65,536 tokens and GPT-2's vocabulary the logits alone would fill 13 GB in fp32, and their
gradient as much again. Here only the logits of one chunk exist at a time.

Shapes: N tokens, C n_embed, V vocab_size, R tokens of one chunk, W the vocabulary with padding.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -1  # target that does not count
RowKernel = Callable[[Tensor, Tensor, int], Any]  # compiled `row_gradients` or `row_losses`


class LinearCrossEntropy:
    """Cross entropy in nats of the logits x @ weight.T, for x (N, C) and weight (V, C).

    Targets are (N,), -1 where one does not count. Compiled, row kernels read a chunk's logits in
    fused passes; otherwise logits, probabilities and gradient share one buffer.
    """

    def __init__(self) -> None:
        self._gradients: RowKernel | None = None
        self._losses: RowKernel | None = None

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the row kernels with `torch.compile`."""
        self._gradients = torch.compile(row_gradients, *args, **options)
        self._losses = torch.compile(row_losses, *args, **options)

    def mean(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss () of the targets that count, 0 if none does."""
        if torch.is_grad_enabled():
            return MeanLoss.apply(x, weight, targets, self._gradients)
        return _mean(self.per_token(x, weight, targets), targets)

    def per_token(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the loss (N,) of each target, 0 where it does not count. No gradients."""
        return token_losses(x, weight, targets, self._losses)


class MeanLoss(torch.autograd.Function):
    """Mean loss that computes both gradients in the forward pass, while a chunk's logits exist.

    The backward pass only scales them, so the loss can be differentiated once. The idea is that of
    Liger Kernel's FusedLinearCrossEntropy.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, kernel: RowKernel | None
    ) -> Tensor:
        """Return the loss (); `kernel` is the compiled `row_gradients`, or None to run eagerly."""
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        counted = (targets != IGNORED)[:, None]  # (N, 1)
        x, weight = _autocast(x, weight)
        vocab = len(weight)
        if kernel is None:
            chunks = _eager_gradients(x, weight, targets)
        else:
            weight = pad_vocabulary(weight)  # (W, C)
            chunks = _compiled_gradients(x, weight, targets, vocab, kernel)
        losses = []
        for chunk, grad, loss in chunks:  # grad (R, V) or (R, W)
            losses.append(loss)
            # The division by the number of targets waits for the backward pass: until then the
            # gradients have the scale of probabilities, which fp16 holds at any loss scale.
            x_grad[chunk] = (grad @ weight) * counted[chunk]
            _add_product(weight_grad, grad.T[:vocab], x[chunk] * counted[chunk])
        ctx.save_for_backward(x_grad, weight_grad, targets)
        return _mean(torch.cat(losses), targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of x and weight."""
        x_grad, weight_grad, targets = ctx.saved_tensors
        scale = _mean(grad, targets)
        return x_grad.mul_(scale), weight_grad.mul_(scale), None, None


def token_losses(x: Tensor, weight: Tensor, targets: Tensor, kernel: RowKernel | None) -> Tensor:
    """Return the loss (N,) of each target; `kernel` is the compiled `row_losses`, or None."""
    x, weight = _autocast(x, weight)
    if kernel is None:
        return torch.cat([loss for _, _, loss in _eager_probabilities(x, weight, targets)])
    pieces = zip(x.split(_chunk_size(x)), targets.split(_chunk_size(x)), strict=True)
    wide = pad_vocabulary(weight)  # (W, C)
    return torch.cat([kernel(piece @ wide.T, target, len(weight)) for piece, target in pieces])


def pad_vocabulary(weight: Tensor) -> Tensor:
    """Pad (V, C) with zero rows to a multiple of 128, the tile size of a GPU's matrix product.

    The padded copy lives for one loss: no parameter, checkpoint or export ever holds it.
    """
    missing = -len(weight) % 128
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def row_losses(logits: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """Return losses (R,), at least fp32, of logits (R, W) whose first `vocab` columns count."""
    return _losses_and_normalizer(_upcast(logits, vocab), targets)[0]


def row_gradients(logits: Tensor, targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Return the gradient (R, W) of the logits, probability - 1[target], and the losses (R,).

    Written so that torch.compile makes two passes over the logits of it.
    """
    wide = _upcast(logits, vocab)
    loss, normalizer = _losses_and_normalizer(wide, targets)
    hit = torch.arange(wide.size(1), device=wide.device) == _columns(targets)  # (R, W)
    return ((wide - normalizer).exp() - hit.to(wide.dtype)).to(logits.dtype), loss


def _upcast(logits: Tensor, vocab: int) -> Tensor:
    """Convert to at least fp32, with padded columns set to minus infinity."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    padding = torch.arange(wide.size(1), device=wide.device) >= vocab
    return wide.masked_fill(padding, -math.inf)


def _losses_and_normalizer(wide: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses (R,) and the log-sum-exp (R, 1)."""
    normalizer = wide.logsumexp(1, keepdim=True)
    loss = (normalizer - wide.gather(1, _columns(targets))).squeeze(1)
    return loss.masked_fill(targets == IGNORED, 0.0), normalizer


Chunks = Iterator[tuple[slice, Tensor, Tensor]]  # tokens, something (R, V) or (R, W), losses (R,)


def _compiled_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, vocab: int, kernel: RowKernel
) -> Chunks:
    """Yield the gradient (R, W) of the logits and the losses, chunk by chunk."""
    for start in range(0, len(x), _chunk_size(x)):
        chunk = slice(start, start + _chunk_size(x))
        yield chunk, *kernel(x[chunk] @ weight.T, targets[chunk], vocab)


def _eager_gradients(x: Tensor, weight: Tensor, targets: Tensor) -> Chunks:
    """Yield the gradient (R, V) of the logits and the losses, chunk by chunk in one buffer."""
    for chunk, probs, loss in _eager_probabilities(x, weight, targets):
        target = _columns(targets[chunk])
        probs.scatter_add_(1, target, probs.new_full(target.shape, -1.0))
        yield chunk, probs.to(x.dtype), loss


def _eager_probabilities(x: Tensor, weight: Tensor, targets: Tensor) -> Chunks:
    """Yield the probabilities (R, V) and the losses, chunk by chunk in one buffer."""
    size, vocab = _chunk_size(x), len(weight)
    # Rows aligned to 64 numbers: a CPU writes rows of 50,257 1.5 x slower.
    dtype = torch.promote_types(x.dtype, torch.float32)
    buffer = torch.empty(size, vocab + -vocab % 64, dtype=dtype, device=x.device)
    for start in range(0, len(x), size):
        chunk = slice(start, start + size)
        wide = buffer[: len(x) - start]  # (R, V rounded up to 64)
        wide[:, vocab:] = -math.inf
        logits = wide[:, :vocab]  # (R, V)
        _set_product(logits, x[chunk], weight.T)
        target_logit = logits.gather(1, _columns(targets[chunk]))  # (R, 1)
        largest = wide.amax(1, keepdim=True)
        torch.softmax(wide, 1, out=wide)  # `logits` now holds probabilities
        # log-sum-exp = largest logit - log(its probability): that probability is at least 1 / V,
        # where the target's own may have underflowed to 0.
        loss = largest - wide.amax(1, keepdim=True).log() - target_logit
        yield chunk, logits, loss.squeeze(1).masked_fill(targets[chunk] == IGNORED, 0.0)


def _mean(losses: Tensor, targets: Tensor) -> Tensor:
    """Divide the sum by the number of targets that count; 0 if there is none."""
    return losses.sum() / (targets != IGNORED).sum().clamp(min=1)


def chunk_rows(device_type: str) -> int:
    """Return the tokens per chunk: 256 saturate a CPU, 4096 stay below 1 GiB on a GPU."""
    return 256 if device_type == "cpu" else 4096


def _chunk_size(x: Tensor) -> int:
    return max(1, min(len(x), chunk_rows(x.device.type)))


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to autocast's dtype, which does not apply to products with `out=`."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype)


def _columns(targets: Tensor) -> Tensor:
    """Turn targets (R,) into an index (R, 1); a target that does not count becomes column 0."""
    return targets.masked_fill(targets == IGNORED, 0)[:, None]


def _set_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Set out = a @ b, without a temporary if the dtypes allow it: a CPU would page it in again."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to out, without a temporary if the dtypes allow it."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b)
