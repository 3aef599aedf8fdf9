"""AdamW with parameter groups, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field

from sam2train.config import Section
from sam2train.errors import UserError
from sam2train.pretrained import selects


class OptimizerConfig(Section):
    """The `optimizer:` section."""

    learning_rate: float = Field(1e-4, gt=0, description="peak, reached after the warm-up")
    learning_rates: dict[str, float] = Field(
        default_factory=dict,
        description="peaks by module, parameter or pattern; the last match counts",
    )
    schedule: Literal["cosine", "constant"] = "cosine"
    final_ratio: float = Field(0.1, ge=0, le=1, description="cosine ends at this share of the peak")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0, description="not applied to biases and norms")
    betas: tuple[float, float] = (0.9, 0.999)


def build_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW over parameters grouped by learning rate and weight decay.

    Raises:
        UserError: a pattern of `learning_rates` that matches no trained parameter.
    """
    unused = [
        pattern
        for pattern in config.learning_rates
        if not any(selects(pattern, name) for name in parameters)
    ]
    if unused:
        raise UserError(
            f"optimizer.learning_rates: {', '.join(unused)} matches no trained parameter; "
            "expected names or patterns of what model.trainable_modules selects"
        )
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        peak = config.learning_rate
        for pattern, other in config.learning_rates.items():
            if selects(pattern, name):
                peak = other
        # Vectors are biases and norm gains: decay would only shrink them.
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": peak, "peak_lr": peak, "weight_decay": decay}
            for (peak, decay), members in groups.items()
        ],
        betas=config.betas,
    )


def learning_rate_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak for step `step`, counted from 0: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return config.final_ratio + (1 - config.final_ratio) * cosine
