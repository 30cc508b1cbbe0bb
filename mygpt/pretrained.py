"""Models in and out: Hugging Face's GPT-2 folders, and nanoGPT's checkpoints.

    python -m mygpt.pretrained export log/demo exported     a folder for AutoModelForCausalLM
    python -m mygpt.pretrained import ckpt.pt imported      nanoGPT's file as such a folder

What reads such a folder: `from_pretrained` below, so `train.py --init-from` and `eval.py` too.
"""

# torch is imported inside the functions, after the flags are read: `--help` must not wait for it.
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction

from mygpt.config import GPTConfig

if TYPE_CHECKING:
    from mygpt.model import GPT

# Settings that would change the numbers, with the values under which the model is ours. The first
# is what a config.json that lacks the key means.
_SAME_MODEL: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def from_pretrained(
    name_or_folder: str | Path, block_size: int | None = None, dropout: float = 0.0
) -> GPT:
    """The GPT in a folder of Hugging Face's format, or of that name on its hub ("gpt2-medium").

    A folder holds `config.json` and `model.safetensors` (or several `model-*.safetensors`).
    `block_size` keeps only that many positions. The weights are float32, on the CPU. Raises
    FileNotFoundError or ValueError, in one line, for what is not there or no GPT-2.
    """
    from mygpt.hub import hf

    folder = _folder(name_or_folder)
    return hf.load(folder, read_config(folder, block_size, dropout))


def read_config(folder: Path, block_size: int | None = None, dropout: float = 0.0) -> GPTConfig:
    """The shape that `folder/config.json` describes. Raises ValueError if that is no GPT-2."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: name a folder of Hugging Face's")
    values = json.loads(path.read_text("utf-8"))
    if (model_type := values.get("model_type")) != "gpt2":
        raise ValueError(f"{path}: expected model_type gpt2, found {model_type}: take a GPT-2")
    for key, allowed in _SAME_MODEL.items():
        if (value := values.get(key, allowed[0])) not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ValueError(f"{path}: expected {key} {wanted}, found {value}: myGPT has no other")
    positions = values.get("n_positions", 1024)
    if block_size is not None and block_size > positions:
        raise ValueError(
            f"{path}: block_size {block_size} asked for, the model has {positions} positions: "
            f"ask for at most {positions}"
        )
    return GPTConfig(
        block_size=block_size or positions,
        vocab_size=values.get("vocab_size", 50257),
        n_layers=values.get("n_layer", 12),
        n_heads=values.get("n_head", 12),
        n_embed=values.get("n_embd", 768),
        n_hidden=values.get("n_inner") or 0,
        dropout=dropout,
        bias=values.get("bias", True),  # only an export of ours has the key
    )


def _folder(name_or_folder: str | Path) -> Path:
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    from huggingface_hub import snapshot_download  # half a second that a folder does not cost

    try:
        files = ["config.json", "model*.safetensors"]
        return Path(snapshot_download(str(name_or_folder), allow_patterns=files))
    except (OSError, ValueError) as error:  # no network, no such model, not even a name of one
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name_or_folder} is no folder here, and the Hugging Face hub does not give it "
            f"({reason}): name a folder with config.json and model.safetensors"
        ) from error


@dataclass(frozen=True)
class Export:
    """Write a run's model as a folder that Hugging Face's library opens, and prove it equal."""

    run: Positional[Path]  # run, whose newest checkpoint is taken, or checkpoint
    out: Positional[Path]  # the new folder
    best: bool = False  # take the best checkpoint by validation, not the newest
    data: UseAppendAction[tuple[str, ...]] = ()  # the dataset, if it has moved; as in train.py

    def start(self) -> int:
        """Export, and say what was made."""
        from mygpt.hub import export

        print("\n".join(export.export(self.run, self.out, self.best, self.data)))
        return 0


@dataclass(frozen=True)
class Import:
    """Write nanoGPT's checkpoint as such a folder, for train.py --init-from and eval.py."""

    checkpoint: Positional[Path]  # nanoGPT's ckpt.pt, or the folder it lies in
    out: Positional[Path]  # the new folder

    def start(self) -> int:
        """Import, and say what was made."""
        from mygpt.hub import export

        print("\n".join(export.convert(self.checkpoint, self.out)))
        return 0


class Command(Protocol):
    """A subcommand: its fields are its flags."""

    def start(self) -> int:
        """Do it; returns the exit code."""


COMMANDS: dict[str, Callable[..., Command]] = {"export": Export, "import": Import}


def main(args: Sequence[str] | None = None) -> int:
    """Parse the command line and run its command; returns the exit code."""
    command: Command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="python -m mygpt.pretrained",
        description=__doc__,
        args=args,
        config=(FlagCreatePairsOff,),
    )
    try:
        return command.start()
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
