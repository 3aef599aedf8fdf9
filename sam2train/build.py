"""An experiment's settings -> its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sam2train import checkpoint
from sam2train.config_yaml import read_yaml
from sam2train.errors import UserError
from sam2train.experiment import Experiment
from sam2train.files import file_hash, resolve_path
from sam2train.machine import choose_device
from sam2train.model import SAM2Model
from sam2train.pretrained import load_weights


def build_model(experiment: Experiment) -> SAM2Model:
    """The experiment's model, loaded and frozen as it says; random weights come from its seed."""
    config = experiment.model
    torch.manual_seed(experiment.weights_seed)
    return SAM2Model(
        config.checkpoint_path,
        config.config_path,
        config.trainable_modules,
        choose_device(experiment.trainer.device),
        config.image_size,
        config.num_maskmem,
        max_obj_ptrs_in_encoder=config.max_obj_ptrs_in_encoder,
        memory_gradient=config.memory_gradient,
        drop_path_rate=config.drop_path_rate,
    ).load()


def base_hash(experiment: Experiment) -> str | None:
    """sha256 of the weights that the experiment starts from, None for random ones."""
    base = experiment.model.checkpoint_path
    return None if base is None else file_hash(resolve_path(base))


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose weights a model now has."""

    path: str
    sha256: str
    step: int | None  # of the run; None for a file that does not say
    notes: tuple[str, ...]  # where the run's settings and the experiment's differ
    untrained_rows: tuple[int, ...]  # temporal rows that no training has reached, as far as known


# What a run may have changed in the model without changing the shape of most weights.
_SHAPING = ("image_size", "num_maskmem", "max_obj_ptrs_in_encoder")


def as_trained(experiment: Experiment, source: Path) -> Experiment:
    """The experiment with the model as the run of a checkpoint had it; as it is for other files."""
    if not checkpoint.is_checkpoint(source):
        return experiment
    trained = read_yaml(checkpoint.load(source)["config"], f"{source}, its settings")["model"]
    model = experiment.model.model_copy(update={name: trained[name] for name in _SHAPING})
    return experiment.model_copy(update={"model": model})


def load_checkpoint(model: SAM2Model, experiment: Experiment, source: Path) -> Loaded:
    """Put a run's checkpoint, or a file `{"model": state_dict}` such as `--export` writes, into a
    model that holds the experiment's base weights.

    Raises:
        UserError: a missing or damaged file, another base, another architecture.
    """
    if not checkpoint.is_checkpoint(source):
        try:
            untrained = load_weights(model.sam2, source)
        except UserError as problem:
            raise UserError(str(problem).removeprefix("model.checkpoint_path: ")) from None
        return Loaded(str(source), file_hash(source), None, (), tuple(untrained))
    content = checkpoint.load(source)
    checkpoint.apply_weights(model.sam2, content, base_hash(experiment), source)
    trained = read_yaml(content["config"], f"{source}, its settings")["model"]
    now = experiment.model.model_dump(mode="json")
    notes = [
        f"model.{name} is {now[name]!r}; {source} was trained with {trained[name]!r}"
        for name in _SHAPING
        if trained[name] != now[name]
    ]
    # Checkpoints from before this key: rows that were trained lie in them, others are the base's.
    untrained = [] if "maskmem_tpos_enc" in content["model"] else list(model.untrained_rows)
    if trained["num_maskmem"] == model.num_maskmem:
        untrained = content.get("untrained_rows", untrained)
    return Loaded(
        str(source),
        file_hash(source),
        content["step"],
        tuple(notes),
        tuple(untrained),
    )


def uses_bf16(experiment: Experiment, device: torch.device) -> bool:
    """Whether to compute in bfloat16 autocast: as the experiment says, else where CUDA can."""
    if experiment.trainer.bf16 is not None:
        return experiment.trainer.bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
