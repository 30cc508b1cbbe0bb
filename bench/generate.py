"""Speed of generation, beside Hugging Face's `generate` with its cache.

    python -m bench.generate --preset gpt2 --device cuda

Greedy, after a prompt of one token, with random weights: the time does not depend on them. Each
contender has a process of its own.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from bench import table, worker
from bench.steps import hugging_face_model
from bench.table import Device, Preset, Record
from bench.train import device_name
from mygpt.distributed import check_room
from mygpt.eval.quantize import with_weights
from mygpt.generate import Sampling, generate
from mygpt.model import GPT
from mygpt.settings import PRESETS

PACKAGES = ("torch", "transformers")
OURS, PEER = "myGPT", "Hugging Face"
# The weights measured on each device; Hugging Face's in the first of them only.
WEIGHTS = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("bf16", "fp32")}
COLUMNS: table.Columns = {
    "": ("what", ""),
    "weights": ("weights", ""),
    "texts": ("batch", ""),
    "tokens/s": ("tokens_s", ",.1f"),
    "low to high": ("tokens_s", ",.1f"),
    "× Hugging Face": ("of_peer", ".2f"),
    "CPU ms": ("cpu_ms", ".1f"),
}


@dataclass(frozen=True)
class Options:
    """Measure generation beside Hugging Face's."""

    preset: Preset = "gpt2"
    """Shape of the model."""
    device: Device = "cpu"
    """Device to generate on."""
    batch: int = 8
    """Texts at once, measured beside one alone."""
    new_tokens: int = 100
    """Tokens of each text."""
    rounds: int = 5
    """How often each contender is measured."""
    json: bool = False
    """Print one JSON object on one line."""


class Contender(NamedTuple):
    """An implementation and the type of its weights."""

    what: str
    weights: str

    def __str__(self) -> str:
        return ", ".join(self)


def main() -> None:
    """Run the command."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for the workers, as in eval.py
    table.command("generate", Options, run, as_text, __doc__ or "")


def run(options: Options, note: Callable[[Record], None] = table.to_stderr) -> dict[str, Any]:
    """Everything that was measured, as JSON. Raises ValueError if the device is not there.

    `note` gets each record as soon as it is measured.
    """
    check_room(1, options.device)
    kinds = WEIGHTS[options.device]
    contenders = [*(Contender(OURS, kind) for kind in kinds), Contender(PEER, kinds[0])]
    makers = {str(one): (turns_of, one, options) for one in contenders}
    records, failed = worker.measure(makers, options.rounds, note)
    return about(options) | comparison(about(options), records, failed)


def about(options: Options) -> dict[str, Any]:
    """What is measured, and on which machine."""
    return {
        "machine": table.machine("generate", PACKAGES),
        "device": device_name(options.device),
        "preset": options.preset,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "batches": batches(options),
    }


def comparison(
    about: Mapping[str, Any], records: Mapping[str, Sequence[Record]], failed: Mapping[str, str]
) -> dict[str, Any]:
    """The rows of those contenders that did not fail."""
    own = {Contender(*name.split(", ")): records[name] for name in records}
    return {
        "rows": [row(own, one, batch) for batch in about["batches"] for one in own],
        "failed": failed,
    }


def batches(options: Options) -> list[int]:
    """Numbers of texts at once."""
    return sorted({1, options.batch})


def turns_of(contender: Contender, options: Options) -> worker.Turn:
    """Make a contender's model in its process, and return its turns."""
    shape = replace(PRESETS[options.preset][1].model, dropout=0.0)
    if contender.what == OURS:
        model = with_weights(GPT(shape).to(options.device), contender.weights)  # type: ignore[arg-type]
        write: Callable[..., Any] = partial(_generate, model)
    else:
        peer = hugging_face_model(shape).to(options.device).eval()
        write = partial(
            _hugging_face, peer.to(torch.bfloat16) if contender.weights == "bf16" else peer
        )
    prompt = [shape.vocab_size - 1]
    return lambda: {
        str(batch): rates(partial(write, [prompt] * batch), batch, options)
        for batch in batches(options)
    }


def _generate(model: GPT, prompts: list[list[int]], max_new_tokens: int) -> None:
    generate(model, prompts, Sampling(max_new_tokens, temperature=0.0))


def _hugging_face(model: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
    with torch.no_grad():
        model.generate(
            torch.tensor(prompts, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
        )


def rates(write: Callable[[int], Any], batch: int, options: Options) -> dict[str, float]:
    """Tokens per second by the clock and CPU milliseconds per token, of all texts together."""
    start, start_cpu = time.perf_counter(), time.process_time()
    write(options.new_tokens)
    if options.device == "cuda":
        torch.cuda.synchronize()
    tokens = batch * options.new_tokens
    return {
        "tokens_s": tokens / (time.perf_counter() - start),
        "cpu_ms": 1000 * (time.process_time() - start_cpu) / tokens,
    }


def row(
    records: Mapping[Contender, Sequence[Record]], one: Contender, batch: int
) -> dict[str, Any]:
    """A row of the table."""
    own = [record[str(batch)] for record in records[one]]
    peers = [records[other] for other in records if other.what == PEER]
    theirs = [record[str(batch)] for records_of_peer in peers for record in records_of_peer]
    return {
        **one._asdict(),
        "batch": batch,
        "tokens_s": table.spread(table.column(own, "tokens_s")),
        "cpu_ms": table.spread(table.column(own, "cpu_ms")),
        "of_peer": table.ratio(table.column(own, "tokens_s"), table.column(theirs, "tokens_s")),
    }


def as_text(results: Mapping[str, Any]) -> str:
    """The results of `run` for people."""
    return table.page(
        results,
        f"on {results['device']}; {results['preset']}: {results['new_tokens']} new tokens; medians "
        f"of {results['rounds']} rounds",
        COLUMNS,
        ["CPU ms: of all threads, per token; other work on the machine changes it little."],
    )


if __name__ == "__main__":
    main()
