"""Results -> matplotlib figures, and a table that sorts, for notebooks and the README.

Every function returns a `Figure` of its own and touches no global state of matplotlib; a notebook
shows it after `%matplotlib inline`. Colour-blind readers can tell the colours apart; lines also
differ in their markers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam2train.ablation import (
    MASKMEM,
    POINTERS,
    SPLIT_NAMES,
    Question,
    differences,
    last_step,
    questions,
    read_results,
    settings_in_order,
)
from sam2train.errors import UserError
from sam2train.files import replacing
from sam2train.metrics import JANDF
from sam2train.results import over_seeds
from sam2train.score_pictures import COLOURS, GREY, MARKERS, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import HTML
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FROZEN = "#c8c8c8"
_HORIZON_METRICS = {  # metric -> labels of its axes
    "horizon/J": ("frames since the prompt, up to", "J"),
    "horizon/recall_after_absence": ("frames away, up to", "found again (J > 0.5)"),
}


def curves(
    data: pd.DataFrame, by: str = "settings", *, label: str = JANDF, title: str = ""
) -> Figure:
    """Score over steps: a thin line each run, a thick one the mean over the runs of a `by`.

    The dashed line is the mean at step 0, where nothing was trained yet: a run that stays below it
    got worse. The mean ends where the first run of its `by` ends.

    Args:
        data: as `results.load_curves` gives it; `by` is one of its columns. Without a row the
            picture says that there is no score.
    """
    with new_figure(8, 4) as (figure, (axes,)):
        if data.empty:
            axes.text(0.5, 0.5, f"no {label} yet", ha="center", transform=axes.transAxes)
            return figure
        if (data["step"] == 0).any():
            start = data.loc[data["step"] == 0, "value"].mean()
            axes.axhline(start, color=GREY, linestyle="--", linewidth=1.2, label="step 0, mean")
        # The legend in the order in which the lines end.
        parts = sorted(
            data.groupby(by),
            key=lambda pair: pair[1].groupby("step")["value"].mean().iloc[-1],
            reverse=True,
        )
        for (name, part), style in zip(parts, _styles(len(parts)), strict=True):
            wide = part.pivot_table(index="step", columns=["experiment", "run"], values="value")
            num = wide.shape[1]
            if num > 1:
                axes.plot(wide.index, wide, color=style["color"], linewidth=0.8, alpha=0.45)
                wide = wide.dropna()
            text = f"{name}, mean of {num}" if num > 1 else f"{name}"
            mean = wide.mean(axis=1)
            axes.plot(mean.index, mean, label=text, linewidth=2, markersize=5, **style)
        axes.set(xlabel="step", ylabel=label, title=title)
        _honest(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def ablation_scores(results: pd.DataFrame, question: Question, *, title: str = "") -> Figure:
    """J&F by the values of a setting, and beside it the differences to the reference; bars are
    intervals over seeds and videos. Where those are not known, there is no bar.

    A series each split and each value of `question.within`. Dots are seeds, hollow marks step 0.

    Args:
        results: as `ablation.read_results` gives them, with the setting of the question varied.
    """
    _not_empty(results)
    table = differences(results, question)
    order = settings_in_order(table[question.by])
    names = [name.replace("+", "\n+ ") if isinstance(name, str) else str(name) for name in order]
    several = table["split"].nunique() > 1
    keys = ["split", *([question.within] if question.within in table else [])]
    series = [*table.groupby(keys, sort=False)]
    with new_figure(12, 4, 2, sharey=False) as (figure, (left, right)):
        start = "step 0"  # in the legend once
        for place, ((key, part), style) in enumerate(
            zip(series, _styles(len(series)), strict=True)
        ):
            words = [SPLIT_NAMES[key[0]]] * several
            words += [_within_label(question.within, value) for value in key[1:]]
            label = ", ".join(words) or "last step"
            shift = 0.24 * (place - (len(series) - 1) / 2)
            part = part.assign(x=part[question.by].map(order.index) + shift)
            _dots(left, part, style)
            _bars(left, part, ("mean", "mean_low", "mean_high"), style, label)
            known = part.dropna(subset=["start"])
            if len(known):
                hollow = {**style, "linestyle": "none", "markerfacecolor": "none"}
                left.plot(known["x"] - 0.07, known["start"], label=start, **hollow)
                start = None
            apart = part.dropna(subset=["difference"])
            _bars(right, apart, ("difference", "low", "high"), style, label)
        right.axhline(0, color=GREY, linewidth=1)
        for axes in (left, right):
            _categories(axes, names, question.by.split(".")[-1])
        _cut_off_below(left, table, ("mean", "mean_low", "mean_high"), question.by, order)
        _cut_off_below(right, table, ("difference", "low", "high"), question.by, order)
        left.set(ylabel=JANDF, title=f"{title or JANDF}; bars: 95 % over seeds and videos")
        right.set_ylabel(f"{JANDF} minus that of {question.reference}")
        handles = left.get_legend_handles_labels()
        right.legend(*handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def horizon(results: pd.DataFrame, *, title: str = "") -> Figure:
    """How long the memory holds: J against the frames since the prompt, and below it how many
    objects are found again after an absence, against its length.

    A line each `num_maskmem`, a column each number of object pointers. Lines are means over seeds,
    side by side, bars their interval over seeds, on these videos; the curves have no rows by video
    for another. A single seed has no bar. What was not measured has no row.

    Args:
        results: as `ablation.read_results` gives them.
    """
    parts = {name: results[results["metric"] == name] for name in _HORIZON_METRICS}
    parts = {
        name: last_step(part, name, part["split"].iloc[0])
        for name, part in parts.items()
        if len(part)
    }
    _not_empty(results if parts else results[:0])
    columns = settings_in_order(results[POINTERS]) if POINTERS in results else [None]
    settings = settings_in_order(results[MASKMEM])
    size = (4.5 * len(columns) + 2, 0.6 + 3.2 * len(parts))
    with new_figure(*size, len(columns), len(parts)) as (figure, all_axes):
        cells = itertools.product(parts.items(), columns)
        for axes, ((name, part), column) in zip(all_axes, cells, strict=True):
            chosen = part if column is None else part[part[POINTERS] == column]
            for place, style in enumerate(_ordered(len(settings))):
                means = over_seeds(chosen[chosen[MASKMEM] == settings[place]], ["at"], "value")
                # Beside each other, a few hundredths of the octave between two places.
                x = means["at"] * 2 ** (0.07 * (place - (len(settings) - 1) / 2))
                error = (means["high"] - means["mean"]).to_numpy()
                bars = {"capsize": 2, "elinewidth": 1, "markersize": 5}
                axes.errorbar(x, means["mean"], error, label=f"{settings[place]}", **bars, **style)
            axes.set_xscale("log", base=2)  # `at` is the end of a bin, each twice as long
            axes.set_xticks(sorted(set(part["at"])), minor=False)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.grid(False, axis="x")
            xlabel, ylabel = _HORIZON_METRICS[name]
            axes.set(xlabel=xlabel, title="" if column is None else _pointers(column))
            if column == columns[0]:
                axes.set_ylabel(ylabel)
        all_axes[len(columns) - 1].legend(
            title="num_maskmem", loc="center left", bbox_to_anchor=(1, 0.5)
        )
        title = f"{title or 'J and recall'}; bars: 95 % over seeds, on these videos"
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def mask_sizes(areas: Mapping[str, Sequence[float]], *, title: str = "") -> Figure:
    """How large masks are: a histogram each data set, of their share of the frame, log scale.

    Args:
        areas: name -> the masks' areas as fractions of their frames, in [0, 1]; empty masks are
            left out and counted in the legend.
    """
    values = {name: np.asarray(area, np.float64) for name, area in areas.items()}
    kept = {name: area[area > 0] for name, area in values.items()}
    if not any(map(len, kept.values())):
        raise UserError("no mask with a pixel in it; nothing to draw")
    smallest = min(area.min() for area in kept.values() if len(area))
    bins = np.geomspace(min(smallest, 0.5), 1, 31)
    with new_figure(6.5, 3.6) as (figure, (axes,)):
        for (name, area), style in zip(kept.items(), _styles(len(kept)), strict=True):
            empty = len(values[name]) - len(area)
            label = f"{name}: {len(area):,}" + (f", {empty:,} empty" if empty else "")
            shares = np.full(len(area), 1 / max(len(area), 1))
            colour = style["color"]
            axes.hist(area, bins, weights=shares, histtype="stepfilled", color=colour, alpha=0.15)
            axes.hist(
                area, bins, weights=shares, histtype="step", color=colour, lw=1.8, label=label
            )
        axes.set(xscale="log", xlabel="mask / frame (area)", ylabel="share of masks", title=title)
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
        _legend(axes)
    return figure


def presence(masks: pd.DataFrame, *, title: str = "") -> Figure:
    """Where each object shows: a bar for every stretch of frames, the objects of a video together.

    Args:
        masks: as `data_report.mask_table` gives it.
    """
    if masks.empty:
        raise UserError("no object in these videos; nothing to draw")
    num_objects = masks.groupby(["video_id", "object_id"]).ngroups
    height = 0.17 * num_objects + 0.1 * masks["video_id"].nunique() + 1
    with new_figure(8, height) as (figure, (axes,)):
        y, places, videos = 0.0, [], []
        for video, part in masks.groupby("video_id", sort=False):
            start = y
            for number, (_, rows) in enumerate(part.groupby("object_id", sort=False)):
                shown = rows.loc[rows["area"] > 0, "frame"].to_numpy()
                axes.barh(np.full(len(shown), y), 1, 0.8, shown - 0.5, color=_colour(number))
                y += 1
            places.append((start + y - 1) / 2)
            videos.append(str(video))
            y += 0.6
        axes.set_yticks(places, videos, fontsize=8)
        axes.set(xlabel="frame", title=title, ylim=(y - 0.6, -1))
        axes.grid(False, axis="y")
    return figure


def parameters(run: Mapping[str, Any], *, title: str = "") -> Figure:
    """How many parameters each module has, trained ones in colour; the title says how many.

    Args:
        run: a row of `results.load_runs`.
    """
    from matplotlib.patches import Patch

    sizes = {
        name.removeprefix("params/"): size
        for name, size in run.items()
        if name.startswith("params/") and size == size  # not NaN: another run's module
    }
    total, learning = sizes.pop("total", math.nan), sizes.pop("trainable", math.nan)
    if not sizes:
        raise UserError(f"{run['path']}: no parameter counts in its summary.json; nothing to draw")
    names = sorted(sizes, key=sizes.get)
    sides = [sizes[name] for name in names]
    # Runs from before these counts were kept: by the modules that they list.
    listed = str(run.get("model.trainable_modules")).split("+")
    told = {name: run.get(f"trainable/{name}", math.nan) for name in names}
    part = [
        sizes[name] * (name in listed) if math.isnan(told[name]) else told[name] for name in names
    ]
    with new_figure(6.5, 0.32 * len(names) + 1) as (figure, (axes,)):
        bars = axes.barh(names, sides, color=FROZEN)
        axes.bar_label(bars, [f"{side:,.0f}" for side in sides], padding=3, fontsize=9)
        axes.barh(names, part, color=COLOURS[0])
        handles = [Patch(color=COLOURS[0], label="trained"), Patch(color=FROZEN, label="frozen")]
        axes.legend(handles=handles, loc="lower right", fontsize=9)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M")
        said = f"{title or run['run']}: {learning / 1e6:.2f} M of {total / 1e6:.2f} M are trained"
        axes.set(title=said, xlabel="parameters", xlim=(0, 1.25 * max(sizes.values())))
        axes.grid(False, axis="y")
    return figure


def sortable(table: pd.DataFrame) -> HTML:
    """The table in a notebook; a click on a heading sorts by it, another one the other way."""
    from IPython.display import HTML

    text = table.to_html(index=False, na_rep="", float_format="{:.3f}".format, border=0)
    name = "sort" + hashlib.sha256(text.encode()).hexdigest()[:8]
    return HTML(f'<div id="{name}">{text}</div><script>{_SORT.replace("NAME", name)}</script>')


def draw_results(path: Path) -> list[Path]:
    """Write what a CSV of `experiments/results/` shows as PNG files beside it; returns them.

    Raises:
        UserError: no such file, or nothing in it that can be drawn.
    """
    results, drawn = read_results(path), {}
    for question in questions(path.stem, results)[:1]:
        drawn[""] = ablation_scores(results, question)
    if MASKMEM in results and results["metric"].isin(_HORIZON_METRICS).any():
        drawn["_horizon"] = horizon(results, title="How long the memory holds")
    written = []
    for suffix, figure in drawn.items():
        written.append(path.with_name(f"{path.stem}{suffix}.png"))
        with replacing(written[-1]) as partial:
            figure.savefig(partial, format="png", dpi=120)
    return written


# Numbers by size, other texts by the alphabet, empty cells last.
_SORT = """
document.querySelectorAll("#NAME th").forEach((heading, column) => {
  heading.style.cursor = "pointer";
  heading.onclick = () => {
    const body = document.querySelector("#NAME tbody");
    const down = heading.dataset.down = heading.dataset.down === "1" ? "" : "1";
    const value = row => row.cells[column].textContent;
    const order = (x, y) => isNaN(x - y) ? x.localeCompare(y) : x - y;
    const compare = (a, b) => value(a) === "" ? 1 : value(b) === "" ? -1 :
      (down ? -1 : 1) * order(value(a), value(b));
    [...body.rows].sort(compare).forEach(row => body.append(row));
  };
});
"""


def _dots(axes: Axes, part: pd.DataFrame, style: Mapping[str, Any]) -> None:
    """The seeds of each row as faint dots."""
    for row in part.to_dict("records"):
        x = np.full(len(row["seeds"]), row["x"] + 0.07)
        axes.scatter(x, row["seeds"], s=14, color=style["color"], alpha=0.4, lw=0)


def _bars(
    axes: Axes,
    part: pd.DataFrame,
    names: tuple[str, str, str],
    style: Mapping[str, Any],
    label: str,
) -> None:
    """Values with their intervals, by the names of value, low and high."""
    value, low, high = (part[name].to_numpy(np.float64) for name in names)
    bars = {"capsize": 3, "elinewidth": 1.3, "markersize": 6, "linestyle": "none"}
    axes.errorbar(part["x"], value, [value - low, high - value], label=label, **bars, **style)


def _categories(axes: Axes, names: Sequence[Any], label: str) -> None:
    axes.set_xticks(range(len(names)), [str(name) for name in names])
    axes.set(xlim=(-0.5, len(names) - 0.5), xlabel=label)
    axes.grid(False, axis="x")
    _honest(axes)


def _cut_off_below(
    axes: Axes, table: pd.DataFrame, names: tuple[str, str, str], by: str, order: Sequence[Any]
) -> None:
    """Where the first category lies so far below the others that it would press them into one
    line, end the axis above it and write its value instead."""
    value = names[0]
    first, others = (table[(table[by] == order[0]) == is_first] for is_first in (True, False))
    gap = others[value].min() - first[value].max()  # NaN where there are no others
    if not gap > max(0.1, 2 * (others[value].max() - others[value].min())):
        return
    drawn = [*names, *(["start"] if value == "mean" else [])]
    ends = others[drawn]  # NaN where there is no interval
    low, high = ends.min(axis=None), ends.max(axis=None)
    margin = max(0.1 * (high - low), 0.025)
    axes.set_ylim(low - margin, high + margin)
    axes.annotate(
        f"{first[value].mean():.3f},\nbelow",
        (0, 0),
        (0, 18),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        color=GREY,
        arrowprops={"arrowstyle": "->", "color": GREY},
    )


def _honest(axes: Axes) -> None:
    """Show at least 0.05 of the score's axis: with less, noise would look like a slope."""
    low, high = axes.get_ylim()
    missing = max(0.0, 0.05 - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)


def _legend(axes: Axes) -> None:
    axes.legend(loc="best", fontsize=9)


def _pointers(number: Any) -> str:
    return "without object pointers" if number == 0 else f"{number} object pointers"


def _within_label(name: str, value: Any) -> str:
    return _pointers(value) if name == POINTERS else f"{name.split('.')[-1]} {value}"


def _not_empty(data: pd.DataFrame) -> None:
    if data.empty:
        raise UserError("no scores among these results; nothing to draw")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _styles(num: int) -> list[dict[str, Any]]:
    """Colour and marker of unordered series; beyond seven the markers make the difference."""
    return [
        {"color": _colour(k), "marker": MARKERS[(k + k // 7) % len(MARKERS)]} for k in range(num)
    ]


def _ordered(num: int) -> list[dict[str, Any]]:
    """Colour and marker of series in an order, dark to light."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, num))
    return [{"color": c, "marker": MARKERS[k % len(MARKERS)]} for k, c in enumerate(colours)]
