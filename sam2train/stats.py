"""Means and differences with their intervals: over seeds by Student's t, over videos by bootstrap.

The two answer different questions. Over seeds: would another training say the same? Over videos:
would other videos? An interval over videos of a single run holds for that run's weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sam2train.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

# Below this many videos the resamples are so few that no interval is given. A guess.
MIN_VIDEOS = 5
NUM_RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A mean or a difference of means, and the interval around it, NaN where none can be given."""

    value: float
    low: float
    high: float
    num: int  # how many of `unit` the mean is over; the smaller group's of a difference
    unit: str  # "seed", "video"
    level: float = 0.95

    @property
    def known(self) -> bool:
        return math.isfinite(self.low)

    def text(self, *, sign: bool = False) -> str:
        """`0.412 ± 0.013 (3 seeds)`; brackets where the sides differ, words where none is known.

        Args:
            sign: it is a difference, which is not told without its interval.
        """
        plus = "+" if sign else ""
        count = f"{self.num} {self.unit}{'s' * (self.num != 1)}"
        if not self.known:
            if sign:
                return f"needs more than {count}"
            return f"{self.value:{plus}.3f} ({count}: no interval)"
        if math.isclose(self.value - self.low, self.high - self.value, abs_tol=1e-9):
            return f"{self.value:{plus}.3f} ± {self.high - self.value:.3f} ({count})"
        return f"{self.value:{plus}.3f} [{self.low:{plus}.3f}, {self.high:{plus}.3f}] ({count})"


def mean_interval(values: Sequence[float], *, unit: str = "seed", level: float = 0.95) -> Interval:
    """The mean with its t interval; one value has a mean and no interval.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    values = np.asarray(values, np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"a mean of {values.tolist()}; expected one finite number or more")
    if len(values) == 1:
        return Interval(float(values[0]), math.nan, math.nan, 1, unit, level)
    error = values.std(ddof=1) / math.sqrt(len(values))
    return _around(float(values.mean()), error, len(values) - 1, len(values), unit, level)


def seed_difference(
    first: Mapping[int, float], second: Mapping[int, float], *, level: float = 0.95
) -> Interval:
    """Mean of `second` minus mean of `first`, seed -> score each, with its t interval.

    Where both hold the same seeds, the difference is taken seed by seed: equal seeds see the same
    prompts and clips. Otherwise it is Welch's interval, which allows unequal spreads.
    """
    if first.keys() == second.keys():
        return mean_interval([second[s] - first[s] for s in first], unit="paired seed", level=level)
    samples = [np.array(list(scores.values()), np.float64) for scores in (first, second)]
    value = float(samples[1].mean() - samples[0].mean())
    num = min(map(len, samples))
    if num == 1:
        return Interval(value, math.nan, math.nan, 1, "seed", level)
    squares = [sample.var(ddof=1) / len(sample) for sample in samples]
    freedom = [len(sample) - 1 for sample in samples]
    # Welch-Satterthwaite; without any spread the degrees of freedom do not matter.
    parts = sum(square**2 / free for square, free in zip(squares, freedom, strict=True))
    free = sum(squares) ** 2 / parts if parts else sum(freedom)
    return _around(value, math.sqrt(sum(squares)), free, num, "seed", level)


def paired_bootstrap(
    first: pd.DataFrame,
    second: pd.DataFrame,
    metric: str = "J_and_F",
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean over objects of `second` minus `first`, with its interval over videos.

    Whole videos are drawn with replacement, the same ones for both, since the objects of a video
    succeed and fail together. The interval is the percentile interval, expanded for the number of
    videos (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015): the plain percentile
    and BCa are too narrow for a dozen videos. In simulations with 12 the 95 % interval covered
    93 % (normal) and 92 % (exponential) of the time; plain percentile 89 % and 89 %.

    Args:
        first, second: rows as in `scores.csv`, one split and step; the rows of several runs, such
            as the seeds of a group, are averaged per object before.
        seed: of the resampling.

    Raises:
        UserError: the two do not hold the same objects of the same videos.
    """
    from scipy import stats

    means = [frame.groupby(["video_id", "object_id"])[metric].mean() for frame in (first, second)]
    if odd := sorted({*means[0].index} ^ {*means[1].index}, key=str):
        shown = ", ".join(f"object {o} of video {v}" for v, o in odd[:3])
        raise UserError(
            f"scored on different objects: {shown}{' and more' * (len(odd) > 3)} in one only; "
            "compare runs that were scored on the same videos"
        )
    # Without a frame to score, an object has no score in either.
    by_video = (means[1] - means[0]).dropna().groupby("video_id").agg(["sum", "count"])
    if by_video.empty:
        raise UserError(f"no object has a {metric} in both; nothing to compare")
    totals, counts = (by_video[name].to_numpy(np.float64) for name in ("sum", "count"))
    num = len(by_video)
    value = float(totals.sum() / counts.sum())
    if num < MIN_VIDEOS:
        return Interval(value, math.nan, math.nan, num, "video", level)
    tail = stats.norm.cdf(math.sqrt(num / (num - 1)) * stats.t.ppf((1 - level) / 2, num - 1))
    found = stats.bootstrap(
        (totals, counts),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=1000,
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high), num, "video", level)


def _around(value: float, error: float, free: float, num: int, unit: str, level: float) -> Interval:
    from scipy import stats

    half = float(stats.t.ppf((1 + level) / 2, free) * error)
    return Interval(value, value - half, value + half, num, unit, level)
