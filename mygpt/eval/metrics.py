"""The figures of an evaluation, as the JSON values that eval.py prints: docs/EVALUATION.md.

D: documents, T: tokens of context.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mygpt.eval.multiple_choice import Answers
from mygpt.eval.standard_error import Estimate, ratio
from mygpt.evaluate import Loss, Losses

# More sources than that are figures for nobody: the smallest are put together.
MAX_SOURCES = 1000
OTHERS = "(others)"


def of_documents(losses: Losses, text_bytes: np.ndarray) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of documents whose text has `text_bytes`, (D,)."""
    total = losses.total
    return {
        **_estimate("loss", ratio(losses.nats, losses.tokens)),
        "perplexity": total.perplexity,
        **_estimate("bits_per_byte", ratio(losses.nats / math.log(2), text_bytes)),
        "tokens": total.tokens,
        "documents": len(losses.nats),
        "text_bytes": int(text_bytes.sum()),
    }


def of_baseline(loss: Loss, text_bytes: int) -> dict[str, Any]:
    """The same of a model that cannot be unsure of itself."""
    return {
        "loss": loss.mean,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte(text_bytes),
    }


def by_group(
    losses: Losses, text_bytes: np.ndarray, groups: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """`of_documents` for each group of them, the largest first; none for a single group.

    Document d is in group `groups[d]`, an index into `names`. All rows together hold every
    document once: of more than MAX_SOURCES groups the smallest make one row.
    """
    present, groups = np.unique(groups, return_inverse=True)
    if len(present) < 2:
        return []
    sizes = np.bincount(groups, losses.tokens)
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    kept = min(len(order), MAX_SOURCES)
    titles = [names[group] for group in present[order[:kept]]]
    if kept < len(order):
        titles.append(OTHERS)
    places = np.minimum(rank[groups], kept)  # of each document's row
    members = np.split(np.argsort(places, kind="stable"), np.cumsum(np.bincount(places))[:-1])
    return [
        {"name": title, **of_documents(losses.part(inside), text_bytes[inside])}
        for title, inside in zip(titles, members, strict=True)
    ]


def by_position(losses: Losses) -> dict[str, Any]:
    """Loss by how many tokens the model has read: each number of them, and in doubling bins."""
    nats, tokens = losses.position_nats, losses.position_tokens
    block_size = len(tokens)
    bins, low = [], 1
    for high in [*(2**i for i in range(block_size.bit_length()) if 2**i < block_size), block_size]:
        here = slice(low - 1, high)
        bins.append({"from": low, "to": high, **_mean(nats[here].sum(), tokens[here].sum())})
        low = high + 1
    curve = [_mean(*both) for both in zip(nats, tokens, strict=True)]
    return {
        "bins": bins,
        "loss": [point["loss"] for point in curve],
        "tokens": [point["tokens"] for point in curve],
    }


def compared(losses: Losses, other: Losses) -> dict[str, Any]:
    """The first loss less the other, on the same documents, with the error of their differences."""
    return _estimate("difference", ratio(losses.nats - other.nats, losses.tokens))


def of_answers(answers: Answers) -> dict[str, Any]:
    """What part of the questions was answered correctly."""
    return {
        "questions": len(answers.questions),
        **_estimate("accuracy", answers.accuracy),
        **_estimate("accuracy_norm", answers.accuracy_norm),
        "chance": answers.chance,
    }


def _estimate(name: str, found: Estimate) -> dict[str, Any]:
    return {name: found.value, f"{name}_se": found.error}


def _mean(nats: float, tokens: int) -> dict[str, Any]:
    return {"loss": float(nats / tokens) if tokens else None, "tokens": int(tokens)}
