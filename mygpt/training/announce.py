"""What a training says of itself before its first step and after its last, for people."""

from collections.abc import Iterator
from pathlib import Path

from mygpt import checkpoint, plot
from mygpt.distributed import compute_dtype
from mygpt.log import skip_line
from mygpt.training.job import Job
from mygpt.training.step import Outcome


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
    yield f"checkpoint  {checkpoint.newest(run)}"
    yield f"next        python eval.py {run}"
