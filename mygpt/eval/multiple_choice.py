"""Multiple-choice questions, such as HellaSwag's, scored by the likelihood of each ending.

A file holds one JSON object per line: `ctx`, the text so far; `endings`, its possible
continuations; `label`, the index of the right one. Scores are those of lm-evaluation-harness
(0.4.13): the log-probability of " " + ending after the context, without <|endoftext|> before it,
the context cut from the left if both don't fit.

Scores are appended to an items file, one line per question, from which a killed evaluation resumes.
"""

import json
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from mygpt.distributed import DistributedContext, compute_dtype, padded_length
from mygpt.evaluate import default_batch_size, progress_bar, token_losses
from mygpt.model import GPT
from shards import stored_json
from shards.tokenizer import Tokenizer

# Its validation questions, as its authors published them.
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
# Questions per rank between two writes to the items file: enough to keep the device busy.
QUESTIONS_PER_ROUND = {"cpu": 16, "mps": 256, "cuda": 256}


@dataclass(frozen=True)
class Question:
    """A context, the endings to choose from, and the index of the right one."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Answers:
    """The log-probability in nats of every ending of every question."""

    questions: list[Question]
    scores: list[list[float]]

    @property
    def chosen(self) -> list[int]:
        """The likeliest ending of each question, the first of equals."""
        return [int(np.argmax(scores)) for scores in self.scores]

    @property
    def chosen_norm(self) -> list[int]:
        """The likeliest ending by log-probability per character."""
        lengths = [[len(ending) for ending in question.endings] for question in self.questions]
        return [
            int(np.argmax([s / n if n else -math.inf for s, n in zip(*both, strict=True)]))
            for both in zip(self.scores, lengths, strict=True)
        ]

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return float(np.mean([1 / len(question.endings) for question in self.questions]))

    def is_correct(self, chosen: list[int]) -> np.ndarray:
        """Compare chosen endings with the labels: (n,) bool."""
        return np.array(chosen) == np.array([question.label for question in self.questions])


def read(path: Path, hellaswag: bool = False) -> list[Question]:
    """Read the questions of a file, contexts and endings as they are.

    With `hellaswag`, as lm-evaluation-harness reads that benchmark: the activity before the
    context, WikiHow's marks in brackets removed. Raises FileNotFoundError if there is no file, and
    ValueError, naming the line, for one that is no question.
    """
    questions = []
    if not path.is_file():
        remedy = f"get it by curl -LO {HELLASWAG}" if hellaswag else "check the path"
        raise FileNotFoundError(f"expected questions in {path}, found no such file: {remedy}")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    questions.append(_question(stored_json.parse(line, path), hellaswag))
                except (ValueError, KeyError, TypeError, OverflowError) as error:
                    raise ValueError(
                        f"{path}, line {number}: expected an object with ctx, endings and a label "
                        f"among them, found something else ({type(error).__name__}: {error})"
                    ) from None
    if not questions:
        raise ValueError(f"expected questions in {path}, found none: one JSON object per line")
    return questions


def _question(raw: dict[str, Any], hellaswag: bool) -> Question:
    context, endings, label = raw["ctx"], raw["endings"], int(raw["label"])
    extra = [raw[key] for key in ("ctx_a", "ctx_b", "activity_label") if key in raw]
    if not isinstance(endings, list) or not all(
        isinstance(text, str) for text in (context, *endings, *extra)
    ):
        raise TypeError("ctx must be text, endings a list of texts")
    if isinstance(raw["label"], float | bool):
        raise TypeError("label must be an integer")
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
    # The steps of lm-evaluation-harness in their order, so that the tokens are the same.
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def answer(
    model: GPT,
    questions: list[Question],
    tokenizer: Tokenizer,
    ranks: DistributedContext,
    block_size: int,
    items: Path | None = None,
    progress: bool = False,
) -> Answers:
    """Score every ending of every question; the same on all ranks.

    Ranks divide the questions, round by round. After each round the main rank appends its scores to
    `items`; what that file holds already is not computed again. Raises ValueError for an ending
    that does not fit the block.
    """
    ends = np.cumsum([len(question.endings) for question in questions]).tolist()
    spans = [slice(end - len(q.endings), end) for q, end in zip(questions, ends, strict=True)]
    scores = _stored(items, spans, ranks)
    todo = [i for i, span in enumerate(spans) if np.isnan(scores[span]).any()]
    todo.sort(key=lambda i: len(questions[i].context))  # similar lengths together: less padding
    size = ranks.world_size * QUESTIONS_PER_ROUND[ranks.device.type]
    rounds = [todo[first : first + size] for first in range(0, len(todo), size)]
    for round_ in progress_bar(rounds, progress and ranks.is_main):
        own = round_[ranks.rank :: ranks.world_size]
        new = np.zeros_like(scores)
        windows = [w for i in own for w in _windows(questions[i], tokenizer, block_size)]
        new[[j for i in own for j in range(ends[i])[spans[i]]]] = _log_probabilities(
            model, windows, ranks.device
        )
        new = np.array(ranks.all_reduce_sum(new.tolist()))
        for i in round_:
            scores[spans[i]] = new[spans[i]]
        if items is not None and ranks.is_main:
            _append(items, {i: scores[spans[i]].tolist() for i in round_})
    return Answers(questions, [scores[span].tolist() for span in spans])


def items_file(
    document: Path,
    name: str,
    model: GPT,
    questions: list[Question],
    block_size: int,
    device: torch.device,
) -> Path:
    """The items file beside `document`; its name has a hash of all that decides the scores."""
    digest = xxhash.xxh3_64(repr((questions, block_size, compute_dtype(device))).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return document.with_name(f"{document.stem}.{name}.{digest.hexdigest()}.jsonl")


def _windows(
    question: Question, tokenizer: Tokenizer, block_size: int
) -> list[tuple[np.ndarray, int]]:
    """For each ending the last `block_size` + 1 tokens of the text, and how many are its own."""
    context = question.context.rstrip()
    space = question.context[len(context) :] + " "  # GPT-2's words begin with their space
    before = tokenizer.encode(context) or [tokenizer.eot]
    windows = []
    for ending in question.endings:
        whole = tokenizer.encode(context + space + ending)
        own = whole[len(before) if context else 0 :]
        if len(own) > block_size:
            raise ValueError(
                f"expected endings of at most {block_size} tokens, the model's context, found one "
                f"of {len(own)} after {question.context[-40:]!r}: leave that question out"
            )
        windows.append((np.array((before + own)[-block_size - 1 :]), len(own)))
    return windows


def _log_probabilities(
    model: GPT, windows: list[tuple[np.ndarray, int]], device: torch.device
) -> list[float]:
    """The log-probability of each window's own tokens, in nats."""
    if not windows:
        return []
    ids = [window for window, _ in windows]
    longest = padded_length(max(map(len, ids)), model.config.block_size, device)
    size = default_batch_size(longest, device)
    found = []
    for batch, losses, _ in token_losses(model, ids, DistributedContext(0, 0, 1, device), size):
        for i, nats in zip(batch, losses, strict=True):
            last = len(ids[i]) - 1
            found.append(-float(nats[last - windows[i][1] : last].sum()))
    return found


