"""Exceptions for a user's mistake and a machine's fault, and the message for each kind of fault: a
full disk, no memory, a folder that is gone. Any other exception is a bug in this program."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake that the user can correct. The message gives path, value, expectation and a way
    out.

    `run.py` prints the message without a traceback and exits with code 2.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: in a notebook the message is enough, too."""
        return [f"error: {self}"]


class MachineFault(RuntimeError):
    """A fault of the machine, such as a process that it ended. The message gives a way out.

    `run.py` prints the message without a traceback and exits with code 1.
    """


def add_note(error: BaseException, note: str) -> None:
    """`error.add_note` of Python 3.11; 3.10 keeps the note and shows it in no traceback."""
    error.__notes__ = [*getattr(error, "__notes__", []), note]


# Faults of the machine

_GO_ON = "What a run has saved stays; --resume goes on with it"
# What lowers memory, the most effective first.
_LOWERS = (
    "dataset.batch_size",
    "dataset.video_clip_length",
    "model.image_size",
    "dataset.max_objects",
    "trainer.bf16",
)
_LOWERS_HOST = ("dataset.num_workers", "dataset.mask_cache_mb", "trainer.grad_accumulation")
_LOWERS_WORKERS = ("dataset.num_workers", "dataset.mask_cache_mb", "dataset.batch_size")
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "insufficient memory",
    "failed to allocate",
    "cudaerrormemoryallocation",
    "alloc_failed",
    "can't start new thread",  # its stack takes 8 MB; `ulimit -u` may be the reason, too
)


def explain(error: BaseException, settings: Callable[[], Mapping[str, Any]] = dict) -> str | None:
    """The message of a fault of the machine, with a way out; None for any other error, which is a
    bug in this program.

    Args:
        settings: gives the experiment's values by dotted name; asked where memory ran out.
    """
    if isinstance(error, MachineFault | FloatingPointError):
        return str(error)
    if text := worker_ended(error, settings):
        return text
    if place := _no_memory(error):
        return _explain_memory(error, place, settings)
    if isinstance(error, OSError):
        return _explain_files(error)
    return None


def worker_ended(
    error: BaseException | None, settings: Callable[[], Mapping[str, Any]] = dict
) -> str | None:
    """The message where a process that loads data ended; None for any other error.

    torch raises it in the middle of whatever the run does then, such as an import, which may make
    another error of it.
    """
    while error is not None and "DataLoader worker" not in str(error):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    first = str(error).splitlines()[0].rstrip(". ")
    return (
        f"a process that loads data ended ({first}). Out of memory is the usual cause: "
        f"{_now(_LOWERS_WORKERS, settings)} take less\n{_GO_ON}"
    )


def _now(names: Sequence[str], settings: Callable[[], Mapping[str, Any]]) -> str:
    """Settings, as far as known with their values."""
    try:
        known = settings()
    except Exception:  # the fault is what must be told
        known = {}
    now = ", ".join(f"{name}={known[name]}" for name in names if name in known)
    return f"lower values of {', '.join(names)}" + (f" (now {now})" if now else "")


def _no_memory(error: BaseException) -> str | None:
    """Whose memory ran out, if that is what the error is."""
    text = str(error).lower()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "the GPU"
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return "this machine"
    # Without memory torch and OpenCV raise RuntimeError or a type of their own.
    if not isinstance(error, OSError) and any(words in text for words in _NO_MEMORY):
        return "the GPU" if "cuda" in text or "cublas" in text else "this machine"
    return None


def _explain_memory(
    error: BaseException, place: str, settings: Callable[[], Mapping[str, Any]]
) -> str:
    names = _LOWERS + (() if place == "the GPU" else _LOWERS_HOST)
    try:
        known = settings()
    except Exception:  # the fault matters more than this error
        known = {}
    now = ", ".join(f"{name}={known[name]}" for name in names if name in known)
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    return (
        f"out of memory on {place}: {first}\n"
        f"these settings lower it, the first ones most; now they are: {now or ', '.join(names)}\n"
        "the same command with --probe measures which fit\n"
        f"{_GO_ON}"
    )


def _explain_files(error: OSError) -> str:
    where = f"{os.fspath(error.filename)}: " if isinstance(error.filename, str) else ""
    reason = error.strerror or str(error) or type(error).__name__
    ways_out = {
        errno.ENOSPC: f"the disk is full{_free(error.filename)}; make room"
        if where
        else "a disk or /dev/shm is full, where processes that load data keep locks and batches: "
        "make room there (docker run --shm-size), or set dataset.num_workers=0",
        errno.EDQUOT: "your quota of this disk is used up; free some",
        errno.EROFS: "this disk can only be read; name another folder with --run-dir",
        errno.EACCES: "you may not do that there; change the permissions or name another folder",
        errno.EPERM: "you may not do that there; change the permissions or name another folder",
        errno.ENOENT: "it does not exist; was the folder removed during the run?",
        errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`, or lower "
        "dataset.num_workers",
        errno.EFBIG: "files may not be that large here; see `ulimit -f`",
        errno.EIO: "the disk cannot be read or written; look at the system's log",
    }
    text = ways_out.get(error.errno, "")
    return f"{where}{reason}{'; ' * bool(text)}{text}. {_GO_ON}"


def _free(filename: Any) -> str:
    folders = [*Path(filename).absolute().parents] if isinstance(filename, str) else []
    for folder in folders:
        if folder.exists():
            free = shutil.disk_usage(folder).free / 1e6
            return f" ({free:,.0f} MB are free now, without the part that was written)"
    return ""
