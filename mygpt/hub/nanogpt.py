"""nanoGPT's `ckpt.pt` (github.com/karpathy/nanoGPT) as our GPT, read without running its code.

Today's nanoGPT computes the exact GELU, GPT-2 and myGPT its tanh approximation. The two differ by
less than 0.0005, so the logits of an imported model differ a little from nanoGPT's.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from mygpt import pretrained
from mygpt.config import GPTConfig
from mygpt.model import GPT
from shards import stored_json


@dataclass(frozen=True)
class Imported:
    """A model with what its checkpoint says of its training."""

    model: GPT
    step: int | None
    val_loss: float | None


@dataclass(frozen=True)
class _ModelArgs:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True


@dataclass(frozen=True)
class _Checkpoint:
    """Fields of `ckpt.pt` beside the weights."""

    model_args: _ModelArgs
    iter_num: int | None = None
    best_val_loss: float | None = None


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
    if not isinstance(raw["model"], dict) or not all(map(torch.is_tensor, raw["model"].values())):
        raise ValueError(f"expected a dictionary of tensors as model in {path}, found another one")
    tensors = pretrained.our_names(raw["model"], wrapper="_orig_mod.")
    if torch.is_tensor(loss := raw.get("best_val_loss")) and loss.numel() == 1:
        raw["best_val_loss"] = loss.item()
    about = stored_json.build(_Checkpoint, raw, path, ignore_unknown=True, remedy="save it again")
    args = about.model_args
    config = GPTConfig(
        block_size=args.block_size,
        vocab_size=args.vocab_size,
        n_layers=args.n_layer,
        n_heads=args.n_head,
        n_embed=args.n_embd,
        dropout=args.dropout,
        bias=args.bias,
    )
    model = pretrained.build(config, tensors, path)
    return Imported(model.eval(), about.iter_num, about.best_val_loss)
