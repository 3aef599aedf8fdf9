"""A W&B sweep file run here, trial by trial, without a server: `python run.py sweeps/prompts.yaml`.

A trial is the process that `wandb agent` would start, with a folder of its own. What was decided
stands in `sweep.json` beside the trials, so that the same command goes on with it. A table shows
the trials while they run; `results.csv` and a ranking with intervals show what came out.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from sam2train.config import build, flatten
from sam2train.datasets import data_paths
from sam2train.errors import UserError
from sam2train.experiment import Experiment
from sam2train.files import file_name, write_text
from sam2train.machine import say
from sam2train.run_folder import RUNS
from sam2train.sweep_file import (
    Sweep,
    check_values,
    grid,
    in_grid,
    live_table,
    load_sweep,
    results_frame,
    show_results,
    trial_line,
)
from sam2train.sweep_processes import ForkServer, claim_trial, is_claimed, record_lock
from sam2train.sweep_search import examples, trials_to_stop
from sam2train.sweep_trials import (
    RECORD,
    Trial,
    gpus_for_jobs,
    read_record,
    record_row,
    release_all,
    stop_all,
    trial_environment,
)

if TYPE_CHECKING:
    pass

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
        # Of each trial, its state when this process last read or wrote the record.
        self._seen: dict[str, str] = {}
        self._failed_elsewhere: set[str] = set()  # in this sitting
        self._server: ForkServer | None = None
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
        try:
            self._keep()
            self._draw_demo_data()
            self._loop()
        except (KeyboardInterrupt, SystemExit) as stopped:
            code = int(stopped.code) if isinstance(stopped, SystemExit) else 130
        finally:
            stop_all(self.trials)
            if self._server is not None:
                self._server.close()
            signal.signal(signal.SIGTERM, before)
            for trial in self.trials:
                if trial.state != "failed":  # of these all is known
                    trial.look(self.sweep.config.metric.name)
            self._keep()
            release_all(self.trials)
        show_results(self.sweep, self.trials, self.folder, self.console)
        if code:
            say(self.console, "stopped; the same command goes on from here")
            return code
        return int(any(not trial.over for trial in self.trials[: self.total]))

    def _loop(self) -> None:
        named = self._base["tracking"]
        environment = trial_environment(
            self.jobs,
            group=self.sweep.name,
            sweep_id=self.sweep_id,
            project=self.sweep.config.project or named["project"],
            entity=self.sweep.config.entity or named["entity"],
        )
        gpus = gpus_for_jobs() if self.jobs > 1 else []
        # Elsewhere a fork of a process with torch in it is not safe.
        if sys.platform == "linux" and sum(not t.over for t in self.trials) + self._to_come > 1:
            self._server = ForkServer(environment)
        tried: set[str] = set()
        looked = 0.0
        with self._live() as show:
            while True:
                for trial in self.trials:
                    if trial.poll():
                        self._ended(trial)
                while self._running() < self.jobs and (trial := self._next(tried)):
                    tried.add(trial.name)
                    self._start(trial, environment, gpus)
                if not self._running() and not self._others_run(tried):
                    show()
                    return
                if time.monotonic() - looked > LOOK:
                    self._look()
                    looked = time.monotonic()
                show()
                time.sleep(POLL)

    def _start(self, trial: Trial, environment: Mapping[str, str], gpus: Sequence[str]) -> None:
        """Start a trial, on the GPU that the fewest of this process's trials use."""
        if gpus:
            used = [other.gpu for other in self.trials if other.process is not None]
            trial.gpu = min(gpus, key=used.count)
            environment = {**environment, "CUDA_VISIBLE_DEVICES": trial.gpu}
        try:
            trial.write_values(self.sweep.arguments(trial.values))
            trial.start(self.sweep.command(trial.values), environment, self._server)
        except OSError as error:  # the others still run
            trial.state, trial.problem = "failed", f"{trial.folder}: cannot start: {error}"
            trial.say_failure(self.console)
        self._keep()
        release_all([trial])
        self._say(trial)

    def _next(self, tried: set[str]) -> Trial | None:
        """The trial to start now, claimed for this process; None if there is none. Nothing is tried
        twice in one sitting."""
        if self._target_reached():
            return None
        for trial in self.trials[: self.total]:
            if trial.over or trial.name in tried or trial.name in self._failed_elsewhere:
                continue
            if self._claim(trial):
                return trial
        if self.sweep.config.method == "grid" or len(self.trials) >= self.total:
            return None
        with record_lock(self.folder):
            self._hear()
            if len(self.trials) >= self.total:
                return None
            trial = self._add(self.sweep.next_values(self.trials))
            claimed = self._claim(trial)
            self._write()
        return trial if claimed else None

    def _claim(self, trial: Trial) -> bool:
        """Whether this process is to run the trial; its state is then as another one left it."""
        trial.claim = claim_trial(self.folder, trial.name)
        if trial.claim is None:
            return False
        self._hear()  # what the process that had it made of it, and where that died, its files
        trial.recall(self.sweep.config.metric.name)
        if trial.over or trial.name in self._failed_elsewhere:
            release_all([trial])
            return False
        return True

    def _others_run(self, tried: set[str]) -> bool:
        """Whether another process has a trial, which this one would take over if that one died."""
        done = tried | self._failed_elsewhere
        left = [t.name for t in self.trials[: self.total] if not t.over and t.name not in done]
        return any(is_claimed(self.folder, name) for name in left)

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
        release_all([trial])
        self._say(trial)
        if trial.state == "failed":
            trial.say_failure(self.console)

    def _look(self) -> None:
        """Read what the running trials wrote; end those that hyperband gives up, and those that
        another process took over."""
        running = [trial for trial in self.trials if trial.state == "running"]
        for trial in running:
            if trial.claim is not None and trial.process is not None and not trial.claim.renew():
                trial.process.terminate()
        for trial in running:
            trial.look(self.sweep.config.metric.name)
        rule, goal = self.sweep.config.early_terminate, self.sweep.config.metric.goal
        for trial in trials_to_stop(rule, goal, self.trials) if rule else ():
            trial.stop_early()

    @property
    def _to_come(self) -> int:
        """Trials that a search has not drawn yet."""
        return self.total - len(self.trials)

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
            self._seen[trial.name] = trial.state
            self.trials.append(trial)
            self._set_up(trial)
            trial.recall(self.sweep.config.metric.name)
            if trial.problem:
                trial.say_failure(self.console)

    def _moving(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings by dotted name that can change a result, without those that are varied."""
        skipped = (*_FREE, *self.sweep.specs)
        return {name: v for name, v in flatten(config).items() if not name.startswith(skipped)}

    def _hear(self) -> None:
        """Take over what other processes decided about trials since this one looked."""
        own = {trial.name: trial for trial in self.trials}
        for row in (read_record(self.folder) or {"trials": []})["trials"]:
            trial = own.get(row.name)
            if row.state == self._seen.get(row.name) or (trial and trial.process is not None):
                continue
            self._seen[row.name] = row.state
            if trial is None:
                trial = row
                self.trials.append(trial)
                self._set_up(trial)
            trial.run_id, trial.values, trial.state = row.run_id, row.values, row.state
            trial.look(self.sweep.config.metric.name)
            if trial.state == "failed":
                self._failed_elsewhere.add(trial.name)
        self.trials.sort(key=lambda trial: int(trial.name))

    def _keep(self) -> None:
        """Write `sweep.json` and `results.csv`, with what other processes wrote meanwhile."""
        with record_lock(self.folder):
            self._hear()
            self._write()

    def _write(self) -> None:
        content = {
            "sweep": self.sweep.fixed_settings(),
            "experiment": self._base,
            "sweep_id": self.sweep_id,
        }
        rows = [record_row(trial) for trial in self.trials]
        text = json.dumps({**content, "trials": rows}, indent=1)
        write_text(self.folder / RECORD, text + "\n")
        self._seen = {trial.name: trial.state for trial in self.trials}
        table = results_frame(self.sweep, self.trials).to_csv(index=False, lineterminator="\n")
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
                live_table(self.sweep, self.trials, self.total, self.jobs, rows), refresh=True
            )

    def _say(self, trial: Trial) -> None:
        if not self.console.is_terminal:
            say(self.console, trial_line(self.sweep, trial))


def _exit(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
