"""Means, differences and what they are worth: Student's t throughout.

A sample is one number per repetition: per seed, or per held-out window where the windows are the
repetitions. Nothing is said of what one number cannot tell: below two, everything but the mean is
NaN. Holm, Scandinavian Journal of Statistics, 1979, for several comparisons at once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean, its confidence interval, and the probability of one as far from zero by chance."""

    n: int
    mean: float
    standard_error: float
    low: float
    high: float
    p: float  # two-sided


def estimate(sample: Float[np.ndarray, "n"], confidence: float = CONFIDENCE) -> Estimate:
    """Of the mean of what the sample was drawn from.

    Raises ValueError if the sample is empty.
    """
    n = len(sample)
    if not n:
        raise ValueError("sample is empty: a mean needs at least one number.")
    mean = float(np.mean(sample))
    if n == 1:
        return Estimate(1, mean, math.nan, math.nan, math.nan, math.nan)
    error = float(np.std(sample, ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return Estimate(n, mean, error, mean - reach, mean + reach, _two_sided(mean, error, n))


def _two_sided(mean: float, error: float, n: int) -> float:
    """Of Student's t. Repetitions that agree exactly leave no doubt about their mean."""
    if error == 0:
        return 0.0 if mean else 1.0
    return 2 * float(stats.t.sf(abs(mean) / error, n - 1))


def paired(first: Float[np.ndarray, "n"], second: Float[np.ndarray, "m"]) -> Estimate:
    """Of the mean of first − second, where the two are of the same windows or seeds in order.

    What the repetitions share cancels, so far smaller differences show than between two means.
    Raises ValueError if they differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} numbers and second {len(second)}: not pairs.")
    return estimate(first - second)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values adjusted so that all of them hold at once; NaN, which tested nothing, stays.

    The k-th smallest of m counts m − k + 1 times, and none less than a smaller one.
    """
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    adjusted, largest = list(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted
