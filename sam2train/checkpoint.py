"""Checkpoints on disk: written whole or not at all, checked before they are used, read without
executing anything."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sam2train.config import build
from sam2train.config_yaml import read_yaml
from sam2train.errors import UserError
from sam2train.experiment import Experiment, base_hash
from sam2train.files import check_unpacked_size, file_hash, hash_of_rest, read_end, replacing
from sam2train.lora import merge_lora
from sam2train.model import SAM2Model
from sam2train.pretrained import is_safetensors, load_weights
from sam2train.run_folder import RunFolder

FORMAT = 2  # 1 had no digest
# A file is the zip that torch writes; its comment, at the very end, is the sha256 of all bytes
# before the hexadecimal digits. Other programs read such a zip as they read one without a comment.
_MARK = b"sha256:"
_DIGITS = 64


class DamagedCheckpoint(UserError):
    """A checkpoint that is cut short, changed or incomplete: the one before may be whole."""


def save(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Write tensors and plain values; the file appears whole or not at all.

    Args:
        previous: what the file at `path` is called from now on; None replaces it. A run that is
            killed between the two names has `previous` only, which is whole.
    """
    with replacing(path) as partial:
        with open(partial, "w+b") as file:
            writer = _Writer(file)
            try:
                torch.save({"format": FORMAT, **content}, writer)
            except Exception:
                if writer.fault is not None:
                    # torch's own error only says that the zip is incomplete
                    raise writer.fault from None
                raise
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)


class _Writer:
    """The file that torch writes to. It keeps the first error of the disk: torch raises another
    one."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.fault: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as problem:
            self.fault = problem
            raise

    def flush(self) -> None:
        self.file.flush()


def _seal(file: BinaryIO) -> None:
    """Append the digest as the zip's comment, whose length is the zip's last field, 2 bytes."""
    file.seek(-2, io.SEEK_END)
    file.write((len(_MARK) + _DIGITS).to_bytes(2, "little") + _MARK)
    file.seek(0)
    digest = hash_of_rest(file)
    file.seek(0, io.SEEK_END)
    file.write(digest.encode())


def is_checkpoint(path: Path) -> bool:
    """Whether `save` wrote this file; False for SAM 2's own and anything else that torch reads.

    Raises:
        UserError: no file, or a damaged one.
    """
    content = _read(path)
    return isinstance(content, dict) and _format_of(content) is not None


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU.

    Raises:
        DamagedCheckpoint: a file that is not as it was written, or lacks a part.
        UserError: no file, one of another program, or one of a newer version of this program.
    """
    content = _read(path)
    written = _format_of(content) if isinstance(content, dict) else None
    if written is None:
        raise UserError(
            f"{path}: not a checkpoint of this program (format {FORMAT}); SAM 2's own weights "
            "belong in model.checkpoint_path"
        )
    if written > FORMAT:
        raise UserError(
            f"{path}: a newer version of this program wrote it (format {written}, this version "
            f"reads up to {FORMAT}); update this program"
        )
    if written > 1 and not _is_sealed(path):
        raise DamagedCheckpoint(
            f"{path}: the digest at its end is missing or damaged; take another one of the run"
        )
    problems = [
        f"{name} is missing, expected {part.expected}"
        if name not in content
        else f"{name} is {_shown(content[name])}, expected {part.expected}"
        for name, part in _PARTS.items()
        if (name in content or part.since_format_1)
        and not (name in content and part.fits(content[name]))
    ]
    if problems:
        raise DamagedCheckpoint(
            f"{path}: the checkpoint is incomplete: {'; '.join(problems)}. "
            "Take another one of the run"
        )
    return content


def load_last(folder: RunFolder, say: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """The last whole checkpoint of a run, and its path.

    Where `last.pt` is damaged or missing, `previous.pt` is taken; `say` gets a line on it. A
    damaged `last.pt` is renamed to `damaged.pt`, so that the next save does not make it the one
    before.

    Raises:
        UserError: neither is whole, or `last.pt` is whole and not of this version.
    """
    last, previous = folder.last, folder.previous
    try:
        return load(last), last
    except DamagedCheckpoint as problem:
        fault = problem
    except UserError as problem:
        if last.exists() or not previous.exists():
            raise
        fault = problem
    try:
        content = load(previous)
    except UserError as second:
        raise UserError(
            f"{fault}\nand the checkpoint before it cannot be used: {second}\n"
            "no checkpoint of this run is whole; start again in another folder"
        ) from None
    if last.exists():
        os.replace(last, folder.damaged)
    say(f"{fault}\ngoing on from the checkpoint before, {previous}, of step {content['step']}")
    return content, previous


def load_to_resume(path: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """What a run goes on from, and the file that it is from: `path`, or, where that is a run's last
    checkpoint and damaged, what `load_last` finds."""
    folder = RunFolder.of_checkpoint(path)
    if path == folder.last:
        return load_last(folder, say)
    return load(path), path


def _format_of(content: Mapping[str, Any]) -> int | None:
    """The number of the format, None for files that are not of this program."""
    number = content.get("format")
    return number if type(number) is int and number >= 1 else None


def _is_sealed(path: Path) -> bool:
    return read_end(path, len(_MARK) + _DIGITS).startswith(_MARK)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; a run keeps them in RUN/checkpoints/")
    try:
        if _is_sealed(path):
            _prove(path)
        if is_safetensors(path):
            return None  # another program's weights
        check_unpacked_size(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, PermissionError):
        raise
    except Exception as problem:  # torch raises a dozen types for a damaged file
        raise DamagedCheckpoint(
            f"{path}: not a checkpoint that torch can read ({type(problem).__name__}); "
            "it may be cut short: take another one of the run"
        ) from None


def _prove(path: Path) -> None:
    """Raise DamagedCheckpoint where the bytes are not those that were written."""
    digest, left = hashlib.sha256(), path.stat().st_size - _DIGITS
    with open(path, "rb") as file:
        while chunk := file.read(min(left, 1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
        written = file.read()
    if written != digest.hexdigest().encode():
        raise DamagedCheckpoint(
            f"{path}: the file has changed since it was written: its sha256 is "
            f"{digest.hexdigest()[:12]}, and {written[:12].decode(errors='replace')} is written at "
            "its end; take another one of the run"
        )


# -- what a checkpoint holds ----------------------------------------------------------------------


class _Part:
    """What one key of a checkpoint must hold."""

    def __init__(self, expected: str, fits: Callable[[Any], bool], *, since_format_1: bool = True):
        self.expected, self.fits, self.since_format_1 = expected, fits, since_format_1


def _tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(one, torch.Tensor) for name, one in value.items()
    )


def _named_numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(one, int | float) for name, one in value.items()
    )


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _base(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key, 0), str | None) for key in ("path", "sha256", "config_path")
    )


