"""What is drawn of scored videos.

Of a tracked video: one picture of ground truth with prompts, prediction and errors. Of scores:
matplotlib figures, the prompt matrix as a heat map and the horizon of the memory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from sam2train.clips import Prompt
from sam2train.data_clips import ClipDataset, stack_ignored
from sam2train.data_source import Video
from sam2train.evaluate import SeenFrame, TrackedVideo
from sam2train.files import file_name, printable, write_text
from sam2train.machine import cell
from sam2train.metrics import JANDF, ObjectScores
from sam2train.pictures import comparison, id_mask, pick_frames, prompt_in_video, save_png
from sam2train.scores import (
    ABSENCE_RECALL,
    FALSE_ABSENCES,
    Scores,
    area_under_roc,
    bin_name,
    presence_scores,
    roc,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SHOWN = 8  # of a picture
MAX_TOGGLED = 255  # objects in a mask of W&B's


@dataclass(frozen=True, eq=False)
class Overlay:
    """One frame with its masks, to be judged by a person.

    Raises ValueError for what W&B would show wrong without an error: it shows a float frame black,
    and stretches a mask of another size.
    """

    name: str
    path: Path  # the composed PNG, on disk
    frame: np.ndarray  # (H, W, 3) uint8
    prediction: np.ndarray  # (H, W) object ids, 0..255, 0 is background
    ground_truth: np.ndarray  # (H, W) as `prediction`
    class_labels: Mapping[int, str]  # object id -> text

    def __post_init__(self) -> None:
        if self.frame.dtype != np.uint8 or self.frame.shape[2:] != (3,):
            raise ValueError(f"frame is {self.frame.dtype} {self.frame.shape}, not uint8 (H, W, 3)")
        for mask in (self.prediction, self.ground_truth):
            if mask.shape != self.frame.shape[:2] or mask.min() < 0 or mask.max() > 255:
                raise ValueError(
                    f"mask of shape {mask.shape} with ids {mask.min()}..{mask.max()} on a frame of "
                    f"{self.frame.shape[:2]}; W&B needs equal sizes and ids in 0..255"
                )


class OverlayDrawer:
    """Draws the first videos that are scored, at most as many frames of each as fit a screen.

    `see_frame` keeps what will be drawn, `see_video` writes `folder/<name>_video_<id>.png`;
    `overlays` has what was written.

    Args:
        name: what was scored, such as "step_000100"; part of the title.
        most: how many videos.
    """

    def __init__(self, dataset: ClipDataset, folder: Path, name: str, most: int):
        self.dataset, self.folder, self.name, self.most = dataset, folder, name, most
        self.overlays: list[Overlay] = []
        self._taken: set[str] = set()  # names of pictures
        # Of the video that is being tracked: (H, W, 3) uint8 with its masks, and which frames.
        self._kept: list[tuple[np.ndarray, SeenFrame]] = []
        self._shown: list[int] = []
        self._middle = 0

    def see_frame(self, index: int, seen: SeenFrame) -> None:
        """Keep the frame if it will be drawn; `index` counts the videos."""
        if index >= self.most:
            return
        if seen.frame_idx == 0:
            self._kept.clear()
            self._shown, self._middle = _picked(seen.video, seen.prompts)
        if seen.frame_idx in (*self._shown, self._middle):
            self._kept.append((self.dataset.read_frame(seen.video, seen.frame_idx), seen))

    def see_video(self, index: int, tracked: TrackedVideo) -> None:
        """Draw the video from the frames kept; `index` counts the videos."""
        if index >= self.most:
            return
        video = tracked.video
        shown = self._shown
        kept = {seen.frame_idx: (frame, seen) for frame, seen in self._kept}
        numbers = {object_id: place for place, object_id in enumerate(video.object_ids, start=1)}
        means = {scores.object_id: scores for scores in tracked.scores.objects}
        score = np.mean([scores.J_and_F for scores in means.values()]) if means else math.nan
        name = file_name(f"video_{video.video_id}", self._taken)
        path = self.folder / f"{self.name}_{name}.png"
        save_png(
            comparison(
                np.stack([kept[t][0] for t in shown]),
                *(
                    {
                        n: np.stack([getattr(kept[t][1], side)[o] for t in shown])
                        for o, n in numbers.items()
                    }
                    for side in ("prediction", "ground_truth")
                ),
                self._prompts(tracked, numbers, shown),
                title=(
                    f"{printable(video.video_id)}, {self.name.replace('_', ' ')}: J&F {score:.3f}"
                ),
                frame_labels=[f"frame {t}" for t in shown],
                scores=[_mean_J(means.values(), t) for t in shown],
                max_frames=len(shown),
                names={number: printable(o) for o, number in numbers.items()},
                ignore=stack_ignored([kept[t][1].ignore for t in shown], video.size),
            ),
            path,
        )
        # One frame with toggled masks: the middle, where tracking shows.
        frame, seen = kept[self._middle]
        order = video.object_ids[:MAX_TOGGLED]
        self.overlays.append(
            Overlay(
                name=name,
                path=path,
                frame=frame,
                prediction=id_mask(seen.prediction, order, video.size),
                ground_truth=id_mask(seen.ground_truth, order, video.size),
                class_labels={numbers[o]: f"object {o}" for o in order},
            )
        )

    def keep(self, folder: Path) -> None:
        """Copy what was drawn to a folder, for `restore`."""
        arrays, texts = {}, []
        for place, overlay in enumerate(self.overlays):
            shutil.copyfile(overlay.path, folder / overlay.path.name)
            for side in ("frame", "prediction", "ground_truth"):
                arrays[f"{place}/{side}"] = getattr(overlay, side)
            labels = list(overlay.class_labels.items())
            texts.append({"name": overlay.name, "path": overlay.path.name, "labels": labels})
        np.savez(folder / "overlays.npz", **arrays)
        write_text(folder / "overlays.json", json.dumps(texts))

    def restore(self, folder: Path) -> None:
        """Take over what was drawn of the same videos, as if it had been drawn now.

        Raises:
            OSError, ValueError, KeyError: it is not whole.
        """
        found = []
        with np.load(folder / "overlays.npz") as arrays:
            for place, text in enumerate(json.loads((folder / "overlays.json").read_text())):
                path = self.folder / text["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / text["path"], path)
                sides = {s: arrays[f"{place}/{s}"] for s in ("frame", "prediction", "ground_truth")}
                labels = {int(number): label for number, label in text["labels"]}
                found.append(Overlay(text["name"], path, **sides, class_labels=labels))
        self.overlays = found

    def _prompts(
        self, tracked: TrackedVideo, numbers: dict[int | str, int], shown: list[int]
    ) -> list[dict]:
        """Those on the frames shown, counted among these, in pixels of the video."""
        sizes = tracked.video.size, self.dataset.image_size
        return [
            {
                **prompt_in_video(prompt, *sizes),
                "object_id": numbers[prompt["object_id"]],
                "frame_index": shown.index(prompt["frame_index"]),
            }
            for prompt in tracked.prompts
            if prompt["frame_index"] in shown
        ]


def _picked(video: Video, prompts: list[Prompt]) -> tuple[list[int], int]:
    """The frames of the picture, and the one whose masks can be toggled; labelled ones, since the
    others have no ground truth."""
    frames = video.labelled or list(range(len(video.frames)))
    prompted = {frames.index(prompt["frame_index"]) for prompt in prompts}
    shown = [frames[place] for place in pick_frames(len(frames), prompted, MAX_SHOWN)]
    return shown, frames[len(frames) // 2]


def _mean_J(objects: Iterable[ObjectScores], frame_idx: int) -> str:
    """The mean of the objects for which this frame counts, as a text."""
    found = [s.J[s.frames == frame_idx] for s in objects]
    values = np.concatenate(found) if found else np.zeros(0)
    return f"J {values.mean():.2f}" if len(values) else ""


# Figures of scores

# Okabe and Ito's colours that are dark enough for a line on white, the most different ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
MARKERS = "osD^vPX"
GREY = "#777777"

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


@contextmanager
def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1, sharey: bool | str = "row"
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A new figure of so many inches with its axes, row by row, styled; not known to pyplot."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)


def matrix_figure(
    rows: Sequence[str],
    columns: Sequence[str],
    panels: Mapping[str, Sequence[Sequence[float]]],
    *,
    title: str = "",
) -> Figure:
    """J&F of each prompt (down) at each strength of noise (across), a panel for each model.

    Args:
        panels: model -> len(rows) x len(columns) scores; colours mean the same in all panels.
    """
    low, high = min(map(np.min, panels.values())), max(map(np.max, panels.values()))
    with new_figure(4.6 * len(panels) + 0.8, 3.6, len(panels)) as (figure, all_axes):
        for (name, values), axes in zip(panels.items(), all_axes, strict=True):
            image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
            for (row, column), value in np.ndenumerate(np.asarray(values)):
                bright = value > (low + high) / 2
                colour = "black" if bright else "white"
                axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour)
            axes.set_xticks(range(len(columns)), columns)
            axes.set_yticks(range(len(rows)), rows)
            axes.set(xlabel="noise, share of the object's box", title=name)
            axes.grid(False)
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
        figure.colorbar(image, ax=all_axes, label=JANDF)
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def horizon_figure(
    horizon: Mapping[str, Sequence[Mapping[str, Any]]],
    frames: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str = "",
) -> Figure:
    """J by frames since the prompt, recall by length of an absence, ROC of the object score with
    what it says at 0.

    Args:
        horizon: label -> rows of `horizon_rows`.
        frames: label -> rows of `frame_rows`.
    """
    with new_figure(14, 4, 3) as (figure, all_axes):
        styles = [{"color": c, "marker": m} for c, m in zip(COLOURS, MARKERS, strict=True)]
        for (label, rows), style in zip(horizon.items(), styles, strict=False):
            for axes, metric in zip(all_axes, ("J", "recall_after_absence"), strict=False):
                _draw_bins(
                    axes, [r for r in rows if r["metric"] == f"horizon/{metric}"], label, style
                )
            present, absent = presence_scores(frames[label])
            if present and absent:
                false, true = roc(present, absent)
                colour = style["color"]
                text = f"{label}: AUC {area_under_roc(present, absent):.2f}\n"
                text += _at_the_gate(rows)
                all_axes[2].plot(false, true, color=colour, label=text)
                gate = [np.mean(np.asarray(part) > 0) for part in (absent, present)]
                all_axes[2].plot(*gate, color=colour, marker=style["marker"], markersize=8)
            elif present or absent:  # no curve, but frames of one kind have their share
                text = f"{label}\n{_at_the_gate(rows)}"
                all_axes[2].plot([], [], color=style["color"], label=text)
        all_axes[2].plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
        all_axes[0].set(xlabel="frames since the prompt, up to", title="J while visible")
        all_axes[1].set(xlabel="frames of absence, up to", title="found again: J > 0.5")
        all_axes[2].set(
            xlabel="called visible while absent",
            ylabel="called visible while visible",
            title="object score; the mark is at 0, SAM 2's gate",
        )
        all_axes[0].set(ylim=(-0.02, 1.02))
        for axes in all_axes:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best", fontsize=8)
            if not any(len(line.get_xdata()) for line in axes.lines if line.get_color() != GREY):
                note = "nothing vanishes in these videos"
                axes.text(0.5, 0.5, note, ha="center", color=GREY, transform=axes.transAxes)
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _at_the_gate(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the object score says at 0, for a legend: a line for each kind of frame."""
    words = {ABSENCE_RECALL: "recall of absence", FALSE_ABSENCES: "false absences"}
    shares = {row["metric"]: f"{row['value']:.3f} (n={row['count']})" for row in rows}
    return "\n".join(f"{words[name]} {shares[name]}" for name in words if name in shares)


