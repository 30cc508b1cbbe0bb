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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.cli import end_on_interrupt, end_with, one_line_errors

if __name__ == "__main__":
    end_on_interrupt()

from mygpt.eval.flags import EvalConfig, parse

if __name__ == "__main__":  # answer --help and wrong flags before the imports, which take seconds
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py
    with one_line_errors():
        parse(sys.argv[1:], str(__doc__))

import orjson

from mygpt.distributed import DistributedContext, compute_dtype, init_distributed
from mygpt.eval import metrics, multiple_choice, summary, target
from mygpt.eval.completion import Completer, converse, draw_samples
from mygpt.eval.documents import DocumentWindows, Losses, evaluate_documents, retokenize
from mygpt.eval.multiple_choice import Question
from mygpt.eval.quantize import with_weights
from mygpt.eval.target import Target
from mygpt.generate import Sampling
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
    inputs = open_inputs(parse(args, str(__doc__)))
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
    tokenizer = None
    if questions or config.num_samples or config.interactive:
        tokenizer = own.tokenizer(config.data, data)
    reference = target.find(config.reference) if config.reference else None
    identity, other = data.tokenizer if data else tokenizer and tokenizer.identity, None
    if reference and identity:
        other = reference.other_tokenizer(identity, data)
    return Inputs(
        config=config,
        target=own,
        reference=reference,
        data=data,
        tokenizer=tokenizer,
        other_tokenizer=other,
        questions=questions,
        prompts=[*config.prompt, *read_prompt(config.prompt_file)] or [""],
        sampling=Sampling(
            config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.seed
        ),
        document=config.out or (own.run and own.run / "eval.md"),
    )


def read_prompt(path: Path | None) -> list[str]:
    """Return the text of --prompt-file, if given; ValueError, naming it, if it is not UTF-8."""
    try:
        return [path.read_text("utf-8")] if path else []
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 in {path}, found {error}: convert it") from None


def evaluate(inputs: Inputs, ranks: DistributedContext) -> None:
    """Measure on all ranks; on the main rank print, sample and write the files."""
    config, data = inputs.config, inputs.data
    n_vocab = data.tokenizer.n_vocab if data else 0
    model = inputs.target.load(ranks.device, n_vocab, config.block_size)
    block_size = config.block_size or model.config.block_size
    windows = DocumentWindows(data.manifests, "val", block_size) if data else None
    losses, results = measure(model, block_size, windows, inputs.tokenizer, inputs, ranks)
    report = inputs.target.identity(model) | {
        "block_size": block_size,
        "version": target.version(),
        "device": ranks.device.type,
        "precision": str(compute_dtype(ranks.device)).removeprefix("torch."),
    }
    report |= results
    if inputs.reference is not None:
        model.cpu()  # a GPU may have no memory for two models
        report["reference"] = measure_reference(inputs, windows, block_size, losses, ranks)
        model.to(ranks.device)
    if ranks.is_main:
        if losses and windows and data:
            report |= metrics.of_split(losses, windows, data)
        publish(report, model, inputs)


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


def measure_reference(
    inputs: Inputs,
    windows: DocumentWindows | None,
    block_size: int,
    own_losses: Losses | None,
    ranks: DistributedContext,
) -> dict[str, Any]:
    """Evaluate --reference on the same documents, in its own vocabulary if that is another one."""
    data, other = inputs.data, inputs.other_tokenizer
    tokenizer = other or inputs.tokenizer
    n_vocab = other.n_vocab if other else data.tokenizer.n_vocab if data else 0
    assert inputs.reference is not None
    model = inputs.reference.load(ranks.device, n_vocab, block_size)
    with tempfile.TemporaryDirectory() as folder:
        if other and data and windows:
            manifests = retokenize(data.manifests, "val", other, Path(folder))
            windows = DocumentWindows(manifests, "val", block_size)
        losses, results = measure(model, block_size, windows, tokenizer, inputs, ranks)
    if own_losses and losses and windows:
        results |= metrics.compared_in_bits(own_losses, losses, windows.text_bytes)
        results |= {} if other else metrics.compared(own_losses, losses)
    vocabulary = {"tokenizer": other.name} if other else {}
    return inputs.reference.identity(model) | results | vocabulary


def publish(report: dict[str, Any], model: GPT, inputs: Inputs) -> None:
    """Print the results, draw the samples, write the files."""
    config, tokenizer, document = inputs.config, inputs.tokenizer, inputs.document
    if not config.json:
        print(summary.text(report))
    report["samples"] = []
    if tokenizer and config.num_samples:
        labels = {key: report[key] for key in ("checkpoint", "step")}
        labels |= {"weights": config.weights, **asdict(inputs.sampling)}
        report["samples"] = draw_samples(
            with_weights(model, config.weights),
            tokenizer,
            inputs.prompts,
            config.num_samples,
            inputs.sampling,
            labels,
            show=not config.json,
        )
    if config.json:
        print(orjson.dumps(report).decode())
    if document is not None and (config.loss or config.out):
        write_json(document.with_suffix(".json"), report)
        with atomic_file(document) as file:
            file.write(summary.markdown(report).encode())
        if not config.json:
            print(f"\nwritten  {document}, {document.with_suffix('.json')}")


def talk(inputs: Inputs, ranks: DistributedContext) -> None:
    """Complete what is typed, until the input ends."""
    if ranks.world_size > 1 or inputs.tokenizer is None:
        raise ValueError("--interactive is for one process: start eval.py without torchrun")
    model = with_weights(inputs.target.load(ranks.device), inputs.config.weights)
    converse(Completer(model, inputs.sampling), inputs.tokenizer)


if __name__ == "__main__":
    end_with(main)