def _optimizer(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and all(isinstance(of_one, Mapping) for of_one in value["state"].values())
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(group, Mapping) for group in value["param_groups"])
        and all(isinstance(group.get("params"), list) for group in value["param_groups"])
    )


def _rng(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("torch"), torch.Tensor)
        and isinstance(value.get("cuda"), list)
        and all(isinstance(one, torch.Tensor) for one in value["cuda"])
    )


def _window(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("sums"), Mapping)
        and _named_numbers(value.get("counts"))
        and value["sums"].keys() == value["counts"].keys()
        and _count(value.get("lines"))
    )


_PARTS = {
    "model": _Part("tensors by name", _tensors),
    "base": _Part("path, sha256 and config_path, each a text or None", _base),
    "config": _Part("the settings as YAML text", lambda value: isinstance(value, str)),
    "step": _Part("a whole number from 0", _count),
    "clips": _Part("a whole number from 0", _count, since_format_1=False),
    "clips_per_step": _Part("a whole number from 0", _count, since_format_1=False),
    "best": _Part("a number", lambda v: isinstance(v, int | float) and not math.isnan(v)),
    "scores": _Part("numbers by name", _named_numbers),
    "baseline": _Part("numbers by name", _named_numbers),
    "run_id": _Part("a text", lambda value: isinstance(value, str)),
    "optimizer": _Part("None, or state and param_groups", _optimizer),
    "rng": _Part("the states of torch's generators, torch and cuda", _rng),
    "audited": _Part("a truth value", lambda v: isinstance(v, bool), since_format_1=False),
    "scored": _Part("None or a step", lambda v: v is None or _count(v), since_format_1=False),
    "window": _Part("sums, counts and lines", _window, since_format_1=False),
    "data": _Part(
        "fingerprints by split",
        lambda v: (
            isinstance(v, Mapping) and all(isinstance(t, str) for kv in v.items() for t in kv)
        ),
        since_format_1=False,
    ),
    "left_out": _Part("counts by text", _named_numbers, since_format_1=False),
    "untrained_rows": _Part(
        "a list of row numbers",
        lambda value: isinstance(value, list | tuple) and all(map(_count, value)),
        since_format_1=False,
    ),
}


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"a {type(value).__name__}" + (f" of {len(value)}" if hasattr(value, "__len__") else "")


def restore_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: Path
) -> None:
    """Give the optimiser of the same experiment its state back.

    Raises:
        UserError: the state belongs to other parameters.
    """
    try:
        how = {name: optimizer.defaults[name] for name in ("fused", "foreach")}  # as can be here
        groups = [{**group, **how} for group in state["param_groups"]]
        optimizer.load_state_dict({**state, "param_groups": groups})
    except Exception as problem:  # torch looks at no type before it computes with a value
        raise UserError(
            f"{path}: optimizer does not fit the trained parameters ({problem}); give the settings "
            "of the run"
        ) from None
    for place, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        for name, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                raise UserError(
                    f"{path}: optimizer.state[{place}].{name} is {tuple(value.shape)}, and the "
                    f"parameter {tuple(parameter.shape)}; take another checkpoint of the run"
                )


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
            f"{path}: {len(wrong)} tensors do not fit model.config_path, num_maskmem and lora, "
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
_SHAPING = ("image_size", "num_maskmem", "max_obj_ptrs_in_encoder", "lora")


def as_trained(experiment: Experiment, source: Path) -> Experiment:
    """The experiment with the model as the run of a checkpoint had it; as it is for other files."""
    if not is_checkpoint(source):
        return experiment
    trained = _trained_model(source, load(source))
    raw = experiment.model.model_dump() | {name: trained[name] for name in _SHAPING}
    return experiment.model_copy(update={"model": build(type(experiment.model), raw, str(source))})


def _trained_model(source: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The `model:` section of a checkpoint; those from before `lora` had none."""
    return {"lora": None, **read_yaml(content["config"], f"{source}, its settings")["model"]}


def load_checkpoint(model: SAM2Model, experiment: Experiment, source: Path) -> Loaded:
    """Put a run's checkpoint, or a file `{"model": state_dict}` such as `--export` writes, into a
    model that holds the experiment's base weights.

    Raises:
        UserError: a missing or damaged file, another base, another architecture.
    """
    if not is_checkpoint(source):
        merge_lora(model.sam2)  # such a file holds sums
        try:
            untrained = load_weights(model.sam2, source)
        except UserError as problem:
            raise UserError(str(problem).removeprefix("model.checkpoint_path: ")) from None
        return Loaded(str(source), file_hash(source), None, (), tuple(untrained))
    content = load(source)
    apply_weights(model.sam2, content, base_hash(experiment), source)
    trained = _trained_model(source, content)
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
