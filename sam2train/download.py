"""Fetches the SAM 2 checkpoint that an experiment starts from, where Meta publishes it."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress

from sam2train import pretrained
from sam2train.errors import UserError
from sam2train.files import resolve_path
from sam2train.machine import say

if TYPE_CHECKING:
    from rich.console import Console

    from sam2train.model import ModelConfig

TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20


def fetch_checkpoint(config: ModelConfig, console: Console) -> Path:
    """The file at `model.checkpoint_path`, downloaded unless it is there, and loaded strictly.

    Meta publishes no checksum, so the proof of a good file is that its tensors are the model's. It
    comes under a temporary name and gets its own once it has passed.

    Raises:
        UserError: a file that is not published, a failed download, or one that does not load.
    """
    if config.checkpoint_path is None:
        raise UserError("--download: model.checkpoint_path is null, nothing to fetch")
    target = resolve_path(config.checkpoint_path)
    if target.is_file():
        _verify(config, target)
        say(console, f"{target} is there, and loads")
        return target
    if target.name not in pretrained.PUBLISHED:
        raise UserError(
            f"--download: Meta publishes no {target.name}; model.checkpoint_path must end in "
            + ", ".join(pretrained.PUBLISHED)
        )
    address = pretrained.DOWNLOAD_ADDRESS + target.name
    partial = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(address, partial, console)
        _verify(config, partial)
        partial.replace(target)
    except (OSError, urllib.error.URLError) as problem:  # no network, no such page, a full disk
        raise UserError(
            f"--download: {address} could not be fetched to {target}: {problem}. Fetch it on a "
            "machine with a network and copy it there"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    say(console, f"{target} is complete, and loads")
    return target


def _download(address: str, partial: Path, console: Console) -> None:
    try:
        _stream(address, partial, console)
    except urllib.error.HTTPError as problem:
        problem.close()  # it holds the connection
        raise OSError(f"the server answers {problem.code} {problem.reason}") from None


def _stream(address: str, partial: Path, console: Console) -> None:
    with urllib.request.urlopen(address, timeout=TIMEOUT) as reply, open(partial, "wb") as file:
        size = int(reply.headers.get("Content-Length") or 0)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(address, total=size or None)
            while chunk := reply.read(_CHUNK):
                file.write(chunk)
                progress.advance(task, len(chunk))
    if size and partial.stat().st_size != size:
        raise OSError(f"the connection ended after {partial.stat().st_size:,} of {size:,} bytes")


def _verify(config: ModelConfig, path: Path) -> None:
    sam2 = pretrained.build_sam2(
        pretrained.resolve_config(config.config_path),
        image_size=config.image_size,
        num_maskmem=config.num_maskmem,
    )
    pretrained.load_weights(sam2, path)
