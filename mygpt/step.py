"""One optimizer step and one validation: what the training loop is made of.

B: rows of a micro-batch, T: block size.
"""

import hashlib
import math
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mygpt import checkpoint, plot, run_config, sharding
from mygpt.distributed import autocast, compute_dtype
from mygpt.evaluate import Loss, default_batch_size, evaluate
from mygpt.generate import generate
from mygpt.log import skip_line
from mygpt.optim import learning_rate
from mygpt.stopping import Stop, Stopped
from mygpt.train_state import Job

# A step that has come so far is finished when the run is asked to stop, any other is dropped.
ALMOST_DONE = 0.9


@dataclass(frozen=True)
class Outcome:
    """What became of a step: the same on all ranks."""

    loss: float  # nats, the mean over all tokens of the step, before the update
    norm: float  # of the whole gradient, before clipping
    lr: float
    windows: range  # of the stream, that the step was trained on
    skipped: str = ""  # why the weights were left as they were; empty if they moved


def train_step(job: Job, stop: Stop) -> Outcome:
    """Take the job one step further, or leave it as it is and raise `Stopped`.

    A step without finite numbers, or one that `job.spikes` refuses, reads its data and counts, but
    moves neither the weights nor what the optimizer remembers.
    """
    before = job.loader.state_dict()
    loss = _backward(job, stop, before)
    lr = learning_rate(
        job.step,
        max_lr=job.config.max_lr,
        min_lr=job.config.min_lr,
        warmup_steps=job.config.warmup_steps,
        max_steps=job.config.max_steps,
        schedule=job.config.schedule,
    )
    for optimizer in job.optimizers:
        job.scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(job.model.parameters(), job.config.grad_clip)
    norm = sharding.full_tensor(norm)
    # Whether to move is decided here, on the CPU, and not on the device: every optimizer would
    # need an update that can be undone. So the device is waited for once a step, at this line.
    mean_loss, mean_norm = job.ranks.all_reduce_mean(torch.stack([loss, norm]))
    skipped = _overflow(job, mean_loss, mean_norm) or job.spikes.judge(mean_loss, mean_norm)
    for optimizer in job.optimizers:
        if not skipped:
            job.scaler.step(optimizer)
        optimizer.zero_grad()
    job.scaler.update()
    job.step += 1
    windows = range(before["position"], job.loader.state_dict()["position"])
    return Outcome(mean_loss, mean_norm, lr, windows, skipped)


def _backward(job: Job, stop: Stop, before: dict[str, object]) -> Tensor:
    """The gradient of the step's mean loss, and this rank's part of the loss, ()."""
    total = torch.zeros((), device=job.ranks.device)
    for micro_step in range(job.micro_steps):
        if stop.asked() and micro_step < ALMOST_DONE * job.micro_steps:
            job.loader.load_state_dict(before)
            for optimizer in job.optimizers:
                optimizer.zero_grad()
            raise Stopped(stop.reason)
        x, y = next(job.loader)  # (B, T), (B, T)
        torch.manual_seed(dropout_seed(job.config.seed, job.step, micro_step, job.ranks.rank))
        # Gradients add up on each rank; only the last backward pass averages them over the ranks.
        is_last = micro_step == job.micro_steps - 1
        with nullcontext() if job.ddp is None or is_last else job.ddp.no_sync():
            with autocast(job.ranks.device):
                _, loss = (job.ddp or job.model)(x, y)
            job.scaler.scale(loss / job.micro_steps).backward()
        total += loss.detach() / job.micro_steps
    return total


def _overflow(job: Job, loss: float, norm: float) -> str:
    """Why the loss scaler of fp16 gives a step up, "" if it does not.

    That is how it finds its scale, and no fault; at a scale of 1 there is nothing left to find.
    """
    if not job.scaler.is_enabled() or not math.isfinite(loss) or math.isfinite(norm):
        return ""
    scale = job.scaler.get_scale()
    return f"fp16 overflow at loss scale {scale:g}" if scale > 1 else ""


def dropout_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """The seed of all that is random in one forward pass: a hash, 64 bits.

    So a checkpoint need not hold the state of any generator, and nothing else that draws numbers
    (validation, samples, calibration, a resume) can shift what dropout draws. The numbers are
    hashed and not added, so that step 1 of seed 7 is not step 0 of seed 8, and all 64 bits are
    mixed, because the CPU's generator takes only the low 32.
    """
    numbers = struct.pack("<4Q", seed, step, micro_step, rank)
    return int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest(), "little")


