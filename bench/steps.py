"""Training steps to be measured: ours as train.py takes it, and the ones it is measured against.

Every maker returns a step: called with its number from 0 it trains on that number's batch and
returns the loss before the update, on the device. All begin with the same weights where they can,
and see the same batches. B: rows, T: block size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.plain import PlainGPT
from mygpt.config import GPTConfig
from mygpt.distributed import Ranks, autocast, compute_dtype
from mygpt.model import GPT
from mygpt.run_config import RunRecord
from mygpt.settings import PRESETS
from mygpt.step import train_step
from mygpt.stopping import Stop
from mygpt.train_state import assemble

Step = Callable[[int], float]
BATCHES = 8  # different ones, over and over: so the loss falls
RATE, DECAY, BETAS, CLIP = 6e-4, 0.1, (0.9, 0.95), 1.0
SEED = 1337


@dataclass(frozen=True)
class Size:
    """What every contender trains: a shape, and the rows of one batch."""

    model: GPTConfig
    rows: int
    device: str

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.rows * self.model.block_size

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets (B, T) of a step."""
        generator = torch.Generator().manual_seed(number % BATCHES)
        shape = (self.rows, self.model.block_size + 1)
        tokens = torch.randint(self.model.vocab_size, shape, generator=generator)
        tokens = tokens.to(self.device)
        return tokens[:, :-1], tokens[:, 1:]


class Batches:
    """The batches as a `mygpt.train_state.Stream`: those of a loader, without its costs."""

    wait_seconds = 0.0
    windows_per_epoch = BATCHES
    unused_tokens = 0

    def __init__(self, size: Size) -> None:
        self.size, self.number = size, 0

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next batch."""
        self.number += 1
        return self.size.batch(self.number - 1)

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"position": self.number * self.size.rows}

    def load_state_dict(self, state: dict[str, Any], earlier: Sequence[str] = ()) -> None:
        """Go there."""
        self.number = state["position"] // self.size.rows


def first_weights(size: Size) -> GPT:
    """The model that all begin with."""
    torch.manual_seed(SEED)
    return GPT(size.model)


def ours(size: Size, compiled: bool) -> Step:
    """`mygpt.step.train_step` on what `mygpt.train_state` makes, on one rank."""
    config = replace(
        PRESETS["gpt2"][1],
        model=size.model,
        seed=SEED,
        micro_batch=size.rows,
        total_batch_size=size.tokens,
        max_lr=RATE,
        min_lr=RATE,
        warmup_steps=1,
        max_steps=2**31,
        weight_decay=DECAY,
        beta1=BETAS[0],
        beta2=BETAS[1],
        grad_clip=CLIP,
        compile=False,
    )
    ranks = Ranks(0, 0, 1, torch.device(size.device))
    job = assemble(RunRecord(config, "", {}), ranks, Batches(size), [], fresh=True)
    if compiled:
        job.model.compile()
    stop = Stop(ranks)
    return lambda number: train_step(job, stop).loss


def plain(size: Size, compiled: bool) -> Step:
    """`PlainGPT`, with torch's own AdamW."""
    vocab = size.model.vocab_size
    on_gpu = size.device == "cuda"
    model = PlainGPT(size.model, vocab + -vocab % 64 if on_gpu else vocab)
    with torch.no_grad():
        for name, parameter in first_weights(size).named_parameters():
            model.get_parameter(name)[: len(parameter)] = parameter
    return _trained(size, model.to(size.device), lambda run, x, y: run(x, y), compiled)


def hugging_face(size: Size, compiled: bool) -> Step:
    """GPT2LMHeadModel with its own loss."""
    torch.manual_seed(SEED)
    model = hugging_face_model(size.model, use_cache=False).to(size.device)
    return _trained(size, model, lambda run, x, y: run(input_ids=x, labels=x).loss, compiled)


def hugging_face_model(shape: GPTConfig, **options: Any) -> Any:
    """GPT2LMHeadModel of a shape, without dropout, freshly drawn."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.block_size,
        n_embd=shape.n_embed,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_inner=shape.n_hidden,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        **options,
    )
    return GPT2LMHeadModel(config)


def _trained(
    size: Size,
    model: torch.nn.Module,
    loss_of: Callable[[Any, Tensor, Tensor], Tensor],
    compiled: bool,
) -> Step:
    """Forward, backward, clipping and AdamW, in the order and with the settings of our own."""
    device = torch.device(size.device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": rest, "weight_decay": 0.0},
    ]
    # As in nanoGPT: fused where there is a GPU, else torch's default.
    adamw = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=device.type == "cuda" or None)
    run = torch.compile(model) if compiled else model

    def step(number: int) -> float:
        x, y = size.batch(number)
        with autocast(device):
            loss = loss_of(run, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return step


def matrix_rate(device: str, size: int) -> float:
    """FLOP/s of one square product, as training multiplies: bf16 on a GPU that has it, else fp32.

    The best of a few: what the machine can do, not what it was kept from.
    """
    from torch.utils.benchmark import Timer

    a = torch.randn(size, size, device=device).to(compute_dtype(torch.device(device)))
    timer = Timer(
        "a @ b", globals={"a": a, "b": a.T.contiguous()}, num_threads=torch.get_num_threads()
    )
    seconds = min(timer.timeit(3 if device == "cpu" else 30).mean for _ in range(3))
    return 2 * math.pow(size, 3) / seconds
