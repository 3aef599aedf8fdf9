"""What the table of an ablation says, for readers: as smaller tables, in sentences, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sam2train.ablation import (
    LEVEL,
    SPLIT_NAMES,
    Question,
    by_seed,
    last_step,
    one_setting,
    settings_in_order,
    within,
)
from sam2train.metrics import JANDF
from sam2train.stats import mean_interval, seed_difference

if TYPE_CHECKING:
    import pandas as pd


def readable(table: pd.DataFrame, question: Question, what: str = JANDF) -> pd.DataFrame:
    """`differences` with the headings of a reader, every cell a text. `what` names the score."""
    against = f"against {question.reference}"
    names = {"J_and_F": what, "over_both": against, "corrected": f"p, Holm of {_num(table)}"}
    names |= {"over_seeds": f"{against}, over seeds", "over_videos": f"{against}, over videos"}
    kept = [name for name in (question.within, question.by) if name in table]
    table = table.assign(
        split=table["split"].map(SPLIT_NAMES), corrected=table["corrected"].map(_p)
    )
    shown = table[["split", *kept, *names]].map(
        lambda cell: "" if cell != cell else str(cell)  # NaN is not itself
    )
    return shown.rename(columns=lambda name: names.get(name, name.split(".")[-1]))


def brief(table: pd.DataFrame, question: Question, what: str = JANDF) -> pd.DataFrame:
    """`differences` as a small table of texts: a row for each value, J&F and the difference side
    by side for each split and each value of `question.within`. Intervals are over seeds and videos
    but where the cell says how many seeds."""
    import pandas as pd

    word = question.by.split(".")[-1]
    several = table["split"].nunique() > 1 or what != JANDF
    columns: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        name = question.within
        where = f", {SPLIT_NAMES[row['split']]}" if several else ""
        where += f", {name.split('.')[-1]} {row[name]}" if name in row else ""
        value = str(row[question.by])
        mean, apart = row["J_and_F"], ""
        if row["mean_low"] == row["mean_low"]:  # not NaN
            mean = mean.split(" (")[0]
        if row["difference"] == row["difference"]:
            known = row["low"] == row["low"]
            apart = row["over_both"].split(" (")[0] if known else row["over_seeds"]
        columns.setdefault(f"{what}{where}", {})[value] = mean
        columns.setdefault(f"against {question.reference}{where}", {})[value] = apart
    return pd.DataFrame(columns).rename_axis(word).reset_index()


def sentences(table: pd.DataFrame, question: Question) -> str:
    """What `differences` says, in Markdown: a line for each value that is not the reference, and
    what can be concluded."""
    word = question.by.split(".")[-1]
    lines = []
    for outer, value, pair in _comparisons(table, question):
        told = [
            f"{row['over_both']} on {SPLIT_NAMES[row['split']]}"
            + (f", p {_p(row['corrected'])}" if row["p"] == row["p"] else "")
            for row in pair
        ]
        start = f"{_within_what(question, outer)}**{word} {value}** against {question.reference}"
        lines.append(f"- {start}: J&F {'; '.join(told)}{verdict(pair)}.")
    return "\n".join([*lines, "", conclusion(table, question)]).strip()


def conclusion(table: pd.DataFrame, question: Question, what: str = JANDF) -> str:
    """What the differences together allow to say; made of their p values, after Holm's correction.

    A difference is shown where it is on the test videos, or on the validation videos if there are
    no others, and where both splits agree in its sign.
    """
    word = question.by.split(".")[-1]
    pairs = [*_comparisons(table, question)]
    if not pairs:
        return f"Only one value of {word} is finished: nothing to compare yet."
    num = _num(table)
    if not num:
        reason = pairs[0][2][-1]["over_both"]
        return f"No claim about the {what} by {word}: an interval over seeds and videos {reason}."
    said = [
        f"{_within_what(question, outer)}{word} {value} is {words.removeprefix(', ')} than "
        f"{question.reference}"
        for outer, value, pair in pairs
        if (words := verdict(pair)) in (", higher", ", lower")
    ]
    compared = f"{num} comparisons, corrected by Holm" if num > 1 else "1 comparison"
    if said:
        text = f"Shown in {what}: {'; '.join(said)}"
        text += f" (over seeds and videos; {compared}; p up to {LEVEL})."
        text += " No other difference is shown." * (len(said) < len(pairs))
    else:
        text = f"No difference in {what} is shown between the values of {word} (over seeds and "
        text += f"videos; {compared}; smallest p {_p(table['corrected'].min())})."
    return f"{text} {_scored_at(table)}"


def _scored_at(table: pd.DataFrame) -> str:
    """Which checkpoint `differences` scored on which videos."""
    splits = set(table["split"])
    if splits == {"val", "test"}:
        return (
            "Validation scores are those of the last step; test scores are those of the checkpoint "
            "that was best on validation."
        )
    names = SPLIT_NAMES[splits.pop()]
    return f"The scores are those of the last step on {names} videos, which chose no checkpoint."


def horizon_sentences(results: pd.DataFrame, question: Question, metric: str = "horizon/J") -> str:
    """What a curve of `horizon.csv` says at its far end: the highest value against the reference,
    in Markdown. The curves have no rows by video: their intervals are over seeds, and no claim."""
    lines = []
    for outer, part in within(last_step(results, metric), question):
        highest = settings_in_order(part[question.by])[-1]
        pair = [one_setting(part, question.by, v) for v in (question.reference, highest)]
        shared = set(pair[0]["at"]) & set(pair[1]["at"])
        if highest == question.reference or not shared:
            continue
        at = max(shared)
        scores = [by_seed(side[side["at"] == at]) for side in pair]
        found = seed_difference(*scores)
        means = [mean_interval([*score.values()]).value for score in scores]
        word = question.by.split(".")[-1]
        lines.append(
            f"- {_within_what(question, outer)}{metric.removeprefix('horizon/')} at "
            f"{at / 2 + 1:.0f} to {at:.0f} frames: {means[0]:.3f} with {word} "
            f"{question.reference}, {means[1]:.3f} with {highest}; {found.text(sign=True)}, "
            "these videos only."
        )
    return "\n".join(lines) or f"These videos say nothing about {metric}."


def verdict(pair: Sequence[Mapping[str, Any]]) -> str:
    """What the rows of one comparison, one a split, allow to say, in words behind it; nothing
    where the last of them has no p value."""
    last = pair[-1]  # test, where it was scored
    if last["p"] != last["p"]:  # NaN
        return ""
    agree = len({row["difference"] > 0 for row in pair}) == 1
    if last["corrected"] <= LEVEL and agree:
        return ", higher" if last["difference"] > 0 else ", lower"
    return ", no difference shown"


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, for the README."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _comparisons(
    table: pd.DataFrame, question: Question
) -> Iterable[tuple[dict[str, Any], Any, list[dict[str, Any]]]]:
    """The settings of each comparison: `question.within`'s, the value, its rows by split."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in table[table["difference"].notna()].to_dict("records"):
        found.setdefault((row.get(question.within), row[question.by]), []).append(row)
    for (outer, value), rows in found.items():
        yield ({question.within: outer} if question.within in table else {}), value, rows


def _num(table: pd.DataFrame) -> int:
    """How many comparisons Holm's correction is for."""
    return int(table["p"].notna().sum())


def _p(value: float) -> str:
    return "" if value != value else "below 0.001" if value < 0.001 else f"{value:.3f}"


def _within_what(question: Question, row: dict[str, Any]) -> str:
    name = question.within
    return f"{name.split('.')[-1]} {row[name]}: " if name in row else ""
