"""`--evaluate` and `--prompt-matrix`: a checkpoint beside its baselines, on whole videos."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sam2train.build import (
    Loaded,
    base_hash,
    build_model,
    load_checkpoint,
    uses_bf16,
)
from sam2train.config import to_yaml
from sam2train.data_report import shared_split_warning
from sam2train.datasets import build_dataset
from sam2train.errors import UserError
from sam2train.evaluate import ClipDataset, SeenFrame, TrackedVideo, copy_first_mask, track_video
from sam2train.experiment import Experiment
from sam2train.files import replacing, write_rows, write_text
from sam2train.machine import cell, describe_environment, say
from sam2train.metrics import BASE, COPY, TRAINED
from sam2train.model import SAM2Model
from sam2train.prompt_cells import NOISE, Cell, CellPrompts, all_cells
from sam2train.run_folder import RunFolder
from sam2train.runlog import RunLog
from sam2train.score_figures import horizon_figure, matrix_figure
from sam2train.scores import (
    FRAME_COLUMNS,
    HORIZON_COLUMNS,
    LABELS,
    SCORE_COLUMNS,
    Scores,
    bin_name,
    difference,
    numbers,
    score,
    scores_table,
)
from sam2train.video_pictures import MaskFolder, OverlayDrawer

SplitName = Literal["val", "test"]
_MEANS = ("J", "F", "J_and_F", "J_recall", "J_decay", "F_recall", "F_decay", "mIoU")
MATRIX_COLUMNS = (
    *("step", "split", "model", "prompt", "clicks", "noise"),
    *_MEANS,
    *("num_objects", "num_not_scored", "frame_policy"),
    # J&F minus that of the same prompt without noise, with its interval over videos
    *("change", "change_low", "change_high"),
)


@dataclass(frozen=True)
class _Contender:
    """A model that is scored: the checkpoint, or the base below it."""

    key: str  # TRAINED or BASE
    label: str
    step: int
    model: SAM2Model


class Benchmark:
    """One checkpoint of an experiment on one of its splits, into a folder of its own.

    Args:
        source: a run's checkpoint, its folder (the best one, else the last), a file such as
            `--export` writes, or the word `base` for the weights that the experiment starts from.
        split: `val` or `test`.
        run_dir: where everything goes; must not exist, or be empty.
        with_base: also score the untouched base.

    Raises:
        UserError: no data for this split, weights that do not fit, a folder in use.
    """

    def __init__(
        self,
        experiment: Experiment,
        source: str,
        split: SplitName,
        run_dir: Path,
        *,
        run_id: str,
        name: str,
        console: Console,
        with_base: bool = True,
    ):
        self.experiment, self.split = experiment, split
        self.folder, self.console = RunFolder(run_dir), console
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise UserError(f"--run-dir {run_dir}: there is something already; name a new folder")
        path = getattr(experiment.dataset, f"{split}_path")
        if path is None:
            raise UserError(
                f"dataset.{split}_path is null; name the videos to score, or take --split "
                f"{'test' if split == 'val' else 'val'}"
            )
        sections = experiment.dataset, experiment.augment, experiment.clips_seed
        self.data: ClipDataset = build_dataset(*sections, path, training=False, say=self._say)
        model = build_model(experiment)
        self.bf16 = uses_bf16(experiment, model.device)
        self.loaded: Loaded | None = None
        base = _Contender(BASE, LABELS[BASE], 0, model)
        self.contenders = [base]
        if source != "base":
            source = str(RunFolder(Path(source)).checkpoint or source)
            self.loaded = load_checkpoint(model, experiment, Path(source))
            label = Path(source).name
            if self.loaded.step is not None:
                label += f", step {self.loaded.step}"
            self.contenders = [_Contender(TRAINED, label, self.loaded.step or 0, model)]
            if with_base:
                # Random weights come from the experiment's seed: these are the same again.
                self.contenders.append(_Contender(BASE, base.label, 0, build_model(experiment)))
        self.runlog = RunLog(
            experiment.tracking,
            self.folder,
            run_id=run_id,
            name=name,
            settings=experiment.model_dump(mode="json") | {"split": split, "checkpoint": source},
            log_every=1,
            num_steps=0,
            console=console,
            job_type="evaluate",
        )

    def evaluate(self, save_masks: Path | None = None) -> list[Scores]:
        """Score the checkpoint and its baselines. Returns the checkpoint's scores first.

        Args:
            save_masks: a new folder for its masks, as palette PNGs.
        """
        masks = save_masks and MaskFolder(save_masks)
        drawer = OverlayDrawer(
            self.data,
            self.folder.overlays,
            self.split,
            self.experiment.evaluation.num_overlays,
        )

        def see(index: int, seen: SeenFrame) -> None:
            if masks:
                masks.write(seen)
            drawer.see_frame(index, seen)

        with self._record() as summary:
            rows = []
            with self._progress(len(self.contenders) + 1) as advance:
                for place, contender in enumerate(self.contenders):
                    track = partial(track_video, contender.model, bf16=self.bf16)
                    seen_by = {"on_frame": see, "on_video": drawer.see_video} if place == 0 else {}
                    rows.append(self._score(contender, track, advance, **seen_by))
                copied = _Contender(COPY, LABELS[COPY], 0, self.contenders[0].model)
                rows.append(self._score(copied, copy_first_mask, advance))
            self._write(rows)
            self._summarise(rows, summary)
            self.runlog.overlays(rows[0].step, drawer.overlays)
            self._show(rows)
        if masks:
            self._say(f"  {save_masks!s:<48} masks as palette PNGs")
        return rows

    def prompt_matrix(self) -> list[dict[str, Any]]:
        """Score every prompt at every strength of noise. Returns the rows of prompt_matrix.csv."""
        cells, rows, objects = all_cells(), [], []
        with self._record() as summary:
            with self._progress(len(cells) * len(self.contenders)) as advance:
                for contender in self.contenders:
                    track = partial(track_video, contender.model, bf16=self.bf16)
                    clean: dict[str, Scores] = {}
                    for cell in cells:
                        draw = CellPrompts(contender.model, cell, bf16=self.bf16)
                        scores = self._score(contender, track, advance, draw_prompts=draw)
                        clean.setdefault(cell.name, scores)
                        rows.append(self._matrix_row(cell, contender, scores, clean[cell.name]))
                        objects += [
                            {**row, "clicks": cell.clicks, "noise": cell.noise}
                            for row in scores.objects
                        ]
            write_rows(self.folder.matrix, rows, MATRIX_COLUMNS)
            columns = (*SCORE_COLUMNS, "clicks", "noise")
            write_rows(self.folder.matrix_objects, objects, columns)
            figure = self.folder.matrix_figure
            with replacing(figure) as unfinished:
                self._matrix_figure(rows).savefig(unfinished, format="png", dpi=150)
            self.runlog.report(self.contenders[0].step, {"prompt_matrix": rows}, [figure])
            first = {c.key: c.label for c in self.contenders}
            for key, label in first.items():
                part = [row for row in rows if row["model"] == key]
                self.console.print(matrix_table(label, part))
                for row in part:
                    kind = Cell(row["prompt"], row["clicks"], row["noise"]).name.replace(" ", "_")
                    name = f"matrix/{key}/{kind}/noise_{row['noise']}/J_and_F"
                    summary[name] = row["J_and_F"]
        self._say(
            "noise: how far a click, a corner or a mask's box is moved at most, as a share of the "
            "object's box; in brackets: change from clean, 95 % interval over videos"
        )
        self._places("matrix", "matrix_objects", "matrix_figure")
        return rows

    # -- parts ----------------------------------------------------------------------------------

    def _score(
        self, contender: _Contender, track: Any, advance: Callable[..., None], **options: Any
    ) -> Scores:
        on_video = options.pop("on_video", None)

        def done(index: int, tracked: TrackedVideo) -> None:
            if on_video is not None:
                on_video(index, tracked)
            advance(contender.label)

        return score(
            track,
            self.data,
            self.experiment.evaluation,
            split=self.split,
            model=contender.key,
            step=contender.step,
            label=contender.label,
            seed=self.experiment.prompts_seed,
            on_video=done,
            **options,
        )

    @contextmanager
    def _record(self) -> Iterator[dict[str, Any]]:
        """Open the runlog around a command; what is put into the dict ends in summary.json."""
        config = self.experiment.model
        warning = shared_split_warning(self.experiment.dataset)
        warnings = [warning] if warning else []
        warnings += self.loaded.notes if self.loaded else ()
        with self.runlog as runlog:
            # Not config.yaml: that is what makes a folder a run, to be resumed and compared.
            write_text(self.folder.evaluation, to_yaml(self.experiment))
            environment = describe_environment(self.contenders[0].model.device)
            write_text(self.folder.environment, json.dumps(environment, indent=2) + "\n")
            for text in warnings:
                runlog.say(f"warning: {text}")
            summary: dict[str, Any] = {
                "split": self.split,
                "frame_policy": self.experiment.evaluation.frame_policy,
                "prompt_types": list(
                    self.experiment.evaluation.prompt_types or self.experiment.dataset.prompt_types
                ),
                "seed": self.experiment.trainer.seed,
                "evaluation_seed": self.experiment.prompts_seed,
                "num_videos": len(self.data.videos[: self.experiment.evaluation.max_videos]),
                "base": {"path": config.checkpoint_path, "sha256": base_hash(self.experiment)},
                "checkpoint": self.loaded
                and {key: getattr(self.loaded, key) for key in ("path", "sha256", "step")},
                "warnings": warnings,
                "status": "running",
            }
            runlog.summary(summary)
            try:
                yield summary
            except BaseException:
                runlog.summary({"status": "failed", "seconds": runlog.seconds})
                raise
            runlog.summary(summary | {"status": "finished", "seconds": runlog.seconds})

    @contextmanager
    def _progress(self, passes: int) -> Iterator[Callable[..., None]]:
        """A bar over the videos of all passes; the function it gives counts one video."""
        videos = len(self.data.videos[: self.experiment.evaluation.max_videos])
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None))
        columns += (MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            task = progress.add_task("", total=passes * videos)
            yield lambda label: progress.update(task, advance=1, description=label)

    def _write(self, rows: Sequence[Scores]) -> None:
        objects, horizon, frames = (
            [row for scores in rows for row in getattr(scores, name)]
            for name in ("objects", "horizon", "frames")
        )
        write_rows(self.folder.scores, objects, SCORE_COLUMNS)
        write_rows(self.folder.horizon, horizon, HORIZON_COLUMNS)
        write_rows(self.folder.frames, frames, FRAME_COLUMNS)
        figure = self.folder.horizon_figure
        drawn = horizon_figure(
            {scores.label: scores.horizon for scores in rows},
            {scores.label: scores.frames for scores in rows},
            title=f"{self.split} videos",
        )
        with replacing(figure) as unfinished:
            drawn.savefig(unfinished, format="png", dpi=120)
        self.runlog.report(rows[0].step, {"scores": objects, "horizon": horizon}, [figure])

    def _summarise(self, rows: Sequence[Scores], summary: dict[str, Any]) -> None:
        main = rows[0]
        values = {f"{self.split}/{name}": value for name, value in main.means.items()}
        self.runlog.record(main.step, values | numbers(main.horizon))
        summary |= values | numbers(main.horizon)
        for scores in rows[1:]:
            key, apart = scores.model, difference(scores, main)
            summary |= {
                **{f"{self.split}/{key}/{name}": scores.means[name] for name in _MEANS},
                **{f"{key}/{name}": value for name, value in numbers(scores.horizon).items()},
                f"{self.split}/gain_over_{key}": {
                    "value": apart.value if apart.known else None,
                    "low": apart.low,
                    "high": apart.high,
                    "num_videos": apart.num,
                },
            }

    def _show(self, rows: Sequence[Scores]) -> None:
        policy = self.experiment.evaluation.frame_policy
        main = rows[0].means
        title = (
            f"{self.split} videos, {main['num_objects']} objects, frames: {policy}, prompts: "
            + ", ".join(sorted({str(row["prompt"]) for row in rows[0].objects}))
        )
        self.console.print(scores_table(title, rows))
        self.console.print(horizon_table(rows))
        if num := main["num_not_scored"]:
            self._say(f"{num} objects have no frame to score under {policy!r}")
        self._places("scores", "horizon", "frames", "horizon_figure", "overlays")

    def _places(self, *names: str) -> None:
        self._say(f"\nwrote {self.folder.path}/")
        for line in self.folder.contents(*names, "summary"):
            self._say(line)
        if self.runlog.wandb.how_to_sync:
            self._say(f"upload it: {self.runlog.wandb.how_to_sync}")

    def _matrix_row(
        self, cell: Cell, contender: _Contender, scores: Scores, clean: Scores
    ) -> dict[str, Any]:
        row = {"step": contender.step, "split": self.split, "model": contender.key}
        row |= {"prompt": cell.prompt, "clicks": cell.clicks, "noise": cell.noise}
        row |= scores.means | {"frame_policy": self.experiment.evaluation.frame_policy}
        apart = None if scores is clean else difference(clean, scores)
        told = apart is not None and apart.known  # no difference without its interval
        changes = (apart.value, apart.low, apart.high) if told else (None, None, None)
        return row | dict(zip(("change", "change_low", "change_high"), changes, strict=True))

    def _matrix_figure(self, rows: Sequence[dict[str, Any]]) -> Any:
        names = list(dict.fromkeys(cell.name for cell in all_cells()))
        panels = {}
        for contender in self.contenders:
            values = [row["J_and_F"] for row in rows if row["model"] == contender.key]
            panels[contender.label] = [
                values[start : start + len(NOISE)] for start in range(0, len(values), len(NOISE))
            ]
        columns = [f"{noise:g}" if noise else "clean" for noise in NOISE]
        return matrix_figure(names, columns, panels, title=f"J&F on the {self.split} videos")

    def _say(self, text: str) -> None:
        say(self.console, text)


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


def run_benchmark(
    experiment: Experiment,
    source: str,
    *,
    matrix: bool,
    split: SplitName,
    run_dir: Path | None,
    name: str,
    run_id: str,
    with_base: bool,
    save_masks: Path | None,
    console: Console,
) -> None:
    """One command; the folder is runs/<name>/evaluations/<run id> unless it is named."""
    kind = "prompt-matrix" if matrix else "evaluate"
    run_dir = run_dir or RunFolder.of_evaluations(name) / f"{run_id}-{kind}-{split}"
    benchmark = Benchmark(
        experiment,
        source,
        split,
        run_dir,
        run_id=run_id,
        name=f"{name}-{kind}",
        console=console,
        with_base=with_base,
    )
    if matrix:
        benchmark.prompt_matrix()
    else:
        benchmark.evaluate(save_masks)
