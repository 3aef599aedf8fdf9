"""The loop: save, evaluate, stop, step, log; always in this order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sam2train import checkpoint, distributed, sharding
from sam2train.clips import BatchedVideoDatapoint
from sam2train.config import to_yaml
from sam2train.config_yaml import read_yaml
from sam2train.corrections import SimulatedUser
from sam2train.data_loader import LeftOut, load_batches
from sam2train.data_report import shared_video_warnings
from sam2train.datasets import build_dataset
from sam2train.errors import UserError, add_note
from sam2train.experiment import Experiment, as_begun, base_hash, build_model, uses_bf16
from sam2train.files import sweep_partials, write_text
from sam2train.losses import divide_losses, sum_losses
from sam2train.machine import Interrupted, StopRequests, say
from sam2train.metrics import COPY, TRAINED
from sam2train.optimizer import build_optimizer, set_learning_rates
from sam2train.run_folder import RunFolder
from sam2train.run_scores import TrainerScores
from sam2train.runlog import RunLog
from sam2train.trainer_step import (
    audit_step,
    bf16_note,
    check_can_be_scored,
    check_same_everywhere,
    clips_before,
    feature_cache_note,
    has_tracked_frame,
    not_finite,
    row_warnings,
    rows_left,
    sum_step,
)


class Trainer:
    """Trains one experiment into one run folder.

    Of several processes each has its own batches and the same weights. All of them come to each
    place that saves, scores or stops, and the main one writes.

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
            content, resume = distributed.from_main(
                partial(checkpoint.load_to_resume, resume, warn)
            )
            settings = read_yaml(content["config"], f"{resume}, its settings")
            experiment = as_begun(experiment, settings)
        self.experiment = experiment
        self.settings = to_yaml(experiment)
        self.config = experiment.trainer
        self.folder = RunFolder(run_dir)
        self.step, self.audited = 0, False
        self._start = 0, 0  # steps and clips of the processes that this one resumes
        self.audit: dict[str, float] = {}  # until it is logged
        self.stop = StopRequests()
        named = ("data_path", "val_path", "test_path")
        data, val, test = (getattr(experiment.dataset, name) for name in named)
        sections = experiment.dataset, experiment.augment, experiment.clips_seed
        read = partial(build_dataset, *sections, say=warn, known={})  # a shared path is read once
        self.train_data = read(data, training=True)
        self.val_data = val and read(val, training=False)
        self.test_data = test and read(test, training=False)
        check_can_be_scored(experiment, {"val": self.val_data, "test": self.test_data})
        splits = {"train": self.train_data, "val": self.val_data, "test": self.test_data}
        self.splits = {name: part for name, part in splits.items() if part}
        self.fingerprints = {name: part.fingerprint for name, part in self.splits.items()}
        # Checkpoints from before this key have none.
        before = content.get("data", {}) if content else {}
        self.changed_data = [n for n, value in before.items() if self.fingerprints.get(n) != value]
        self.model = build_model(experiment, warn)
        self.device = self.model.device
        torch.manual_seed(distributed.dropout_seed(self.config.seed, 0))
        self.parameters = self.model.trainable_parameters()
        if not self.parameters and self.config.num_steps:
            raise UserError("model.trainable_modules: nothing is trained; name at least one module")
        user = partial(SimulatedUser, experiment.interaction, experiment.clips_seed)
        self.interaction = user() if experiment.interaction.enabled else None
        self.bf16 = uses_bf16(experiment, self.device)
        self.base_hash = base_hash(experiment)
        check_same_everywhere(
            {"weights": self.base_hash, "data": self.fingerprints, "settings": self.settings}
        )
        base_weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        if content:
            checkpoint.apply_weights(self.model.sam2, content, self.base_hash, resume)
        if self.config.sharding == "fsdp" and self.config.num_steps:
            sharding.shard(self.model, warn)
            self.parameters = self.model.trainable_parameters()
        self.optimizer = build_optimizer(self.parameters, experiment.optimizer, self.model.sam2)
        self._warnings: list[str] = []  # of a resumed run
        if content:
            run_id = self._restore(content, resume)
        self.run_id = run_id
        for place in (run_dir, self.folder.checkpoints, self.folder.overlays):
            if distributed.is_main():
                sweep_partials(place)
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
        before = content.get("left_out", {}) if content else {}
        self.left_out = LeftOut(before, self.runlog.say)
        self.scores = TrainerScores(
            experiment,
            self.folder,
            self.model,
            self.runlog,
            self.stop,
            bf16=self.bf16,
            base_weights=base_weights,
            before=content,
        )
        counts = map(self.scores.num_videos, (self.val_data, self.test_data))
        self.runlog.scoring = self.config.val_every, *counts
        # (steps done, last step scored) as `last.pt` has them
        self._saved: tuple[int, int | None] | None = None
        if resume == self.folder.last:
            self._saved = self.step, self.scores.scored

    # -- the loop -----------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Train to the last step. Returns the last validation scores, empty without `val_path`.

        Raises:
            Interrupted: a signal asked the run to stop; it has saved first.
            FloatingPointError: a loss or gradient that is not finite, with step and clips.
        """
        config, runlog = self.config, self.runlog
        with self.stop, distributed.stopping_together(self.stop), runlog:
            self._write_run_files()
            runlog.parameters(self.model.parameter_report())
            for text in row_warnings(self.model, self.experiment):
                runlog.say(f"warning: {text}")
            if note := feature_cache_note(self.experiment, self.model):
                runlog.say(note)
            if note := bf16_note(self.experiment, self.device):
                runlog.say(note)
            warnings = shared_video_warnings(self.splits)
            warnings += self._warnings
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
                    "memory_admission": self.experiment.evaluation.memory_admission.name,
                    "predictor_defaults": self.experiment.evaluation.predictor_defaults,
                    "evaluation_seed": self.experiment.prompts_seed,
                    "warnings": warnings,
                }
            )
            try:
                self.model.train()
                batches = self.batches()
                while True:
                    last = self.step >= config.num_steps
                    scoring = self.val_data and self.step != self.scores.scored
                    scoring = scoring and (last or self.step % config.val_every == 0)
                    # Before an evaluation, too: it may take long, and a signal ends it.
                    if last or scoring or self.step % config.save_every == 0:
                        self._save_last()
                    if scoring and not distributed.agree_to_stop(self.stop):
                        self.evaluate()
                    stopping = distributed.agree_to_stop(self.stop)
                    if last or stopping:
                        self._save_last()
                    if stopping:
                        raise self.stop.interrupted()
                    if last:
                        break
                    scalars = self.train_step(batches)
                    self.step += 1
                    runlog.log(self.step, scalars, clips=self.clips_per_step)
                    if self.audit:
                        runlog.record(self.step, self.audit)
                        self.audit = {}
                if self.scores.baseline and self.step:
                    self.scores.show("validation", self.step, (TRAINED, 0), (COPY, 0))
                if self.test_data:
                    chosen = self.folder.best if self.val_data else self.folder.last
                    self.scores.report_on_test(chosen, self.test_data)
                self.scores.send_tables(self.step)
            except BaseException as error:
                status = "interrupted" if isinstance(error, Interrupted) else "failed"
                try:
                    self._summarise(status)
                # the error that ended the run matters more than this one
                except Exception as second:
                    add_note(error, f"and {self.folder.summary} could not be written: {second}")
                raise
            self._summarise("finished")
        return self.scores.latest

    @property
    def clips_per_step(self) -> int:
        """Of all batches and processes."""
        own = self.config.grad_accumulation * self.experiment.dataset.batch_size
        return own * distributed.num_processes()

    @property
    def num_clips(self) -> int:
        """Clips that the steps so far have used, in all processes."""
        steps, clips = self._start
        return clips + (self.step - steps) * self.clips_per_step

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
        """The batches of one step; a signal ends the wait for them, once the run has saved. Several
        processes stop between two steps, at the same one."""
        if distributed.num_processes() > 1:
            return list(itertools.islice(batches, self.config.grad_accumulation))
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
        before = distributed.rng_states(), self.audited
        num_objects, num_tracked, num_left_out = distributed.sum_over_processes(
            [
                sum(batch.masks.shape[1] for batch in collected),
                sum(map(has_tracked_frame, collected)),
                sum(len(batch.left_out) for batch in collected),
            ]
        )
        sums: dict[str, torch.Tensor] = {}
        num_learning, images_before = 0, self.model.feature_counts
        for place, batch in enumerate(collected):
            batch = batch.to(self.device)
            if self.interaction is not None:
                self.interaction.num_clips = self._first_clip_of(place)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.model(batch, interaction=self.interaction, only_frames=True)
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
            num_learning += loss.requires_grad  # else nothing that is trained was read
            loss = loss + outputs.get("zero", 0)
            if loss.requires_grad:
                loss.backward()
            for name, value in of_batch.items():
                sums[name] = sums.get(name, 0) + value.detach()
        pairs = zip(self.model.feature_counts, images_before, strict=True)
        scalars = sum_step(
            # FSDP has summed those of sharded parameters.
            [p for p in self.parameters.values() if not sharding.is_sharded(p)],
            sums,
            self.experiment.loss,
            self.interaction,
            num_objects=num_objects,
            num_batches=(num_learning, len(collected)),
            num_images=tuple(now - then for now, then in pairs),
        )
        if not self.audited:
            more = self.num_clips + self.clips_per_step < len(self.train_data)
            self.audit = audit_step(
                self.model, self.experiment, num_tracked > 0, self.runlog.say, may_wait=more
            )
            self.audited = bool(self.audit)
        grad_norm = sharding.clip_gradients(self.parameters.values(), config.max_grad_norm)

        # The only wait for the device in a step, before a bad batch can change the weights.
        if not torch.isfinite(scalars["loss"] + grad_norm):
            scalars["grad_norm"] = grad_norm
            raise self._not_finite(collected, scalars, *before)
        self.optimizer.step()
        self._count_left_out(collected, num_left_out)
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return {**scalars, "grad_norm": grad_norm, "lr": lr}

    def _first_clip_of(self, place: int) -> int:
        """The number in the run of the first clip of this process's batch at a place of the step:
        the batches of all processes at one place follow one another."""
        batches = place * distributed.num_processes() + distributed.rank()
        return self.num_clips + batches * self.experiment.dataset.batch_size

    def _not_finite(
        self,
        batches: Sequence[BatchedVideoDatapoint],
        scalars: Mapping[str, torch.Tensor],
        rng: Mapping[str, Any],
        audited: bool,
    ) -> BaseException:
        """What to raise after a step that is not finite. The main process keeps the batches of all,
        and the state before the step."""
        state = self._whole_state(rng)
        of_shards = sharding.bad_shards(self.model.sam2)
        batches = [batch for part in distributed.gather(list(batches)) for batch in part]
        if distributed.is_main():
            error = not_finite(
                self.folder,
                self.step + 1,
                batches,
                scalars,
                self.model.sam2,
                partial(self._save_before, state, audited),
                of_shards,
            )
        distributed.wait_for_all()
        return error if distributed.is_main() else SystemExit(1)

    def _count_left_out(self, batches: list[BatchedVideoDatapoint], num_left_out: int) -> None:
        """Count the clips of a step that could not be read, in all processes; UserError where they
        are too many."""
        if not num_left_out:
            return
        own = [problem for batch in batches for problem in batch.left_out]
        problems = [problem for part in distributed.gather(own) for problem in part]
        used = self.num_clips + self.clips_per_step
        dataset = self.experiment.dataset
        self.left_out.add(problems, max(used, len(self.train_data)), dataset)

    def evaluate(self) -> None:
        """Score the validation videos; keep the weights whose score is the highest so far."""
        self.scores.validate(self.step, self.val_data, partial(self.save, self.folder.best))

    # -- what is kept ---------------------------------------------------------------------------

    def _save_last(self) -> None:
        """Write `last.pt`, unless it has this step and its score; the one before is kept."""
        if self._saved != (self.step, self.scores.scored):
            self.save(self.folder.last)
            self._saved = self.step, self.scores.scored

    def _save_before(self, state: Mapping[str, Any], audited: bool) -> None:
        """Write `last.pt` as of before the step that runs, unless it is there."""
        self.audited = audited
        if self._saved is None or self._saved[0] != self.step:
            self.save(self.folder.last, state)

    def _whole_state(
        self, rng: Mapping[str, Any] | None = None, *, to_go_on: bool = True
    ) -> dict[str, Any]:
        """What a checkpoint has of all processes, each of which has to call this."""
        # The trained weights alone, where the others can be read from the file of the base.
        only = None if self.base_hash is None else self.parameters
        return {
            "model": sharding.whole_weights_of(self.model.sam2, only),
            "optimizer": sharding.whole_state(self.optimizer.state_dict()) if to_go_on else None,
            "rng": distributed.rng_of_all(rng or distributed.rng_states()),
        }

    def save(self, path: Path, state: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint: the last one to go on from, the best one for use.

        Args:
            state: of `_whole_state`, None for that of now.
        """
        last = path == self.folder.last
        state = state or self._whole_state(to_go_on=last)
        if not distributed.is_main():
            return
        checkpoint.save(
            path,
            {
                **state,  # best.pt is for use, last.pt for going on
                "base": {
                    "path": self.experiment.model.checkpoint_path,
                    "sha256": self.base_hash,
                    "config_path": self.experiment.model.config_path,
                },
                "untrained_rows": rows_left(self.model, self.optimizer),
                "config": self.settings,
                "step": self.step,
                "clips": self.num_clips,
                "clips_per_step": self.clips_per_step,
                **self.scores.state_dict(),
                "window": self.runlog.state_dict(),
                "run_id": self.run_id,
                "data": self.fingerprints,
                "audited": self.audited,
                "left_out": dict(self.left_out.counts),
            },
            previous=self.folder.previous if last else None,
        )
        self.runlog.saved(path, self.step, self.fingerprints)

    def _restore(self, content: Mapping[str, Any], path: Path) -> str:
        if content["optimizer"] is None:
            raise UserError(f"{path}: has no optimiser state; go on from last.pt of the same run")
        checkpoint.restore_optimizer(self.optimizer, content["optimizer"], path)
        sharding.shard_moments(self.optimizer)
        self.step = content["step"]
        batches = self.experiment.dataset.batch_size, self.config.grad_accumulation
        clips, self._warnings = clips_before(content, batches, path)
        self._start = self.step, clips
        self.audited = content.get("audited", True)  # checkpoints from before this key were
        distributed.restore_rng_of_all(content, self.config.seed, path)
        return content["run_id"]

    def _write_run_files(self) -> None:
        if distributed.is_main():
            write_text(self.folder.config, self.settings)
        self.runlog.environment(self.device)

    def _summarise(self, status: str) -> None:
        counts = {"steps": self.step, "seconds": self.runlog.seconds, "status": status}
        if self.left_out.counts:
            counts["clips_left_out"] = self.left_out.counts.total()
        self.runlog.summary(self.scores.summary() | counts)
