"""The loop: save, evaluate, stop, step, log; always in this order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sam2train import checkpoint
from sam2train.audit import (
    audit_gradients,
    has_tracked_frame,
    idle_modules,
    row_warnings,
    rows_left,
)
from sam2train.bad_batch import save_bad_batch
from sam2train.clips import BatchedVideoDatapoint
from sam2train.config import to_yaml
from sam2train.config_yaml import read_yaml
from sam2train.corrections import SimulatedUser
from sam2train.data_loader import load_batches
from sam2train.data_report import shared_video_warnings
from sam2train.datasets import build_dataset
from sam2train.errors import UserError
from sam2train.eval_checkpoint import COPIED, Contender, score_beside, score_contender
from sam2train.evaluate import OnFrame, SeenFrame, track_video
from sam2train.experiment import Experiment, as_begun, base_hash, build_model, uses_bf16
from sam2train.files import sweep_partials, write_text
from sam2train.losses import divide_losses, sum_losses
from sam2train.machine import Interrupted, StopRequests, say
from sam2train.metrics import BASE, COPY, TRAINED
from sam2train.optimizer import build_optimizer, set_learning_rates
from sam2train.run_folder import RunFolder
from sam2train.runlog import RunLog
from sam2train.scores import (
    HORIZON_COLUMNS,
    LABELS,
    SCORE_COLUMNS,
    RowsFile,
    Scores,
    numbers,
    read_scores,
    scores_table,
)
from sam2train.video_pictures import OverlayDrawer


def _load_to_resume(path: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """What a run goes on from, and the file that it is from; see `checkpoint.load_last`."""
    folder = RunFolder.of_checkpoint(path)
    if path == folder.last:
        return checkpoint.load_last(folder, say)
    return checkpoint.load(path), path


class Trainer:
    """Trains one experiment into one run folder.

    Args:
        experiment: all settings.
        run_dir: the folder that gets everything the run writes.
        run_id: names the run, in W&B too.
        name: the experiment's name.
        resume: a checkpoint of this run to go on from; None starts at step 0.

    Raises:
        UserError: data, weights or names that do not exist or do not fit.
    """

    def __init__(
        self,
        experiment: Experiment,
        run_dir: Path,
        *,
        run_id: str,
        name: str,
        resume: Path | None = None,
        console: Console | None = None,
    ):
        console = console or Console()
        warn = partial(say, console)
        content = None
        if resume is not None:
            content, resume = _load_to_resume(resume, warn)
            settings = read_yaml(content["config"], f"{resume}, its settings")
            experiment = as_begun(experiment, settings)
        self.experiment = experiment
        self.settings = to_yaml(experiment)
        self.config = experiment.trainer
        self.folder = RunFolder(run_dir)
        self.step = 0
        self.scored: int | None = None  # the last step that was scored on the validation videos
        self.best = -math.inf
        self.baseline: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.audit: dict[str, float] = {}  # until it is logged
        self.audited = False
        self.stop = StopRequests()
        data, val = experiment.dataset.data_path, experiment.dataset.val_path
        test = experiment.dataset.test_path
        sections = experiment.dataset, experiment.augment, experiment.clips_seed
        self.train_data = build_dataset(*sections, data, training=True, say=warn)
        self.val_data = val and build_dataset(*sections, val, training=False, say=warn)
        self.test_data = test and build_dataset(*sections, test, training=False, say=warn)
        splits = {"train": self.train_data, "val": self.val_data, "test": self.test_data}
        self.splits = {name: part for name, part in splits.items() if part}
        self.fingerprints = {name: part.fingerprint for name, part in self.splits.items()}
        # Checkpoints from before this key have none.
        before = content.get("data", {}) if content else {}
        self.changed_data = [n for n, value in before.items() if self.fingerprints.get(n) != value]
        self.model = build_model(experiment)
        torch.manual_seed(self.config.seed)  # of dropout and dropped paths
        self.device = self.model.device
        self.parameters = self.model.trainable_parameters()
        if not self.parameters and self.config.num_steps:
            raise UserError("model.trainable_modules: nothing is trained; name at least one module")
        self.optimizer = build_optimizer(self.parameters, experiment.optimizer, self.model.sam2)
        self.interaction: SimulatedUser | None = None
        if experiment.interaction.enabled:
            self.interaction = SimulatedUser(experiment.interaction, experiment.clips_seed)
        self.bf16 = uses_bf16(experiment, self.device)
        self.base_hash = base_hash(experiment)
        # What the test videos are scored with beside the best checkpoint.
        self.base_weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        # (steps done, last step scored) as `last.pt` has them
        self._saved: tuple[int, int | None] | None = None
        if content:
            run_id = self._restore(content, resume)
        self.run_id = run_id
        for place in (run_dir, self.folder.checkpoints, self.folder.overlays):
            sweep_partials(place)
        self.score_rows = RowsFile(self.folder.scores, SCORE_COLUMNS, self.scored, say=warn)
        self.horizon_rows = RowsFile(self.folder.horizon, HORIZON_COLUMNS, self.scored, say=warn)
        self.runlog = RunLog(
            experiment.tracking,
            self.folder,
            run_id=run_id,
            name=name,
            settings=experiment.model_dump(mode="json"),
            log_every=self.config.log_every,
            num_steps=self.config.num_steps,
            first_step=self.step,
            resume=content and content.get("window"),
            console=console,
        )

    # -- the loop -----------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Train to the last step. Returns the last validation scores, empty without `val_path`.

        Raises:
            Interrupted: a signal asked the run to stop; it has saved first.
            FloatingPointError: a loss or gradient that is not finite, with step and clips.
        """
        config, runlog = self.config, self.runlog
        with self.stop, runlog:
            self._write_run_files()
            runlog.parameters(self.model.parameter_report())
            for text in row_warnings(self.model, self.experiment):
                runlog.say(f"warning: {text}")
            warnings = shared_video_warnings(self.splits)
            if self.changed_data:
                warnings.append(
                    f"the {' and '.join(self.changed_data)} data changed since this run saved: its "
                    "scores before and after are not of the same data"
                )
            for warning in warnings:
                runlog.say(f"warning: {warning}")
            runlog.summary(
                {
                    "status": "running",
                    "steps": self.step,
                    "data": self.fingerprints,
                    "frame_policy": self.experiment.evaluation.frame_policy,
                    "void": self.experiment.evaluation.void,
                    "evaluation_seed": self.experiment.prompts_seed,
                    "warnings": warnings,
                }
            )
            try:
                self.model.train()
                batches = self.batches()
                while True:
                    last = self.step >= config.num_steps
                    scoring = self.val_data and self.step != self.scored
                    scoring = scoring and (last or self.step % config.val_every == 0)
                    # Before an evaluation, too: it may take long, and a signal ends it.
                    if last or scoring or self.step % config.save_every == 0:
                        self._save_last()
                    if scoring and self.stop.received is None:
                        self.evaluate()
                    if last or self.stop.received is not None:
                        self._save_last()
                    if self.stop.received is not None:
                        raise self.stop.interrupted()
                    if last:
                        break
                    scalars = self.train_step(batches)
                    self.step += 1
                    clips = self.experiment.dataset.batch_size * config.grad_accumulation
                    runlog.log(self.step, scalars, clips=clips)
                    if self.audit:
                        runlog.record(self.step, self.audit)
                        self.audit = {}
                if self.baseline and self.step:
                    self._show_scores("validation", self.step, (TRAINED, 0), (COPY, 0))
                self._report_on_test()
            except BaseException as error:
                status = "interrupted" if isinstance(error, Interrupted) else "failed"
                try:
                    self._summarise(status)
                except Exception as second:  # what ended the run is what must be told
                    error.add_note(f"and {self.folder.summary} could not be written: {second}")
                raise
            self._summarise("finished")
        return self.latest

    @property
    def num_clips(self) -> int:
        """Clips that the steps so far have used."""
        return self.step * self.config.grad_accumulation * self.experiment.dataset.batch_size

    def batches(self) -> Iterator[BatchedVideoDatapoint]:
        """The batches of the steps to come: without end, in an order that the seed gives."""
        return load_batches(
            self.train_data,
            self.experiment.dataset,
            self.experiment.clips_seed,
            start=self.num_clips,
            pin_memory=self.device.type == "cuda",
            say=self.runlog.say,
        )

    def _next_batches(
        self, batches: Iterator[BatchedVideoDatapoint]
    ) -> list[BatchedVideoDatapoint]:
        """The batches of one step; a signal ends the wait for them, once the run has saved."""
        try:
            with self.stop.while_waiting():
                return list(itertools.islice(batches, self.config.grad_accumulation))
        except Interrupted:
            self._save_last()
            raise

    def train_step(self, batches: Iterator[BatchedVideoDatapoint]) -> dict[str, torch.Tensor]:
        """One optimiser step. Returns detached scalars, still on the device."""
        config = self.config
        set_learning_rates(self.optimizer, self.step, config.num_steps, self.experiment.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        # All of them first, on the CPU: each loss is divided by the objects of the whole step.
        collected = self._next_batches(batches)
        before = self._rng_states(), self.audited
        num_objects = sum(batch.masks.shape[1] for batch in collected)
        sums: dict[str, torch.Tensor] = {}
        num_learning = 0
        for batch in collected:
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.model(batch, interaction=self.interaction)
            # Outside autocast, on float32 logits: dice sums up to 10^6 pixels of an object, and
            # bfloat16 carries 8 significant bits.
            of_batch = sum_losses(
                outputs["frames"],
                batch.masks,
                self.experiment.loss,
                batch.object_frame_valid,
                batch.object_ignore,
            )
            loss = divide_losses(of_batch, num_objects, self.experiment.loss)["loss"]
            if loss.requires_grad:  # else nothing that is trained was read
                loss.backward()
                num_learning += 1
            for name, value in of_batch.items():
                sums[name] = sums.get(name, 0) + value.detach()
        scalars = divide_losses(sums, num_objects, self.experiment.loss)
        scalars["audit/batches_with_gradient"] = torch.tensor(num_learning / len(collected))
        if self.interaction is not None:
            scalars |= self.interaction.take_scalars()
        tracked = any(map(has_tracked_frame, collected))
        if not self.audited:
            self._audit_gradients(tracked)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)

        # The one host sync of a healthy step, placed before a bad batch can reach the weights.
        if not torch.isfinite(scalars["loss"] + grad_norm):
            raise self._not_finite(collected, scalars, grad_norm, *before)
        self.optimizer.step()
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return {**scalars, "grad_norm": grad_norm, "lr": lr}

    def _not_finite(
        self,
        batches: list[BatchedVideoDatapoint],
        scalars: Mapping[str, torch.Tensor],
        grad_norm: torch.Tensor,
        rng: Mapping[str, Any],
        audited: bool,
    ) -> FloatingPointError:
        """What to raise after a step that is not finite; keeps its batches, and the state before
        it as the last checkpoint.

        Args:
            rng, audited: from before the step.
        """
        step, path = self.step + 1, self.folder.bad_batch(self.step + 1)
        names = [name for batch in batches for name in batch.names]
        text = (
            f"step {step}: loss {scalars['loss'].item():.3g} or gradient norm "
            f"{grad_norm.item():.3g} is not finite, on {'; '.join(names)}. "
        )
        try:
            losses = {n: v for n, v in scalars.items() if n.startswith("loss")}
            found = save_bad_batch(path, step, batches, losses, self.model.sam2)
            text += f"Bad first was {found}; {path} has the clips. "
            self.audited = audited
            if self._saved is None or self._saved[0] != self.step:
                self.save(self.folder.last, rng)
            text += f"{self.folder.last} is the state before this step. "
        except OSError as problem:  # the bad step is what must be told
            text += f"It could not be kept ({problem}). "
        return FloatingPointError(text + "Lower optimizer.learning_rate or look at these clips")

    def _audit_gradients(self, tracked: bool) -> None:
        """Keep what each trained module got at the first step; a listed one without any stops.

        Args:
            tracked: whether the step had a frame after a prompt.
        """
        dataset = self.experiment.dataset
        seen = (self.step + 1) * self.config.grad_accumulation * dataset.batch_size
        # Clips whose objects show on the last frame alone say nothing: later ones decide.
        waits = dataset.video_clip_length > 1 and seen < len(self.train_data)
        if waits and not tracked:
            return
        self.audited, self.audit = True, audit_gradients(self.model)
        idle = idle_modules(self.model, self.experiment)
        if self.config.audit == "stop" and not all(entry.may_come for entry in idle):
            text = ". ".join(entry.text for entry in idle if not entry.may_come)
            raise UserError(f"model.trainable_modules: {text}. trainer.audit=warn goes on without")
        for entry in idle:
            self.runlog.say(f"warning: model.trainable_modules: {entry.text}")

    # -- scores and pictures --------------------------------------------------------------------

    def evaluate(self) -> None:
        """Score the validation videos, the first time the copied mask too; keep the best."""
        drawer = OverlayDrawer(
            self.val_data,
            self.folder.overlays,
            f"step_{self.step:06d}",
            self.experiment.evaluation.num_overlays,
        )
        scores = score_contender(
            self._contender(TRAINED, self.step),
            self.val_data,
            self.experiment,
            "val",
            on_frame=self._heed_signal(drawer.see_frame),
            on_video=drawer.see_video,
        )
        # Before anything is written: a signal in here leaves the step without a score.
        copied = None
        if not self.baseline:
            heed = self._heed_signal()
            copied = score_contender(COPIED, self.val_data, self.experiment, "val", on_frame=heed)
        for found in filter(None, (scores, copied)):
            self._keep(found)
        self.latest, self.scored = scores.means, self.step
        values = {f"val/{name}": value for name, value in self.latest.items()}
        self.runlog.record(self.step, values | numbers(scores.horizon))
        self.runlog.summary(numbers(scores.horizon))
        self.runlog.overlays(self.step, drawer.overlays)
        if copied:
            self.baseline = self.latest
            self.runlog.summary({f"{COPY}/J_and_F": copied.means["J_and_F"]})
            self._show_scores("validation", 0, (COPY, 0))
        score = self.latest["J_and_F"]
        if score > self.best:
            self.best = score
            self.save(self.folder.best)
        if self.step:
            self.runlog.say(
                f"step {self.step}: J&F {score:.3f} on the validation videos "
                f"(step 0: {self.baseline['J_and_F']:.3f}, best: {self.best:.3f})"
            )

    def _report_on_test(self) -> None:
        """Score the checkpoint that validation chose, and what it is compared with, on test."""
        if not self.test_data:
            return
        # A run that goes on after its end reports again.
        for file in (self.score_rows, self.horizon_rows):
            file.rows = [row for row in file.rows if row["split"] != "test"]
        path = self.folder.best if self.val_data else self.folder.last
        content = checkpoint.load(path)
        step = content["step"]
        contenders = [
            self._contender(TRAINED, step, content["model"]),
            self._contender(BASE, 0, self.base_weights),
        ]
        scores, base, copied = map(
            self._keep,
            score_beside(
                contenders,
                self.test_data,
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
        self._show_scores("test", step, (BASE, 0), (COPY, 0))

    def _contender(
        self, key: str, step: int, weights: Mapping[str, torch.Tensor] | None = None
    ) -> Contender:
        track = partial(track_video, self.model, bf16=self.bf16)
        label = LABELS.get(key, f"step {step}")
        return Contender(key, label, step, track, self.model, weights)

    def _keep(self, scores: Scores) -> Scores:
        """Write the rows, the curves of models only: the copy has no memory."""
        self.score_rows.add(scores.objects)
        if scores.model != COPY:
            self.horizon_rows.add(scores.horizon)
        return scores

    def _show_scores(self, split: str, step: int, *beside: tuple[str, int]) -> None:
        """Print the scores of a step, and of others as (model, step), with the differences."""
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
            if (key, model, step) in kept  # a file that was deleted comes back without the past
        ]
        policy = self.experiment.evaluation.frame_policy
        self.runlog.console.print(scores_table(f"{split} videos, frames: {policy}", rows))

    def _heed_signal(self, on_frame: OnFrame | None = None) -> OnFrame:
        """Sees frames for `on_frame`, and raises Interrupted between two of them where a signal
        asks for it; all is saved by now."""

        def heed(index: int, seen: SeenFrame) -> None:
            if self.stop.received is not None:
                raise self.stop.interrupted()
            if on_frame is not None:
                on_frame(index, seen)

        return heed

    # -- what is kept ---------------------------------------------------------------------------

    def _save_last(self) -> None:
        """Write `last.pt`, unless it has this step and its score; the one before is kept."""
        if self._saved != (self.step, self.scored):
            self.save(self.folder.last)
            self._saved = self.step, self.scored

    def _rng_states(self) -> dict[str, Any]:
        """Of torch's generators: what dropout draws from."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"torch": torch.get_rng_state(), "cuda": cuda}

    def save(self, path: Path, rng: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint: the last one to go on from, the best one for use.

        Args:
            rng: states of torch's generators, None for those of now.
        """
        weights = self.model.sam2.state_dict()
        everything = len(self.parameters) == len(list(self.model.sam2.parameters()))
        # Over random weights nobody could tell what the rest was; all of them need no base.
        if self.base_hash is not None and not everything:
            weights = {key: weights[key] for key in self.parameters}
        checkpoint.save(
            path,
            {
                "model": {key: value.detach().cpu() for key, value in weights.items()},
                "base": {
                    "path": self.experiment.model.checkpoint_path,
                    "sha256": self.base_hash,
                    "config_path": self.experiment.model.config_path,
                },
                "untrained_rows": rows_left(self.model, self.optimizer),
                "config": self.settings,
                "step": self.step,
                "best": self.best,
                "scores": self.latest,
                "baseline": self.baseline,
                "scored": self.scored,
                "window": self.runlog.state_dict(),
                "run_id": self.run_id,
                "data": self.fingerprints,
                "audited": self.audited,
                # best.pt is for use, last.pt for going on.
                "optimizer": self.optimizer.state_dict() if path == self.folder.last else None,
                "rng": rng or self._rng_states(),
            },
            previous=self.folder.previous if path == self.folder.last else None,
        )

    def _restore(self, content: Mapping[str, Any], path: Path) -> str:
        if content["optimizer"] is None:
            raise UserError(f"{path}: has no optimiser state; go on from last.pt of the same run")
        checkpoint.apply_weights(self.model.sam2, content, self.base_hash, path)
        checkpoint.restore_optimizer(self.optimizer, content["optimizer"], path)
        self.step, self.best = content["step"], content["best"]
        self.audited = content.get("audited", True)  # checkpoints from before this key were
        self.baseline, self.latest = content["baseline"], content["scores"]
        # Checkpoints from before this key were written after their step was scored, if it was due.
        self.scored = content.get("scored", self.step)
        if path == self.folder.last:
            self._saved = self.step, self.scored
        try:
            torch.set_rng_state(content["rng"]["torch"])
            if torch.cuda.is_available():  # another machine may have fewer devices
                states = content["rng"]["cuda"][: torch.cuda.device_count()]
                torch.cuda.set_rng_state_all(states)
        except (RuntimeError, TypeError) as problem:
            raise UserError(
                f"{path}: rng is not the state of torch's generators ({problem}); take another "
                "checkpoint of the run"
            ) from None
        if self.interaction is not None:
            self.interaction.num_clips = self.num_clips
        return content["run_id"]

    def _write_run_files(self) -> None:
        write_text(self.folder.config, self.settings)
        self.runlog.environment(self.device)

    def _summarise(self, status: str) -> None:
        values = {f"val/{name}": self.latest[name] for name in ("J", "F", "J_and_F") if self.latest}
        if self.baseline:
            values["baseline/J_and_F"] = self.baseline["J_and_F"]
            values["best/J_and_F"] = self.best
        self.runlog.summary(
            {**values, "steps": self.step, "seconds": self.runlog.seconds, "status": status}
        )
