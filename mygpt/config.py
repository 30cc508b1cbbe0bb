"""Shape of a model, and what is known of each optimizer. Plain values, without torch.

The four GPT-2 sizes are `GPT2_SHAPES`; `GPTConfig()` is the smallest, with 124M parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Beyond these a model is a mistyped number, which would otherwise exhaust the memory.
MAX_SIZE, MAX_LAYERS, MAX_PARAMS = 2**20, 2**12, 10**12


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT, by default the 124M GPT-2. Raises ValueError for an impossible one."""

    block_size: int = 1024  # tokens of context = learned positions
    vocab_size: int = 50257  # GPT-2's 50,000 merges, 256 bytes and <|endoftext|>
    n_layers: int = 12  # blocks, each of attention and MLP
    n_heads: int = 12  # attention heads of each block; they share n_embed
    n_embed: int = 768  # width of the residual stream
    n_hidden: int = 0  # width of the MLP; 0 is replaced by 4 * n_embed
    dropout: float = 0.0  # share of activations zeroed in training
    bias: bool = True  # in linear layers and layer norms, as in GPT-2

    def __post_init__(self) -> None:
        if not self.n_hidden:
            object.__setattr__(self, "n_hidden", 4 * self.n_embed)
        for name in ("block_size", "vocab_size", "n_layers", "n_heads", "n_embed", "n_hidden"):
            value, most = getattr(self, name), MAX_LAYERS if name == "n_layers" else MAX_SIZE
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be at least 1 and at most {most}, got {value}")
        if self.n_embed % self.n_heads:
            raise ValueError(
                f"n_embed must be a multiple of n_heads, got {self.n_embed} and {self.n_heads}: "
                f"try n_embed {self.n_embed - self.n_embed % self.n_heads + self.n_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.num_params > MAX_PARAMS:
            raise ValueError(
                f"a model must have at most {MAX_PARAMS:.0e} parameters, got "
                f"{self.num_params:.1e}: take a smaller n_embed, n_hidden or n_layers"
            )

    @property
    def num_params(self) -> int:
        """Number of parameters of the model, the tied embedding counted once."""
        width, hidden = self.n_embed, self.n_hidden
        block = 4 * width**2 + 2 * width * hidden + 2 * width  # matrices, weights of two norms
        if self.bias:
            block += 4 * width + hidden + width + 2 * width  # attention, MLP, two norms
        final_norm = width + width * self.bias
        return (self.vocab_size + self.block_size) * width + self.n_layers * block + final_norm


@dataclass(frozen=True)
class GPTConfigSmall(GPTConfig):
    """Small GPT: ~10M parameters without embeddings, ~30M with GPT-2's vocabulary."""

    block_size: int = 256
    n_layers: int = 6
    n_heads: int = 6
    n_embed: int = 384


GPT2_SHAPES = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layers=24, n_heads=16, n_embed=1024),
    "gpt2-large": GPTConfig(n_layers=36, n_heads=20, n_embed=1280),
    "gpt2-xl": GPTConfig(n_layers=48, n_heads=25, n_embed=1600),
}


class OptimizerTraits(NamedTuple):
    """Properties of an optimizer that checkpoints and --shard depend on."""

    state: tuple[str, ...]  # keys of its state of one parameter: all but "step" have its shape
    elementwise: bool  # no element's update reads another: so any shard can be updated by itself


# By the lower-case name of the class.
OPTIMIZERS = {
    "adamw": OptimizerTraits(("step", "exp_avg", "exp_avg_sq"), elementwise=True),
    "muon": OptimizerTraits(("momentum_buffer",), elementwise=False),
}


def check_shapes(
    expected: Mapping[str, Sequence[int]],
    actual: Mapping[str, Sequence[int]],
    what: str,
    remedy: str,
) -> None:
    """Raise ValueError for the first tensor, by name, that is missing, left over or misshapen.

    `what` and `remedy` begin and end its message.
    """
    for name in sorted(expected.keys() | actual.keys()):
        shapes = [tuple(side[name]) if name in side else "none" for side in (expected, actual)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{what} {name}: expected shape {shapes[0]}, found {shapes[1]}: {remedy}"
            )
