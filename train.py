"""Train a GPT on a dataset that `python -m prepare` has made.

    python train.py tiny --data data/demo --log-dir log/demo
    torchrun --standalone --nproc_per_node=4 train.py gpt2 --data data/web

The first word is a preset (gpt2 without one), every setting is a flag. The same command again
goes on where the run in --log-dir stopped. Exit code: 0 finished, or stopped by --stop-at; 2 the
input is wrong, a line says how; 75 interrupted (SIGINT, SIGTERM) at a checkpoint, run it again.
"""

# torch is imported inside the functions, after the flags are read: `--help` must not wait for it.
from __future__ import annotations

import hashlib
import math
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from mygpt import plot, runs, settings
from mygpt.log import Meter, RunLog, baseline_line, step_line, val_line
from mygpt.settings import TrainConfig
from shards.atomic import write_json
from shards.cli import one_line_errors
from shards.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from mygpt.distributed import Ranks
    from mygpt.model import GPT
    from shards.loader import TokenLoader

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: nothing is wrong, the same command goes on
FEW_TOKENS = 2**28  # beyond, counting them for the baseline would hold up the start


@one_line_errors()
def main(args: list[str] | None = None) -> int:
    """Read the flags, find the dataset and the run's folder, train. Returns the exit code."""
    # Threads that wait for one another should sleep, not spin (read once, when torch is imported):
    # on a machine that does other work as well, steps are several times slower otherwise.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    asked = settings.parse(sys.argv[1:] if args is None else args, str(__doc__))
    config, manifest = open_run(asked)
    return train(config, manifest)


def open_run(asked: TrainConfig) -> tuple[TrainConfig, Manifest]:
    """The settings and the dataset: those of the run that lies in the folder, if one does.

    Raises ValueError, naming the first difference, if `asked` or its dataset does not fit that run.
    """
    begun = runs.read_run(asked.log_dir)
    config = runs.continued(begun.config, asked) if begun else asked
    if config.data is None:
        config = replace(config, data=settings.only_dataset())
        if os.environ.get("RANK", "0") == "0":
            print(f"no --data given: taking {config.data}, the only dataset there")
    manifest = Manifest.load(str(config.data), begun.generation if begun else None)
    if begun and begun.fingerprint != manifest.fingerprint:
        raise ValueError(
            f"{config.log_dir} holds a run with dataset fingerprint {begun.fingerprint[:12]}, "
            f"{config.data} has {manifest.fingerprint[:12]}: give the --data of that run, or "
            "another --log-dir"
        )
    if manifest.tokenizer.n_vocab > config.model.vocab_size:
        raise ValueError(
            f"expected a vocabulary of at most {config.model.vocab_size}, the model's, found "
            f"{manifest.tokenizer.n_vocab} in {config.data}: give --vocab-size "
            f"{manifest.tokenizer.n_vocab}"
        )
    return config, manifest


