"""The settings of a training run: its flags, its presets, and the arithmetic of its steps.

Everything here is plain values: no torch, so that `train.py --help` answers at once.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mygpt.config import GPT2_SHAPES, OPTIMIZERS, GPTConfig, GPTConfigSmall

ROUNDS = 10  # validations in a run whose interval was left open
# The ways to say how long a run is. One of them is given, and becomes max_steps.
LENGTHS = ("max_steps", "max_tokens", "epochs", "time_budget")
# Where 0 says "not decided": a run that goes on has them already, `resolved` works them out.
OPEN = (
    *LENGTHS,
    *("stop_at", "warmup_steps", "val_interval", "checkpoint_interval", "micro_batch"),
)

# Settings of earlier versions: what their flags answer. Stored values are dropped.
RETIRED = {
    "fp8": "fp8 was removed: at this width its casts cost more than they save; remove --fp8",
    "attention": "torch chooses the attention kernel; remove --attention",
}


def seconds_of(text: str) -> float:
    """Seconds in "90", "1h30m" or "2d". Raises ValueError for anything else."""
    if re.fullmatch(r"\d+(\.\d*)?", text):
        return float(text)
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or match is None:
        raise ValueError(f"expected seconds or a time like 1h30m, found {text!r}")
    sizes = (86400, 3600, 60, 1)
    return float(sum(int(n or 0) * size for n, size in zip(match.groups(), sizes, strict=True)))


# How the command line reads a time; the rest of the program sees seconds.
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
# "auto" is the command line's word for a number that is still to be found.
Rows = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec[int](
        nargs=1,
        metavar="ROWS|auto",
        instance_from_str=lambda words: 0 if words[0] == "auto" else int(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value) if value else "auto"],
    ),
]
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class TrainConfig:
    """A run as it is asked for; what is 0 is open, and filled in by the run or by `resolved`."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: Repeated = ()  # dataset's folder, or several: NAME=WEIGHT:FOLDER; else data/'s only one
    generation: Literal["own", "latest"] = "own"  # latest: go on with all that data have grown to
    shuffle_shards: int = 0  # shuffle within moving groups of so many shards; 0: over all of them
    verify: bool = False  # check the hash of every shard before anything else
    init_from: str = ""  # weights to begin with: gpt2, gpt2-medium, ... or a folder of theirs
    log_dir: Path = Path("log")  # the run's folder; a run that lies there is continued
    seed: int = 1337  # of the initial weights, the order of the data and dropout
    max_steps: int = 19073  # optimizer steps, the horizon of the schedule; or one of the next three
    max_tokens: int = 0  # training tokens, counted anew in each epoch
    epochs: float = 0  # passes over the training split
    time_budget: Seconds = 0  # time of training, from which max_steps is measured
    stop_at: int = 0  # stop after this step and leave the schedule as it is; 0: go to the end
    max_time: Seconds = 0  # stop then, at a checkpoint, to be run again: 3600 or 1h; 0: no limit
    total_batch_size: int = 2**19  # tokens of one step, of all ranks together
    micro_batch: Rows = 16  # rows that a rank takes through the model at once; auto: what fits
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    shard: Literal["none", "optimizer", "full"] = "none"  # what each rank has only a share of
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the matrices of the blocks
    max_lr: float = 6e-4  # learning rate after the warm-up
    min_lr: float = 6e-5  # learning rate at the end
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: stay at max_lr, fall in the last half
    warmup_steps: int = 0  # steps of linear warm-up; 0: a twentieth of the run
    weight_decay: float = 0.1  # on tensors of two and more dimensions
    beta1: float = 0.9  # AdamW's decay of the mean of the gradient
    beta2: float = 0.95  # AdamW's decay of the mean of its square
    grad_clip: float = 1.0  # largest norm of the gradient
    skip_spikes: float = 0  # skip steps so many deviations above the mean norm; 6, say; 0: none
    log_interval: int = 1  # steps from one line on the terminal to the next; log.txt has each
    val_interval: int = 0  # steps from one validation to the next; 0: a tenth of the run
    val_tokens: int = 2**20  # size of the fixed part of the validation split used for them
    checkpoint_interval: int = 0  # likewise for checkpoints; a better validation makes one too
    keep: int = 2  # newest checkpoints to keep, beside the best by validation
    keep_every: int = 0  # keep also those of steps that this divides; 0: none of them
    sample_interval: int = 0  # steps from one text that the model writes to the next; 0: none
    sample_prompt: Repeated = ()  # what such texts begin with; may be repeated
    tensorboard: bool = False  # write RUN/tensorboard too
    wandb: str = ""  # send the figures to this project of Weights & Biases
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these there is
    compile: bool = True  # torch.compile; on CUDA only
    deterministic: bool = False  # bitwise repeatable on CUDA as well, which costs speed

    def __post_init__(self) -> None:
        for name in ("total_batch_size", "log_interval", "val_tokens", "keep"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        others = ("max_time", "shuffle_shards", "keep_every", "sample_interval", "skip_spikes")
        for name in (*OPEN, *others):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, "0 or more", value)
        for name in ("max_lr", "grad_clip"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _require(0 <= self.min_lr <= self.max_lr, "min_lr", f"0 to {self.max_lr}", self.min_lr)
        _require(0 <= self.seed < 2**63, "seed", "0 to 2**63 - 1", self.seed)
        if self.shard == "full" and not OPTIMIZERS[self.optimizer].elementwise:
            raise ValueError(
                f"--optimizer {self.optimizer} needs whole matrices: give --shard optimizer"
            )
        if self.shard == "full" and not self.micro_batch:
            raise ValueError("--micro-batch auto can't try sizes on --shard full: give a number")
        if not any(getattr(self, name) for name in LENGTHS):
            raise ValueError(f"a run needs an end: give {_flags_of(LENGTHS)}")
        if self.max_steps and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"--warmup-steps must be at most max_steps = {self.max_steps}, "
                f"got {self.warmup_steps}"
            )

    def resolved(self, max_steps: int) -> "TrainConfig":
        """The same with `max_steps`, and with the intervals left open worked out of it."""
        tenth = max(1, max_steps // ROUNDS)
        return replace(
            self,
            max_steps=max_steps,
            warmup_steps=self.warmup_steps or max(1, tenth // 2),
            val_interval=self.val_interval or tenth,
            checkpoint_interval=self.checkpoint_interval or tenth,
        )


def _flags_of(names: Sequence[str]) -> str:
    """The flags of settings, as one offers a choice."""
    *others, last = (f"--{name.replace('_', '-')}" for name in names)
    return f"{', '.join(others)} or {last}"


def _require(condition: bool, name: str, wanted: str, found: object) -> None:
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, got {found}")


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


# What the parser fills in: the same fields, unchecked and with n_hidden still open. So n_hidden
# follows --n-embed, and an impossible value is reported by us in one line, not inside the parser.
class _ModelFlags(GPTConfig):
    """The shape of the model."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class _Flags(TrainConfig):
    model: _ModelFlags = field(default_factory=_ModelFlags)

    def __post_init__(self) -> None:
        pass


def parse(args: Sequence[str], description: str) -> TrainConfig:
    """Read `[PRESET] --flag value ...`. Raises ValueError for values that cannot be.

    Unknown flags and values of a wrong type leave through the parser's own message and exit code 2;
    `--help` prints and exits.
    """
    preset, rest = _preset_name(args)
    for name, message in RETIRED.items():
        if _is_given(name, rest) or _is_given(f"no_{name}", rest):
            raise ValueError(message)
    base = PRESETS[preset][1]
    flags = tyro.cli(
        _Flags,
        args=rest,
        default=_Flags(
            **(shallow(base) | {"model": _ModelFlags(**(shallow(base.model) | {"n_hidden": 0}))})
        ),
        prog="train.py",
        description=f"{description}\n\nPresets: {_presets()}.\n\nThe defaults below: {preset}.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    values = shallow(flags) | {"model": type(base.model)(**shallow(flags.model))}
    return TrainConfig(**(values | _length(flags, rest)))


def _presets() -> str:
    return "; ".join(f"{name}: {description}" for name, (description, _) in PRESETS.items())


def _preset_name(args: Sequence[str]) -> tuple[str, Sequence[str]]:
    if not args or args[0].startswith("-"):
        return "gpt2", args
    if args[0] in PRESETS:
        return args[0], args[1:]
    near = difflib.get_close_matches(args[0], PRESETS, n=1) or ["gpt2"]
    raise ValueError(
        f"unknown preset {args[0]!r}: did you mean {near[0]}? There are {', '.join(PRESETS)}"
    )


def _length(flags: _Flags, args: Sequence[str]) -> dict[str, int]:
    """What of the preset is put aside when a flag says anew how long the run is."""
    given = [name for name in LENGTHS if _is_given(name, args)]
    said = [name for name in given if getattr(flags, name)]
    if len(said) > 1:
        raise ValueError(f"{_flags_of(said)} each say how long: give one of them")
    if not given:
        return {}
    aside = dict.fromkeys((name for name in LENGTHS if name not in said), 0)
    return aside if _is_given("warmup_steps", args) else aside | {"warmup_steps": 0}


def _is_given(name: str, args: Sequence[str]) -> bool:
    """Whether a flag is among the words of the command, be it with the value it has anyway."""
    flags = {f"--{name}", f"--{name.replace('_', '-')}"}
    return any(word.partition("=")[0] in flags for word in args)


def shallow(config: GPTConfig | TrainConfig) -> dict[str, Any]:
    """Field → value, the model of a `TrainConfig` as it is."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


def steps_of(config: TrainConfig, windows_per_epoch: int | None) -> int:
    """The steps that --max-steps, --max-tokens or --epochs stand for; 0 for --time-budget.

    `windows_per_epoch` is None where several sources are mixed: each of them then has epochs of
    its own, and --epochs is a ValueError. The last step is a whole one.
    """
    if config.max_steps or config.max_tokens:
        return config.max_steps or math.ceil(config.max_tokens / config.total_batch_size)
    if not config.epochs:
        return 0
    if windows_per_epoch is None:
        raise ValueError("--epochs says nothing of several sources: give --max-tokens instead")
    windows = config.epochs * windows_per_epoch
    # Rounded first: 0.1 * 300 is a little more than 30.
    return math.ceil(round(windows * config.model.block_size / config.total_batch_size, 6))


def shares_out(config: TrainConfig, world_size: int) -> bool:
    """Whether so many ranks make a step of whole micro-batches."""
    piece = config.micro_batch * config.model.block_size * world_size
    return not piece or config.total_batch_size % piece == 0


def accumulation(config: TrainConfig, world_size: int) -> int:
    """Micro-steps of one step: total_batch_size / (micro_batch * block_size * world_size).

    Raises ValueError with the nearest values that fit if this is no whole number.
    """
    row_tokens = config.model.block_size * world_size
    piece = config.micro_batch * row_tokens
    micro_steps, rest = divmod(config.total_batch_size, piece)
    if not rest:
        return micro_steps
    below = config.total_batch_size - rest
    nearest = f"{below} or {below + piece}" if below else f"{piece}"
    message = (
        f"--total-batch-size must be a multiple of micro_batch * block_size * ranks = "
        f"{config.micro_batch} * {config.model.block_size} * {world_size} = {piece}, got "
        f"{config.total_batch_size}: nearest are {nearest}"
    )
    rows, rest = divmod(config.total_batch_size, row_tokens)
    if not rest:
        fits = next(m for m in range(config.micro_batch, 0, -1) if rows % m == 0)
        message += f"; or keep it and give --micro-batch {fits}"
    raise ValueError(message)


def steps_that_fit(
    seconds: float, step_seconds: float, round_seconds: float, val_interval: int
) -> int:
    """How many steps fit in `seconds`; at least 1.

    `round_seconds` is a validation with its checkpoint, of which there are `ROUNDS`, or one every
    `val_interval` steps if that is not 0. A twentieth of the time is left over for a machine
    that slows down.
    """
    if not val_interval:
        return max(1, int((0.95 * seconds - ROUNDS * round_seconds) / step_seconds))
    return max(1, int(0.95 * seconds / (step_seconds + round_seconds / val_interval)))


def only_dataset(folder: Path = Path("data")) -> Path:
    """The dataset under `folder` if there is exactly one; else FileNotFoundError or ValueError."""
    found = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if not found:
        raise FileNotFoundError(
            f"no dataset under {folder}/: make one with `python -m prepare SOURCE --out "
            f"{folder}/NAME`, or name its folder with --data"
        )
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} datasets under {folder}/: choose with --data one of "
            + ", ".join(map(str, found))
        )
    return found[0]
