"""AdamW with parameter groups, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sam2train.config import Section
from sam2train.errors import UserError
from sam2train.pretrained import selects

if TYPE_CHECKING:
    import torch

_TRUNK = "image_encoder.trunk"


class OptimizerConfig(Section):
    """The `optimizer:` section."""

    learning_rate: float = Field(1e-4, gt=0, description="peak, reached after the warm-up")
    learning_rates: dict[str, float] = Field(
        default_factory=dict,
        description="peaks by module, parameter or pattern; the last match counts",
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="of the learning rate, after the warm-up"
    )
    final_ratio: float = Field(0.1, ge=0, le=1, description="cosine ends at this share of the peak")
    final_learning_rates: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="where the cosine of a module, parameter or pattern ends, instead",
    )
    warmup_steps: int = Field(0, ge=0, description="in which the rate rises linearly to its peak")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of a block of the image encoder's trunk, as a share of that of "
        "the block after it",
    )
    layer_decay_overrides: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="trunk: share of the full learning rate by parameter or pattern, whatever the "
        "layer; the first match counts",
    )
    weight_decay: float = Field(0.1, ge=0, description="of AdamW")
    no_weight_decay: Literal["vectors", "biases_and_layer_norm"] = Field(
        "vectors",
        description="what does not decay: all vectors, or as in SAM 2 biases and torch's LayerNorm",
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="of AdamW: decay of the means of gradients and of their squares"
    )


def build_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    config: OptimizerConfig,
    sam2: torch.nn.Module | None = None,
) -> torch.optim.AdamW:
    """AdamW over parameters grouped by learning rate, its end, and weight decay.

    A group has `peak_lr` and `final_ratio` beside what AdamW reads; see `set_learning_rates`.

    Args:
        parameters: what is trained, by SAM 2's names.
        sam2: the model that they belong to; layers and LayerNorms are looked up in it.

    Raises:
        UserError: a pattern that matches no trained parameter, or a final rate above its peak.
    """
    import torch

    from sam2train.sharding import is_sharded

    for key in ("learning_rates", "final_learning_rates"):
        _check_patterns(key, getattr(config, key), parameters)
    scales = _layer_scales(parameters, config, sam2)
    undecayed = _undecayed(parameters, config, sam2)
    groups: dict[tuple[float, float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        peak, ratio = _peak_and_final_ratio(name, config)
        decay = 0.0 if name in undecayed else config.weight_decay
        groups.setdefault((peak * scales.get(name, 1.0), ratio, decay), []).append(parameter)
    on_cuda = bool(parameters) and all(p.is_cuda for p in parameters.values())
    # Torch takes no sharded parameters together with whole ones: then one after the other.
    mixed = any(map(is_sharded, parameters.values()))
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "lr": peak,
                "peak_lr": peak,
                "final_ratio": ratio,
                "weight_decay": decay,
            }
            for (peak, ratio, decay), members in groups.items()
        ],
        betas=config.betas,
        # One kernel for all parameters, where torch has it for the device.
        fused=True if on_cuda and not mixed else None,
        foreach=False if mixed else None,
    )


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: OptimizerConfig
) -> None:
    """Give every group of `build_optimizer` its learning rate for step `step`, counted from 0."""
    for group in optimizer.param_groups:
        # Groups of a checkpoint from before this key existed all end at the same share.
        ratio = group.get("final_ratio", config.final_ratio)
        group["lr"] = group["peak_lr"] * learning_rate_factor(step, num_steps, config, ratio)


def learning_rate_factor(
    step: int, num_steps: int, config: OptimizerConfig, final_ratio: float | None = None
) -> float:
    """Share of the peak for step `step`, counted from 0: linear warm-up, then the schedule.

    Args:
        final_ratio: where the cosine ends; None takes the config's.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    final_ratio = config.final_ratio if final_ratio is None else final_ratio
    done = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return final_ratio + (1 - final_ratio) * cosine


def _check_patterns(key: str, patterns: Collection[str], names: Collection[str]) -> None:
    unused = [pattern for pattern in patterns if not any(selects(pattern, name) for name in names)]
    if unused:
        raise UserError(
            f"optimizer.{key}: {', '.join(unused)} matches no trained parameter; "
            "expected names or patterns of what model.trainable_modules selects"
        )


def _peak_and_final_ratio(name: str, config: OptimizerConfig) -> tuple[float, float]:
    """The learning rate of a parameter after the warm-up, and the share of it at the end."""
    peak, final = config.learning_rate, None
    for pattern, other in config.learning_rates.items():
        if selects(pattern, name):
            peak = other
    for pattern, other in config.final_learning_rates.items():
        if selects(pattern, name):
            final = other
    if final is None:
        return peak, config.final_ratio
    if final > peak:
        raise UserError(
            f"optimizer.final_learning_rates: {name} would go from {peak:g} up to {final:g}; "
            "expected an end at or below the peak of optimizer.learning_rates"
        )
    return peak, final / peak


def _layer_scales(
    parameters: Mapping[str, torch.nn.Parameter],
    config: OptimizerConfig,
    sam2: torch.nn.Module | None,
) -> dict[str, float]:
    """Share of the full learning rate of each trained parameter of the trunk, as SAM 2's
    `layer_decay_param_modifier` gives it; no entry for 1."""
    if config.layer_decay == 1 and not config.layer_decay_overrides:
        return {}
    trunk_names = [name for name in parameters if name.startswith(f"{_TRUNK}.")]
    _check_patterns("layer_decay_overrides", config.layer_decay_overrides, trunk_names)
    trunk = sam2.get_submodule(_TRUNK)
    last = trunk.get_num_layers() + 1
    scales = {}
    for name in trunk_names:
        scales[name] = config.layer_decay ** (last - trunk.get_layer_id(name))
        for pattern, scale in config.layer_decay_overrides.items():
            if selects(pattern, name):
                scales[name] = scale
                break
    return scales


def _undecayed(
    parameters: Mapping[str, torch.nn.Parameter],
    config: OptimizerConfig,
    sam2: torch.nn.Module | None,
) -> set[str]:
    """Names of the parameters without weight decay."""
    import torch

    if config.no_weight_decay == "vectors":
        # Vectors are biases, gains of norms and layer scales: decay would only shrink them.
        return {name for name, parameter in parameters.items() if parameter.ndim <= 1}
    norms = [
        module_name
        for module_name, module in sam2.named_modules()
        if type(module) is torch.nn.LayerNorm
    ]
    of_norms = {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}
    return {name for name in parameters if "bias" in name or name in of_norms}