def train(config: TrainConfig, manifest: Manifest) -> int:
    """Take the run from its newest checkpoint, or from nothing, to its end: the exit code."""
    from mygpt import checkpoint
    from mygpt.distributed import Interrupt, start
    from mygpt.evaluate import evaluate

    run = config.log_dir
    with (
        start(config.device, config.deterministic) as ranks,
        checkpoint.locked(run) if ranks.is_main else nullcontext(),
        Interrupt().watch() as interrupt,
    ):
        settings.accumulation(config, ranks.world_size)  # refused before anything slow begins
        log = RunLog(run, enabled=ranks.is_main)
        if not config.max_steps:
            log.write(f"measuring how many steps fit into {config.time_budget:g} seconds")
        config = config.resolved(config.max_steps or measured_steps(config, manifest, ranks))
        of, last = config.max_steps, min(config.max_steps, config.stop_at or config.max_steps)
        if ranks.is_main:
            record = runs.RunRecord(config, manifest.fingerprint, manifest.generation)
            write_json(run / "config.json", record.to_json())
            checkpoint.prune(run, config.keep)
        step = ranks.of_main(max(checkpoint.steps(run), default=0))
        if step >= last:
            state = "is finished" if step >= of else "has come to --stop-at"
            log.write(f"nothing left to do: the run in {run} {state}, step {step} of {of}")
            return 0

        job = build(config, manifest, ranks)
        best_loss = restore(job, step) if step else math.inf
        log.write(f"resume {step}/{of}" if step else f"start 0/{of}")
        if ranks.is_main:
            log.write(*description(job))

        meter = Meter(config.total_batch_size, job.ideal_seconds)
        while step < last:
            with meter:
                loss, norm, lr = train_step(job, step)
            step += 1  # from here on: finished steps
            shown = step % config.log_interval == 0 or step == last
            log.write(step_line(step, of, loss, lr, norm, meter.rates(last - step)), shown=shown)
            if shown:
                meter.reset()

            interrupted = ranks.sums([interrupt.seen])[0] > 0
            val_loss = None
            if step % config.val_interval == 0 or step == of:
                validation = evaluate(job.model, job.val_windows, ranks)
                val_loss = validation.mean
                log.write(val_line(step, of, val_loss, validation.tokens))
                if ranks.is_main:
                    plot.draw_or_explain(run)
            # The best checkpoint is told by the loss it carries, and none is ever overwritten.
            is_best = val_loss is not None and val_loss < best_loss
            if val_loss is not None:
                best_loss = min(best_loss, val_loss)
            if is_best or interrupted or step == last or step % config.checkpoint_interval == 0:
                save(job, run, step, val_loss)
                log.write(f"checkpoint {step}/{of}" + "  best so far" * is_best)
            if interrupted and step < last:
                log.write(f"interrupted at step {step} of {of}: the same command goes on")
                return EXIT_INTERRUPTED
        if ranks.is_main:
            log.write(*farewell(run, step, of))
        return 0


@dataclass
class Job:
    """A model in training, and all that its next step depends on."""

    config: TrainConfig
    ranks: Ranks
    manifest: Manifest
    model: GPT
    ddp: DistributedDataParallel | None  # the same model, averaging gradients over the ranks
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # of the loss, for fp16; else it does nothing
    loader: TokenLoader
    val_windows: list[np.ndarray]
    micro_steps: int  # forward and backward passes of one step
    ideal_seconds: float | None  # of a step at the peak of the hardware, where that is known


