"""What there is to compute on: devices by name, processor cores."""

from __future__ import annotations

import os

import torch

from sam2train.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device an experiment names; `auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return read_device(name)


def read_device(name: str | torch.device) -> torch.device:
    """The device of this name, whether or not it is there; UserError for no name of one."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(
            f"device: {name!r}; expected cpu, cuda, cuda:N, mps, or in an experiment auto"
        ) from None


def check_available(device: torch.device) -> None:
    """UserError for a device that this machine does not have."""
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise UserError(
            f"device: {device} is not available here; use `cpu` (or `auto` in an experiment)"
        )


def num_cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