def _draw_bins(
    axes: Axes, rows: Sequence[Mapping[str, Any]], label: str, style: Mapping[str, str]
) -> None:
    """A line over bins that double, the number of cases beside the marks of the first line."""
    if not rows:
        return
    first = not axes.lines
    at, value = [row["at"] for row in rows], [row["value"] for row in rows]
    axes.plot(at, value, label=label, markersize=5, **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    if first:
        for row in rows:
            axes.annotate(
                f"n={row['count']}",
                (row["at"], row["value"]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=GREY,
            )


def horizon_table(rows: Sequence[Scores]) -> Table:
    """The curves of `horizon_rows` and the share of false positives, a column each model."""
    table = Table("memory", title="Memory horizon", title_justify="left")
    for scores in rows:
        table.add_column(cell(scores.label), justify="right")
    texts = {
        "horizon/J": "J, {} frames on",
        "horizon/recall_after_absence": "found, absent {}",
        "horizon/false_positives": "false positives",
    }
    cells = [
        {(row["metric"], row["at"]): (row["value"], row["count"]) for row in scores.horizon}
        for scores in rows
    ]
    for metric, text in texts.items():
        for key in dict.fromkeys(key for part in cells for key in part if key[0] == metric):
            values = [
                f"{part[key][0]:.3f} (n={part[key][1]})" if key in part else "" for part in cells
            ]
            table.add_row(text.format(key[1] and bin_name(key[1])), *values)
    return table
