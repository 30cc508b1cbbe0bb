"""Evaluate a model: its loss over the whole validation split, baselines, questions, and samples.

    python eval.py                       the newest run under log/
    python eval.py log/demo --best       its best checkpoint by validation
    python eval.py log/demo/checkpoints/step_00000100
    python eval.py log/demo --prompt 'def ' --num-samples 3 --temperature 0.8
    python eval.py log/demo --interactive
    python eval.py log/gpt2 --reference gpt2 --hellaswag hellaswag_val.jsonl
    python eval.py gpt2 --data data/web  Hugging Face's format: a folder, or a name on its hub
    torchrun --standalone --nproc_per_node=4 eval.py log/gpt2

Every token of the split that has a predecessor in its shard is a target once (promise 9). Bits per
byte are all the nats, those of <|endoftext|> included, over ln 2 and the UTF-8 bytes of the text.
The figures go to eval.json and eval.md in the run's folder; docs/EVALUATION.md explains each.
"""

# torch is imported inside the functions, after the flags are read: `--help` must not wait for it.
from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import tyro

from mygpt.eval.options import EvalConfig
from mygpt.settings import only_dataset
from shards.cli import end_with, one_line_errors
from shards.files import atomic_file, write_json
from shards.manifest import Split
from shards.stream import Mixture

if TYPE_CHECKING:
    import numpy as np

    from mygpt.distributed import Ranks
    from mygpt.eval.completion import Sampling
    from mygpt.eval.measurement import Exam, Measured
    from mygpt.eval.target import Subject
    from mygpt.model import GPT
    from shards.reader import DocumentWindows
    from shards.tokenizer import Tokenizer

COUNTED = 10**9  # training tokens for the unigram baseline: frequencies no longer change


