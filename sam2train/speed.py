"""`python -m sam2train.speed [PART ...]`: how fast this is beside SAM 2's own code, in one run.

Every part measures ours and the other side in turn (A B A B) in one process, or in processes of
their own where it is about memory or whole runs, after a check that both compute the same. What is
printed are medians of this machine at this hour: compare ratios, not seconds. The parts about whole
runs of the demo stand here; each run is a process of its own, as a user starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from sam2train.demo import resolve_data_path
from sam2train.errors import MachineFault, UserError
from sam2train.files import REPOSITORY, write_text

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
    device: Any, folder: Path, *, num_trials: int = 8, num_steps: int = 20, rounds: int = 2
) -> list[Any]:
    """Seconds of a local sweep, one trial at a time, against as many runs that share nothing, of
    which `rounds` are run and the median is multiplied."""
    from sam2train.speed_clock import Row

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


def measure_start(folder: Path, *, rounds: int = 3) -> list[Any]:
    """Seconds from the command to the first step of the demo against the imports alone; and until a
    wrong setting is told, against the import of torch."""
    from sam2train.speed_clock import CPU, Row, alternate

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


def measure_log(device: Any, folder: Path, *, num_steps: int = 20) -> list[Any]:
    """Seconds of a step with its line in the log and in W&B (offline), against the step alone, both
    of the same steps."""
    from sam2train.experiment import load_experiment
    from sam2train.speed_clock import Row, synchronise
    from sam2train.trainer import Trainer

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


# Part -> what it measures, in the order in which they run.
PARTS = {
    "step": "a training step, with operations and the share of the machine's own rate",
    "memory": "the peak memory of a step, and of a frame more",
    "evaluation": "following whole videos, against SAM2VideoPredictor",
    "loader": "clips from 1080p JPEGs and from a film, and the bytes of a batch",
    "index": "reading a COCO JSON of 200,000 annotations, against pycocotools",
    "sweep": "8 trials over one frozen encoder, against separate runs",
    "start": "from the command to the first step, and what a line of the log costs",
}


def measure_words(words: Sequence[str]) -> int:
    """Measure, print, and write all values where that is asked for. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sam2train.speed",
        description="How fast this is beside SAM 2's own code from the installed sam2 package.",
        epilog="parts: " + "; ".join(f"{name}: {about}" for name, about in PARTS.items()),
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all where none is named"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there, too")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; auto by default")
    given = parser.parse_args(words)
    try:
        measure_parts(given.parts or list(PARTS), given.device, given.json)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except MachineFault as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def measure_parts(names: Sequence[str], device_name: str, json_file: Path | None) -> None:
    """Run parts by name, in the order of `PARTS`; each is printed when it is done.

    Raises:
        UserError: an unknown part or device, or SAM 2's own code is not there.
    """
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"unknown part {unknown[0]!r}; expected {', '.join(PARTS)}")

    from sam2train.machine import check_available, choose_device, describe_environment

    device = choose_device(device_name)
    check_available(device)
    environment = describe_environment(device)
    content: dict[str, Any] = {"environment": environment, "rows": [], "seconds": {}}
    print(_describe(environment))
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in PARTS if name in names]:
            start = time.perf_counter()
            rows = _measure(name, device, Path(folder) / name)
            content["seconds"][name] = time.perf_counter() - start
            content["rows"] += [row.as_json() for row in rows]
            print(f"{name}: {PARTS[name]} ({content['seconds'][name]:.0f} s)")
            print(*map(_line, rows), sep="\n", flush=True)
            if json_file is not None:  # after each part: a later one may fail
                write_text(json_file, json.dumps(content, indent=1) + "\n")


def _measure(name: str, device: Any, folder: Path) -> list[Any]:
    """The rows of one part; only what it needs is imported."""
    if name in ("step", "memory"):
        from sam2train.speed_step import measure_memory, measure_steps

        measure = measure_steps if name == "step" else measure_memory
        return measure(device, folder)
    if name == "evaluation":
        from sam2train.speed_step import measure_evaluation

        return measure_evaluation(device, folder)
    if name in ("loader", "index"):
        from sam2train.speed_data import measure_index, measure_loader

        return measure_loader(folder) if name == "loader" else measure_index(folder)
    if name == "sweep":
        return measure_sweep(device, folder)
    return [*measure_start(folder), *measure_log(device, folder / "log")]


def _describe(environment: dict[str, Any]) -> str:
    versions = environment["packages"]
    commit = (environment["code"]["commit"] or "unknown")[:7]
    changed = ", with changes" if environment["code"]["changed"] else ""
    return (
        f"{environment['device']}, {environment['threads']} threads, torch {versions['torch']}, "
        f"sam2 {versions['sam2']}, commit {commit}{changed}"
    )


def _line(row: Any) -> str:
    ours, other = _show(row.ours, row.unit), _show(row.other, row.unit)
    text = f"  {row.what} ({row.at}): {ours}; {row.beside} {other}, {row.ratio:.2f} times ours"
    return text if "operations" not in row.details else f"{text}\n{_rates(row.details)}"


def _show(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 1e6:,.1f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _rates(details: dict[str, Any]) -> str:
    """Operations a step and the share that they are of the machine's rate, ours and theirs."""
    shares = [
        f"{whose} {part['operations'] / 1e9:,.0f} GFLOP at {part['share_of_gemm']:.0%}"
        for whose, part in (("ours", details), ("SAM 2", details["other"]))
    ]
    rates = [f"{name} {rate / 1e9:,.0f}" for name, rate in details["gemm_rates"].items()]
    return f"    {', '.join(shares)} of the rate of GEMM ({', '.join(rates)} GFLOP/s)"


if __name__ == "__main__":
    sys.exit(measure_words(sys.argv[1:]))
