"""Which of several processes, on one host or on many, runs a trial of a sweep: files in the sweep's
folder say so, made and renamed in one step of the file system. No server is needed.

A claim is held by a lock of the operating system, which a trial's process keeps beside the sweep's,
and by a file whose time is renewed. Where a lock does not reach other hosts, the file does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sam2train.errors import UserError

CLAIMS = ".claims"  # the folder of these files in that of a sweep
STALE = 120.0  # seconds: a claim of another host that was not renewed for so long is of a dead one
RENEW = 10.0  # seconds between renewals
PATIENCE = STALE + 30.0  # seconds to wait for another process that writes the record


@dataclass
class Claim:
    """A trial that this process runs."""

    path: Path
    word: str  # in the file; nobody else wrote it
    lock: IO[str]
    renewed: float

    def renew(self) -> bool:
        """Keep the claim. False where another process took it, because this one slept for long."""
        if time.monotonic() - self.renewed < RENEW:
            return True
        self.renewed = time.monotonic()
        try:
            os.utime(self.path)
            return self.path.read_text() == self.word
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let another process have the trial."""
        with contextlib.suppress(OSError):
            if self.path.read_text() == self.word:
                self.path.unlink()
        self.lock.close()


def claim_trial(folder: Path, name: str) -> Claim | None:
    """Claim a trial of the sweep in a folder for this process; None where another one has it."""
    place = folder / CLAIMS
    place.mkdir(parents=True, exist_ok=True)
    lock = (place / f"{name}.lock").open("w")
    if not _lock(lock):
        lock.close()
        return None
    path = place / name
    word = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
    if path.exists() and _is_stale(path):
        # One of several that see this renames it; a claim that a faster one made is put back.
        aside = place / f"{name}.{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, aside)
            if not _is_stale(aside):
                with contextlib.suppress(FileExistsError):
                    os.link(aside, path)
            aside.unlink()
    if not _create(path, word):
        lock.close()
        return None
    return Claim(path, word, lock, time.monotonic())


def is_claimed(folder: Path, name: str) -> bool:
    """Whether a process that seems to be alive has claimed a trial."""
    path = folder / CLAIMS / name
    if not path.exists():
        return False
    with path.with_name(f"{name}.lock").open("a") as lock, contextlib.suppress(FileNotFoundError):
        return not _lock(lock) or not _is_stale(path)
    return False


@contextlib.contextmanager
def record_lock(folder: Path) -> Iterator[None]:
    """While open, no other process writes the record of the sweep in a folder.

    Raises:
        UserError: another one does not let go of it.
    """
    place = folder / CLAIMS
    place.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE
    while (held := claim_trial(folder, "record")) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"{place / 'record'}: another process has been writing there for "
                f"{PATIENCE:g} s; end it, or delete this file where none is"
            )
        time.sleep(0.02)
    try:
        yield
    finally:
        held.release()


def _lock(file: IO[str]) -> bool:
    """Whether this process got the lock; True, too, where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system: the claim's time decides
        return True
    return True


def _create(path: Path, word: str) -> bool:
    """Make a file with its content in one step; False where it is there."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    draft.write_text(word)
    try:
        os.link(draft, path)  # as O_EXCL, also on old NFS
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _is_stale(path: Path) -> bool:
    """Whether the process of a claim is gone, for one that holds the lock. On this host the lock
    tells: that process keeps it, or its trial does, as long as either lives."""
    host, *_ = path.read_text().split(" ")
    return host == socket.gethostname() or _file_time(path.parent) - path.stat().st_mtime > STALE


def _file_time(folder: Path) -> float:
    """The time of the clock that gives files theirs, which may be a server's."""
    probe = folder / f"clock.{secrets.token_hex(4)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()
