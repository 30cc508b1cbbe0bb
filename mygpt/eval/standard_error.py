"""How sure a figure is: standard errors over documents, and over questions.

Tokens of one document are alike, so they are no independent observations: documents are. D is
their number.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, None where a single observation cannot tell."""

    value: float
    error: float | None


def ratio(over: np.ndarray, under: np.ndarray) -> Estimate:
    """sum(over) / sum(under) of documents, (D,) each: nats a token, say, with its error.

    The linearised variance of a ratio of sums, sum((over - ratio * under)^2) * D / (D - 1) /
    sum(under)^2: Cochran, Sampling Techniques, section 6.3. Documents with 0 in both are none.
    """
    counted = (under != 0) | (over != 0)
    over, under = over[counted].astype(np.float64), under[counted].astype(np.float64)
    documents, total = len(under), under.sum()
    value = float(over.sum() / total)
    if documents < 2:
        return Estimate(value, None)
    residuals = over - value * under
    variance = (residuals @ residuals) * documents / (documents - 1) / total**2
    return Estimate(value, math.sqrt(variance))


def proportion(correct: np.ndarray) -> Estimate:
    """The share of the questions, (n,) bool, that were answered correctly."""
    value = float(correct.mean())
    if len(correct) < 2:
        return Estimate(value, None)
    return Estimate(value, math.sqrt(value * (1 - value) / (len(correct) - 1)))
