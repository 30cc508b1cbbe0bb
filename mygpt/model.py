"""GPT-2 as one file: pre-norm transformer blocks, learned positions, tied embedding and head.

The layers have nanoGPT's names. Nothing here reads files, knows of ranks or prints.

Shapes: B batch, T tokens, C n_embed, H n_heads, D = C / H, S cached tokens, V vocab_size,
N = B * T, R rows of one chunk.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mygpt.config import GPTConfig

IGNORED = -1  # a target that does not count


class GPT(nn.Module):
    """A GPT with freshly drawn weights. `flash=False` computes attention step by step."""

    def __init__(self, config: GPTConfig, flash: bool = True) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embed)
        self.wpe = nn.Embedding(config.block_size, config.n_embed)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, flash) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.n_embed, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embed, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self._init_weights()

    def _init_weights(self) -> None:
        # The stream sums 2 * n_layers branches: each starts that much smaller, so that the sum
        # does not grow with depth (GPT-2, section 2.3).
        branch_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                std = branch_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of every position, or the loss alone. `idx` and `targets` are (B, T) int64.

        Without targets: (logits (B, T, V), None). With them: (None, loss), the mean cross
        entropy in nats over the targets that are not -1, 0 if all are -1; the logits then
        exist for a few rows at a time only. More than block_size tokens are a `ValueError`.
        """
        x = self._final(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x), None
        x, targets = x.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        if torch.is_grad_enabled():
            return None, HeadLoss.apply(x, self.lm_head.weight, targets)
        return None, _mean(head_losses(x, self.lm_head.weight, targets), targets)

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in nats of each target: (B, T), 0 where the target is -1."""
        x = self._final(idx).flatten(0, 1)  # (N, C)
        return head_losses(x, self.lm_head.weight, targets.flatten()).view_as(targets)

    def _final(self, idx: Tensor) -> Tensor:
        """What the head reads: tokens (B, T) to (B, T, C)."""
        tokens = idx.size(1)
        if tokens > self.config.block_size:
            raise ValueError(
                f"expected at most block_size {self.config.block_size} tokens, found {tokens}: "
                "cut the input"
            )
        x = self.wte(idx) + self.wpe(torch.arange(tokens, device=idx.device))  # (B, T, C)
        x = self.drop(x)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    @torch.no_grad()
    def next_logits(self, idx: Tensor, lengths: Tensor, cache: "KeyValueCache") -> Tensor:
        """Logits (B, V) of the token that follows each row, computing only what `cache` lacks.

        Row b of `idx` (B, T) continues row b of the cache with its first `lengths[b]` tokens,
        at least one; the rest of the row is padding.
        """
        positions = cache.advance(lengths, idx.size(1))  # (B, T)
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        last = x[torch.arange(len(x), device=x.device), lengths - 1]  # (B, C)
        return self.lm_head(self.ln_f(last))

    def compile(self, *args: Any, **options: Any) -> None:
        """`torch.compile` for the blocks, in place: one is compiled, all use it.

        The head and loss stay as they are: they write in place, which a compiler would undo.
        """
        for block in self.h:
            block.compile(*args, **options)

    def num_params(self, non_embedding: bool = False) -> int:
        """Parameters, the tied matrix counted once; or only those outside `wte` and `wpe`."""
        total = sum(parameter.numel() for parameter in self.parameters())
        embedding = self.wte.weight.numel() + self.wpe.weight.numel()
        return total - embedding if non_embedding else total

    def flops_per_token(self) -> int:
        """FLOPs to train on one token of a full block: 6 per multiplied weight, plus attention.

        The convention of PaLM, appendix B. `wte` counts, as the head; `wpe` is only looked up.
        """
        c = self.config
        weights = self.num_params() - self.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layers * c.n_embed * c.block_size


class Block(nn.Module):
    """Attention, then the MLP: each reads the normalised stream and adds to it."""

    def __init__(self, config: GPTConfig, flash: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embed, bias=config.bias)
        self.attn = CausalSelfAttention(config, flash)
        self.ln_2 = nn.LayerNorm(config.n_embed, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: "KeyValueCache | None" = None, layer: int = 0) -> Tensor:
        """(B, T, C) to (B, T, C). With a cache, x continues what layer `layer` of it holds."""
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    """Every token reads itself and the tokens before it."""

    def __init__(self, config: GPTConfig, flash: bool) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.attention = F.scaled_dot_product_attention if flash else manual_attention
        self.c_attn = nn.Linear(config.n_embed, 3 * config.n_embed, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embed, config.n_embed, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: "KeyValueCache | None" = None, layer: int = 0) -> Tensor:
        """As in `Block`."""
        qkv = self.c_attn(x).unflatten(2, (3, self.n_heads, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(layer, k, v)  # (B, H, S, D), (B, H, S, D), (B, 1, T, S)
        dropout = self.dropout if self.training else 0.0
        y = self.attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


def manual_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    """Attention as it is written on paper; takes what `scaled_dot_product_attention` takes."""
    if is_causal:
        attn_mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))  # (B, H, T, S)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return F.dropout(scores.softmax(3), dropout_p) @ v  # (B, H, T, D)


class MLP(nn.Module):
    """Two layers with GELU, in GPT-2's tanh form: its published weights were trained with it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embed, config.n_hidden, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(config.n_hidden, config.n_embed, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class KeyValueCache:
    """Keys and values of `batch` rows of up to `capacity` tokens, each row as long as it is.

    Allocated once, in the dtype and on the device of `model`.
    """

    def __init__(self, model: GPT, batch: int, capacity: int) -> None:
        c, weight = model.config, model.wte.weight
        self.capacity = capacity
        shape = (c.n_layers, batch, c.n_heads, capacity, c.n_embed // c.n_heads)
        # Zeros, since what a mask hides still gets multiplied by 0.
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.longest = 0  # no row is longer: known without asking the device

    def advance(self, lengths: Tensor, tokens: int) -> Tensor:
        """Make room for `tokens` more, of which row b keeps `lengths[b]`: positions (B, T)."""
        self.longest += tokens
        if self.longest > self.capacity:
            raise ValueError(
                f"expected at most {self.capacity} tokens, the cache's capacity, found "
                f"{self.longest}: begin a new cache with the last of them"
            )
        self.positions = self.lengths[:, None] + torch.arange(tokens, device=lengths.device)
        seen = torch.arange(self.longest, device=lengths.device)  # (S,)
        self.mask = (seen <= self.positions[..., None])[:, None]  # (B, 1, T, S)
        self.lengths = self.lengths + lengths
        return self.positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store k and v (B, H, T, D) of one layer: all keys and values so far, and the mask."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        # Padding is stored too; the row's next token takes its place before any token sees it.
        self.keys[layer, rows, :, self.positions] = k.transpose(1, 2)
        self.values[layer, rows, :, self.positions] = v.transpose(1, 2)
        keys, values = self.keys[layer], self.values[layer]
        return keys[:, :, : self.longest], values[:, :, : self.longest], self.mask


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of x @ weight.T, both gradients taken while a chunk's logits exist.

    The backward pass only scales them, so the loss can be differentiated once. The idea is
    Liger Kernel's FusedLinearCrossEntropy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """x (N, C), weight (V, C) and targets (N,), -1 where nothing counts, to a loss ()."""
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        x, weight = _operands(x, weight)
        counted = (targets != IGNORED)[:, None]  # (N, 1)
        losses = []
        for rows, probs, loss in _chunks(x, weight, targets):
            losses.append(loss)
            # The gradient of the logits is probs - 1[target]. It is kept at that scale, which
            # fp16 holds whatever the batch and the loss scale, until the backward pass.
            target = _index(targets[rows])
            probs.scatter_add_(1, target, probs.new_full(target.shape, -1.0))
            grad = probs.to(x.dtype)  # (R, V)
            x_grad[rows] = (grad @ weight) * counted[rows]
            _add_product(weight_grad, grad.T, x[rows] * counted[rows])
        ctx.save_for_backward(x_grad, weight_grad, targets)
        return _mean(torch.cat(losses), targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of x and weight."""
        x_grad, weight_grad, targets = ctx.saved_tensors
        scale = _mean(grad, targets)
        return x_grad.mul_(scale), weight_grad.mul_(scale), None


def head_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each row of x @ weight.T: (N,), 0 where the target is -1."""
    return torch.cat([loss for _, _, loss in _chunks(*_operands(x, weight), targets)])


def _operands(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype in which autocast multiplies; it leaves alone what writes in place."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype)


def _chunks(x: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their probabilities (R, V) and losses (R,), chunk by chunk in one buffer.

    256 rows keep a CPU's matrix product busy; a GPU's buffers stay below 1 GiB with 4096.
    """
    size = min(len(x), 256 if x.device.type == "cpu" else 4096)
    vocab = len(weight)
    # Rows that begin at a multiple of 64 numbers: a CPU writes 50257 wide ones 1.5 x slower.
    dtype = torch.promote_types(x.dtype, torch.float32)
    buffer = torch.empty(size, vocab + -vocab % 64, dtype=dtype, device=x.device)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        padded = buffer[: len(x) - start]  # (R, V and a little more)
        padded[:, vocab:] = -math.inf
        logits = padded[:, :vocab]  # (R, V)
        _set_product(logits, x[rows], weight.T)
        target_logit = logits.gather(1, _index(targets[rows]))  # (R, 1)
        largest = padded.amax(1, keepdim=True)
        torch.softmax(padded, 1, out=padded)
        # The likeliest token's probability is at least 1 / V, so its logarithm is exact where
        # the target's own may have underflowed.
        loss = largest - padded.amax(1, keepdim=True).log() - target_logit
        yield rows, logits, loss.squeeze(1).masked_fill(targets[rows] == IGNORED, 0.0)


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


def _mean(losses: Tensor, targets: Tensor) -> Tensor:
    return losses.sum() / (targets != IGNORED).sum().clamp(min=1)
