"""The folder of a run: the one place that knows what its files are called, and how they are read.

They are read strictly: an odd part is named, and left out or made anew from the rest."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam2train.errors import UserError
from sam2train.files import file_name, read_json, shorten

RUNS = Path("runs")  # of all experiments
# Environment: where the trials of a sweep keep the scores that are the same in all of them.
BASE_SCORES = "SAM2TRAIN_BASE_SCORES"


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
    attributes = _place("scores_by_attribute.csv", "J&F of the objects with an attribute")
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
    tensorboard = _place("tensorboard", "what TensorBoard reads")
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
        """A line for each of these places that exists: its name in the folder and what a person
        finds there."""
        for name in names:
            path = getattr(self, name)
            if path.exists():
                place = path.relative_to(self.path).as_posix()
                yield f"  {place:<20} {getattr(RunFolder, name).__doc__}"


EVALUATIONS = "evaluations"


# The content of the files

Say = Callable[[str], None]
STATUSES = ("running", "finished", "interrupted", "failed")
_NUM_TOLD = 5  # oddities of a file
_MOST_SECONDS = 10**10  # some 300 years
_MOST = 2**53  # whole numbers up to here are floats, too
# Columns of tables that hold words.
TEXTS = {
    "run",
    "split",
    "model",
    "metric",
    "video_id",
    "object_id",
    "frame_policy",
    "void",
    "memory_admission",
    "prompt",
}


def read_metrics(path: Path, say: Say, say_value: Say | None = None) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; [] where there is no file.

    Lines that are no rows are left out; a value that is no number becomes None, which is what a run
    writes for NaN. A last line that was cut off is what a killed process leaves, and is not told.

    Args:
        say: gets a line on what is not as a run writes it.
        say_value: gets that on values; None takes `say`.

    Raises:
        UserError: the file cannot be read.
    """
    text, rows, odd, values = _read_text(path), [], [], []
    lines = _split(text)
    for number, line in enumerate(lines, 1):
        row = _read_row(line)
        if row is None:
            if number < len(lines) or text.endswith("\n"):
                odd.append(f"line {number} is no row with a `step`")
            continue
        strange = [name for name, value in row.items() if not _is_value(name, value)]
        values += [f"line {number}: {name} is {_quoted(row[name])}" for name in strange]
        rows.append(row | dict.fromkeys(strange))
    for found, tell in ((odd, say), (values, say_value or say)):
        if found:
            more = f" and {len(found) - _NUM_TOLD} more" if len(found) > _NUM_TOLD else ""
            tell(f"{path}, {'; '.join(found[:_NUM_TOLD])}{more}: not as a run writes it, left out")
    return rows


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, bytes that are not UTF-8 replaced; [] where there is none."""
    return _split(_read_text(path))


def _split(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n") if text else []


def _read_text(path: Path) -> str:
    try:
        if not path.exists():
            return ""
        if not path.is_file():
            raise UserError(f"{path}: is no regular file; expected what a run wrote")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror})") from None


def parse_row(line: str) -> dict[str, Any] | None:
    """The row in a line of `metrics.jsonl`; None for what a run does not write."""
    row = _read_row(line)
    return row if row and all(_is_value(*item) for item in row.items()) else None


def _read_row(line: str) -> dict[str, Any] | None:
    """The row in a line, whatever its values are; None where it is none or has no step."""
    if "\ufffd" in line:
        return None
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and _is_count(row.get("step")) else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_value(name: str, value: Any) -> bool:
    """Whether a run writes such a value: a number, and no time that no run takes."""
    return _is_finite_number(value) and (
        name != "seconds" or value is None or 0 <= value < _MOST_SECONDS
    )


def _is_finite_number(value: Any) -> bool:
    """Whether JSON holds a number as a run writes it; None is what it writes for NaN."""
    if value is None or isinstance(value, float):
        return value is None or math.isfinite(value)
    return type(value) is int and abs(value) < _MOST


def _quoted(value: Any) -> str:
    large = type(value) is int and abs(value) >= _MOST  # such may have thousands of digits
    return "a number beyond 2**53" if large else shorten(ascii(value))


def read_summary(
    path: Path, metrics: Path, say: Say, say_value: Say | None = None
) -> dict[str, Any]:
    """The content of `summary.json`; {} where there is none.

    What is not as a run writes it is taken from the rows of `metrics.jsonl`, as far as they have
    it. `say` and `say_value` are told, see `read_metrics`.
    """
    try:
        known = read_json(path, "expected what a run wrote", optional=True)
    except UserError as problem:
        say(f"{problem}. It is made anew from {metrics}")
        return _summary_of(read_metrics(metrics, say))
    known = {name: _finite(value) for name, value in known.items()}
    odd = [name for name, value in known.items() if not _fits(name, value)]
    if not odd:
        return known
    tell = say_value or say
    rest = _summary_of(read_metrics(metrics, tell))
    told = "; ".join(f"{name} is {_quoted(known[name])}" for name in odd[:_NUM_TOLD])
    tell(f"{path}: {told}: not as a run writes it, made anew from {metrics}")
    whole = {name: value for name, value in known.items() if name not in odd}
    return {**whole, **{name: rest[name] for name in odd if name in rest}}


def _finite(value: Any) -> Any:
    """None, as a run writes it, for NaN and infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fits(name: str, value: Any) -> bool:
    if name == "status":
        return value in STATUSES
    if name == "steps":
        return _is_count(value)
    return _is_value(name, value) if name == "seconds" or "/" in name else True


