"""nanoGPT's `ckpt.pt` (github.com/karpathy/nanoGPT) as our GPT, read without running its code.

Today's nanoGPT computes the exact GELU, GPT-2 and myGPT its tanh approximation. The two differ by
less than 0.0005, so the logits of an imported model differ a little from nanoGPT's.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mygpt import pretrained
from mygpt.config import GPTConfig
from mygpt.model import GPT


@dataclass(frozen=True)
class Imported:
    """A model with what its checkpoint says of its training."""

    model: GPT
    step: int | None
    val_loss: float | None


def load(path: Path) -> Imported:
    """Read `ckpt.pt`. Raises FileNotFoundError or ValueError, in one line, if it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"expected nanoGPT's checkpoint at {path}, found no file")
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # Only the reason: torch goes on to advise weights_only=False, which would run code.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"expected tensors and plain values in {path}, found: {reason}") from None
    if not isinstance(raw, dict) or not {"model", "model_args"} <= raw.keys():
        keys = ", ".join(sorted(map(str, raw))[:5]) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"expected nanoGPT's model and model_args in {path}, found {keys}")
    tensors = pretrained.our_names(raw["model"], wrapper="_orig_mod.")
    model = pretrained.build(_config(path, raw["model_args"]), tensors, path)
    loss = raw.get("best_val_loss")
    return Imported(model.eval(), raw.get("iter_num"), None if loss is None else float(loss))


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
