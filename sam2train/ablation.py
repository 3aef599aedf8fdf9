"""Compact results of a sweep: one CSV that can be committed, and what can be concluded from it.

`python run.py --collect runs/sweeps/NAME` writes `experiments/results/NAME.csv`; the notebooks, the
tables and the pictures are made from it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam2train.errors import UserError
from sam2train.metrics import BASE, TRAINED
from sam2train.results import load_metrics, load_scores, read_csv, varied
from sam2train.run_folder import RunFolder
from sam2train.stats import (
    Interval,
    crossed_difference,
    crossed_mean,
    holm,
    mean_interval,
    paired_bootstrap,
    seed_difference,
)

if TYPE_CHECKING:
    import pandas as pd

PROMPT_TYPES = "dataset.prompt_types"
MASKMEM = "model.num_maskmem"
POINTERS = "model.max_obj_ptrs_in_encoder"
GAIN = "J&F gained since step 0"
HORIZON = ("horizon/J", "horizon/recall_after_absence")  # the curves that are told
SPLIT_NAMES = {"val": "validation", "test": "test"}
LEVEL = 0.05  # a p value up to this, after Holm's correction, shows a difference

_RESULT_COLUMNS = ("split", "step", "metric", "video_id", "object_id", "at", "value", "count")
PROMPT = "prompt"  # the column of the prompt that an object was scored with
_HORIZON_COLUMNS = ("step", "split", "model", "metric", "at", "value", "count")


@dataclass(frozen=True)
class Question:
    """What a sweep asks: what each value of a setting does to J&F, against a reference."""

    by: str  # the setting
    reference: Any  # its value that the others are compared with
    # Another setting, or PROMPT: the question is asked at each of its values.
    within: str | None = None


# By the name of the table. One memory is that of the prompted frame alone.
QUESTIONS = {
    "prompts": (Question(PROMPT_TYPES, "point"), Question(PROMPT_TYPES, "point", PROMPT)),
    "num_maskmem": (Question(MASKMEM, 1, POINTERS), Question(POINTERS, 0, MASKMEM)),
    "memory_stride3": (Question(MASKMEM, 1),),
}


def questions(name: str, results: pd.DataFrame) -> list[Question]:
    """What is asked of the table of this name; of a table of one's own, what its prompt types or
    numbers of memories do, against the first of them."""
    known = [
        question
        for question in QUESTIONS.get(name, ())
        if question.by in results
        and not (question.within == PROMPT and len(set(results.get(PROMPT, ())) - {""}) < 2)
    ]
    for setting, within in ((PROMPT_TYPES, None), (MASKMEM, POINTERS)):
        if not known and setting in results:
            known.append(Question(setting, settings_in_order(results[setting])[0], within))
    return known


def compact_results(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished and scored runs of `load_runs` in long form, small enough to be committed.

    Columns: run, seed, evaluation_seed, every setting that varies, and
        split, step: what was scored, when; the test videos score the checkpoint that validation
            chose, and the weights of step 0.
        metric, value, count: J, F or J_and_F and the number of objects in the mean.
        video_id, object_id, prompt: set in the rows of single objects, kept for step 0 and the
            last; tables from before 2026-11-30 have no prompt.
        at: where a metric is a curve of its own, as those of `horizon.csv` are: frames since the
            prompt, or the length of an absence. The last step only.

    Raises:
        UserError: none is finished and scored.
    """
    import pandas as pd

    runs = runs[is_result(runs)]
    if runs.empty:
        raise UserError(
            "none of these runs is finished and has validation scores; `python run.py --runs "
            "FOLDER` shows how far they are"
        )
    settings = ["run", "seed", "evaluation_seed", *varied(runs)]
    parts = [
        _compact_run(Path(row["path"])).assign(**{name: row[name] for name in settings})
        for row in runs.to_dict("records")
    ]
    results = pd.concat(parts, ignore_index=True)
    results[PROMPT] = results[PROMPT].astype(object).where(results[PROMPT].notna(), "")
    return results[[*settings, *_RESULT_COLUMNS, PROMPT]]


def is_result(runs: pd.DataFrame) -> pd.Series:
    """Which runs of `load_runs` belong into compact results, bool."""
    return (runs["status"] == "finished") & runs["last"].notna()


