"""One trial of a local sweep: its values, its process, and how far its run has come on disk; what
an earlier sitting decided about all trials"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from sam2train.errors import UserError
from sam2train.files import read_json, write_text
from sam2train.machine import STOP_SIGNALS, num_cores, say
from sam2train.results import load_metrics
from sam2train.run_folder import BASE_SCORES, RunFolder, read_summary
from sam2train.sweep_processes import Claim, ForkedProcess, ForkServer

LOG = "log.txt"  # all that a trial printed
VALUES = "sweep_parameters.yaml"  # what an agent's trial finds through WANDB_SWEEP_PARAM_PATH
KILL_DELAY = 60.0  # seconds between SIGTERM, upon which a trial saves, and SIGKILL
RECORD = "sweep.json"  # beside the trials: what was decided about them
_RECORDED = ("name", "run_id", "values", "state")  # of each trial, in the record
_STATES = ("waiting", "running", "finished", "failed", "interrupted", "stopped")
_STOPPED = {code for number in STOP_SIGNALS for code in (128 + number, -number)}


@dataclass
class Trial:
    """A set of values; what was decided about it, and what its run has written so far."""

    name: str  # of its folder: 001, 002, ...
    run_id: str  # W&B's
    values: dict[str, Any]  # by dotted name
    folder: Path
    # waiting, running, finished, failed, interrupted (it goes on), stopped (early, for good)
    state: str = "waiting"
    seed: int = 0
    num_steps: int = 0
    step: int = 0
    seconds: float = 0.0
    baseline: float | None = None  # J&F before training
    history: list[float] = field(default_factory=list)  # of the sweep's metric, finite numbers
    diverged: bool = False  # whether the last value of the metric is no finite number
    finished: bool = False  # whether its run says so
    problem: str | None = None  # what is wrong with its files, or why it could not start
    process: subprocess.Popen | ForkedProcess | None = None
    gpu: str | None = None  # that it was started on, where --jobs spread them
    claim: Claim | None = None  # while this process runs it
    early: float | None = None  # when hyperband asked for its end, time.monotonic()

    @property
    def score(self) -> float | None:
        """The last value of the metric; None without one, or where it is no finite number."""
        return self.history[-1] if self.history and not self.diverged else None

    @property
    def over(self) -> bool:
        """Whether the trial is never run again."""
        return self.state in ("finished", "stopped")

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        server: ForkServer | None = None,
    ) -> None:
        """Start the process, which prints to the trial's log, or let it go on from its checkpoint.

        Args:
            command: that of `wandb agent`; the folder, and `--resume` if need be, are added.
            environment: that of the process.
            server: forks the process, which then need not import torch and all else again.

        Raises:
            OSError: the folder cannot be written, or the process not started.
        """
        begun = RunFolder(self.folder).can_go_on
        if not begun:
            self._clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        typed = self.folder / VALUES
        words = [*command, "--run-dir", str(self.folder)]
        words += ["--resume"] * begun
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            print("$", shlex.join(words), file=log, flush=True)
            environment = {
                **environment,
                "WANDB_RUN_ID": self.run_id,
                "WANDB_SWEEP_PARAM_PATH": str(typed),
                BASE_SCORES: str(self.folder.parent / "base_scores"),
            }
            # A trial that outlives a killed sweep keeps its claim.
            kept = (self.claim.lock.fileno(),) if self.claim else ()
            if server is not None:
                self.process = server.start(words, environment, log.fileno(), kept)
            else:
                self.process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    # A group of its own: Ctrl-C reaches the sweep, which lets its trials save.
                    start_new_session=True,
                    pass_fds=kept if sys.platform != "win32" else (),
                )
        self.state, self.early, self.problem = "running", None, None

    def write_values(self, arguments: Mapping[str, Any]) -> None:
        """Write the values with their types as wandb 0.31 does for an agent's trial."""
        content = {name: {"value": value} for name, value in arguments.items()}
        write_text(self.folder / VALUES, yaml.safe_dump({**content, "wandb_version": 1}))

    def poll(self) -> bool:
        """Whether its process ended since the last call; `state` then says how."""
        if self.process is None or self.process.poll() is None:
            return False
        code, self.process = self.process.returncode, None
        if code == 0:
            self.state = "finished"
        elif self.early is not None:
            self.state = "stopped"
        else:
            self.state = "interrupted" if code in _STOPPED else "failed"
        return True

    def stop_early(self) -> None:
        """Ask its process to end; asked again after KILL_DELAY, kill it, as W&B's agent does."""
        if self.process is None:
            return
        if self.early is None:
            self.early = time.monotonic()
            self.process.terminate()
        elif time.monotonic() > self.early + KILL_DELAY:
            self.process.kill()

    def look(self, metric: str) -> None:
        """Read how far the run has come. Where a file is not as a run writes it, `problem` names
        it, and what was known before stays: the trial is run again, and its run mends the file."""
        self.problem, self.finished = None, False
        folder, said = RunFolder(self.folder), []
        try:
            # A value that is no number is a result, if one that cannot be ranked.
            tell = {"say": said.append, "say_value": lambda line: None}
            summary = read_summary(folder.summary, folder.metrics, **tell)
            written = folder.metrics.is_file()
            metrics = load_metrics(self.folder, **tell) if written else None
        except UserError as error:
            said.append(str(error))
        if said:
            self.problem = "; ".join(dict.fromkeys(said))
            return
        self.finished = summary.get("status") == "finished"
        rows = {} if metrics is None else {name: metrics[name].tolist() for name in metrics}
        if rows:
            self.step = int(metrics.index[-1])
        seconds = [*rows.get("seconds", ()), summary.get("seconds")]
        self.seconds = max(filter(is_finite, seconds), default=0.0)
        baseline = summary.get("baseline/J_and_F")
        self.baseline = baseline if is_finite(baseline) else None
        logged = rows.get(metric) or [summary[name] for name in (metric,) if name in summary]
        self.history = [value for value in logged if is_finite(value)]
        # NaN and infinity are written as null; a row without the metric reads as NaN, too.
        last = [v for v in logged if not (isinstance(v, float) and math.isnan(v))][-1:]
        self.diverged = not all(map(is_finite, [*last, summary.get(metric, 0.0)]))

    def recall(self, metric: str) -> None:
        """Set the state of a trial of an earlier sitting by what lies in its folder."""
        self.look(metric)
        if not self.folder.is_dir():
            self.state = "waiting"
        elif self.problem:
            self.state = "failed"  # it is run again
        elif self.finished:
            self.state = "finished"
        elif self.state in ("running", "finished"):  # the sweep was killed with it
            self.state = "interrupted"

    @property
    def seconds_left(self) -> float | None:
        """By the time that its steps took so far; None before the first."""
        return self.seconds / self.step * (self.num_steps - self.step) if self.step else None

    def say_failure(self, console: Console) -> None:
        """Print what is wrong with it, or what it printed last, and where all of it stands."""
        if self.problem:
            say(console, f"trial {self.name} failed: {self.problem}")
        if words := self.last_words():
            say(console, f"trial {self.name} failed; its log {self.folder / LOG} ends:")
        for line in words:
            say(console, f"  {line}")

    def last_words(self, most: int = 6) -> list[str]:
        """The last lines of the trial's log."""
        path = self.folder / LOG
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        return [line for line in lines if line.strip()][-most:]

    def _clear(self) -> None:
        """Remove what the trial wrote, except its log: without a checkpoint it starts again."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name in (LOG, VALUES):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def stop_all(trials: Sequence[Trial]) -> None:
    """End the processes that still run: they save, or are killed after KILL_DELAY."""
    running = [trial for trial in trials if trial.process is not None]
    for trial in running:
        trial.process.terminate()
    deadline = time.monotonic() + KILL_DELAY
    try:
        for trial in running:
            trial.process.wait(max(deadline - time.monotonic(), 0.1))
    # a second Ctrl-C: the processes are killed at once
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        for trial in running:
            if trial.process.poll() is None:
                trial.process.kill()
                trial.process.wait()
            trial.poll()


def read_record(folder: Path) -> dict[str, Any] | None:
    """What an earlier sitting of a sweep wrote to RECORD; None if there was none.

    Returns:
        `sweep`, its settings; `experiment`, those of its first trial; `sweep_id`; `trials`, a list
        of `Trial`.

    Raises:
        UserError: the file is not what a sweep writes.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    expected = (
        f"expected what an earlier sitting of this sweep wrote; move {folder} away to start again"
    )
    content = read_json(path, expected)
    try:
        trials = [_read_trial(folder, row) for row in content["trials"]]
        if not (isinstance(content["sweep"], dict) and isinstance(content["experiment"], dict)):
            raise ValueError("`sweep` and `experiment` are no JSON objects")
        return {**content, "sweep_id": content["sweep_id"], "trials": trials}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {error!r}; {expected}") from error


