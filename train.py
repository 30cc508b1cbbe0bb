"""Train a GPT on a dataset that `python -m prepare` has made.

    python train.py tiny --data data/demo --log-dir log/demo
    python train.py gpt2 --data web=0.7:data/web --data code=0.3:data/code
    torchrun --standalone --nproc_per_node=4 train.py gpt2 --data data/web

The first word is a preset (gpt2 without one), every setting is a flag. The same command again
goes on where the run in --log-dir stopped. Exit code: 0 finished, or stopped by --stop-at; 2 the
input is wrong, the disk full or the training beyond help, a line says how; 75 asked to stop (by
SIGINT, SIGTERM, SIGUSR1 or --max-time) and stopped at a checkpoint: run it again; 1 other ranks
were lost, see what they said. torchrun turns all of them but 0 into 1.
"""

# torch is imported inside the functions, after the flags are read: `--help` must not wait for it.
from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from mygpt import plot, run_config, settings, trackers
from mygpt.log import Meter, RunLog, baseline_line, step_line, val_line
from mygpt.run_config import RunRecord
from mygpt.settings import TrainConfig
from shards.cli import end_with, one_line_errors
from shards.files import write_json
from shards.stream import Mixture

if TYPE_CHECKING:
    import numpy as np

    from mygpt.config import GPTConfig
    from mygpt.distributed import Ranks
    from mygpt.stopping import Stop
    from mygpt.train_state import Job
    from shards.tokenizer import Tokenizer

FEW_TOKENS = 2**28  # beyond, counting them for the baseline would hold up the start


@one_line_errors()
def main(args: list[str] | None = None) -> int:
    """Read the flags, find the datasets and the run's folder, train. Returns the exit code."""
    begun = time.monotonic()
    # Threads that wait for one another should sleep, not spin (read once, when torch is imported):
    # on a machine that does other work as well, steps are several times slower otherwise.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    asked = settings.parse(sys.argv[1:] if args is None else args, str(__doc__))
    trackers.check(asked)
    record, dataset = open_run(asked)
    if record.config.verify:
        check_hashes(dataset)

    from mygpt.distributed import EXIT_LOST, RanksLost

    try:
        return train(record, dataset, begun)
    except RanksLost as lost:
        print("error:", lost, file=sys.stderr)
        return EXIT_LOST


# --- what to train, on what


def open_run(asked: TrainConfig) -> tuple[RunRecord, Mixture]:
    """The settings and the datasets: those of the run that lies in the folder, if one does.

    Raises ValueError, naming the first difference, if `asked` or its datasets do not fit that run.
    """
    begun = run_config.read_run(asked.log_dir)
    config = run_config.continued(begun.config, asked) if begun else asked
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if not asked.micro_batch and not settings.shares_out(config, world_size):
        config = replace(config, micro_batch=0)  # found on another number of ranks: find it anew
    if not config.data:
        config = replace(config, data=(str(settings.only_dataset()),))
        if os.environ.get("RANK", "0") == "0":
            print(f"no --data given: taking {config.data[0]}, the only dataset there")
    dataset = Mixture.load(config.data, begun.generations if begun else None)
    if begun and begun.fingerprint != dataset.fingerprint:
        raise ValueError(
            f"{config.log_dir} holds a run with dataset fingerprint {begun.fingerprint[:12]}, "
            f"{' and '.join(config.data)} has {dataset.fingerprint[:12]}: give the --data of that "
            "run, or another --log-dir"
        )
    if config.init_from and not begun:
        config = replace(config, model=shape_of(config))
    if dataset.tokenizer.n_vocab > config.model.vocab_size:
        raise ValueError(
            f"expected a vocabulary of at most {config.model.vocab_size}, the model's, found "
            f"{dataset.tokenizer.n_vocab} in {config.data[0]}: give --vocab-size "
            f"{dataset.tokenizer.n_vocab}"
        )
    record = RunRecord(config, dataset.fingerprint, dataset.generations)
    if not begun:
        return record, dataset
    if config.generation != "latest":
        return replace(record, earlier=begun.earlier), dataset
    return moved_on(begun, record)


