"""The command line of `run.py`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam2train.errors import UserError

if TYPE_CHECKING:
    from sam2train.experiment import Experiment

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"

EPILOG = """\
Settings of the experiment are changed by dotted name, with or without hyphens in front:
  python run.py experiments/coco_point_bbox.yaml trainer.num_steps=500 --trainer.seed=1

A run writes to runs/<experiment>/<run id>/. Exit codes: 0 done, 2 a mistake in what was asked for,
130 and 143 stopped by Ctrl-C and SIGTERM (the run is saved first; --resume goes on).
"""


def main(words: Sequence[str]) -> int:
    """Run one command. Returns the exit code; a user's mistake is a message and code 2."""
    try:
        arguments, rest = _parse(words)
        if arguments.list:
            return list_experiments()
        if _about_results(arguments):
            return show_results(arguments, rest)
        return launch(arguments, rest)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python run.py",
        description="Fine-tune the video memory of SAM 2: train the experiment of a YAML file, or "
        "run the trials of a W&B sweep file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="?", metavar="FILE.yaml", help="an experiment or a sweep")
    parser.add_argument("--list", action="store_true", help="list the experiments that come along")
    parser.add_argument(
        "--dry-run", action="store_true", help="show config, data, parameters and one batch; stop"
    )
    parser.add_argument(
        "--check-data",
        action="store_true",
        help="read every frame and mask, list all that is wrong with them; stop",
    )
    parser.add_argument("--json", action="store_true", help="the report of --check-data as JSON")
    parser.add_argument("--smoke", action="store_true", help="two steps and one short video")
    parser.add_argument("--run-dir", type=Path, metavar="PATH", help="the folder of this run")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on with a run folder or checkpoint; without PATH: --run-dir or the newest run",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch model.checkpoint_path, which Meta publishes",
    )
    parser.add_argument(
        "--export",
        nargs=2,
        type=Path,
        metavar=("CHECKPOINT", "OUT.pt"),
        help="write a run's checkpoint as a file that SAM 2 itself loads",
    )
    parser.add_argument("--half", action="store_true", help="export in half precision")
    parser.add_argument(
        "--evaluate",
        metavar="CHECKPOINT",
        help="score a checkpoint beside its baselines; `base`: the weights training starts from",
    )
    parser.add_argument(
        "--prompt-matrix",
        metavar="CHECKPOINT",
        help="score it with points, boxes and masks, 1 to 5 clicks, clean and moved",
    )
    parser.add_argument("--split", choices=("val", "test"), help="videos to score, val by default")
    parser.add_argument(
        "--save-masks",
        type=Path,
        metavar="DIR",
        help="with --evaluate: write the masks as palette PNGs, as the DAVIS evaluation reads them",
    )
    parser.add_argument(
        "--no-base", action="store_true", help="do not score the untouched base checkpoint as well"
    )
    parser.add_argument("--count", metavar="N", help="of a sweep: how many trials in all")
    parser.add_argument("--jobs", metavar="N", help="of a sweep: trials at a time, 1 by default")
    parser.add_argument(
        "--runs",
        nargs="?",
        type=Path,
        const=Path("runs"),
        metavar="FOLDER",
        help="list the runs below a folder, runs/ by default, with their scores",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="show how the settings and scores of run folders differ, with intervals",
    )
    parser.add_argument(
        "--collect",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="write the scores of a sweep's runs to experiments/results/, as a table and pictures; "
        "without FOLDER: draw those of all tables there again",
    )
    arguments, rest = parser.parse_known_args(words)
    if arguments.resume and "=" in arguments.resume and not Path(arguments.resume).exists():
        rest.insert(0, arguments.resume)  # `--resume key=value`: the word is an override
        arguments.resume = ""
    unknown = [word for word in rest if word.startswith("-") and "=" not in word]
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; `python run.py --help` lists them")
    if arguments.json and not arguments.check_data:
        raise UserError("--json is a form of --check-data; give both")
    if arguments.save_masks and not arguments.evaluate:
        raise UserError("--save-masks writes what --evaluate CHECKPOINT predicts; give both")
    scores = arguments.evaluate or arguments.prompt_matrix
    if (arguments.split or arguments.no_base) and not scores:
        raise UserError("--split and --no-base belong to --evaluate or --prompt-matrix")
    modes = ("list", "dry_run", "check_data", "download", "export", "evaluate", "prompt_matrix")
    given = [f"--{name.replace('_', '-')}" for name in modes if getattr(arguments, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are two commands; give one")
    if arguments.half and not arguments.export:
        raise UserError("--half is a form of --export; give both")
    if given and arguments.resume is not None:
        raise UserError(f"--resume goes on training, and {given[0]} does not train; give one")
    if arguments.run_dir and given and given[0] not in ("--evaluate", "--prompt-matrix"):
        raise UserError(f"--run-dir is for a run, and {given[0]} writes none; leave it out")
    if arguments.file is None and not (arguments.list or _about_results(arguments)):
        parser.print_help()
        raise UserError("no experiment given; for example experiments/coco_point_bbox.yaml")
    return arguments, rest


def _number(option: str, text: str | None) -> int | None:
    if text is not None and (not text.isdecimal() or int(text) < 1):
        raise UserError(f"{option} {text}: expected a whole number of at least 1")
    return int(text) if text else None


def list_experiments() -> int:
    """Print each experiment with the first comment line of its file."""
    rows = []
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        rows.append((f"experiments/{path.name}", first.lstrip("# ") if first[:1] == "#" else ""))
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{name:{width}}  {text}")
    return 0


def _about_results(arguments: argparse.Namespace) -> list[str]:
    """Which of the options were given that read finished runs and need no experiment."""
    names = ("runs", "compare", "collect")
    return [f"--{name}" for name in names if getattr(arguments, name) is not None]


def show_results(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Print the runs of a folder, or what differs between runs, or collect what a sweep says."""
    if rest or arguments.file or len(_about_results(arguments)) > 1:
        words = [*_about_results(arguments), *filter(None, [arguments.file]), *rest]
        raise UserError(
            f"{' '.join(words)}: --runs and --collect take one folder, --compare run folders; "
            "nothing else goes with them"
        )
    from rich.console import Console

    from sam2train.compare import collect_results, compare_runs, show_runs

    if arguments.compare:
        compare_runs(arguments.compare, Console())
    elif arguments.runs:
        show_runs(arguments.runs, Console())
    else:
        collect_results(Path(arguments.collect) if arguments.collect else None, Console())
    return 0


def launch(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Train, or dry-run, one experiment."""
    from rich.console import Console

    from sam2train.config import load_yaml, parse_overrides, sweep_parameters
    from sam2train.experiment import SMOKE, load_experiment
    from sam2train.pretrained import resolve_path
    from sam2train.sweep_file import is_sweep

    path = resolve_path(arguments.file)
    if is_sweep(load_yaml(path)):
        return _run_sweep(path, arguments, rest)
    if arguments.count or arguments.jobs:
        raise UserError(
            f"--count and --jobs belong to a sweep, and {path} is an experiment; expected a file "
            "such as sweeps/prompts.yaml"
        )
    overrides = parse_overrides(rest)
    if typed := os.environ.get("WANDB_SWEEP_PARAM_PATH"):
        # An agent's words lost their types on the way; this file still has them.
        overrides |= sweep_parameters(Path(typed))
    if arguments.smoke:
        overrides = SMOKE | overrides
    experiment = load_experiment(path, overrides)
    console = Console()
    demo = demo_beside_own(experiment, overrides)
    if "dataset.test_path" in demo:
        experiment = load_experiment(path, overrides | {"dataset.test_path": None})
    for key in () if arguments.json else demo:
        done = "left out" if key == "dataset.test_path" else "used all the same"
        print(f"{key} is the demo's, beside data of your own: {done}; name yours")
    if arguments.download:
        from sam2train.pretrained import fetch_checkpoint

        model = experiment.model
        fetch_checkpoint(model.checkpoint_path, model.config_path, console)
        return 0
    if arguments.export:
        from sam2train.export import export_checkpoint

        export_checkpoint(experiment, *arguments.export, half=arguments.half, console=console)
        return 0
    if arguments.check_data:
        from sam2train.check import check_data

        report = check_data(experiment, None if arguments.json else console)
        if arguments.json:
            print(report.to_json())
        else:
            report.show(console)
        return report.exit_code
    if arguments.dry_run:
        from sam2train.describe import describe

        describe(experiment, console)
        return 0
    name = "smoke" if arguments.smoke else path.stem
    if arguments.evaluate or arguments.prompt_matrix:
        from sam2train.benchmark import run_benchmark

        run_benchmark(
            experiment,
            arguments.evaluate or arguments.prompt_matrix,
            matrix=arguments.prompt_matrix is not None,
            split=arguments.split or "val",
            run_dir=arguments.run_dir,
            name=name,
            run_id=_run_id(),
            with_base=not arguments.no_base,
            save_masks=arguments.save_masks,
            console=console,
        )
        return 0
    return _train(experiment, name, arguments, rest, console)


def demo_beside_own(experiment: Experiment, overrides: Mapping[str, Any]) -> list[str]:
    """The splits that an experiment still has from the demo where the user gave data of their own:
    a result must not be reported on shapes that have nothing to do with it."""
    from sam2train.demo import is_demo_path

    dataset = experiment.dataset
    keys = ("data_path", "val_path", "test_path")
    paths = {f"dataset.{key}": getattr(dataset, key) for key in keys}
    own = [k for k, path in paths.items() if k in overrides and path and not is_demo_path(path)]
    if "dataset.data_path" not in own and "dataset.val_path" not in own:
        return []
    return [
        key
        for key, path in paths.items()
        if key != "dataset.data_path" and key not in overrides and path and is_demo_path(path)
    ]


def _run_sweep(path: Path, arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run a sweep's trials here; --smoke and settings go to each of them."""
    given = {name for name, value in vars(arguments).items() if value not in (None, False)}
    if other := sorted(given - {"file", "smoke", "run_dir", "count", "jobs"}):
        raise UserError(
            f"--{other[0].replace('_', '-')} does not go with a sweep ({path}); it takes --count, "
            "--jobs, --smoke, --run-dir and settings, and goes on by itself where it stopped"
        )
    from sam2train.sweep import run_sweep

    folder = arguments.run_dir or Path("runs/sweeps") / (
        f"{path.stem}-smoke" if arguments.smoke else path.stem
    )
    extra = [*rest, *["--smoke"] * arguments.smoke]
    count, jobs = _number("--count", arguments.count), _number("--jobs", arguments.jobs)
    return run_sweep(path, folder, extra=extra, count=count, jobs=jobs or 1)


def _train(
    experiment: Experiment,
    name: str,
    arguments: argparse.Namespace,
    rest: Sequence[str],
    console: Any,
) -> int:
    runs = Path("runs") / name
    checkpoint = None
    run_id = _run_id()
    run_dir = arguments.run_dir or runs / run_id
    if arguments.resume is not None:
        checkpoint = find_checkpoint(arguments.resume, arguments.run_dir, runs)
        run_dir = checkpoint.parent.parent
        check_same_experiment(experiment, run_dir)
    elif (run_dir / "checkpoints").exists():
        raise UserError(
            f"--run-dir {run_dir}: a run is there already; add --resume to go on with it, or name "
            "another folder"
        )

    from sam2train.interrupt import Interrupted
    from sam2train.trainer import Trainer

    trainer = Trainer(
        experiment, run_dir, run_id=run_id, name=name, resume=checkpoint, console=console
    )
    say = trainer.tracker.say
    words = [arguments.file, *rest, *["--smoke"] * arguments.smoke, "--resume", str(run_dir)]
    again = shlex.join(["python", "run.py", *words])
    try:
        trainer.run()
    except Interrupted as stopped:
        say(f"stopped at step {trainer.step}, saved. Go on with: {again}")
        if stopped.code == 128 + signal.SIGTERM and "WANDB_SWEEP_PARAM_PATH" in os.environ:
            _die_of_sigterm()
        return int(stopped.code)
    say(f"\nwrote {run_dir}/")
    for place, what in (
        ("summary.json", "scores and parameter counts"),
        ("metrics.jsonl", "losses and scores by step"),
        ("scores.csv", "scores of every object"),
        ("horizon.csv", "how long the memory holds"),
        ("overlays", "ground truth, prediction and errors as pictures"),
        ("checkpoints/best.pt", "the weights of the highest validation J&F"),
        ("checkpoints/last.pt", "to go on from"),
    ):
        if (run_dir / place).exists():
            say(f"  {run_dir / place!s:<48} {what}")
    if trainer.tracker.how_to_sync:
        say(f"look at it: wandb leet {run_dir}/wandb    upload it: {trainer.tracker.how_to_sync}")
    return 0


def _die_of_sigterm() -> None:
    """`wandb agent` counts code 143, unlike the signal, as failed and gives up after three."""
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _run_id() -> str:
    """What a W&B agent gave, else the time."""
    given = os.environ.get("WANDB_RUN_ID")
    return given or time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)


def find_checkpoint(given: str, run_dir: Path | None, runs: Path) -> Path:
    """The checkpoint to go on from: one that is named, a run's last, or the newest run's last.

    Raises:
        UserError: there is none.
    """
    place = Path(given) if given else run_dir
    if place is None:
        found = sorted(runs.glob("*/checkpoints/last.pt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"--resume: no run with a checkpoint under {runs}/; name one")
        return found[-1]
    if place.is_dir():
        place = place / "checkpoints" / "last.pt"
    if not place.is_file():
        raise UserError(
            f"--resume: no checkpoint {place}; expected a run folder or RUN/checkpoints/last.pt"
        )
    return place


def check_same_experiment(experiment: Experiment, run_dir: Path) -> None:
    """Raise UserError if a resumed run would mix two experiments.

    The number of steps, the periods, the workers, W&B, the pictures and what the audit does may
    change.
    """
    from sam2train.config import flatten
    from sam2train.experiment import load_experiment

    free = ("trainer.num_steps", "trainer.device", "dataset.num_workers", "dataset.mask_cache_mb")
    free += ("evaluation.num_overlays", "trainer.audit")
    config_file = run_dir / "config.yaml"
    # Through the same door: a key that is younger than the run has its default there.
    before = flatten(load_experiment(config_file, {}).model_dump(mode="json"))
    now = flatten(experiment.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} in the run, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key not in free
        and not key.endswith("_every")
        and not key.startswith("tracking.")
    ]
    if changed:
        raise UserError(
            f"--resume {run_dir}: the experiment is not that of {config_file}\n  "
            + "\n  ".join(changed)
            + "\ngive the settings of the run, or start a new one"
        )
