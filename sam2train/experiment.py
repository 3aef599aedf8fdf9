"""One experiment: all sections of its YAML, and the rules that cross them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from sam2train.config import Section, apply_overrides, build, load_yaml
from sam2train.datasets import DatasetConfig
from sam2train.evaluate import EvaluationConfig
from sam2train.interaction import InteractionConfig
from sam2train.losses import LossConfig
from sam2train.model import ModelConfig
from sam2train.optimizer import OptimizerConfig
from sam2train.pretrained import selects
from sam2train.tracking import TrackingConfig
from sam2train.transforms import AugmentConfig

# What --smoke changes: two steps of anything, in seconds.
SMOKE = {
    "trainer.num_steps": 2,
    "trainer.log_every": 1,
    "trainer.val_every": 2,
    "trainer.save_every": 2,
    "trainer.grad_accumulation": 1,
    "dataset.batch_size": 1,
    "dataset.num_workers": 0,
    "evaluation.max_videos": 1,
    "evaluation.max_frames": 4,
    "evaluation.num_overlays": 1,
}


class TrainerConfig(Section):
    """The `trainer:` section. Periods count optimiser steps."""

    num_steps: int = Field(1000, ge=0)
    val_every: int = Field(200, ge=1, description="also before the first step and after the last")
    save_every: int = Field(200, ge=1)
    log_every: int = Field(10, ge=1)
    grad_accumulation: int = Field(1, ge=1, description="batches of one optimiser step")
    max_grad_norm: float = Field(0.1, gt=0)
    audit: Literal["stop", "warn"] = Field(
        "stop", description="what a trainable module without gradient at the first step does"
    )
    bf16: bool | None = Field(None, description="bfloat16 autocast; null: where CUDA supports it")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    seed: int = Field(0, ge=0, lt=2**63)


class Experiment(Section):
    """All settings of a run, checked; the disk is not touched."""

    dataset: DatasetConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    interaction: InteractionConfig = Field(default_factory=InteractionConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _sizes_agree(self) -> Experiment:
        side = self.model.image_size
        if self.dataset.image_size != (side, side):
            height, width = self.dataset.image_size
            raise ValueError(
                f"dataset.image_size is [{height}, {width}] and model.image_size {side}; SAM 2 "
                f"takes squares: set dataset.image_size to [{side}, {side}]"
            )
        return self

    @model_validator(mode="after")
    def _somebody_can_be_corrected(self) -> Experiment:
        interaction, dataset = self.interaction, self.dataset
        if not interaction.enabled:
            return self
        if set(dataset.prompt_types) == {"mask"}:
            raise ValueError(
                "interaction corrects objects prompted by points and boxes, and "
                "dataset.prompt_types has masks only; add one of them, or set "
                "interaction.num_correction_pt_per_frame to 0"
            )
        if interaction.num_frames_to_correct < dataset.max_conditioning_frames:
            raise ValueError(
                f"interaction.num_frames_to_correct is {interaction.num_frames_to_correct} and "
                f"dataset.max_conditioning_frames {dataset.max_conditioning_frames}; every "
                "conditioning frame is corrected: allow at least as many"
            )
        return self


def load_experiment(path: Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment in a YAML file, with `dotted.key -> value` overrides applied.

    Raises:
        UserError: everything that is wrong with it, in one message.
    """
    return build(
        Experiment, apply_overrides(load_yaml(path), overrides or {}, Experiment), str(path)
    )


def read_rows(experiment: Experiment) -> list[int]:
    """Rows of the temporal encoding that training clips read.

    Row r belongs to the memory of the tracked frame r + 1 frames back, the last row to that of
    every conditioning frame. The frame farthest from its memory is the last of a clip, T - 2 frames
    after the first tracked one. Further conditioning frames are drawn, and some clips have none, so
    that they take no row away; corrections do where they make a conditioning frame of every frame.
    """
    length, rows = experiment.dataset.video_clip_length, experiment.model.num_maskmem
    if length < 2 or rows == 0:
        return []
    user = experiment.interaction
    nothing_tracked = (
        user.enabled
        and user.add_all_frames_to_correct_as_cond
        and not user.rand_frames_to_correct
        and user.num_frames_to_correct >= length
        and "mask" not in experiment.dataset.prompt_types  # such objects are not corrected
    )
    reached = 0 if nothing_tracked else length - 2
    return [*range(min(reached, rows - 1)), rows - 1]


def untrained_rows(experiment: Experiment) -> list[int]:
    """Rows of the temporal encoding that the experiment leaves as they are: no training clip reads
    them, or `model.trainable_modules` does not list their parameter."""
    listed = any(selects(name, "maskmem_tpos_enc") for name in experiment.model.trainable_modules)
    trained = read_rows(experiment) if listed else []
    return [row for row in range(experiment.model.num_maskmem) if row not in trained]
