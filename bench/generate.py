"""How fast text is written, beside Hugging Face's `generate` with its cache.

    python -m bench.generate --preset gpt2 --device cuda

Greedy, after one token of prompt, weights as they are drawn: time does not depend on them. All take
turns in one process, and ratios are taken within each round.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import tyro

from bench import table
from mygpt.settings import PRESETS
from shards.cli import one_line_errors

PACKAGES = ("torch", "transformers")
OURS, PEER = "myGPT", "Hugging Face"
# The weights measured on each device; Hugging Face's in the first of them too.
KINDS = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("bf16", "fp32")}
AT_LEAST = {"cpu": 1.1, "cuda": 3.0}


@dataclass(frozen=True)
class Options:
    """Measure generation beside Hugging Face's."""

    preset: Literal["gpt2", "small", "tiny", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """Shape of the model."""
    device: Literal["cuda", "cpu"] = "cpu"
    """Where."""
    batch: int = 8
    """Texts at once, measured beside one alone."""
    new_tokens: int = 100
    """Tokens of each text."""
    rounds: int = 5
    """How often each contender is measured."""
    json: bool = False
    """Answer with one JSON object on one line."""


class Figure(NamedTuple):
    """What was measured of whom: tokens a second, or CPU milliseconds a token, of all texts."""

    what: str
    weights: str
    batch: int
    cpu: bool = False


def main() -> None:
    """Measure, and print the table."""
    options = tyro.cli(Options, prog="python -m bench.generate", description=__doc__)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in eval.py
    with one_line_errors():
        found = run(options)
    print(json.dumps(found) if options.json else as_text(found))


def run(options: Options) -> dict[str, Any]:
    """Everything that was measured, as JSON. Raises ValueError where it can't be."""
    from mygpt.distributed import check_room

    check_room(1, options.device)
    kinds = KINDS[options.device]
    rates = table.alternately(contenders(options), options.rounds)
    return {
        "command": shlex.join(["python", "-m", "bench.generate", *sys.argv[1:]]),
        "machine": table.machine(PACKAGES),
        "device": options.device,
        "preset": options.preset,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "rows": [
            {
                "what": figure.what,
                "weights": figure.weights,
                "batch": figure.batch,
                "tokens_s": table.spread(values),
                "cpu_ms": table.spread(rates[figure._replace(cpu=True)]),
                "of_peer": round(
                    table.ratio(values, rates[Figure(PEER, kinds[0], figure.batch)]), 2
                ),
            }
            for figure, values in rates.items()
            if not figure.cpu
        ],
        "at_least": AT_LEAST[options.device],
    }


def contenders(options: Options) -> dict[str, Callable[[], Mapping[Figure, float]]]:
    """Everything to measure, by a name that says what is under way."""
    import torch

    from bench.steps import hugging_face_model
    from mygpt.eval.quantize import with_weights
    from mygpt.generate import generate
    from mygpt.model import GPT

    shape = replace(PRESETS[options.preset][1].model, dropout=0.0)
    model = GPT(shape).to(options.device)
    peer = hugging_face_model(shape).to(options.device).eval()
    found: dict[str, Callable[[], Mapping[Figure, float]]] = {}
    for batch in sorted({1, options.batch}):
        prompts = [[shape.vocab_size - 1]] * batch
        for kind in KINDS[options.device]:
            made = with_weights(model, kind)  # type: ignore[arg-type]
            ours = partial(generate, made, prompts, temperature=0.0)
            figure = Figure(OURS, kind, batch)
            found[f"{OURS}, {kind}, {batch}"] = partial(_measure, figure, ours, options)
        kind = KINDS[options.device][0]
        if kind == "bf16":
            peer = peer.to(torch.bfloat16)
        theirs = partial(_hugging_face_writes, peer, prompts)
        found[f"{PEER}, {batch}"] = partial(_measure, Figure(PEER, kind, batch), theirs, options)
    return found


def _hugging_face_writes(peer: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
    import torch

    with torch.no_grad():
        peer.generate(
            torch.tensor(prompts, device=peer.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
        )


def _measure(figure: Figure, write: Callable[..., Any], options: Options) -> dict[Figure, float]:
    import torch

    started, worked = time.perf_counter(), time.process_time()
    write(max_new_tokens=options.new_tokens)
    if options.device == "cuda":
        torch.cuda.synchronize()
    tokens = figure.batch * options.new_tokens
    return {
        figure: tokens / (time.perf_counter() - started),
        figure._replace(cpu=True): 1000 * (time.process_time() - worked) / tokens,
    }


def as_text(found: Mapping[str, Any]) -> str:
    """What `run` found, for people."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    rows = [
        (
            row["what"],
            row["weights"],
            str(row["batch"]),
            f"{row['tokens_s']['median']:,.1f}",
            f"{row['tokens_s']['low']:,.1f} to {row['tokens_s']['high']:,.1f}",
            f"{row['of_peer']:.2f}",
            f"{row['cpu_ms']['median']:.1f}",
        )
        for row in found["rows"]
    ]
    return "\n".join(
        [
            f"$ {found['command']}",
            f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, "
            f"Python {machine['python']}, {versions}, on {found['device']}",
            f"{found['preset']}: {found['new_tokens']} new tokens; medians of "
            f"{found['rounds']} rounds",
            "",
            table.as_text(
                ("", "weights", "texts", "tokens/s", "low to high", "× Hugging Face", "CPU ms"),
                rows,
            ),
            "",
            "CPU ms: of all threads, for each token; what else runs here changes it little.",
            f"Wanted of one text in the first kind of weights: ≥ {found['at_least']} × {PEER}.",
        ]
    )


if __name__ == "__main__":
    main()
