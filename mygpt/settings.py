"""Settings of a training run, and their presets. Plain values, without torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mygpt.config import GPT2_SHAPES, OPTIMIZERS, GPTConfig, GPTConfigSmall

# Epochs of fine-tuning by default, and those beyond which a run is warned.
FINE_TUNING_EPOCHS, MANY_EPOCHS = 3, 20
VALIDATIONS = 10  # per run, unless --val-interval or a tight --time-budget says otherwise
# Four ways to give the length of a run; exactly one is used, and it becomes max_steps.
LENGTHS = ("max_steps", "max_tokens", "epochs", "time_budget")
# Settings in which 0 means "not decided yet": filled in by `resolved`, or on resume by the run.
UNRESOLVED = (
    *LENGTHS,
    *("stop_at", "extend", "warmup_steps", "val_interval", "checkpoint_interval", "micro_batch"),
)
# Least and greatest values: beyond them a number would overflow, or a loop over it never end.
RANGES = {
    **dict.fromkeys(UNRESOLVED, (0, 10**9)),
    **dict.fromkeys(("keep_every", "sample_interval", "shuffle_shards"), (0, 10**9)),
    **dict.fromkeys(("log_interval", "keep"), (1, 10**9)),
    **dict.fromkeys(("max_time", "skip_spikes"), (0, 10**9)),
    "max_tokens": (0, 2**62),
    "val_tokens": (1, 2**62),
    "total_batch_size": (1, 2**31),
    "micro_batch": (0, 2**20),
    "max_lr": (0, 1e30),
    "weight_decay": (0, 1000),
    "grad_clip": (0, 1e30),
    "seed": (0, 2**63 - 1),
}
# Settings of earlier versions: what to do instead. Stored values are ignored.
RETIRED = {
    "fp8": "at this width its casts cost more than they save, remove --fp8",
    "attention": "torch chooses the attention kernel, remove --attention",
}


def seconds_of(text: str) -> float:
    """Parse "90", "1h30m" or "2d" into seconds; ValueError for anything else."""
    if re.fullmatch(r"\d+(\.\d*)?", text):
        return float(text)
    match = re.fullmatch("".join(rf"(?:(\d{{1,9}}){unit})?" for unit in "dhms"), text)
    if not text or match is None:
        raise ValueError(f"expected seconds or a time like 1h30m, found {text!r}")
    sizes = (86400, 3600, 60, 1)
    return float(sum(int(n or 0) * size for n, size in zip(match.groups(), sizes, strict=True)))


# A duration on the command line, seconds everywhere else.
Seconds = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec[float](
        nargs=1,
        metavar="TIME",
        instance_from_str=lambda words: seconds_of(words[0]),
        is_instance=lambda value: isinstance(value, int | float),
        str_from_instance=lambda value: [f"{value:g}"],
    ),
]
# "auto" on the command line, 0 everywhere else.
MicroBatch = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec[int](
        nargs=1,
        metavar="SEQUENCES|auto",
        instance_from_str=lambda words: 0 if words[0] == "auto" else int(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value) if value else "auto"],
    ),
]
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run as requested; `resolved` fills in those that are still 0."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: Repeated = ()  # dataset folder, or NAME=WEIGHT:FOLDER repeated; else data/'s only one
    generation: Literal["own", "latest"] = "own"  # latest: use all that the datasets have grown to
    shuffle_shards: int = 0  # shuffle within groups of this many shards; 0: globally
    verify: bool = False  # check the hash of every shard first
    init_from: str = ""  # initial weights: a run, a checkpoint, gpt2 or another GPT-2 of the hub
    log_dir: Path = Path("log/{data}")  # folder of the run; an existing run is resumed
    seed: int = 1337  # of initial weights, data order and dropout
    max_steps: int = 19073  # optimizer steps, the schedule's horizon; or one of the next three
    max_tokens: int = 0  # training tokens, repeated ones included
    epochs: float = 0  # passes over the training split
    time_budget: Seconds = 0  # training time; max_steps is derived from measured step times
    stop_at: int = 0  # stop after this step without changing the schedule; 0: run to the end
    extend: int = 0  # go on with a finished run: steps beyond its length, repeated ones included
    max_time: Seconds = 0  # stop at a checkpoint after this time (3600, 1h30m); 0: no limit
    total_batch_size: int = 2**19  # tokens per optimizer step, over all ranks
    micro_batch: MicroBatch = 16  # sequences per forward pass and rank; auto: as many as fit
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    shard: Literal["none", "optimizer", "full"] = "none"  # ZeRO-1 (optimizer) or FSDP2 (full)
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks
    max_lr: float = 6e-4  # learning rate after warm-up
    min_lr: float = 6e-5  # learning rate at the end
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: constant, then linear over the last half
    warmup_steps: int = 0  # steps of linear warm-up; 0: a twentieth of the run
    weight_decay: float = 0.1  # on tensors of two and more dimensions
    beta1: float = 0.9  # AdamW: decay rate of the gradient's mean
    beta2: float = 0.95  # AdamW: decay rate of the squared gradient's mean
    grad_clip: float = 1.0  # maximum norm of the gradient
    skip_spikes: float = 0  # skip steps this many standard deviations above the mean norm; 0: none
    log_interval: int = 1  # steps between lines on the terminal; log.txt has every step
    val_interval: int = 0  # steps between validations; 0: a tenth of the run
    val_tokens: int = 2**20  # tokens of the fixed validation subset
    checkpoint_interval: int = 0  # steps between checkpoints, plus each best one; 0: a tenth
    keep: int = 2  # newest checkpoints to keep, besides the best one by validation
    keep_every: int = 0  # also keep a checkpoint every N steps; 0: none
    sample_interval: int = 0  # steps between samples drawn from the model; 0: none
    sample_prompt: Repeated = ()  # prompt of such samples; may be repeated
    tensorboard: bool = False  # also write RUN/tensorboard
    wandb: str = ""  # also log to this Weights & Biases project
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first one available
    compile: bool = True  # torch.compile, on CUDA only
    deterministic: bool = False  # bitwise reproducible on CUDA too, at some cost in speed

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        for name in ("max_lr", "grad_clip"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        _require(0 <= self.min_lr <= self.max_lr, "min_lr", f"0 to {self.max_lr}", self.min_lr)
        if self.shard == "full" and not OPTIMIZERS[self.optimizer].elementwise:
            raise ValueError(
                f"--optimizer {self.optimizer} needs whole matrices: give --shard optimizer"
            )
        if self.shard == "full" and not self.micro_batch:
            raise ValueError("--micro-batch auto can't try sizes on --shard full: give a number")
        if not any(getattr(self, name) for name in LENGTHS):
            raise ValueError(f"a run needs a length: give {flags_of(LENGTHS)}")
        # The clock may end a run of a time budget even in its warm-up.
        if 0 < self.max_steps < self.warmup_steps and not self.time_budget:
            raise ValueError(
                f"--warmup-steps must be at most max_steps = {self.max_steps}, "
                f"got {self.warmup_steps}"
            )

    @property
    def last_step(self) -> int:
        """The step after which training ends: that of --stop-at, else of the run."""
        return min(self.max_steps, self.stop_at or self.max_steps)

    def resolved(self, max_steps: int, validations: int = VALIDATIONS) -> "TrainConfig":
        """Return the settings with `max_steps`, and with open intervals derived from it."""
        interval = max(1, max_steps // validations)
        return replace(
            self,
            max_steps=max_steps,
            warmup_steps=self.warmup_steps or max(1, max_steps // 20),
            val_interval=self.val_interval or interval,
            checkpoint_interval=self.checkpoint_interval or interval,
        )


def flags_of(names: Sequence[str]) -> str:
    """Join the flags of settings into a list of alternatives."""
    *others, last = (f"--{name.replace('_', '-')}" for name in names)
    return f"{', '.join(others)} or {last}"


def check_ranges(config: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise ValueError, naming the flag, for a value of `config` outside its range."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        _require(low <= value <= high, name, f"{low} to {high}", value)


def _require(condition: bool, name: str, expected: str, actual: object) -> None:
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {actual}")


_GPT2 = TrainConfig(warmup_steps=715, val_interval=250, checkpoint_interval=1000)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "tiny": (
        "for a CPU and five minutes",
        TrainConfig(
            GPTConfig(block_size=128, n_layers=4, n_heads=4, n_embed=128),
            max_steps=0,
            time_budget=290,
            total_batch_size=1024,
            micro_batch=8,
            optimizer="muon",
            max_lr=8e-3,
            min_lr=4e-4,
            schedule="wsd",
            log_interval=10,
            val_tokens=2**13,
        ),
    ),
    "small": (
        "GPTConfigSmall, ~30M parameters: one small GPU, or a patient CPU",
        TrainConfig(
            GPTConfigSmall(dropout=0.1),
            max_steps=2000,
            total_batch_size=2**14,
            optimizer="muon",
            max_lr=3e-3,
            min_lr=1.5e-4,
            schedule="wsd",
            warmup_steps=100,
            log_interval=10,
            val_interval=100,
            val_tokens=2**17,
            checkpoint_interval=200,
        ),
    ),
    "gpt2": ("124M parameters and 10B tokens; what runs without a preset", _GPT2),
    "gpt2-medium": (
        "350M parameters",
        replace(_GPT2, model=GPT2_SHAPES["gpt2-medium"], micro_batch=8, max_lr=3e-4, min_lr=3e-5),
    ),
    "gpt2-large": (
        "774M parameters",
        replace(
            _GPT2, model=GPT2_SHAPES["gpt2-large"], micro_batch=4, max_lr=2.5e-4, min_lr=2.5e-5
        ),
    ),
    "gpt2-xl": (
        "1.6B parameters",
        replace(_GPT2, model=GPT2_SHAPES["gpt2-xl"], micro_batch=2, max_lr=2e-4, min_lr=2e-5),
    ),
}


# {data}: the names of the datasets, see `mygpt.start`.
PRESETS = {
    name: (text, replace(config, log_dir=Path("log", f"{{data}}-{name}")))
    for name, (text, config) in PRESETS.items()
}


def shallow(config: GPTConfig | TrainConfig) -> dict[str, Any]:
    """Return {field: value}, with the model of a `TrainConfig` as an object."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


def only_dataset(folder: Path = Path("data")) -> Path:
    """Return the dataset under `folder` if there is exactly one; else an error with the choices."""
    datasets = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if not datasets:
        raise FileNotFoundError(
            f"no dataset under {folder}/ in {Path.cwd()}: make one with `python -m prepare SOURCE "
            f"--out {folder}/NAME`, or name its folder with --data"
        )
    if len(datasets) > 1:
        raise ValueError(
            f"{len(datasets)} datasets under {folder}/: choose with --data one of "
            + ", ".join(map(str, datasets))
        )
    return datasets[0]