def validate(job: Job, stop: Stop) -> Loss:
    """The loss on the fixed subset, the same on all ranks. Raises `Stopped` if asked to stop."""
    rows = default_batch_size(job.config.model.block_size, job.ranks.device)
    together = rows * job.ranks.world_size  # a batch for each rank: so all ask equally often
    nats, tokens = 0.0, 0
    with sharding.unsharded(job.model):
        for first in range(0, len(job.val_windows), together):
            stop.check()
            part = evaluate(job.model, job.val_windows[first : first + together], job.ranks, rows)
            nats, tokens = nats + part.nats, tokens + part.tokens
    return Loss(nats, tokens)


# --- What a training says of itself before its first step and after its last, for people.


def description(job: Job, training_tokens: int) -> Iterator[str]:
    """What is about to be trained, on what and how."""
    config, shape, loader = job.config, job.config.model, job.loader
    tokens = config.max_steps * config.total_batch_size
    epochs = tokens / shape.block_size / loader.windows_per_epoch
    yield (
        f"data   {' '.join(config.data)} ({job.record.fingerprint[:12]}): {training_tokens:,} "
        f"training tokens, of which {loader.unused_tokens:,} fill no window in an epoch"
    )
    for earlier in job.record.earlier:
        known = ", ".join(f"{name} {at}" for name, at in earlier["generations"].items())
        yield f"grown  until step {earlier['until']} the data were those of generation {known}"
    yield f"length {config.max_steps:,} steps = {tokens:,} tokens = {epochs:.2f} epochs"
    yield (
        f"model  {shape.n_layers} layers, {shape.n_heads} heads, {shape.n_embed} wide, "
        f"{shape.block_size} tokens of context: {job.model.num_params():,} parameters, "
        f"{job.model.num_params(non_embedding=True):,} outside the embeddings"
    )
    yield (
        f"batch  {config.total_batch_size:,} tokens = {config.micro_batch} rows * "
        f"{shape.block_size} tokens * {job.micro_steps} micro-steps * {job.ranks.world_size} ranks"
    )
    dtype = str(compute_dtype(job.ranks.device)).removeprefix("torch.")
    scaled = ", with a loss scaler: this GPU has no bfloat16" if job.scaler.is_enabled() else ""
    yield f"device {job.ranks.device}, {dtype}{scaled}"
    if config.shard != "none" and job.ranks.world_size > 1:
        yield f"shard  {config.shard}, over {job.ranks.world_size} ranks"


def skipped(job: Job, outcome: Outcome) -> str:
    """The line of a step that did not move the weights, and how to look at what it read."""
    line = skip_line(
        job.step, job.config.max_steps, outcome.loss, outcome.norm, outcome.skipped, outcome.windows
    )
    return f"{line}  look: python -m shards explain --run {job.config.log_dir} --step {job.step}"


def farewell(run: Path, step: int, of: int) -> Iterator[str]:
    """Where everything is, and what to do next."""
    yield f"finished step {step} of {of}"
    if step < of:
        yield "stopped as --stop-at asked: the same command without it goes on to the end"
    yield f"log         {run / 'log.txt'}"
    yield f"picture     {plot.draw_or_explain(run)}"
    yield f"checkpoint  {checkpoint.find(run)}"
    yield f"next        python eval.py {run}"


# --- Texts that the model writes while it is trained, so that one can see it learn.


TOKENS = 64  # of each text, at most


class Coder(Protocol):
    """What `shards.tokenizer.Tokenizer` does."""

    @property
    def eot(self) -> int:
        """The token that begins a document."""

    @property
    def n_vocab(self) -> int:
        """How many tokens there are."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens."""


def write_samples(job: Job, coder: Coder) -> None:
    """Let the model continue each --sample-prompt, and append that to RUN/samples.jsonl.

    Without a prompt a document is begun. The same weights write the same text.
    """
    prompts = job.config.sample_prompt or ("",)
    # All ranks write the same text: a model that is cut over them can't run on one of them alone.
    with sharding.unsharded(job.model):
        written = generate(
            job.model,
            [[coder.eot, *coder.encode(prompt)] for prompt in prompts],
            TOKENS,
            temperature=0.8,
            seed=job.config.seed,
            stop=coder.eot,
        )
    # A model may have more ids than its tokenizer: those past the end stand for no text.
    texts = [coder.decode([token for token in ids if token < coder.n_vocab]) for ids in written]
    if job.ranks.is_main:
        samples = [
            {"prompt": prompt, "text": prompt + text}
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        run_config.write_samples(job.config.log_dir, job.step, samples)
