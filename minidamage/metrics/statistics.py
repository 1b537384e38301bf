"""How sure a number is: bootstrap intervals over pictures. Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993."""
import dataclasses

import numpy as np


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
    drawn = np.array([number(rng.integers(0, len(values), len(values))) for _ in range(samples)])
    known = drawn[~np.isnan(drawn)]                                   # NaN: a draw where the statistic has no value
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (np.nan, np.nan)
    return Interval(number(slice(None)), float(low), float(high), level, drawn)
