"""What one model scored on one split: means, a row for each object, a row for each frame, and how
long its memory holds; files and tables of them, and scores again from the rows of the files.

The memory's horizon: J by frames since the prompt, recall after an absence, false positives while
an object is absent, and how well the object score tells presence from absence: at any threshold
(its area under the ROC curve), and at 0, where SAM 2 decides.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sam2train import distributed
from sam2train.data_clips import ClipDataset
from sam2train.errors import UserError
from sam2train.evaluate import (
    DrawPrompts,
    EvaluationConfig,
    OnFrame,
    OnVideo,
    Track,
    TrackedVideo,
    track_videos,
)
from sam2train.files import write_rows
from sam2train.machine import Interrupted, cell
from sam2train.metrics import BASE, COPY, VideoScores, mean_scores
from sam2train.run_folder import Say, read_table
from sam2train.stats import Interval, paired_bootstrap

LABELS = {BASE: "untouched base checkpoint", COPY: "copy the first mask"}

# Frames after a return that decide whether the object was found again. A guess: long enough for
# one lucky frame not to count as a recovery.
RETURN_FRAMES = 5

ABSENCE_RECALL, FALSE_ABSENCES = "horizon/absence_recall", "horizon/false_absences"

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
    "memory_admission",
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
    means: dict[str, float]  # `metrics.mean_scores`
    objects: list[dict[str, Any]]  # rows with SCORE_COLUMNS
    frames: list[dict[str, Any]]  # rows with FRAME_COLUMNS
    horizon: list[dict[str, Any]]  # rows with HORIZON_COLUMNS


def score(
    track: Track,
    dataset: ClipDataset,
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
    num_of_main: int = 0,
) -> Scores:
    """Score every object of a data set. Several processes divide the videos, and each has all
    scores at the end.

    Args:
        track, seed, draw_prompts, on_frame, on_video: see `track_videos`; `on_video` sees each
            video as it is done.
        split, model, step: written in every row.
        label: in tables; None takes that of the baseline.
        num_of_main: the first so many videos are left to the main process, which draws them.

    Raises:
        UserError: no object has a frame to score.
        Interrupted: a signal, to this process or to another one.
    """
    lengths = [len(video.frames) for video in dataset.videos[: config.max_videos]]
    only = distributed.own_part(lengths, num_of_main)
    videos = track_videos(
        track, dataset, config, seed=seed, draw_prompts=draw_prompts, on_frame=on_frame, only=only
    )
    found: dict[int, tuple[list, list, VideoScores]] = {}  # by the place of the video
    stopped = None
    try:
        for index, tracked in zip(only, videos, strict=True):
            found[index] = object_rows(tracked, config), frame_rows(tracked), tracked.scores
            if on_video is not None:
                on_video(index, tracked)
    except Interrupted as error:  # the others wait for what this process has
        stopped = error.code
    for of_process, code in distributed.gather((found, stopped)):
        found |= of_process
        stopped = stopped or code
    if stopped:
        raise Interrupted(stopped)
    objects, frames, scored = [], [], []
    for _, (of_objects, of_frames, of_video) in sorted(found.items()):
        objects += of_objects
        frames += of_frames
        scored.append(of_video)
    means = mean_scores(scored)
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
    """The scores of each scored object of a video, with the rules and the prompt that they depend
    on."""
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
                "memory_admission": config.memory_admission.name,
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


def frame_rows(tracked: TrackedVideo) -> list[dict[str, Any]]:
    """One row for each object on each labelled frame after its prompt.

    Whatever the frame policy, the prompted frame is left out. Keys: video_id, object_id, frame,
    since_prompt (frames), visible and predicted (0 or 1: the object has a pixel in the truth, in
    the prediction), area (predicted pixels / pixels of the frame), J, object_score (a logit, None
    where nobody gives one); on the first `RETURN_FRAMES` labelled frames after an absence, absence
    (how many frames it lasted) and returned (the first frame after it), elsewhere None.
    """
    video, rows = tracked.video, []
    for prompt in tracked.prompts:
        object_id, prompted = prompt["object_id"], prompt["frame_index"]
        labelled = np.array(video.labelled, np.int64)
        counted = labelled > prompted
        frames, measures = labelled[counted], tracked.measures[object_id].select(counted)
        visible = measures.present > 0
        returns = after_absence(frames, visible)
        scores = tracked.object_scores.get(object_id)
        pixels = video.size[0] * video.size[1]
        for place, (t, score) in enumerate(zip(frames, measures.J, strict=True)):
            rows.append(
                {
                    "video_id": video.video_id,
                    "object_id": object_id,
                    "frame": int(t),
                    "since_prompt": int(t) - prompted,
                    "visible": int(visible[place]),
                    "predicted": int(measures.predicted[place] > 0),
                    "area": float(measures.predicted[place] / pixels),
                    "J": float(score),
                    "object_score": None if scores is None else float(scores[t]),
                    "absence": returns[place][0],
                    "returned": returns[place][1],
                }
            )
    return rows


def after_absence(
    frames: np.ndarray, visible: np.ndarray
) -> list[tuple[int, int] | tuple[None, None]]:
    """For each of n frames (length of the absence, first frame after it) where one has just ended.

    Args:
        frames: (n,) ascending positions in the video, the prompted frame before them.
        visible: (n,) bool.
    """
    found: list[tuple[int, int] | tuple[None, None]] = []
    gone_at: int | None = None  # the first frame of the absence that lasts
    current, left = (None, None), 0
    for t, here in zip(frames.tolist(), visible.tolist(), strict=True):
        if not here:
            gone_at, left = t if gone_at is None else gone_at, 0
        elif gone_at is not None:
            current, left, gone_at = (t - gone_at, t), RETURN_FRAMES, None
        found.append(current if left > 0 else (None, None))
        left -= 1
    return found


def horizon_rows(frames: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The curves and numbers in `frame_rows` of all videos: metric, at, value, count.

    Metrics:
        horizon/J: of frames that show the object, by frames since the prompt. A mean over objects,
            `count` of them, of each object's mean.
        horizon/recall_after_absence: share of the first frames after a return with J above 0.5, by
            the frames the absence lasted. A mean over returns, `count` of them.
        horizon/false_positives: share of the `count` frames without the object that have a mask.
        horizon/false_positive_area: that mask's share of the frame, mean over the same frames.
        horizon/object_score_auc: chance that a frame with the object has a higher object score
            than one without; 0.5 is chance. Over `count` frames.
        horizon/absence_recall, horizon/false_absences: share of the `count` frames without the
            object, and of those that show it, with an object score of 0 or less: there SAM 2 treats
            the object as absent, in its memory, too.

    `at` is the upper end of a bin that doubles: 8 stands for 5 to 8 frames. None where there is
    none. A metric without a case in these videos is left out.
    """
    visible = [row for row in frames if row["visible"]]
    absent = [row for row in frames if not row["visible"]]

    def who(row: Mapping[str, Any]) -> tuple:
        return row["video_id"], row["object_id"]

    held = _by_bin_and_group((bin_end(row["since_prompt"]), who(row), row["J"]) for row in visible)
    found = _by_bin_and_group(
        (bin_end(row["absence"]), (who(row), row["returned"]), row["J"] > 0.5)
        for row in visible
        if row["absence"] is not None
    )
    rows = _curve_rows("horizon/J", held) + _curve_rows("horizon/recall_after_absence", found)
    if absent:
        for metric, name in (("false_positives", "predicted"), ("false_positive_area", "area")):
            mean = float(np.mean([row[name] for row in absent]))
            rows.append(_row(f"horizon/{metric}", None, mean, len(absent)))
    scored = presence_scores(frames)
    if all(map(len, scored)):
        count = sum(map(len, scored))
        rows.append(_row("horizon/object_score_auc", None, area_under_roc(*scored), count))
    for metric, part in zip((FALSE_ABSENCES, ABSENCE_RECALL), scored, strict=True):
        if part:
            called_absent = float(np.mean(np.asarray(part) <= 0))
            rows.append(_row(metric, None, called_absent, len(part)))
    return rows