def _read_trial(folder: Path, row: Mapping[str, Any]) -> Trial:
    if not (re.fullmatch(r"\d{3,}", row["name"]) and re.fullmatch(r"\w+", row["run_id"])):
        raise ValueError(f"trial {row['name']!r}: expected a number as its name, and a run id")
    if row["state"] not in _STATES or not isinstance(row["values"], dict):
        raise ValueError(f"trial {row['name']}: no state or values of a trial")
    return Trial(**{key: row[key] for key in _RECORDED}, folder=folder / row["name"])


def release_all(trials: Sequence[Trial]) -> None:
    """Let other processes have the trials that this one does not run any more."""
    for trial in trials:
        if trial.claim is not None and trial.process is None:
            trial.claim.release()
            trial.claim = None


def gpus_for_jobs() -> list[str]:
    """The names of the GPUs that trials may use, as CUDA_VISIBLE_DEVICES takes them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def record_row(trial: Trial) -> dict[str, Any]:
    """What `read_record` needs to know of a trial."""
    return {key: getattr(trial, key) for key in _RECORDED}


def trial_environment(
    jobs: int, *, group: str, sweep_id: str | None, project: str, entity: str | None
) -> dict[str, str]:
    """The environment of the trials: that of this process, and what `wandb agent` adds to it.

    Args:
        jobs: trials that share the processors. If OMP_NUM_THREADS is set, these threads are shared.
        group: W&B's group of the runs where there is no sweep.
        sweep_id: a sweep on W&B's server, [[entity/]project/]id, which offline runs join once they
            are synced. W&B ignores the project that a run of a sweep names, so the environment
            names it.
        project, entity: of the sweep, unless its id or the environment names others.
    """
    environment = dict(os.environ)
    for name in ("WANDB_SERVICE", "_WANDB_SERVICE"):  # of a W&B process that is not the trial's
        environment.pop(name, None)
    if jobs > 1:
        given = environment.get("OMP_NUM_THREADS", "")
        there = int(given) if given.isdecimal() else num_cores()
        environment["OMP_NUM_THREADS"] = str(max(1, there // jobs))
    environment.setdefault("WANDB_MODE", "offline")  # no trial waits for a server
    environment["PYTHONUNBUFFERED"] = "1"
    if sweep_id is None:
        environment.setdefault("WANDB_RUN_GROUP", group)
        return environment
    *owner, environment["WANDB_SWEEP_ID"] = sweep_id.split("/")
    environment.setdefault("WANDB_PROJECT", project)
    if entity:
        environment.setdefault("WANDB_ENTITY", entity)
    names = ("WANDB_PROJECT", "WANDB_ENTITY")
    return environment | dict(zip(names, reversed(owner), strict=False))


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
