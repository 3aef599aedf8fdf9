"""Checkpoints on disk: written whole or not at all, read without executing anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sam2train.errors import UserError
from sam2train.files import replacing

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
