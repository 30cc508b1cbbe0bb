"""Metrics of an evaluation with their standard errors, as the JSON values that eval.py prints.

docs/EVALUATION.md explains each. Errors are over documents: tokens of one document are alike, so
they are no independent observations. D: documents, T: tokens of context.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mygpt.eval.documents import DocumentWindows, Losses
from mygpt.eval.multiple_choice import Answers
from mygpt.evaluate import Loss, unigram_loss
from shards.manifest import Split
from shards.mixture import Mixture
from shards.reader import token_counts

MAX_GROUPS = 1000  # of more sources than that, the smallest are merged
OTHERS = "(others)"
ENOUGH_TOKENS = 10**9  # of training, for the unigram baseline: frequencies no longer change


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, None for a single observation."""

    value: float
    error: float | None


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """sum(numerators) / sum(denominators) over documents, (D,) each, such as nats per token.

    The error is the linearised one of a ratio of sums, the root of sum((numerator - ratio *
    denominator)^2) * D / (D - 1) / sum(denominators)^2: Cochran, Sampling Techniques, section 6.3.
    Documents with 0 in both are not counted.
    """
    counted = (denominators != 0) | (numerators != 0)
    over, under = numerators[counted].astype(float), denominators[counted].astype(float)
    documents, total = len(under), under.sum()
    value = float(over.sum() / total)
    if documents < 2:
        return Estimate(value, None)
    residuals = over - value * under
    variance = (residuals @ residuals) * documents / (documents - 1) / total**2
    return Estimate(value, math.sqrt(variance))


def proportion(correct: np.ndarray) -> Estimate:
    """Share of correct answers among the questions, (n,) bool."""
    value = float(correct.mean())
    if len(correct) < 2:
        return Estimate(value, None)
    return Estimate(value, math.sqrt(value * (1 - value) / (len(correct) - 1)))


def of_documents(losses: Losses, text_bytes: np.ndarray) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of documents with `text_bytes`, (D,), of text."""
    total = losses.total
    return {
        **_estimate("loss", ratio(losses.nats, losses.tokens)),
        "perplexity": total.perplexity,
        **_estimate("bits_per_byte", ratio(losses.nats / math.log(2), text_bytes)),
        "tokens": total.tokens,
        "documents": len(losses.nats),
        "text_bytes": int(text_bytes.sum()),
    }


def of_split(losses: Losses, windows: DocumentWindows, data: Mixture) -> dict[str, Any]:
    """The dataset's identity, the baselines, and the loss by dataset, source and position."""
    text_bytes, total_bytes = windows.text_bytes, int(windows.text_bytes.sum())
    unigram = unigram_loss(training_counts(data), windows)
    uniform = Loss(unigram.tokens * math.log(data.tokenizer.n_vocab), unigram.tokens)
    names = [component.name for component in data.components]
    is_mixture = len(names) > 1
    specs = [f"{c.name}={c.weight:g}:{c.folder}" for c in data.components]
    sources = [
        f"{name}: {source.name}" if is_mixture else source.name
        for name, manifest in zip(names, data.manifests, strict=True)
        for source in manifest.sources
    ]
    return {
        "data": " ".join(specs) if is_mixture else data.components[0].folder,
        "fingerprint": data.fingerprint,
        "generations": data.generations,
        "unigram_loss": unigram.mean,
        "uniform_loss": uniform.mean,
        "baselines": {
            "unigram": _of_baseline(unigram, total_bytes),
            "uniform": _of_baseline(uniform, total_bytes),
        },
        "components": by_group(losses, text_bytes, windows.dataset, names),
        "sources": by_group(losses, text_bytes, windows.source, sources),
        "positions": by_position(losses),
    }


def _of_baseline(loss: Loss, text_bytes: int) -> dict[str, Any]:
    return {
        "loss": loss.mean,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte(text_bytes),
    }


def training_counts(data: Mixture) -> np.ndarray:
    """Occurrences of each token in training, (n_vocab,), datasets weighted as in the mixture.

    Of a dataset much larger than `ENOUGH_TOKENS`, evenly spaced shards are counted.
    """
    counted = []
    for manifest in data.manifests:
        train = manifest.splits["train"]
        some = Split(train.shards[:: max(1, train.tokens // ENOUGH_TOKENS)])
        counted.append(token_counts(replace(manifest, splits={"train": some}), "train"))
    counts = np.array(counted)
    if len(counts) == 1:
        return counts[0]
    weights = np.array(data.weights) / sum(data.weights)
    return counts.sum() * (weights @ (counts / counts.sum(1, keepdims=True)))


def by_group(
    losses: Losses, text_bytes: np.ndarray, groups: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """`of_documents` of each group, the largest first; [] if there is only one.

    Document d is in group `groups[d]`, an index into `names`. The rows together hold every document
    once: of more than `MAX_GROUPS` groups the smallest are merged into one row.
    """
    present, groups = np.unique(groups, return_inverse=True)
    if len(present) < 2:
        return []
    order = np.argsort(-np.bincount(groups, losses.tokens), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    kept = min(len(order), MAX_GROUPS)
    titles = [names[group] for group in present[order[:kept]]]
    if kept < len(order):
        titles.append(OTHERS)
    row = np.minimum(rank[groups], kept)  # of each document, (D,)
    members = np.split(np.argsort(row, kind="stable"), np.cumsum(np.bincount(row))[:-1])
    return [
        {"name": title, **of_documents(losses.part(inside), text_bytes[inside])}
        for title, inside in zip(titles, members, strict=True)
    ]


def by_position(losses: Losses) -> dict[str, Any]:
    """Loss by the number of tokens in the context: for each number, and in doubling bins."""
    nats, tokens = losses.position_nats, losses.position_tokens
    block_size = len(tokens)
    bins, low = [], 1
    for high in [*(2**i for i in range(block_size.bit_length()) if 2**i < block_size), block_size]:
        inside = slice(low - 1, high)
        bins.append({"from": low, "to": high, **_mean(nats[inside].sum(), tokens[inside].sum())})
        low = high + 1
    curve = [_mean(*both) for both in zip(nats, tokens, strict=True)]
    return {
        "bins": bins,
        "loss": [point["loss"] for point in curve],
        "tokens": [point["tokens"] for point in curve],
    }


def compared(losses: Losses, other: Losses) -> dict[str, Any]:
    """The first loss minus the other on the same documents; the error is that of the difference."""
    return _estimate("difference", ratio(losses.nats - other.nats, losses.tokens))


def compared_in_bits(losses: Losses, other: Losses, text_bytes: np.ndarray) -> dict[str, Any]:
    """The same in bits per byte, whatever the vocabularies; documents have `text_bytes`, (D,)."""
    bits = (losses.nats - other.nats) / math.log(2)
    return _estimate("difference_bits_per_byte", ratio(bits, text_bytes))


def of_answers(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Accuracies by file of questions."""
    return {
        name: {
            "questions": len(found.questions),
            **_estimate("accuracy", proportion(found.is_correct(found.chosen))),
            **_estimate("accuracy_norm", proportion(found.is_correct(found.chosen_norm))),
            "chance": found.chance,
        }
        for name, found in answers.items()
    }


def _estimate(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_se": estimate.error}


def _mean(nats: float, tokens: int) -> dict[str, Any]:
    return {"loss": float(nats / tokens) if tokens else None, "tokens": int(tokens)}
