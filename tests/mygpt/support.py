"""A run on disk that nobody had to train."""

from datetime import timedelta
from pathlib import Path

import torch

from mygpt import checkpoint, run_config
from mygpt.config import GPTConfig
from mygpt.log import RunLog, baseline_line, step_line, val_line
from mygpt.model import GPT
from mygpt.settings import TrainConfig
from shards import tokenizer
from shards.files import write_json
from shards.manifest import Manifest, TokenizerIdentity
from tests.dataset import write_dataset

STEPS = 40
GPT2_TINY = {"block_size": 24, "vocab_size": 50257, "n_layers": 2, "n_heads": 2, "n_embed": 16}


def decided(model: GPT) -> GPT:
    """The model with weights so large that every token it reads matters."""
    for parameter in model.parameters():
        parameter.data.mul_(8)
    return model


def gpt2_dataset(folder: Path) -> Manifest:
    """A few tokens, said to be GPT-2's."""
    gpt2 = tokenizer.load("gpt2")
    identity = TokenizerIdentity(gpt2.name, gpt2.n_vocab, gpt2.eot, gpt2.hash)
    return write_dataset(folder, tokenizer=identity)


def write_run(run: Path, data: Manifest, **shape: int | float | bool) -> GPT:
    """A finished run with its log and checkpoints at the half and the end; the last one's model.

    Every weight is random, biases and layer norms too: what is left out or mixed up shows.
    """
    config = TrainConfig(
        GPTConfig(**{**GPT2_TINY, **shape}),  # type: ignore[arg-type]
        data=(str(data.folder),),
        log_dir=run,
        max_steps=STEPS,
        total_batch_size=1024,
        micro_batch=8,
    ).resolved(STEPS)
    record = run_config.RunRecord(config, data.fingerprint, {"random": data.generation})
    run.mkdir(parents=True)
    write_json(run / "config.json", record.to_dict())
    write_log(run)
    torch.manual_seed(1)
    for step in (STEPS // 2, STEPS):
        model = GPT(config.model).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        state = {
            "val_loss": 11 - step / 11,
            "loader": {},
            "scaler": {},
            "fingerprint": data.fingerprint,
            "generations": {"random": data.generation},
            "config": run_config.to_dict(config),
        }
        checkpoint.save(run, step, model, {}, state)
    return model


def write_log(run: Path) -> None:
    """A log of `STEPS` steps whose losses fall."""
    log = RunLog(run)
    log.write(f"start 0/{STEPS}", baseline_line(7.5, 10.8), shown=False)
    for step in range(1, STEPS + 1):
        metrics = {"loss": 11 - step / 10, "lr": 3e-3, "norm": 0.7, "ms": 250.0}
        metrics["tokens_per_second"] = 2048.0 + step
        log.write(step_line(step, STEPS, metrics, timedelta(seconds=2)), shown=False)
        if step % 10 == 0:
            log.write(val_line(step, STEPS, 11 - step / 11, 64), shown=False)
