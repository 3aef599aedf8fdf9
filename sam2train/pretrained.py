"""SAM 2 from a config and a checkpoint: found, built, fitted to the experiment, loaded strictly."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam2train.config_yaml import load_yaml
from sam2train.errors import UserError
from sam2train.files import (
    REPOSITORY,
    check_unpacked_size,
    file_hash,
    printable,
    resolve_path,
)
from sam2train.run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from torch import nn

DOWNLOAD_ADDRESS = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"
PUBLISHED = tuple(f"sam2.1_hiera_{size}.pt" for size in ("tiny", "small", "base_plus", "large"))

# The guide's names of SAM 2's parts.
MODULES = {
    "image_encoder": "image_encoder",
    "memory_attention": "memory_attention",
    "memory_encoder": "memory_encoder",
    "prompt_encoder": "sam_prompt_encoder",
    "mask_decoder": "sam_mask_decoder",
}
# All parts of SAM 2's video memory, which the name `memory` stands for: the two modules, and what
# lies outside of them. A config may leave some out, as SAM 2.0's do with `no_obj_embed_spatial`.
MEMORY = (
    "memory_attention",
    "memory_encoder",
    "maskmem_tpos_enc",
    "no_obj_embed_spatial",
    "no_obj_ptr",
    "obj_ptr_proj",
    "obj_ptr_tpos_proj",
)
# sha256 of the float16 values of `maskmem_tpos_enc` -> its untrained rows, for files that were
# written before they said so themselves. These are the demo's: experiments/demo_base_2.yaml had
# clips of 3 frames, so that rows 1 to 5 are the first draw of experiments/demo_base_1.yaml.
_KNOWN_UNTRAINED = {
    "46444f89849ceabc54d02c71d56d05e406edc5c0427656099f21c7e19aef95c9": (1, 2, 3, 4, 5),
}


@cache
def _package_configs() -> dict[str, Path]:
    """Configs inside the installed `sam2` package, by name relative to it."""
    spec = find_spec("sam2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package sam2 is not installed; run `pip install -r requirements.txt`")
    root = Path(spec.submodule_search_locations[0])
    return {
        path.relative_to(root).as_posix(): path for path in sorted(root.glob("configs/sam*/*.yaml"))
    }


def resolve_config(config_path: str | Path) -> Path:
    """The file of a SAM 2 model config.

    Args:
        config_path: a file on disk, a name inside the `sam2` package, such as
            `configs/sam2.1/sam2.1_hiera_t.yaml`, or its short form, `configs/sam2.1_hiera_t.yaml`.

    Raises:
        UserError: nothing of that name; lists what exists.
    """
    path = resolve_path(config_path)
    if path.is_file():
        return path
    named = _package_configs()
    name = Path(config_path).as_posix()
    if name in named:
        return named[name]
    short = [
        full for full in named if Path(full).name == Path(name).name and "training" not in full
    ]
    if short and Path(name).parent.as_posix() in ("configs", "."):
        return named[short[0]]
    ours = [
        p.relative_to(REPOSITORY).as_posix() for p in REPOSITORY.glob("sam2train/configs/*.yaml")
    ]
    known = [full for full in named if "training" not in full] + sorted(ours)
    raise UserError(
        f"model.config_path: no SAM 2 config {str(config_path)!r}; expected a file on disk or one "
        "of\n  " + "\n  ".join(known)
    )


def build_sam2(
    config: Path,
    *,
    image_size: int,
    num_maskmem: int,
    drop_path_rate: float | None = None,
    dropout: float | None = None,
    **options: Any,
) -> nn.Module:
    """A `SAM2Base` with random weights, in train mode, on the CPU.

    Args:
        config: a SAM 2 config file with a `model:` node.
        image_size: pixels; RoPE tables are built for image_size / 16 tokens a side.
        drop_path_rate: of the image encoder's trunk; None as the config says.
        dropout: of the memory attention, its attention weights included; None as the config says.
        options: further keys of the `model:` node to replace.

    Raises:
        UserError: a file that is no SAM 2 config, or an option it does not have.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from sam2.modeling.sam2_base import SAM2Base

    try:
        node = OmegaConf.create(load_yaml(config)).get("model")
    except (OmegaConfBaseException, UserError) as problem:
        raise UserError(f"model.config_path: {config} cannot be read: {problem}") from None
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise UserError(
            f"model.config_path: {config} has no `model:` node with a `_target_`; "
            "expected a SAM 2 model config such as configs/sam2.1_hiera_t.yaml"
        )
    known = set(SAM2Base.__init__.__code__.co_varnames[1 : SAM2Base.__init__.__code__.co_argcount])
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise UserError(
                f"SAM2Model: unknown parameter {name!r}"
                + (f"; did you mean {', '.join(near)}?" if near else "")
            )
    node._target_ = "sam2.modeling.sam2_base.SAM2Base"
    _check_targets(OmegaConf.to_container(node, resolve=False), "model", config)
    for name, value in dict(image_size=image_size, num_maskmem=num_maskmem, **options).items():
        OmegaConf.update(node, name, value, force_add=True)
    if drop_path_rate is not None:
        key = "image_encoder.trunk.drop_path_rate"
        OmegaConf.update(node, key, drop_path_rate, force_add=True)
    tokens = image_size // 16
    layer = "memory_attention.layer"
    for attention in ("self_attention", "cross_attention"):
        OmegaConf.update(node, f"{layer}.{attention}.feat_sizes", [tokens, tokens])
    if dropout is not None:
        for place in ("dropout", "self_attention.dropout", "cross_attention.dropout"):
            OmegaConf.update(node, f"{layer}.{place}", dropout)
    try:
        return instantiate(node)
    except (InstantiationException, OmegaConfBaseException) as problem:
        raise UserError(f"model.config_path: {config} cannot be built: {problem}") from problem


