"""fp8 products beside the same rounding done step by step, and a model that trains with them."""

import copy

import pytest
import torch

from mygpt.config import GPTConfig
from mygpt.fp8 import E4M3, E5M2, Float8Linear, Float8Product, check_fp8, scaled, use_fp8
from mygpt.model import GPT

SHAPE = {"block_size": 16, "vocab_size": 61, "n_layers": 2, "n_heads": 2, "n_embed": 32}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is left of a tensor that went through fp8 and came back."""
    value, scale = scaled(tensor, dtype)
    return value.float() * scale


@pytest.mark.parametrize(("dtype", "error"), [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_scaling_keeps_the_largest_value_and_rounds_the_others(dtype, error):
    tensor = torch.randn(40, 50) * 1e-4
    back = rounded(tensor, dtype)
    i = tensor.abs().argmax()
    torch.testing.assert_close(back.flatten()[i], tensor.flatten()[i])
    large = tensor.abs() > 0.01 * tensor.abs().max()
    assert ((back - tensor).abs() / tensor.abs())[large].max() <= error * 1.01


def test_zeros_stay_zeros():
    assert rounded(torch.zeros(3, 3), E4M3).eq(0).all()


def test_products_equal_those_of_rounded_matrices():
    x = torch.randn(48, 32, requires_grad=True)
    weight = torch.randn(64, 32, requires_grad=True)
    grad = torch.randn(48, 64)
    y = Float8Product.apply(x, weight, torch.float32)
    torch.testing.assert_close(y, rounded(x, E4M3) @ rounded(weight, E4M3).T)
    x_grad, weight_grad = torch.autograd.grad(y, (x, weight), grad)
    torch.testing.assert_close(x_grad, rounded(grad, E5M2) @ rounded(weight, E4M3))
    torch.testing.assert_close(weight_grad, rounded(grad, E5M2).T @ rounded(x, E4M3))


def test_a_model_keeps_its_names_and_comes_close_to_itself():
    model = GPT(GPTConfig(**SHAPE))
    oracle = copy.deepcopy(model)
    use_fp8(model)
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 8
    assert not isinstance(model.lm_head, Float8Linear)
    assert model.state_dict().keys() == oracle.state_dict().keys()
    idx = torch.randint(0, 61, (4, 16))
    _, loss = model(idx, idx.roll(-1, 1))
    _, expected = oracle(idx, idx.roll(-1, 1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    loss.backward()
    expected.backward()
    for a, b in zip(model.parameters(), oracle.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 0.15 * b.grad.norm()


def test_under_autocast_the_result_is_bf16_and_gradients_are_fp32():
    layer = Float8Linear(32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 3, 32))
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 16)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


def test_hardware_and_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs a GPU of the Ada, Hopper or a later kind, found c"):
        check_fp8(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"multiples of 16, found \(72, 24\) in h.0.attn.c_attn"):
        use_fp8(GPT(GPTConfig(**(SHAPE | {"n_embed": 24}))))
