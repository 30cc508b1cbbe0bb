"""The ceiling on paper: what each part of a training step multiplies and moves on a GPU.

    python -m bench.paper

A part takes the longer of two times: its FLOPs at the rate of a large matrix product, its bytes at
the memory's. Kernels that fuse what they can are assumed, as compiled ones do; launches are not
counted. Two bytes a value in bf16, four in fp32. Shapes: N tokens, C width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import tyro

from bench import table
from mygpt.config import GPTConfig
from mygpt.doctor.memory import parameters
from mygpt.settings import PRESETS


@dataclass(frozen=True)
class Options:
    """Work out the ceiling of a training step."""

    preset: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """Shape of the model."""
    micro_batch: int = 64
    """Rows of a micro-batch."""
    micro_steps: int = 8
    """Micro-batches of a step, for which the optimizer moves once."""
    tflops: float = 780
    """What a large matrix product reaches: 770 to 800 was measured on an H200."""
    datasheet: float = 989
    """What the datasheet says."""
    terabytes: float = 4.8
    """What the memory moves in a second, by the datasheet."""


class Part(NamedTuple):
    """A part of a micro-batch: its name, FLOPs and bytes, forwards and backwards."""

    name: str
    flops: float
    bytes: float


def parts(shape: GPTConfig, rows: int, micro_steps: int) -> list[Part]:
    """What one micro-batch takes, the optimizer's share of its step included."""
    n, c, h, v = rows * shape.block_size, shape.n_embed, shape.n_hidden, shape.vocab_size
    layers, t = shape.n_layers, shape.block_size
    weights = layers * (4 * c * c + 2 * c * h)
    padded = v + -v % 128
    return [
        # Each product forwards, and two backwards; every operand and result once, in bf16.
        Part("blocks: matrix products", 6 * n * weights, 3 * 2 * (n * layers * (9 * c + 2 * h))),
        # Half of the scores are above the diagonal; backwards computes them anew: 2 + 5 products.
        Part("blocks: attention", layers * 7 * n * t * c, 2 * n * layers * c * (4 + 8)),
        # Two norms, two sums, forwards and backwards: some 20 passes over (N, C); GELU, 5 over 4 C.
        Part("blocks: norms, GELU, sums", 0, 2 * n * layers * (20 * c + 5 * h)),
        Part("head: matrix products", 6 * n * padded * c, 2 * 3 * n * (padded + c)),
        # The logits read twice and their gradient written once, in bf16: see `row_gradients`.
        Part("head: softmax, loss, gradient", 0, 2 * 3 * n * padded),
        # Weight, gradient and two averages read, all but the gradient written, zeros into it.
        Part("AdamW, clipping", 0, 4 * 9 * parameters(shape) / micro_steps),
    ]


def main() -> None:
    """Print the table."""
    print(as_text(tyro.cli(Options, prog="python -m bench.paper", description=__doc__)))


def as_text(options: Options) -> str:
    """The table, and what it comes to."""
    shape = PRESETS[options.preset][1].model
    found = parts(shape, options.micro_batch, options.micro_steps)
    seconds = [time_of(part, options) for part in found]
    total, tokens = sum(seconds), options.micro_batch * shape.block_size
    flops = sum(part.flops for part in found)
    rows = [cells(part, options, total) for part in found]
    # The convention of PaLM, as `GPT.flops_per_token`: all scores, each product three times.
    counted = 6 * (parameters(shape) - shape.block_size * shape.n_embed)
    counted += 12 * shape.n_layers * shape.n_embed * shape.block_size
    share = tokens * counted / total / 1e12
    return "\n".join(
        [
            f"{options.preset}, {options.micro_batch} × {shape.block_size} tokens, "
            f"{options.micro_steps} micro-batches a step, {options.tflops:g} TFLOP/s, "
            f"{options.terabytes:g} TB/s",
            "",
            table.as_text(("", "TFLOP", "GB", "ms", "share", "bound by"), rows),
            "",
            f"{1000 * total:.1f} ms for {flops / 1e12:.1f} TFLOP: at most "
            f"{tokens / total:,.0f} tokens/s, {share / options.tflops:.0%} of the rate of products "
            f"and {share / options.datasheet:.0%} of the datasheet's {options.datasheet:g} TFLOP/s "
            f"at {counted / 1e6:.0f} MFLOP a token.",
        ]
    )


def time_of(part: Part, options: Options) -> float:
    """Seconds: of its FLOPs or of its bytes, whichever take longer."""
    return max(part.flops / options.tflops, part.bytes / options.terabytes) / 1e12


def cells(part: Part, options: Options, total: float) -> Sequence[str]:
    """A row as text."""
    seconds = time_of(part, options)
    return (
        part.name,
        f"{part.flops / 1e12:.1f}" if part.flops else "",
        f"{part.bytes / 1e9:.1f}",
        f"{1000 * seconds:.1f}",
        f"{seconds / total:.0%}",
        "products" if part.flops / options.tflops > part.bytes / options.terabytes else "memory",
    )


if __name__ == "__main__":
    main()
