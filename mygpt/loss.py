"""Fused linear cross entropy: the output projection and its loss, one chunk of tokens at a time.

For 65,536 tokens and GPT-2's vocabulary the logits alone would fill 13 GB in fp32, and their
gradient as much again. Here only the logits of one chunk exist at a time.

Shapes: N tokens, C n_embed, V vocab_size, R tokens of one chunk, W the vocabulary with padding.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -1  # target that does not count
LOG2E = math.log2(math.e)
RowKernel = Callable[[Tensor, Tensor], Any]  # compiled `row_probabilities` or `row_losses`


class LinearCrossEntropy:
    """Cross entropy in nats of the logits x @ weight.T, for x (N, C) and weight (V, C).

    Targets are (N,), -1 where one does not count. Compiled, row kernels read a chunk's logits in
    fused passes; otherwise logits, probabilities and gradient share one buffer.
    """

    def __init__(self) -> None:
        self._probabilities: RowKernel | None = None
        self._losses: RowKernel | None = None

    def compile(self, backend: Any = "inductor") -> None:
        """Compile the row kernels with `torch.compile`, for each shape anew."""
        # exp as one power of two: 35 instructions per logit instead of 44 on sm_90
        options = {"use_fast_math": True} if backend == "inductor" else None
        how: dict[str, Any] = {"backend": backend, "options": options, "dynamic": False}
        self._probabilities = torch.compile(row_probabilities, **how)
        self._losses = torch.compile(row_losses, **how)

    def mean(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss () of the targets that count, 0 if none does."""
        if torch.is_grad_enabled():
            return MeanLoss.apply(x, weight, targets, self._probabilities)
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
        """Return the loss (); `kernel` is the compiled `row_probabilities`, None runs eagerly."""
        x_grad, counted, vocab = torch.empty_like(x), targets != IGNORED, len(weight)
        weight_dtype = weight.dtype
        x, weight = _product_operands(x, weight, kernel)
        weight_grad = torch.zeros_like(weight, dtype=weight_dtype)  # (W, C)
        chunks = _eager_gradients if kernel is None else partial(_compiled_gradients, kernel)
        losses = []
        for chunk, grad, loss in chunks(x, weight, targets, vocab):  # grad (R, W)
            losses.append(loss)
            # The division by the number of targets waits for the backward pass: until then the
            # gradients have the scale of probabilities, which fp16 holds at any loss scale.
            _set_product(x_grad[chunk], grad, weight)
            _add_product(weight_grad, grad.T, x[chunk] * counted[chunk, None])
        ctx.save_for_backward(x_grad, weight_grad[:vocab], targets)
        return _mean(torch.cat(losses), targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of x and weight."""
        x_grad, weight_grad, targets = ctx.saved_tensors
        scale = _mean(grad, targets)
        x_grad.mul_(scale * (targets != IGNORED)[:, None])
        return x_grad, weight_grad.mul_(scale), None, None


def token_losses(x: Tensor, weight: Tensor, targets: Tensor, kernel: RowKernel | None) -> Tensor:
    """Return the loss (N,) of each target; `kernel` is the compiled `row_losses`, or None."""
    vocab = len(weight)
    x, weight = _product_operands(x, weight, kernel)
    if kernel is None:
        return torch.cat([loss for _, _, loss in _eager_probabilities(x, weight, targets, vocab)])
    return torch.cat(
        [kernel(_logits(x[chunk], weight, vocab), targets[chunk]) for chunk in _chunks(x)]
    )


def pad_vocabulary(weight: Tensor) -> Tensor:
    """Pad (V, C) with zero rows to a multiple of 128, the tile size of a GPU's matrix product.

    The padded copy lives for one loss: no parameter, checkpoint or export ever holds it.
    """
    missing = -len(weight) % 128
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return losses (R,), at least fp32, of logits (R, W). Compiled, it reads them once."""
    wide = _upcast(logits)
    return _row_losses(wide, _log_sum_exp(wide), targets)


def row_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities (R, W) of logits, in their dtype, and the losses (R,).

    Compiled, it reads the logits twice.
    """
    wide = _upcast(logits)
    normalizer = _log_sum_exp(wide)
    # A power of two is one instruction of a GPU; the difference first, which is exact near 0.
    probs = torch.exp2((wide - normalizer) * LOG2E).to(logits.dtype)
    return probs, _row_losses(wide, normalizer, targets)


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_sum_exp(wide: Tensor) -> Tensor:
    """Return the log-sum-exp (R, 1) in the form of which Inductor makes one loop.

    `logsumexp` guards against infinite maxima, which hides its online softmax: two loops.
    """
    largest = wide.amax(1, keepdim=True)
    return largest + (wide - largest).exp().sum(1, keepdim=True).log()


def _row_losses(wide: Tensor, normalizer: Tensor, targets: Tensor) -> Tensor:
    loss = (normalizer - wide.gather(1, _columns(targets))).squeeze(1)
    return loss.masked_fill(targets == IGNORED, 0.0)


def _logits(x: Tensor, weight: Tensor, vocab: int) -> Tensor:
    """Return the logits (R, W), minus infinity in the columns from `vocab` on."""
    logits = x @ weight.T
    logits[:, vocab:] = -math.inf
    return logits


Chunks = Iterator[tuple[slice, Tensor, Tensor]]  # tokens, something (R, W), losses (R,)


def _compiled_gradients(
    kernel: RowKernel, x: Tensor, weight: Tensor, targets: Tensor, vocab: int
) -> Chunks:
    """Yield the gradient (R, W) of the logits and the losses, chunk by chunk."""
    for chunk in _chunks(x):
        probs, loss = kernel(_logits(x[chunk], weight, vocab), targets[chunk])
        # The gradient is probability - 1[target]: of the target, exp(-loss) - 1 without rounding.
        of_target = torch.expm1(-loss)[:, None].to(probs.dtype)  # (R, 1)
        yield chunk, probs.scatter_(1, _columns(targets[chunk]), of_target), loss


def _eager_gradients(x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> Chunks:
    """Yield the gradient (R, W) of the logits and the losses, chunk by chunk in one buffer."""
    for chunk, probs, loss in _eager_probabilities(x, weight, targets, vocab):
        target = _columns(targets[chunk])
        probs.scatter_add_(1, target, probs.new_full(target.shape, -1.0))
        yield chunk, probs.to(x.dtype), loss


def _eager_probabilities(x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> Chunks:
    """Yield the probabilities (R, W) and the losses, chunk by chunk in one buffer."""
    columns = len(weight)
    # Rows aligned to 64 numbers: a CPU writes rows of 50,257 1.5 x slower.
    dtype = torch.promote_types(x.dtype, torch.float32)
    buffer = torch.empty(_chunk_size(x), columns + -columns % 64, dtype=dtype, device=x.device)
    for chunk in _chunks(x):
        wide = buffer[: len(x) - chunk.start]  # (R, W rounded up to 64)
        logits = wide[:, :columns]  # (R, W)
        _set_product(logits, x[chunk], weight.T)
        wide[:, vocab:] = -math.inf
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
    """Return the tokens per chunk: 256 saturate a CPU, 8192 take 1.6 GB of a GPU."""
    return 256 if device_type == "cpu" else 8192


def _chunk_size(x: Tensor) -> int:
    return max(1, min(len(x), chunk_rows(x.device.type)))


def _chunks(x: Tensor) -> Iterator[slice]:
    size = _chunk_size(x)
    return (slice(start, start + size) for start in range(0, len(x), size))


def _product_operands(x: Tensor, weight: Tensor, kernel: RowKernel | None) -> tuple[Tensor, Tensor]:
    """Cast both to autocast's dtype, which does not apply to products with `out=`.

    Compiled or on CUDA, pad the weight (V, C) to (W, C). Elsewhere W is V.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    return x, pad_vocabulary(weight) if kernel or x.is_cuda else weight


def _columns(targets: Tensor) -> Tensor:
    """Turn targets (R,) into an index (R, 1); a target that does not count becomes column 0."""
    return targets.masked_fill(targets == IGNORED, 0)[:, None]


def _set_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Set out = a @ b, without a temporary if the device can: a CPU would page it in again."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to out; on CUDA 16-bit products are added in fp32 before they are rounded."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(a @ b)
