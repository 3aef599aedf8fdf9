"""Runs in a terminal of 100 columns: `--runs`, the table; `--compare`, what differs; `--collect`,
what a sweep says.

Groups of runs stand beside each other with intervals over seeds and videos, and with p values after
Holm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sam2train.ablation import (
    GAIN,
    HORIZON,
    MASKMEM,
    Question,
    compact_results,
    differences,
    is_result,
    questions,
    read_results,
)
from sam2train.ablation_text import (
    brief,
    conclusion,
    horizon_sentences,
    markdown,
)
from sam2train.errors import UserError
from sam2train.figures import draw_results
from sam2train.files import write_text
from sam2train.machine import cell, say
from sam2train.metrics import JANDF
from sam2train.results import labels, load_runs, load_scores, varied
from sam2train.run_folder import RunFolder
from sam2train.stats import (
    Interval,
    crossed_difference,
    crossed_gains,
    crossed_mean,
    holm,
    mean_interval,
    paired_bootstrap,
    seed_difference,
)

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path("experiments/results")  # what --collect writes, to be committed
MAX_SETTINGS = 4  # more than so many do not fit a line that one can read
_COLOURS = {"finished": "green", "running": "cyan", "interrupted": "yellow"}


# Groups of runs beside each other


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


# What stands in the terminal


def show_runs(folder: Path, console: Console) -> None:
    """Print the runs below a folder, a table for each folder of runs, the best last J&F first.

    Below each, runs that differ only in their seed are summed up, with their interval.

    Raises:
        UserError: no such folder, or no run in it.
    """
    runs = load_runs(folder)
    for place, part in runs.groupby(runs["path"].map(lambda path: str(Path(path).parent))):
        part = part.sort_values(["last", "run"], ascending=[False, True], na_position="last")
        say(console, f"{place} (sweep)" if part["sweep"].notna().any() else place)
        console.print(_runs_table(part))
        scored = part[part["last"].notna()]
        if table := _groups_table(scored):
            console.print(table)
        for row in part[part["problem"].notna()].itertuples():
            how = "unreadable" if row.status == "unreadable" else "odd"
            say(console, f"{how}: {row.problem}")
        console.print()
    if (runs["status"] == "crashed").any():
        say(console, "crashed: it has written nothing for long; `--resume RUN` goes on with it")
    say(console, "J&F on the validation videos; --compare RUN RUN: differences with intervals")


def compare_runs(folders: Sequence[Path], console: Console) -> None:
    """Print in which settings runs differ, and their scores' differences with intervals.

    Runs that differ only in the seed count as one, unless all of them do. The first is what the
    others are compared with. A difference without an interval is not printed; what it would need
    is.

    Raises:
        UserError: fewer than two runs, the same twice, or a folder that is no run.
    """
    import pandas as pd

    for folder in folders:
        if not RunFolder(folder).is_run:
            what = "is no run: no config.yaml with metrics.jsonl in it" if folder.is_dir() else ""
            raise UserError(
                f"--compare: {folder} {what or 'is no folder'}; `python run.py --runs` lists runs"
            )
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise UserError(
            f"--compare {' '.join(map(str, folders))}: expected two different runs or more, "
            "each once"
        )
    runs = pd.concat([load_runs(folder) for folder in folders], ignore_index=True)
    if (runs["status"] == "unreadable").any():
        raise UserError("\n".join(runs["problem"].dropna()))
    alone = runs["group"].nunique() == 1
    parts = [part for _, part in runs.groupby("path" if alone else "group", sort=False)]
    groups = dict(zip(_letters(len(parts)), parts, strict=True))
    console.print(_compared_table(groups))
    table = _settings_table(groups)
    console.print(table if table.rows else "The settings are the same.")
    if alone:
        say(console, "They differ in nothing but the seed.")
        if len(ended := runs[runs["last"].notna()]):
            (text,) = compare_groups([ended])["text"]
            say(console, f"J&F of all: {text}")
    scored = [name for name in varied(runs) if _shapes_scores(name, runs)]
    if scored:
        say(console, f"Careful: they were scored under different {', '.join(scored)}.")
    scores: dict[str, pd.DataFrame] = {}
    for letter, part in groups.items():
        try:
            scores[letter] = object_scores(part)
        except UserError as problem:
            say(console, f"{letter}, nothing over videos: {problem}")
    console.print(_gains_table(groups, scores))
    console.print(_differences_table(groups, scores))
    say(
        console,
        "over both: 95 %, other trainings on other videos of the kind; a claim needs this one\n"
        "over videos: 95 %, paired bootstrap, these weights on other videos of the kind\n"
        "over seeds: 95 %, t, other trainings on these videos",
    )


def _shapes_scores(name: str, runs: pd.DataFrame) -> bool:
    """Whether a setting decides what is scored, besides the weights."""
    shared = {"dataset.val_path", "dataset.image_size", "dataset.num_of_pos_points"}
    shared |= {"dataset.include_center", "dataset.num_of_neg_points"}
    if name == "dataset.prompt_types":  # those of training, unless evaluation has its own
        own = runs.get("evaluation.prompt_types")
        return own is None or own.isna().any()
    return name.startswith("evaluation.") or name in shared


def collect_results(folder: Path | None, console: Console) -> None:
    """Write what the finished runs of a folder say to `experiments/results/<its name>.csv`, and
    from there the pictures and the table that the README has; without a folder, draw the pictures
    and tables of all CSV files there again.

    Raises:
        UserError: no such folder, no run in it, none that is finished, or no CSV file.
    """
    if folder is None:
        paths = sorted(RESULTS.glob("*.csv"))
        if not paths:
            raise UserError(
                f"--collect: no CSV file in {RESULTS}/; name the folder of a sweep, such as "
                "runs/sweeps/prompts"
            )
    else:
        runs = load_runs(folder)
        results = compact_results(runs)
        paths = [RESULTS / f"{folder.resolve().name}.csv"]
        write_text(paths[0], results.to_csv(index=False, lineterminator="\n"))
        for row in runs[~is_result(runs)].itertuples():
            say(console, f"left out: {row.path}, {row.status} at step {row.step}")
        say(console, f"wrote {paths[0]}: {results['run'].nunique()} runs, {len(results)} rows")
        asked = questions(paths[0].stem, results)
        if not asked and (table := _groups_table(runs[is_result(runs)])):
            console.print(table)
    for path in paths:
        for picture in draw_results(path):
            say(console, f"wrote {picture}")
        results = read_results(path)
        for place, question in enumerate(questions(path.stem, results)):
            _say_answer(results, question, console, in_full=place == 0)


def _say_answer(
    results: pd.DataFrame, question: Question, console: Console, *, in_full: bool
) -> None:
    """The table of J&F in Markdown with what it allows to say; in full, that of the gain, too, and
    for numbers of memories the horizon's far end."""
    for what, gain in ((JANDF, False), (GAIN, True))[: 1 + in_full]:
        table = differences(results, question, gain=gain)
        if len(table):
            say(console, f"\n{markdown(brief(table, question, what))}\n")
            console.print(conclusion(table, question, what), markup=False, highlight=False)
    for metric in HORIZON:
        if in_full and question.by == MASKMEM and (results["metric"] == metric).any():
            said = horizon_sentences(results, question, metric)
            console.print(said, markup=False, highlight=False)
    say(console, "")


