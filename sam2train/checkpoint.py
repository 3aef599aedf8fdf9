"""Checkpoints on disk: written whole or not at all, read without executing anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sam2train.config_yaml import read_yaml
from sam2train.errors import UserError
from sam2train.experiment import Experiment, base_hash
from sam2train.files import file_hash, replacing
from sam2train.model import SAM2Model
from sam2train.pretrained import load_weights

FORMAT = 1


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values; the file appears whole or not at all."""
    with replacing(path) as partial, open(partial, "wb") as file:
        torch.save({"format": FORMAT, **content}, file)


def is_checkpoint(path: Path) -> bool:
    """Whether `save` wrote this file; False for SAM 2's own and anything else that torch reads.

    Raises:
        UserError: no file, or a damaged one.
    """
    content = _read(path)
    return isinstance(content, dict) and content.get("format") == FORMAT


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU.

    Raises:
        UserError: no file, a damaged one, or one of another program.
    """
    content = _read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a checkpoint of this program (format {FORMAT}); SAM 2's own weights "
            "belong in model.checkpoint_path"
        )
    return content


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; a run keeps them in RUN/checkpoints/")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises a dozen types for a damaged file
        raise UserError(
            f"{path}: not a checkpoint that torch can read ({type(problem).__name__}); "
            "it may be cut short: take another one of the run"
        ) from None


def apply_weights(
    model: torch.nn.Module, content: Mapping[str, Any], base_hash: str | None, path: Path
) -> None:
    """Put a checkpoint's weights over the base that they were trained from.

    Args:
        model: SAM 2 with the base weights loaded.
        base_hash: sha256 of the base's file, None for random weights.

    Raises:
        UserError: another base, or weights of another architecture.
    """
    weights = content["model"]
    expected = {name: value.shape for name, value in model.state_dict().items()}
    base = content["base"]
    complete = weights.keys() == expected.keys()
    # Random weights have no hash: a part of them says nothing about the rest.
    if not complete and (base_hash is None or base["sha256"] != base_hash):
        raise UserError(
            f"{path}: holds {len(weights)} of {len(expected)} tensors, trained over "
            f"{_describe_base(base['path'], base['sha256'])}, but model.checkpoint_path has "
            f"{_describe_base(None, base_hash)}; set it to that file"
        )
    wrong = [name for name, value in weights.items() if expected.get(name) != value.shape]
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} tensors do not fit model.config_path and model.num_maskmem, "
            f"the first is {wrong[0]} {tuple(weights[wrong[0]].shape)}"
        )
    model.load_state_dict(weights, strict=False)  # names and shapes were checked above


def _describe_base(path: str | None, sha256: str | None) -> str:
    if sha256 is None:
        return "random weights"
    return (f"{path}, " if path else "a file of ") + f"sha256 {sha256[:12]}..."


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
    if not is_checkpoint(source):
        return experiment
    trained = read_yaml(load(source)["config"], f"{source}, its settings")["model"]
    model = experiment.model.model_copy(update={name: trained[name] for name in _SHAPING})
    return experiment.model_copy(update={"model": model})


def load_checkpoint(model: SAM2Model, experiment: Experiment, source: Path) -> Loaded:
    """Put a run's checkpoint, or a file `{"model": state_dict}` such as `--export` writes, into a
    model that holds the experiment's base weights.

    Raises:
        UserError: a missing or damaged file, another base, another architecture.
    """
    if not is_checkpoint(source):
        try:
            untrained = load_weights(model.sam2, source)
        except UserError as problem:
            raise UserError(str(problem).removeprefix("model.checkpoint_path: ")) from None
        return Loaded(str(source), file_hash(source), None, (), tuple(untrained))
    content = load(source)
    apply_weights(model.sam2, content, base_hash(experiment), source)
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
