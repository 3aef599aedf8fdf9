"""What a local sweep shows: its trials while they run, a line each, and the ranking at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sam2train.compare import compare_groups
from sam2train.machine import cell, say
from sam2train.sweep_file import Sweep, show_value
from sam2train.sweep_trials import Trial

if TYPE_CHECKING:
    import pandas as pd

_SEED_NAME = "trainer.seed"
_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "interrupted": "yellow"}


def live_table(sweep: Sweep, trials: Sequence[Trial], total: int, jobs: int, rows: int) -> Table:
    """Trials with parameters, state, step, metric and time left; those that matter now if not all
    fit into `rows`."""
    left = _time_left(trials, total, jobs)
    counts = ", ".join(
        f"{sum(trial.state == state for trial in trials)} {state}"
        for state in ("finished", "stopped", "running", "failed", "interrupted")
        if any(trial.state == state for trial in trials)
    )
    title = f"{sweep.name}: {counts or 'nothing yet'} of {total}"
    title = cell(title + (f"; about {left} left" if left else ""), "table.title")
    table = Table(title=title, title_justify="left")
    table.add_column("trial")
    for name in sweep.varying:
        table.add_column(cell(sweep.short_names[name]), overflow="fold")
    for heading in ("state", "step", sweep.config.metric.name, "left"):
        table.add_column(cell(heading), justify="right")
    order = {"running": 0, "failed": 1, "interrupted": 1, "finished": 2, "stopped": 2}
    shown = sorted(trials, key=lambda trial: (order.get(trial.state, 3), trial.name))[
        : max(rows, 3)
    ]
    for trial in sorted(shown, key=lambda trial: trial.name):
        style = _STYLES.get(trial.state, "dim")
        table.add_row(
            trial.name,
            *(cell(show_value(trial.values.get(name))) for name in sweep.varying),
            cell(trial.state, style),
            f"{trial.step}/{trial.num_steps}",
            "" if trial.score is None else f"{trial.score:.3f}",
            _show_seconds(trial.seconds_left) if trial.state == "running" else "",
        )
    return table


def trial_line(sweep: Sweep, trial: Trial) -> str:
    """One trial in one line, for a log."""
    names = sweep.short_names
    values = " ".join(f"{names[n]}={show_value(trial.values.get(n))}" for n in sweep.varying)
    score = "" if trial.score is None else f"  {sweep.config.metric.name} {trial.score:.3f}"
    after = f"  {_show_seconds(trial.seconds)}" if trial.state != "running" else ""
    return f"trial {trial.name}  {values}  {trial.state}{score}{after}"


def _time_left(trials: Sequence[Trial], total: int, jobs: int) -> str:
    """For the whole sweep, from what finished trials took and running ones take; "" if unknown."""
    known = [trial.seconds for trial in trials if trial.state == "finished"]
    running = [
        left for trial in trials if trial.state == "running" and (left := trial.seconds_left)
    ]
    known = known or [
        t.seconds + (t.seconds_left or 0) for t in trials if t.state == "running" and t.seconds_left
    ]
    if not known:
        return ""
    waiting = total - sum(trial.over or trial.state == "running" for trial in trials)
    return _show_seconds((sum(running) + waiting * sum(known) / len(known)) / jobs)


def _show_seconds(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(min(seconds, 1e9))))


def results_frame(sweep: Sweep, trials: Sequence[Trial]) -> pd.DataFrame:
    """One row a trial: trial, state, each parameter, seed, the metric, and more."""
    import pandas as pd

    rows = []
    for trial in trials:
        values = {name: trial.values.get(name) for name in sweep.specs if name != _SEED_NAME}
        for name, value in values.items():
            if not (value is None or isinstance(value, (bool, int, float))):
                values[name] = show_value(value)
        row = {"trial": trial.name, "state": trial.state, **values, "seed": trial.seed}
        row[sweep.config.metric.name] = trial.score
        row |= {"baseline/J_and_F": trial.baseline, "step": trial.step}
        row |= {"num_steps": trial.num_steps, "seconds": round(trial.seconds, 1)}
        rows.append({**row, "run_id": trial.run_id, "path": str(trial.folder)})
    return pd.DataFrame(rows)


def _ranking(sweep: Sweep, trials: Sequence[Trial]) -> pd.DataFrame:
    """Finished trials with a score, grouped over seeds, best first.

    Columns: the parameters as text; mean; text, difference and p of `compare_groups`, the
    difference from the best.
    """
    import pandas as pd

    names = [name for name in sweep.varying if name != _SEED_NAME]
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
    table = _ranking(sweep, trials)
    if len(table):
        num = int(table["p"].notna().sum())
        title = f"{metric}, mean and 95 % interval"
        shown = Table(title=cell(title, "table.title"), title_justify="left")
        names = [name for name in sweep.varying if name != _SEED_NAME]
        headings = ["", *(sweep.short_names[name] for name in names), "score", "to the best"]
        for heading in headings + [f"p, Holm of {num}"] * (num > 0):
            shown.add_column(cell(heading))
        for rank, row in enumerate(table.to_dict("records"), start=1):
            cells = [cell(row[name]) for name in names] + [row["text"], row["difference"]]
            if num:
                cells.append("" if math.isnan(row["p"]) else f"{row['p']:.3f}")
            shown.add_row(str(rank), *cells)
        console.print(shown)
        if num:
            say(console, "the best was chosen by these scores, so its lead is probably too large")
    elif any(trial.state == "finished" and not trial.diverged for trial in trials):
        say(console, f"no trial logged {metric}; `metric: name:` takes names of metrics.jsonl")
    if early := [trial.name for trial in trials if trial.state == "stopped"]:
        say(console, f"stopped early, not ranked: {', '.join(early)}")
    if broken := [trial.name for trial in trials if trial.state == "finished" and trial.diverged]:
        say(console, f"the last {metric} is no finite number, not ranked: {', '.join(broken)}")
    for trial in trials:
        if trial.state == "failed":
            trial.say_failure(console)
    say(console, f"wrote {folder / 'results.csv'}; the runs: python run.py --runs {folder}")
