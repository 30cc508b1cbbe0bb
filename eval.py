"""Evaluate a model: loss over the whole validation split, baselines, multiple choice, samples.

    python eval.py                       the newest run under log/
    python eval.py log/demo --best       its best checkpoint by validation
    python eval.py log/demo/checkpoints/step_00000100
    python eval.py log/demo --prompt 'import os' --num-samples 3      only samples, in seconds
    python eval.py log/demo --prompt 'import os' --loss               samples and the loss
    python eval.py log/demo --interactive                             completes what you type
    python eval.py log/gpt2 --reference gpt2 --hellaswag hellaswag_val.jsonl
    python eval.py gpt2 --data data/web  Hugging Face's format: a folder, or a name on its hub
    torchrun --standalone --nproc_per_node=4 eval.py log/gpt2

Every token that has a predecessor in its shard is a target exactly once. Bits per byte are all
nats, those of <|endoftext|> included, over ln 2 and the UTF-8 bytes of the text. Results go to
eval.json and eval.md in the run's folder; docs/EVALUATION.md explains each.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal

from shards.cli import end_on_interrupt, end_with, one_line_errors, printable_text

if __name__ == "__main__":
    end_on_interrupt()

import orjson
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


def parse(args: list[str] | None) -> EvalConfig:
    """Read the flags. Raises ValueError for impossible values.

    A prompt alone asks for samples, which take seconds; the loss then needs --loss, or a flag that
    says where results go or what to compare them with.
    """
    args = sys.argv[1:] if args is None else args
    config = tyro.cli(EvalConfig, args=args, prog="eval.py", description=__doc__)
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


if __name__ == "__main__":  # answer --help and wrong flags before the imports, which take seconds
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py
    with one_line_errors():
        parse(sys.argv[1:])

from mygpt.distributed import DistributedContext, compute_dtype, init_distributed
from mygpt.eval import metrics, multiple_choice, summary, target
from mygpt.eval.completion import Completer, continuations, converse
from mygpt.eval.documents import DocumentWindows, Losses, evaluate_documents
from mygpt.eval.multiple_choice import Question
from mygpt.eval.quantize import with_weights
from mygpt.eval.retokenize import retokenize
from mygpt.eval.target import Target
from mygpt.generate import Sampling, trailing_space_note
from mygpt.model import GPT
from shards.files import atomic_file, write_json
from shards.mixture import Mixture
from shards.tokenizer import Tokenizer


@dataclass(frozen=True)
class Inputs:
    """Everything that the flags name, opened and checked before any model is loaded."""

    config: EvalConfig
    target: Target
    reference: Target | None
    data: Mixture | None  # None with --no-loss
    tokenizer: Tokenizer | None  # None if no text is read or generated
    other_tokenizer: Tokenizer | None  # the reference's, if it is another than the dataset's
    questions: dict[str, list[Question]]  # by the name of their file
    prompts: list[str]
    sampling: Sampling
    document: Path | None  # eval.md, with eval.json beside it


@one_line_errors()
def main(args: list[str] | None = None) -> int:
    """Read the flags, evaluate, sample, print. Returns the exit code."""
    inputs = open_inputs(parse(args))
    with init_distributed(inputs.config.device) as ranks:
        if inputs.config.interactive:
            talk(inputs, ranks)
        else:
            evaluate(inputs, ranks)
    return 0


def open_inputs(config: EvalConfig) -> Inputs:
    """Open all inputs; FileNotFoundError or ValueError if one is missing or they don't fit."""
    own = target.find(config.target, config.best)
    data = own.open_data(config.data) if config.loss and not config.interactive else None
    if data:
        own.check_vocabulary(data)
    questions = {path.stem: multiple_choice.read(path) for path in config.choices}
    if len(questions) < len(config.choices) or (config.hellaswag and "hellaswag" in questions):
        raise ValueError("expected files of different names with --choices: rename one of them")
    if config.hellaswag is not None:
        questions["hellaswag"] = multiple_choice.read(config.hellaswag, hellaswag=True)
    prompts = list(config.prompt)
    if config.prompt_file is not None:
        prompts.append(read_prompt(config.prompt_file))
    tokenizer = None
    if questions or config.num_samples or config.interactive:
        tokenizer = own.tokenizer(config.data, data)
    reference = target.find(config.reference) if config.reference else None
    return Inputs(
        config=config,
        target=own,
        reference=reference,
        other_tokenizer=find_other_tokenizer(reference, data, tokenizer),
        data=data,
        tokenizer=tokenizer,
        questions=questions,
        prompts=prompts or [""],
        sampling=Sampling(
            config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.seed
        ),
        document=config.out or (own.run and own.run / "eval.md"),
    )


def find_other_tokenizer(
    reference: Target | None, data: Mixture | None, tokenizer: Tokenizer | None
) -> Tokenizer | None:
    """Return the reference's tokenizer if it is another than the model's."""
    if reference is None:
        return None
    if data:
        return reference.other_tokenizer(data)
    found = reference.tokenizer()
    return found if tokenizer and found.identity != tokenizer.identity else None


