"""A run's checkpoint as a file that `build_sam2` and `build_sam2_video_predictor` load."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Console

from sam2train import checkpoint
from sam2train.build import build_model
from sam2train.experiment import Experiment
from sam2train.pretrained import build_sam2, load_weights, resolve_config, resolve_path


def export_checkpoint(
    experiment: Experiment, source: Path, target: Path, *, half: bool, console: Console
) -> None:
    """Write `{"model": state_dict}` with all of SAM 2's weights, trained or not, and read it back.

    Args:
        source: a checkpoint of a run of this experiment.
        half: store float16; SAM 2 loads it into float32, about 3 decimal digits remain.

    Raises:
        UserError: a checkpoint that is missing or belongs to another base or architecture.
    """
    model = build_model(experiment)
    base = experiment.model.checkpoint_path
    base_hash = None if base is None else checkpoint.file_hash(resolve_path(base))
    checkpoint.apply_weights(model.sam2, checkpoint.load(source), base_hash, source)
    weights = {
        name: value.detach().cpu().to(torch.float16 if half else value.dtype)
        for name, value in model.sam2.state_dict().items()
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        torch.save({"model": weights}, partial)
        again = build_sam2(
            resolve_config(experiment.model.config_path),
            image_size=experiment.model.image_size,
            num_maskmem=experiment.model.num_maskmem,
        )
        load_weights(again, partial)
        for name, value in again.state_dict().items():
            assert torch.equal(value, weights[name].to(value.dtype)), name
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    size = target.stat().st_size / 1e6
    console.print(f"wrote {target} ({size:.1f} MB); it loads strictly", highlight=False)
