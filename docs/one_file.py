"""All of myGPT on one page of plain PyTorch: from token shards to a trained GPT-2.

    python -m prepare stdlib --out data/stdlib
    python docs/one_file.py data/stdlib

The page computes what the system computes, without what makes the system fast, safe and large. It
imports nothing of the project, and the tests check one against the other: the same batches, the
same initial weights, the same losses to rounding. So this command logs what the page prints:

    python train.py tiny --data data/stdlib --log-dir log/one_file --device cpu \
        --optimizer adamw --schedule cosine --max-lr 1e-3 --min-lr 1e-4 \
        --max-steps 100 --warmup-steps 5 --total-batch-size 1024 --micro-batch 4

It leaves out the tokenizer, mixtures of datasets, averaging gradients over ranks, checkpoints,
dropout, Muon, mixed precision, compilation, and every check of the input.

Shapes: B sequences, T tokens of context, C n_embed, H n_heads, D = C / H, V vocab_size.
"""

import json
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW


@dataclass
class Config:
    """A model small enough for a CPU, and how to train it."""

    vocab_size: int = 50257
    block_size: int = 128  # tokens of context: T
    n_layers: int = 4
    n_heads: int = 4
    n_embed: int = 128
    seed: int = 1337  # of the initial weights and of the order of the data
    max_steps: int = 100
    total_batch_size: int = 1024  # tokens per optimizer step
    micro_batch_size: int = 4  # sequences per forward and backward pass: B
    max_lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    val_tokens: int = 8192  # size of the validation subset that is scored during training


# --- Data: a dataset is a folder of token shards, with a manifest that lists them.


def open_dataset(folder: str | Path) -> tuple[dict, dict[str, list[np.ndarray]]]:
    """Return the tokenizer's description, and the shards of each split: uint16 (n_tokens,)."""
    manifest = json.loads(Path(folder, "manifest.json").read_text("utf-8"))
    splits = {}
    for name, split in manifest["splits"].items():
        paths = [Path(folder, shard["file"]) for shard in split["shards"]]
        splits[name] = [np.load(path, mmap_mode="r") for path in paths]
    return manifest["tokenizer"], splits


def mix(x: int) -> int:
    """Return a 64-bit number that looks random: the finalizer of SplitMix64."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def hash64(*numbers: int) -> int:
    """Return a 64-bit hash of some numbers; their order matters."""
    result = 0
    for number in numbers:
        result = mix(result ^ mix(number))
    return result


def permute(index: int, size: int, key: int) -> int:
    """Return the image of `index` under the permutation of range(size) that `key` selects.

    A shuffled list of all windows would have to be stored; a Feistel network computes any entry of
    one. Each round XORs a hash of the right half of the bits into the left half, then swaps the
    halves. Every round can be undone, so no two indices collide. A result outside range(size) goes
    through the network again, until one falls inside.
    """
    half_bits = 1
    while 4**half_bits < size:
        half_bits += 1
    while True:
        left, right = divmod(index, 2**half_bits)
        for number in range(6):
            left, right = right, left ^ (mix(right ^ key ^ mix(number)) % 2**half_bits)
        index = left * 2**half_bits + right
        if index < size:
            return index


def window_at(position: int, shards: list[np.ndarray], c: Config) -> np.ndarray:
    """Return the T + 1 tokens at a position of the endless stream of training windows.

    A shard of n tokens holds (n - 1) // T windows; the last target of one is the first input of
    the next. Each epoch serves every window of every shard once, in a new order.
    """
    counts = [max(len(tokens) - 1, 0) // c.block_size for tokens in shards]
    epoch, index = divmod(position, sum(counts))
    window = permute(index, sum(counts), key=hash64(c.seed, epoch))
    shard = 0
    while window >= counts[shard]:  # past the end of this shard: continue in the next one
        window -= counts[shard]
        shard += 1
    # A few tokens of the shard are left over. In each epoch the first window starts at another
    # offset within this slack, so that those tokens are read too and the boundaries move.
    slack = (len(shards[shard]) - 1) % c.block_size
    offset = hash64(c.seed, epoch, shard) % (slack + 1)
    start = offset + window * c.block_size
    return shards[shard][start : start + c.block_size + 1]


def batches(shards: list[np.ndarray], c: Config, rank: int = 0, world_size: int = 1) -> Iterator:
    """Yield (x, y) forever, each (B, T): the inputs and the targets of one rank.

    Ranks take turns: rank 0 gets the first B windows of the stream, rank 1 the next B, and so on.
    """
    position = rank * c.micro_batch_size
    while True:
        windows = [window_at(position + row, shards, c) for row in range(c.micro_batch_size)]
        tokens = torch.from_numpy(np.stack(windows).astype(np.int64))  # (B, T + 1)
        yield tokens[:, :-1], tokens[:, 1:]
        position += c.micro_batch_size * world_size


# --- Model: GPT-2, with nanoGPT's names for the layers.


class CausalSelfAttention(nn.Module):
    """Each token gathers information from itself and the tokens before it."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.n_heads = c.n_heads
        self.c_attn = nn.Linear(c.n_embed, 3 * c.n_embed)
        self.c_proj = nn.Linear(c.n_embed, c.n_embed)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        qkv = self.c_attn(x).chunk(3, dim=2)  # (B, T, C) each
        q, k, v = (t.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for t in qkv)  # (B, H, T, D)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))  # (B, H, T, T)
        is_future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(diagonal=1)  # (T, T)
        weights = scores.masked_fill(is_future, -math.inf).softmax(dim=3)
        return self.c_proj((weights @ v).transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)


