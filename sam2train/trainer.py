"""The loop: evaluate, save, stop, step, log; always in this order."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from sam2train import checkpoint
from sam2train.build import build_dataset, build_model, num_cores
from sam2train.clips import BatchedVideoDatapoint, collate_fn
from sam2train.config import to_yaml
from sam2train.datasets import ClipSampler
from sam2train.environment import describe_environment
from sam2train.errors import UserError
from sam2train.evaluate import TrackedVideo, evaluate
from sam2train.experiment import Experiment, untrained_rows
from sam2train.losses import compute_losses
from sam2train.optimizer import build_optimizer, learning_rate_factor
from sam2train.overlays import comparison, id_mask, save_png
from sam2train.pretrained import MODULES, match_parameters, resolve_path
from sam2train.tracking import Overlay, Tracker
from sam2train.transforms import resize_image


class Interrupted(SystemExit):
    """The run was asked to stop and has saved; the code is the shell's for the signal."""


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
        self.experiment = experiment
        self.config = experiment.trainer
        self.run_dir = run_dir
        self.step = 0
        self.best = -math.inf
        self.baseline: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.audit: dict[str, float] = {}
        self.stop_signal: int | None = None
        console = console or Console()

        def say(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        data, val = experiment.dataset.data_path, experiment.dataset.val_path
        self.train_data = build_dataset(experiment, data, training=True, say=say)
        self.val_data = val and build_dataset(experiment, val, training=False, say=say)
        self.model = build_model(experiment)
        self.device = self.model.device
        self.parameters = self.model.trainable_parameters()
        if not self.parameters and self.config.num_steps:
            raise UserError("model.trainable_modules: nothing is trained; name at least one module")
        self.optimizer = build_optimizer(self.parameters, experiment.optimizer)
        bf16 = self.config.bf16
        if bf16 is None:
            bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.bf16 = bf16
        base = experiment.model.checkpoint_path
        self.base_hash = None if base is None else checkpoint.file_hash(resolve_path(base))
        if resume is not None:
            run_id = self._restore(resume)
        self.run_id = run_id
        self.tracker = Tracker(
            experiment.tracking,
            run_dir,
            run_id=run_id,
            name=name,
            settings=experiment.model_dump(mode="json"),
            log_every=self.config.log_every,
            num_steps=self.config.num_steps,
            first_step=self.step,
            console=console,
        )

    # -- the loop -----------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Train to the last step. Returns the last validation scores, empty without `val_path`.

        Raises:
            Interrupted: a signal asked the run to stop; it has saved first.
            FloatingPointError: a loss or gradient that is not finite, with step and clips.
        """
        config, tracker = self.config, self.tracker
        resumed_at = self.step or None
        with _StopRequests(self), tracker:
            self._write_run_files()
            tracker.parameters(self.model.parameter_report())
            if rows := untrained_rows(self.experiment):
                length, enough = self.experiment.dataset.video_clip_length, rows[-1] + 3
                tracker.say(
                    f"clips of {length} frames never reach rows {rows[0]} to {rows[-1]} of "
                    "maskmem_tpos_enc (memories farther back): they stay as loaded. "
                    f"dataset.video_clip_length={enough} reaches all"
                )
            tracker.summary({"status": "running", "steps": self.step})
            try:
                self.model.train()
                batches = self._batches()
                while True:
                    last = self.step >= config.num_steps
                    if self.step != resumed_at:
                        if last or self.step % config.val_every == 0:
                            self._evaluate()
                        if last or (self.step and self.step % config.save_every == 0):
                            self._save("last.pt")
                    if self.stop_signal is not None:
                        self._save("last.pt")
                        raise Interrupted(128 + self.stop_signal)
                    if last:
                        break
                    scalars = self._train_step(batches)
                    self.step += 1
                    clips = self.experiment.dataset.batch_size * config.grad_accumulation
                    tracker.log(self.step, scalars, clips=clips)
                    if self.step == 1:
                        tracker.record(self.step, self.audit)
            except BaseException as error:
                status = "interrupted" if isinstance(error, Interrupted) else "failed"
                self._summarise(status)
                raise
            self._summarise("finished")
            if self.baseline:
                tracker.scores(self.baseline, self.latest)
        return self.latest

    def _batches(self) -> Iterator[BatchedVideoDatapoint]:
        config = self.experiment.dataset
        done = self.step * self.config.grad_accumulation * config.batch_size
        sampler = ClipSampler(
            len(self.train_data), shuffle=config.shuffle, seed=self.config.seed, start=done
        )
        return iter(
            DataLoader(
                self.train_data,
                batch_size=config.batch_size,
                sampler=sampler,
                # More processes than cores only wait for each other; the clips are the same.
                num_workers=min(config.num_workers, num_cores()),
                collate_fn=collate_fn,
                pin_memory=self.device.type == "cuda",
                # Its own generator: the loader must not draw from the one that dropout uses.
                generator=torch.Generator().manual_seed(self.config.seed),
            )
        )

    def _train_step(self, batches: Iterator[BatchedVideoDatapoint]) -> dict[str, torch.Tensor]:
        """One optimiser step. Returns detached scalars, still on the device."""
        config = self.config
        factor = learning_rate_factor(self.step, config.num_steps, self.experiment.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        scalars: dict[str, torch.Tensor] = {}
        names: list[str] = []
        for batch in itertools.islice(batches, config.grad_accumulation):
            names += batch.names
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.model(batch)
            # Outside autocast, on float32 logits: dice sums up to 10^6 pixels of an object, and
            # bfloat16 carries 8 significant bits.
            losses = compute_losses(
                outputs["frames"], batch.masks, self.experiment.loss, batch.object_frame_valid
            )
            (losses["loss"] / config.grad_accumulation).backward()
            for name, value in losses.items():
                scalars[name] = scalars.get(name, 0) + value.detach() / config.grad_accumulation
        if self.step == 0:
            self._audit_gradients()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)

        # The one host sync of a healthy step, placed before a bad batch can reach the weights.
        if not torch.isfinite(scalars["loss"] + grad_norm):
            raise FloatingPointError(
                f"step {self.step + 1}: loss {scalars['loss'].item():.3g} or gradient norm "
                f"{grad_norm.item():.3g} is not finite, on {'; '.join(names)}. The weights are "
                "those before this step; lower optimizer.learning_rate or look at these clips"
            )
        self.optimizer.step()
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return {**scalars, "grad_norm": grad_norm, "lr": lr}

    def _audit_gradients(self) -> None:
        """Keep what each trained module got at the first step; a listed one without any stops.

        A single tensor may rest for a step (the embedding of absence does while nothing is absent);
        what the experiment lists may not.
        """
        tensors: dict[str, list[torch.Tensor | None]] = {}
        for name, parameter in self.parameters.items():
            tensors.setdefault(name.split(".")[0], []).append(parameter.grad)
        record = {}
        for module, gradients in tensors.items():
            norms = [gradient.norm() for gradient in gradients if gradient is not None]
            record[f"audit/{module}/tensors"] = len(gradients)
            record[f"audit/{module}/with_gradient"] = len(norms)
            record[f"audit/{module}/norm"] = float(torch.stack(norms).norm()) if norms else 0.0
        self.audit = record
        idle = [
            entry
            for entry in self.model.trainable_modules
            if all(
                self.parameters[name].grad is None
                for name in match_parameters(self.model.sam2, [entry], MODULES)
            )
        ]
        if idle:
            raise UserError(
                f"model.trainable_modules: {', '.join(idle)} got no gradient at the first step. "
                "The memory is learnt through later frames: it needs dataset.video_clip_length of "
                "2 or more, model.num_maskmem of 1 or more and model.memory_gradient other than "
                "`detached`"
            )

    # -- scores and pictures --------------------------------------------------------------------

    def _evaluate(self) -> None:
        if not self.val_data:
            return
        pictures: list[Overlay] = []

        def draw(index: int, tracked: TrackedVideo) -> None:
            if index < self.experiment.evaluation.num_overlays:
                pictures.append(self._draw_overlay(tracked))

        self.latest = evaluate(
            self.model,
            self.val_data,
            self.experiment.evaluation,
            seed=self.config.seed,
            bf16=self.bf16,
            on_video=draw,
        )
        self.tracker.record(self.step, {f"val/{name}": v for name, v in self.latest.items()})
        self.tracker.overlays(self.step, pictures)
        if not self.baseline:
            self.baseline = self.latest
            self.tracker.scores(self.baseline)
        score = self.latest["J_and_F"]
        if score > self.best:
            self.best = score
            self._save("best.pt")
        if self.step:
            self.tracker.say(
                f"step {self.step}: J&F {score:.3f} on the validation videos "
                f"(step 0: {self.baseline['J_and_F']:.3f}, best: {self.best:.3f})"
            )

    def _draw_overlay(self, tracked: TrackedVideo) -> Overlay:
        video = tracked.video
        frames = np.stack([self.val_data.read_frame(video, t) for t in range(len(video.frames))])
        numbers = {object_id: place for place, object_id in enumerate(video.object_ids, start=1)}
        scale = np.array(video.size, np.float32)[::-1] / np.array(self.val_data.image_size)[::-1]
        prompts = [
            {
                **prompt,
                "object_id": numbers[prompt["object_id"]],
                "points": prompt["points"] * scale,
                "box": None if prompt["box"] is None else prompt["box"] * np.tile(scale, 2),
                "mask": None
                if prompt["mask"] is None
                else resize_image_mask(prompt["mask"], video.size),
            }
            for prompt in tracked.prompts
        ]
        means = {scores.object_id: scores for scores in tracked.scores.objects}
        per_frame = [
            {o: s.J[list(s.frames).index(t)] for o, s in means.items() if t in s.frames}
            for t in range(len(frames))
        ]
        score = np.mean([scores.J_and_F for scores in means.values()]) if means else math.nan
        name = f"video_{video.video_id}"
        path = self.run_dir / "overlays" / f"step_{self.step:06d}_{_file_name(name)}.png"
        save_png(
            comparison(
                frames,
                {numbers[o]: masks for o, masks in tracked.prediction.items()},
                {numbers[o]: masks for o, masks in tracked.ground_truth.items()},
                prompts,
                title=f"{video.video_id}, step {self.step}: J&F {score:.3f}",
                scores=[f"J {np.mean(list(j.values())):.2f}" if j else "" for j in per_frame],
            ),
            path,
        )
        # One frame with toggled masks: the middle of what is scored, where tracking shows.
        middle = len(frames) // 2
        order = list(numbers)
        return Overlay(
            name=name,
            path=path,
            frame=frames[middle],
            prediction=id_mask({o: m[middle] for o, m in tracked.prediction.items()}, order),
            ground_truth=id_mask({o: m[middle] for o, m in tracked.ground_truth.items()}, order),
            class_labels={number: f"object {o}" for o, number in numbers.items()},
        )

    # -- what is kept ---------------------------------------------------------------------------

    def _save(self, name: str) -> None:
        weights = self.model.sam2.state_dict()
        everything = len(self.parameters) == len(list(self.model.sam2.parameters()))
        # Over random weights nobody could tell what the rest was; all of them need no base.
        if self.base_hash is not None and not everything:
            weights = {key: weights[key] for key in self.parameters}
        checkpoint.save(
            self.run_dir / "checkpoints" / name,
            {
                "model": {key: value.detach().cpu() for key, value in weights.items()},
                "base": {
                    "path": self.experiment.model.checkpoint_path,
                    "sha256": self.base_hash,
                    "config_path": self.experiment.model.config_path,
                },
                "config": to_yaml(self.experiment),
                "step": self.step,
                "best": self.best,
                "scores": self.latest,
                "baseline": self.baseline,
                "run_id": self.run_id,
                # best.pt is for use, last.pt for going on.
                "optimizer": self.optimizer.state_dict() if name == "last.pt" else None,
                "rng": {
                    "torch": torch.get_rng_state(),
                    "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                },
            },
        )

    def _restore(self, path: Path) -> str:
        content = checkpoint.load(path)
        if content["optimizer"] is None:
            raise UserError(f"{path}: has no optimiser state; go on from last.pt of the same run")
        checkpoint.apply_weights(self.model.sam2, content, self.base_hash, path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.best = content["step"], content["best"]
        self.baseline, self.latest = content["baseline"], content["scores"]
        torch.set_rng_state(content["rng"]["torch"])
        if content["rng"]["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(content["rng"]["cuda"])
        return content["run_id"]

    def _write_run_files(self) -> None:
        (self.run_dir / "config.yaml").write_text(to_yaml(self.experiment))
        environment = json.dumps(describe_environment(self.device), indent=2)
        (self.run_dir / "environment.json").write_text(environment + "\n")

    def _summarise(self, status: str) -> None:
        values = {f"val/{name}": self.latest[name] for name in ("J", "F", "J_and_F") if self.latest}
        if self.baseline:
            values["baseline/J_and_F"] = self.baseline["J_and_F"]
            values["best/J_and_F"] = self.best
        self.tracker.summary(
            {**values, "steps": self.step, "seconds": self.tracker.seconds, "status": status}
        )


def resize_image_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a prompt at another size, for a picture."""
    picture = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)
    return resize_image(picture, size)[..., 0] > 127


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)


class _StopRequests:
    """While open, SIGTERM and Ctrl-C ask the trainer to save and stop; a second Ctrl-C aborts."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.before: dict[int, object] = {}

    def __enter__(self) -> None:
        def request(number: int, frame: FrameType | None) -> None:
            if self.trainer.stop_signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.trainer.stop_signal = number

        try:
            self.before = {n: signal.signal(n, request) for n in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            self.before = {}  # not in the main thread: signals are somebody else's business

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
