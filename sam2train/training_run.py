"""One training from its folder to its last line: where a run goes, when it may be resumed, what it
wrote."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from sam2train import distributed
from sam2train.clips import collate_fn
from sam2train.config import flatten, to_yaml
from sam2train.config_yaml import load_yaml
from sam2train.data_report import batch_table, data_table
from sam2train.datasets import build_dataset, data_paths
from sam2train.demo import resolve_data_path
from sam2train.errors import UserError
from sam2train.experiment import Experiment, as_begun, build_model, load_experiment
from sam2train.machine import Interrupted, say
from sam2train.probe import free_memory, memory_warning
from sam2train.run_folder import RunFolder, read_summary
from sam2train.runlog import parameter_table
from sam2train.trainer import Trainer
from sam2train.trainer_step import row_warnings

# What a resumed run may change: these move no result, or say only how far the run goes.
_MAY_CHANGE = (
    "dataset.mask_cache_mb",
    "dataset.num_workers",
    "evaluation.num_overlays",
    "dataset.batch_size",  # these two where a step has as many clips as before: see `Trainer`
    "trainer.grad_accumulation",
    "features.folder",
    "features.max_gb",
    "trainer.activation_checkpointing",
    "trainer.audit",
    "trainer.device",
    "trainer.num_steps",
    "trainer.sharding",
)


def train(
    experiment: Experiment,
    name: str,
    *,
    run_dir: Path | None,
    checkpoint: Path | None,
    command: str,
    console: Console,
    smoke: bool = False,
) -> int:
    """Train an experiment, and say what was written.

    Args:
        name: of the experiment; its runs are in runs/<name>/.
        run_dir: the folder of a new run, runs/<name>/<run id>/ by default.
        checkpoint: of the run to go on with, None for a new one.
        command: what was typed, to say how to go on.
        smoke: refuse a step that seems to need more memory than there is; else that is a warning.

    Returns:
        The exit code: 0, or the shell's for the signal that stopped it.

    Raises:
        UserError: a folder in use, a run of another experiment, and what `Trainer` raises.
    """
    run_id = distributed.share(new_run_id())
    if checkpoint is not None:
        run_dir = RunFolder.of_checkpoint(checkpoint).path
        experiment = distributed.from_main(partial(check_same_experiment, experiment, run_dir))
    else:
        run_dir = run_dir or RunFolder.of_experiment(name) / run_id
        if distributed.is_main() and RunFolder(run_dir).can_go_on:
            raise UserError(
                f"--run-dir {run_dir}: a run is there already; add --resume to go on with it, or "
                "name another folder"
            )
    free = free_memory(experiment)
    trainer = Trainer(
        experiment, run_dir, run_id=run_id, name=name, resume=checkpoint, console=console
    )
    say = trainer.runlog.say
    if text := memory_warning(experiment, trainer.model, free):
        if smoke:
            raise UserError(text)
        say(f"warning: {text}")
    try:
        trainer.run()
    except Interrupted as stopped:
        again = shlex.join(["--resume", str(run_dir)])
        say(f"stopped at step {trainer.step}, saved. Go on with:\n  {command} {again}")
        if stopped.code == 128 + signal.SIGTERM and "WANDB_SWEEP_PARAM_PATH" in os.environ:
            _die_of_sigterm()
        return int(stopped.code)
    say(f"\nwrote {run_dir}/")
    folder = trainer.folder
    names = ("summary", "metrics", "scores", "horizon", "overlays", "best", "last")
    for line in folder.contents(*names):
        say(line)
    if upload := trainer.runlog.wandb.how_to_sync:
        look = shlex.join(["wandb", "leet", str(folder.wandb)])
        say(f"\nlook at it in a terminal, and upload it:\n  {look}\n  {upload}")
    say("\n" + "\n".join(trainer.scores.conclusion(trainer.step)))
    return 0


def show_start(experiment: Experiment, console: Console) -> None:
    """Print what a training would begin with: settings, data, parameters and one batch."""
    tell = partial(say, console)
    tell(to_yaml(experiment))
    section = experiment.dataset
    paths = {
        "training": section.data_path,
        "validation": section.val_path,
        "test": section.test_path,
    }
    sections = section, experiment.augment, experiment.clips_seed
    known: dict = {}  # a path that two splits name is read once
    datasets = {
        split: build_dataset(*sections, path, training=split == "training", say=tell, known=known)
        for split, path in paths.items()
        if path is not None
    }
    console.print(data_table(datasets))
    model = build_model(experiment)
    console.print(parameter_table(model.parameter_report()))
    for text in row_warnings(model, experiment):
        tell(f"warning: {text}")
    data = datasets["training"]
    batch = collate_fn([data[0, i % len(data)] for i in range(section.batch_size)])
    console.print(batch_table(batch))


def draw_demo_data(experiment: Experiment) -> None:
    """Write the demo data that an experiment names, by one of several processes."""
    if distributed.num_processes() == 1:
        return  # reading it does
    section = experiment.dataset
    for path in (section.data_path, section.val_path, section.test_path):
        for part in data_paths(path):
            distributed.from_main(partial(resolve_data_path, part, print))


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
        return newest.last
    path = RunFolder(place).last if place.is_dir() else place
    if not path.is_file() and not (place.is_dir() and RunFolder(place).can_go_on):
        raise UserError(
            f"--resume: no checkpoint {path}; expected a run folder or RUN/checkpoints/last.pt"
        )
    # Resolved first: a link to a checkpoint goes on where the checkpoint is.
    if run_dir is not None and run_dir.resolve() != RunFolder.of_checkpoint(path.resolve()).path:
        goes_on = RunFolder.of_checkpoint(path).path
        raise UserError(
            f"--resume {named} goes on in {goes_on}, and --run-dir names {run_dir}; give one of "
            "them"
        )
    return path


def find_unfinished(run_dir: Path | None, runs: Path) -> Path | None:
    """The checkpoint that `--resume auto` goes on from; None where a run is to be started.

    Args:
        run_dir: the folder of the run, with --run-dir.
        runs: the folder of the experiment's runs; where no run_dir is given, the newest one goes
            on, unless it is finished.
    """
    folder = RunFolder(run_dir) if run_dir else _newest_run(runs)
    if folder is None or not folder.can_go_on:
        return None
    if run_dir is None:
        summary = read_summary(folder.summary, folder.metrics, lambda line: None)
        if summary.get("status") == "finished":
            return None
    return folder.last


def _newest_run(runs: Path) -> RunFolder | None:
    """The run below a folder that wrote a checkpoint last."""
    found = [
        (path.stat().st_mtime, folder.path)
        for folder in map(RunFolder, runs.glob("*"))
        for path in (folder.last, folder.previous)
        if path.is_file()
    ]
    return RunFolder(max(found)[1]) if found else None


def check_same_experiment(experiment: Experiment, run_dir: Path) -> Experiment:
    """The experiment as the run in a folder goes on with it, see `as_begun`.

    The number of steps, the periods, the workers, W&B, the pictures and what the audit does may
    change.

    Raises:
        UserError: the resumed run would mix two experiments.
    """
    config_file = RunFolder(run_dir).config
    # Loaded as a user's file is: a key that the run's version did not have gets its default.
    config = load_yaml(config_file)
    before = as_begun(load_experiment(config_file), config)
    before = flatten(before.model_dump(mode="json"))
    experiment = as_begun(experiment, config)
    now = flatten(experiment.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} in the run, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key not in _MAY_CHANGE
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
