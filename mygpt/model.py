"""GPT-2 in one file: pre-norm transformer blocks, learned positions, tied embedding and head.

Parameter names are GPT-2's, as in nanoGPT without its `transformer.` prefix. No I/O, no distributed
code, no printing.

Shapes: B batch, T tokens, C n_embed, H n_heads, D = C / H, L n_layers, S tokens in the cache,
V vocab_size, N = B * T.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mygpt.config import GPTConfig
from mygpt.loss import LinearCrossEntropy


class GPT(nn.Module):
    """GPT-2 with random initial weights. `flash=False` selects the manual attention."""

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
        self.cross_entropy = LinearCrossEntropy()
        self._init_weights()
        self.gradient_checkpointing = False  # recompute each block's activations in backward

    def _init_weights(self) -> None:
        # GPT-2, section 2.3: the projections into the residual stream are scaled by
        # 1 / sqrt(2 * n_layers), so that its variance does not grow with depth.
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (logits, None), or (None, loss) if there are targets.

        `idx` and `targets` are (B, T) int64, logits (B, T, V). The loss is the mean cross entropy
        in nats over the targets that are not -1, and 0 if all of them are. Unlike in nanoGPT there
        are no logits beside it: they never exist all at once. Raises ValueError for more than
        block_size tokens.
        """
        x = self._hidden(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x), None
        x, targets = x.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        return None, self.cross_entropy.mean(x, self.lm_head.weight, targets)

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy in nats of each target: (B, T), 0 where the target is -1."""
        x, flat = self._hidden(idx).flatten(0, 1), targets.flatten()  # (N, C), (N,)
        losses = self.cross_entropy.per_token(x, self.lm_head.weight, flat)  # (N,)
        return losses.view_as(targets)

    def _hidden(self, idx: Tensor) -> Tensor:
        """Return the final hidden states (B, T, C), the head's input, of tokens (B, T)."""
        n_tokens = idx.size(1)
        if n_tokens > self.config.block_size:
            raise ValueError(
                f"expected at most block_size {self.config.block_size} tokens, found {n_tokens}: "
                "cut the input"
            )
        positions = torch.arange(n_tokens, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C)
        mlp: Tensor | None = None
        for block in self.h:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, mlp = checkpoint(block, x, mlp, use_reentrant=False)
            else:
                x, mlp = block(x, mlp)
        return self.ln_f(x + mlp)

    @torch.no_grad()
    def next_logits(self, idx: Tensor, lengths: Tensor | None, cache: "KeyValueCache") -> Tensor:
        """Process new tokens (B, T) with the cache; return the logits (B, V) of the next ones.

        `lengths` (B,): tokens per sequence that are not padding, at least 1; None: all of them.
        """
        positions = cache.begin_step(idx.size(1), lengths)  # (B, T)
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C)
        mlp = None
        for layer, block in enumerate(self.h):
            x, mlp = block.forward(x, mlp, cache, layer)  # __call__ is compiled for training
        x = x + mlp
        rows = torch.arange(len(x), device=x.device)
        last = x[:, -1] if lengths is None else x[rows, lengths - 1]  # (B, C)
        return self.lm_head(self.ln_f(last))

    def compile(self, backend: Any = "inductor") -> None:
        """Compile each block (one graph for all but the first) and the loss, in place.

        Every shape is compiled for itself: a graph for any batch size would be slower for all.
        """
        for block in self.h:
            block.compile(backend=backend, dynamic=False)
        self.cross_entropy.compile(backend)

    @property
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Token and position embeddings. The head shares the first, so it is not listed again."""
        return self.wte.weight, self.wpe.weight

    def num_params(self, non_embedding: bool = False) -> int:
        """Return the number of parameters, tied ones once; or without wte and wpe."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - sum(e.numel() for e in self.embeddings) if non_embedding else total

    def flops_per_token(self) -> int:
        """Return the FLOPs of training on one token: 6 per multiplied weight, plus attention.

        PaLM's convention (appendix B). `wte` counts, as it is the head; `wpe` is only looked up.
        """
        c = self.config
        weights = self.num_params() - self.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layers * c.n_embed * c.block_size


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream.

    The MLP's output is added by the next block: compiled, its first norm reads x anyway.
    """

    def __init__(self, config: GPTConfig, flash: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embed, bias=config.bias)
        self.attn = CausalSelfAttention(config, flash)
        self.ln_2 = nn.LayerNorm(config.n_embed, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, mlp: Tensor | None, cache: "KeyValueCache | None" = None, layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return the stream x and the output of the MLP, from those of the block before.

        All are (B, T, C). With a cache, x continues the tokens in its `layer`.
        """
        if mlp is not None:
            x = x + mlp
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x, self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the tokens before it."""

    def __init__(self, config: GPTConfig, flash: bool) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.attention = F.scaled_dot_product_attention if flash else manual_attention
        self.c_attn = nn.Linear(config.n_embed, 3 * config.n_embed, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embed, config.n_embed, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: "KeyValueCache | None" = None, layer: int = 0) -> Tensor:
        """Map (B, T, C) to (B, T, C); arguments as in `Block.forward`."""
        qkv = self.c_attn(x).unflatten(2, (3, self.n_heads, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        mask = None
        if cache is not None:
            k, v, mask = cache.update(layer, k, v)  # (B, H, S, D) each, (B, 1, T, S)
        dropout = self.dropout if self.training else 0.0
        y = self.attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


def manual_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    """Textbook attention with the signature of `scaled_dot_product_attention`."""
    if is_causal:
        attn_mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))  # (B, H, T, S)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return F.dropout(scores.softmax(3), dropout_p) @ v  # (B, H, T, D)


class MLP(nn.Module):
    """Two linear layers around GELU, in the tanh form that GPT-2's weights were trained with."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embed, config.n_hidden, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(config.n_hidden, config.n_embed, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class KeyValueCache:
    """Keys and values of `batch` sequences; sequence b holds `lengths[b]` of `capacity` tokens.

    Allocated once, in the dtype and on the device of `model`. A `static` cache is read whole, so
    that every step has the same shapes, as a CUDA graph requires; any other up to the longest
    sequence.
    """

    def __init__(self, model: GPT, batch: int, capacity: int, static: bool = False) -> None:
        c, weight = model.config, model.wte.weight
        self.capacity, self.static = capacity, static
        shape = (c.n_layers, 2, batch, c.n_heads, capacity, c.n_embed // c.n_heads)
        # zeros, not empty: masked slots still enter the matmul, and 0 * NaN is NaN
        self.buffer = weight.new_zeros(shape)  # (L, 2, B, H, S, D)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.is_empty = True

    def begin_step(self, n_tokens: int, lengths: Tensor | None) -> Tensor:
        """Make room for `n_tokens` per sequence, of which `lengths` (B,) are kept; None: all.

        Returns their positions (B, T). Each layer then stores and reads through `update`.
        """
        span = self.capacity if self.static else int(self.lengths.max()) + n_tokens
        if span > self.capacity:
            raise ValueError(
                f"expected at most {self.capacity} tokens, the cache's capacity, found {span}: "
                "begin a new cache with the last of them"
            )
        steps = torch.arange(span, device=self.lengths.device)
        self.positions = self.lengths[:, None] + steps[:n_tokens]  # (B, T)
        # A token attends to its own position and all before it, in its sequence. If nothing lies
        # before this step, that is plain causal attention, for which torch has faster kernels.
        self.mask = None
        if not self.is_empty:
            self.mask = (steps <= self.positions[..., None])[:, None]  # (B, 1, T, S)
        self.is_empty = False
        self.lengths += n_tokens if lengths is None else lengths
        return self.positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k and v (B, H, T, D) of one layer; return what to attend to, and the mask."""
        keys, values = self.buffer[layer]  # (B, H, S, D) each
        rows = torch.arange(len(k), device=k.device)[:, None]
        # Padding is stored too; the next token overwrites it before any token attends to it.
        keys[rows, :, self.positions] = k.transpose(1, 2)
        values[rows, :, self.positions] = v.transpose(1, 2)
        if self.mask is None:
            return k, v, None
        span = self.mask.size(3)
        return keys[:, :, :span], values[:, :, :span], self.mask
