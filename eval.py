"""Evaluate a trained model: its loss over the whole validation split, baselines, and samples.

    python eval.py                       the newest run under log/
    python eval.py log/demo --best       its best checkpoint by validation
    python eval.py log/demo --prompt 'def ' --num-samples 3 --temperature 0.8
    torchrun --standalone --nproc_per_node=4 eval.py log/gpt2

Every token of the split that has a predecessor in its shard is a target once (promise 9). Bits per
byte are all the nats, those of <|endoftext|> included, over ln 2 and the UTF-8 bytes of the text.
"""

# torch is imported inside the functions, after the flags are read: `--help` must not wait for it.
from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mygpt import runs
from shards.cli import one_line_errors
from shards.manifest import Manifest

if TYPE_CHECKING:
    from mygpt.model import GPT
    from shards.tokenizer import Tokenizer


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, and the samples to draw."""

    target: tyro.conf.Positional[Path | None] = None  # run, or checkpoint; else newest in log/
    data: Path | None = None  # folder of the dataset, if it has moved since the training
    best: bool = False  # take the best checkpoint by validation, not the newest
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # text to continue; may be repeated
    prompt_file: Path | None = None  # file whose whole text is one more prompt
    num_samples: int = 2  # for each prompt; without one, of documents from their beginning
    max_new_tokens: int = 160  # a sample ends there, or where its document does
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int = 0  # draw among that many of the likeliest tokens; 0: among all
    top_p: float = 1.0  # draw among the likeliest tokens that together have this probability
    seed: int = 1337  # of the samples
    batch_size: int = 0  # windows at once, which changes nothing but speed; 0: for the device
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these there is
    json: bool = False  # print one JSON object on one line

    def check(self) -> None:
        """Raise ValueError for values that can't be, before anything slow begins."""
        for name in ("num_samples", "max_new_tokens", "temperature", "top_k", "seed", "batch_size"):
            if not getattr(self, name) >= 0:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be 0 or more, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, got {self.top_p}")


@one_line_errors()
def main(args: list[str] | None = None) -> int:
    """Read the flags, evaluate, sample, print. Returns the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py
    config = tyro.cli(EvalConfig, args=args, prog="eval.py", description=__doc__)
    config.check()
    report = evaluated(config)
    if report is not None:
        print(json.dumps(report) if config.json else text_of(report))
    return 0


def evaluated(config: EvalConfig) -> dict[str, Any] | None:
    """All that is asked for, as JSON values, on the main rank; None on the others."""
    from mygpt import checkpoint
    from mygpt.distributed import start
    from mygpt.evaluate import evaluate, unigram_loss
    from mygpt.model import GPT
    from shards.reader import EvalWindows, token_counts

    folder = find_checkpoint(config)
    state = checkpoint.read_state(folder)
    trained = runs.from_json(state["config"])
    manifest = open_dataset(config.data or trained.data, state)
    coder = open_tokenizer(manifest) if config.num_samples else None
    prompts = read_prompts(config)
    with start(config.device) as ranks:
        model = GPT(trained.model).to(ranks.device).eval()
        checkpoint.load_model(folder, model)
        windows = EvalWindows(manifest, "val", trained.model.block_size)
        progress = sys.stderr.isatty()
        loss = evaluate(model, windows, ranks, config.batch_size or None, progress)
        if not ranks.is_main:
            return None
        return {
            "checkpoint": str(folder),
            "step": state["step"],
            "max_steps": trained.max_steps,
            "data": str(manifest.folder),
            "fingerprint": manifest.fingerprint,
            "loss": loss.mean,
            "perplexity": loss.perplexity,
            "bits_per_byte": loss.bits_per_byte(manifest.splits["val"].text_bytes),
            "tokens": loss.tokens,
            "text_bytes": manifest.splits["val"].text_bytes,
            "unigram_loss": unigram_loss(token_counts(manifest, "train"), windows).mean,
            "uniform_loss": math.log(manifest.tokenizer.n_vocab),
            "samples": samples(config, model, coder, prompts) if coder else [],
        }


def find_checkpoint(config: EvalConfig) -> Path:
    """The checkpoint that was asked for. Raises FileNotFoundError where there is none."""
    from mygpt import checkpoint

    if config.target is not None and (config.target / "state.json").is_file():
        return config.target
    run = checkpoint.newest_run(Path("log")) if config.target is None else config.target
    found = checkpoint.best(run) if config.best else checkpoint.newest(run)
    if found is None:
        kind = "a validation" if config.best else "a checkpoint"
        raise FileNotFoundError(
            f"expected a run with {kind} in {run}, found none: let train.py reach its first one"
        )
    return found


def open_dataset(folder: Path | None, state: dict[str, Any]) -> Manifest:
    """The dataset that the checkpoint was trained on; ValueError for any other."""
    if folder is None:
        raise ValueError("the checkpoint does not say where its dataset lay: give --data FOLDER")
    manifest = Manifest.load(folder, state["generation"])
    if manifest.fingerprint != state["fingerprint"]:
        raise ValueError(
            f"expected the dataset {state['fingerprint'][:12]}, on which the checkpoint was "
            f"trained, found {manifest.fingerprint[:12]} in {folder}: give its folder with --data"
        )
    return manifest


def open_tokenizer(manifest: Manifest) -> Tokenizer:
    """The tokenizer of the dataset; ValueError if the one installed here is another."""
    from shards import tokenizer

    coder = tokenizer.load(manifest.tokenizer.name)
    if coder.hash != manifest.tokenizer.hash:
        raise ValueError(
            f"expected the tokenizer {manifest.tokenizer.hash[:12]}, that of the dataset, found "
            f"{coder.hash[:12]}: --num-samples 0 evaluates without sampling"
        )
    return coder


def read_prompts(config: EvalConfig) -> list[str]:
    """The prompts that were asked for; if there are none the empty one, which begins a document."""
    prompts = list(config.prompt)
    if config.prompt_file is not None:
        prompts.append(config.prompt_file.read_text("utf-8"))
    return prompts or [""]


def samples(
    config: EvalConfig, model: GPT, coder: Tokenizer, prompts: list[str]
) -> list[dict[str, str]]:
    """Texts that the model writes: `num_samples` for each prompt, in the prompts' order."""
    from mygpt.generate import generate

    prompts = [prompt for prompt in prompts for _ in range(config.num_samples)]
    written = generate(
        model,
        # Every document of the training began with <|endoftext|>, and so does every prompt.
        [[coder.eot, *coder.encode(prompt)] for prompt in prompts],
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        seed=config.seed,
        stop=coder.eot,
    )
    # A model may have more ids than its tokenizer: those past the end stand for no text.
    texts = [coder.decode([token for token in ids if token < coder.n_vocab]) for ids in written]
    return [
        {"prompt": prompt, "text": prompt + text}
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def text_of(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"checkpoint     {report['checkpoint']}, step {report['step']} of {report['max_steps']}",
        f"data           {report['data']}, whole validation split, {report['tokens']:,} targets",
        f"loss           {report['loss']:.4f} nats a token",
        f"perplexity     {report['perplexity']:.2f}",
        f"bits per byte  {report['bits_per_byte']:.4f}, <|endoftext|> included",
        f"unigram loss   {report['unigram_loss']:.4f}, knowing only how often each token occurs",
        f"uniform loss   {report['uniform_loss']:.4f}, knowing nothing",
    ]
    for number, sample in enumerate(report["samples"], start=1):
        lines += ["", f"--- sample {number}, prompt {sample['prompt']!r}", sample["text"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
