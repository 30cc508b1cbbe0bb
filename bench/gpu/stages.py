"""The stages of `bench.gpu` that run other commands, or whole benchmarks.

`machine`, `text` and `warm` in the background; `train`, `profile`, `generate` and `run` in turn.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench import corpus, steps, table, worker
from bench import generate as bench_generate
from bench import train as bench_train
from bench.gpu.runner import Setting
from mygpt import log

PACKAGES = ("torch", "triton", "transformers", "numpy", "pyarrow", "tiktoken", "gigatoken")
SAMPLED = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "watts": "power.draw"} | {
    "celsius": "temperature.gpu", "megabytes": "memory.used", "percent_busy": "utilization.gpu",
}  # fmt: skip
MEGABYTES = 250
STDLIB, PACKAGES_TEXT = "stdlib", "packages"
PARITY_STEPS = 200  # over which our losses are compared with the plain step's
# Rounds, and seconds of a turn; on a CPU only to rehearse.
ROUNDS, SECONDS = {"cuda": 3, "cpu": 1}, {"cuda": 5.0, "cpu": 0.0}
NEW_TOKENS = {"cuda": 100, "cpu": 5}
RUN_STEPS, KEPT_LINES = 20, 12


def machine(setting: Setting) -> None:
    """Note versions, then clocks, power and memory each second until this process is killed."""
    about = {"machine": table.machine("gpu", PACKAGES), "torch": torch.__version__}
    setting.note(about | {"device": bench_train.device_name(setting.device)})
    program = shutil.which("nvidia-smi")
    if program is None:
        return
    query = [program, "-q", "-d", "CLOCK,POWER,PERFORMANCE"]
    state = subprocess.run(query, capture_output=True, text=True, check=False)
    setting.note({"nvidia-smi": state.stdout})
    fields = f"--query-gpu={','.join(SAMPLED.values())}"
    sampling = [program, fields, "--format=csv,noheader,nounits"]
    while True:  # not its own loop, -l 1, which may hold lines back in a pipe's buffer
        found = subprocess.run(sampling, capture_output=True, text=True, check=False)
        setting.note({"sample": parse(found.stdout)})
        time.sleep(1)


def parse(line: str) -> dict[str, float]:
    """Return the first GPU's numbers by name, without those that nvidia-smi does not have."""
    words = [word.strip() for word in line.partition("\n")[0].split(",")]
    named = zip(SAMPLED, words, strict=False)
    return {name: float(word) for name, word in named if word.replace(".", "", 1).isdigit()}


def text(setting: Setting) -> None:
    """Prepare Python's standard library, soon there, and for larger models the packages' text."""
    prepare(setting, STDLIB, "stdlib")
    if PACKAGES_TEXT in text_names(setting):
        prepare(setting, PACKAGES_TEXT, str(corpus.build(MEGABYTES).parquet))


def prepare(setting: Setting, name: str, source: str) -> Path:
    """Prepare a dataset and return its folder."""
    folder = setting.work / name
    subprocess.run([sys.executable, "-m", "prepare", source, "--out", str(folder)], check=True)
    setting.note({"dataset": name})
    return folder


def text_names(setting: Setting) -> tuple[str, ...]:
    """The datasets that `text` prepares, the largest first."""
    return (STDLIB,) if setting.preset == "tiny" else (PACKAGES_TEXT, STDLIB)


def find_text(setting: Setting, patience: float = 20) -> Path:
    """Return the largest dataset that is finished, waiting so many seconds for the larger one.

    If there is none after twice as many, whatever `text` met, the smaller one is prepared here.
    """
    folders = [setting.work / name for name in text_names(setting)]
    ends = time.time() + patience
    while True:
        found = [folder for folder in folders if (folder / "manifest.json").exists()]
        if found and (found[0] == folders[0] or time.time() > ends):
            return found[0]
        if time.time() > ends + patience:
            return prepare(setting, STDLIB, "stdlib")
        time.sleep(0.2)


def train_options(setting: Setting) -> bench_train.Options:
    """The options of `bench.train`."""
    device, rounds = setting.device, ROUNDS[setting.device]
    steps = -(-PARITY_STEPS // rounds) if setting.on_gpu else 1
    return bench_train.Options(
        setting.preset, device, rounds=rounds, seconds=SECONDS[device], steps=steps
    )


def warm(setting: Setting) -> None:
    """Compile every contender once, so that later stages find it in Inductor's cache."""
    if setting.on_gpu:
        options = replace(train_options(setting), seconds=0, steps=1)
        work = bench_train.workload(options, new_folder(setting, "warm"))
        work.build_data()
        _, (compiled, _) = bench_train.groups(options, work)
        worker.measure(compiled, 1, lambda record: None)


def new_folder(setting: Setting, name: str) -> Path:
    """Return a new folder for a dataset."""
    folder = setting.work / name
    folder.mkdir()
    return folder


def train(setting: Setting) -> None:
    """Note every turn of `bench.train`'s contenders."""
    options = train_options(setting)
    setting.note({"about": bench_train.about(options, bench_train.workload(options, setting.work))})
    bench_train.run(options, setting.note)


def profile(setting: Setting) -> None:
    """Note the parts of our step and its longest kernels."""
    work = bench_train.workload(train_options(setting), new_folder(setting, "profile"))
    work.build_data()
    setting.note({"profile": steps.profile(work, compiled=setting.on_gpu)})


def generate(setting: Setting) -> None:
    """Note every turn of `bench.generate`'s contenders."""
    device = setting.device
    options = bench_generate.Options(
        setting.preset, device, new_tokens=NEW_TOKENS[device], rounds=ROUNDS[device]
    )
    setting.note({"about": bench_generate.about(options)})
    bench_generate.run(options, setting.note)


def run(setting: Setting) -> None:
    """Note how train.py, stopped half-way and resumed, and eval.py end, and the logged timings."""
    folder, half = str(setting.work / "run"), str(RUN_STEPS // 2)
    device = ["--device", setting.device]
    train = ["train.py", setting.preset, "--data", str(find_text(setting)), "--log-dir", folder]
    train += [*device, "--max-steps", str(RUN_STEPS), "--val-tokens", "8192"]
    micro_batch = bench_train.MICRO_BATCH[setting.device]
    tokens = 2 * micro_batch * setting.config.model.block_size
    train += ["--micro-batch", str(micro_batch), "--total-batch-size", str(tokens)]
    train += ["--val-interval", half, "--checkpoint-interval", half]
    evaluate = ["eval.py", folder, *device, "--prompt", "def"]
    commands = {"start": [*train, "--stop-at", half], "resume": train, "evaluate": evaluate}
    for name, command in commands.items():
        started = time.time()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        print(done.stdout, done.stderr, flush=True)
        ended = {"exit": done.returncode, "seconds": round(time.time() - started, 1)}
        tail = (done.stdout + done.stderr).splitlines()[-KEPT_LINES:]
        setting.note({"command": name, **ended, "tail": tail})
        if name == "resume":
            history = log.read(Path(folder))
            setting.note({"losses": history.train, "timings": history.timings})
