"""What a local sweep shows: a live table, `results.csv`, and the ranking with its intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sam2train.files import write_text
from sam2train.results import compare_groups
from sam2train.sweep_file import Sweep, show_value
from sam2train.sweep_trials import LOG, Trial

if TYPE_CHECKING:
    import pandas as pd

SEED = "trainer.seed"
_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "interrupted": "yellow"}


def live_table(sweep: Sweep, trials: Sequence[Trial], total: int, jobs: int, rows: int) -> Table:
    """Trials with parameters, state, step, metric and time left; those that matter now if not all
    fit into `rows`."""
    left = time_left(trials, total, jobs)
    counts = ", ".join(
        f"{sum(trial.state == state for trial in trials)} {state}"
        for state in ("finished", "stopped", "running", "failed", "interrupted")
        if any(trial.state == state for trial in trials)
    )
    title = f"{sweep.name}: {counts or 'nothing yet'} of {total}"
    table = Table(title=title + (f"; about {left} left" if left else ""), title_justify="left")
    table.add_column("trial")
    for name in varying(sweep):
        table.add_column(short_names(sweep)[name], overflow="fold")
    for heading in ("state", "step", sweep.config.metric.name, "left"):
        table.add_column(heading, justify="right")
    order = {"running": 0, "failed": 1, "interrupted": 1, "finished": 2, "stopped": 2}
    shown = sorted(trials, key=lambda trial: (order.get(trial.state, 3), trial.name))[
        : max(rows, 3)
    ]
    for trial in sorted(shown, key=lambda trial: trial.name):
        style = _STYLES.get(trial.state, "dim")
        table.add_row(
            trial.name,
            *(escape(show_value(trial.values.get(name))) for name in varying(sweep)),
            f"[{style}]{trial.state}[/{style}]",
            f"{trial.step}/{trial.num_steps}",
            "" if trial.score is None else f"{trial.score:.3f}",
            show_seconds(_left(trial)) if trial.state == "running" else "",
        )
    return table


def trial_line(sweep: Sweep, trial: Trial) -> str:
    """One trial in one line, for a log."""
    names = short_names(sweep)
    values = " ".join(f"{names[n]}={show_value(trial.values.get(n))}" for n in varying(sweep))
    score = "" if trial.score is None else f"  {sweep.config.metric.name} {trial.score:.3f}"
    after = f"  {show_seconds(trial.seconds)}" if trial.state != "running" else ""
    return f"trial {trial.name}  {values}  {trial.state}{score}{after}"


def varying(sweep: Sweep) -> list[str]:
    """The parameters that are no constants."""
    names = [name for name, spec in sweep.specs.items() if "value" not in spec]
    return names or list(sweep.specs)


def short_names(sweep: Sweep) -> dict[str, str]:
    """Dotted name -> its last part, where that says which one is meant."""
    leaves = [name.split(".")[-1] for name in sweep.specs]
    clear = len({*leaves}) == len(leaves)
    return dict(zip(sweep.specs, leaves if clear else sweep.specs, strict=True))


def time_left(trials: Sequence[Trial], total: int, jobs: int) -> str:
    """For the whole sweep, from what finished trials took and running ones take; "" if unknown."""
    known = [trial.seconds for trial in trials if trial.state == "finished"]
    running = [left for trial in trials if trial.state == "running" and (left := _left(trial))]
    known = known or [
        t.seconds + (_left(t) or 0) for t in trials if t.state == "running" and _left(t)
    ]
    if not known:
        return ""
    waiting = total - sum(trial.over or trial.state == "running" for trial in trials)
    return show_seconds((sum(running) + waiting * sum(known) / len(known)) / jobs)


def _left(trial: Trial) -> float | None:
    if not trial.step:
        return None
    return trial.seconds / trial.step * (trial.num_steps - trial.step)


def show_seconds(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def results_frame(sweep: Sweep, trials: Sequence[Trial]) -> pd.DataFrame:
    """One row a trial: trial, state, each parameter, seed, the metric, and more."""
    import pandas as pd

    rows = []
    for trial in trials:
        values = {name: _cell(trial.values.get(name)) for name in sweep.specs if name != SEED}
        row = {"trial": trial.name, "state": trial.state, **values, "seed": trial.seed}
        row[sweep.config.metric.name] = trial.score
        row |= {"baseline/J_and_F": trial.baseline, "step": trial.step}
        row |= {"num_steps": trial.num_steps, "seconds": round(trial.seconds, 1)}
        rows.append({**row, "run_id": trial.run_id, "path": str(trial.folder)})
    return pd.DataFrame(rows)


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float)) else show_value(value)


def write_results(sweep: Sweep, trials: Sequence[Trial], folder: Path) -> None:
    """Write `results.csv`, one row a trial."""
    text = results_frame(sweep, trials).to_csv(index=False, lineterminator="\n")
    write_text(folder / "results.csv", text)


def ranking(sweep: Sweep, trials: Sequence[Trial]) -> pd.DataFrame:
    """Finished trials with a score, grouped over seeds, best first.

    Columns: the parameters as text; mean; text, difference and p of `compare_groups`, the
    difference from the best.
    """
    import pandas as pd

    names = [name for name in varying(sweep) if name != SEED]
    groups: dict[str, list[dict[str, Any]]] = {}  # the values -> their runs
    shown: dict[str, dict[str, str]] = {}
    for trial in trials:
        if trial.state == "finished" and trial.score is not None:
            values = {name: trial.values.get(name) for name in names}
            group = json.dumps(values)
            row = {"path": str(trial.folder), "seed": trial.seed, "last": trial.score}
            groups.setdefault(group, []).append(row)
            shown[group] = {name: show_value(value) for name, value in values.items()}
    if not groups:
        return pd.DataFrame()
    frames = {group: pd.DataFrame(rows) for group, rows in groups.items()}
    means = {g: frame.groupby("seed")["last"].mean().mean() for g, frame in frames.items()}
    order = sorted(means, key=means.get, reverse=sweep.config.metric.goal != "minimize")
    parameters = pd.DataFrame([shown[group] for group in order], columns=names)
    parameters["mean"] = [means[group] for group in order]
    metric = sweep.config.metric.name.removeprefix("val/")
    compared = compare_groups([frames[group] for group in order], metric)
    return pd.concat([parameters, compared], axis=1)


def show_results(sweep: Sweep, trials: Sequence[Trial], folder: Path, console: Console) -> None:
    """Print the ranking, what failed and why, and where everything is."""
    metric = sweep.config.metric.name
    table = ranking(sweep, trials)
    if len(table):
        num = int(table["p"].notna().sum())
        title = f"{metric}, mean and 95 % interval"
        shown = Table(title=title, title_justify="left")
        names = [name for name in varying(sweep) if name != SEED]
        headings = ("", *(short_names(sweep)[name] for name in names), "score", "to the best")
        for heading in (*headings, f"p, Holm of {num}")[: len(headings) + (num > 0)]:
            shown.add_column(heading)
        for rank, row in enumerate(table.to_dict("records"), start=1):
            cells = [escape(row[name]) for name in names]
            p = [f"{row['p']:.3f}" if row["p"] == row["p"] else ""] * (num > 0)
            shown.add_row(str(rank), *cells, row["text"], row["difference"], *p)
        console.print(shown)
        if num:
            say_plainly("the best was chosen by these scores, which favours it in each p", console)
    elif any(trial.state == "finished" for trial in trials):
        say_plainly(
            f"no trial logged {metric}; `metric: name:` takes names of metrics.jsonl", console
        )
    if early := [trial.name for trial in trials if trial.state == "stopped"]:
        say_plainly(f"stopped early, not ranked: {', '.join(early)}", console)
    for trial in trials:
        if trial.state == "failed":
            say_failure(trial, console)
    text = f"wrote {folder / 'results.csv'}; the runs: python run.py --runs {folder}"
    say_plainly(text, console)


def say_failure(trial: Trial, console: Console) -> None:
    """What a failed trial said last, and where it said all."""
    say_plainly(f"trial {trial.name} failed; its log {trial.folder / LOG} ends:", console)
    for line in trial.last_words():
        say_plainly(f"  {line}", console)


def say_plainly(text: str, console: Console) -> None:
    """One line; paths are neither styled nor cut."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
