"""Train a GPT on a dataset that `python -m prepare` has made.

    python train.py tiny --data data/demo --log-dir log/demo
    python train.py gpt2 --data web=0.7:data/web --data code=0.3:data/code
    torchrun --standalone --nproc_per_node=4 train.py gpt2 --data data/web

The first word is a preset (gpt2 by default), every setting is a flag. The same command again
resumes the run in --log-dir, by default log/DATA-PRESET. Exit codes:

    0   finished, or stopped by --stop-at
    2   invalid input, full disk or diverged training: one line says which, and what to do
    75  stopped at a checkpoint by SIGTERM, SIGUSR1 or --max-time: run the command again
    130 likewise, by Ctrl-C (SIGINT)
    1   other ranks were lost: see their output

Under torchrun every code but 0 becomes 1, under `python -m mygpt.launch` they stay.

Shapes: B sequences of a micro-batch, T block size.
"""

import os
import sys
import time

from shards.cli import end_on_interrupt, end_with, one_line_errors, printable_text

if __name__ == "__main__":
    process_started = time.monotonic()
    end_on_interrupt()

from mygpt import command_line

if __name__ == "__main__":
    # Parsed before the imports below, which take seconds, so that --help and mistyped flags answer
    # at once; main parses again.
    with one_line_errors():
        command_line.parse(sys.argv[1:], str(__doc__))
    # Read by OpenMP when torch loads it: spinning threads slow a shared machine down several times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hashlib
import struct
from contextlib import nullcontext
from dataclasses import replace

import torch

from mygpt import autotune, checkpoint, plot, sharding, start, trackers
from mygpt.describe import describe_end, describe_run, nothing_left
from mygpt.distributed import EXIT_LOST, DistributedContext, RanksLost, autocast, init_distributed
from mygpt.evaluate import Loss, default_batch_size, evaluate
from mygpt.generate import Sampling, continued, trailing_space_note
from mygpt.log import Meter, RunLog, StepResult, checkpoint_line, skip_line, step_line, val_line
from mygpt.run_config import RunRecord
from mygpt.schedule import learning_rate, steps_of
from mygpt.spikes import fp16_overflow
from mygpt.stopping import Stop, Stopped
from mygpt.time_budget import BudgetClock, measure_length
from mygpt.train_state import TrainState, build_train_state, load_checkpoint, save_checkpoint
from shards import checks
from shards.mixture import Mixture
from shards.tokenizer import Tokenizer, open_tokenizer

ALMOST_DONE = 0.9  # a step that has come this far is finished on a stop request
SAMPLE_TOKENS = 64


@one_line_errors()
def main(args: list[str] | None = None, started: float | None = None) -> int:
    """Start or resume the run that the flags describe. Returns the exit code.

    `started`: the value of `time.monotonic()` from which --max-time and --time-budget count.
    """
    started = time.monotonic() if started is None else started
    config = command_line.parse(sys.argv[1:] if args is None else args, str(__doc__))
    trackers.check(config)  # fail fast if one is not installed
    record, dataset = start.start_or_resume(config)
    try:
        with (
            init_distributed(config.device, config.deterministic) as ranks,
            checkpoint.locked(record.config.log_dir) if ranks.is_main else nullcontext(),
            Stop(ranks, config.max_time, started).watch() as stop,
        ):
            clock = BudgetClock(record.config.log_dir, config.time_budget, started)
            return train(record, dataset, ranks, stop, clock)
    except RanksLost as lost:
        print("error:", lost, file=sys.stderr)
        return EXIT_LOST


