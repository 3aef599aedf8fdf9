"""Compact results of a sweep: one CSV that can be committed, and what it says.

`python run.py --collect runs/sweeps/NAME` writes `experiments/results/NAME.csv`; the notebooks, the
tables and the pictures are made from it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam2train.errors import UserError
from sam2train.metrics import TRAINED
from sam2train.results import load_metrics, load_scores, read_csv, varied
from sam2train.stats import Interval, mean_interval, paired_bootstrap, seed_difference

if TYPE_CHECKING:
    import pandas as pd

PROMPT_TYPES = "dataset.prompt_types"
MASKMEM = "model.num_maskmem"
POINTERS = "model.max_obj_ptrs_in_encoder"

_RESULT_COLUMNS = ("split", "step", "metric", "video_id", "object_id", "at", "value", "count")
_HORIZON_COLUMNS = ("step", "split", "model", "metric", "at", "value", "count")


@dataclass(frozen=True)
class Question:
    """What a sweep asks: what each value of a setting does to J&F, against a reference."""

    by: str  # the setting
    reference: Any  # its value that the others are compared with
    within: str | None = None  # another setting: the question is asked at each of its values


# By the name of the sweep. One memory is that of the prompted frame alone.
QUESTIONS = {
    "prompts": Question(PROMPT_TYPES, "point"),
    "num_maskmem": Question(MASKMEM, 1, POINTERS),
}


def compact_results(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished and scored runs of `load_runs` in long form, small enough to be committed.

    Columns: run, seed, evaluation_seed, every setting that varies, and
        split, step: what was scored, when.
        metric, value, count: J, F or J_and_F and the number of objects in the mean.
        video_id, object_id: set in the rows of single objects, kept for the last step only.
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
    return pd.concat(parts, ignore_index=True)[[*settings, *_RESULT_COLUMNS]]


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
        from sam2train.prompts import PROMPTS  # here, since torch comes with it

        types = list(PROMPTS)
        words = value.split("+")
        return 1, len(words), [types.index(w) if w in types else len(types) for w in words], value

    return sorted(set(values), key=place)


def differences(results: pd.DataFrame, question: Question) -> pd.DataFrame:
    """J&F at the last step of each run, by the values of the setting that the question is about.

    Args:
        results: as `read_results` gives them.

    Returns:
        A row for each value (and each of `question.within`), with the two settings and
        J_and_F: text, the mean with its interval over seeds.
        difference, low, high: to the reference, interval over seeds; NaN in the reference's row and
            where an interval cannot be given.
        over_seeds, over_videos: texts of the difference with its two intervals.

    Raises:
        UserError: the setting was not varied, no run has the reference, or several runs have one
            value and seed.
    """
    import pandas as pd

    rows = []
    for outer, part in _within(last_step(results), question):
        for value in settings_in_order(part[question.by]):
            first, second = (part[part[question.by] == v] for v in (question.reference, value))
            row = {**outer, question.by: value}
            row["J_and_F"] = mean_interval([*_by_seed(second, value).values()]).text()
            if value != question.reference:
                found = seed_difference(
                    _by_seed(first, question.reference), _by_seed(second, value)
                )
                row |= {"difference": found.value, "low": found.low, "high": found.high}
                row["over_seeds"] = found.text(sign=True)
                row["over_videos"] = _difference_by_object(first, second)
            rows.append(row)
    table = pd.DataFrame(rows)
    return table.reindex(
        columns=[
            *[name for name in (question.within, question.by) if name in table],
            *("J_and_F", "difference", "low", "high", "over_seeds", "over_videos"),
        ]
    )


def readable(table: pd.DataFrame, question: Question) -> pd.DataFrame:
    """`differences` with the headings of a reader, every cell a text."""
    against = f"against {question.reference}"
    names = {"J_and_F": "J&F", "over_seeds": f"{against}, over seeds"}
    names["over_videos"] = f"{against}, over videos"
    kept = [name for name in (question.within, question.by) if name in table] + [*names]
    shown = table[kept].map(lambda cell: "" if cell != cell else str(cell))  # NaN is not itself
    return shown.rename(columns=lambda name: names.get(name, name.split(".")[-1]))


def brief(table: pd.DataFrame, question: Question) -> pd.DataFrame:
    """`differences` as a small table of texts: a row for each value, J&F and the difference over
    seeds side by side for each value of `question.within`."""
    import pandas as pd

    word = question.by.split(".")[-1]
    columns: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        name = question.within
        where = f", {name.split('.')[-1]} {row[name]}" if name in row else ""
        value = str(row[question.by])
        columns.setdefault(f"J&F{where}", {})[value] = row["J_and_F"]
        apart = row["over_seeds"] if row["difference"] == row["difference"] else ""
        against = columns.setdefault(f"against {question.reference}{where}", {})
        against[value] = apart.split(" (")[0]
    return pd.DataFrame(columns).rename_axis(word).reset_index()


def sentences(table: pd.DataFrame, question: Question) -> str:
    """What `differences` says, in Markdown: a line for each value that is not the reference."""
    word = question.by.split(".")[-1]
    lines = []
    for row in table[table["difference"].notna()].to_dict("records"):
        start = f"{_within_what(question, row)}**{word} {row[question.by]}** against "
        said = verdict(row["low"], row["high"])
        lines.append(f"- {start}{question.reference}: J&F {row['over_seeds']}{said}.")
    return "\n".join(lines) or f"Only one value of {word} is finished: nothing to compare yet."


def horizon_sentences(results: pd.DataFrame, question: Question, metric: str = "horizon/J") -> str:
    """What a curve of `horizon.csv` says at its far end: the highest value against the reference,
    in Markdown."""
    lines = []
    for outer, part in _within(last_step(results, metric), question):
        highest = settings_in_order(part[question.by])[-1]
        pair = [part[part[question.by] == v] for v in (question.reference, highest)]
        shared = set(pair[0]["at"]) & set(pair[1]["at"])
        if highest == question.reference or not shared:
            continue
        at = max(shared)
        scores = [_by_seed(side[side["at"] == at], None) for side in pair]
        found = seed_difference(*scores)
        means = [mean_interval([*score.values()]).value for score in scores]
        word = question.by.split(".")[-1]
        lines.append(
            f"- {_within_what(question, outer)}{metric.removeprefix('horizon/')} at "
            f"{at / 2 + 1:.0f} to {at:.0f} frames: {means[0]:.3f} with {word} "
            f"{question.reference}, {means[1]:.3f} with {highest}; {found.text(sign=True)}"
            f"{verdict(found.low, found.high)}."
        )
    return "\n".join(lines) or f"These videos say nothing about {metric}."


def verdict(low: float, high: float) -> str:
    """What an interval of a difference allows to say, in words behind it; nothing without one."""
    if low != low:  # NaN
        return ""
    return ", higher" if low > 0 else ", lower" if high < 0 else ", no difference shown"


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, for the README."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _within(
    part: pd.DataFrame, question: Question
) -> Iterable[tuple[dict[str, Any], pd.DataFrame]]:
    """The rows at each value of `question.within`, or all of them where that was not varied."""
    if part.empty:
        return
    if question.by not in part:
        raise UserError(f"{question.by}: the runs of these results do not differ in it")
    outer = question.within if question.within in part else None
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


def _by_seed(part: pd.DataFrame, value: Any) -> dict[int, float]:
    whole = part[part["video_id"].isna()]
    if whole["seed"].duplicated().any():
        raise UserError(
            f"{value}: several runs with one seed; leave in the results what is to be compared"
        )
    return dict(zip(whole["seed"], whole["value"], strict=True))


def _difference_by_object(first: pd.DataFrame, second: pd.DataFrame) -> str:
    objects = [part[part["video_id"].notna()] for part in (first, second)]
    if not all(map(len, objects)):
        return "no scores by video"
    found: Interval = paired_bootstrap(*objects, "value")
    return found.text(sign=True)


def _within_what(question: Question, row: dict[str, Any]) -> str:
    name = question.within
    return f"{name.split('.')[-1]} {row[name]}: " if name in row else ""


def _compact_run(path: Path) -> pd.DataFrame:
    import pandas as pd

    metrics = load_metrics(path)
    wide = metrics[[f"val/{name}" for name in ("J", "F", "J_and_F")]].dropna()
    whole = wide.rename(columns=lambda name: name.removeprefix("val/")).stack()
    rows = whole.rename_axis(["step", "metric"]).rename("value").reset_index()
    rows["count"] = rows["step"].map(metrics["val/num_objects"].dropna())
    parts = [rows.assign(split="val")]
    if (path / "scores.csv").is_file():
        objects = load_scores(path).rename(columns={"J_and_F": "value"})
        parts.append(_at_the_end(objects).assign(metric="J_and_F", count=1))
    if (path / "horizon.csv").is_file():
        horizon = read_csv(path / "horizon.csv", _HORIZON_COLUMNS)
        parts.append(_at_the_end(horizon[horizon["model"] == TRAINED]))
    parts = [part.reindex(columns=list(_RESULT_COLUMNS)) for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True).round({"value": 5})


def _at_the_end(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["step"] == rows.groupby("split")["step"].transform("max")]
