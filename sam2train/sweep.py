"""A W&B sweep file run here, trial by trial, without a server: `python run.py sweeps/prompts.yaml`.

A trial is the process that `wandb agent` would start, with a folder of its own. What was decided
stands in `sweep.json` beside the trials, so that the same command goes on with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from sam2train import sweep_search
from sam2train.config import build, flatten
from sam2train.errors import UserError
from sam2train.experiment import Experiment
from sam2train.files import read_json, write_text
from sam2train.sweep_file import Sweep, check_values, grid, load_sweep
from sam2train.sweep_report import (
    live_table,
    say_failure,
    say_plainly,
    show_results,
    trial_line,
    write_results,
)
from sam2train.sweep_trials import Trial, read_summary, stop_all, trial_environment

POLL = 0.5  # seconds between looks at the processes
LOOK = 2.0  # seconds between looks at what they wrote
# Settings that move no result: they may change from one sitting of a sweep to the next.
_FREE = (
    "dataset.mask_cache_mb",
    "dataset.num_workers",
    "evaluation.num_overlays",
    "tracking.",
    "trainer.device",
    "trainer.log_every",
    "trainer.save_every",
)


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
    folder = folder or Path("runs/sweeps") / sweep.name
    return LocalSweep(sweep, folder, count, jobs, console or Console()).run()


class LocalSweep:
    """The trials of a sweep, and the loop that runs them."""

    def __init__(
        self, sweep: Sweep, folder: Path, count: int | None, jobs: int, console: Console
    ) -> None:
        self.sweep, self.folder, self.jobs, self.console = sweep, folder, jobs, console
        planned = grid(sweep) if sweep.config.method == "grid" else []
        experiments = check_values(sweep, planned or sweep_search.examples(sweep))
        limits = [limit for limit in (count, sweep.config.run_cap, len(planned)) if limit]
        if not limits:
            raise UserError(
                f"{sweep.path}: method {sweep.config.method} has no end; give --count N, or write "
                "`run_cap: N` in the file"
            )
        self.total = min(limits)
        self._data = dict.fromkeys(
            path
            for experiment in experiments
            for path in (
                experiment.dataset.data_path,
                experiment.dataset.val_path,
                experiment.dataset.test_path,
            )
            if path
        )
        self._base = experiments[0].model_dump(mode="json")
        self.sweep_id = os.environ.get("WANDB_SWEEP_ID")
        self.trials: list[Trial] = []
        self._recall(planned)
        known = {_text(trial.values) for trial in self.trials}
        for values in planned[: self.total]:
            if _text(values) not in known:
                self._add(values)

    def run(self) -> int:
        """Run what is not over yet, up to `jobs` trials at a time, and say what came out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = signal.signal(signal.SIGTERM, _exit)
        code = 0
        with _lock(self.folder) as lock:
            try:
                self._draw_demo_data()
                self._loop(lock)
            except (KeyboardInterrupt, SystemExit) as stopped:
                code = int(stopped.code) if isinstance(stopped, SystemExit) else 130
            finally:
                stop_all(self.trials)
                signal.signal(signal.SIGTERM, before)
                for trial in self.trials:
                    trial.look(self.sweep.config.metric.name)
                self._keep()
        show_results(self.sweep, self.trials, self.folder, self.console)
        if code:
            say_plainly("stopped; the same command goes on from here", self.console)
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
                    trial.write_values(self.sweep.arguments(trial.values))
                    trial.start(self.sweep.command(trial.values), environment, lock)
                    self._keep()
                    self._say(trial)
                if not self._running():
                    show()
                    return
                if time.monotonic() - looked > LOOK:
                    self._look()
                    looked = time.monotonic()
                show()
                time.sleep(POLL)

    def _next(self, tried: set[str]) -> Trial | None:
        """The trial to start now, None if there is none. Nothing is tried twice in one sitting."""
        if self._target_reached():
            return None
        for trial in self.trials[: self.total]:
            if not trial.over and trial.name not in tried:
                return trial
        if self.sweep.config.method == "grid" or len(self.trials) >= self.total:
            return None
        values = sweep_search.next_values(self.sweep, self.trials)
        return self._add(values)

    def _add(self, values: dict[str, Any]) -> Trial:
        name = f"{len(self.trials) + 1:03d}"
        trial = Trial(name, secrets.token_hex(4), values, self.folder / name)
        self.trials.append(trial)
        self._set_up(trial)
        return trial

    def _set_up(self, trial: Trial) -> None:
        with contextlib.suppress(UserError):  # a value drawn out of range: the trial will say it
            settings = self.sweep.experiment(trial.values).trainer
            trial.seed, trial.num_steps = settings.seed, settings.num_steps

    def _ended(self, trial: Trial) -> None:
        trial.look(self.sweep.config.metric.name)
        self._keep()
        self._say(trial)
        if trial.state == "failed":
            say_failure(trial, self.console)

    def _look(self) -> None:
        """Read what the running trials wrote; end those that hyperband gives up."""
        running = [trial for trial in self.trials if trial.state == "running"]
        for trial in running:
            trial.look(self.sweep.config.metric.name)
        if self.sweep.config.early_terminate is None:
            return
        for trial in sweep_search.trials_to_stop(self.sweep, self.trials):
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
            resolve_data_path(path, self.console.print)

    def _recall(self, planned: Sequence[Mapping[str, Any]]) -> None:
        """Take over the trials of earlier sittings; UserError if they were of another sweep."""
        path = self.folder / "sweep.json"
        expected = (
            "expected what an earlier sitting of this sweep wrote; move "
            f"{self.folder} away to start again"
        )
        if not path.exists():
            return
        known = read_json(path, expected)
        try:
            trials, base = known["trials"], build(Experiment, known["experiment"], str(path))
            before = known["sweep"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: {error!r}; {expected}") from error
        changed = _changes(before, self._identity())
        changed += _changes(*map(self._moving, (base.model_dump(mode="json"), self._base)))
        changed += [
            f"trial {trial['name']} with {trial['values']} is not in the sweep any more"
            for trial in trials
            if planned and _text(trial["values"]) not in map(_text, planned)
        ]
        if changed:
            raise UserError(
                f"{self.folder}: the sweep there is not that of {self.sweep.path}\n  "
                + "\n  ".join(changed)
                + "\nrestore the settings, move the folder away, or name another with --run-dir"
            )
        self.sweep_id = self.sweep_id or known["sweep_id"]
        for row in trials:
            trial = Trial(**row, folder=self.folder / row["name"])
            self.trials.append(trial)
            self._set_up(trial)
            trial.look(self.sweep.config.metric.name)
            if not trial.folder.is_dir():
                trial.state = "waiting"
            elif read_summary(trial.folder).get("status") == "finished":
                trial.state = "finished"
            elif trial.state in ("running", "finished"):  # the sweep was killed with it
                trial.state = "interrupted"

    def _identity(self) -> dict[str, Any]:
        """What must not change while a sweep goes on. A grid may grow."""
        config = self.sweep.config.model_dump(mode="json")
        free = ("description", "project", "entity", "run_cap", "name")
        free += ("parameters",) if config["method"] == "grid" else ()
        fixed = {name: value for name, value in config.items() if name not in free}
        return {**fixed, "extra": list(self.sweep.extra)}

    def _moving(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings by dotted name that can move a result, without those that are varied."""
        skipped = (*_FREE, *self.sweep.specs)
        return {name: v for name, v in flatten(config).items() if not name.startswith(skipped)}

    def _keep(self) -> None:
        """Write `sweep.json` and `results.csv`."""
        rows = [
            {"name": t.name, "run_id": t.run_id, "values": t.values, "state": t.state}
            for t in self.trials
        ]
        content = {"sweep": self._identity(), "experiment": self._base, "sweep_id": self.sweep_id}
        text = json.dumps({**content, "trials": rows}, indent=1)
        write_text(self.folder / "sweep.json", text + "\n")
        write_results(self.sweep, self.trials, self.folder)

    @contextlib.contextmanager
    def _live(self) -> Iterator[Any]:
        """A function that refreshes the table; on anything but a terminal it does nothing."""
        if not self.console.is_terminal:
            yield lambda: None
            return
        with Live(console=self.console, auto_refresh=False, vertical_overflow="crop") as live:
            rows = self.console.height - 8
            yield lambda: live.update(
                live_table(self.sweep, self.trials, self.total, self.jobs, rows), refresh=True
            )

    def _say(self, trial: Trial) -> None:
        if not self.console.is_terminal:
            say_plainly(trial_line(self.sweep, trial), self.console)


def _exit(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values)  # to Python 1, 1.0 and True are the same value


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """Hold the folder through a file, whose number comes out.

    Trials get it, too: those that outlive a sweep that was killed must not be started twice.

    Raises:
        UserError: another process runs this sweep.
    """
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder}: this sweep is running already, or one of its trials still is; wait for "
                "it, or end it"
            ) from error
        yield file.fileno()
