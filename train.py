"""Train a GPT on a dataset that `python -m prepare` has made.

    python train.py tiny --data data/demo --log-dir log/demo
    python train.py gpt2 --data web=0.7:data/web --data code=0.3:data/code
    torchrun --standalone --nproc_per_node=4 train.py gpt2 --data data/web

The first word is a preset (gpt2 by default), every setting is a flag. The same command again
resumes the run in --log-dir. Exit code: 0 finished, or stopped by --stop-at; 2 invalid input, full
disk or diverged training, one line says which and what to do; 75 stopped at a checkpoint by SIGINT,
SIGTERM, SIGUSR1 or --max-time, run the command again; 1 other ranks were lost, see their output.
torchrun turns every code but 0 into 1.

Shapes: B sequences of a micro-batch, T block size.
"""

import os
import sys

from mygpt import settings
from shards.cli import end_with, one_line_errors

if __name__ == "__main__":
    # --help and mistyped flags are answered here, before the imports below, which take seconds.
    with one_line_errors():
        settings.parse(sys.argv[1:], str(__doc__))
    # Read by OpenMP when torch loads it: spinning threads slow a shared machine down several times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hashlib
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from mygpt import autotune, checkpoint, plot, run_config, sharding
from mygpt.distributed import EXIT_LOST, Ranks, RanksLost, autocast, start
from mygpt.evaluate import Loss, default_batch_size, evaluate
from mygpt.generate import Sampling, generate
from mygpt.log import Meter, RunLog, StepResult, skip_line, step_line, val_line
from mygpt.optim import learning_rate
from mygpt.run_config import RunRecord
from mygpt.settings import TrainConfig
from mygpt.spikes import fp16_overflow
from mygpt.stopping import EXIT_STOPPED, Stop, Stopped
from mygpt.train_state import TrainState, build, describe, restore, save
from shards import checks
from shards.files import write_json
from shards.stream import Mixture
from shards.tokenizer import Tokenizer, open_tokenizer

ALMOST_DONE = 0.9  # a step that has come this far is finished when the run is asked to stop
SAMPLE_TOKENS = 64

Track = Callable[[int, Mapping[str, float]], None]


@one_line_errors()
def main(args: list[str] | None = None) -> int:
    """Start or resume the run that the flags describe. Returns the exit code."""
    started = time.monotonic()
    config = settings.parse(sys.argv[1:] if args is None else args, str(__doc__))
    with trackers(config):  # fail fast if one is not installed
        record, dataset = run_config.start_or_resume(config)
    if config.verify:
        verify(dataset)
    run = config.log_dir
    try:
        with (
            start(config.device, config.deterministic) as ranks,
            checkpoint.locked(run) if ranks.is_main else nullcontext(),
            Stop(ranks, config.max_time, started).watch() as stop,
        ):
            return train(record, dataset, ranks, stop)
    except RanksLost as lost:
        print("error:", lost, file=sys.stderr)
        return EXIT_LOST


def train(record: RunRecord, dataset: Mixture, ranks: Ranks, stop: Stop) -> int:
    """Train from the newest checkpoint, or from the initial weights, to the last step."""
    run_config.check_ranks_agree(record, ranks)
    run, log = record.config.log_dir, RunLog(record.config.log_dir, enabled=ranks.is_main)
    state = None
    try:
        record = autotune.resolve_micro_batch(record, dataset, ranks, log)
        settings.grad_accum_steps(record.config, ranks.world_size)  # fail fast
        tokenizer = open_tokenizer(dataset.tokenizer) if record.config.sample_interval else None
        record = autotune.resolve_max_steps(
            record,
            dataset,
            ranks,
            log,
            train_step=lambda state: train_step(state, stop),
            validate=lambda state: validate(state, stop),
        )
        max_steps = record.config.max_steps
        last = min(max_steps, record.config.stop_at or max_steps)
        newest, faults = ranks.broadcast_object(
            checkpoint.newest_intact(run) if ranks.is_main else (-1, [])
        )
        if faults and newest < 0:
            raise ValueError(f"every checkpoint of {run} is damaged, the newest: {faults[0]}")
        log.write(*(f"passed over a damaged checkpoint: {fault}" for fault in faults))
        if newest >= last and not lacks_validation(record.config, newest):
            reached = "is finished" if newest >= max_steps else "has reached --stop-at"
            log.write(f"nothing left to do: {run} {reached}, step {newest} of {max_steps}")
            return 0
        state = build(record, dataset, ranks, init_weights=newest < 0)
        start_or_restore(state, newest, dataset, stop, log)
        train_loop(state, last, tokenizer, stop, log)
    except Stopped as stopped:
        # A step or validation that was under way has been dropped, with the data it read.
        step = state.step if state else 0
        if state and state.step != state.saved_step:
            save(state, run, None)
            log.write(f"checkpoint {step}/{record.config.max_steps}")
        end = record.config.max_steps or "a number still to be measured"
        log.write(f"stopped by {stopped} at step {step} of {end}: the same command resumes")
        return EXIT_STOPPED
    log.write(f"finished step {last} of {max_steps}")
    if last < max_steps:
        log.write("stopped by --stop-at: the same command without it trains to the end")
    if ranks.is_main:
        log.write(f"log         {run / 'log.txt'}", f"picture     {plot.draw_or_explain(run)}")
        log.write(f"checkpoint  {checkpoint.find(run)}", f"next        python eval.py {run}")
    return 0


