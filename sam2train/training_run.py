"""One training from its folder to its last line: where a run goes, when it may be resumed, what it
wrote."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from sam2train.checkpoint import LAST, PREVIOUS
from sam2train.config import flatten
from sam2train.config_yaml import load_yaml
from sam2train.errors import UserError
from sam2train.experiment import Experiment, as_begun, load_experiment
from sam2train.files import file_name
from sam2train.machine import Interrupted
from sam2train.trainer import Trainer

# What a resumed run may change: these move no result, or say only how far the run goes.
_FREE = (
    "dataset.mask_cache_mb",
    "dataset.num_workers",
    "evaluation.num_overlays",
    "trainer.audit",
    "trainer.device",
    "trainer.num_steps",
)
_FILES = {
    "summary.json": "scores and parameter counts",
    "metrics.jsonl": "losses and scores by step",
    "scores.csv": "scores of every object",
    "horizon.csv": "how long the memory holds",
    "overlays": "ground truth, prediction and errors as pictures",
    "checkpoints/best.pt": "the weights of the highest validation J&F",
    "checkpoints/last.pt": "to go on from; previous.pt is the one before",
}


def train(
    experiment: Experiment,
    name: str,
    *,
    run_dir: Path | None,
    checkpoint: Path | None,
    command: str,
    console: Console,
) -> int:
    """Train an experiment, and say what was written.

    Args:
        name: of the experiment; its runs are in runs/<name>/.
        run_dir: the folder of a new run, runs/<name>/<run id>/ by default.
        checkpoint: of the run to go on with, None for a new one.
        command: what was typed, to say how to go on.

    Returns:
        The exit code: 0, or the shell's for the signal that stopped it.

    Raises:
        UserError: a folder in use, a run of another experiment, and what `Trainer` raises.
    """
    run_id = new_run_id()
    if checkpoint is not None:
        run_dir = checkpoint.parent.parent
        experiment = check_same_experiment(experiment, run_dir)
    else:
        run_dir = run_dir or Path("runs") / file_name(name) / run_id
        if _can_go_on(run_dir):
            raise UserError(
                f"--run-dir {run_dir}: a run is there already; add --resume to go on with it, or "
                "name another folder"
            )
    trainer = Trainer(
        experiment, run_dir, run_id=run_id, name=name, resume=checkpoint, console=console
    )
    say = trainer.tracker.say
    try:
        trainer.run()
    except Interrupted as stopped:
        again = shlex.join(["--resume", str(run_dir)])
        say(f"stopped at step {trainer.step}, saved. Go on with: {command} {again}")
        if stopped.code == 128 + signal.SIGTERM and "WANDB_SWEEP_PARAM_PATH" in os.environ:
            _die_of_sigterm()
        return int(stopped.code)
    say(f"\nwrote {run_dir}/")
    for place, what in _FILES.items():
        if (run_dir / place).exists():
            say(f"  {run_dir / place!s:<48} {what}")
    if trainer.tracker.how_to_sync:
        say(f"look at it: wandb leet {run_dir}/wandb    upload it: {trainer.tracker.how_to_sync}")
    return 0


def new_run_id() -> str:
    """What a W&B agent gave, else the time."""
    given = os.environ.get("WANDB_RUN_ID")
    return given or time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)


def find_checkpoint(named: Path | None, run_dir: Path | None, runs: Path) -> Path:
    """The checkpoint to go on from: one that is named, a run's last, or the newest run's last.

    Args:
        named: a checkpoint or a run folder, with --resume.
        run_dir: a run folder, with --run-dir; where both are given they must be of one run.
        runs: the folder of the experiment's runs, searched where neither is given.

    Raises:
        UserError: there is none.
    """
    place = named or run_dir
    if place is None:
        newest = _newest_run(runs)
        if newest is None:
            raise UserError(f"--resume: no run with a checkpoint under {runs}/; name one")
        return _last_of(newest)
    path = _last_of(place) if place.is_dir() else place
    if not path.is_file() and not (place.is_dir() and _can_go_on(place)):
        raise UserError(
            f"--resume: no checkpoint {path}; expected a run folder or RUN/checkpoints/last.pt"
        )
    if run_dir is not None and run_dir.resolve() != path.resolve().parent.parent:
        raise UserError(
            f"--resume {named} goes on in {path.parent.parent}, and --run-dir names {run_dir}; "
            "give one of them"
        )
    return path


def _last_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / LAST


def _can_go_on(run_dir: Path) -> bool:
    """Whether a run wrote a checkpoint there; it has the one before alone if it was killed between
    renaming the two."""
    return any((run_dir / "checkpoints" / name).exists() for name in (LAST, PREVIOUS))


def _newest_run(runs: Path) -> Path | None:
    """The run below a folder that wrote a checkpoint last."""
    found = [
        (path.stat().st_mtime, path.parent.parent)
        for name in (LAST, PREVIOUS)
        for path in runs.glob(f"*/checkpoints/{name}")
    ]
    return max(found)[1] if found else None


def check_same_experiment(experiment: Experiment, run_dir: Path) -> Experiment:
    """The experiment as the run in a folder goes on with it, see `as_begun`.

    The number of steps, the periods, the workers, W&B, the pictures and what the audit does may
    change.

    Raises:
        UserError: the resumed run would mix two experiments.
    """
    config_file = run_dir / "config.yaml"
    # Loaded as a file of a user's: a key that is younger than the run has its default there.
    config = load_yaml(config_file)
    before = as_begun(load_experiment(config_file), config)
    before = flatten(before.model_dump(mode="json"))
    experiment = as_begun(experiment, config)
    now = flatten(experiment.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} in the run, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key not in _FREE
        and not key.endswith("_every")
        and not key.startswith("tracking.")
    ]
    if changed:
        raise UserError(
            f"--resume {run_dir}: the experiment is not that of {config_file}\n  "
            + "\n  ".join(changed)
            + "\ngive the settings of the run, or start a new one"
        )
    return experiment


def _die_of_sigterm() -> None:
    """`wandb agent` counts code 143, unlike the signal, as failed and gives up after three."""
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