def moved_on(begun: RunRecord, record: RunRecord) -> tuple[RunRecord, Mixture]:
    """The record with the newest generation of every dataset, and these, if they have grown."""
    from mygpt import checkpoint

    latest = Mixture.load(record.config.data)
    if latest.fingerprint == record.fingerprint:
        return replace(record, earlier=begun.earlier), latest
    until = max(checkpoint.steps(record.config.log_dir), default=0)
    old = {"until": until, "fingerprint": begun.fingerprint, "generations": begun.generations}
    earlier = (*begun.earlier, old)
    return RunRecord(record.config, latest.fingerprint, latest.generations, earlier), latest


def shape_of(config: TrainConfig) -> GPTConfig:
    """The shape of the model in --init-from, with the run's dropout, cut to its block size."""
    from mygpt.pretrained import from_pretrained

    shape = from_pretrained(config.init_from, dropout=config.model.dropout).config
    return replace(shape, block_size=min(shape.block_size, config.model.block_size))


def check_hashes(dataset: Mixture) -> None:
    """Raise ValueError if a shard is not what its manifest says, after reading all of them.

    The ranks of a machine share them out: one that waited for another would give it up for lost.
    """
    from shards.checks import check

    rank, ranks = (int(os.environ.get(f"LOCAL_{name}", 0)) for name in ("RANK", "WORLD_SIZE"))
    own = slice(rank, None, ranks or 1)
    for manifest in dataset.manifests:
        for split in manifest.splits:
            check(manifest, split, own)


# --- training


def train(record: RunRecord, dataset: Mixture, begun: float) -> int:
    """Take the run from its newest checkpoint, or from nothing, to its end: the exit code.

    `begun` is when the program was started, by `time.monotonic()`.
    """
    from mygpt import checkpoint, run_config
    from mygpt import step as announce
    from mygpt.distributed import start
    from mygpt.stopping import EXIT_STOPPED, Stop, Stopped
    from mygpt.train_state import save

    config, run = record.config, record.config.log_dir
    with (
        start(config.device, config.deterministic) as ranks,
        checkpoint.locked(run) if ranks.is_main else nullcontext(),
        Stop(ranks, config.max_time, begun).watch() as stop,
    ):
        run_config.check(record, ranks)
        log = RunLog(run, enabled=ranks.is_main)
        record = with_micro_batch(record, dataset, ranks, log)
        # Refused before anything slow begins.
        settings.accumulation(record.config, ranks.world_size)
        coder = open_tokenizer(dataset) if config.sample_interval else None
        job = None
        try:
            record = with_length(record, dataset, ranks, stop, log)
            of = record.config.max_steps
            last = min(of, config.stop_at or of)
            newest = ranks.broadcast_object(max(checkpoint.steps(run), default=-1))
            if newest >= last and not was_cut_off(record.config, newest):
                state = "is finished" if newest >= of else "has come to --stop-at"
                log.write(f"nothing left to do: the run in {run} {state}, step {newest} of {of}")
                return 0
            job = build(record, dataset, ranks, fresh=newest < 0)
            take_up(job, newest, dataset, stop, log)
            with trackers.open_trackers(job.config, job.step, ranks.is_main) as track:
                take_steps(job, last, coder, stop, log, track)
        except Stopped as stopped:
            # What is there is a number of finished steps: all else was dropped with its data.
            done = job.step if job else 0
            if job and job.step != job.saved_step:
                save(job, run, None)
                log.write(f"checkpoint {done}/{record.config.max_steps}")
            end = record.config.max_steps or "a number still to be measured"
            log.write(f"stopped by {stopped} at step {done} of {end}: the same command goes on")
            return EXIT_STOPPED
        if ranks.is_main:
            log.write(*announce.farewell(run, last, of))
        return 0