# --- the loop


def train_loop(
    state: TrainState, last: int, tokenizer: Tokenizer | None, stop: Stop, log: RunLog
) -> None:
    """Train to step `last`. Raises `Stopped` at a step boundary if asked to stop."""
    config, max_steps = state.config, state.config.max_steps
    meter = Meter(config.total_batch_size, state.ideal_seconds, lambda: state.loader.wait_seconds)
    with trackers(config, state.step, state.ranks.is_main) as track:
        while state.step < last:
            with meter:
                result = train_step(state, stop)
            step = state.step
            shown = step % config.log_interval == 0 or step == last
            if result.skipped:
                log.write(skip_line(step, max_steps, result, config.log_dir))
                state.spikes.check()
            else:
                metrics = result.metrics() | meter.metrics()
                log.write(step_line(step, max_steps, metrics, meter.eta(last - step)), shown=shown)
                track(step, metrics)
            if shown:
                meter.reset()

            val_loss, is_best = None, False
            if step % config.val_interval == 0 or step == max_steps:
                val_loss, is_best = log_validation(state, stop, log)
                track(step, {"val_loss": val_loss})
            if tokenizer and step % config.sample_interval == 0:
                write_samples(state, tokenizer)
            if is_best or step == last or step % config.checkpoint_interval == 0:
                save(state, config.log_dir, val_loss)
                log.write(f"checkpoint {step}/{max_steps}" + "  best so far" * is_best)


def train_step(state: TrainState, stop: Stop) -> StepResult:
    """Take one optimizer step: forward and backward passes, clip, update.

    If asked to stop, drop the step with its data and raise `Stopped`. A step whose loss or gradient
    norm is not finite, or that `state.spikes` rejects, reads its data and counts, but leaves
    weights and optimizer state unchanged.
    """
    config, device = state.config, state.ranks.device
    before = state.loader.state_dict()
    loss = torch.zeros((), device=device)
    for micro_step in range(state.grad_accum_steps):
        if stop.requested() and micro_step < ALMOST_DONE * state.grad_accum_steps:
            state.loader.load_state_dict(before)
            state.zero_grad()
            raise Stopped(stop.reason)
        x, y = next(state.loader)  # (B, T), (B, T)
        torch.manual_seed(dropout_seed(config.seed, state.step, micro_step, state.ranks.rank))
        # Gradients accumulate on each rank; DDP averages them during the last backward pass only.
        is_last = micro_step == state.grad_accum_steps - 1
        with nullcontext() if state.ddp is None or is_last else state.ddp.no_sync():
            with autocast(device):
                _, micro_loss = (state.ddp or state.model)(x, y)
            state.scaler.scale(micro_loss / state.grad_accum_steps).backward()
        loss += micro_loss.detach() / state.grad_accum_steps

    lr = learning_rate(
        state.step,
        max_lr=config.max_lr,
        min_lr=config.min_lr,
        warmup_steps=config.warmup_steps,
        max_steps=config.max_steps,
        schedule=config.schedule,
    )
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    norm = sharding.full_tensor(norm)

    # The one place where a step waits for its device. To decide about skipping without waiting,
    # every optimizer would need an update that the device can undo.
    mean_loss, mean_norm = state.ranks.all_reduce_mean(torch.stack([loss, norm]))
    skipped = fp16_overflow(state.scaler, mean_loss, mean_norm) or state.spikes.judge(
        mean_loss, mean_norm
    )
    if not skipped:
        for optimizer in state.optimizers:
            state.scaler.step(optimizer)
    state.zero_grad()
    state.scaler.update()
    state.step += 1
    windows = range(before["position"], state.loader.state_dict()["position"])
    return StepResult(mean_loss, mean_norm, lr, windows, skipped)