def _runs_table(runs: pd.DataFrame) -> Table:
    table = Table(padding=(0, 1), box=None)
    table.add_column("run", overflow="fold", max_width=24)
    for name in ("seed", "status", "step", "step 0", "last", "best", "trained", "time"):
        left = name == "status"
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in runs.to_dict("records"):
        status = row["status"]
        known = status != "unreadable"
        table.add_row(
            cell(row["run"]),
            f"{row['seed']:.0f}" if known and not _missing(row["seed"]) else "",
            cell(status, _COLOURS.get(status, "red")),
            f"{row['step']:.0f}/{row['num_steps']:.0f}" if known else "",
            *(_score(row.get(name)) for name in ("baseline", "last", "best")),
            _millions(row.get("params/trainable")),
            f"{timedelta(seconds=round(row['seconds']))}" if known else "",
        )
    return table


def _groups_table(runs: pd.DataFrame) -> Table | None:
    """What a few settings did, or several seeds; None where neither can be read off the runs."""
    names = varied(runs)
    if len(names) > MAX_SETTINGS:
        repeated = runs.groupby("group")["seed"].transform("nunique") > 1
        runs = runs[repeated]
        names = varied(runs)
    if len(runs) < 2:
        return None
    runs = runs.assign(settings=labels(runs) if names else "the same")
    table = Table(title="by settings", title_justify="left", padding=(0, 1), box=None)
    table.add_column("settings", overflow="fold")
    table.add_column("last J&F", no_wrap=True)
    table.add_column("runs", overflow="fold")
    means = runs.groupby(["settings", "seed"])["last"].mean().groupby("settings").mean()
    order = [*means.sort_values(ascending=False).index]
    parts = [runs[runs["settings"] == settings] for settings in order]
    for settings, part, text in zip(order, parts, compare_groups(parts)["text"], strict=True):
        table.add_row(cell(settings), text, cell(" ".join(part["run"])))
    return table


