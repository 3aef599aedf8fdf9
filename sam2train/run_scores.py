"""A model's scores beside those of its baselines: the untouched base, and the first mask copied.

Those of a run are of the validation videos at its steps, and of the test videos at its end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sam2train import checkpoint, distributed
from sam2train.data_clips import ClipDataset
from sam2train.evaluate import (
    OnFrame,
    SeenFrame,
    Track,
    TrackedVideo,
    copy_first_mask,
    track_video,
)
from sam2train.experiment import Experiment
from sam2train.features import identify
from sam2train.files import REPOSITORY, write_text
from sam2train.machine import StopRequests
from sam2train.metrics import BASE, COPY, TRAINED
from sam2train.model import SAM2Model
from sam2train.overlays import OverlayDrawer
from sam2train.pretrained import resolve_config
from sam2train.run_folder import BASE_SCORES, RunFolder
from sam2train.runlog import RunLog
from sam2train.scores import (
    HORIZON_COLUMNS,
    LABELS,
    SCORE_COLUMNS,
    RowsFile,
    Scores,
    difference,
    numbers,
    read_scores,
    score,
    scores_table,
)
from sam2train.sharding import copy_into, whole_weights


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
        if self.model is None:
            yield
            return
        with whole_weights(self.model):
            if self.weights is None:
                yield
                return
            parameters = self.model.trainable_parameters()
            kept = {name: p.detach().clone() for name, p in parameters.items()}
            try:
                copy_into(parameters, self.weights)
                yield
            finally:
                copy_into(parameters, kept)


def first_mask_copied(experiment: Experiment) -> Contender:
    """The baseline without a model."""
    track = partial(copy_first_mask, overlap=experiment.evaluation.overlap)
    return Contender(COPY, LABELS[COPY], 0, track)


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
        for contender in (*contenders, first_mask_copied(experiment))
    ]


class KeptScores:
    """Scores that trials of a sweep have in common, in a folder that they share: those of step 0,
    of the untouched base and of the copied mask, with the pictures.

    An entry is a folder that is named by a hash of all that its values depend on, and appears whole
    or not at all; without it, or where it cannot be read, the videos are scored.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def name_of(
        self,
        contender: Contender,
        data: ClipDataset,
        experiment: Experiment,
        split: str,
        bf16: bool,
    ) -> str:
        """32 hex digits, from the code, the weights, the data and the settings."""
        model, facts = contender.model, {}
        dataset = experiment.dataset.model_dump(mode="json", exclude=_OF_TRAINING)
        if model is not None:
            weights = [model.sam2]
            built = resolve_config(model.config_path).read_bytes()
            with contender.in_place():
                facts["weights"] = identify(weights, built, model.device)
            facts["memory"] = model.num_maskmem, model.max_obj_ptrs_in_encoder
            facts["rounding"] = bf16, model.caches_features, model.trains_decoder_convolutions
        facts |= {
            "code": _code_hash(),
            "contender": (contender.key, contender.step, split),
            "data": data.fingerprint,
            "dataset": dataset,
            # of the objects that are made up for frames without annotations
            "clips": experiment.clips_seed if experiment.dataset.dataset_type == "video" else None,
            "evaluation": experiment.evaluation.model_dump(mode="json"),
            "prompts": experiment.prompts_seed,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def read(self, name: str, drawer: OverlayDrawer | None, data: ClipDataset) -> Scores | None:
        """The scores of an entry; its pictures are put where the drawer draws them."""
        place = self.folder / name
        try:
            content = json.loads((place / "scores.json").read_text())
            if drawer is not None:
                drawer.restore(place, data.videos)
            return Scores(**content)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, name: str, scores: Scores, drawer: OverlayDrawer | None) -> None:
        """Keep scores; where they cannot be written, they are computed again."""
        unfinished = self.folder / f".{name}-{secrets.token_hex(4)}"
        try:
            unfinished.mkdir(parents=True)
            if drawer is not None:
                drawer.keep(unfinished)
            text = json.dumps(asdict(scores), default=lambda number: number.item())
            write_text(unfinished / "scores.json", text)
            unfinished.rename(self.folder / name)
        except OSError:  # another trial was faster, or the disk is full
            shutil.rmtree(unfinished, ignore_errors=True)


# Settings of the data that change nothing of what is scored; the fingerprint stands for the paths.
_OF_TRAINING = {
    *("data_path", "val_path", "test_path", "batch_size", "num_workers", "shuffle", "seed"),
    *("video_clip_length", "max_frame_stride", "max_objects", "max_conditioning_frames"),
    *("prompt_weights", "box_jitter", "mask_cache_mb", "on_bad_sample", "max_bad_fraction"),
}