def build(config: TrainConfig, manifest: Manifest, ranks: Ranks) -> Job:
    """Everything as it is before the first step, the same on all ranks but for the rows read."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from mygpt.distributed import compute_dtype, peak_flops
    from mygpt.model import GPT
    from mygpt.optim import configure_optimizers
    from shards.loader import TokenLoader
    from shards.reader import EvalWindows

    device = ranks.device
    torch.manual_seed(config.seed)
    model = GPT(config.model).to(device)
    if config.compile and device.type == "cuda":
        model.compile()  # in place: a wrapper would put its prefix before every parameter's name
    own_gpu = [ranks.local_rank] if device.type == "cuda" else None
    windows = EvalWindows(manifest, "val", config.model.block_size)
    flops, peak = model.flops_per_token() * config.total_batch_size, peak_flops(device)
    return Job(
        config=config,
        ranks=ranks,
        manifest=manifest,
        model=model,
        ddp=DistributedDataParallel(model, device_ids=own_gpu) if ranks.world_size > 1 else None,
        optimizers=configure_optimizers(
            model,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=compute_dtype(device) == torch.float16),
        loader=TokenLoader(
            manifest.folder,
            "train",
            config.micro_batch,
            config.model.block_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=config.seed,
            device=device,
            generation=manifest.generation,
        ),
        val_windows=[windows[i] for i in windows.spread(config.val_tokens)],
        micro_steps=settings.accumulation(config, ranks.world_size),
        ideal_seconds=peak and flops / (peak * ranks.world_size),
    )


def train_step(job: Job, step: int) -> tuple[float, float, float]:
    """One optimizer step, number `step` from 0: (loss, norm of the gradient, learning rate).

    The loss is the mean over all tokens of the step, on all ranks, before the update. Raises
    ValueError if it is not finite, and then leaves the weights as they were.
    """
    import torch

    from mygpt.evaluate import autocast
    from mygpt.optim import learning_rate

    config, ranks = job.config, job.ranks
    total = torch.zeros((), device=ranks.device)
    for micro_step in range(job.micro_steps):
        x, y = next(job.loader)  # (B, T), (B, T)
        torch.manual_seed(dropout_seed(config.seed, step, micro_step, ranks.rank))
        # Gradients add up on each rank; only the last backward pass averages them over the ranks.
        is_last = micro_step == job.micro_steps - 1
        with nullcontext() if job.ddp is None or is_last else job.ddp.no_sync():
            with autocast(ranks.device):
                _, loss = (job.ddp or job.model)(x, y)
            job.scaler.scale(loss / job.micro_steps).backward()
        total += loss.detach() / job.micro_steps
    mean_loss = ranks.sums([total.item()])[0] / ranks.world_size
    if not math.isfinite(mean_loss):
        raise ValueError(
            f"the loss of step {step + 1} is {mean_loss}: {config.log_dir} stands at its last "
            "checkpoint; begin another run with a lower --max-lr"
        )
    lr = learning_rate(
        step,
        max_lr=config.max_lr,
        min_lr=config.min_lr,
        warmup_steps=config.warmup_steps,
        max_steps=config.max_steps,
        schedule=config.schedule,
    )
    for optimizer in job.optimizers:
        job.scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
    norm = torch.nn.utils.clip_grad_norm_(job.model.parameters(), config.grad_clip)
    for optimizer in job.optimizers:
        job.scaler.step(optimizer)
        optimizer.zero_grad()
    job.scaler.update()
    return mean_loss, norm.item(), lr


def dropout_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """The seed of all that is random in one forward pass: a hash, 64 bits.

    So a checkpoint need not hold the state of any generator, and nothing else that draws numbers
    (validation, samples, calibration, a resume) can shift what dropout draws. The numbers are
    hashed and not added, so that step 1 of seed 7 is not step 0 of seed 8, and all 64 bits are
    mixed, because the CPU's generator takes only the low 32.
    """
    numbers = struct.pack("<4Q", seed, step, micro_step, rank)
    return int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest(), "little")


def save(job: Job, run: Path, step: int, val_loss: float | None) -> None:
    """Write the checkpoint of `step` finished steps and drop what is no longer to be kept."""
    from mygpt import checkpoint, optim

    if job.ranks.is_main:
        state = {
            "val_loss": val_loss,
            "loader": job.loader.state_dict(),
            "scaler": job.scaler.state_dict(),
            "fingerprint": job.manifest.fingerprint,
            "generation": job.manifest.generation,
            "config": runs.to_json(job.config),
        }
        checkpoint.save(run, step, job.model, optim.state_tensors(job.optimizers, job.model), state)
        checkpoint.prune(run, job.config.keep)
    job.ranks.barrier()


def restore(job: Job, step: int) -> float:
    """Put the job where the checkpoint of `step` was; returns the best validation loss so far."""
    from mygpt import checkpoint, optim

    run = job.config.log_dir
    folder = checkpoint.folder_of(run, step)
    state = checkpoint.read_state(folder)
    checkpoint.load_model(folder, job.model)
    optim.load_state_tensors(job.optimizers, job.model, checkpoint.load_optimizer(folder))
    job.loader.load_state_dict(state["loader"])
    if state["scaler"]:  # empty when it was not in use: the device may have been another one
        job.scaler.load_state_dict(state["scaler"])
    best = checkpoint.best(run)
    return math.inf if best is None else checkpoint.read_state(best)["val_loss"]


def measured_steps(config: TrainConfig, manifest: Manifest, ranks: Ranks) -> int:
    """How many steps fit into --time-budget, measured on a copy that is thrown away.

    The copy pays once for all that a run pays for at its start, then takes steps for a fiftieth of
    the budget, then validates and writes a checkpoint. What it learned, drew and read goes with it.
    """
    from mygpt.evaluate import evaluate

    begun = time.perf_counter()
    job = build(config.resolved(max_steps=1000), manifest, ranks)  # any horizon takes as long
    train_step(job, 0)
    start_seconds = time.perf_counter() - begun

    def seconds_of_step() -> float:
        started = time.perf_counter()
        train_step(job, 0)
        return time.perf_counter() - started

    # Every rank must take as many steps as the others, so the main one decides how many.
    count = ranks.of_main(int(config.time_budget / 50 / seconds_of_step()))
    step_seconds = median(seconds_of_step() for _ in range(max(3, min(count, 100))))
    started = time.perf_counter()
    evaluate(job.model, job.val_windows, ranks)
    with tempfile.TemporaryDirectory() as folder:
        save(job, Path(folder), 0, None)
    round_seconds = time.perf_counter() - started
    left = config.time_budget - (time.perf_counter() - begun) - start_seconds
    steps = settings.steps_that_fit(left, step_seconds, round_seconds, config.val_interval)
    return ranks.of_main(steps)


def description(job: Job) -> Iterator[str]:
    """What is about to be trained, on what and how: a few lines for people."""
    from mygpt.distributed import compute_dtype
    from mygpt.evaluate import unigram_loss
    from shards.reader import EvalWindows, token_counts

    config, ranks, manifest = job.config, job.ranks, job.manifest
    shape, loader = config.model, job.loader
    windows = config.total_batch_size // shape.block_size
    epochs = config.max_steps * windows / loader.windows_per_epoch
    yield (
        f"data   {config.data} ({manifest.fingerprint[:12]}): "
        f"{manifest.splits['train'].tokens:,} training tokens, of which {loader.unused_tokens:,} "
        f"fill no window in an epoch; {epochs:.2f} epochs in {config.max_steps} steps"
    )
    yield (
        f"model  {shape.n_layers} layers, {shape.n_heads} heads, {shape.n_embed} wide, "
        f"{shape.block_size} tokens of context: {job.model.num_params():,} parameters, "
        f"{job.model.num_params(non_embedding=True):,} outside the embeddings"
    )
    yield (
        f"batch  {config.total_batch_size:,} tokens = {config.micro_batch} rows * "
        f"{shape.block_size} tokens * {job.micro_steps} micro-steps * {ranks.world_size} ranks"
    )
    dtype = str(compute_dtype(ranks.device)).removeprefix("torch.")
    scaled = ", with a loss scaler: this GPU has no bfloat16" if job.scaler.is_enabled() else ""
    yield f"device {ranks.device}, {dtype}{scaled}"
    if manifest.splits["train"].tokens <= FEW_TOKENS:
        targets = EvalWindows(manifest, "val", shape.block_size)
        unigram = unigram_loss(token_counts(manifest, "train"), targets)
        yield baseline_line(unigram.mean, math.log(manifest.tokenizer.n_vocab))


def farewell(run: Path, step: int, of: int) -> Iterator[str]:
    """Where everything is, and what to do next."""
    from mygpt import checkpoint

    yield f"finished step {step} of {of}"
    if step < of:
        yield "stopped as --stop-at asked: the same command without it goes on to the end"
    yield f"log         {run / 'log.txt'}"
    yield f"picture     {plot.draw_or_explain(run)}"
    yield f"checkpoint  {checkpoint.newest(run)}"
    yield f"next        python eval.py {run}"


if __name__ == "__main__":
    sys.exit(main())
