"""A W&B sweep file run here, trial by trial, without a server: `python run.py sweeps/prompts.yaml`.

A trial is the process that `wandb agent` would start, with a folder of its own. What was decided
stands in `sweep.json` beside the trials, so that the same command goes on with it. A table shows
the trials while they run; `results.csv` and a ranking with intervals show what came out.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sam2train.config import build, flatten
from sam2train.datasets import data_paths
from sam2train.errors import UserError
from sam2train.experiment import Experiment
from sam2train.files import file_name, write_text
from sam2train.machine import cell, say
from sam2train.results_compare import compare_groups
from sam2train.run_folder import RUNS
from sam2train.sweep_file import Sweep, check_values, grid, in_grid, load_sweep, show_value
from sam2train.sweep_search import examples, trials_to_stop
from sam2train.sweep_trials import (
    RECORD,
    Trial,
    claim,
    read_record,
    record_row,
    stop_all,
    trial_environment,
)

if TYPE_CHECKING:
    import pandas as pd

POLL = 0.5  # seconds between looks at the processes
LOOK = 2.0  # seconds between looks at what they wrote
# Settings that change no result: they may change from one sitting of a sweep to the next.
_FREE = (
    "dataset.mask_cache_mb",
    "dataset.num_workers",
    "evaluation.num_overlays",
    "tracking.",
    "trainer.device",
    "trainer.log_every",
    "trainer.save_every",
)
_SEED_NAME = "trainer.seed"
_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "interrupted": "yellow"}


def run_sweep(
    path: Path,
    folder: Path | None = None,
    *,
    extra: Sequence[str] = (),
    count: int | None = None,
    jobs: int = 1,
    console: Console | None = None,
) -> int:
    """Run the trials of a sweep file that are still to be run.

    Args:
        folder: of the sweep, runs/sweeps/<name of the file> by default.
        extra: words for every trial.
        count: trials in all, those of earlier sittings included.
        jobs: trials at a time.

    Returns:
        The exit code: 0 if all trials ended well, 1 if one did not, 130 or 143 if stopped.

    Raises:
        UserError: what is wrong with the sweep, or with going on in this folder.
    """
    sweep = load_sweep(path, extra)
    folder = folder or RUNS / "sweeps" / file_name(sweep.name)
    return _LocalSweep(sweep, folder, count, jobs, console or Console()).run()


class _LocalSweep:
    """The trials of a sweep, and the loop that runs them."""

    def __init__(
        self, sweep: Sweep, folder: Path, count: int | None, jobs: int, console: Console
    ) -> None:
        self.sweep, self.folder, self.jobs, self.console = sweep, folder, jobs, console
        planned = grid(sweep, count) if sweep.config.method == "grid" else []
        experiments = check_values(sweep, planned or examples(sweep.specs))
        limits = [limit for limit in (count, sweep.config.run_cap, len(planned)) if limit]
        if not limits:
            raise UserError(
                f"{sweep.path}: method {sweep.config.method} has no end; give --count N, or write "
                "`run_cap: N` in the file"
            )
        self.total = min(limits)
        sections = [experiment.dataset for experiment in experiments]
        named = [path for d in sections for path in (d.data_path, d.val_path, d.test_path)]
        paths = [part for path in named for part in data_paths(path)]
        self._data = dict.fromkeys(paths)
        self._base = experiments[0].model_dump(mode="json")
        self.sweep_id = os.environ.get("WANDB_SWEEP_ID")
        self.trials: list[Trial] = []
        self._recall()
        # As text: to Python 1, 1.0 and True are the same value.
        known = {json.dumps(trial.values) for trial in self.trials}
        for values in planned[: self.total]:
            if json.dumps(values) not in known:
                self._add(values)

    def run(self) -> int:
        """Run what is not over yet, up to `jobs` trials at a time, and say what came out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = signal.signal(signal.SIGTERM, _exit)
        code = 0
        with claim(self.folder) as lock:
            try:
                self._draw_demo_data()
                self._loop(lock)
            except (KeyboardInterrupt, SystemExit) as stopped:
                code = int(stopped.code) if isinstance(stopped, SystemExit) else 130
            finally:
                stop_all(self.trials)
                signal.signal(signal.SIGTERM, before)
                for trial in self.trials:
                    if trial.state != "failed":  # of these all is known
                        trial.look(self.sweep.config.metric.name)
                self._keep()
        _show_results(self.sweep, self.trials, self.folder, self.console)
        if code:
            say(self.console, "stopped; the same command goes on from here")
            return code
        return int(any(not trial.over for trial in self.trials[: self.total]))

    def _loop(self, lock: int) -> None:
        named = self._base["tracking"]
        environment = trial_environment(
            self.jobs,
            group=self.sweep.name,
            sweep_id=self.sweep_id,
            project=self.sweep.config.project or named["project"],
            entity=self.sweep.config.entity or named["entity"],
        )
        tried: set[str] = set()
        looked = 0.0
        with self._live() as show:
            while True:
                for trial in self.trials:
                    if trial.poll():
                        self._ended(trial)
                while self._running() < self.jobs and (trial := self._next(tried)):
                    tried.add(trial.name)
                    self._start(trial, environment, lock)
                if not self._running():
                    show()
                    return
                if time.monotonic() - looked > LOOK:
                    self._look()
                    looked = time.monotonic()
                show()
                time.sleep(POLL)

    def _start(self, trial: Trial, environment: Mapping[str, str], lock: int) -> None:
        try:
            trial.write_values(self.sweep.arguments(trial.values))
            trial.start(self.sweep.command(trial.values), environment, lock)
        except OSError as error:  # the others still run
            trial.state, trial.problem = "failed", f"{trial.folder}: cannot start: {error}"
            trial.say_failure(self.console)
        self._keep()
        self._say(trial)

    def _next(self, tried: set[str]) -> Trial | None:
        """The trial to start now, None if there is none. Nothing is tried twice in one sitting."""
        if self._target_reached():
            return None
        for trial in self.trials[: self.total]:
            if not trial.over and trial.name not in tried:
                return trial
        if self.sweep.config.method == "grid" or len(self.trials) >= self.total:
            return None
        return self._add(self.sweep.next_values(self.trials))

    def _add(self, values: dict[str, Any]) -> Trial:
        name = f"{len(self.trials) + 1:03d}"
        trial = Trial(name, secrets.token_hex(4), values, self.folder / name)
        self.trials.append(trial)
        self._set_up(trial)
        return trial

    def _set_up(self, trial: Trial) -> None:
        with contextlib.suppress(UserError):  # a value drawn out of range: the trial names it
            settings = self.sweep.experiment(trial.values).trainer
            trial.seed, trial.num_steps = settings.seed, settings.num_steps

    def _ended(self, trial: Trial) -> None:
        trial.look(self.sweep.config.metric.name)
        if trial.state == "finished" and trial.problem:
            trial.state = "failed"  # its result cannot be read
        self._keep()
        self._say(trial)
        if trial.state == "failed":
            trial.say_failure(self.console)

    def _look(self) -> None:
        """Read what the running trials wrote; end those that hyperband gives up."""
        running = [trial for trial in self.trials if trial.state == "running"]
        for trial in running:
            trial.look(self.sweep.config.metric.name)
        rule, goal = self.sweep.config.early_terminate, self.sweep.config.metric.goal
        for trial in trials_to_stop(rule, goal, self.trials) if rule else ():
            trial.stop_early()

    def _running(self) -> int:
        return sum(trial.process is not None for trial in self.trials)

    def _target_reached(self) -> bool:
        target, goal = self.sweep.config.metric.target, self.sweep.config.metric.goal
        if target is None:
            return False
        scores = [score for trial in self.trials for score in trial.history]
        return any(s >= target if goal == "maximize" else s <= target for s in scores)

    def _draw_demo_data(self) -> None:
        """Once, before trials that run at the same time would each do it."""
        from sam2train.demo import resolve_data_path

        for path in self._data:
            resolve_data_path(path, partial(say, self.console))

    def _recall(self) -> None:
        """Take over the trials of earlier sittings; UserError if they were of another sweep."""
        known = read_record(self.folder)
        if known is None:
            return
        base = build(Experiment, known["experiment"], str(self.folder / RECORD))
        changed = _changes(flatten(known["sweep"]), flatten(self.sweep.fixed_settings()))
        changed += _changes(*map(self._moving, (base.model_dump(mode="json"), self._base)))
        changed += [
            f"trial {trial.name} with {trial.values} is not in the sweep any more"
            for trial in known["trials"]
            if self.sweep.config.method == "grid" and not in_grid(self.sweep, trial.values)
        ]
        if changed:
            raise UserError(
                f"{self.folder}: the sweep there is not that of {self.sweep.path}\n  "
                + "\n  ".join(changed)
                + "\nrestore the settings, move the folder away, or name another with --run-dir"
            )
        self.sweep_id = self.sweep_id or known["sweep_id"]
        for trial in known["trials"]:
            self.trials.append(trial)
            self._set_up(trial)
            trial.recall(self.sweep.config.metric.name)
            if trial.problem:
                trial.say_failure(self.console)

    def _moving(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings by dotted name that can change a result, without those that are varied."""
        skipped = (*_FREE, *self.sweep.specs)
        return {name: v for name, v in flatten(config).items() if not name.startswith(skipped)}

    def _keep(self) -> None:
        """Write `sweep.json` and `results.csv`."""
        content = {
            "sweep": self.sweep.fixed_settings(),
            "experiment": self._base,
            "sweep_id": self.sweep_id,
        }
        rows = [record_row(trial) for trial in self.trials]
        text = json.dumps({**content, "trials": rows}, indent=1)
        write_text(self.folder / RECORD, text + "\n")
        table = _results_frame(self.sweep, self.trials).to_csv(index=False, lineterminator="\n")
        write_text(self.folder / "results.csv", table)

    @contextlib.contextmanager
    def _live(self) -> Iterator[Any]:
        """A function that refreshes the table; on anything but a terminal it does nothing."""
        if not self.console.is_terminal:
            yield lambda: None
            return
        with Live(console=self.console, auto_refresh=False, vertical_overflow="crop") as live:
            rows = self.console.height - 8
            yield lambda: live.update(
                _live_table(self.sweep, self.trials, self.total, self.jobs, rows), refresh=True
            )

    def _say(self, trial: Trial) -> None:
        if not self.console.is_terminal:
            say(self.console, _trial_line(self.sweep, trial))


def _exit(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _live_table(sweep: Sweep, trials: Sequence[Trial], total: int, jobs: int, rows: int) -> Table:
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


def _trial_line(sweep: Sweep, trial: Trial) -> str:
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


def _results_frame(sweep: Sweep, trials: Sequence[Trial]) -> pd.DataFrame:
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


def _show_results(sweep: Sweep, trials: Sequence[Trial], folder: Path, console: Console) -> None:
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
