"""What an evaluation is asked for, as eval.py's flags; a comment beside a field is its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import UseAppendAction


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, and the samples to draw."""

    target: tyro.conf.Positional[str | None] = None  # run, checkpoint, or Hugging Face folder/name
    data: UseAppendAction[tuple[str, ...]] = ()  # dataset's folder, if it has moved; as in train.py
    best: bool = False  # take the best checkpoint by validation, not the newest
    reference: str | None = None  # another model on the same tokens: gpt2, say, or another run
    block_size: int = 0  # tokens of context, at most the model's; 0: the model's
    loss: bool = True  # without it: only samples and questions, which need no dataset
    hellaswag: Path | None = None  # HellaSwag's jsonl file: ctx, endings, label
    choices: UseAppendAction[
        tuple[Path, ...]
    ] = ()  # other questions of that format; may be repeated
    out: Path | None = None  # FILE.md, with FILE.json beside it; else eval.md in the run's folder
    prompt: UseAppendAction[tuple[str, ...]] = ()  # text to continue; may be repeated
    prompt_file: Path | None = None  # file whose whole text is one more prompt
    num_samples: int = 2  # for each prompt; without one, of documents from their beginning
    max_new_tokens: int = 160  # a sample ends there, or where its document does
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int = 0  # draw among that many of the likeliest tokens; 0: among all
    top_p: float = 1.0  # draw among the likeliest tokens that together have this probability
    seed: int = 1337  # of the samples
    weights: Literal["fp32", "bf16", "int8"] = "fp32"  # of the model that writes the samples
    interactive: bool = False  # only complete what is typed
    batch_size: int = 0  # windows at once, which changes nothing but speed; 0: for the device
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these there is
    json: bool = False  # print one JSON object on one line

    def check(self) -> None:
        """Raise ValueError for values that can't be, before anything slow begins."""
        counts = ("num_samples", "max_new_tokens", "temperature", "top_k", "seed", "batch_size")
        for name in (*counts, "block_size"):
            if not getattr(self, name) >= 0:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be 0 or more, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if self.out is not None and (self.out.suffix != ".md" or not self.out.parent.is_dir()):
            raise ValueError(f"--out must name a file FILE.md in a folder, got {self.out}")
