"""How sure a number is: bootstrap intervals over pictures, and the signed-rank test over data sets.

Sources: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993; F. Wilcoxon, Individual comparisons by ranking methods, 1945;
S. Holm, A simple sequentially rejective multiple test procedure, 1979.
"""
import dataclasses
import math

import numpy as np

LARGEST_EXACT = 50                                            # pairs without ties; with ties LARGEST_ENUMERATED
LARGEST_ENUMERATED = 13                                       # 2**13 sign patterns


@dataclasses.dataclass(frozen=True)
class Interval:
    """value: the statistic of the data as it is; low, high: percentile interval at `level`; samples [B]: the resampled values."""

    value: float
    low: float
    high: float
    level: float
    samples: np.ndarray = dataclasses.field(repr=False, compare=False, default=None)


def bootstrap(values, statistic=np.nanmean, other=None, level=0.95, samples=2000, seed=0):
    """The Interval of statistic(values), pictures drawn again with replacement; with `other`, of the paired difference.

    values: [N, ...], one row a picture (per-image IoU, or counts to be pooled by `statistic`). statistic: function of [N, ...] -> number.
    other: [N, ...] of a second model on the *same pictures in the same order*; the interval is that of statistic(values) -
    statistic(other) with the same pictures drawn for both, so that what makes a picture hard cancels. An interval without 0 is a
    difference at this level.
    Raises ValueError without rows, for two models of different length, and for a level outside (0, 1).
    """
    values = np.asarray(values)
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(f"bootstrap expects one row a picture, got shape {list(values.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"bootstrap expects a level between 0 and 1 such as 0.95, got {level}")
    both = [values]
    if other is not None:
        other = np.asarray(other)
        if len(other) != len(values):
            raise ValueError(f"bootstrap expects the two models on the same pictures, got {len(values)} and {len(other)} of them")
        both.append(other)

    def number(rows):
        parts = [float(statistic(v[rows])) for v in both]
        return parts[0] - parts[1] if len(parts) == 2 else parts[0]

    rng = np.random.default_rng(seed)
    return percentiles(number(slice(None)), np.array([number(rng.integers(0, len(values), len(values))) for _ in range(samples)]), level)


def percentiles(value, drawn, level=0.95):
    """The Interval of a value from what it was in B draws [B]; NaN: a draw where it has none."""
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (np.nan, np.nan)
    return Interval(value, float(low), float(high), level, drawn)


def chance(interval):
    """Two-sided p of "there is no difference", from the bootstrap draws of one: twice the share of draws on the other side of 0, with one
    draw more on that side, so that B draws give no p below 2 / (B + 1). It is about other pictures, not about another training. NaN
    without draws.
    """
    drawn = interval.samples[~np.isnan(interval.samples)]
    if len(drawn) == 0:
        return float("nan")
    return min(1.0, 2 * (1 + float(min((drawn <= 0).sum(), (drawn >= 0).sum()))) / (len(drawn) + 1))


# ---------------------------------------------------------------------------------------------- over data sets

@dataclasses.dataclass(frozen=True)
class SignedRank:
    """statistic: the smaller of the two rank sums; p: two-sided; n: pairs that differ; method: "exact" or "normal"."""

    statistic: float
    p: float
    n: int
    method: str


def wilcoxon(a, b):
    """Wilcoxon's signed-rank test of paired values (one model's and another's, a value a data set): could the differences be chance?

    Pairs without a difference are left out; equal differences share their mean rank. The p-value is exact where all 2**n signs can be
    counted: up to 50 pairs without ties or zeros, up to 13 with them; else the normal approximation, corrected for ties but not for
    continuity. Equal to scipy's `wilcoxon` with its defaults, but for pairs that never differ: p is then 1. Ten data sets that all point
    one way give 2 / 1024 = .00195, which the crack paper's Table 5 prints eight times.
    Raises ValueError for lists of different length, none at all, or values that are not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"wilcoxon expects two lists of paired values, got shapes {list(a.shape)} and {list(b.shape)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("wilcoxon expects finite values; leave out the data sets where one of the two has none")
    differences = a - b
    nonzero = differences[differences != 0]
    n = len(nonzero)
    if n == 0:
        return SignedRank(0.0, 1.0, 0, "exact")
    ranks, ties = _mean_ranks(np.abs(nonzero))
    plus = float(ranks[nonzero > 0].sum())
    minus = n * (n + 1) / 2 - plus
    if len(ties) == n and n == len(a) and n <= LARGEST_EXACT:
        below = _rank_sum_shares(n)[:int(min(plus, minus)) + 1].sum()
        return SignedRank(min(plus, minus), min(1.0, 2 * float(below)), n, "exact")
    if len(a) <= LARGEST_ENUMERATED:
        signs = (np.arange(2 ** n)[:, None] >> np.arange(n)) & 1                          # [2**n, n]
        sums = signs @ ranks
        p = 2 * min((sums <= plus).mean(), (sums >= plus).mean())
        return SignedRank(min(plus, minus), min(1.0, float(p)), n, "exact")
    variance = (n * (n + 1) * (2 * n + 1) - (ties ** 3 - ties).sum() / 2) / 24
    z = abs(plus - n * (n + 1) / 4) / math.sqrt(variance)
    return SignedRank(min(plus, minus), math.erfc(z / math.sqrt(2)), n, "normal")


def _mean_ranks(values):
    """(ranks from 1 up, equal values sharing their mean; how many share each rank)."""
    _, which, ties = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(ties)
    return (last - (ties - 1) / 2)[which], ties


def _rank_sum_shares(n):
    """[n (n + 1) / 2 + 1]: the share of the 2**n sign patterns whose positive ranks sum to each value."""
    shares = np.zeros(n * (n + 1) // 2 + 1)
    shares[0] = 1
    for rank in range(1, n + 1):
        shares[rank:] += shares[:-rank].copy()
        shares /= 2
    return shares


def holm(p_values):
    """[m] p-values adjusted for m tests at once (Holm): those below .05 are differences with a family-wise error of at most .05."""
    p_values = np.asarray(p_values, np.float64)
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)))
    return adjusted


def mean_std(values):
    """(mean, sample standard deviation with n - 1) of the values that are not NaN; NaN where there are too few."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    return (float(values.mean()) if len(values) else float("nan")), (float(values.std(ddof=1)) if len(values) > 1 else float("nan"))
