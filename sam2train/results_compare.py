"""Groups of runs beside each other: intervals over seeds and videos, p values after Holm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sam2train.errors import UserError
from sam2train.results import load_scores
from sam2train.run_folder import RunFolder
from sam2train.stats import (
    Interval,
    crossed_difference,
    crossed_mean,
    holm,
    mean_interval,
    seed_difference,
)

if TYPE_CHECKING:
    import pandas as pd


def object_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """Validation scores by object of all these runs, with the seed besides; `when` is "first" at
    step 0, or "last".

    Args:
        runs: rows with path and seed.

    Raises:
        UserError: a run without `scores.csv`, or without a row of the validation split.
    """
    import pandas as pd

    parts = []
    for row in runs.to_dict("records"):
        scores = load_scores(row["path"])
        scores = scores[scores["split"] == "val"].assign(seed=row["seed"])
        if scores.empty:
            raise UserError(
                f"{RunFolder(Path(row['path'])).scores}: no row of the validation split"
            )
        for when, step in (("first", 0), ("last", scores["step"].max())):
            parts.append(scores[scores["step"] == step].assign(when=when))
    return pd.concat(parts, ignore_index=True)


def compare_groups(groups: Sequence[pd.DataFrame], metric: str = "J_and_F") -> pd.DataFrame:
    """Groups of runs that differ in nothing but the seed, each beside the first.

    Args:
        groups: of each its rows with path, seed and last, the score that is compared.
        metric: that score's name in `scores.csv`; another one, such as a loss, has no scores by
            object.

    Returns:
        A row each group: text, the mean with its interval over seeds and videos, or over seeds
        where there are no scores by object for it, as the text then says; difference, to the first
        group, in the same way; p, of the difference over both, corrected for their number.
    """
    import pandas as pd

    objects = [_last_objects(group, metric) for group in groups]
    means = [group.groupby("seed")["last"].mean().to_dict() for group in groups]
    rows = []
    for scores, mean in zip(objects, means, strict=True):
        found = None if scores is None else crossed_mean(scores, metric)
        if found is None or not found.known:
            found = mean_interval([*mean.values()])
        apart: Interval | None = None
        if rows:
            try:
                if scores is not None and objects[0] is not None:
                    apart = crossed_difference(objects[0], scores, metric)
            except UserError:  # they were scored on different videos
                pass
            if apart is None or not apart.known:
                apart = seed_difference(means[0], mean)
        difference = "" if apart is None else apart.text(sign=True)
        p = math.nan if apart is None else apart.p
        rows.append({"text": found.text(), "difference": difference, "p": p})
    table = pd.DataFrame(rows, columns=["text", "difference", "p"])
    return table.assign(p=holm(table["p"]))


def _last_objects(runs: pd.DataFrame, metric: str) -> pd.DataFrame | None:
    try:
        scores = object_scores(runs)
        scores = scores[scores["when"] == "last"]
        crossed_mean(scores, metric)  # raises where the seeds were scored on different objects
    except (UserError, KeyError):
        return None
    return scores