def with_micro_batch(record: RunRecord, dataset: Mixture, ranks: Ranks, log: RunLog) -> RunRecord:
    """The record with the rows that --micro-batch auto stands for, found if need be."""
    from mygpt import autotune

    config = record.config
    if config.micro_batch:
        return record
    block_size = config.model.block_size
    sizes = autotune.sizes(config.total_batch_size, block_size, ranks.world_size)
    if ranks.device.type == "cuda":
        log.write("trying how many rows fit into the memory")
        trial = replace(config, micro_batch=sizes[0], compile=False)
        job = build(replace(record, config=trial), dataset, ranks)
        found = autotune.by_trying(job.model, job.optimizers, sizes, ranks, job.own_parameters)
    else:
        found = autotune.by_rule(sizes, block_size)
    return replace(record, config=replace(config, micro_batch=found))


def with_length(
    record: RunRecord, dataset: Mixture, ranks: Ranks, stop: Stop, log: RunLog
) -> RunRecord:
    """The record with its number of steps, measured if need be, and all that follows from it."""
    from mygpt.autotune import measured_steps

    config = record.config
    windows = None
    if len(dataset.manifests) == 1:
        shards = dataset.manifests[0].splits["train"].shards
        windows = sum(shard.windows(config.model.block_size) for shard in shards)
    steps = settings.steps_of(config, windows)
    if not steps:
        log.write(f"measuring how many steps fit into {config.time_budget:g} seconds")
        horizon = max(1000, config.warmup_steps)  # any takes as long
        trial = replace(record, config=config.resolved(horizon))
        steps = measured_steps(lambda: build(trial, dataset, ranks), stop)
    return replace(record, config=config.resolved(steps))


def was_cut_off(config: TrainConfig, step: int) -> bool:
    """Is the validation of a checkpoint's step still to be made, as it was cut off?"""
    from mygpt import checkpoint

    if step < 1 or (step % config.val_interval and step != config.max_steps):
        return False
    return checkpoint.read_state(checkpoint.folder_of(config.log_dir, step))["val_loss"] is None


def take_up(job: Job, newest: int, dataset: Mixture, stop: Stop, log: RunLog) -> None:
    """Bring a new job to where its run stands, `newest` being its last checkpoint or -1."""
    from mygpt import checkpoint
    from mygpt import step as announce
    from mygpt.train_state import restore, save

    config, of, is_main = job.config, job.config.max_steps, job.ranks.is_main
    if is_main:
        write_json(config.log_dir / "config.json", job.record.to_json())
        checkpoint.prune(config.log_dir, config.keep, config.keep_every)
    job.ranks.barrier()
    if newest >= 0:
        restore(job, newest)
    elif config.init_from:
        save(job, config.log_dir, None)  # so that going on does not need those weights again
    log.write(f"resume {newest}/{of}" if newest >= 0 else f"start 0/{of}")
    if is_main:
        log.write(*announce.description(job, dataset.tokens("train")), *baseline(job, dataset))
    if was_cut_off(config, newest):
        val_loss, is_best = validation(job, stop, log)
        if is_main:
            checkpoint.note_val_loss(checkpoint.folder_of(config.log_dir, newest), val_loss)
        log.write(f"checkpoint {newest}/{of}" + "  best so far" * is_best)


