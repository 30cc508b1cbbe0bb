"""GPT-2 as one file: pre-norm transformer blocks, learned positions, tied embedding and head.

The layers have nanoGPT's names. Nothing here reads files, knows of ranks or prints.

Shapes: B batch, T tokens, C n_embed, H n_heads, D = C / H, S cached tokens, V vocab_size,
N = B * T.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mygpt.config import GPTConfig
from mygpt.loss import HeadLoss, RowKernel, head_losses, mean, row_gradients, row_losses


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
        self.gradient_checkpointing = False  # recompute each block's activations in backward
        self._row_gradients: RowKernel | None = None  # compiled, see `compile`
        self._row_losses: RowKernel | None = None

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
            return None, HeadLoss.apply(x, self.lm_head.weight, targets, self._row_gradients)
        losses = head_losses(x, self.lm_head.weight, targets, self._row_losses)
        return None, mean(losses, targets)

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in nats of each target: (B, T), 0 where the target is -1."""
        x, flat = self._final(idx).flatten(0, 1), targets.flatten()  # (N, C), (N,)
        return head_losses(x, self.lm_head.weight, flat, self._row_losses).view_as(targets)

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
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.ln_f(x)

    @torch.no_grad()
    def next_logits(self, idx: Tensor, lengths: Tensor | None, cache: "KeyValueCache") -> Tensor:
        """Logits (B, V) of the token that follows each row, computing only what `cache` lacks.

        Row b of `idx` (B, T) continues row b of the cache with its first `lengths[b]` tokens,
        at least one; the rest of the row is padding. None says that there is no padding, which
        is faster: as long as all rows are equally long, no mask is needed.
        """
        positions = cache.advance(idx.size(1), lengths)  # (T,) or (B, T)
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block.forward(x, cache, layer)  # never the compiled one: it is for training
        if lengths is None:
            last = x[:, -1]  # (B, C)
        else:
            last = x[torch.arange(len(x), device=x.device), lengths - 1]
        return self.lm_head(self.ln_f(last))

    def compile(self, *args: Any, **options: Any) -> None:
        """`torch.compile`, in place: one block is compiled and all use it; the loss by itself."""
        for block in self.h:
            block.compile(*args, **options)
        self._row_gradients = torch.compile(row_gradients, *args, **options)
        self._row_losses = torch.compile(row_losses, *args, **options)

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
        mask, causal = None, True
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, H, S, D) each
            mask, causal = cache.mask, cache.causal
        dropout = self.dropout if self.training else 0.0
        y = self.attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
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

    Allocated once, in the dtype and on the device of `model`. While all rows are equally long they
    are read and written in slices. A `static` cache never looks at lengths that lie on the host:
    every step reads all of it through a mask, with the same shapes and in the same memory, so that
    a CUDA graph can repeat the step.
    """

    def __init__(self, model: GPT, batch: int, capacity: int, static: bool = False) -> None:
        c, weight = model.config, model.wte.weight
        self.capacity, self.static = capacity, static
        shape = (c.n_layers, batch, c.n_heads, capacity, c.n_embed // c.n_heads)
        # Zeros, since what a mask hides still gets multiplied by 0.
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.longest = 0  # no row is longer: known without asking the device
        self.even = not static  # whether all rows are as long as the longest
        self.mask: Tensor | None = None  # (B, 1, T, S) or (T, S): what the tokens at hand may see
        self.causal = False  # without a mask: whether they may not see each other's future

    def advance(self, tokens: int, lengths: Tensor | None) -> Tensor:
        """Make room for `tokens` more, of which row b keeps `lengths[b]`, all of them if None.

        Returns their positions: (T,) where they are the same for all rows, else (B, T).
        """
        start, self.longest = self.longest, self.longest + tokens
        if self.longest > self.capacity:
            raise ValueError(
                f"expected at most {self.capacity} tokens, the cache's capacity, found "
                f"{self.longest}: begin a new cache with the last of them"
            )
        self.even = self.even and lengths is None
        steps = torch.arange(tokens, device=self.lengths.device)
        self.positions = start + steps if self.even else self.lengths[:, None] + steps
        self.causal = self.even and start == 0 and tokens > 1
        self.mask = None if self.even and (start == 0 or tokens == 1) else self._mask()
        self.lengths += tokens if lengths is None else lengths
        return self.positions

    def _mask(self) -> Tensor:
        """Each token sees what lies in its row up to its own position: (B, 1, T, S) or (T, S)."""
        seen = torch.arange(self._span(), device=self.lengths.device)  # (S,)
        mask = seen <= self.positions[..., None]
        return mask if self.even else mask[:, None]

    def _span(self) -> int:
        return self.capacity if self.static else self.longest

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) of one layer; returns all keys and values so far."""
        keys, values = self.keys[layer], self.values[layer]
        if self.even:
            keys[:, :, self.longest - k.size(2) : self.longest] = k
            values[:, :, self.longest - k.size(2) : self.longest] = v
        else:
            # Padding is stored too; the row's next token takes its place before any token sees it.
            rows = torch.arange(len(k), device=k.device)[:, None]
            keys[rows, :, self.positions] = k.transpose(1, 2)
            values[rows, :, self.positions] = v.transpose(1, 2)
        return keys[:, :, : self._span()], values[:, :, : self._span()]
