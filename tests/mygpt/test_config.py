import dataclasses

import pytest

from mygpt.config import GPT2_SHAPES, GPTConfig, GPTConfigSmall


def test_the_two_given_configurations():
    assert dataclasses.astuple(GPTConfig()) == (1024, 50257, 12, 12, 768, 3072, 0.0, True)
    assert dataclasses.astuple(GPTConfigSmall()) == (256, 50257, 6, 6, 384, 1536, 0.0, True)


def test_the_gpt2_sizes():
    shapes = {name: (c.n_layers, c.n_heads, c.n_embed) for name, c in GPT2_SHAPES.items()}
    assert shapes == {
        "gpt2": (12, 12, 768),
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
    }
    assert all((c.block_size, c.vocab_size) == (1024, 50257) for c in GPT2_SHAPES.values())


def test_n_hidden_follows_n_embed_unless_given():
    assert GPTConfig(n_embed=96).n_hidden == 384
    assert GPTConfig(n_embed=96, n_hidden=100).n_hidden == 100


def test_a_resolved_config_makes_itself_again():
    config = GPTConfigSmall(n_hidden=77, dropout=0.1)
    assert GPTConfigSmall(**dataclasses.asdict(config)) == config


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_layers = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_embed": 100},
            "n_embed must be a multiple of n_heads, got 100 and 12: try n_embed 108",
        ),
        ({"n_layers": 0}, "n_layers must be at least 1 and at most 4096, got 0"),
        ({"block_size": -1}, "block_size must be at least 1 and at most 1048576, got -1"),
        ({"n_hidden": -4}, "n_hidden must be at least 1 and at most 1048576, got -4"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": float("nan")}, "dropout must be at least 0 and below 1, got nan"),
    ],
)
def test_impossible_values_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError) as error:
        GPTConfig(**changes)
    assert str(error.value) == message