def _compared_table(groups: dict[str, pd.DataFrame]) -> Table:
    table = Table(title="Runs", title_justify="left", box=None)
    for name in ("", "run", "seed", "status", "step", "step 0", "last"):
        table.add_column(name, overflow="fold", no_wrap=name != "run")
    for letter, part in groups.items():
        for row in part.to_dict("records"):
            table.add_row(
                letter,
                cell(row["path"]),
                cell(row["seed"]),
                cell(row["status"]),
                cell(row["step"]),
                _score(row["baseline"]),
                "" if _missing(row["last"]) else f"{row['last']:.3f} at step {row['scored']:.0f}",
            )
    return table


def _settings_table(groups: dict[str, pd.DataFrame]) -> Table:
    import pandas as pd

    firsts = pd.concat([part.iloc[:1] for part in groups.values()])
    table = Table("setting", title="What differs", title_justify="left", box=None)
    for letter in groups:
        table.add_column(letter, overflow="fold")
    for name in [*varied(firsts), "commit", "device"]:
        values = firsts[name].map(str)
        if values.nunique() > 1:
            shown = (value[:12] if name == "commit" else value for value in values)
            table.add_row(cell(name), *map(cell, shown))
    return table


def _gains_table(groups: dict[str, pd.DataFrame], scores: dict[str, pd.DataFrame]) -> Table:
    """Each group against its own step 0."""
    table = Table("", "over both", "over videos", "over seeds", title_justify="left", box=None)
    table.title = "J&F gained since step 0"
    for letter, part in groups.items():
        gains = part.dropna(subset=["gain"]).groupby("seed")["gain"].mean()
        seeds = mean_interval(gains).text(sign=True) if len(gains) else "no score at step 0"
        both, videos = _over_videos(scores, letter, letter, first="first")
        table.add_row(letter, *map(_in_two_lines, (_text(both), _text(videos), seeds)))
    return table


def _differences_table(groups: dict[str, pd.DataFrame], scores: dict[str, pd.DataFrame]) -> Table:
    """Each group against the first, at the last step."""
    reference, *others = groups

    def by_seed(letter: str) -> dict[int, float]:
        part = groups[letter].dropna(subset=["last"])
        return part.groupby("seed")["last"].mean().to_dict()

    rows, ps = [], []
    for letter in others:
        first, second = by_seed(reference), by_seed(letter)
        seeds = "needs scores of both"
        if first and second:
            seeds = seed_difference(first, second).text(sign=True)
        for metric in ("J_and_F", "J", "F"):
            both, videos = _over_videos(scores, reference, letter, metric=metric)
            main = metric == "J_and_F"
            ps.append(both.p if main and isinstance(both, Interval) else math.nan)
            name = metric.replace("_and_", "&")
            rows.append([letter * main, name, _text(both), _text(videos), seeds * main])
    num = sum(not math.isnan(p) for p in ps)
    table = Table("", "metric", "over both", title_justify="left", box=None)
    for heading in (f"p, Holm of {num}" if num else "p", "over videos", "over seeds"):
        table.add_column(heading)
    table.title = f"Difference to {reference}"
    for (letter, name, *texts), p in zip(rows, holm(ps), strict=True):
        both, videos, seeds = map(_in_two_lines, texts)
        table.add_row(letter, name, both, "" if math.isnan(p) else f"{p:.3f}", videos, seeds)
    return table


def _over_videos(
    scores: dict[str, pd.DataFrame],
    one: str,
    other: str,
    *,
    metric: str = "J_and_F",
    first: str = "last",
) -> tuple[Interval | str, Interval | str]:
    """The last scores of `other` minus those of `one`, or its `first`: over seeds and videos, and
    over videos; else what is missing."""
    if missing := [letter for letter in dict.fromkeys((one, other)) if letter not in scores]:
        return (f"needs scores.csv of {' and '.join(missing)}",) * 2
    before, after = scores[one], scores[other]
    before, after = before[before["when"] == first], after[after["when"] == "last"]
    try:
        videos = paired_bootstrap(before, after, metric)
        if one == other:
            return crossed_mean(crossed_gains(before, after, metric), metric), videos
        return crossed_difference(before, after, metric), videos
    except UserError as problem:
        return str(problem), str(problem)


def _text(found: Interval | str) -> str:
    return found if isinstance(found, str) else found.text(sign=True)


def _in_two_lines(text: str) -> str:
    """Interval and counts below each other: three of them fit a line of 100 columns."""
    return text.replace(" (", "\n(")


def _letters(num: int) -> list[str]:
    return [chr(ord("A") + k) if k < 26 else f"#{k + 1}" for k in range(num)]


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _score(value: float | None) -> str:
    return "" if _missing(value) else f"{value:.3f}"


def _millions(value: float | None) -> str:
    return "" if _missing(value) else f"{value / 1e6:.2f}M"