def _check_targets(value: Any, key: str, config: Path) -> None:
    """Raise UserError where a config names anything but a module of SAM 2 or torch to be built, or
    refers to the environment: hydra would call any function of any package by its name."""
    if isinstance(value, str) and "${oc." in value:
        raise UserError(
            f"model.config_path: {config}: {key} is {value!r}; a model config may not refer to the "
            "environment: write the value"
        )
    items = value.items() if isinstance(value, Mapping) else ()
    for name, item in enumerate(value) if isinstance(value, list) else items:
        if name == "_target_" and not _is_module(item):
            raise UserError(
                f"model.config_path: {config}: {key}._target_ is {item!r}; expected a module of "
                f"SAM 2 or torch, in {' or '.join(_TARGETS)}: nothing else is built from a config"
            )
        _check_targets(item, f"{key}.{name}", config)


_TARGETS = ("sam2.modeling", "torch.nn")


def _is_module(target: Any) -> bool:
    """Whether a dotted name is that of a class of modules, where it is defined: a name may lead
    through a module to what it imports, such as sam2.modeling.sam2_base.torch.hub.load."""
    from torch import nn

    place, _, name = str(target).rpartition(".")
    if not any(f"{place}.".startswith(f"{allowed}.") for allowed in _TARGETS):
        return False
    try:
        found = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError, ValueError):
        return False
    own = any(f"{getattr(found, '__module__', '')}.".startswith(f"{a}.") for a in _TARGETS)
    return isinstance(found, type) and issubclass(found, nn.Module) and own


