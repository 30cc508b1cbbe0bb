"""Multiple-choice questions, HellaSwag's above all: which ending does the model find likeliest?

A file holds a JSON object a line: `ctx`, the text so far; `endings`, the texts it may go on with;
`label`, the index of the right one. Scores are those of lm-evaluation-harness (0.4.13), ending by
ending: the log-probability of " " + ending after the context, without <|endoftext|> before it, the
context cut from the left where both do not fit.

What was found is kept in an items file, a line a question: a killed evaluation goes on from there.
"""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from mygpt.distributed import Ranks, compute_dtype
from mygpt.eval.standard_error import Estimate, proportion
from mygpt.evaluate import default_batch_size, shown, token_losses
from mygpt.model import GPT

# Questions that a rank answers between two writes to the items file: enough to keep it busy.
ROUND, ROUND_ON_CPU = 256, 16


@dataclass(frozen=True)
class Question:
    """A context, the endings to choose from, and the index of the right one."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Answers:
    """For each question the log-probability of every ending, in nats."""

    questions: list[Question]
    scores: list[list[float]]

    @property
    def chosen(self) -> list[int]:
        """The likeliest ending of each question, the first of equals."""
        return [int(np.argmax(scores)) for scores in self.scores]

    @property
    def chosen_norm(self) -> list[int]:
        """The likeliest by log-probability a character."""
        lengths = [[len(ending) for ending in question.endings] for question in self.questions]
        return [
            int(np.argmax([s / n if n else -math.inf for s, n in zip(*both, strict=True)]))
            for both in zip(self.scores, lengths, strict=True)
        ]

    @property
    def accuracy(self) -> Estimate:
        """How often the likeliest ending is the right one."""
        return self._right(self.chosen)

    @property
    def accuracy_norm(self) -> Estimate:
        """How often the likeliest by log-probability a character is."""
        return self._right(self.chosen_norm)

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return float(np.mean([1 / len(question.endings) for question in self.questions]))

    def _right(self, chosen: list[int]) -> Estimate:
        labels = [question.label for question in self.questions]
        return proportion(np.array(chosen) == np.array(labels))


def read(path: Path, hellaswag: bool = False) -> list[Question]:
    """The questions of a file, its contexts and endings as they stand.

    With `hellaswag` as lm-evaluation-harness reads that benchmark: the activity before the context,
    WikiHow's marks in brackets taken out. Raises FileNotFoundError where there is no file, and
    ValueError, naming the line, for one that is no question.
    """
    questions = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    questions.append(_question(json.loads(line), hellaswag))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{path}, line {number}: expected an object with ctx, endings and a label "
                        f"among them, found something else ({type(error).__name__}: {error})"
                    ) from None
    if not questions:
        raise ValueError(f"expected questions in {path}, found none: a JSON object a line")
    return questions


def _question(raw: dict[str, Any], hellaswag: bool) -> Question:
    context, endings, label = raw["ctx"], raw["endings"], int(raw["label"])
    if not all(isinstance(text, str) for text in (context, *endings)):
        raise TypeError("ctx and endings must be text")
    if hellaswag:
        if "ctx_a" in raw and "ctx_b" in raw:
            context = f"{raw['ctx_a']} {raw['ctx_b'].capitalize()}"
        if "activity_label" in raw:
            context = f"{raw['activity_label']}: {context}"
        context, endings = _clean(context), [_clean(ending) for ending in endings]
    if not 0 <= label < len(endings):
        raise ValueError(f"label {label} of {len(endings)} endings")
    return Question(context, tuple(endings), label)


def _clean(text: str) -> str:
    # What lm-evaluation-harness does to HellaSwag's text, step by step, for the same tokens.
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def answer(
    model: GPT,
    questions: list[Question],
    encode: Callable[[str], list[int]],
    eot: int,
    ranks: Ranks,
    block_size: int,
    items: Path | None = None,
    progress: bool = False,
) -> Answers:
    """Score every ending of every question; the same on all ranks.

    Ranks share out the questions, round by round. After each the main rank appends to `items` what
    was found, and what is there already is not computed again. Raises ValueError for an ending
    that does not fit the block.
    """
    ends = np.cumsum([len(question.endings) for question in questions]).tolist()
    spans = [slice(end - len(q.endings), end) for q, end in zip(questions, ends, strict=True)]
    scores = _known(items, spans, ranks)
    # Those of like length together, so that little is padding.
    todo = [i for i, span in enumerate(spans) if np.isnan(scores[span]).any()]
    todo.sort(key=lambda i: len(questions[i].context))
    size = ranks.world_size * (ROUND_ON_CPU if ranks.device.type == "cpu" else ROUND)
    rounds = [todo[first : first + size] for first in range(0, len(todo), size)]
    for here in shown(rounds, len(rounds), progress and ranks.is_main):
        own = here[ranks.rank :: ranks.world_size]
        found = np.zeros_like(scores)
        rows = [row for i in own for row in _rows(questions[i], encode, eot, block_size)]
        places = [place for i in own for place in range(ends[i])[spans[i]]]
        found[places] = _log_probabilities(model, rows, ranks.device)
        found = np.array(ranks.all_reduce_sum(found.tolist()))
        for i in here:
            scores[spans[i]] = found[spans[i]]
        if items is not None and ranks.is_main:
            _append(items, {i: scores[spans[i]].tolist() for i in here})
    return Answers(questions, [scores[span].tolist() for span in spans])


def identity(model: GPT, questions: list[Question], block_size: int, device: torch.device) -> str:
    """Names what decides the scores: the weights, the questions, the context, the precision."""
    found = xxhash.xxh3_64(repr((questions, block_size, compute_dtype(device))).encode())
    for parameter in model.parameters():
        found.update(parameter.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


def _rows(
    question: Question, encode: Callable[[str], list[int]], eot: int, block_size: int
) -> list[tuple[np.ndarray, int]]:
    """For each ending the last `block_size` + 1 tokens of the text, and how many are its own."""
    context = question.context.rstrip()
    space = question.context[len(context) :] + " "  # a word's space is in the word's token
    begun = encode(context) or [eot]
    rows = []
    for ending in question.endings:
        whole = encode(context + space + ending)
        own = whole[len(begun) if context else 0 :]
        if len(own) > block_size:
            raise ValueError(
                f"expected endings of at most {block_size} tokens, the model's context, found one "
                f"of {len(own)} after {question.context[-40:]!r}: leave that question out"
            )
        rows.append((np.array((begun + own)[-block_size - 1 :]), len(own)))
    return rows


def _log_probabilities(
    model: GPT, rows: list[tuple[np.ndarray, int]], device: torch.device
) -> list[float]:
    """What the model gives to the last tokens of each row, in nats."""
    if not rows:
        return []
    ids = [row for row, _ in rows]
    size = default_batch_size(max(map(len, ids)), device)
    found = []
    for batch, losses, _ in token_losses(model, ids, Ranks(0, 0, 1, device), size):
        for i, row in zip(batch, losses, strict=True):
            last = len(ids[i]) - 1
            found.append(-float(row[last - rows[i][1] : last].sum()))
    return found


def _known(items: Path | None, spans: list[slice], ranks: Ranks) -> np.ndarray:
    """The scores that the main rank finds in the items file, NaN for the others; on all ranks."""
    scores = np.full(spans[-1].stop, math.nan)
    if items is not None and items.exists() and ranks.is_main:
        whole, newline, torn = items.read_bytes().rpartition(b"\n")
        if torn:  # a killed writer left half a line: what comes next must not be glued to it
            os.truncate(items, len(whole) + len(newline))
        for line in whole.splitlines():
            record = json.loads(line)
            scores[spans[record["item"]]] = record["log_probabilities"]
    shared = ranks.all_reduce_sum([*np.nan_to_num(scores), *~np.isnan(scores)])
    values, there = np.split(np.array(shared), 2)
    return np.where(there > 0, values, math.nan)


def _append(items: Path, scores: dict[int, list[float]]) -> None:
    lines = [json.dumps({"item": i, "log_probabilities": found}) for i, found in scores.items()]
    with open(items, "a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