def _summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What rows tell of a summary: the scores, and how far the run is."""
    scored = [row for row in rows if row.get("val/J_and_F") is not None]
    known: dict[str, Any] = {"status": "running"}
    if rows:
        known["steps"] = rows[-1]["step"]
        known["seconds"] = max(row.get("seconds") or 0.0 for row in rows)
    if scored:
        last = scored[-1]
        known |= {name: last[name] for name in last if name.startswith(("val/", "horizon/"))}
        known["baseline/J_and_F"] = scored[0]["val/J_and_F"]
        known["best/J_and_F"] = max(row["val/J_and_F"] for row in scored)
    return known


def read_environment(path: Path, say: Say) -> tuple[str | None, str | None]:
    """(commit, device) of `environment.json`; None for what it does not say."""
    try:
        content = read_json(path, "expected what a run wrote", optional=True)
    except UserError as problem:
        say(str(problem))
        return None, None
    code, device = content.get("code"), content.get("device")
    commit = code.get("commit") if isinstance(code, Mapping) else None
    found = [value if isinstance(value, str) else None for value in (commit, device)]
    if content and (not isinstance(code, Mapping) or found != [commit, device]):
        say(f"{path}: `code` and `device` are not as a run writes them")
    return found[0], found[1]


def read_table(
    path: Path, columns: Sequence[str], say: Say
) -> tuple[list[str], list[dict[str, str]]]:
    """(columns, rows) of a CSV such as `scores.csv`: ids and numbers as text.

    Args:
        columns: that a run writes; those that are not `TEXTS` hold numbers, or nothing.

    `say` gets a line on rows that are not whole, which are left out.

    Raises:
        UserError: the file cannot be read, or is no table.
    """
    text = _read_text(path).replace("\0", "\ufffd")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        found, headings = list(reader), list(reader.fieldnames or ())
    except csv.Error as problem:  # a field of more than 131,072 characters
        raise UserError(f"{path}: {problem}; expected the table that a run wrote") from None
    if twice := [name for name in headings if headings.count(name) > 1]:
        raise UserError(f"{path}: the column {shorten(ascii(twice[0]))} is there twice")
    numbers = [name for name in columns if name not in TEXTS]
    whole = [row for row in found if _is_whole(row, numbers)]
    if broken := len(found) - len(whole):
        say(
            f"{path}: {broken} of {len(found)} rows are not as a run writes them, with "
            f"{', '.join(columns)}; left out"
        )
    return headings, whole


def _is_whole(row: Mapping[str | None, Any], numbers: Sequence[str]) -> bool:
    """Whether a row that was read has a cell for each heading, and numbers where they belong."""
    if None in row or None in row.values() or "\ufffd" in "".join(row.values()):
        return False
    step = row.get("step") or ""
    if not (step.isascii() and step.isdecimal() and len(step) < 16):
        return False
    try:
        [float(row[name]) for name in numbers if row.get(name)]
    except ValueError:
        return False
    return True
