"""A model's scores beside those of its baselines: the untouched base, and the first mask copied.

Those of a run are of the validation videos at its steps, and of the test videos at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sam2train import checkpoint, distributed
from sam2train.data_clips import ClipDataset
from sam2train.evaluate import OnFrame, SeenFrame, Track, copy_first_mask, track_video
from sam2train.experiment import Experiment
from sam2train.machine import StopRequests
from sam2train.metrics import BASE, COPY, TRAINED
from sam2train.model import SAM2Model
from sam2train.run_folder import RunFolder
from sam2train.runlog import RunLog
from sam2train.score_pictures import OverlayDrawer
from sam2train.scores import (
    HORIZON_COLUMNS,
    LABELS,
    SCORE_COLUMNS,
    RowsFile,
    Scores,
    numbers,
    read_scores,
    score,
    scores_table,
)


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


def weak_base(experiment: Experiment, base: Scores, copied: Scores) -> str | None:
    """What it means that the untouched base does not beat the copied first mask, and what to do;
    None where it does, or where the base has random weights."""
    values = base.means["J_and_F"], copied.means["J_and_F"]
    if experiment.model.checkpoint_path is None or values[0] > values[1]:
        return None
    return (
        f"the untouched base (J&F {values[0]:.3f}) does not beat the copied first mask "
        f"({values[1]:.3f}) on these videos: it loses the objects, or they hardly move, so look at "
        "its pictures before training, and where it loses them try box or mask prompts "
        "(evaluation.prompt_types), a larger image (model.image_size with dataset.image_size) or "
        "larger weights of Meta's (model.checkpoint_path with model.config_path)"
    )


class TrainerScores:
    """Which step was scored last, which one is the best, and the rows of all of them on disk.

    Args:
        stop: where a signal asks the run to stop, scoring ends between two frames.
        base_weights: the trained parameters before training, which the test videos are scored with
            beside the best checkpoint.
        before: the content of the checkpoint that the run goes on from; None for a new run.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        model: SAM2Model,
        runlog: RunLog,
        stop: StopRequests,
        *,
        bf16: bool,
        base_weights: Mapping[str, torch.Tensor],
        before: Mapping[str, Any] | None,
    ):
        self.experiment, self.folder, self.model = experiment, folder, model
        self.runlog, self.stop, self.bf16 = runlog, stop, bf16
        self.base_weights = base_weights
        self.scored: int | None = None  # the last step that was scored on the validation videos
        self.best = -math.inf
        self.baseline: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        if before is not None:
            self.best, self.baseline = before["best"], before["baseline"]
            self.latest = before["scores"]
            # Checkpoints from before this key were written after their step was scored, if it was
            # due.
            self.scored = before.get("scored", before["step"])
        self.score_rows = RowsFile(folder.scores, SCORE_COLUMNS, self.scored, say=runlog.say)
        self.horizon_rows = RowsFile(folder.horizon, HORIZON_COLUMNS, self.scored, say=runlog.say)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "best": self.best,
            "scores": self.latest,
            "baseline": self.baseline,
            "scored": self.scored,
        }

    def summary(self) -> dict[str, float]:
        """What `summary.json` says of the validation videos at the end of the run."""
        values = {f"val/{name}": self.latest[name] for name in ("J", "F", "J_and_F") if self.latest}
        if self.baseline:
            values["baseline/J_and_F"] = self.baseline["J_and_F"]
            values["best/J_and_F"] = self.best
        return values

    def validate(self, step: int, data: ClipDataset, save_best: Callable[[], None]) -> None:
        """Score the validation videos, the first time the copied mask too.

        Args:
            step: steps done.
            save_best: called where the score is the highest so far.
        """
        drawer = OverlayDrawer(
            data,
            self.folder.overlays,
            f"step_{step:06d}",
            self.experiment.evaluation.num_overlays,
        )
        scores = score_contender(
            self._contender(TRAINED, step),
            data,
            self.experiment,
            "val",
            on_frame=self._heed_signal(drawer.see_frame),
            on_video=drawer.see_video,
            num_of_main=drawer.most,
        )
        # Before anything is written: a signal in here leaves the step without a score.
        copied = None
        if not self.baseline:
            heed = self._heed_signal()
            copied = score_contender(COPIED, data, self.experiment, "val", on_frame=heed)
        for found in filter(None, (scores, copied)):
            self._keep(found)
        self.latest, self.scored = scores.means, step
        values = {f"val/{name}": value for name, value in self.latest.items()}
        self.runlog.record(step, values | numbers(scores.horizon))
        self.runlog.summary(numbers(scores.horizon))
        self.runlog.overlays(step, drawer.overlays)
        if copied:
            self.baseline = self.latest
            self.runlog.summary({f"{COPY}/J_and_F": copied.means["J_and_F"]})
            self.show("validation", 0, (COPY, 0))
            if step == 0 and (text := weak_base(self.experiment, scores, copied)):
                self.runlog.say(text)
        score = self.latest["J_and_F"]
        if score > self.best:
            self.best = score
            save_best()
        if step:
            self.runlog.say(
                f"step {step}: J&F {score:.3f} on the validation videos "
                f"(step 0: {self.baseline['J_and_F']:.3f}, best: {self.best:.3f})"
            )

    def report_on_test(self, path: Path, data: ClipDataset) -> None:
        """Score the checkpoint at `path`, and what it is compared with, on the test videos."""
        # A run that goes on after its end reports again.
        for file in (self.score_rows, self.horizon_rows):
            file.rows = [row for row in file.rows if row["split"] != "test"]
        content = distributed.from_main(partial(checkpoint.load, path))
        step = content["step"]
        contenders = [
            self._contender(TRAINED, step, content["model"]),
            self._contender(BASE, 0, self.base_weights),
        ]
        scores, base, copied = map(
            self._keep,
            score_beside(
                contenders,
                data,
                self.experiment,
                "test",
                lambda contender: {"on_frame": self._heed_signal()},
            ),
        )
        values = scores.means | numbers(scores.horizon)
        values = {f"test/{name}": value for name, value in values.items()}
        self.runlog.summary(
            {
                **values,
                "test/step": step,
                f"test/{BASE}/J_and_F": base.means["J_and_F"],
                f"test/{COPY}/J_and_F": copied.means["J_and_F"],
            }
        )
        self.show("test", step, (BASE, 0), (COPY, 0))

    def show(self, split: str, step: int, *beside: tuple[str, int]) -> None:
        """Print the scores of a step, and of others as (model, step), with the differences."""
        if not distributed.is_main():
            return
        key = {"validation": "val"}.get(split, split)
        kept = {(row["split"], row["model"], int(row["step"])) for row in self.score_rows.rows}
        rows = [
            read_scores(
                self.score_rows.rows,
                key,
                model,
                step,
                LABELS.get(model, f"step {step}"),
                self.horizon_rows.rows,
            )
            for model, step in ((TRAINED, step), *beside)
            if (key, model, step) in kept  # a file that was deleted lacks the earlier steps
        ]
        policy = self.experiment.evaluation.frame_policy
        self.runlog.console.print(scores_table(f"{split} videos, frames: {policy}", rows))

    def _contender(
        self, key: str, step: int, weights: Mapping[str, torch.Tensor] | None = None
    ) -> Contender:
        admission = self.experiment.evaluation.memory_admission
        track = partial(track_video, self.model, bf16=self.bf16, admission=admission)
        label = LABELS.get(key, f"step {step}")
        return Contender(key, label, step, track, self.model, weights)

    def _keep(self, scores: Scores) -> Scores:
        """Write the rows, the curves of models only: the copy has no memory."""
        self.score_rows.add(scores.objects)
        if scores.model != COPY:
            self.horizon_rows.add(scores.horizon)
        return scores

    def _heed_signal(self, on_frame: OnFrame | None = None) -> OnFrame:
        """Sees frames for `on_frame`, and raises Interrupted between two of them where a signal
        asks for it; all is saved by now."""

        def heed(index: int, seen: SeenFrame) -> None:
            if self.stop.received is not None:  # see `scores.score` for the other processes
                raise self.stop.interrupted()
            if on_frame is not None:
                on_frame(index, seen)

        return heed
