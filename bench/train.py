"""How fast training is, beside Hugging Face's GPT-2, a plain step, and the machine's own products.

    python -m bench.train --preset gpt2 --device cuda
    python -m bench.train --preset small --profile       where the time of our step goes

Every contender has a process of its own; they take turns, so that what drifts drifts for all, and
ratios are taken within each round. All train the same shape on the same batches with AdamW.
"""

import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import tyro

from bench import table
from bench.worker import Turn, Worker, peak_megabytes
from mygpt.config import GPTConfig
from mygpt.settings import PRESETS
from shards.cli import one_line_errors

PACKAGES = ("torch", "transformers")
OURS, PLAIN, PEER = "myGPT", "plain", "Hugging Face"
COMPILED = ", compiled"
PRODUCT = "matrix product"
ROWS = {"cuda": 64, "cpu": 8}
NOTES = """\
CPU time: of the plain step's, which other programs on the machine hardly change. MiB: {memory}.
Of products: model FLOP a second beside what a large matrix product reaches. Begin: seconds until
the first step is done, compilation included. Loss: after {steps} steps; Hugging Face's is of other
first weights."""


@dataclass(frozen=True)
class Options:
    """Measure training beside its rivals."""

    preset: Literal["gpt2", "small", "tiny", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """Shape of the model, without dropout."""
    device: Literal["cuda", "cpu"] = "cpu"
    """Where."""
    micro_batch: int = 0
    """Rows of a step; 0: 64 on a GPU, 8 on a CPU."""
    block_size: int = 0
    """Tokens of a row; 0: the preset's."""
    rounds: int = 5
    """How often each contender takes its turn."""
    seconds: float = 5
    """How long a turn is; at least one step."""
    compile: bool = False
    """Measure the compiled steps on a CPU too; on a GPU they always are."""
    profile: bool = False
    """Show where the time of our step goes, instead of measuring."""
    json: bool = False
    """Answer with one JSON object on one line."""


def main() -> None:
    """Measure, and print the table."""
    options = tyro.cli(Options, prog="python -m bench.train", description=__doc__)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py
    with one_line_errors():
        if options.device == "cuda":
            from mygpt.distributed import check_room

            check_room(1, "cuda")
        if options.profile:
            from bench.profile import as_text as profile_text
            from bench.profile import profile

            shape, rows = sizes(options)
            parts = profile(shape, rows, options.device, options.compile)
            print(json.dumps(parts) if options.json else profile_text(parts))
            return
        found = run(options)
    print(json.dumps(found) if options.json else as_text(found))


def sizes(options: Options) -> tuple[GPTConfig, int]:
    """The shape that is trained, and the rows of a step."""
    base = PRESETS[options.preset][1].model
    shape = replace(base, dropout=0.0, block_size=options.block_size or base.block_size)
    return shape, options.micro_batch or ROWS[options.device]


def variants(options: Options) -> dict[str, tuple[str, dict[str, bool]]]:
    """Contender → the function of `bench.steps` that makes its step, and how."""
    on_gpu = options.device == "cuda"
    eager, compiled = {"compiled": False}, {"compiled": True}
    found = {OURS: ("ours", compiled if on_gpu else eager)}
    if options.compile and not on_gpu:
        found[OURS + COMPILED] = ("ours", compiled)
    found[PLAIN] = ("plain", eager)
    if not on_gpu:
        found[PEER] = ("hugging_face", eager)
    if options.compile or on_gpu:
        found[PLAIN + COMPILED] = ("plain", compiled)
        found[PEER + COMPILED] = ("hugging_face", compiled)
    return found


def contender(options: Options, maker: str, how: Mapping[str, bool]) -> Turn:
    """In the process of a contender: a turn of steps, with their times and losses."""
    import torch

    from bench import steps

    begun = time.perf_counter()
    size = steps.Size(*sizes(options), options.device)
    step = getattr(steps, maker)(size, **how)
    losses = [step(0)]
    begin_seconds = time.perf_counter() - begun
    on_gpu = options.device == "cuda"

    def turn() -> dict[str, Any]:
        taken: list[float] = []
        worked = time.process_time()
        while not taken or sum(taken) < options.seconds:
            started = time.perf_counter()
            losses.append(step(len(losses)))  # comes back when the device is done
            taken.append(time.perf_counter() - started)
        worked = time.process_time() - worked
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_megabytes()
        if on_gpu:
            torch.cuda.empty_cache()  # the others are on the same GPU
        return {
            "seconds": statistics.median(taken),
            "cpu_seconds": worked / len(taken),
            "megabytes": peak,
            "losses": losses,
            "begin": begin_seconds,
        }

    return turn


def product(options: Options) -> Turn:
    """In a process of its own: what the machine multiplies, and what its datasheet says."""
    import torch

    from bench.steps import matrix_rate
    from mygpt.distributed import peak_flops
    from mygpt.model import GPT

    with torch.device("meta"):
        flops_per_token = GPT(sizes(options)[0]).flops_per_token()
    peak = peak_flops(torch.device(options.device))
    name = torch.cuda.get_device_name() if options.device == "cuda" else ""

    def turn() -> dict[str, Any]:
        rate = matrix_rate(options.device, 8192 if options.device == "cuda" else 2048)
        return {"rate": rate, "datasheet": peak, "of_token": flops_per_token, "gpu": name}

    return turn


def run(options: Options) -> dict[str, Any]:
    """Everything that was measured, as JSON. Raises ValueError or OSError where it can't be."""
    workers = [Worker(PRODUCT, product, options)]
    for name, (maker, how) in variants(options).items():
        workers.append(Worker(name, contender, options, maker, how))
    try:
        turns = table.alternately({w.name: partial(_turn, w) for w in workers}, options.rounds)
    finally:
        for worker in workers:
            worker.end()
    products = turns.pop(PRODUCT)
    shape, rows = sizes(options)
    tokens = rows * shape.block_size
    found = [row(name, turns, products, tokens) for name in turns]
    return {
        "command": shlex.join(["python", "-m", "bench.train", *sys.argv[1:]]),
        "machine": table.machine(PACKAGES),
        "device": products[0]["gpu"] or "cpu",
        "preset": options.preset,
        "batch": [rows, shape.block_size],
        "flops_per_token": products[0]["of_token"],
        "tflops_of_products": table.spread([one["rate"] / 1e12 for one in products], 3),
        "rounds": options.rounds,
        "rows": found,
        "marks": marks({one["what"]: one for one in found}, options.device),
    }


def _turn(worker: Worker) -> dict[str, Any]:
    return {worker.name: worker.turn()}


def row(
    name: str,
    turns: Mapping[str, Sequence[Mapping[str, Any]]],
    products: Sequence[Mapping[str, Any]],
    tokens: int,
) -> dict[str, Any]:
    """A row of the table: rates, memory, shares of what the machine could do, and the loss."""
    own, beside = turns[name], turns[PLAIN]
    rates = [tokens / turn["seconds"] for turn in own]
    flops = [rate * products[0]["of_token"] for rate in rates]
    peak = products[0]["datasheet"]
    steps = min(len(turn[-1]["losses"]) for turn in turns.values())
    return {
        "what": name,
        "tokens_s": table.spread(rates),
        "ms": table.spread([1000 * turn["seconds"] for turn in own]),
        "of_plain": round(table.ratio(rates, [tokens / turn["seconds"] for turn in beside]), 3),
        "cpu_of_plain": round(
            table.ratio(
                [turn["cpu_seconds"] for turn in own], [turn["cpu_seconds"] for turn in beside]
            ),
            3,
        ),
        "megabytes": round(own[-1]["megabytes"]),
        "memory_of_plain": round(own[-1]["megabytes"] / beside[-1]["megabytes"], 3),
        "of_products": round(table.ratio(flops, [one["rate"] for one in products]), 3),
        "of_datasheet": peak and round(statistics.median(flops) / peak, 3),
        "begin_seconds": round(own[0]["begin"], 1),
        "steps": steps,
        "loss": own[-1]["losses"][steps - 1],
    }


def marks(rows: Mapping[str, Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """What the project asks of training on this kind of device: what was found, what is wanted."""
    ours, plain = rows[OURS], rows[PLAIN]
    found = [
        {"what": "tokens/s ÷ plain step", "found": ours["of_plain"], "wanted": "≥ 1.12, or ≥ 1.03"},
        {"what": "memory ÷ plain step", "found": ours["memory_of_plain"], "wanted": "then ≤ 0.6"},
    ]
    if device == "cuda":
        wanted = ((PLAIN + COMPILED, 1.25), (PEER + COMPILED, 1.3))
        found = [
            {
                "what": f"tokens/s ÷ {name}",
                "found": round(ours["of_plain"] / rows[name]["of_plain"], 2),
                "wanted": f"≥ {least}",
            }
            for name, least in wanted
        ]
        found += [
            {"what": "share of products", "found": ours["of_products"], "wanted": "≥ 0.6"},
            {"what": "memory ÷ plain step", "found": ours["memory_of_plain"], "wanted": "≤ 0.5"},
        ]
    apart = abs(ours["loss"] - plain["loss"])
    what = f"loss beside plain step after {ours['steps']} steps"
    return [*found, {"what": what, "found": round(apart, 5), "wanted": "0, to rounding"}]


def as_text(found: Mapping[str, Any]) -> str:
    """What `run` found, for people."""
    machine, batch, products = found["machine"], found["batch"], found["tflops_of_products"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    memory = "what torch allocated at most" if found["device"] != "cpu" else "resident at most"
    headers = (
        *("", "tokens/s", "low to high", "ms", "× plain", "CPU time", "MiB", "of products"),
        *("of datasheet", "begin, s", "loss"),
    )
    lines = [
        f"$ {found['command']}",
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, "
        f"Python {machine['python']}, {versions}, on {found['device']}",
        f"{found['preset']}: steps of {batch[0]} × {batch[1]} tokens, "
        f"{found['flops_per_token'] / 1e6:.0f} MFLOP a token; a large matrix product runs at "
        f"{products['median']:.3g} TFLOP/s; medians of {found['rounds']} rounds",
        "",
        table.as_text(headers, [cells(one) for one in found["rows"]]),
        "",
        NOTES.format(memory=memory, steps=found["rows"][0]["steps"]),
        "",
        table.as_text(
            ("", "found", "wanted"),
            [(one["what"], str(one["found"]), one["wanted"]) for one in found["marks"]],
        ),
    ]
    return "\n".join(lines)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as text."""
    rates = row["tokens_s"]
    return [
        row["what"],
        f"{rates['median']:,.0f}",
        f"{rates['low']:,.0f} to {rates['high']:,.0f}",
        f"{row['ms']['median']:,.0f}",
        f"{row['of_plain']:.2f}",
        f"{row['cpu_of_plain']:.2f}",
        f"{row['megabytes']:,}",
        f"{row['of_products']:.0%}",
        f"{row['of_datasheet']:.0%}" if row["of_datasheet"] else "",
        f"{row['begin_seconds']:.0f}",
        f"{row['loss']:.4f}",
    ]


if __name__ == "__main__":
    main()
