"""What a result depends on besides its settings."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "torchvision", "sam2", "numpy", "opencv-python", "pycocotools", "wandb")


def describe_environment(device: torch.device) -> dict:
    """What results depend on besides the config: versions, machine, code."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    try:
        here = Path(__file__).resolve().parent
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        code = {"commit": commit.stdout.strip() or None, "changed": bool(dirty.stdout.strip())}
    except FileNotFoundError:
        code = {"commit": None, "changed": None}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "code": code,
    }