def load_weights(sam2: nn.Module, checkpoint: Path) -> dict[int, str]:
    """Load `{"model": state_dict}` strictly, the temporal rows fitted to the model's num_maskmem.

    Returns:
        The model's temporal rows that no training has reached, with the reason; see
        `fit_untrained_rows`. A file that does not say which these are counts as trained.

    Raises:
        UserError: no such file, not such a file, or weights of another architecture.
    """
    path = resolve_path(checkpoint)
    weights, untrained, of_run = read_weights(path)
    rows = sam2.maskmem_tpos_enc
    reasons: dict[int, str] = {}
    if "maskmem_tpos_enc" in weights and weights["maskmem_tpos_enc"].shape[1:] == rows.shape[1:]:
        reasons = fit_untrained_rows(untrained, len(weights["maskmem_tpos_enc"]), len(rows))
        weights["maskmem_tpos_enc"] = fit_temporal_rows(
            weights["maskmem_tpos_enc"], len(rows), rows.detach()
        )
    expected = {name: value.shape for name, value in sam2.state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    if of_run and expected.keys() - found.keys():
        run = RunFolder.of_checkpoint(path)
        config = run.config if run.is_run else "EXPERIMENT.yaml"
        export = shlex.join(["python", "run.py", str(config), "--export", str(path), "OUT.pt"])
        raise UserError(
            f"model.checkpoint_path: {path} is the checkpoint of a run and holds only what that "
            f"run trained, {len(found)} tensors; the model has {len(expected)}. Write a file with "
            f"all of them and name that:\n  {export}"
        )
    problems = (
        [f"missing {name} {tuple(expected[name])}" for name in expected.keys() - found.keys()]
        + [f"unexpected {name} {tuple(found[name])}" for name in found.keys() - expected.keys()]
        + [
            f"{name} is {tuple(found[name])}, the model has {tuple(expected[name])}"
            for name in expected.keys() & found.keys()
            if expected[name] != found[name]
        ]
    )
    if problems:
        shown = "\n  ".join(sorted(problems)[:8])
        raise UserError(
            f"model.checkpoint_path: {path} does not fit model.config_path "
            f"({len(problems)} of {len(expected)} tensors):\n  {shown}\n"
            "take the config that belongs to the checkpoint"
        )
    sam2.load_state_dict(weights, strict=True)
    return reasons


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], tuple[int, ...], bool]:
    """The state dict of a SAM 2 checkpoint file, on the CPU, its untrained temporal rows, and
    whether a run saved it, which keeps what it trained.

    The rows are those that the file lists beside the weights, as `untrained_rows`. Files of other
    programs list none.

    Raises:
        UserError: a missing file (with the address of a published one) or another layout.
    """
    import torch

    if not path.is_file():
        message = f"model.checkpoint_path: no file {path}"
        if path.name in PUBLISHED:
            message += (
                f"; Meta publishes it at {DOWNLOAD_ADDRESS}{path.name}. Fetch it with\n"
                f"  python run.py EXPERIMENT.yaml --download"
            )
        raise UserError(message + "\nor train from random weights with model.checkpoint_path=null")
    try:
        _check_pinned(path)
        check_unpacked_size(path)
        if is_safetensors(path):
            content = _read_safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError as problem:
        raise UserError(f"model.checkpoint_path: {problem}") from None
    except Exception as problem:  # torch raises a dozen types for a damaged file
        raise UserError(
            f"model.checkpoint_path: {path} is not a checkpoint that torch can read "
            f"({type(problem).__name__}); is it complete, or an HTML or LFS page?"
        ) from None
    weights = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in weights.values()
    ):
        raise UserError(
            f"model.checkpoint_path: {path} does not hold {{'model': state_dict}} as SAM 2's do"
        )
    of_run = {"model", "base", "config", "step"} <= content.keys()
    return dict(weights), _read_untrained_rows(content, path), of_run


