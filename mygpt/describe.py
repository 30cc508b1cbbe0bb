"""The lines at the start and the end of training: what is trained, on what, and what came of it."""

import math
import os
import shlex
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from mygpt import checkpoint, plot
from mygpt.distributed import compute_dtype
from mygpt.evaluate import unigram_loss
from mygpt.log import baseline_line, read
from mygpt.settings import FINE_TUNING_EPOCHS, MANY_EPOCHS, TrainConfig
from mygpt.train_state import TrainState
from shards.cli import counted, script
from shards.mixture import Mixture
from shards.reader import EvalWindows, token_counts

SLOW_STEP = 1e12  # FLOPs of a step, below which no CPU takes minutes for it
MAX_COUNTED_TOKENS = 2**28  # beyond, counting the unigram baseline would delay the start


def describe_run(state: TrainState, dataset: Mixture) -> Iterator[str]:
    """Yield the lines that say what is about to be trained, on what and how."""
    config, shape, loader = state.config, state.config.model, state.loader
    tokens = config.max_steps * config.total_batch_size
    epochs = tokens / shape.block_size / loader.windows_per_epoch
    yield f"run    {config.log_dir}"
    yield (
        f"data   {' '.join(config.data)} ({state.record.fingerprint[:12]}): "
        f"{dataset.tokens('train'):,} training tokens, {loader.unused_tokens:,} of them in no "
        "window of an epoch"
    )
    for former in state.record.earlier:
        names = ", ".join(f"{name} {number}" for name, number in former.generations.items())
        yield f"grown  up to step {former.until} the data were those of generation {names}"
    for extension in state.record.extensions:
        again = ""
        if config.schedule == "wsd" and extension.since >= extension.max_steps:
            again = (
                "; no checkpoint from before its decay is left, so the learning rate rises again"
            )
        yield (
            f"extend from step {extension.since} of a run that was finished after "
            f"{extension.max_steps}{again}"
        )
    fitted = ", to be fitted to the clock" if state.record.horizons else ""
    yield f"length {config.max_steps:,} steps = {tokens:,} tokens = {epochs:.2f} epochs{fitted}"
    yield from _too_many_epochs(config, dataset)
    if config.init_from:
        yield (
            f"init   from {_initial(config.init_from)}, fine-tuned: {config.optimizer}, "
            f"learning rate {config.max_lr:g} to {config.min_lr:g} ({config.schedule}); "
            "flags change that"
        )
    yield (
        f"model  {shape.n_layers} layers, {shape.n_heads} heads, {shape.n_embed} wide, "
        f"{shape.block_size} tokens of context: {state.model.num_params():,} parameters, "
        f"{state.model.num_params(non_embedding=True):,} outside the embeddings"
    )
    yield (
        f"batch  {config.total_batch_size:,} tokens = {counted(config.micro_batch, 'sequence')} * "
        f"{shape.block_size} tokens * {counted(state.grad_accum_steps, 'accumulation step')} * "
        f"{counted(state.ranks.world_size, 'rank')}"
    )
    dtype = str(compute_dtype(state.ranks.device)).removeprefix("torch.")
    scaled = ", with loss scaling: this GPU has no bfloat16" if state.scaler.is_enabled() else ""
    yield f"device {state.ranks.device}, {dtype}{scaled}"
    if config.shard != "none" and state.ranks.world_size > 1:
        yield f"shard  {config.shard}, over {state.ranks.world_size} ranks"
    yield from _cost_on_cpu(state)
    yield from _baseline(state, dataset)


def _initial(name: str) -> str:
    """Return --init-from with the checkpoint that it stands for, if it is a run that is here."""
    return str(checkpoint.find(Path(name))) if checkpoint.is_ours(Path(name)) else name


