"""The model to evaluate, and the version of the code: what results are labelled with."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mygpt
from mygpt import checkpoint, pretrained, run_config
from mygpt.model import GPT
from mygpt.settings import TrainConfig, only_dataset
from shards.manifest import TokenizerIdentity
from shards.mixture import Mixture
from shards.tokenizer import Tokenizer, open_tokenizer, tokenizer_beside
from shards.tokenizer import load as load_tokenizer

SOURCE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """A checkpoint of a run, or a GPT-2 in Hugging Face's format, not loaded yet; see `find`."""

    name: str  # its folder, or its name on the hub
    config: TrainConfig | None = None  # of the run; None for Hugging Face's format
    state: dict[str, Any] = field(default_factory=dict)  # the checkpoint's state.json

    @property
    def run(self) -> Path | None:
        """The run that the checkpoint lies in, if any."""
        folder = Path(self.name)
        is_in_run = self.config is not None and folder.parent.name == "checkpoints"
        return folder.parents[1] if is_in_run else None

    def identity(self, model: GPT) -> dict[str, Any]:
        """The fields of eval.json that say which model it is; `model` is what `load` returned."""
        return {
            "checkpoint": self.name,
            "step": self.state.get("step"),
            "max_steps": self.config and self.config.max_steps,
            "parameters": model.num_params(),
            "trained_on": self.state.get("fingerprint"),
        }

    def open_data(self, specs: Sequence[str] = ()) -> Mixture:
        """Open the dataset that the model was trained on.

        `specs` says where it lies, if it has moved or the model does not record it. Raises as
        `Mixture.load` does, and if there is none or another one.
        """
        if self.config is None:
            return Mixture.load(specs or [str(only_dataset())])
        generations, fingerprint = self.state["generations"], self.state["fingerprint"]
        return Mixture.load(specs or self.config.data, generations, expect=fingerprint)

    def tokenizer(self, specs: Sequence[str] = (), data: Mixture | None = None) -> Tokenizer:
        """Open the tokenizer of `data`, by default the model's dataset.

        If that is not here it is the one beside the model, without one GPT-2's.
        """
        if data is None and self.config is None:
            return pretrained.read_tokenizer(self.name) or load_tokenizer()
        try:
            data = data or self.open_data(specs)
        except FileNotFoundError:
            return tokenizer_beside(self.name)
        return open_tokenizer(data.tokenizer, self.name, *data.locations)

    def other_tokenizer(
        self, identity: TokenizerIdentity, data: Mixture | None = None
    ) -> Tokenizer | None:
        """Return the model's tokenizer if it is known to be another than that of the dataset."""
        if data and self.state.get("fingerprint") == data.fingerprint:
            return None
        return pretrained.other_tokenizer(self.name, identity)

    def check_vocabulary(self, data: Mixture) -> None:
        """Raise ValueError if the model's tokenizer is known and is not that of the dataset."""
        if self.state.get("fingerprint") != data.fingerprint:
            remedy = ", or give the model as --reference"
            pretrained.check_vocabulary(self.name, data.tokenizer, remedy)

    def load(self, device: torch.device, n_vocab: int = 0, block_size: int = 0) -> GPT:
        """Load the model in evaluation mode, float32.

        Raises ValueError if it has fewer token ids than `n_vocab` or a context below `block_size`.
        """
        model = pretrained.from_pretrained(self.name)
        if model.config.vocab_size < n_vocab:
            raise ValueError(
                f"expected a model of the dataset's {n_vocab} token ids, found one of "
                f"{model.config.vocab_size} in {self.name}: they have different tokenizers"
            )
        if model.config.block_size < block_size:
            raise ValueError(
                f"expected a context of at most {model.config.block_size} tokens, all that "
                f"{self.name} has, found {block_size}: give --block-size {model.config.block_size}"
            )
        return model.eval().to(device)


def find(name: str | None, best: bool = False) -> Target:
    """Find the model that a command line names.

    `name` is a run (its newest checkpoint, or with `best` the best by validation), a checkpoint, a
    folder of Hugging Face's format or a name on its hub; None is the newest run under log/. Raises
    FileNotFoundError or ValueError if there is none.
    """
    path = checkpoint.newest_run(Path("log")) if name is None else Path(name)
    if not (path / "state.json").is_file() and _is_pretrained(path):
        return Target(str(path))
    folder = checkpoint.find(path, best)
    state = checkpoint.read_state(folder)
    return Target(str(folder), run_config.from_dict(state["config"], folder), state)


def _is_pretrained(path: Path) -> bool:
    """True for a folder of Hugging Face's format, and for what may be a name on its hub."""
    if path.is_dir():
        is_run = (path / "checkpoints").is_dir() or (path / "log.txt").is_file()
        return (path / "config.json").is_file() and not is_run
    # "gpt2" or "owner/model", unless "owner" is a folder here, or log: then a path was meant.
    owner = path.parts[0] if len(path.parts) == 2 else ""
    is_here = owner == "log" or (bool(owner) and Path(owner).is_dir())
    return len(path.parts) <= 2 and not path.is_absolute() and not is_here


def version() -> str:
    """myGPT's version, and the commit if the source lies in a git repository.

    "-dirty" after the commit means that files differ from it.
    """
    release = f"mygpt {mygpt.__version__}"
    if not (SOURCE / ".git").exists() or shutil.which("git") is None:
        return release
    command = ["git", "-C", str(SOURCE), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{release} {done.stdout.strip()}".strip()