class Block(nn.Module):
    """Attention, then an MLP: each reads the normalized residual stream and adds to it."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embed)
        self.attn = CausalSelfAttention(c)
        self.ln_2 = nn.LayerNorm(c.n_embed)
        c_fc = nn.Linear(c.n_embed, 4 * c.n_embed)
        c_proj = nn.Linear(4 * c.n_embed, c.n_embed)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=nn.GELU("tanh"), c_proj=c_proj))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with random weights, drawn from PyTorch's global generator."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.n_embed)
        self.wpe = nn.Embedding(c.block_size, c.n_embed)
        self.h = nn.Sequential(*(Block(c) for _ in range(c.n_layers)))
        self.ln_f = nn.LayerNorm(c.n_embed)
        self.lm_head = nn.Linear(c.n_embed, c.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # one matrix embeds tokens and predicts them
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() >= 2:
                # The residual stream sums 2 * n_layers projections: keep the variance of the sum.
                is_residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layers if is_residual else 1))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Map token ids (B, T) to next-token logits (B, T, V), or with targets to their loss."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))  # (B, T, C)
        logits = self.lm_head(self.ln_f(self.h(x)))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# --- Optimizer: AdamW; the learning rate rises linearly, then falls along a cosine.


def make_optimizer(model: GPT, c: Config) -> AdamW:
    """Return AdamW with weight decay on matrices and embeddings, not on biases and LayerNorms."""
    decayed = {"params": [p for p in model.parameters() if p.dim() >= 2]}
    others = {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}
    return AdamW([decayed, others], betas=c.betas, weight_decay=c.weight_decay)


def learning_rate(step: int, c: Config) -> float:
    """Return the learning rate of a step; the first step is 0."""
    if step < c.warmup_steps:
        return c.max_lr * (step + 1) / c.warmup_steps
    progress = (step - c.warmup_steps) / (c.max_steps - c.warmup_steps)  # from 0 to 1
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (c.max_lr - c.min_lr)


def train_step(model: GPT, optimizer: AdamW, data: Iterator, step: int, c: Config) -> tuple:
    """Take one optimizer step; return the loss and gradient norm before it, and its lr."""
    grad_accum_steps = c.total_batch_size // (c.micro_batch_size * c.block_size)
    total_loss = 0.0
    optimizer.zero_grad()
    for _ in range(grad_accum_steps):
        loss = model(*next(data)) / grad_accum_steps
        loss.backward()  # adds to the gradient of the micro-batches so far
        total_loss += loss.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)  # the norm before clipping
    lr = learning_rate(step, c)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return total_loss, norm.item(), lr


# --- Evaluation, in which each target of a split is scored once, and sampling.


def eval_windows(shards: list[np.ndarray], c: Config, n_tokens: int = 0) -> list[np.ndarray]:
    """Return windows of at most T + 1 tokens that contain each target of a split once.

    The first token of a shard is not a target, since nothing precedes it. With `n_tokens`, return
    an evenly spaced subset with about that many targets.
    """
    starts = [(shard, i) for shard in shards for i in range(0, len(shard) - 1, c.block_size)]
    windows = [shard[i : i + c.block_size + 1] for shard, i in starts]
    count = min(len(windows), max(1, n_tokens // c.block_size)) if n_tokens else len(windows)
    return [windows[i * len(windows) // count] for i in range(count)]


@torch.no_grad()
def evaluate(model: GPT, windows: list[np.ndarray]) -> tuple[float, int]:
    """Return the mean loss over all targets of the windows, and how many targets there are."""
    total_loss, n_targets = 0.0, 0
    for window in windows:
        tokens = torch.from_numpy(window.astype(np.int64))[None]  # (1, T + 1), or shorter
        total_loss += model(tokens[:, :-1], tokens[:, 1:]).item() * (len(window) - 1)
        n_targets += len(window) - 1
    return total_loss / n_targets, n_targets


@torch.no_grad()
def generate(model: GPT, tokens: list[int], count: int, c: Config, temperature: float) -> list[int]:
    """Return `tokens` followed by `count` more, sampled one by one."""
    for _ in range(count):
        logits = model(torch.tensor([tokens[-c.block_size :]]))[0, -1]  # (V,)
        probs = (logits / temperature).softmax(dim=0)
        tokens = [*tokens, int(torch.multinomial(probs, num_samples=1))]
    return tokens


def main(folder: str) -> None:
    """Train on the dataset in `folder`; print the losses and the token ids of a sample."""
    tokenizer, splits = open_dataset(folder)
    c = Config(vocab_size=tokenizer["n_vocab"])
    data = batches(splits["train"], c)
    torch.manual_seed(c.seed)
    model = GPT(c)
    optimizer = make_optimizer(model, c)
    for step in range(c.max_steps):
        loss, norm, lr = train_step(model, optimizer, data, step, c)
        print(f"step {step + 1}/{c.max_steps}  loss {loss:.6f}  lr {lr:.3e}  norm {norm:.4f}")
        if (step + 1) % 10 == 0:
            loss, n_targets = evaluate(model, eval_windows(splits["val"], c, c.val_tokens))
            print(f"val {step + 1}/{c.max_steps}  loss {loss:.6f}  tokens {n_targets}")
    loss, n_targets = evaluate(model, eval_windows(splits["val"], c))
    print(f"whole validation split  loss {loss:.6f}  tokens {n_targets}")
    print("sample", generate(model, [tokenizer["eot"]], 100, c, temperature=0.8))


if __name__ == "__main__":
    main(sys.argv[1])
