"""The published checkpoints of SAM 2, fetched: `--download`."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam2train.errors import UserError
from sam2train.files import file_hash, printable, resolve_path, write_text
from sam2train.machine import count_bar, say
from sam2train.pretrained import (
    DOWNLOAD_ADDRESS,
    PUBLISHED,
    build_sam2,
    load_weights,
    pin_of,
    resolve_config,
)

if TYPE_CHECKING:
    from rich.console import Console

_TIMEOUT = 30.0  # seconds without a byte
MAX_DOWNLOAD = 4 << 30  # bytes; the largest of the files has 0.9 GB


def fetch_checkpoint(
    checkpoint_path: str | Path | None, config_path: str | Path, console: Console
) -> Path:
    """The file at `checkpoint_path`, downloaded unless it is there, and loaded strictly.

    Meta publishes no checksum, so the first proof of a good file is that its tensors are those of
    the model in `config_path`. Its sha256 is then kept beside it, and every later load checks it. A
    download gets a temporary name, and its own once it has passed.

    Raises:
        UserError: a file that is not published, a failed download, or one that does not load.
    """
    if checkpoint_path is None:
        raise UserError("--download: model.checkpoint_path is null, nothing to fetch")
    target = resolve_path(checkpoint_path)
    if target.is_file():
        _check_loads(target, config_path)
        _pin(target)
        say(console, f"{target} is there, and loads")
        return target
    if target.name not in PUBLISHED:
        raise UserError(
            f"--download: Meta publishes no {target.name}; model.checkpoint_path must end in "
            + ", ".join(PUBLISHED)
        )
    address = DOWNLOAD_ADDRESS + target.name
    partial = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(address, partial, console)
        _check_loads(partial, config_path)
        partial.replace(target)
        _pin(target)
    except (OSError, http.client.HTTPException) as problem:  # no network, no such page, a full disk
        raise UserError(
            f"--download: {address} could not be fetched to {target}: {problem}. Fetch it on a "
            "machine with a network and copy it there"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    say(console, f"{target} is complete, and loads")
    return target


def _pin(path: Path) -> None:
    """Keep the sha256 of a file that has loaded, unless it is known."""
    if not pin_of(path).is_file():
        write_text(pin_of(path), f"{file_hash(path)}  {path.name}\n")


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to https only."""

    def redirect_request(self, request: Any, file: Any, code: int, *rest: Any) -> Any:
        _check_scheme(rest[-1])
        return super().redirect_request(request, file, code, *rest)


_SCHEMES = ("https",)


def _check_scheme(address: str) -> None:
    scheme = urllib.parse.urlsplit(address).scheme
    if scheme not in _SCHEMES:
        raise OSError(f"the address {printable(address)} is not https, and was not followed")


# What an HTTP status means for the user; the first that fits.
_WAYS_OUT = (
    ((401, 403, 407, 451), "a proxy or firewall may be in between: see HTTPS_PROXY"),
    ((404, 410), "the file may have moved: see the README of SAM 2"),
    ((408, 425, 429, *range(500, 600)), "try again later"),
)


def _download(address: str, partial: Path, console: Console) -> None:
    _check_scheme(address)
    opener = urllib.request.build_opener(_NoDowngrade)
    try:
        with (
            opener.open(address, timeout=_TIMEOUT) as reply,
            open(partial, "wb") as file,
            count_bar(console) as progress,
        ):
            told = reply.headers.get("Content-Length") or ""
            size = int(told) if told.isdecimal() else 0
            done = 0
            task = progress.add_task(
                f"MB of {address.rpartition('/')[2]}", total=size / 1e6 or None
            )
            while chunk := reply.read(1 << 20):
                file.write(chunk)
                done += len(chunk)
                if done > MAX_DOWNLOAD:
                    raise OSError(f"more than {MAX_DOWNLOAD:,} bytes came: not one of Meta's files")
                progress.advance(task, len(chunk) / 1e6)
    except urllib.error.HTTPError as problem:
        problem.close()  # it holds the connection
        ways_out = [text for codes, text in _WAYS_OUT if problem.code in codes]
        text = "; ".join([f"the server answers {problem.code} {problem.reason}", *ways_out])
        raise OSError(text) from None
    if size and partial.stat().st_size != size:
        raise OSError(f"the connection ended after {partial.stat().st_size:,} of {size:,} bytes")


def _check_loads(path: Path, config_path: str | Path) -> None:
    # Neither of the two sizes decides about the shape of a weight: rows are fitted on loading.
    load_weights(build_sam2(resolve_config(config_path), image_size=512, num_maskmem=7), path)
