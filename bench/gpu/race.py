"""Our training against nanoGPT's recipe: the same model, text and batches for equal wall time.

Ours is assembled as train.py does it, with the optimizer, schedule and rates of the preset
`small`. The plain recipe is `bench.plain` with AdamW and cosine. Both begin with the same weights
and read the same batches; the same code validates both, off the clock.

Shapes: B sequences of a micro-batch, T block size.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from bench import worker
from bench.gpu import text
from bench.gpu.setting import Setting
from bench.plain import PlainGPT
from bench.steps import GRAD_CLIP, adamw_of, plain_model
from bench.train import MICRO_BATCH
from mygpt.distributed import autocast, init_distributed
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


Build = Callable[[Setting, str, int], Racer]  # with the dataset and the number of steps


def run(setting: Setting) -> None:
    """Note each step and validation of both racers, one after the other, with seconds raced."""
    data = str(text.find(setting))
    seconds = min(MOST[setting.device], setting.left / 2 - OVERHEAD[setting.device])
    setting.note({"data": Path(data).name, "racing_seconds": round(seconds, 1)})
    for name, build in ((OURS, ours), (PLAIN, plain)):  # each with all of the GPU's memory
        worker.measure({name: (turn_of, setting, name, build, data, seconds)}, 1, setting.note)


def turn_of(setting: Setting, name: str, build: Build, data: str, seconds: float) -> worker.Turn:
    """A turn that is the whole race of one racer."""
    return lambda: race(setting, name, build, data, seconds)


def race(setting: Setting, name: str, build: Build, data: str, seconds: float) -> dict[str, float]:
    """Train for so many seconds from the initial weights; returns the number of steps."""
    with init_distributed(setting.device):  # for its precision of products
        steps = steps_in(seconds, build(setting, data, 10**6), *TRIAL[setting.device])
        racer, validate = build(setting, data, steps), validation(setting, data)
        racing = 0.0
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


def ours(setting: Setting, data: str, steps: int) -> Racer:
    """A run of train.py, step by step."""
    config = config_of(setting, data, steps)
    dataset = Mixture.load(config.data)
    with init_distributed(setting.device) as ranks:
        state = build_train_state(RunRecord(config, dataset.fingerprint, {}), dataset, ranks)
        stop = Stop(ranks)
    return Racer(state.model, lambda: train_step(state, stop).loss)


def config_of(setting: Setting, data: str, steps: int) -> TrainConfig:
    """The preset's model and batches with the recipe of `small`."""
    recipe, micro_batch = PRESETS["small"][1], MICRO_BATCH[setting.device]
    model = replace(setting.config.model, dropout=0.0)
    return replace(
        setting.config,
        model=model,
        data=(data,),
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


def plain(setting: Setting, data: str, steps: int) -> Racer:
    """nanoGPT's recipe: one compiled graph, AdamW, cosine from 6e-4 to 6e-5."""
    config, device = config_of(setting, data, steps), torch.device(setting.device)
    nanogpts = replace(config, schedule="cosine", max_lr=6e-4, min_lr=6e-5, max_steps=steps)
    model = plain_model(config.model, setting.device)
    run = torch.compile(model) if setting.on_gpu else model
    adamw, numbers = adamw_of(model, device), count()
    sizes = (config.micro_batch, config.model.block_size)
    loader = TokenLoader(data, "train", *sizes, seed=config.seed, device=device)

    def step() -> float:
        lr = learning_rate(next(numbers), nanogpts)
        for group in adamw.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=device)
        for _ in range(ACCUMULATION):
            x, y = next(loader)  # (B, T), (B, T)
            with autocast(device):
                loss = run(x, y) / ACCUMULATION
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return total.item()

    return Racer(model, step)


def validation(setting: Setting, data: str) -> Callable[[nn.Module], float]:
    """A function of a racer's model: its loss on the same windows, by the same plain code."""
    shape, device = setting.config.model, torch.device(setting.device)
    judge = PlainGPT(shape, shape.vocab_size).to(device)
    batches = [torch.from_numpy(batch).to(device) for batch in val_batches(setting, data)]

    @torch.no_grad()
    def validate(model: nn.Module) -> float:
        for name, parameter in judge.named_parameters():
            parameter.copy_(model.get_parameter(name)[: len(parameter)])  # drops padded columns
        with autocast(device):
            losses = [judge(batch[:, :-1], batch[:, 1:]) for batch in batches]
        return torch.stack(losses).float().mean().item()

    return validate


def val_batches(setting: Setting, data: str) -> Iterator[np.ndarray]:
    """Evenly spaced windows of the validation split, in batches (8, T + 1) int64."""
    (manifest,) = Mixture.load([data]).manifests
    block_size = setting.config.model.block_size
    windows = EvalWindows(manifest, "val", block_size)
    tokens = min(VAL_TOKENS, setting.config.val_tokens)
    whole = [windows[i] for i in windows.spread(tokens) if len(windows[i]) == block_size + 1]
    for first in range(0, len(whole) - len(whole) % 8, 8):
        yield np.stack(whole[first : first + 8]).astype(np.int64)