def _too_many_epochs(config: TrainConfig, dataset: Mixture) -> Iterator[str]:
    """Yield a warning for each dataset that will be seen more than `MANY_EPOCHS` times."""
    served = config.max_steps * config.total_batch_size / config.model.block_size
    for component, manifest, weight in zip(
        dataset.components, dataset.manifests, dataset.weights, strict=True
    ):
        windows = manifest.splits["train"].windows(config.model.block_size)
        epochs = served * weight / sum(dataset.weights) / windows
        if epochs > MANY_EPOCHS:
            yield (
                f"warning {epochs:,.0f} epochs of {component.folder}: the model will learn it by "
                f"heart; fewer steps (--epochs {FINE_TUNING_EPOCHS}), or more data"
            )


def _cost_on_cpu(state: TrainState) -> Iterator[str]:
    """Yield a warning if a step will take minutes, with a size that is enough to try things out."""
    config, ranks = state.config, state.ranks.world_size
    flops = state.model.flops_per_token() * config.total_batch_size
    if state.ranks.device.type != "cpu" or flops < SLOW_STEP:
        return
    at_once = min(ranks, max(1, (os.cpu_count() or 1) // torch.get_num_threads()))
    seconds = flops / (matmul_flops() * at_once)
    if seconds > 60:
        run = timedelta(seconds=round(seconds * (config.max_steps - state.step)))
        yield (
            f"warning a step will take at least {timedelta(seconds=round(seconds))} on this CPU, "
            f"the run {run}; to try it out: --block-size 128 --micro-batch 2 --total-batch-size "
            f"{512 * ranks} --max-steps 20 (make: ARGS='...'), or the preset tiny"
        )


def matmul_flops(size: int = 512) -> float:
    """Return the FLOP/s of a matrix product in this process, the most that training could reach."""
    matrix, best = torch.ones(size, size), math.inf
    for _ in range(3):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _baseline(state: TrainState, dataset: Mixture) -> Iterator[str]:
    """Yield the validation losses that need no model, unless counting tokens would take long."""
    if len(dataset.manifests) == 1 and dataset.tokens("train") <= MAX_COUNTED_TOKENS:
        manifest = dataset.manifests[0]
        windows = EvalWindows(manifest, "val", state.config.model.block_size)
        unigram = unigram_loss(token_counts(manifest, "train"), windows)
        yield baseline_line(unigram.mean, math.log(dataset.tokenizer.n_vocab))


def nothing_left(config: TrainConfig, step: int) -> str:
    """Return the line of a run that has reached its last step, or that of --stop-at."""
    where = f"step {step} of {config.max_steps}"
    if step < config.max_steps:
        return f"nothing left to do: {config.log_dir} has reached --stop-at, {where}"
    return (
        f"nothing left to do: {config.log_dir} is finished, {where}; --extend STEPS goes on, "
        "beyond its first length"
    )


def describe_end(state: TrainState) -> Iterator[str]:
    """Yield the lines that say how training ended, where its results lie and what comes next."""
    config, run = state.config, state.config.log_dir
    yield f"finished step {state.step} of {config.max_steps}"
    if state.step < config.max_steps:
        yield "stopped by --stop-at: the same command without it trains to the end"
    yield from _below_baseline(run)
    yield f"log         {run / 'log.txt'}"
    yield f"picture     {plot.draw_or_explain(run)}"
    yield f"checkpoint  {checkpoint.find(run)}"
    if config.sample_interval:
        yield f"samples     {run / 'samples.jsonl'}"
    prompt = shlex.quote(next(filter(None, config.sample_prompt), "The"))
    yield f"sample      {script('eval.py')} {run} --prompt {prompt}"
    yield f"next        {script('eval.py')} {run}"


def _below_baseline(run: Path) -> Iterator[str]:
    """Yield a warning if the last validation was worse than predicting by frequencies alone."""
    history = read(run)
    if history.unigram is not None and history.val:
        last = history.val[max(history.val)]
        if not last < history.unigram:
            yield (
                f"warning     the validation loss, {last:.4f}, is no better than the unigram "
                f"baseline, {history.unigram:.4f}, which knows only how frequent each token is: "
                "train longer, or with another learning rate"
            )
