import pytest
import torch

from mygpt import attention
from mygpt.config import GPTConfig

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"flash": 2.0, "cudnn": 1.0}, "cudnn"),
        ({"flash": 1.0, "cudnn": 2.0}, "flash"),
        ({"flash": 1.0, "cudnn": float("inf")}, "flash"),
        ({"flash": float("inf"), "cudnn": float("inf")}, "torch"),
    ],
)
def test_the_fastest_is_taken(seconds, expected, monkeypatch):
    monkeypatch.setattr(attention, "_seconds", lambda name, *_: seconds[name])
    assert attention.fastest(GPTConfig(), 4, CUDA) == expected


def test_there_is_no_choice_on_a_cpu_or_where_results_must_repeat(monkeypatch):
    monkeypatch.setattr(attention, "_seconds", lambda *_: 1 / 0)
    assert attention.fastest(GPTConfig(), 4, CPU) == "torch"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert attention.fastest(GPTConfig(), 4, CUDA) == "torch"


@pytest.mark.parametrize(
    ("kernel", "flash", "cudnn"),
    [("flash", True, False), ("cudnn", False, True), ("torch", True, True)],
)
def test_the_other_kernels_are_shut_out(kernel, flash, cudnn):
    try:
        attention.use(kernel)
        assert torch.backends.cuda.flash_sdp_enabled() == flash
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
        assert torch.backends.cuda.math_sdp_enabled()
    finally:
        attention.use("torch")


def test_a_kernel_that_does_not_run_takes_forever(monkeypatch):
    def unavailable(*_, **__):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    shape = GPTConfig(block_size=8, n_heads=2, n_embed=16)
    assert 0 < attention._seconds("flash", shape, 2, CPU) < 10
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", unavailable)
    assert attention._seconds("flash", shape, 2, CPU) == float("inf")
