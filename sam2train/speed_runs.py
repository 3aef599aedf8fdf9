"""Whole runs of the demo: a sweep beside separate runs, the start, and what a log line costs.

Each run is a process of its own, as a user starts it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import yaml
from rich.console import Console

from sam2train.demo import resolve_data_path
from sam2train.errors import MachineFault
from sam2train.experiment import load_experiment
from sam2train.files import REPOSITORY
from sam2train.speed_clock import CPU, Row, alternate, synchronise
from sam2train.trainer import Trainer

EXPERIMENT = "experiments/coco_point_bbox.yaml"
_QUIET = ("tracking.mode=disabled",)
# What a run of the demo imports of other packages.
_BARE = (
    "import torch, torchvision, cv2, pydantic, rich.console, pycocotools.mask; "
    "import hydra.utils, omegaconf, sam2.modeling.sam2_base"
)
# Prints the clock where the first step would begin, and ends there.
_FIRST_STEP = """
import os, sys, time
from sam2train.trainer import Trainer

def first_step(self, batches):
    print("first step at", time.monotonic(), flush=True)
    os._exit(0)

Trainer.train_step = first_step
from sam2train.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _run(command: Sequence[str], folder: Path, *, code: int = 0) -> str:
    """What a command prints.

    Raises:
        MachineFault: it ended with another code; with the last line that it said.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *command]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    if done.returncode != code:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["nothing"]
        raise MachineFault(f"{' '.join(command[1:3])} ended with {done.returncode}: {said[-1]}")
    return done.stdout


def _program(*words: str) -> list[str]:
    return [str(REPOSITORY / "run.py"), *words]


def _draw_demo() -> None:
    for split in ("train", "val"):
        resolve_data_path(f"data/demo/{split}/annotations.json")


def measure_sweep(
    device: torch.device, folder: Path, *, num_trials: int = 8, num_steps: int = 20, rounds: int = 2
) -> list[Row]:
    """Seconds of a local sweep, one trial at a time, against as many runs that share nothing, of
    which `rounds` are run and the median is multiplied."""
    _draw_demo()
    folder.mkdir(parents=True)
    settings = [
        f"trainer.num_steps={num_steps}",
        f"trainer.val_every={num_steps}",
        f"trainer.device={device}",
        "dataset.test_path=null",
        "evaluation.max_videos=3",
        *_QUIET,
    ]
    rates = [1e-4 * (k + 1) for k in range(num_trials)]
    sweep = {
        "program": "run.py",
        "method": "grid",
        "metric": {"name": "val/J_and_F", "goal": "maximize"},
        "command": ["${env}", "${interpreter}", "${program}", EXPERIMENT, *settings, "${args}"],
        "parameters": {"optimizer.learning_rate": {"values": rates}},
    }
    path = folder / "rates.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    separate = []
    for number in range(rounds):
        place = folder / str(number)
        # A folder of features of its own: these runs share nothing.
        own = (f"features.folder={place / 'features'}", f"--run-dir={place}")
        own = (*own, f"optimizer.learning_rate={rates[number]}")
        start = time.perf_counter()
        _run(_program(EXPERIMENT, *settings, *own), folder)
        separate.append(time.perf_counter() - start)
    start = time.perf_counter()
    _run(_program(str(path), "--jobs", "1"), folder)
    together = time.perf_counter() - start
    at = f"{num_trials} trials of the demo, {num_steps} steps and a validation each"
    other = num_trials * statistics.median(separate)
    return [
        Row("sweep", "a sweep", at, together, other, "s", "separate runs", {"separate": separate})
    ]


def measure_start(folder: Path, *, rounds: int = 3) -> list[Row]:
    """Seconds from the command to the first step of the demo against the imports alone; and until a
    wrong setting is told, against the import of torch."""
    _draw_demo()
    folder.mkdir(parents=True)
    script = folder / "first_step.py"
    script.write_text(_FIRST_STEP)
    settings = ["dataset.val_path=null", "dataset.test_path=null", *_QUIET]
    to_first_step: list[float] = []

    def start() -> None:
        begun = time.monotonic()  # the same clock in all processes
        own = f"--run-dir={folder / str(len(to_first_step))}"
        said = _run([str(script), EXPERIMENT, *settings, own], folder)
        line = next(line for line in said.splitlines() if line.startswith("first step at "))
        to_first_step.append(float(line.rsplit(" ", 1)[1]) - begun)

    variants = {
        "start": start,
        "imports": partial(_run, ["-c", _BARE], folder),
        "wrong": partial(_run, _program(EXPERIMENT, "trainer.num_stepss=3"), folder, code=2),
        "torch": partial(_run, ["-c", "import torch"], folder),
    }
    seconds = alternate(variants, rounds, CPU)
    seconds["start"] = to_first_step[1:]  # without the end of the process, and its warm-up
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}

    def row(what: str, ours: str, other: str, beside: str) -> Row:
        details = {"ours": seconds[ours], "other": seconds[other]}
        return Row("start", what, "demo", medians[ours], medians[other], "s", beside, details)

    return [
        row("to the first step", "start", "imports", "the bare imports"),
        row("until a wrong setting is told", "wrong", "torch", "import torch"),
    ]


def measure_log(device: torch.device, folder: Path, *, num_steps: int = 20) -> list[Row]:
    """Seconds of a step with its line in the log and in W&B (offline), against the step alone, both
    of the same steps."""
    _draw_demo()
    changes = {
        "trainer.num_steps": num_steps + 1,
        "trainer.log_every": 1,
        "trainer.device": str(device),
        "tracking.mode": "offline",
        "dataset.val_path": None,
        "dataset.test_path": None,
        "dataset.num_workers": 0,
        "features.folder": str(folder / "features"),
    }
    experiment = load_experiment(REPOSITORY / EXPERIMENT, changes)
    trainer = Trainer(experiment, folder, run_id="speed", name="speed", console=Console(quiet=True))
    alone, whole = [], []
    with trainer.runlog as runlog:
        trainer.model.train()
        batches = trainer.batches()
        for number in range(num_steps + 1):
            synchronise(device)
            start = time.perf_counter()
            scalars = trainer.train_step(batches)
            synchronise(device)
            step = time.perf_counter()
            trainer.step += 1
            runlog.log(trainer.step, scalars, clips=experiment.dataset.batch_size)
            end = time.perf_counter()
            if number:  # the first one warms up
                alone.append(step - start)
                whole.append(end - start)
    medians = [statistics.median(taken) for taken in (whole, alone)]
    at = f"demo, log_every 1, W&B offline, {num_steps} steps"
    details = {"with": whole, "alone": alone}
    return [Row("start", "a step with its line", at, *medians, "s", "the step alone", details)]