def is_safetensors(path: Path) -> bool:
    """Whether a file is one of safetensors: its header, in JSON, comes after 8 bytes of length."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The content as a file of torch has it: `model`, and `untrained_rows` where it names them."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = list(file.keys())
        content: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in names}}
        if rows := (file.metadata() or {}).get("untrained_rows"):
            content["untrained_rows"] = json.loads(rows)
    return content


def pin_of(path: Path) -> Path:
    """Where the sha256 of a downloaded file is kept, as `sha256sum` writes and checks it."""
    return path.with_name(path.name + ".sha256")


def _check_pinned(path: Path) -> None:
    """Raise UserError where a file is not the one that was verified after its download."""
    pin = pin_of(path)
    if not pin.is_file():
        return
    expected, found = pin.read_text(encoding="utf-8", errors="replace")[:64], file_hash(path)
    if expected != found:
        raise UserError(
            f"{path} is not the file that was downloaded and verified: its sha256 is {found}, and "
            f"{pin} has {printable(expected)}. Delete both and fetch it again with --download; if "
            "you put another file there on purpose, delete the second"
        )


def _read_untrained_rows(content: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    import torch

    rows = content["model"].get("maskmem_tpos_enc")
    if rows is None:
        return ()
    if "untrained_rows" not in content:
        values = rows.to(torch.float16).contiguous().numpy().tobytes()
        return _KNOWN_UNTRAINED.get(hashlib.sha256(values).hexdigest(), ())
    listed = content["untrained_rows"]
    known = range(len(rows))
    if not isinstance(listed, list | tuple) or any(row not in known for row in listed):
        raise UserError(
            f"model.checkpoint_path: {path} has untrained_rows {listed!r}; expected a list of row "
            f"numbers of maskmem_tpos_enc, which has {len(rows)} rows; export it again"
        )
    return tuple(sorted(listed))


def fit_temporal_rows(rows: torch.Tensor, num_maskmem: int, fresh: torch.Tensor) -> torch.Tensor:
    """(num_maskmem, ...) temporal encodings out of a checkpoint's (K, ...).

    Row r belongs to the memory r + 1 frames back, the last row to every conditioning frame: the
    last row stays last, the nearest frames keep theirs, and rows for frames farther back than the
    checkpoint knew start as copies of its farthest.

    Args:
        rows: (K, 1, 1, C) of the checkpoint.
        fresh: (num_maskmem, 1, 1, C) to take where the checkpoint has nothing to copy.
    """
    import torch

    if len(rows) == num_maskmem:
        return rows
    if num_maskmem == 0 or len(rows) == 0:
        return fresh.clone()
    kept = rows[: min(len(rows), num_maskmem) - 1]
    missing = num_maskmem - 1 - len(kept)
    if missing and len(kept):
        added = kept[-1:].expand(missing, *rows.shape[1:])
    else:
        added = fresh[len(kept) : len(kept) + missing].to(rows.dtype)
    return torch.cat([kept, added, rows[-1:]])


def fit_untrained_rows(untrained: Sequence[int], before: int, after: int) -> dict[int, str]:
    """Rows of `fit_temporal_rows` that no training has reached -> where their values come from.

    Args:
        untrained: such rows among the `before` rows of the checkpoint.
        before, after: num_maskmem of the checkpoint and of the model.
    """
    if after == 0:
        return {}
    kept = min(before, after) - 1  # rows 0 to kept - 1 stay where they are
    reasons = {row: "random values of the base" for row in untrained if row < kept}
    if before == 0 or before - 1 in untrained:
        reasons[after - 1] = "random values of the base" if before else "new random values"
    for row in range(max(kept, 0), after - 1):
        reasons[row] = f"copies of row {kept - 1}" if kept > 0 else "new random values"
    return dict(sorted(reasons.items()))


def selects(entry: str, parameter: str, aliases: Mapping[str, str] = MODULES) -> bool:
    """Whether a module name, `memory`, a parameter name or a shell pattern covers a parameter of
    SAM 2."""
    if entry == "memory":
        return any(selects(part, parameter, aliases) for part in MEMORY)
    head, dot, tail = entry.partition(".")
    target = aliases.get(head, head) + dot + tail
    return (
        parameter == target or parameter.startswith(f"{target}.") or fnmatchcase(parameter, target)
    )


def check_names(names: Sequence[str]) -> list[str]:
    """The names that `trainable_modules` lists; UserError for anything but a list of texts."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UserError(
            f"model.trainable_modules: {names!r}; expected a list of names"
            + (f", [{names!r}]" if isinstance(names, str) else ", such as ['memory_attention']")
        )
    if odd := [name for name in names if not isinstance(name, str)]:
        raise UserError(f"model.trainable_modules: {odd[0]!r} is no text; expected names")
    return list(names)


def match_parameters(
    model: nn.Module, wanted: Sequence[str], aliases: Mapping[str, str]
) -> set[str]:
    """Names of the parameters that module names, parameter names or patterns select.

    Raises:
        UserError: an entry that selects nothing, with near names.
    """
    names = [name for name, _ in model.named_parameters()]
    modules = {
        name
        for name, module in model.named_modules()
        if name and next(module.parameters(), None) is not None
    }
    selected: set[str] = set()
    for entry in wanted:
        matched = [name for name in names if selects(entry, name, aliases)]
        if not matched:
            choices = sorted({"memory", *aliases, *modules, *names})
            near = difflib.get_close_matches(entry, choices, n=3, cutoff=0.5)
            top = sorted({"memory", *aliases, *(name for name in names if "." not in name)})
            raise UserError(
                f"model.trainable_modules: {entry!r} matches no parameter; "
                + (f"did you mean {', '.join(near)}? " if near else "")
                + f"Names at the top are {', '.join(top)}"
            )
        selected.update(matched)
    return selected
