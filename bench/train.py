"""Speed of training, beside Hugging Face's GPT-2, a plain step, and a large matrix product.

    python -m bench.train --preset gpt2 --device cuda
    python -m bench.train --preset small --profile       profile our step by its parts

All contenders train the same model on the same batches with AdamW, each in a process of its own.
On a GPU the plain uncompiled step is measured alone, once: its logits need most of the memory.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import steps, table, worker
from bench.steps import Workload
from bench.table import Device, Preset, Record
from mygpt.distributed import check_room, peak_flops
from mygpt.model import GPT
from mygpt.settings import PRESETS

PACKAGES = ("torch", "transformers")
OURS, PLAIN, PEER = "myGPT", "plain", "Hugging Face"
COMPILED = ", compiled"
PRODUCT = "matrix product"
MICRO_BATCH = {"cuda": 64, "cpu": 8}
COLUMNS: table.Columns = {
    "": ("what", ""),
    "tokens/s": ("tokens_s", ",.0f"),
    "low to high": ("tokens_s", ",.0f"),
    "ms": ("ms", ",.0f"),
    "× plain": ("of_plain", ".2f"),
    "CPU time": ("cpu_of_plain", ".2f"),
    "MiB": ("megabytes", ","),
    "of products": ("of_products", ".0%"),
    "of datasheet": ("of_datasheet", ".0%"),
    "start, s": ("start_seconds", ".0f"),
    "loss": ("loss", ".4f"),
}
NOTES = """\
× plain, CPU time: relative to {baseline}; other programs on the machine hardly change the latter.
MiB: {memory}. Of products: model FLOP/s relative to a large matrix product's over two seconds.
Start: seconds until the first step is done, compilation included.
Loss: after {steps} steps; Hugging Face's starts from other weights."""


@dataclass(frozen=True)
class Options:
    """Measure training beside its rivals."""

    preset: Preset = "gpt2"
    """Shape of the model, without dropout."""
    device: Device = "cpu"
    """Device to train on."""
    micro_batch: int = 0
    """Sequences per step; 0: 64 on a GPU, 8 on a CPU."""
    block_size: int = 0
    """Tokens per sequence; 0: the preset's."""
    rounds: int = 5
    """How often each contender is measured."""
    seconds: float = 5
    """Length of a turn; at least one step."""
    steps: int = 1
    """Least number of steps of a turn of our own and of the step that it is compared with."""
    compile: bool = False
    """Measure the compiled steps on a CPU too; on a GPU they always are."""
    profile: bool = False
    """Print the time of each part of our step, instead of comparing."""
    json: bool = False
    """Print one JSON object on one line."""


def main() -> None:
    """Run the command."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for the workers, as in train.py
    table.command("train", Options, run, as_text, __doc__ or "")


def run(options: Options, note: Callable[[Record], None] = table.to_stderr) -> dict[str, Any]:
    """Everything that was measured, as JSON. Raises ValueError if the device is not there.

    `note` gets each record as soon as it is measured.
    """
    check_room(1, options.device)
    records: dict[str, list[Record]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = workload(options, Path(folder))
        work.build_data()
        if options.profile:
            return {"profile": steps.profile(work, options.compile or options.device == "cuda")}
        for makers, rounds in groups(options, work):
            measured, missing = worker.measure(makers, rounds, note)
            records |= measured
            failed |= missing
    return about(options, work) | comparison(about(options, work), records, failed)


def about(options: Options, work: Workload) -> dict[str, Any]:
    """What is measured, and on which machine."""
    with torch.device("meta"):
        flops_per_token = GPT(work.model).flops_per_token()
    return {
        "machine": table.machine("train", PACKAGES),
        "device": device_name(options.device),
        "preset": options.preset,
        "batch": [work.micro_batch_size, work.model.block_size],
        "rounds": options.rounds,
        "flops_per_token": flops_per_token,
        "baseline": baseline(options),
    }


def device_name(device: str) -> str:
    """The GPU with the versions of CUDA and cuDNN, or "cpu"."""
    if device == "cpu":
        return device
    gpu, cudnn = torch.cuda.get_device_name(), torch.backends.cudnn.version()
    return f"{gpu}, CUDA {torch.version.cuda}, cuDNN {cudnn}"


def comparison(
    about: Mapping[str, Any], records: Mapping[str, Sequence[Record]], failed: Mapping[str, str]
) -> dict[str, Any]:
    """The rows of those contenders that did not fail."""
    products, tokens = records.get(PRODUCT, []), math.prod(about["batch"])
    steps_of = {name: own for name, own in records.items() if name != PRODUCT}
    rates = {name: [one[name] / 1e12 for one in products] for name in ("sustained", "burst")}
    return {
        "tflops_of_products": {name: table.spread(own, 3) for name, own in rates.items() if own},
        "rows": [
            row(name, steps_of, products, tokens, about["flops_per_token"], about["baseline"])
            for name in steps_of
        ],
        "failed": failed,
    }


def groups(options: Options, work: Workload) -> Iterator[tuple[dict[str, tuple[Any, ...]], int]]:
    """Contenders that are measured in turn, and for how many rounds."""
    makers: dict[str, tuple[Any, ...]] = {PRODUCT: (product, options.device)}
    for name, (maker, compiled) in variants(options).items():
        steps = options.steps if name in (OURS, baseline(options)) else 1
        makers[name] = (contender, work, options.seconds, steps, maker, compiled)
    if options.device == "cuda":
        yield {PLAIN: makers.pop(PLAIN)}, 1  # first, since a time limit may cut off what is last
    yield makers, options.rounds


def baseline(options: Options) -> str:
    """The contender that speeds are compared with."""
    return PLAIN + COMPILED if options.device == "cuda" else PLAIN


def workload(options: Options, folder: Path) -> Workload:
    """The model, batch size and dataset of all contenders."""
    base = PRESETS[options.preset][1].model
    shape = replace(base, dropout=0.0, block_size=options.block_size or base.block_size)
    micro_batch_size = options.micro_batch or MICRO_BATCH[options.device]
    return Workload(shape, micro_batch_size, options.device, folder)


def variants(options: Options) -> dict[str, tuple[str, bool]]:
    """Contender -> the maker of its step in `bench.steps`, and whether that is compiled."""
    on_gpu = options.device == "cuda"
    made = {OURS: ("ours", on_gpu), PLAIN: ("plain", False)}
    if options.compile and not on_gpu:
        made[OURS + COMPILED] = ("ours", True)
    if not on_gpu:
        made[PEER] = ("hugging_face", False)
    if options.compile or on_gpu:
        made[PLAIN + COMPILED] = ("plain", True)
        made[PEER + COMPILED] = ("hugging_face", True)
    return made


def contender(
    work: Workload, seconds: float, least_steps: int, maker: str, compiled: bool
) -> worker.Turn:
    """Make a contender's step in its process, take the first one, and return its turns."""
    start = time.perf_counter()
    torch.set_float32_matmul_precision("high")  # as train.py and nanoGPT do
    step = getattr(steps, maker)(work, compiled)
    losses = [step()]
    start_seconds = time.perf_counter() - start
    on_gpu = work.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # compiling may need more than training

    def turn() -> Record:
        step_seconds: list[float] = []
        start_cpu = time.process_time()
        while len(step_seconds) < least_steps or sum(step_seconds) < seconds:
            start = time.perf_counter()
            losses.append(step())  # waits for the device
            step_seconds.append(time.perf_counter() - start)
        cpu_seconds = time.process_time() - start_cpu
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else worker.peak_megabytes()
        if on_gpu:
            torch.cuda.empty_cache()  # the other contenders need the same GPU's memory
        record = {
            "seconds": statistics.median(step_seconds),
            "cpu_seconds": cpu_seconds / len(step_seconds),
            "megabytes": peak,
            "losses": losses.copy(),
            "start": start_seconds,
        }
        losses.clear()
        return record

    return turn