def _stored(items: Path | None, spans: list[slice], ranks: DistributedContext) -> np.ndarray:
    """The scores in the main rank's items file, NaN where there is none; the same on all ranks."""
    scores = np.full(spans[-1].stop, math.nan)
    by_item = dict(enumerate(spans))
    if items is not None and items.is_file() and ranks.is_main:
        whole, newline, torn = items.read_bytes().rpartition(b"\n")
        if torn:  # a killed writer left half a line: the next one must not be glued to it
            os.truncate(items, len(whole) + len(newline))
        for line in whole.splitlines():
            with suppress(ValueError):  # a damaged line: its question is scored again
                stored = stored_json.build(_Item, stored_json.parse(line, items), items)
                span = by_item.get(stored.item, slice(0))
                if len(stored.log_probabilities) == len(scores[span]):
                    scores[span] = stored.log_probabilities
    shared = ranks.all_reduce_sum([*np.nan_to_num(scores), *~np.isnan(scores)])
    values, is_stored = np.split(np.array(shared), 2)
    return np.where(is_stored > 0, values, math.nan)


@dataclass(frozen=True)
class _Item:
    """A line of the items file."""

    item: int
    log_probabilities: list[float]


def _append(items: Path, scores: dict[int, list[float]]) -> None:
    lines = [json.dumps({"item": i, "log_probabilities": found}) for i, found in scores.items()]
    with open(items, "a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
