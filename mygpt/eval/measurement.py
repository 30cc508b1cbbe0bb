"""Everything that one model is asked at an evaluation: the losses of a split, and questions."""

import importlib.metadata
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mygpt.distributed import Ranks, compute_dtype
from mygpt.eval import metrics, multiple_choice
from mygpt.eval.multiple_choice import Answers, Question
from mygpt.evaluate import DocumentWindows, Losses, evaluate_documents
from mygpt.model import GPT


@dataclass(frozen=True)
class Exam:
    """Questions by the name of their file, and what it takes to ask them."""

    questions: dict[str, list[Question]]
    encode: Callable[[str], list[int]]
    eot: int
    kept: Path | None = None  # what is found is kept beside this file: FILE.NAME.IDENTITY.jsonl

    def ask(self, model: GPT, block_size: int, ranks: Ranks, progress: bool) -> dict[str, Answers]:
        """The answers of a model, by the name of the questions' file."""
        answers = {}
        for name, questions in self.questions.items():
            items = None
            if self.kept is not None:
                identity = multiple_choice.identity(model, questions, block_size, ranks.device)
                items = self.kept.with_name(f"{self.kept.stem}.{name}.{identity}.jsonl")
            answers[name] = multiple_choice.answer(
                model, questions, self.encode, self.eot, ranks, block_size, items, progress
            )
        return answers


@dataclass(frozen=True)
class Measured:
    """What was found of one model; no losses where none were asked for."""

    losses: Losses | None
    answers: dict[str, Answers]

    def figures(self, windows: DocumentWindows | None) -> dict[str, Any]:
        """As JSON values; `windows` are those that were measured."""
        answered = {name: metrics.of_answers(answers) for name, answers in self.answers.items()}
        if self.losses is None or windows is None:
            return {"choices": answered}
        return {**metrics.of_documents(self.losses, windows.text_bytes), "choices": answered}

    def against(self, other: "Measured") -> dict[str, Any]:
        """How this model's loss differs from that of another, on the same windows."""
        if self.losses is None or other.losses is None:
            return {}
        return metrics.compared(self.losses, other.losses)


def measure(
    model: GPT,
    block_size: int,
    ranks: Ranks,
    windows: DocumentWindows | None = None,
    exam: Exam | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Measured:
    """Ask a model on all ranks, `block_size` tokens of context at most; the same on all of them.

    Raises ValueError where that is more than the model has.
    """
    if block_size > model.config.block_size:
        raise ValueError(
            f"expected a context of at most {model.config.block_size} tokens, all that the model "
            f"has, found {block_size}: give --block-size {model.config.block_size}"
        )
    losses = None
    if windows is not None:
        losses = evaluate_documents(model, windows, ranks, batch_size, progress)
    return Measured(losses, exam.ask(model, block_size, ranks, progress) if exam else {})


def setting(block_size: int, device: torch.device) -> dict[str, Any]:
    """How models are asked, and by which code, as JSON values."""
    precision = str(compute_dtype(device)).removeprefix("torch.")
    return {
        "block_size": block_size,
        "version": version(),
        "device": device.type,
        "precision": precision,
    }


# --- Which code it was: for figures that somebody may want to find again.


SOURCE = Path(__file__).parents[2]


def version() -> str:
    """myGPT's version, and the commit where the source lies in a git repository.

    A "-dirty" after the commit says that files differ from it.
    """
    try:
        found = f"mygpt {importlib.metadata.version('mygpt')}"
    except importlib.metadata.PackageNotFoundError:
        found = "mygpt"
    if not (SOURCE / ".git").exists() or shutil.which("git") is None:
        return found
    command = ["git", "-C", str(SOURCE), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{found} {done.stdout.strip()}".strip()
