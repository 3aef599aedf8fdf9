"""One trial of a local sweep: its values, its process, and how far its run has come on disk."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sam2train.files import read_json, write_text
from sam2train.machine import num_cores
from sam2train.results import load_metrics

LOG = "log.txt"  # all that a trial printed
VALUES = "sweep_parameters.yaml"  # what an agent's trial finds through WANDB_SWEEP_PARAM_PATH
KILL_DELAY = 60.0  # seconds between SIGTERM, upon which a trial saves, and SIGKILL
_STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)


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
    history: list[float] = field(default_factory=list)  # of the sweep's metric, each time logged
    process: subprocess.Popen | None = None
    early: float | None = None  # when hyperband asked for its end, time.monotonic()

    @property
    def score(self) -> float | None:
        return self.history[-1] if self.history else None

    @property
    def over(self) -> bool:
        """Whether it is never run again."""
        return self.state in ("finished", "stopped")

    def start(self, command: Sequence[str], environment: Mapping[str, str], lock: int) -> None:
        """Start its process, or go on from its last checkpoint; it prints to its log.

        Args:
            command: `wandb agent`'s; the folder, and `--resume` if need be, are added.
            environment: that of the process.
            lock: an open file that the process keeps open.
        """
        checkpoint = self.folder / "checkpoints" / "last.pt"
        if not checkpoint.exists():
            self._clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        typed = self.folder / VALUES
        words = [*command, "--run-dir", str(self.folder)]
        words += ["--resume"] * checkpoint.exists()
        with (self.folder / LOG).open("a") as log:
            print("$", shlex.join(words), file=log, flush=True)
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **environment,
                    "WANDB_RUN_ID": self.run_id,
                    "WANDB_SWEEP_PARAM_PATH": str(typed),
                },
                # A group of its own: Ctrl-C reaches the sweep, which lets its trials save.
                start_new_session=True,
                pass_fds=(lock,),
            )
        self.state, self.early = "running", None

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
        """Read how far its run has come."""
        if not (self.folder / "metrics.jsonl").is_file():
            return
        metrics, summary = load_metrics(self.folder), read_summary(self.folder)
        if len(metrics):
            self.step = int(metrics.index[-1])
            self.seconds = float(metrics["seconds"].max()) if "seconds" in metrics else 0.0
        self.seconds = max(self.seconds, summary.get("seconds", 0.0))
        self.baseline = summary.get("baseline/J_and_F")
        if metric in metrics:
            self.history = metrics[metric].dropna().tolist()
        elif summary.get(metric) is not None:
            self.history = [summary[metric]]

    def last_words(self, most: int = 6) -> list[str]:
        """The last lines of its log."""
        path = self.folder / LOG
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        return [line for line in lines if line.strip()][-most:]

    def _clear(self) -> None:
        """Without a checkpoint it starts again: remove what it wrote, but for the log."""
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
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C is impatience
        pass
    finally:
        for trial in running:
            if trial.process.poll() is None:
                trial.process.kill()
                trial.process.wait()
            trial.poll()


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a run, empty if there is none yet."""
    way_out = f"expected the JSON that the run wrote; delete the folder {folder} to run it again"
    return read_json(folder / "summary.json", way_out, optional=True)


def trial_environment(
    jobs: int, *, group: str, sweep_id: str | None, project: str, entity: str | None
) -> dict[str, str]:
    """The environment of the trials: this one, and what `wandb agent` adds to it.

    Args:
        jobs: trials that share the processors. OMP_NUM_THREADS, if it is set, says how many threads
            there are to be divided.
        group: of the runs in W&B where there is no sweep.
        sweep_id: a sweep on W&B's server, [[entity/]project/]id, which offline runs join once they
            are synced. There W&B ignores the project that a run names, so that it stands here.
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
