"""The ceiling on paper agrees with the model it is of."""

import pytest
import torch

from bench import paper
from bench.paper import Options
from mygpt.config import GPTConfig
from mygpt.model import GPT


def test_flops_of_the_products_are_those_of_the_model() -> None:
    shape = GPTConfig(vocab_size=50304)  # a multiple of 128 already
    with torch.device("meta"):
        model = GPT(shape)
    found = {part.name: part.flops for part in paper.parts(shape, 3, 1)}
    # The convention counts biases and gains too, and all scores where half are needed.
    products = found["blocks: matrix products"] + found["head: matrix products"]
    attention = found["blocks: attention"] * 12 / 7
    expected = model.flops_per_token() * 3 * shape.block_size
    assert products + attention == pytest.approx(expected, rel=2e-3)


def test_a_part_takes_the_longer_of_two_times() -> None:
    options = Options(tflops=2, terabytes=4)
    assert paper.time_of(paper.Part("a", 6e12, 4e12), options) == 3
    assert paper.time_of(paper.Part("a", 2e12, 8e12), options) == 2


def test_the_table() -> None:
    text = paper.as_text(Options())
    assert "855 MFLOP a token" in text and "head: softmax, loss, gradient" in text