def product(device: str) -> worker.Turn:
    """Return turns that measure a large matrix product, and give the datasheet's peak."""
    peak = peak_flops(torch.device(device))
    size = 8192 if device == "cuda" else 2048
    return lambda: steps.product_rates(device, size) | {"datasheet": peak}


def row(
    name: str,
    records: Mapping[str, Sequence[Record]],
    products: Sequence[Record],
    tokens: int,
    flops_per_token: float,
    baseline: str = PLAIN,
) -> dict[str, Any]:
    """A row of the table: rates, memory, shares of what the machine could do, and the loss."""
    own, beside = records[name], records.get(baseline, [])
    rates = [tokens / seconds for seconds in table.column(own, "seconds")]
    plain_rates = [tokens / seconds for seconds in table.column(beside, "seconds")]
    flops = [rate * flops_per_token for rate in rates]
    peak = products[0]["datasheet"] if products else None
    count = min(sum(len(record["losses"]) for record in some) for some in records.values())
    losses = [loss for record in own for loss in record["losses"]]
    return {
        "what": name,
        "tokens_s": table.spread(rates),
        "ms": table.spread([1000 * record["seconds"] for record in own]),
        "of_plain": table.ratio(rates, plain_rates),
        "cpu_of_plain": table.ratio(
            table.column(own, "cpu_seconds"), table.column(beside, "cpu_seconds")
        ),
        "megabytes": round(own[-1]["megabytes"]),
        "memory_of_plain": table.ratio(
            table.column(own, "megabytes")[-1:],
            table.column(records.get(PLAIN, []), "megabytes")[-1:],
        ),
        "of_products": table.ratio(flops, table.column(products, "sustained")),
        "of_datasheet": peak and round(statistics.median(flops) / peak, 3),
        "start_seconds": round(own[0]["start"], 1),
        "steps": count,
        "loss": losses[count - 1],
    }


def as_text(results: Mapping[str, Any]) -> str:
    """The results of `run` for people."""
    if "profile" in results:
        return profile_as_text(results["profile"])
    batch, rows = results["batch"], results["rows"]
    rates = results["tflops_of_products"]
    shown_rates = [f"{rate['median']:.3g} TFLOP/s {name}" for name, rate in rates.items()]
    count = rows[0]["steps"] if rows else 0
    memory = "torch's peak allocation" if results["device"] != "cpu" else "peak resident memory"
    return table.page(
        results,
        f"on {results['device']}; {results['preset']}: steps of {batch[0]} × {batch[1]} tokens, "
        f"{results['flops_per_token'] / 1e6:.0f} MFLOP per token; a large matrix product: "
        f"{', '.join(shown_rates) or 'not measured'}; medians of {results['rounds']} rounds",
        COLUMNS,
        [NOTES.format(memory=memory, steps=count, baseline=results["baseline"])],
    )


def profile_as_text(profile: Mapping[str, Any]) -> str:
    """The parts of a step and its longest kernels as two tables."""
    parts = [(p["part"], f"{p['ms']:,.1f}", f"{p['share']:.0%}") for p in profile["parts"]]
    kernels = [
        (kernel["kernel"][:80].replace("|", "/"), f"{kernel['calls']:g}", f"{kernel['ms']:,.2f}")
        for kernel in profile["kernels"]
    ]
    return (
        table.as_text(("", "ms per step", "share"), parts)
        + "\n\n"
        + table.as_text(("longest kernels", "calls per step", "ms per step"), kernels)
    )


if __name__ == "__main__":
    main()
