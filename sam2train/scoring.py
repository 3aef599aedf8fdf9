"""One model on one split: means, a row for each object, a row for each frame; files and tables."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sam2train.data_source import listed
from sam2train.datasets import DatasetConfig
from sam2train.errors import UserError
from sam2train.evaluate import (
    DrawPrompts,
    EvaluationConfig,
    OnFrame,
    OnVideo,
    Track,
    TrackedVideo,
    Videos,
    score_tracks,
)
from sam2train.files import natural_key, resolve_path, write_rows
from sam2train.horizon import ABSENCE_RECALL, FALSE_ABSENCES, frame_rows, horizon_rows
from sam2train.machine import cell
from sam2train.metrics import BASE, COPY
from sam2train.stats import Interval, paired_bootstrap

LABELS = {BASE: "untouched base checkpoint", COPY: "copy the first mask"}

SCORE_COLUMNS = (
    "step",
    "split",
    "model",
    "video_id",
    "object_id",
    "J",
    "F",
    "J_and_F",
    "num_frames",
    "J_recall",
    "J_decay",
    "F_recall",
    "F_decay",
    "mIoU",
    "frame_policy",
    "void",
    "prompt",
    "prompt_frame",
)
HORIZON_COLUMNS = ("step", "split", "model", "metric", "at", "value", "count")
FRAME_COLUMNS = (
    "model",
    "video_id",
    "object_id",
    "frame",
    "since_prompt",
    "visible",
    "predicted",
    "area",
    "J",
    "object_score",
    "absence",
    "returned",
)


@dataclass(frozen=True)
class Scores:
    """What one model scored on one split, at one step."""

    label: str  # for tables
    model: str  # TRAINED, BASE or COPY
    step: int
    means: dict[str, float]  # `evaluate.score_tracks`
    objects: list[dict[str, Any]]  # rows with SCORE_COLUMNS
    frames: list[dict[str, Any]]  # rows with FRAME_COLUMNS
    horizon: list[dict[str, Any]]  # rows with HORIZON_COLUMNS


def score(
    track: Track,
    dataset: Videos,
    config: EvaluationConfig,
    *,
    split: str,
    model: str,
    step: int,
    seed: int,
    label: str | None = None,
    draw_prompts: DrawPrompts | None = None,
    on_frame: OnFrame | None = None,
    on_video: OnVideo | None = None,
) -> Scores:
    """Score every object of a data set.

    Args:
        track, seed, draw_prompts, on_frame, on_video: see `score_tracks`.
        split, model, step: written in every row.
        label: in tables; None takes that of the baseline.

    Raises:
        UserError: no object has a frame to score.
    """
    objects, frames = [], []

    def keep(index: int, tracked: TrackedVideo) -> None:
        objects.extend(object_rows(tracked, config))
        frames.extend(frame_rows(tracked))
        if on_video is not None:
            on_video(index, tracked)

    means = score_tracks(
        track,
        dataset,
        config,
        seed=seed,
        draw_prompts=draw_prompts,
        on_frame=on_frame,
        on_video=keep,
    )
    names = {"step": step, "split": split, "model": model}
    return Scores(
        label or LABELS[model],
        model,
        step,
        means,
        [names | row for row in objects],
        [{"model": model} | row for row in frames],
        [names | row for row in horizon_rows(frames)],
    )


def object_rows(tracked: TrackedVideo, config: EvaluationConfig) -> list[dict[str, Any]]:
    """The scores of each scored object of a video, with the rules and the prompt they hang on."""
    prompts = {prompt["object_id"]: prompt for prompt in tracked.prompts}
    rows = []
    for scores in tracked.scores.objects:
        prompt = prompts.get(scores.object_id)
        rows.append(
            {
                "video_id": tracked.video.video_id,
                "object_id": scores.object_id,
                "J": scores.J_mean,
                "F": scores.F_mean,
                "J_and_F": scores.J_and_F,
                "num_frames": len(scores.frames),
                "J_recall": scores.J_recall,
                "J_decay": scores.J_decay,
                "F_recall": scores.F_recall,
                "F_decay": scores.F_decay,
                "mIoU": scores.iou,
                "frame_policy": config.frame_policy,
                "void": config.void,
                "prompt": prompt and prompt["type"],
                "prompt_frame": prompt and prompt["frame_index"],
            }
        )
    return rows


def difference(one: Scores, other: Scores, metric: str = "J_and_F") -> Interval:
    """Mean over objects of `other` minus `one`, with its interval over videos."""
    import pandas as pd

    frames = (pd.DataFrame(scores.objects).astype({metric: float}) for scores in (one, other))
    return paired_bootstrap(*frames, metric)


# What the tables say of the object score, a number each: metric of `horizon_rows` -> heading.
_OBJECT_SCORE = {
    "horizon/object_score_auc": "object score AUC",
    ABSENCE_RECALL: "recall of absence",
    FALSE_ABSENCES: "false absences",
}


def scores_table(title: str, rows: Sequence[Scores]) -> Table:
    """Scores, a column each model, how far the first is from each other, with intervals, and how
    well the object score tells absence where there is one, over n frames."""
    table = Table("", title=title, title_justify="left", caption_justify="left")
    for scores in rows:
        table.add_column(cell(scores.label), justify="right")
    lines = {"J&F": "J_and_F", "J": "J", "F": "F", "mIoU": "mIoU"}
    lines |= {"J recall": "J_recall", "J decay": "J_decay"}
    lines |= {"F recall": "F_recall", "F decay": "F_decay"}
    for heading, name in lines.items():
        table.add_row(heading, *(f"{scores.means[name]:.3f}" for scores in rows))
    apart = [difference(scores, rows[0]).text(sign=True) for scores in rows[1:]]
    table.add_row("J&F, first - this", "", *(text.replace(" (", "\n(") for text in apart))
    for metric, heading in _OBJECT_SCORE.items():
        found = [[row for row in scores.horizon if row["metric"] == metric] for scores in rows]
        if any(found):
            texts = (f"{r[0]['value']:.3f} (n={r[0]['count']})" if r else "" for r in found)
            table.add_row(heading, *texts)
            table.caption = (
                "recall of absence, false absences: of the n frames without and with the object, "
                "those with an object score of 0 or less"
            )
    return table


def read_scores(
    rows: Iterable[Mapping[str, Any]],
    split: str,
    model: str,
    step: int,
    label: str,
    horizon: Iterable[Mapping[str, Any]] = (),
) -> Scores:
    """Scores again from the rows of `scores.csv`, of which means are made, and of `horizon.csv`;
    without frames."""

    def of_this(row: Mapping[str, Any]) -> bool:
        return (row["split"], row["model"], int(row["step"])) == (split, model, step)

    chosen = [row for row in rows if of_this(row)]
    curves = [
        {
            **row,
            "at": None if row["at"] in (None, "") else int(row["at"]),
            "value": float(row["value"]),
            "count": int(row["count"]),
        }
        for row in horizon
        if of_this(row)
    ]
    means = {
        name: float(np.mean([float(row[name]) for row in chosen]))
        for name in ("J", "F", "J_and_F", "J_recall", "J_decay", "F_recall", "F_decay", "mIoU")
    }
    ids = [{name: str(row[name]) for name in ("video_id", "object_id")} for row in chosen]
    objects = [{**row, **names} for row, names in zip(chosen, ids, strict=True)]
    return Scores(label, model, step, means, objects, [], curves)


def shared_split_warning(config: DatasetConfig) -> str | None:
    """What to say where one path both chooses the best checkpoint and reports the result."""
    if config.val_path is None or config.test_path is None:
        return None
    paths = [resolve_path(path).resolve() for path in (config.val_path, config.test_path)]
    if paths[0] != paths[1]:
        return None
    return f"dataset.val_path and dataset.test_path are the same ({config.val_path}): {_TOO_HIGH}"


_TOO_HIGH = (
    "the best checkpoint was chosen on the videos it is reported on, so that its test score is too "
    "high"
)


def shared_video_warnings(splits: Mapping[str, Videos]) -> list[str]:
    """What to say where two of the data sets, by the names train, val and test, share frames."""
    resolve = cache(Path.resolve)  # of folders: the disk is asked once for each
    places = {
        name: {
            resolve(frame.path.parent) / frame.path.name: video.video_id
            for video in data.videos
            for frame in video.frames
        }
        for name, data in splits.items()
    }
    trained = "was trained on, so that its score says little about other videos"
    consequences = {
        ("val", "test"): _TOO_HIGH,
        ("train", "val"): f"what chooses the best checkpoint {trained}",
        ("train", "test"): f"what the result is reported on {trained}",
    }
    warnings = []
    for (one, other), consequence in consequences.items():
        shared = places.get(one, {}).keys() & places.get(other, {}).keys()
        videos = sorted({str(places[other][place]) for place in shared}, key=natural_key)
        if videos:
            keys = {"train": "data_path", "val": "val_path", "test": "test_path"}
            warnings.append(
                f"dataset.{keys[one]} and dataset.{keys[other]} share frames (video "
                f"{listed(videos)}): {consequence}"
            )
    return warnings


class RowsFile:
    """A CSV that grows with a run and is whole at any time.

    Args:
        last_step: of a resumed run, the last that was scored; rows of later steps are dropped, they
            come again. None starts anew.

    Raises:
        UserError: a file that is no such CSV.
    """

    def __init__(self, path: Path, columns: Sequence[str], last_step: int | None = None):
        self.path, self.columns = path, tuple(columns)
        self.rows: list[Mapping[str, Any]] = []
        if last_step is not None and path.is_file():
            with open(path, encoding="utf-8", newline="") as file:
                found = list(csv.DictReader(file))
            try:
                self.rows = [row for row in found if int(row["step"]) <= last_step]
            except (KeyError, TypeError, ValueError):
                raise UserError(
                    f"{path}: expected the columns {', '.join(columns)}, as this run wrote them; "
                    "delete the file to go on without it"
                ) from None

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows and write the file."""
        self.rows += rows
        write_rows(self.path, self.rows, self.columns)