def take_steps(
    job: Job, last: int, coder: Tokenizer | None, stop: Stop, log: RunLog, track: trackers.Track
) -> None:
    """The training loop. Raises `Stopped` at a step boundary if asked to stop."""
    from mygpt import step as announce
    from mygpt.step import train_step, write_samples
    from mygpt.train_state import save

    config, of = job.config, job.config.max_steps
    meter = Meter(config.total_batch_size, job.ideal_seconds, lambda: job.loader.wait_seconds)
    while job.step < last:
        with meter:
            outcome = train_step(job, stop)
        step, rates = job.step, meter.rates(last - job.step)
        shown = step % config.log_interval == 0 or step == last
        if outcome.skipped:
            log.write(announce.skipped(job, outcome))
            job.spikes.check()
        else:
            loss, norm, lr = outcome.loss, outcome.norm, outcome.lr
            log.write(step_line(step, of, loss, lr, norm, rates), shown=shown)
            track(step, {"loss": loss, "norm": norm, "lr": lr, **rates.figures()})
        if shown:
            meter.reset()

        val_loss, is_best = None, False
        if step % config.val_interval == 0 or step == of:
            val_loss, is_best = validation(job, stop, log)
            track(step, {"val_loss": val_loss})
        if coder and step % config.sample_interval == 0:
            write_samples(job, coder)
        # The best checkpoint is told by the loss it carries, and none is ever overwritten.
        if is_best or step == last or step % config.checkpoint_interval == 0:
            save(job, config.log_dir, val_loss)
            log.write(f"checkpoint {step}/{of}" + "  best so far" * is_best)


def validation(job: Job, stop: Stop, log: RunLog) -> tuple[float, bool]:
    """Validate, log it and draw the picture: the loss, and whether it is the best so far."""
    from mygpt.step import validate

    found = validate(job, stop)
    log.write(val_line(job.step, job.config.max_steps, found.mean, found.tokens))
    if job.ranks.is_main:
        plot.draw_or_explain(job.config.log_dir)
    is_best = found.mean < job.best_loss
    job.best_loss = min(job.best_loss, found.mean)
    return found.mean, is_best


def build(record: RunRecord, dataset: Mixture, ranks: Ranks, fresh: bool = True) -> Job:
    """Everything as it is before the first step, the same on all ranks but for the rows read.

    `fresh` tells that the weights are those to begin with; else a checkpoint will replace them.
    """
    from mygpt.train_state import assemble
    from shards.loader import TokenLoader

    config = record.config
    loader = TokenLoader(
        dataset,
        "train",
        config.micro_batch,
        config.model.block_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
        device=ranks.device,
        shuffle_shards=config.shuffle_shards,
    )
    return assemble(record, ranks, loader, validation_windows(config, dataset), fresh)


def validation_windows(config: TrainConfig, dataset: Mixture) -> list[np.ndarray]:
    """The fixed part of the validation split, of each source as much as its weight says."""
    from shards.reader import EvalWindows

    chosen: list[np.ndarray] = []
    for manifest, weight in zip(dataset.manifests, dataset.weights, strict=True):
        windows = EvalWindows(manifest, "val", config.model.block_size)
        tokens = config.val_tokens * weight // sum(dataset.weights)
        # Copies: a view would keep its shard's map, and the file behind it, for the whole run.
        chosen += [windows[i].copy() for i in windows.spread(tokens)]
    return chosen


def open_tokenizer(dataset: Mixture) -> Tokenizer:
    """The tokenizer of the datasets; ValueError if the one installed here is another."""
    from shards import tokenizer

    coder = tokenizer.load(dataset.tokenizer.name)
    if coder.hash != dataset.tokenizer.hash:
        raise ValueError(
            f"expected the tokenizer {dataset.tokenizer.hash[:12]}, that of the dataset, found "
            f"{coder.hash[:12]}: --sample-interval 0 trains without sampling"
        )
    return coder


def baseline(job: Job, dataset: Mixture) -> Iterator[str]:
    """The losses on the validation split that need no training, if they are soon counted."""
    from mygpt.evaluate import unigram_loss
    from shards.reader import EvalWindows, token_counts

    if len(dataset.manifests) == 1 and dataset.tokens("train") <= FEW_TOKENS:
        manifest = dataset.manifests[0]
        targets = EvalWindows(manifest, "val", job.config.model.block_size)
        unigram = unigram_loss(token_counts(manifest, "train"), targets)
        yield baseline_line(unigram.mean, math.log(dataset.tokenizer.n_vocab))


if __name__ == "__main__":
    end_with(main)