def presence_scores(frames: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """The object scores of the frames with the object, and of those without."""
    given = [row for row in frames if row["object_score"] is not None]
    return tuple([row["object_score"] for row in given if row["visible"] == k] for k in (1, 0))


def bin_end(frames: int) -> int:
    """The upper end of the bin that a number of frames falls in: 1, 2, 4, 8, ..."""
    return 1 << math.ceil(math.log2(max(frames, 1)))


def bin_name(end: int) -> str:
    """The frames of the bin that ends there: "1", "2", "3 to 4", "5 to 8", ..."""
    return f"{end}" if end < 3 else f"{end // 2 + 1} to {end}"


def area_under_roc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Chance that a positive's value is above a negative's; a tie counts half."""
    low = np.sort(np.asarray(negative, np.float64))
    high = np.asarray(positive, np.float64)
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / 2 / len(low))


def roc(positive: Sequence[float], negative: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates, from (0, 0) to (1, 1), as the threshold falls."""
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    rates = [
        np.searchsorted(np.sort(-np.asarray(part)), -thresholds, "right") / len(part)
        for part in (negative, positive)
    ]
    false, true = (np.concatenate([[0.0], rate]) for rate in rates)
    return false, true


def _by_bin_and_group(
    values: Iterable[tuple[int, Hashable, float]],
) -> dict[int, dict[Hashable, list[float]]]:
    """(at, group, value) -> at -> group -> values."""
    groups: dict[int, dict[Hashable, list[float]]] = {}
    for at, group, value in values:
        groups.setdefault(at, {}).setdefault(group, []).append(value)
    return groups


def _curve_rows(
    metric: str, groups: dict[int, dict[Hashable, list[float]]]
) -> list[dict[str, Any]]:
    return [
        _row(metric, at, float(np.mean([np.mean(values) for values in parts.values()])), len(parts))
        for at, parts in sorted(groups.items())
    ]


def _row(metric: str, at: int | None, value: float, count: int) -> dict[str, Any]:
    return {"metric": metric, "at": at, "value": value, "count": count}


def numbers(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of `horizon_rows` the metrics that are one number each, and the frames behind the two shares
    at an object score of 0: `horizon/num_absent` without the object, `horizon/num_visible`."""
    single = [row for row in rows if row["at"] is None]
    counts = {ABSENCE_RECALL: "horizon/num_absent", FALSE_ABSENCES: "horizon/num_visible"}
    return {row["metric"]: row["value"] for row in single} | {
        counts[row["metric"]]: row["count"] for row in single if row["metric"] in counts
    }


# On disk


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


class RowsFile:
    """A CSV that grows with a run and is whole at any time.

    Args:
        last_step: of a resumed run, the last that was scored; rows of later steps are dropped, they
            come again. None starts anew.
        say: gets a line on rows that are not whole; they are left out.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        last_step: int | None = None,
        *,
        say: Say = print,
    ):
        self.path, self.columns = path, tuple(columns)
        self.rows: list[Mapping[str, Any]] = []
        if last_step is None or not path.is_file():
            return
        try:
            _, rows = read_table(path, columns, say)
        except UserError as problem:
            say(f"{problem}; its rows are left out")
            return
        self.rows = [row for row in rows if int(row["step"]) <= last_step]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows and write the file."""
        self.rows += rows
        if distributed.is_main():
            write_rows(self.path, self.rows, self.columns)
