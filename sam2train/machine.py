"""The machine that a run is on: devices, processor cores, versions, signals, the terminal."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sam2train.errors import UserError
from sam2train.files import printable

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "torchvision", "sam2", "numpy", "opencv-python", "pycocotools", "wandb")


def choose_device(name: str) -> torch.device:
    """The device an experiment names; `auto` is CUDA where there is one, else the CPU."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return read_device(name)


def read_device(name: str | torch.device) -> torch.device:
    """The device of this name, whether or not it is there; UserError for no name of one."""
    import torch

    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(
            f"device: {name!r}; expected cpu, cuda, cuda:N, mps, or in an experiment auto"
        ) from None


def check_available(device: torch.device) -> None:
    """UserError for a device that this machine does not have."""
    import torch

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


def describe_environment(device: torch.device) -> dict:
    """What results depend on besides the config: versions, machine, code."""
    import torch

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


class Interrupted(SystemExit):
    """The run was asked to stop and has saved; the code is the shell's for the signal."""


class StopRequests:
    """While open, SIGTERM and Ctrl-C are kept in `received`; a second Ctrl-C aborts."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        def keep(number: int, frame: FrameType | None) -> None:
            if self.received is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.received = number

        try:
            self._before = {n: signal.signal(n, keep) for n in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            self._before = {}  # not in the main thread: signals are somebody else's business
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def interrupted(self) -> Interrupted:
        """What to raise once all is saved."""
        return Interrupted(128 + self.received)


def leave_group(worker: int) -> None:
    """For processes that load data: a signal to the whole group (Ctrl-C, `timeout`, a scheduler)
    must not end them before the run has saved. One to them alone does, as at exit."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a message of one line or more as it is: nothing in it is read as markup or cut."""
    console.print(Text(printable(text, lines=True), style), soft_wrap=True)


def cell(text: object, style: str = "") -> Text:
    """What a table shows of a name or value that comes from a file."""
    return Text(printable(text), style)
