"""Flags of eval.py. Plain values without torch, so that `eval.py --help` answers at once."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import UseAppendAction

from mygpt.settings import check_ranges

# Least and greatest values of the flags.
RANGES = {
    **dict.fromkeys(("block_size", "top_k"), (0, 2**20)),
    "num_samples": (0, 10**4),  # they are generated together
    "max_new_tokens": (0, 10**9),
    "temperature": (0, 1000),
    "seed": (0, 2**63 - 1),
    "batch_size": (0, 2**16),
}


@dataclass(frozen=True)
class EvalConfig:
    """Flags of eval.py; the comment beside a field is its help."""

    target: tyro.conf.Positional[str | None] = None  # run, checkpoint, or Hugging Face folder/name
    data: UseAppendAction[tuple[str, ...]] = ()  # dataset's folder, if it has moved; as in train.py
    best: bool = False  # take the best checkpoint by validation, not the newest
    reference: str | None = None  # another model on the same tokens: gpt2, say, or another run
    block_size: int = 0  # tokens of context, at most the model's; 0: the model's
    loss: bool = True  # score the validation split; not by default if only a prompt is given
    hellaswag: Path | None = None  # HellaSwag's jsonl file: ctx, endings, label
    choices: UseAppendAction[tuple[Path, ...]] = ()  # more questions in that format; repeatable
    out: Path | None = None  # FILE.md, with FILE.json beside it; else eval.md in the run's folder
    prompt: UseAppendAction[tuple[str, ...]] = ()  # text to continue; may be repeated
    prompt_file: Path | None = None  # file whose whole text is one more prompt
    num_samples: int = 2  # per prompt; without a prompt, of documents from their beginning
    max_new_tokens: int = 160  # a sample ends there, or where its document does
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int = 0  # draw from that many of the likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability
    seed: int = 1337  # of the samples
    weights: Literal["fp32", "bf16", "int8"] = "fp32"  # of the model that generates the samples
    interactive: bool = False  # only complete what is typed
    batch_size: int = 0  # windows at once; affects only speed; 0: what suits the device
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these available
    json: bool = False  # print one JSON object on one line


def parse(args: list[str] | None, description: str = "") -> EvalConfig:
    """Read the flags. Raises ValueError for impossible values.

    A prompt alone asks for samples, which take seconds; the loss then needs --loss, or a flag that
    says where results go or what to compare them with.
    """
    args = sys.argv[1:] if args is None else args
    config = tyro.cli(EvalConfig, args=args, prog="eval.py", description=description)
    if config.prompt or config.prompt_file:
        has_results = config.json or config.out or config.reference or "--loss" in args
        config = replace(config, loss=config.loss and bool(has_results))
    check_ranges(config, RANGES)
    if not 0 < config.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {config.top_p}")
    if config.interactive and config.json:
        raise ValueError("--interactive prints texts, --json one object: leave out one of them")
    if config.out is not None and (config.out.suffix != ".md" or not config.out.parent.is_dir()):
        raise ValueError(f"--out must name a file FILE.md in a folder, got {config.out}")
    return config
