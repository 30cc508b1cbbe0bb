"""The command line of train.py: a preset and flags to the settings of a run.

Without torch, so that `train.py --help` answers at once.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tyro

from mygpt.config import GPTConfig
from mygpt.settings import (
    FINE_TUNING_EPOCHS,
    LENGTHS,
    PRESETS,
    RETIRED,
    TrainConfig,
    flags_of,
    shallow,
)

# What --init-from takes unless flags say otherwise: a pre-trained model needs small steps, and few.
FINE_TUNING: dict[str, Any] = {
    "optimizer": "adamw",
    "schedule": "cosine",
    "max_lr": 3e-5,
    "warmup_steps": 0,
    "val_interval": 0,
    "checkpoint_interval": 0,
}
# At most, and such that up to eight GPUs share a step of GPT-2's context.
FINE_TUNING_BATCH, FINE_TUNING_MICRO_BATCH = 2**15, 4


# The dataclasses that the parser fills: the same fields, unchecked and with n_hidden left open. So
# n_hidden follows --n-embed, and impossible values become our one-line errors, not the parser's.
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
    """Parse `[PRESET] --flag value ...`.

    Raises ValueError for invalid values. Unknown flags and values of a wrong type exit with the
    parser's own message and code 2; `--help` prints and exits.
    """
    _refuse_retired_flags(args)
    preset, rest = _preset_name(args)
    base = PRESETS[preset][1]
    model = _ModelFlags(**(shallow(base.model) | {"n_hidden": 0}))
    flags = tyro.cli(
        _Flags,
        args=rest,
        default=_Flags(**(shallow(base) | {"model": model})),
        prog="train.py",
        description=f"{description}\n\nPresets: {_presets()}.\n\nThe defaults below: {preset}.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    values = shallow(flags) | {"model": type(base.model)(**shallow(flags.model))}
    values |= _overridden_length(flags, rest)
    if flags.init_from:
        _refuse_shape_flags(rest)
        values |= _fine_tuning(values, rest)
    return TrainConfig(**values)


def _fine_tuning(values: Mapping[str, Any], args: Sequence[str]) -> dict[str, Any]:
    """Return the settings for initial weights that are trained already, but for explicit ones."""
    settings = dict(FINE_TUNING)
    if not any(_is_explicit(name, args) for name in LENGTHS):
        settings |= dict.fromkeys(LENGTHS, 0) | {"epochs": FINE_TUNING_EPOCHS}
    if not _is_explicit("total_batch_size", args):
        settings["total_batch_size"] = min(values["total_batch_size"], FINE_TUNING_BATCH)
        settings["micro_batch"] = min(values["micro_batch"], FINE_TUNING_MICRO_BATCH)
    folder: Path = values["log_dir"]
    settings["log_dir"] = folder.with_name(f"{folder.name}-tuned")
    settings = {name: value for name, value in settings.items() if not _is_explicit(name, args)}
    if not _is_explicit("min_lr", args):
        settings["min_lr"] = settings.get("max_lr", values["max_lr"]) / 10
    return settings


def _refuse_retired_flags(args: Sequence[str]) -> None:
    for name, advice in RETIRED.items():
        if _is_explicit(name, args) or _is_explicit(f"no_{name}", args):
            raise ValueError(f"--{name} was removed: {advice}")


def _refuse_shape_flags(args: Sequence[str]) -> None:
    for name in [f.name for f in fields(GPTConfig) if f.name not in ("block_size", "dropout")]:
        if _is_explicit(name, args) or _is_explicit(f"no_{name}", args):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"--init-from and {flag} each give the model's shape: leave out {flag}"
            )


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


def _overridden_length(flags: _Flags, args: Sequence[str]) -> dict[str, int]:
    """Return zeros for the preset's length if a flag gives another kind of length."""
    explicit = [name for name in LENGTHS if _is_explicit(name, args)]
    chosen = [name for name in explicit if getattr(flags, name)]
    if len(chosen) > 1:
        raise ValueError(f"{flags_of(chosen)} each give the length of the run: use one of them")
    if not explicit:
        return {}
    zeros = dict.fromkeys((name for name in LENGTHS if name not in chosen), 0)
    return zeros if _is_explicit("warmup_steps", args) else zeros | {"warmup_steps": 0}


def _is_explicit(name: str, args: Sequence[str]) -> bool:
    """Return whether a flag is among the arguments, even with its default value."""
    flags = {f"--{name}", f"--{name.replace('_', '-')}"}
    return any(word.partition("=")[0] in flags for word in args)
