"""What `python run.py` can be asked to do, one class a command.

A command is a frozen dataclass: its fields are its options, its docstring is its help, `run` does
it and returns the exit code. A new command is one class and one entry in `COMMANDS`; which options
go together follows from the fields. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sam2train import distributed
from sam2train.files import check_regular
from sam2train.run_folder import RUNS, RunFolder

if TYPE_CHECKING:
    from rich.console import Console

    from sam2train.eval_checkpoint import Evaluation
    from sam2train.experiment import Experiment

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def option(flag: str, help: str, default: Any = None, **how: Any) -> Any:
    """A field of a command that an option fills; `how` is what argparse reads the option by."""
    how = how or {"action": "store_true"}
    return dataclasses.field(default=default, metadata={"flag": flag, "help": help, **how})


def operand(**how: Any) -> Any:
    """A field of a command that the words after the command's own flag fill."""
    return dataclasses.field(metadata={"flag": None, **how})


def at_least_one(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Command:
    """What `python run.py` is asked to do."""

    group: ClassVar[str]  # its heading in the overview
    flag: ClassVar[str] = ""  # the option that asks for it; none: a FILE alone does
    takes: ClassVar[Literal["experiment", "sweep", None]] = None  # what its FILE must be
    together: ClassVar[bool] = False  # whether the processes of `torchrun` divide the work
    traceback: bool = option("--traceback", "show where in the program an error arose", False)

    @classmethod
    def options(cls) -> dict[str, dict[str, Any]]:
        """Flag -> name of the field and keyword arguments of argparse, the command's own first."""
        found: dict[str, dict[str, Any]] = {}
        if cls.flag:
            found[cls.flag] = {"action": "store_true"}  # unless a field takes its operands
        for field in dataclasses.fields(cls):
            if field.metadata:
                how = {"field": field.name, **field.metadata}
                found[how.pop("flag") or cls.flag] = how
        return found

    @classmethod
    def title(cls) -> str:
        """What messages call it."""
        return cls.flag or {"experiment": "training", "sweep": "a sweep"}[cls.takes]

    def run(self) -> int:
        """Do it. Returns the exit code."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FileCommand(Command):
    """A command on an experiment or a sweep file."""

    takes = "experiment"
    path: Path
    words: tuple[str, ...] = ()  # the settings, as they were typed
    smoke: bool = option("--smoke", "two steps and one short video", False)

    @property
    def name(self) -> str:
        """Names the folder below runs/."""
        return "smoke" if self.smoke else self.path.stem

    def experiment(self, say: Callable[[str], None] = print) -> Experiment:
        """The experiment of the file with the settings of the command line."""
        from sam2train.config import parse_overrides
        from sam2train.experiment import prepare_experiment

        how = {"smoke": self.smoke, "say": say if distributed.is_main() else lambda line: None}
        return prepare_experiment(self.path, parse_overrides(self.words), **how)


@dataclass(frozen=True, kw_only=True)
class Train(FileCommand):
    """Train the experiment of a YAML file."""

    group, together = "Train", True
    run_dir: Path | None = option("--run-dir", "the folder of this run", type=Path, metavar="PATH")
    resume: Path | Literal[True] | None = option(
        "--resume",
        "go on with a run folder or checkpoint; without PATH: --run-dir or the newest run; auto: "
        "the same, or start where there is none to go on with",
        type=Path,
        nargs="?",
        const=True,
        metavar="PATH",
    )

    def run(self) -> int:
        experiment = self.experiment()  # first: what is wrong with it is told before torch comes
        from sam2train.training_run import draw_demo_data, find_checkpoint, find_unfinished, train

        draw_demo_data(experiment)
        runs = RunFolder.of_experiment(self.name)

        def find() -> Path | None:
            named = None if self.resume is True else self.resume
            auto = named == Path("auto") and not named.exists()
            # torchrun lets a job go on by itself that it starts again.
            if auto or (named is None and distributed.is_restarted()):
                return find_unfinished(self.run_dir, runs)
            return self.resume and find_checkpoint(named, self.run_dir, runs)

        checkpoint = distributed.from_main(find)
        words = [self.path, *self.words, *["--smoke"] * self.smoke]
        return train(
            experiment,
            self.name,
            run_dir=self.run_dir,
            checkpoint=checkpoint,
            command=shlex.join(["python", "run.py", *map(str, words)]),
            console=_console(),
            smoke=self.smoke,
        )


@dataclass(frozen=True, kw_only=True)
class RunSweep(FileCommand):
    """Run the trials of a W&B sweep file here. The same command goes on where it stopped."""

    group = "Train"
    takes = "sweep"
    run_dir: Path | None = option("--run-dir", "folder of this sweep", type=Path, metavar="PATH")
    count: int | None = option(
        "--count", "trials in all, earlier ones included", type=at_least_one, metavar="N"
    )
    jobs: int = option(
        "--jobs", "trials at a time, 1 by default", 1, type=at_least_one, metavar="N"
    )

    def run(self) -> int:
        from sam2train.sweep import run_sweep

        name = f"{self.path.stem}-smoke" if self.smoke else self.path.stem
        folder = self.run_dir or RUNS / "sweeps" / name
        extra = [*self.words, *["--smoke"] * self.smoke]
        return run_sweep(self.path, folder, extra=extra, count=self.count, jobs=self.jobs)


@dataclass(frozen=True, kw_only=True)
class ListExperiments(Command):
    """List the experiments that come along, with the first comment line of each file."""

    group, flag = "Look first", "--list"

    def run(self) -> int:
        rows = []
        for path in sorted(EXPERIMENTS.glob("*.yaml")):
            check_regular(path)
            first = path.read_text(encoding="utf-8").split("\n", 1)[0]
            text = first.lstrip("# ") if first[:1] == "#" else ""
            rows.append((f"experiments/{path.name}", text))
        width = max((len(name) for name, _ in rows), default=0)
        for name, text in rows:
            print(f"{name:{width}}  {text}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Explain every key of a SECTION such as `trainer`, or of all: what it takes, its default, its
    meaning."""

    group, flag = "Look first", "--settings"
    section: str | None = operand(nargs="?", metavar="SECTION")
    write: bool = option("--write", "write SETTINGS.md and settings.schema.json anew", False)

    def run(self) -> int:
        from sam2train.experiment import settings_page, settings_schema, settings_text
        from sam2train.files import write_text

        if self.write:
            write_text(EXPERIMENTS / "SETTINGS.md", settings_page())
            write_text(EXPERIMENTS / "settings.schema.json", settings_schema())
        else:
            print(settings_text(self.section))
        return 0


@dataclass(frozen=True, kw_only=True)
class DryRun(FileCommand):
    """Show the resolved settings, the data, the parameters and one batch, and stop."""

    group, flag = "Look first", "--dry-run"

    def run(self) -> int:
        experiment = self.experiment()
        from sam2train.training_run import show_start

        show_start(experiment, _console())
        return 0


@dataclass(frozen=True, kw_only=True)
class CheckData(FileCommand):
    """Read every frame and mask and list all that is wrong with them; exit code 2 if anything is
    an error."""

    group, flag = "Look first", "--check-data"
    json: bool = option("--json", "print the report as one JSON document", False)

    def run(self) -> int:
        experiment = self.experiment(say=(lambda line: None) if self.json else print)
        from sam2train.data_report import check_data

        report = check_data(experiment.dataset, None if self.json else _console())
        if self.json:
            print(report.to_json())
        else:
            report.show(_console())
        return report.exit_code


@dataclass(frozen=True, kw_only=True)
class Probe(FileCommand):
    """Measure the peak memory of a training step for growing settings, and say which fit here."""

    group, flag = "Look first", "--probe"

    def run(self) -> int:
        experiment = self.experiment()
        from sam2train.probe import probe

        probe(experiment, _console())
        return 0


@dataclass(frozen=True, kw_only=True)
class Download(FileCommand):
    """Fetch the file of model.checkpoint_path, which Meta publishes."""

    group, flag = "Look first", "--download"

    def run(self) -> int:
        model = self.experiment().model
        from sam2train.pretrained_download import fetch_checkpoint

        fetch_checkpoint(model.checkpoint_path, model.config_path, _console())
        return 0


@dataclass(frozen=True, kw_only=True)
class _Scoring(FileCommand):
    """What both ways to score a checkpoint take."""

    group, together = "Score and export a checkpoint", True
    split: Literal["val", "test"] = option(
        "--split",
        "the videos to score: val (the default) or test",
        "val",
        choices=("val", "test"),
        metavar="SPLIT",
    )
    no_base: bool = option("--no-base", "do not score the untouched base checkpoint too", False)
    run_dir: Path | None = option(
        "--run-dir", "the folder of this evaluation", type=Path, metavar="PATH"
    )

    def open(self, source: str) -> Evaluation:
        """What scores a checkpoint, into a folder of its own."""
        experiment = self.experiment()
        from sam2train.eval_checkpoint import Evaluation
        from sam2train.training_run import draw_demo_data, new_run_id

        draw_demo_data(experiment)
        kind, run_id = self.flag.removeprefix("--"), distributed.share(new_run_id())
        folder = RunFolder.of_evaluations(self.name) / f"{run_id}-{kind}-{self.split}"
        return Evaluation(
            experiment,
            source,
            self.split,
            self.run_dir or folder,
            run_id=run_id,
            name=f"{self.name}-{kind}",
            console=_console(),
            with_base=not self.no_base,
        )


@dataclass(frozen=True, kw_only=True)
class Evaluate(_Scoring):
    """Score a checkpoint beside its baselines. CHECKPOINT: of a run, a run folder, a file that
    --export wrote, or `base`, the weights that training starts from."""

    flag = "--evaluate"
    checkpoint: str = operand(metavar="CHECKPOINT")
    save_masks: Path | None = option(
        "--save-masks",
        "write the masks as palette PNGs into a new folder, or FILE.zip for a server",
        type=Path,
        metavar="DIR",
    )
    save_masks_as: Literal["davis", "youtube_vos", "sav"] = option(
        "--save-masks-as",
        "how they lie: davis (the default; MOSE), youtube_vos (LVOS) or sav",
        "davis",
        choices=("davis", "youtube_vos", "sav"),
        metavar="LAYOUT",
    )

    def run(self) -> int:
        self.open(self.checkpoint).evaluate(self.save_masks, self.save_masks_as)
        return 0


@dataclass(frozen=True, kw_only=True)
class PromptMatrix(_Scoring):
    """Score a checkpoint with points, boxes and masks, 1 to 5 clicks, clean and moved."""

    flag = "--prompt-matrix"
    checkpoint: str = operand(metavar="CHECKPOINT")

    def run(self) -> int:
        evaluation = self.open(self.checkpoint)
        from sam2train.eval_checkpoint import prompt_matrix

        prompt_matrix(evaluation)
        return 0


@dataclass(frozen=True, kw_only=True)
class Predict(FileCommand):
    """Track objects through a video: a folder of frames, a film or a TIFF of many pages. Writes
    masks, a COCO JSON, scores and a film of them."""

    group, flag = "Score and export a checkpoint", "--predict"
    video: Path = operand(type=Path, metavar="VIDEO")
    prompt: Sequence[str] = option(
        "--prompt",
        'an object: "1: box 10 20 80 90 @0" (x0 y0 x1 y1, frame), "2: point 30 40 + point 50 60 -" '
        'or "3: mask FILE.png"; again for each object and frame',
        (),
        action="append",
        metavar="PROMPT",
    )
    prompts: Path | None = option(
        "--prompts", "a JSON list of prompts", type=Path, metavar="FILE.json"
    )
    weights: str = option(
        "--weights",
        "a run, a checkpoint, a file that --export wrote, or base, the default",
        "base",
        type=str,
        metavar="WEIGHTS",
    )
    run_dir: Path | None = option(
        "--run-dir", "the folder of this prediction", type=Path, metavar="PATH"
    )

    def run(self) -> int:
        experiment = self.experiment()
        from sam2train.predict import predict, read_prompts
        from sam2train.training_run import new_run_id

        given = read_prompts(self.prompt, self.prompts)
        folder = RunFolder.of_evaluations(self.name) / f"{new_run_id()}-predict-{self.video.stem}"
        predict(experiment, self.video, given, self.weights, self.run_dir or folder, _console())
        return 0


@dataclass(frozen=True, kw_only=True)
class Export(FileCommand):
    """Write the checkpoint of a run for other programs: OUT.pt or OUT.safetensors for SAM 2, any
    other OUT is a folder for transformers, with a model card."""

    group, flag = "Score and export a checkpoint", "--export"
    paths: Sequence[Path] = operand(type=Path, nargs=2, metavar=("CHECKPOINT", "OUT"))
    half: bool = option("--half", "in half precision", False)
    push: str | None = option(
        "--push", "upload the folder to huggingface.co", type=str, metavar="ORG/NAME"
    )

    def run(self) -> int:
        experiment = self.experiment()
        from sam2train.export import export_checkpoint

        source, target = self.paths
        how = {"half": self.half, "push": self.push}
        export_checkpoint(experiment, source, target, console=_console(), **how)
        return 0


@dataclass(frozen=True, kw_only=True)
class Runs(Command):
    """List the runs below a folder, runs/ by default, with their scores."""

    group, flag = "Look at finished runs", "--runs"
    folder: Path = operand(type=Path, nargs="?", const=RUNS, metavar="FOLDER")

    def run(self) -> int:
        from sam2train.compare import show_runs

        show_runs(self.folder, _console())
        return 0


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Show how the settings and scores of run folders differ, with intervals."""

    group, flag = "Look at finished runs", "--compare"
    folders: Sequence[Path] = operand(type=Path, nargs="+", metavar="RUN")

    def run(self) -> int:
        from sam2train.compare import compare_runs

        compare_runs(self.folders, _console())
        return 0


@dataclass(frozen=True, kw_only=True)
class Collect(Command):
    """Write the scores of a sweep's runs to experiments/results/, as a table and pictures. Without
    FOLDER: draw the pictures of all tables there again."""

    group, flag = "Look at finished runs", "--collect"
    folder: Path | None = operand(type=Path, nargs="?", metavar="FOLDER")

    def run(self) -> int:
        from sam2train.compare import collect_results

        collect_results(self.folder, _console())
        return 0


# In the order of the overview.
COMMANDS: tuple[type[Command], ...] = (
    Train,
    RunSweep,
    ListExperiments,
    Settings,
    DryRun,
    CheckData,
    Probe,
    Download,
    Evaluate,
    PromptMatrix,
    Predict,
    Export,
    Runs,
    Compare,
    Collect,
)


def _console() -> Console:
    from sam2train.machine import plain_console

    return plain_console(quiet=not distributed.is_main())