def read_prompt(path: Path) -> str:
    """Return the text of a file; ValueError, naming it, if it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 in {path}, found {error}: convert it") from None


def evaluate(inputs: Inputs, ranks: DistributedContext) -> None:
    """Measure on all ranks; on the main rank print, sample and write the files."""
    data, reference, other_tokenizer = inputs.data, inputs.reference, inputs.other_tokenizer
    n_vocab = data.tokenizer.n_vocab if data else 0
    model = inputs.target.load(ranks.device, n_vocab, inputs.config.block_size)
    block_size = inputs.config.block_size or model.config.block_size
    windows = DocumentWindows(data.manifests, "val", block_size) if data else None
    report = inputs.target.identity(model) | {
        "block_size": block_size,
        "version": target.version(),
        "device": ranks.device.type,
        "precision": str(compute_dtype(ranks.device)).removeprefix("torch."),
    }
    other_losses = None
    if reference is not None:
        model.cpu()  # a GPU may have no memory for two models
        other_vocab = other_tokenizer.n_vocab if other_tokenizer else n_vocab
        other = reference.load(ranks.device, other_vocab, block_size)
        with other_windows(inputs, windows) as theirs:
            tokenizer = other_tokenizer or inputs.tokenizer
            other_losses, results = measure(other, block_size, theirs, tokenizer, inputs, ranks)
        report["reference"] = reference.identity(other) | results
        if other_tokenizer:
            report["reference"]["tokenizer"] = other_tokenizer.name
        del other
        model.to(ranks.device)
    losses, results = measure(model, block_size, windows, inputs.tokenizer, inputs, ranks)
    if ranks.is_main:
        report |= results
        if losses and other_losses and windows:
            in_bits = metrics.compared_in_bits(losses, other_losses, windows.text_bytes)
            in_nats = {} if other_tokenizer else metrics.compared(losses, other_losses)
            report["reference"] |= in_bits | in_nats
        if losses and windows and data:
            report |= metrics.of_split(losses, windows, data)
        publish(report, model, inputs)


@contextmanager
def other_windows(
    inputs: Inputs, windows: DocumentWindows | None
) -> Iterator[DocumentWindows | None]:
    """Yield windows over the same documents in the vocabulary of the reference."""
    if not (windows and inputs.data and inputs.other_tokenizer):
        yield windows
        return
    with tempfile.TemporaryDirectory() as folder:
        manifests = retokenize(inputs.data.manifests, "val", inputs.other_tokenizer, Path(folder))
        yield DocumentWindows(manifests, "val", windows.block_size)


def measure(
    model: GPT,
    block_size: int,
    windows: DocumentWindows | None,
    tokenizer: Tokenizer | None,
    inputs: Inputs,
    ranks: DistributedContext,
) -> tuple[Losses | None, dict[str, Any]]:
    """Evaluate the windows and the questions: the losses, and the results as in eval.json.

    The same on all ranks. `tokenizer` is the model's, if there are questions.
    """
    losses, results, answers, progress = None, {}, {}, sys.stderr.isatty()
    if windows is not None:
        losses = evaluate_documents(model, windows, ranks, inputs.config.batch_size, progress)
        results = metrics.of_documents(losses, windows.text_bytes)
    for name, questions in inputs.questions.items():
        assert tokenizer is not None, "opened if there are questions"
        items = inputs.document and multiple_choice.items_file(
            inputs.document, name, model, questions, block_size, ranks.device
        )
        answers[name] = multiple_choice.answer(
            model, questions, tokenizer, ranks, block_size, items, progress
        )
    return losses, results | {"choices": metrics.of_answers(answers)}


def publish(report: dict[str, Any], model: GPT, inputs: Inputs) -> None:
    """Print the results, draw the samples, write the files."""
    config, document = inputs.config, inputs.document
    if not config.json:
        print(summary.text(report))
    report["samples"] = draw_samples(report, model, inputs)
    if config.json:
        print(orjson.dumps(report).decode())
    if document is not None and (config.loss or config.out):
        write_json(document.with_suffix(".json"), report)
        with atomic_file(document) as file:
            file.write(summary.markdown(report).encode())
        if not config.json:
            print(f"\nwritten  {document}, {document.with_suffix('.json')}")


def draw_samples(report: dict[str, Any], model: GPT, inputs: Inputs) -> list[dict[str, Any]]:
    """Generate samples for each prompt and, unless --json is given, print them.

    On a terminal a single sample of a prompt is printed while it is generated.
    """
    config, tokenizer = inputs.config, inputs.tokenizer
    if tokenizer is None or not config.num_samples:
        return []
    if note := trailing_space_note(inputs.prompts):
        print(note, file=sys.stderr)
    generator = with_weights(model, config.weights)
    live = sys.stdout.isatty() and config.num_samples == 1 and not config.json
    labels = {key: report[key] for key in ("checkpoint", "step")}
    labels |= {"weights": config.weights, **asdict(inputs.sampling)}
    samples: list[dict[str, Any]] = []
    for prompt in inputs.prompts:
        if live:
            title = summary.title({"prompt": prompt, **labels}, len(samples) + 1)
            print(f"\n--- {title}\n{printable_text(prompt)}", end="", flush=True)
        ids = [tokenizer.eot, *tokenizer.encode(prompt)]  # as every document begins in training
        count = config.num_samples
        for text in continuations(generator, ids, count, inputs.sampling, tokenizer, live):
            samples.append({"prompt": prompt, "text": prompt + text, **labels})
            if not live and not config.json:
                print(f"\n--- {summary.title(samples[-1], len(samples))}")
                print(printable_text(prompt + text))
    return samples


def talk(inputs: Inputs, ranks: DistributedContext) -> None:
    """Complete what is typed, until the input ends."""
    if ranks.world_size > 1 or inputs.tokenizer is None:
        raise ValueError("--interactive is for one process: start eval.py without torchrun")
    model = with_weights(inputs.target.load(ranks.device), inputs.config.weights)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 don't end the talk
    converse(Completer(model, inputs.sampling), inputs.tokenizer)


if __name__ == "__main__":
    end_with(main)