def train(
    record: RunRecord, dataset: Mixture, ranks: DistributedContext, stop: Stop, clock: BudgetClock
) -> int:
    """Train from the newest checkpoint, or from the initial weights, to the last step."""
    start.check_ranks_agree(record, ranks)  # before anything is written
    log = RunLog(record.config.log_dir, enabled=ranks.is_main)
    newest = start.find_checkpoint(record, dataset, ranks, log)
    record, dataset = start.advance_generation(record, dataset, newest, ranks)
    if record.config.verify:  # each rank a part: one that fails must not leave others waiting
        checks.check_local_part(dataset.manifests)
    if newest >= record.config.last_step and not record.lacks_validation(newest):
        log.write(nothing_left(record.config, newest))
        return 0
    tokenizer = None
    if record.config.sample_interval:
        tokenizer = open_tokenizer(dataset.tokenizer, *dataset.locations)
        if note := trailing_space_note(record.config.sample_prompt):
            log.show(note)
    state = None
    try:
        record = resolve(record, dataset, ranks, stop, clock, log)
        state = build_train_state(record, dataset, ranks, init_weights=newest < 0)
        resume_or_init(state, newest, dataset, stop, log)
        train_loop(state, tokenizer, stop, clock, log)
    except Stopped as stopped:
        if state is None:
            log.write(f"stopped by {stopped} before the first step: the same command starts again")
            return stop.exit_code
        # The interrupted step or validation was discarded and the loader rewound.
        if state.step != state.saved_step:
            save_checkpoint(state, state.config.log_dir, None)
            log.write(checkpoint_line(state.step, state.config.max_steps))
        clock.store(state)
        step = f"step {state.step} of {state.config.max_steps}"
        log.write(f"stopped by {stopped} at {step}: the same command resumes")
        return stop.exit_code
    if ranks.is_main:
        log.write(*describe_end(state))
    return 0


# --- the loop


def train_loop(
    state: TrainState, tokenizer: Tokenizer | None, stop: Stop, clock: BudgetClock, log: RunLog
) -> None:
    """Train to the last step. Raises `Stopped` at a step boundary on a stop request."""
    config = state.config
    meter = Meter(config.total_batch_size, state.ideal_seconds, lambda: state.loader.wait_seconds)
    with trackers.open_trackers(config, state.step, enabled=state.ranks.is_main) as track:
        while state.step < state.config.last_step:
            clock.fit_length(state, log)
            max_steps, last = state.config.max_steps, state.config.last_step
            with meter:
                result = train_step(state, stop)
            step = state.step
            shown = step % config.log_interval == 0 or step == last
            if result.skip_reason:
                log.write(skip_line(step, max_steps, result, config.log_dir))
                state.spikes.raise_if_diverged()
            else:
                metrics = result.metrics() | meter.metrics()
                log.write(step_line(step, max_steps, metrics, meter.eta(last - step)), shown=shown)
                track(step, metrics)
            if shown:
                meter.reset()

            val_loss, is_best = None, False
            if step % config.val_interval == 0 or step == max_steps:
                val_loss, is_best = validate_and_log(state, stop, log)
                track(step, {"val_loss": val_loss})
            if tokenizer and step % config.sample_interval == 0:
                sample_and_log(state, tokenizer, log)
            if is_best or step == last or step % config.checkpoint_interval == 0:
                save_checkpoint(state, config.log_dir, val_loss)
                log.write(checkpoint_line(step, max_steps, is_best))


def train_step(state: TrainState, stop: Stop) -> StepResult:
    """Take one optimizer step: forward and backward passes, clip, update.

    On a stop request, drop the step with its data, raise `Stopped`. A step whose loss or gradient
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
        # DDP averages the gradients over the ranks in the last backward pass, FSDP2 in each.
        is_last = micro_step == state.grad_accum_steps - 1
        with nullcontext() if state.ddp is None or is_last else state.ddp.no_sync():
            with autocast(device):
                _, micro_loss = (state.ddp or state.model)(x, y)
            state.scaler.scale(micro_loss / state.grad_accum_steps).backward()
        loss += micro_loss.detach() / state.grad_accum_steps

    lr = learning_rate(state.step, config, state.record.horizons)
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    norm = sharding.full_tensor(norm)

    # The step's only device sync (fp16's loss scaler has its own): whether to skip must be known
    # before optimizer.step(). The norm is equal on all ranks already; sent along, it is free.
    mean_loss, mean_norm = state.ranks.all_reduce_mean(torch.stack([loss, norm]))
    skip_reason = fp16_overflow(state.scaler, mean_loss, mean_norm)
    skip_reason = skip_reason or state.spikes.update(mean_loss, mean_norm)
    if not skip_reason:
        for optimizer in state.optimizers:
            state.scaler.step(optimizer)
    state.zero_grad()
    state.scaler.update()
    state.step += 1
    windows = range(before["position"], state.loader.state_dict()["position"])
    return StepResult(mean_loss, mean_norm, lr, windows, skip_reason)


def dropout_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Return a 64-bit seed for one forward pass: a hash of (seed, step, micro_step, rank).

    So a checkpoint needs no generator state, and no other use of the generator (validation,
    samples, a resume) changes the dropout masks. Hashed instead of added: step 1 of seed 7 must
    differ from step 0 of seed 8, and the CPU's generator uses only the low 32 bits.
    """
    numbers = struct.pack("<4Q", seed, step, micro_step, rank)
    return int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest(), "little")


