"""The folder of a run: the one place that knows what its files are called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sam2train.files import file_name

RUNS = Path("runs")  # of all experiments


def _place(name: str, what: str) -> property:
    """The path of a file or folder of a run; `what` is what a person finds there."""
    return property(lambda folder: folder.path / name, doc=what)


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, or of an evaluation of a checkpoint, whether they exist or not."""

    path: Path

    config = _place("config.yaml", "the settings; what makes a folder a run")
    environment = _place("environment.json", "code, versions and machine")
    metrics = _place("metrics.jsonl", "losses and scores by step")
    summary = _place("summary.json", "scores, counts and warnings")
    scores = _place("scores.csv", "J, F and J&F of every object, baselines included")
    horizon = _place("horizon.csv", "how long the memory holds")
    horizon_figure = _place("horizon.png", "the same as pictures")
    frames = _place("frames.csv", "every frame of every object")
    overlays = _place("overlays", "ground truth, prediction and errors as pictures")
    checkpoints = _place("checkpoints", "weights")
    best = _place("checkpoints/best.pt", "the weights of the highest validation J&F")
    last = _place("checkpoints/last.pt", "to go on from")
    previous = _place("checkpoints/previous.pt", "the one before, if that is damaged")
    damaged = _place("checkpoints/damaged.pt", "a last checkpoint that is damaged")
    wandb = _place("wandb", "what W&B writes")
    # An evaluation has its settings here and no `config`: it is no run to be resumed or compared.
    evaluation = _place("evaluation.yaml", "the settings of an evaluation")
    matrix = _place("prompt_matrix.csv", "a row for each prompt and noise")
    matrix_objects = _place("prompt_matrix_objects.csv", "a row for each object in each of them")
    matrix_figure = _place("prompt_matrix.png", "the same as a heat map")

    # What --predict writes.
    masks = _place("masks", "a palette PNG a frame: the pixel is the object's number")
    predictions = _place("predictions.json", "the masks as a COCO video JSON")
    frame_pictures = _place("frames", "the frames that it names")
    frame_scores = _place("scores.csv", "object score, predicted IoU and area on every frame")
    overlay = _place("overlay.mp4", "the video with masks and prompts")
    prompts = _place("prompts.json", "the prompts, for --prompts")

    def bad_batch(self, step: int) -> Path:
        """Where a step that was not finite leaves what it was made of."""
        return self.path / f"bad_batch_{step}.pt"

    @classmethod
    def of_checkpoint(cls, path: Path) -> RunFolder:
        """The run that a checkpoint lies in."""
        return cls(path.parent.parent)

    @classmethod
    def of_experiment(cls, name: str) -> Path:
        """Where the runs of an experiment are, each in a folder named by its id."""
        return RUNS / file_name(name)

    @classmethod
    def of_evaluations(cls, name: str) -> Path:
        """Where the evaluations of an experiment's checkpoints are, beside its runs."""
        return cls.of_experiment(name) / EVALUATIONS

    @property
    def is_run(self) -> bool:
        """Whether there is a config, and something that a started run wrote."""
        started = (self.summary, self.metrics, self.environment)
        return self.config.is_file() and any(path.is_file() for path in started)

    @property
    def can_go_on(self) -> bool:
        """Whether a run has saved. One that was killed while it renamed the two has the previous
        checkpoint only."""
        return self.last.exists() or self.previous.exists()

    @property
    def checkpoint(self) -> Path | None:
        """The best checkpoint, else the last, else None."""
        return next((path for path in (self.best, self.last) if path.is_file()), None)

    def contents(self, *names: str) -> Iterable[str]:
        """A line for each of these places that exists: its path and what a person finds there."""
        for name in names:
            path = getattr(self, name)
            if path.exists():
                yield f"  {path!s:<48} {getattr(RunFolder, name).__doc__}"


EVALUATIONS = "evaluations"
