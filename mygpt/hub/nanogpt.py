"""nanoGPT's `ckpt.pt` (github.com/karpathy/nanoGPT) as our GPT, read without running its code.

The weights are read, the function is ours: today's nanoGPT computes GELU exactly, older ones and we
by the tanh, as GPT-2 did. The two differ by less than 0.0005, and so its logits from ours.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mygpt.config import GPTConfig
from mygpt.model import GPT

# Their names in front of ours: what torch.compile puts there, and their module of all layers.
_PREFIXES = ("_orig_mod.", "transformer.")
# Very old files hold the causal mask too; the head is the embedding.
_LEFT_OUT = (".attn.bias", "lm_head.weight")


@dataclass(frozen=True)
class Found:
    """A model, and what its checkpoint tells of its training."""

    model: GPT
    step: int | None
    val_loss: float | None


def load(path: Path) -> Found:
    """Read `ckpt.pt`. Raises FileNotFoundError or ValueError, in one line, if it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"expected nanoGPT's checkpoint at {path}, found no file")
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # torch's advice, to load it without the safeguard, is not ours.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"expected tensors and plain values in {path}, found: {reason}") from None
    if not isinstance(raw, dict) or not {"model", "model_args"} <= raw.keys():
        keys = ", ".join(sorted(map(str, raw))[:5]) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"expected nanoGPT's model and model_args in {path}, found {keys}")
    config = _config(path, raw["model_args"])
    model = GPT(config).eval()
    _fill(path, model, _named(raw["model"]))
    loss = raw.get("best_val_loss")
    return Found(model, raw.get("iter_num"), None if loss is None else float(loss))


def _config(path: Path, values: dict[str, Any]) -> GPTConfig:
    try:
        return GPTConfig(
            block_size=values["block_size"],
            vocab_size=values["vocab_size"],
            n_layers=values["n_layer"],
            n_heads=values["n_head"],
            n_embed=values["n_embd"],
            dropout=values.get("dropout", 0.0),
            bias=values.get("bias", True),
        )
    except KeyError as error:
        raise ValueError(f"expected {error} among the model_args of {path}, found none") from None


def _named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names, which are theirs without what stands in front."""
    named = {}
    for name, tensor in tensors.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if not name.endswith(_LEFT_OUT):
            named[name] = tensor.float()
    return named


def _fill(path: Path, model: GPT, tensors: dict[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    for name in sorted(own.keys() | tensors.keys()):
        expected = tuple(own[name].shape) if name in own else "none"
        found = tuple(tensors[name].shape) if name in tensors else "none"
        if expected != found:
            raise ValueError(
                f"expected tensor {name} of shape {expected} in {path}, found {found}: its "
                "model_args describe another model"
            )
        own[name].data.copy_(tensors[name])