@one_line_errors()
def main(args: list[str] | None = None) -> int:
    """Read the flags, evaluate, sample, print. Returns the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py
    config = tyro.cli(EvalConfig, args=args, prog="eval.py", description=__doc__)
    config.check()
    from mygpt.distributed import start

    asked = find(config)
    with start(config.device) as ranks:
        if config.interactive:
            talk(asked, ranks)
        else:
            evaluate(asked, ranks)
    return 0


@dataclass(frozen=True)
class Asked:
    """What the flags name, found and checked; nothing slow has happened yet."""

    config: EvalConfig
    target: Subject
    reference: Subject | None
    data: Mixture | None  # None where no loss is asked for
    coder: Tokenizer | None  # None where no text is read or written
    exam: Exam | None
    prompts: list[str]
    document: Path | None  # eval.md: the main rank writes it, with eval.json beside it


def find(config: EvalConfig) -> Asked:
    """Raises FileNotFoundError or ValueError for what is not there or does not fit together."""
    from mygpt.eval import multiple_choice, target
    from mygpt.eval.measurement import Exam

    own = target.find(config.target, config.best)
    data = open_data(config, own) if config.loss and not config.interactive else None
    questions = {path.stem: multiple_choice.read(path) for path in config.choices}
    if len(questions) < len(config.choices) or (config.hellaswag and "hellaswag" in questions):
        raise ValueError("expected files of different names with --choices: rename one of them")
    if config.hellaswag is not None:
        questions["hellaswag"] = multiple_choice.read(config.hellaswag, hellaswag=True)
    has_text = questions or config.num_samples or config.interactive
    coder = open_tokenizer(data) if has_text else None
    document = config.out or (own.run and own.run / "eval.md")
    return Asked(
        config=config,
        target=own,
        reference=target.find(config.reference) if config.reference else None,
        data=data,
        coder=coder,
        exam=Exam(questions, coder.encode, coder.eot, document) if coder and questions else None,
        prompts=read_prompts(config),
        document=document,
    )


def open_data(config: EvalConfig, target: Subject) -> Mixture:
    """The dataset that the model was trained on, any other is a ValueError; of models that do not
    say what they were trained on, the one that is asked for.
    """
    if target.config is None:
        return Mixture.load(config.data or [str(only_dataset())])
    if not (specs := config.data or target.config.data):
        raise ValueError("the checkpoint does not say where its dataset lay: give --data FOLDER")
    data = Mixture.load(specs, target.state["generations"])
    expected = target.state["fingerprint"]
    if data.fingerprint != expected:
        raise ValueError(
            f"expected the dataset {expected[:12]}, on which the checkpoint was trained, found "
            f"{data.fingerprint[:12]} in {' '.join(specs)}: give its folder with --data"
        )
    return data


def open_tokenizer(data: Mixture | None) -> Tokenizer:
    """GPT-2's tokenizer, or the dataset's; ValueError if the one installed here is another."""
    from shards import tokenizer

    coder = tokenizer.load(data.tokenizer.name if data else "gpt2")
    if data and coder.hash != data.tokenizer.hash:
        raise ValueError(
            f"expected the tokenizer {data.tokenizer.hash[:12]}, that of the dataset, found "
            f"{coder.hash[:12]}: --num-samples 0 evaluates without sampling"
        )
    return coder


def read_prompts(config: EvalConfig) -> list[str]:
    """The prompts that were asked for; if there are none the empty one, which begins a document."""
    prompts = list(config.prompt)
    if config.prompt_file is not None:
        prompts.append(config.prompt_file.read_text("utf-8"))
    return prompts or [""]


def evaluate(asked: Asked, ranks: Ranks) -> None:
    """Measure on all ranks; on the main one print, sample and write the files."""
    from mygpt.eval.measurement import measure, setting
    from shards.reader import DocumentWindows

    config = asked.config
    model = load(asked.target, asked, ranks)
    block_size = config.block_size or model.config.block_size
    data = asked.data
    windows = DocumentWindows(data.manifests, "val", block_size) if data else None
    how = (windows, asked.exam, config.batch_size or None, sys.stderr.isatty())
    report = asked.target.facts(model) | setting(block_size, ranks.device)
    theirs = None
    if asked.reference is not None:
        del model  # there may be no room for two
        other = load(asked.reference, asked, ranks)
        report["reference"] = asked.reference.facts(other)
        theirs = measure(other, block_size, ranks, *how)
        del other
        model = load(asked.target, asked, ranks)
    own = measure(model, block_size, ranks, *how)
    if ranks.is_main:
        if windows is not None and data is not None:
            report |= of_split(own, windows, data)
        report |= own.figures(windows)
        if theirs is not None:
            report["reference"] |= theirs.figures(windows) | own.against(theirs)
        publish(report, model, asked)


def load(target: Subject, asked: Asked, ranks: Ranks) -> GPT:
    """The model on its device. Raises ValueError if the dataset's tokens are unknown to it."""
    model = target.load().to(ranks.device)
    known = model.config.vocab_size
    if asked.data is not None and known < asked.data.tokenizer.n_vocab:
        raise ValueError(
            f"expected a model of the dataset's {asked.data.tokenizer.n_vocab} token ids, found "
            f"one of {known} in {target.name}: they have different tokenizers"
        )
    return model


def of_split(own: Measured, windows: DocumentWindows, data: Mixture) -> dict[str, Any]:
    """The figures of the validation split, and of what needs no training."""
    from mygpt.eval import metrics
    from mygpt.evaluate import Loss, unigram_loss

    assert own.losses is not None, "there are windows"
    unigram = unigram_loss(frequencies(data), windows)
    uniform = Loss(unigram.tokens * math.log(data.tokenizer.n_vocab), unigram.tokens)
    text_bytes = windows.text_bytes
    parts = data.components
    names = [part.name for part in parts]
    specs = [f"{part.name}={part.weight:g}:{part.folder}" for part in parts]
    sources = [
        f"{name}: {source.name}" if len(parts) > 1 else source.name
        for name, manifest in zip(names, data.manifests, strict=True)
        for source in manifest.sources
    ]
    return {
        "data": " ".join(specs) if len(parts) > 1 else parts[0].folder,
        "fingerprint": data.fingerprint,
        "generations": data.generations,
        "unigram_loss": unigram.mean,
        "uniform_loss": uniform.mean,
        "baselines": {
            "unigram": metrics.of_baseline(unigram, int(text_bytes.sum())),
            "uniform": metrics.of_baseline(uniform, int(text_bytes.sum())),
        },
        "components": metrics.by_group(own.losses, text_bytes, windows.dataset, names),
        "sources": metrics.by_group(own.losses, text_bytes, windows.source, sources),
        "positions": metrics.by_position(own.losses),
    }


