"""What is evaluated or compared: a checkpoint of a run, or a GPT-2 in Hugging Face's format."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mygpt import checkpoint, pretrained, run_config
from mygpt.model import GPT
from mygpt.settings import TrainConfig


@dataclass(frozen=True)
class Subject:
    """A model that was found but not read yet. `find` makes one."""

    name: str  # the folder it lies in, or its name on the hub
    config: TrainConfig | None = None  # None for Hugging Face's format, as is what a run knows
    state: dict[str, Any] = field(default_factory=dict)  # the checkpoint's state.json

    @property
    def run(self) -> Path | None:
        """The run that the checkpoint lies in, if it lies in one."""
        folder = Path(self.name)
        is_in_run = self.config is not None and folder.parent.name == "checkpoints"
        return folder.parents[1] if is_in_run else None

    def facts(self, model: GPT) -> dict[str, Any]:
        """Which model it is, as JSON values; `model` is what was loaded."""
        return {
            "checkpoint": self.name,
            "step": self.state.get("step"),
            "max_steps": self.config and self.config.max_steps,
            "parameters": model.num_params(),
            "trained_on": self.state.get("fingerprint"),
        }

    def load(self) -> GPT:
        """The model, in evaluation mode, on the CPU, as float32."""
        if self.config is None:
            return pretrained.from_pretrained(self.name).eval()
        model = GPT(self.config.model).eval()
        checkpoint.load_model(Path(self.name), model)
        return model


def find(target: str | None, best: bool = False) -> Subject:
    """The subject that a command line names.

    A run (of which the newest checkpoint, or with `best` the best by validation), a checkpoint, a
    folder or a name on the hub in Hugging Face's format; None is the newest run under log/. Raises
    FileNotFoundError or ValueError where there is none.
    """
    run = checkpoint.newest_run(Path("log")) if target is None else Path(target)
    if (run / "state.json").is_file():
        return _of_checkpoint(run)
    if _is_pretrained(run):
        return Subject(str(run))
    return _of_checkpoint(checkpoint.find(run, best))


def _is_pretrained(path: Path) -> bool:
    """Whether that is a folder of Hugging Face's format, or may be a name on its hub."""
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / "checkpoints").is_dir()
    # "gpt2" or "owner/model"; where the first part is a folder here, something in it was meant.
    is_here = len(path.parts) == 2 and Path(path.parts[0]).is_dir()
    return len(path.parts) <= 2 and not path.is_absolute() and not is_here


def _of_checkpoint(folder: Path) -> Subject:
    state = checkpoint.read_state(folder)
    return Subject(str(folder), run_config.from_json(state["config"]), state)
