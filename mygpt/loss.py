"""The head and its loss: the matrix product with the vocabulary, whose result never exists whole.

For 65,536 tokens and GPT-2's vocabulary the logits alone would fill 13 GB in fp32, and their
gradient as much again. Here a few rows exist at a time.

Shapes: N tokens, C n_embed, V vocabulary, R rows of one chunk, W columns of a chunk: V and padding.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -1  # a target that does not count
# A compiled `row_gradients` or `row_losses`.
RowKernel = Callable[[Tensor, Tensor, int], Any]


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of x @ weight.T, both gradients taken while a chunk's logits exist.

    The backward pass only scales them, so the loss can be differentiated once. The idea is
    Liger Kernel's FusedLinearCrossEntropy.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: RowKernel | None = None
    ) -> Tensor:
        """x (N, C), weight (V, C) and targets (N,), -1 where nothing counts, to a loss ().

        `rows` is `row_gradients`, compiled; without it the same is done in place, step by step.
        """
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        counted = (targets != IGNORED)[:, None]  # (N, 1)
        x, weight = _operands(x, weight)
        vocab = len(weight)
        if rows is None:
            chunks = _gradients_in_place(x, weight, targets)
        else:
            weight = padded(weight)  # (W, C)
            chunks = _compiled(x, weight, targets, vocab, rows)
        losses = []
        for chunk, grad, loss in chunks:  # grad (R, V) or (R, W)
            losses.append(loss)
            # The gradient of the logits is kept at the scale of a probability, which fp16 holds
            # whatever the batch and the loss scale, until the backward pass.
            x_grad[chunk] = (grad @ weight) * counted[chunk]
            _add_product(weight_grad, grad.T[:vocab], x[chunk] * counted[chunk])
        ctx.save_for_backward(x_grad, weight_grad, targets)
        return mean(torch.cat(losses), targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradients of x and weight."""
        x_grad, weight_grad, targets = ctx.saved_tensors
        scale = mean(grad, targets)
        return x_grad.mul_(scale), weight_grad.mul_(scale), None, None


def head_losses(
    x: Tensor, weight: Tensor, targets: Tensor, rows: RowKernel | None = None
) -> Tensor:
    """Cross entropy of each row of x @ weight.T: (N,), 0 where the target is -1.

    `rows` is `row_losses`, compiled; without it the same is done in place, step by step.
    """
    x, weight = _operands(x, weight)
    if rows is None:
        return torch.cat([loss for _, _, loss in _in_place(x, weight, targets)])
    pieces = zip(x.split(_size(x)), targets.split(_size(x)), strict=True)
    wide = padded(weight)
    return torch.cat([rows(piece @ wide.T, target, len(weight)) for piece, target in pieces])


def mean(losses: Tensor, targets: Tensor) -> Tensor:
    """The sum over the targets that count; 0 if none does."""
    return losses.sum() / (targets != IGNORED).sum().clamp(min=1)


def padded(weight: Tensor) -> Tensor:
    """The matrix (V, C) with rows of zeros up to a multiple of 128: the tiles of a GPU's product.

    It is made for one loss and forgotten: no parameter, checkpoint or export ever holds it.
    """
    vocab, width = weight.shape
    if vocab % 128 == 0:
        return weight
    wide = weight.new_zeros(vocab + -vocab % 128, width)
    wide[:vocab] = weight
    return wide


def row_losses(logits: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """Losses (R,) in fp32 or finer from logits (R, W), of which the first `vocab` columns count."""
    return _row_losses(_masked(logits, vocab), targets)[0]


def row_gradients(logits: Tensor, targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """(gradient of the logits (R, W) in their dtype, losses (R,)): probs - 1[target], and as above.

    Written to be compiled into two passes over the logits.
    """
    wide = _masked(logits, vocab)
    loss, total = _row_losses(wide, targets)
    hit = torch.arange(wide.size(1), device=wide.device) == _index(targets)  # (R, W)
    return ((wide - total).exp() - hit.to(wide.dtype)).to(logits.dtype), loss


def _masked(logits: Tensor, vocab: int) -> Tensor:
    """In fp32 or finer, minus infinity where a column is padding."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    padding = torch.arange(wide.size(1), device=wide.device) >= vocab
    return wide.masked_fill(padding, -math.inf)


def _row_losses(wide: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (R,) and the logarithm (R, 1) of the sum of the exponentials."""
    total = wide.logsumexp(1, keepdim=True)
    loss = (total - wide.gather(1, _index(targets))).squeeze(1)
    return loss.masked_fill(targets == IGNORED, 0.0), total


def _compiled(
    x: Tensor, weight: Tensor, targets: Tensor, vocab: int, rows: RowKernel
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, the gradient (R, W) of their logits and losses (R,), chunk by chunk."""
    for start in range(0, len(x), _size(x)):
        chunk = slice(start, start + _size(x))
        yield chunk, *rows(x[chunk] @ weight.T, targets[chunk], vocab)


def _gradients_in_place(
    x: Tensor, weight: Tensor, targets: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, the gradient (R, V) of their logits and losses (R,), chunk by chunk in one buffer."""
    for chunk, probs, loss in _in_place(x, weight, targets):
        target = _index(targets[chunk])
        probs.scatter_add_(1, target, probs.new_full(target.shape, -1.0))
        yield chunk, probs.to(x.dtype), loss


def _in_place(x: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their probabilities (R, V) and losses (R,), chunk by chunk in one buffer."""
    size, vocab = _size(x), len(weight)
    # Rows that begin at a multiple of 64 numbers: a CPU writes 50257 wide ones 1.5 x slower.
    dtype = torch.promote_types(x.dtype, torch.float32)
    buffer = torch.empty(size, vocab + -vocab % 64, dtype=dtype, device=x.device)
    for start in range(0, len(x), size):
        chunk = slice(start, start + size)
        wide = buffer[: len(x) - start]  # (R, V and a little more)
        wide[:, vocab:] = -math.inf
        logits = wide[:, :vocab]  # (R, V)
        _set_product(logits, x[chunk], weight.T)
        target_logit = logits.gather(1, _index(targets[chunk]))  # (R, 1)
        largest = wide.amax(1, keepdim=True)
        torch.softmax(wide, 1, out=wide)
        # The likeliest token's probability is at least 1 / V, so its logarithm is exact where
        # the target's own may have underflowed.
        loss = largest - wide.amax(1, keepdim=True).log() - target_logit
        yield chunk, logits, loss.squeeze(1).masked_fill(targets[chunk] == IGNORED, 0.0)


def chunk_rows(device_type: str) -> int:
    """Rows of a chunk: 256 keep a CPU's product busy; 4096 stay below 1 GiB on a GPU."""
    return 256 if device_type == "cpu" else 4096


def _size(x: Tensor) -> int:
    return max(1, min(len(x), chunk_rows(x.device.type)))


def _operands(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype in which autocast multiplies; it leaves alone what writes in place."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype)


def _index(targets: Tensor) -> Tensor:
    """Targets (R,) as columns (R, 1), any column where a target does not count."""
    return targets.masked_fill(targets == IGNORED, 0)[:, None]


def _set_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b; where the dtypes allow without a temporary, which a CPU would page in anew."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, likewise."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b)
