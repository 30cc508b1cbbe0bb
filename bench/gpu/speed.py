"""Speed of training and generation: `bench.train`, its profile, and `bench.generate`."""

import tempfile
from dataclasses import replace
from pathlib import Path

from bench import generate as bench_generate
from bench import steps
from bench import train as bench_train
from bench.gpu.setting import Setting

PARITY_STEPS = 200  # over which our losses are compared with the plain step's
# Long enough on a GPU for `PARITY_STEPS` of each contender; on a CPU only to rehearse.
ROUNDS = {"cuda": 3, "cpu": 1}
SECONDS = {"cuda": 10, "cpu": 0}
NEW_TOKENS = {"cuda": 100, "cpu": 5}


def options_of(setting: Setting) -> bench_train.Options:
    """The options of `bench.train`."""
    options = bench_train.Options(preset=setting.preset, device=setting.device)
    device = setting.device
    return replace(options, rounds=ROUNDS[device], seconds=SECONDS[device])


def warm(setting: Setting) -> None:
    """Compile every contender once, so that later stages find it in Inductor's cache."""
    if setting.on_gpu:
        bench_train.run(replace(options_of(setting), rounds=1, seconds=0), lambda record: None)


def train(setting: Setting) -> None:
    """Note every turn of `bench.train`'s contenders."""
    options = options_of(setting)
    work = bench_train.workload(options, setting.work)
    setting.note({"about": bench_train.about(options, work)})
    bench_train.run(options, setting.note)


def profile(setting: Setting) -> None:
    """Note the parts of our step and its longest kernels."""
    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        work = bench_train.workload(options_of(setting), Path(folder))
        work.build_data()
        setting.note({"profile": steps.profile(work, compiled=setting.on_gpu)})


def generate(setting: Setting) -> None:
    """Note every turn of `bench.generate`'s contenders."""
    options = bench_generate.Options(
        preset=setting.preset,
        device=setting.device,
        new_tokens=NEW_TOKENS[setting.device],
        rounds=ROUNDS[setting.device],
    )
    setting.note({"about": bench_generate.about(options)})
    bench_generate.run(options, setting.note)
