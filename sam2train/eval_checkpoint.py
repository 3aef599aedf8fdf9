"""A checkpoint beside its baselines on whole videos: `--evaluate`, and a run's test scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from sam2train import distributed
from sam2train.checkpoint import Loaded, load_checkpoint
from sam2train.config import to_yaml
from sam2train.data_clips import ClipDataset
from sam2train.data_report import shared_split_warning
from sam2train.datasets import build_dataset
from sam2train.errors import UserError
from sam2train.evaluate import (
    SeenFrame,
    Track,
    TrackedVideo,
    copy_first_mask,
    track_video,
)
from sam2train.experiment import Experiment, base_hash, build_model, uses_bf16
from sam2train.files import replacing, write_rows, write_text
from sam2train.machine import cell, count_bar, say
from sam2train.metrics import BASE, COPY, TRAINED
from sam2train.model import SAM2Model
from sam2train.run_folder import RunFolder
from sam2train.runlog import RunLog
from sam2train.score_pictures import OverlayDrawer, horizon_figure
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
from sam2train.video_files import MaskFolder

SplitName = Literal["val", "test"]
MEANS = ("J", "F", "J_and_F", "J_recall", "J_decay", "F_recall", "F_decay", "mIoU")


@dataclass(frozen=True)
class Contender:
    """What is scored: a model, or the copy of the first mask."""

    key: str  # TRAINED, BASE or COPY, in the column `model` of the files
    label: str  # in tables
    step: int
    track: Track
    # Where two contenders share one model: the trained parameters that it gets for this one.
    model: SAM2Model | None = None
    weights: Mapping[str, torch.Tensor] | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Its weights in the model while the block runs."""
        if self.weights is None:
            yield
            return
        parameters = self.model.trainable_parameters()
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            self.model.sam2.load_state_dict({n: self.weights[n] for n in kept}, strict=False)
            yield
        finally:
            self.model.sam2.load_state_dict(kept, strict=False)


COPIED = Contender(COPY, LABELS[COPY], 0, copy_first_mask)


def score_contender(
    contender: Contender,
    data: ClipDataset,
    experiment: Experiment,
    split: str,
    **options: Any,
) -> Scores:
    """The scores of one contender on a data set; `options` are those of `scores.score`."""
    with contender.in_place():
        return score(
            contender.track,
            data,
            experiment.evaluation,
            split=split,
            model=contender.key,
            step=contender.step,
            label=contender.label,
            seed=experiment.prompts_seed,
            **options,
        )


def score_beside(
    contenders: Sequence[Contender],
    data: ClipDataset,
    experiment: Experiment,
    split: str,
    watch: Callable[[Contender], dict[str, Any]],
) -> list[Scores]:
    """The scores of models, and beside them of the copied first mask, all on the same prompts.

    Args:
        watch: gives `on_frame` and `on_video` of `scores.score` for a contender.
    """
    return [
        score_contender(contender, data, experiment, split, **watch(contender))
        for contender in (*contenders, COPIED)
    ]


class Evaluation:
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
        if (
            distributed.is_main()
            and run_dir.exists()
            and (not run_dir.is_dir() or any(run_dir.iterdir()))
        ):
            raise UserError(f"--run-dir {run_dir}: there is something already; name a new folder")
        path = getattr(experiment.dataset, f"{split}_path")
        if path is None:
            raise UserError(
                f"dataset.{split}_path is null; name the videos to score, or take --split "
                f"{'test' if split == 'val' else 'val'}"
            )
        sections = experiment.dataset, experiment.augment, experiment.clips_seed
        self.data: ClipDataset = build_dataset(*sections, path, training=False, say=self._say)
        model = build_model(experiment, self._say)
        self.bf16 = uses_bf16(experiment, model.device)
        self.loaded: Loaded | None = None
        self.contenders = [self._contender(BASE, LABELS[BASE], 0, model)]
        if source != "base":
            source = str(RunFolder(Path(source)).checkpoint or source)
            self.loaded = load_checkpoint(model, experiment, Path(source))
            label = Path(source).name
            if self.loaded.step is not None:
                label += f", step {self.loaded.step}"
            self.contenders = [self._contender(TRAINED, label, self.loaded.step or 0, model)]
            if with_base:
                # Random weights come from the experiment's seed: these are the same again.
                base = build_model(experiment, self._say)
                self.contenders.append(self._contender(BASE, LABELS[BASE], 0, base))
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
        masks = save_masks and distributed.from_main(partial(MaskFolder, save_masks))
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

        with self.record() as summary:
            with self.progress(len(self.contenders) + 1) as advance:

                def watch(contender: Contender) -> dict[str, Any]:
                    if contender is not self.contenders[0]:
                        return {"on_video": lambda index, tracked: advance(contender.label)}

                    def see_video(index: int, tracked: TrackedVideo) -> None:
                        drawer.see_video(index, tracked)
                        advance(contender.label)

                    own = len(self.data.videos) if masks else drawer.most
                    return {"on_frame": see, "on_video": see_video, "num_of_main": own}

                rows = score_beside(self.contenders, self.data, self.experiment, self.split, watch)
            if distributed.is_main():
                self._write(rows)
                self._summarise(rows, summary)
                self.runlog.overlays(rows[0].step, drawer.overlays)
                self._show(rows)
        if masks:
            self._say(f"  {save_masks!s:<48} masks as palette PNGs")
        return rows

    # -- parts ----------------------------------------------------------------------------------

    def _contender(self, key: str, label: str, step: int, model: SAM2Model) -> Contender:
        return Contender(key, label, step, partial(track_video, model, bf16=self.bf16), model)

    @contextmanager
    def record(self) -> Iterator[dict[str, Any]]:
        """Open the runlog around a command; what is put into the dict ends in summary.json."""
        config = self.experiment.model
        warning = shared_split_warning(self.experiment.dataset)
        warnings = [warning] if warning else []
        warnings += self.loaded.notes if self.loaded else ()
        with self.runlog as runlog:
            # Not config.yaml: a folder with that file is a run, which can be resumed and compared.
            if distributed.is_main():
                write_text(self.folder.evaluation, to_yaml(self.experiment))
            runlog.environment(self.contenders[0].model.device)
            for text in warnings:
                runlog.say(f"warning: {text}")
            summary: dict[str, Any] = {
                "split": self.split,
                "frame_policy": self.experiment.evaluation.frame_policy,
                "void": self.experiment.evaluation.void,
                "prompt_types": list(
                    self.experiment.evaluation.prompt_types or self.experiment.dataset.prompt_types
                ),
                "seed": self.experiment.trainer.seed,
                "evaluation_seed": self.experiment.prompts_seed,
                "data": {self.split: self.data.fingerprint},
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
    def progress(self, passes: int) -> Iterator[Callable[..., None]]:
        """A bar over the videos of all passes; the function it gives counts one video."""
        videos = len(self.data.videos[: self.experiment.evaluation.max_videos])
        videos = -(-videos // distributed.num_processes())  # this process sees its own only
        with count_bar(self.console) as progress:
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
                **{f"{self.split}/{key}/{name}": scores.means[name] for name in MEANS},
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
        self.places("scores", "horizon", "frames", "horizon_figure", "overlays")

    def places(self, *names: str) -> None:
        """Say where these files of the folder are, and how to upload them."""
        self._say(f"\nwrote {self.folder.path}/")
        for line in self.folder.contents(*names, "summary"):
            self._say(line)
        if self.runlog.wandb.how_to_sync:
            self._say(f"upload it: {self.runlog.wandb.how_to_sync}")

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