# --- validation and samples


def validate(state: TrainState, stop: Stop) -> Loss:
    """Return the loss on the fixed validation subset, the same on all ranks.

    Raises `Stopped` on a stop request.
    """
    batch_size = default_batch_size(state.config.model.block_size, state.ranks.device)
    # One batch per rank and iteration: stop.check() is collective, all must call it equally often.
    global_batch_size = batch_size * state.ranks.world_size
    total = Loss(0.0, 0)
    with sharding.unsharded(state.model):
        for first in range(0, len(state.val_windows), global_batch_size):
            stop.check()
            windows = state.val_windows[first : first + global_batch_size]
            part = evaluate(state.model, windows, state.ranks, batch_size)
            total = Loss(total.nats + part.nats, total.tokens + part.tokens)
    return total


def validate_and_log(state: TrainState, stop: Stop, log: RunLog) -> tuple[float, bool]:
    """Validate, log the loss and redraw the picture. Returns the loss, and if it is the best."""
    loss = validate(state, stop)
    log.write(val_line(state.step, state.config.max_steps, loss.mean, loss.tokens))
    if state.ranks.is_main:
        plot.draw_or_explain(state.config.log_dir)
    is_best = loss.mean < state.best_val_loss
    if is_best:
        state.best_val_loss = loss.mean
    return loss.mean, is_best


def sample_and_log(state: TrainState, tokenizer: Tokenizer, log: RunLog) -> None:
    """Show a continuation of each --sample-prompt (by default a new document).

    They are appended to samples.jsonl. Deterministic: the same weights write the same text.
    """
    prompts = state.config.sample_prompt or ("",)
    sampling = Sampling(SAMPLE_TOKENS, temperature=0.8, seed=state.config.seed)
    # On all ranks: the forward pass of a sharded model needs every rank.
    with sharding.unsharded(state.model):
        texts = continued(state.model, tokenizer, prompts, sampling)
    pairs = zip(prompts, texts, strict=True)
    log.write_samples(state.step, [{"prompt": prompt, "text": text} for prompt, text in pairs])
    for text in texts:
        log.show(f"sample {state.step}  {printable_text(text)}")


# --- before the first step


def resolve(
    record: RunRecord,
    dataset: Mixture,
    ranks: DistributedContext,
    stop: Stop,
    clock: BudgetClock,
    log: RunLog,
) -> RunRecord:
    """Return the record with micro-batch, number of steps and intervals, all fixed from here on.

    Raises `Stopped` on a stop request while measuring, and ValueError if no micro-batch fits, a
    step does not divide into micro-batches, or too few steps fit into --time-budget.
    """
    record = autotune.resolve_micro_batch(record, dataset, ranks, log)
    config, splits = record.config, [manifest.splits["train"] for manifest in dataset.manifests]
    windows = [split.windows(config.model.block_size) for split in splits]
    if max_steps := steps_of(config, windows):
        return replace(record, config=config.resolved(max_steps))
    return measure_length(
        record,
        clock,
        lambda trial: build_train_state(trial, dataset, ranks),
        lambda state: train_step(state, stop),
        lambda state: validate(state, stop),
        log,
    )


def resume_or_init(
    state: TrainState, newest: int, dataset: Mixture, stop: Stop, log: RunLog
) -> None:
    """Load the checkpoint of step `newest` if that is not -1, and describe the run."""
    config, is_main = state.config, state.ranks.is_main
    start.write_record(state.record, dataset, newest, state.ranks)
    if newest >= 0:
        load_checkpoint(state, newest)
    elif config.init_from:
        save_checkpoint(state, config.log_dir, None)  # a resume must not depend on --init-from
    log.write(f"{'resume' if newest >= 0 else 'start'} {state.step}/{config.max_steps}")
    if is_main:
        log.write(*describe_run(state, dataset))
    if state.record.lacks_validation(newest):
        val_loss, is_best = validate_and_log(state, stop, log)
        if is_main:
            checkpoint.note_val_loss(checkpoint.folder_of(config.log_dir, newest), val_loss)
        log.write(checkpoint_line(newest, config.max_steps, is_best))


if __name__ == "__main__":
    end_with(lambda: main(started=process_started))