@cache
def _code_hash() -> str:
    """Tells this version of the code from others."""
    digest = hashlib.sha256(version("sam2").encode())
    for path in sorted((REPOSITORY / "sam2train").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


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
        shared = os.environ.get(BASE_SCORES)  # of several processes, each would decide for itself
        single = distributed.num_processes() == 1
        self.kept = KeptScores(Path(shared)) if shared and single else None
        self.scored: int | None = None  # the last step that was scored on the validation videos
        self.best = -math.inf
        self.best_step: int | None = None  # checkpoints from before this key do not tell it
        self.baseline: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        if before is not None:
            self.best, self.baseline = before["best"], before["baseline"]
            self.latest = before["scores"]
            # Checkpoints from before this key were written after their step was scored, if it was
            # due.
            self.scored = before.get("scored", before["step"])
            self.best_step = before.get("best_step")
        self.first_drawer: OverlayDrawer | None = None  # of step 0, if this process has drawn it
        self.tested: tuple[Scores, Scores, int] | None = None  # base, checkpoint, its step
        self.score_rows = RowsFile(folder.scores, SCORE_COLUMNS, self.scored, say=runlog.say)
        self.horizon_rows = RowsFile(folder.horizon, HORIZON_COLUMNS, self.scored, say=runlog.say)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "best": self.best,
            "best_step": self.best_step,
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
        drawn = len(self.first_drawer.overlays) if self.first_drawer else 0
        scores = self._score(self._contender(TRAINED, step), data, "val", drawer)
        # Before anything is written: a signal in here leaves the step without a score.
        copied = None
        if not self.baseline:
            copied = self._score(first_mask_copied(self.experiment), data, "val")
        for found in filter(None, (scores, copied)):
            self._keep(found)
        self.latest, self.scored = scores.means, step
        values = {f"val/{name}": value for name, value in self.latest.items()}
        self.runlog.record(step, values | numbers(scores.horizon))
        self.runlog.summary(numbers(scores.horizon))
        if self.first_drawer is not None:  # the videos that changed most, as they were
            self.runlog.overlays(0, self.first_drawer.overlays[drawn:])
        elif step == 0:
            self.first_drawer = drawer
        self.runlog.overlays(step, drawer.overlays)
        if copied:
            self.baseline = self.latest
            self.runlog.summary({f"{COPY}/J_and_F": copied.means["J_and_F"]})
            self.show("validation", 0, (COPY, 0))
            if step == 0 and (text := weak_base(self.experiment, scores, copied)):
                self.runlog.say(text)
        score = self.latest["J_and_F"]
        if score > self.best:
            self.best, self.best_step = score, step
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
            first_mask_copied(self.experiment),
        ]
        scores, base, copied = [
            self._keep(self._score(contender, data, "test")) for contender in contenders
        ]
        self.tested = base, scores, step
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
        found = (self._scores_of(key, *one) for one in ((TRAINED, step), *beside))
        rows = [scores for scores in found if scores]
        policy = self.experiment.evaluation.frame_policy
        self.runlog.console.print(scores_table(f"{split} videos, frames: {policy}", rows))

    def send_tables(self, step: int) -> None:
        """Send W&B all rows of scores and curves, and what they come to."""
        tables = {"scores": self.score_rows.rows, "horizon": self.horizon_rows.rows}
        self.runlog.report(step, tables, [])
        self.runlog.summary({"conclusion": self.conclusion(step)})

    def conclusion(self, last_step: int) -> list[str]:
        """What a run came to, a line each: the gain on each split with its interval over videos,
        and which step the best checkpoint is."""
        if not distributed.is_main():
            return []

        def gain(before: Scores, after: Scores) -> str:
            values = f"{before.means['J_and_F']:.3f} -> {after.means['J_and_F']:.3f}"
            return f"J&F {values} ({difference(before, after).verdict()})"

        lines, best = [], self.best_step
        steps = 0, best or 0, last_step
        first, chosen, last = (self._scores_of("val", TRAINED, step) for step in steps)
        if best and first and chosen:
            lines.append(f"val {gain(first, chosen)}")
        if self.tested and self.tested[2]:
            lines.append(f"test {gain(*self.tested[:2])}")
        if best:
            lines.append(f"best.pt is step {best}, the highest val J&F")
        elif best == 0:
            lines.append("nothing gained: best.pt is the untouched base")
            if first and last and last_step:
                lines[-1] += f"; val {gain(first, last)} at step {last_step}"
        return lines

    def num_videos(self, data: ClipDataset | None) -> int:
        """How many are scored in this process, which sees its own only."""
        number = len(data.videos[: self.experiment.evaluation.max_videos]) if data else 0
        return -(-number // distributed.num_processes())

    def _scores_of(self, split: str, model: str, step: int) -> Scores | None:
        """Scores from the rows; None where they lack it, as after a file was deleted."""
        kept = {(row["split"], row["model"], int(row["step"])) for row in self.score_rows.rows}
        if (split, model, step) not in kept:
            return None
        label = LABELS.get(model, f"step {step}")
        return read_scores(self.score_rows.rows, split, model, step, label, self.horizon_rows.rows)

    def _contender(
        self, key: str, step: int, weights: Mapping[str, torch.Tensor] | None = None
    ) -> Contender:
        track = partial(track_video, self.model, bf16=self.bf16, rules=self.experiment.evaluation)
        label = LABELS.get(key, f"step {step}")
        return Contender(key, label, step, track, self.model, weights)

    def _score(
        self,
        contender: Contender,
        data: ClipDataset,
        split: str,
        drawer: OverlayDrawer | None = None,
    ) -> Scores:
        """Its scores; what no training has changed, one trial of a sweep computes for all."""
        kept = self.kept if contender.step == 0 else None
        name = kept and kept.name_of(contender, data, self.experiment, split, self.bf16)
        found = kept and kept.read(name, drawer, data)
        if found:
            return found
        what, number = f"{split} videos, {contender.label}", self.num_videos(data)
        with self.runlog.counting(what, number, contender.key) as count:

            def see_video(index: int, tracked: TrackedVideo) -> None:
                if drawer is not None:
                    drawer.see_video(index, tracked)
                count()

            on_frame = self._heed_signal(drawer and drawer.see_frame)
            watch = {"on_frame": on_frame, "on_video": see_video}
            found = score_contender(contender, data, self.experiment, split, **watch)
            if drawer is not None:
                drawer.draw(self.first_drawer)
        if kept:
            kept.write(name, found, drawer)
        return found

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
