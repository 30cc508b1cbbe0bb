"""Weights in other forms: the same model to as much as the form can hold, and no other."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mygpt.config import GPTConfig
from mygpt.eval.quantize import MAX_KERNEL_ROWS, Int8Linear, with_weights
from mygpt.generate import Sampling, generate
from mygpt.model import GPT

VOCAB = 131


@pytest.fixture(params=[64, 24], ids=["kernel", "odd width"])
def model(request) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": 64, "vocab_size": VOCAB, "n_layers": 2, "n_heads": 2}
    model = GPT(GPTConfig(**shape, n_embed=request.param, dropout=0.1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("kind", "error"), [("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.03)])
@pytest.mark.parametrize("rows", [1, 3, 2 * MAX_KERNEL_ROWS])
def test_logits_are_those_of_the_model_but_for_rounding(model, kind, error, rows):
    made = with_weights(model, kind)
    idx = torch.randint(0, VOCAB, (1, rows))
    with torch.no_grad():
        found, expected = made(idx)[0], model.eval()(idx)[0]
    assert found.dtype == torch.float32
    assert (found - expected).norm() < error * expected.norm()
    if kind != "fp32":
        assert not torch.equal(found, expected)


def test_the_model_is_left_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    for kind in ("fp32", "bf16", "int8"):
        with_weights(model, kind)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))[1].backward()


def test_fp32_writes_what_the_model_writes(model):
    prompts = [[5], [7, 8, 9, 10, 11], list(range(40))]
    expected = generate(model, prompts, Sampling(50, temperature=0))
    assert generate(with_weights(model, "fp32"), prompts, Sampling(50, temperature=0)) == expected


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_smaller_weights_write_as_well(model, kind):
    texts = generate(with_weights(model, kind), [[5], [7, 8]], Sampling(70, seed=3))
    assert [len(text) for text in texts] == [70, 70]
    assert all(0 <= token < VOCAB for text in texts for token in text)


def test_int8_rounds_every_row_by_its_own_scale():
    linear = torch.nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-4, 4, 8)[:, None])
        linear.weight[3] = 0
    made = Int8Linear(linear)
    back = made.weight.float() * made.scale.float()[:, None]
    largest = linear.weight.abs().amax(1, keepdim=True)
    assert made.weight.dtype == torch.int8
    assert ((back - linear.weight).abs() <= largest * (0.5 / 127 + 2**-8)).all()
    x = torch.randn(4, 64)
    expected = F.linear(x, linear.weight)
    assert (made(x) - expected).norm() < 0.02 * expected.norm()


def test_int8_is_for_cpus():
    model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layers=1, n_heads=1, n_embed=8))
    with pytest.raises(ValueError, match="int8 weights are for CPUs, found meta"):
        with_weights(model.to("meta"), "int8")