def frequencies(data: Mixture) -> np.ndarray:
    """How often each token occurs in training, where each dataset has its weight, (n_vocab,).

    Of a dataset much larger than `COUNTED` tokens, evenly spaced shards are counted.
    """
    import numpy as np

    from shards.reader import token_counts

    counted = []
    for manifest in data.manifests:
        train = manifest.splits["train"]
        some = Split(train.shards[:: max(1, train.tokens // COUNTED)])
        counted.append(token_counts(replace(manifest, splits={"train": some}), "train"))
    counts = np.array(counted)
    if len(counts) == 1:
        return counts[0]
    shares = np.array(data.weights) / sum(data.weights)
    return counts.sum() * (shares @ (counts / counts.sum(1, keepdims=True)))


def publish(report: dict[str, Any], model: GPT, asked: Asked) -> None:
    """Print what was found, draw the samples, write the files."""
    from mygpt.eval import summary

    config, document = asked.config, asked.document
    if not config.json:
        print(summary.text(report))
    report["samples"] = samples(report, model, asked)
    if config.json:
        print(orjson.dumps(report).decode())
    if document is not None and (config.loss or config.out):
        write_json(document.with_suffix(".json"), report)
        with atomic_file(document) as file:
            file.write(summary.markdown(report).encode())
        if not config.json:
            print(f"\nwritten  {document}, {document.with_suffix('.json')}")


def samples(report: dict[str, Any], model: GPT, asked: Asked) -> list[dict[str, Any]]:
    """Texts that the model writes, for each prompt in turn; printed too, unless JSON is asked for.

    On a terminal a single sample of a prompt is printed as it comes.
    """
    from mygpt.eval import summary
    from mygpt.eval.completion import continuations
    from mygpt.eval.quantize import with_weights

    config, coder = asked.config, asked.coder
    if coder is None or not config.num_samples:
        return []
    writer, vocabulary, how = with_weights(model, config.weights), coder.vocabulary(), drawn(config)
    live = sys.stdout.isatty() and config.num_samples == 1 and not config.json
    label = {"checkpoint": report["checkpoint"], "step": report["step"], "weights": config.weights}
    found: list[dict[str, Any]] = []
    for prompt in asked.prompts:
        # Every document of the training began with <|endoftext|>, and so does every prompt.
        ids = [coder.eot, *coder.encode(prompt)]
        if live:
            first = {"prompt": prompt, **label, **asdict(how)}
            print(f"\n--- {summary.title(first, len(found) + 1)}\n{prompt}", end="", flush=True)
        for text in continuations(
            writer, ids, config.num_samples, how, vocabulary, coder.eot, live
        ):
            found.append({"prompt": prompt, "text": prompt + text, **label, **asdict(how)})
            if not live and not config.json:
                print(f"\n--- {summary.title(found[-1], len(found))}\n{prompt}{text}")
    return found


def talk(asked: Asked, ranks: Ranks) -> None:
    """Complete what is typed, until the input ends."""
    from mygpt.eval.completion import Completer, converse
    from mygpt.eval.quantize import with_weights

    if ranks.world_size > 1 or asked.coder is None:
        raise ValueError("--interactive is for one process: start eval.py without torchrun")
    model = with_weights(load(asked.target, asked, ranks), asked.config.weights)
    vocabulary = asked.coder.vocabulary()
    completer = Completer(model, drawn(asked.config))
    converse(completer, asked.coder.encode, vocabulary, asked.coder.eot)


def drawn(config: EvalConfig) -> Sampling:
    """How text is drawn."""
    from mygpt.eval.completion import Sampling

    return Sampling(
        config.temperature, config.top_k, config.top_p, config.seed, config.max_new_tokens
    )


if __name__ == "__main__":
    end_with(main)
