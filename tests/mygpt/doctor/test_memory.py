"""The arithmetic of memory agrees with the model and grows with what it should."""

from dataclasses import replace

import pytest
import torch

from mygpt.config import GPTConfig
from mygpt.doctor.__main__ import BYTES_PER_PARAMETER, training_bytes
from mygpt.model import GPT
from mygpt.settings import PRESETS


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_count_of_parameters_is_the_models(name: str, bias: bool) -> None:
    config = replace(PRESETS[name][1].model, bias=bias)
    with torch.device("meta"):
        assert config.num_params == GPT(config).num_params()


def test_a_width_of_its_own_for_the_mlp() -> None:
    config = GPTConfig(n_layers=2, n_heads=2, n_embed=8, n_hidden=13, vocab_size=11, block_size=5)
    assert config.num_params == GPT(config).num_params()


def test_what_backward_keeps_is_about_what_is_said() -> None:
    """Against what autograd saves of one small model, in fp32, weights left out."""
    config = GPTConfig(n_layers=4, n_heads=4, n_embed=64, vocab_size=64, block_size=64)
    model, saved, own = GPT(config), {}, set()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    idx = torch.randint(0, 64, (8, 64))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(idx, idx)
    measured = sum(size for size, _ in saved.values())
    fixed = BYTES_PER_PARAMETER * config.num_params
    assert training_bytes(config, 8, "cpu") - fixed == pytest.approx(measured, rel=0.35)


def test_more_rows_cost_more_and_weights_cost_once() -> None:
    config = GPTConfig()
    one, two, three = (training_bytes(config, rows) for rows in (16, 32, 48))
    assert three - two == two - one > 0
    assert one > BYTES_PER_PARAMETER * config.num_params
