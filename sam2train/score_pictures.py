"""Figures of scores: the prompt matrix as a heat map, and the horizon of the memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from sam2train.machine import cell
from sam2train.metrics import JANDF
from sam2train.prompts import NOISE, Cell
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


def matrix_table(label: str, rows: Sequence[dict[str, Any]]) -> Table:
    """J&F of each prompt at each strength of noise, and the change from clean with its interval."""
    table = Table("prompt", title=cell(f"J&F: {label}", "table.title"), title_justify="left")
    for noise in NOISE:
        table.add_column(f"noise {noise:g}" if noise else "clean", justify="right")
    lines: dict[str, list[str]] = {}
    for row in rows:
        text = f"{row['J_and_F']:.3f}"
        if row["change"] is not None:
            text += f" ({row['change']:+.3f} [{row['change_low']:+.3f}, {row['change_high']:+.3f}])"
        lines.setdefault(Cell(row["prompt"], row["clicks"], 0.0).name, []).append(text)
    for name, cells in lines.items():
        table.add_row(name, *cells)
    return table