def dropout_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Return the 64-bit seed of all randomness in one forward pass, a hash of where it stands.

    So a checkpoint needs no generator state, and nothing else that draws numbers (validation,
    samples, a resume) can shift dropout. Hashed instead of added: step 1 of seed 7 must differ from
    step 0 of seed 8, and the CPU's generator uses only the low 32 bits.
    """
    numbers = struct.pack("<4Q", seed, step, micro_step, rank)
    return int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest(), "little")


# --- validation and samples


def validate(state: TrainState, stop: Stop) -> Loss:
    """Return the loss on the fixed validation subset, the same on all ranks.

    Raises `Stopped` if asked to stop.
    """
    batch_size = default_batch_size(state.config.model.block_size, state.ranks.device)
    # One batch for each rank at a time, so that all ranks ask equally often whether to stop.
    on_all_ranks = batch_size * state.ranks.world_size
    total = Loss(0.0, 0)
    with sharding.unsharded(state.model):
        for first in range(0, len(state.val_windows), on_all_ranks):
            stop.check()
            windows = state.val_windows[first : first + on_all_ranks]
            part = evaluate(state.model, windows, state.ranks, batch_size)
            total = Loss(total.nats + part.nats, total.tokens + part.tokens)
    return total


def log_validation(state: TrainState, stop: Stop, log: RunLog) -> tuple[float, bool]:
    """Validate, log the loss and redraw the picture. Returns the loss, and if it is the best."""
    loss = validate(state, stop)
    log.write(val_line(state.step, state.config.max_steps, loss.mean, loss.tokens))
    if state.ranks.is_main:
        plot.draw_or_explain(state.config.log_dir)
    is_best = loss.mean < state.best_val_loss
    state.best_val_loss = min(state.best_val_loss, loss.mean)
    return loss.mean, is_best


def lacks_validation(config: TrainConfig, step: int) -> bool:
    """Return whether the checkpoint of `step` was saved before its validation was finished."""
    if step < 1 or (step % config.val_interval and step != config.max_steps):
        return False
    return checkpoint.read_state(checkpoint.folder_of(config.log_dir, step))["val_loss"] is None


def write_samples(state: TrainState, tokenizer: Tokenizer) -> None:
    """Append a continuation of each --sample-prompt (by default a new document) to samples.jsonl.

    The same weights write the same text.
    """
    prompts = state.config.sample_prompt or ("",)
    # On all ranks: the forward pass of a sharded model needs every rank.
    with sharding.unsharded(state.model):
        continuations = generate(
            state.model,
            [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in prompts],
            Sampling(SAMPLE_TOKENS, temperature=0.8, seed=state.config.seed),
            stop=tokenizer.eot,
        )
    # A model may have more ids than its tokenizer: the others decode to nothing.
    known = [[token for token in ids if token < tokenizer.n_vocab] for ids in continuations]
    samples = [
        {"prompt": prompt, "text": prompt + tokenizer.decode(ids)}
        for prompt, ids in zip(prompts, known, strict=True)
    ]
    if state.ranks.is_main:
        run_config.write_samples(state.config.log_dir, state.step, samples)


# --- before the first step


def verify(dataset: Mixture) -> None:
    """Raise ValueError if a shard differs from its manifest; local ranks divide the shards."""
    rank, ranks = (int(os.environ.get(f"LOCAL_{name}", 0)) for name in ("RANK", "WORLD_SIZE"))
    for manifest in dataset.manifests:
        for split in manifest.splits:
            checks.check(manifest, split, slice(rank, None, ranks or 1))


def start_or_restore(
    state: TrainState, newest: int, dataset: Mixture, stop: Stop, log: RunLog
) -> None:
    """Load the checkpoint of step `newest` if that is not -1, and describe the run."""
    config, is_main = state.config, state.ranks.is_main
    if is_main:
        checkpoint.set_aside(config.log_dir, after=newest)  # damaged ones: their steps come again
        write_json(config.log_dir / "config.json", state.record.to_json())
        checkpoint.prune(config.log_dir, config.keep, config.keep_every)
    state.ranks.barrier()
    if newest >= 0:
        restore(state, newest)
    elif config.init_from:
        save(state, config.log_dir, None)  # a resume does not need those weights again
    log.write(f"{'resume' if newest >= 0 else 'start'} {state.step}/{config.max_steps}")
    if is_main:
        log.write(*describe(state, dataset))
    if lacks_validation(config, newest):
        val_loss, is_best = log_validation(state, stop, log)
        if is_main:
            checkpoint.note_val_loss(checkpoint.folder_of(config.log_dir, newest), val_loss)
        log.write(f"checkpoint {newest}/{config.max_steps}" + "  best so far" * is_best)


def trackers(
    config: TrainConfig, step: int = 0, enabled: bool = False
) -> AbstractContextManager[Track]:
    """Open --tensorboard and --wandb; without them nothing of theirs is imported."""
    if not config.tensorboard and not config.wandb:
        return nullcontext(lambda step, metrics: None)
    from mygpt import trackers

    trackers.check(config)
    return trackers.open_trackers(config, step, enabled)


if __name__ == "__main__":
    end_with(main)
