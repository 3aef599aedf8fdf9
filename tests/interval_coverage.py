"""How often intervals over seeds and videos hold the truth, in simulations of every kind.

    python tests/interval_coverage.py

Prints the coverage of 95 % intervals, in percent: `crossed_bounds` on the whole grid, then what
was tried in its place, on 3 seeds. tests/test_stats.py asserts a part of the grid.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from sam2train.stats import crossed_bounds

# Standard deviations between seeds, videos, objects of a video, seeds on a video, seeds on an
# object. The truth is 0.
KINDS = {
    "seed": (1, 0, 0, 0, 0),
    "seed + rest": (1, 0, 0, 1, 1),
    "small seed + rest": (0.4, 0, 0, 1, 1),
    "tiny seed + rest": (0.15, 0, 0, 1, 1),
    "video": (0, 1, 1, 0, 0),
    "video + rest": (0, 1, 1, 1, 1),
    "tiny video + rest": (0, 0.2, 0.2, 1, 1),
    "both": (1, 1, 1, 0, 0),
    "both + rest": (1, 1, 1, 1, 1),
    "seed > video": (1, 0.3, 0.3, 0.3, 0.3),
    "video > seed": (0.3, 1, 1, 0.3, 0.3),
    "rest": (0, 0, 0, 1, 1),
}
NUM_SEEDS, NUM_VIDEOS = (3, 4, 5, 7, 10), (12, 20, 40, 60)


def simulate(rng, repeats, num_seeds, num_videos, kind, *, most=4):
    """Tables (repeats, S, V) of means over objects, one for each of `num_seeds`, and the number of
    objects of each video (repeats, V), from 1 to `most`. The second of two tables has the videos'
    and objects' part of the difference."""
    seed, video, thing, on_video, on_thing = KINDS[kind]
    counts = rng.integers(1, most + 1, (repeats, num_videos))
    spread = 1 / np.sqrt(counts)[:, None, :]
    tables = []
    for num in num_seeds:
        size = (repeats, num, num_videos)
        table = seed * rng.standard_normal((repeats, num, 1))
        table = table + on_video * rng.standard_normal(size)
        tables.append(table + on_thing * spread * rng.standard_normal(size))
    tables[-1] += video * rng.standard_normal((repeats, 1, num_videos))
    tables[-1] += thing * spread * rng.standard_normal((repeats, 1, num_videos))
    return tables, counts


def crossed(tables, counts, rng):
    found = crossed_bounds(tables, counts)
    return found.value, found.half_width()


def satterthwaite(tables, counts, rng):
    """The textbook's variance components, each at least 0, for equal counts."""
    from scipy import stats

    (table,) = tables
    s, v = table.shape[1:]
    rows, columns, mean = table.mean(2), table.mean(1), table.mean((1, 2))
    residual = table - rows[..., None] - columns[:, None] + mean[:, None, None]
    parts = [rows.var(1, ddof=1) / s, columns.var(1, ddof=1) / v]
    rest = (residual**2).sum((1, 2)) / ((s - 1) * (v - 1) * s * v)
    square = sum(np.maximum(part - rest, 0) for part in parts) + rest
    below = parts[0] ** 2 / (s - 1) + parts[1] ** 2 / (v - 1) + rest**2 / ((s - 1) * (v - 1))
    return mean, np.sqrt(square) * stats.t.ppf(0.975, np.maximum(square**2 / below, 1))


def bootstrap(tables, counts, rng, resamples=499):
    """Seeds and videos drawn again together, percentiles."""
    (table,) = tables
    repeats, s, v = table.shape
    means = np.empty((resamples, repeats))
    for k in range(resamples):
        seeds = rng.multinomial(s, np.full(s, 1 / s), repeats)
        videos = rng.multinomial(v, np.full(v, 1 / v), repeats) * counts
        means[k] = np.einsum("rs,rsv,rv->r", seeds, table, videos) / s / videos.sum(1)
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return (low + high) / 2, (high - low) / 2


def coverage(kind, num_seeds, num_videos, *, method=crossed, repeats=4000, most=4, seed=0):
    """The share of `repeats` simulations in which the interval holds the truth.

    Args:
        num_seeds: (S,) of a mean or of paired seeds, or (S of the first, S of the second).
    """
    rng = np.random.default_rng(seed)
    tables, counts = simulate(rng, repeats, num_seeds, num_videos, kind, most=most)
    value, half = method(tables, counts, rng)
    return float(np.mean(np.abs(value) <= half + 1e-12))


def main() -> None:
    print("| seeds | videos | " + " | ".join(KINDS) + " |")
    print("|---" * (len(KINDS) + 2) + "|")
    others = [(3, 3), (5, 5), (10, 10), (3, 10), (2,)]
    for num_seeds in [(num,) for num in NUM_SEEDS] + others:
        for num_videos in (12, 60) if num_seeds in others else NUM_VIDEOS:
            row(num_seeds, num_videos, repeats=10000)
    for method, most, repeats in ((satterthwaite, 1, 10000), (bootstrap, 4, 1000)):
        print(f"\n{method.__name__}, up to {most} objects a video:\n")
        for num_videos in (12, 60):
            row((3,), num_videos, method=method, most=most, repeats=repeats)


def row(num_seeds, num_videos, **settings) -> None:
    cells = [f"{100 * coverage(kind, num_seeds, num_videos, **settings):.1f}" for kind in KINDS]
    names = " and ".join(map(str, num_seeds))
    print(f"| {names} | {num_videos} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
