"""Our training against nanoGPT's recipe: the same model, text and batches for equal wall time.

Ours is assembled as train.py does it, with the optimizer, schedule and rates of the preset
`small`. The plain recipe is `bench.plain` with AdamW and cosine. Both begin with the same weights
and read the same batches; the same model validates the weights of both, off the clock.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bench import worker
from bench.gpu.runner import Setting
from bench.gpu.stages import find_text
from bench.steps import plain_model, usual_step
from bench.train import MICRO_BATCH
from mygpt.distributed import DistributedContext, init_distributed
from mygpt.evaluate import evaluate
from mygpt.model import GPT
from mygpt.run_config import RunRecord
from mygpt.schedule import learning_rate
from mygpt.settings import PRESETS, TrainConfig
from mygpt.stopping import Stop
from mygpt.train_state import build_train_state
from shards.loader import TokenLoader
from shards.mixture import Mixture
from shards.reader import EvalWindows
from train import train_step

OURS, PLAIN = "myGPT", "plain recipe"
# 2 micro-batches per step: 131,072 tokens on a GPU.
ACCUMULATION, VALIDATIONS, VAL_TOKENS = 2, 16, 2**17
# Of each racer: start, compilation, timing of steps, validation. And the time that it then races.
OVERHEAD = {"cuda": 40, "cpu": 15}
MOST = {"cuda": 100, "cpu": 10}
TRIAL = {"cuda": (3, 5), "cpu": (1, 1)}  # steps before the clock starts, and by the clock


class Racer(NamedTuple):
    """A model and its next optimizer step, which returns the loss before the update."""

    model: nn.Module
    step: Callable[[], float]


Build = Callable[[TrainConfig, DistributedContext], Racer]


def run(setting: Setting) -> None:
    """Note each step and validation of both racers, one after the other, with seconds raced."""
    data = find_text(setting)
    left = setting.ends - time.time()
    seconds = min(MOST[setting.device], left / 2 - OVERHEAD[setting.device])
    setting.note({"data": data.name, "racing_seconds": round(seconds, 1)})
    for name, build in ((OURS, ours), (PLAIN, plain)):  # each with all of the GPU's memory
        maker = (partial, race, setting, name, build, data, seconds)
        worker.measure({name: maker}, 1, setting.note)


def race(setting: Setting, name: str, build: Build, data: Path, seconds: float) -> dict[str, float]:
    """Train for so many seconds from the initial weights; returns the number of steps."""
    with init_distributed(setting.device) as ranks:
        endless = config_of(setting, data, 10**6)
        steps = steps_in(seconds, build(endless, ranks), *TRIAL[setting.device])
        config = config_of(setting, data, steps)
        racer, validate, racing = build(config, ranks), validation(config, ranks), 0.0
        for number in range(1, steps + 1):
            started = time.perf_counter()
            loss = racer.step()
            racing += time.perf_counter() - started
            at = {"racer": name, "step": number, "seconds": round(racing, 4)}
            setting.note(at | {"loss": loss})
            if number % max(1, steps // VALIDATIONS) == 0 or number == steps:
                setting.note(at | {"val": validate(racer.model)})
        return {"steps": steps, "raced": racing}


def steps_in(seconds: float, racer: Racer, warm: int, timed: int) -> int:
    """Steps that fit into so many seconds, once everything is compiled."""
    for _ in range(warm):
        racer.step()
    started = time.perf_counter()
    for _ in range(timed):
        racer.step()
    return max(2, round(seconds * timed / (time.perf_counter() - started)))


def config_of(setting: Setting, data: Path, steps: int) -> TrainConfig:
    """The preset's model and batches with the recipe of `small`."""
    recipe, micro_batch = PRESETS["small"][1], MICRO_BATCH[setting.device]
    model = replace(setting.config.model, dropout=0.0)
    return replace(
        setting.config,
        model=model,
        data=(str(data),),
        time_budget=0,
        max_steps=steps,
        warmup_steps=max(1, steps // 20),
        micro_batch=micro_batch,
        total_batch_size=ACCUMULATION * micro_batch * model.block_size,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        max_lr=recipe.max_lr,
        min_lr=recipe.min_lr,
        device=setting.device,
    )


def ours(config: TrainConfig, ranks: DistributedContext) -> Racer:
    """A run of train.py, step by step."""
    dataset = Mixture.load(config.data)
    state = build_train_state(RunRecord(config, dataset.fingerprint, {}), dataset, ranks)
    stop = Stop(ranks)
    return Racer(state.model, lambda: train_step(state, stop).loss)


def plain(config: TrainConfig, ranks: DistributedContext) -> Racer:
    """nanoGPT's recipe: one compiled graph, AdamW, cosine from 6e-4 to 6e-5."""
    model = plain_model(config.model, config.device)
    sizes = (config.micro_batch, config.model.block_size)
    batches = TokenLoader(config.data, "train", *sizes, seed=config.seed, device=ranks.device)
    recipe = replace(config, schedule="cosine", max_lr=6e-4, min_lr=6e-5)
    rates = (learning_rate(number, recipe) for number in count())
    compiled = config.device == "cuda"
    loss_of = lambda run, x, y: run(x, y)  # noqa: E731
    return Racer(model, usual_step(model, batches, loss_of, compiled, ACCUMULATION, rates))


def validation(config: TrainConfig, ranks: DistributedContext) -> Callable[[nn.Module], float]:
    """A function of a racer's model: the loss of its weights on the same windows."""
    judge = GPT(config.model).to(ranks.device)
    (manifest,) = Mixture.load(config.data).manifests
    all_windows = EvalWindows(manifest, "val", config.model.block_size)
    windows = [all_windows[i] for i in all_windows.spread(min(VAL_TOKENS, config.val_tokens))]

    def validate(model: nn.Module) -> float:
        with torch.no_grad():
            for name, parameter in judge.named_parameters():
                parameter.copy_(model.get_parameter(name)[: len(parameter)])  # without padding
        return evaluate(judge, windows, ranks).mean

    return validate