def read_results(path: Path) -> pd.DataFrame:
    """What `compact_results` gave, from the CSV it was written to.

    Raises:
        UserError: no such file, or columns missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path.name} is not there yet, in {path.parent}: run the sweep with `python run.py "
            f"sweeps/{path.stem}.yaml`, then `python run.py --collect runs/sweeps/{path.stem}`"
        )
    return read_csv(path, ("run", "seed", *_RESULT_COLUMNS))


def last_step(results: pd.DataFrame, metric: str = "J_and_F", split: str = "val") -> pd.DataFrame:
    """The rows of one metric and split, at the last step each run has of them."""
    part = results[(results["metric"] == metric) & (results["split"] == split)]
    return part[part["step"] == part.groupby("run")["step"].transform("max")]


def validation_curves(results: pd.DataFrame) -> pd.DataFrame:
    """Validation J&F by step, in the shape of `results.load_curves` with the settings besides."""
    part = results[results["video_id"].isna() & (results["metric"] == "J_and_F")]
    return part[part["split"] == "val"].assign(experiment="")


def settings_in_order(values: Iterable[Any]) -> list[Any]:
    """The values of a setting, each once: numbers by size, prompt types alone before mixtures."""

    def place(value: Any) -> tuple:
        if not isinstance(value, str):
            return 0, value
        from sam2train.prompts import PROMPTS  # here, because it imports torch

        types = list(PROMPTS)
        words = value.split("+")
        return 1, len(words), [types.index(w) if w in types else len(types) for w in words], value

    return sorted(set(values), key=place)


def differences(results: pd.DataFrame, question: Question, *, gain: bool = False) -> pd.DataFrame:
    """J&F of each split by the values of the setting that the question is about: at the last step
    on the validation videos, on the test videos that of the checkpoint which validation chose.

    Args:
        results: as `read_results` gives them.
        gain: J&F gained since step 0, since the values may start at different scores. Splits that
            were not scored at step 0 have no rows.

    Returns:
        A row for each split, each value of `question.within` and each value, with
        split and the two settings.
        mean, mean_low, mean_high, J_and_F: the mean, its interval, both as a text. Intervals are
            over seeds and videos; NaN where there are no scores by object or too few of either.
            The text then has the interval over seeds, and says so.
        difference, low, high, over_both: to the reference, in the same way; NaN in the
            reference's row.
        p, corrected: p value of the difference, before and after Holm's correction for all
            differences of the table.
        over_seeds, over_videos: texts of the difference with the other two intervals.
        seeds: a list of the scores by seed.
        start: the mean at step 0, NaN where it was not scored.

    Raises:
        UserError: the setting was not varied, no run has the reference, or several runs have one
            value and seed.
    """
    import pandas as pd

    rows = []
    for split in SPLIT_NAMES:
        scores = _last_and_first(results, split)
        if gain:
            scores = scores.dropna(subset=["first"])
            scores = scores.assign(value=scores["value"] - scores["first"])
        for outer, part in within(scores, question):
            first = one_setting(part, question.by, question.reference)
            for value in settings_in_order(part[question.by]):
                second = one_setting(part, question.by, value)
                row = {"split": split, **outer, question.by: value}
                row |= _mean(second) | {"seeds": [*by_seed(second).values()]}
                start = second.dropna(subset=["first"])
                row["start"] = _objects_or_whole(start)["first"].mean()
                if value != question.reference:
                    row |= _difference(first, second)
                rows.append(row)
    columns = ["split", *(n for n in (question.within, question.by) if n in results)]
    columns += ["mean", "mean_low", "mean_high", "J_and_F", "difference", "low", "high", "p"]
    columns += ["over_both", "over_seeds", "over_videos", "seeds", "start"]
    table = pd.DataFrame(rows).reindex(columns=columns)
    return table.assign(corrected=holm(table["p"]))


def within(part: pd.DataFrame, question: Question) -> Iterable[tuple[dict[str, Any], pd.DataFrame]]:
    """The rows at each value of `question.within`, or all of them where that was not varied."""
    if part.empty:
        return
    if question.by not in part:
        raise UserError(f"{question.by}: the runs of these results do not differ in it")
    outer = question.within if question.within in part else None
    part = part[part[outer] != ""] if outer == PROMPT else part  # not the rows of whole runs
    for value in settings_in_order(part[outer]) if outer else [None]:
        inner = part[part[outer] == value] if outer else part
        if not (inner[question.by] == question.reference).any():
            values = ", ".join(map(str, settings_in_order(inner[question.by])))
            where = f" with {outer}={value}" if outer else ""
            raise UserError(
                f"{question.by}={question.reference}{where}: no finished run, so nothing to "
                f"compare with; there are {values}"
            )
        yield ({outer: value} if outer else {}), inner


def one_setting(part: pd.DataFrame, by: str, value: Any) -> pd.DataFrame:
    """The rows with this value, of one run a seed."""
    chosen = part[part[by] == value]
    if (chosen.groupby("seed")["run"].nunique() > 1).any():
        raise UserError(
            f"{value}: several runs with one seed; leave in the results what is to be compared"
        )
    return chosen


def _last_and_first(results: pd.DataFrame, split: str) -> pd.DataFrame:
    """As `last_step`, with J&F at step 0 of the same object or of all videos as `first`; NaN where
    that was not kept, and everywhere if one of the runs was not scored at step 0."""
    last = last_step(results, split=split)
    scored = (results["metric"] == "J_and_F") & (results["split"] == split)
    keys = ["run", "video_id", "object_id"]
    first = results.loc[scored & (results["step"] == 0), [*keys, "value"]]
    both = last.merge(first.rename(columns={"value": "first"}), on=keys, how="left")
    if both.groupby("run")["first"].count().eq(0).any():
        both["first"] = math.nan
    return both


def by_seed(part: pd.DataFrame) -> dict[int, float]:
    """The mean over the objects by seed; where there are none, the score of all videos."""
    return _objects_or_whole(part).groupby("seed")["value"].mean().to_dict()


def _objects_or_whole(part: pd.DataFrame) -> pd.DataFrame:
    objects = part["video_id"].notna()
    return part[objects] if objects.any() else part


def _mean(part: pd.DataFrame) -> dict[str, Any]:
    """The mean with its interval over seeds and videos, or over seeds where there are no objects,
    which is no interval for a claim."""
    found = _over_both(part)
    row = {"mean": mean_interval([*by_seed(part).values()]).value}
    if found is None or not found.known:
        return row | {"J_and_F": mean_interval([*by_seed(part).values()]).text()}
    return row | {"mean_low": found.low, "mean_high": found.high, "J_and_F": found.text()}


def _difference(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, Any]:
    """`second` minus `first` with its intervals, as `differences` has them."""
    seeds = seed_difference(by_seed(first), by_seed(second))
    found, missing = _over_both(first, second), "needs scores by object"
    row: dict[str, Any] = {"difference": seeds.value, "over_seeds": seeds.text(sign=True)}
    if found is None:
        return row | {"over_both": missing, "over_videos": missing}
    objects = [_objects_or_whole(part) for part in (first, second)]
    row |= {"low": found.low, "high": found.high, "p": found.p}
    row["over_both"] = found.text(sign=True)
    return row | {"over_videos": paired_bootstrap(*objects, "value").text(sign=True)}


def _over_both(*parts: pd.DataFrame) -> Interval | None:
    """The interval over seeds and videos of one or of a difference; None without objects."""
    if any(part["video_id"].isna().all() for part in parts):
        return None
    objects = [_objects_or_whole(part) for part in parts]
    return (crossed_mean if len(parts) == 1 else crossed_difference)(*objects, "value")


def _compact_run(path: Path) -> pd.DataFrame:
    import pandas as pd

    metrics = load_metrics(path)
    wide = metrics[[f"val/{name}" for name in ("J", "F", "J_and_F")]].dropna()
    whole = wide.rename(columns=lambda name: name.removeprefix("val/")).stack()
    rows = whole.rename_axis(["step", "metric"]).rename("value").reset_index()
    rows["count"] = rows["step"].map(metrics["val/num_objects"].dropna())
    parts = [rows.assign(split="val")]
    if RunFolder(path).scores.is_file():
        # On the test videos the run's own step 0 is scored as the base.
        base = load_scores(path, BASE)
        first = base[(base["split"] == "test") & (base["step"] == 0)]
        trained = load_scores(path)
        first = pd.concat([trained[(trained["split"] == "val") & (trained["step"] == 0)], first])
        objects = pd.concat([_at_the_end(trained), first])
        # Where step 0 was the best, it is both.
        objects = objects.drop_duplicates(["split", "step", "video_id", "object_id"])
        objects = objects.rename(columns={"J_and_F": "value"})
        parts.append(objects.assign(metric="J_and_F", count=1))
    if RunFolder(path).horizon.is_file():
        horizon = read_csv(RunFolder(path).horizon, _HORIZON_COLUMNS)
        parts.append(_at_the_end(horizon[horizon["model"] == TRAINED]))
    parts = [part.reindex(columns=[*_RESULT_COLUMNS, PROMPT]) for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True).round({"value": 5})


def _at_the_end(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["step"] == rows.groupby("split")["step"].transform("max")]
