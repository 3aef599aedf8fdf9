"""The processes of a sweep: what forks its trials, and which of several sweeps runs which trial.

Trials are forked from a process that has imported what each of them imports: each then begins with
its work at once.

Which process runs a trial, on one host or on many, is said by files in the sweep's folder, made and
renamed in one step of the file system; no other server is needed. A claim is held by a lock of the
operating system, which a trial's process keeps beside the sweep's, and by a file whose time is
renewed. Where a lock does not reach other hosts, the file does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sam2train.errors import UserError
from sam2train.files import REPOSITORY
from sam2train.machine import STOP_SIGNALS

# What every trial imports, and what it imports when it begins to work.
PRELOADED = (
    *("sam2train.training_run", "sam2train.commands", "pycocotools.mask", "safetensors.torch"),
    *("torch._dynamo", "torchvision.transforms.v2", "pandas", "scipy.stats", "wandb"),
    *("hydra.utils", "omegaconf", "sam2.modeling.sam2_base", "sam2.modeling.sam.transformer"),
    *("sam2.modeling.memory_attention", "sam2.modeling.memory_encoder"),
    *("sam2.modeling.backbones.image_encoder", "sam2.modeling.backbones.hieradet"),
)


class ForkedProcess:
    """A process that a `ForkServer` made, with what `subprocess.Popen` offers of it.

    Args:
        status: the end of a pipe through which the server tells its number, and how it ended.
    """

    def __init__(self, status: int):
        self._status, self._heard = status, b""
        self.returncode: int | None = None

    @property
    def pid(self) -> int | None:
        """None where the server has ended before it made the process."""
        while b"\n" not in self._heard and self.returncode is None:  # it may still import
            self._listen(None)
        return int(self._heard.split(b"\n")[0]) if b"\n" in self._heard else None

    def poll(self) -> int | None:
        self._listen(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired("a trial", timeout)
            self._listen(left)
        return self.returncode

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None and (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _listen(self, timeout: float | None) -> None:
        """Hear what the server has told, within so many seconds; None waits for a word."""
        if self.returncode is not None or not select.select([self._status], [], [], timeout)[0]:
            return
        word = os.read(self._status, 64)
        self._heard += word
        told = self._heard.split(b"\n")
        if len(told) > 2:
            self.returncode = int(told[1])
        elif not word:  # the server is gone, and nobody knows how the process ends
            self.returncode = -signal.SIGKILL
        if self.returncode is not None:
            os.close(self._status)


class ForkServer:
    """A process that has imported what trials import, and forks each of them.

    It computes nothing itself: threads of torch and OpenCV do not survive a fork. A trial that
    crashes ends alone; a signal to the whole job reaches the trials, and the server ignores it.

    Args:
        environment: of the server, with the number of threads that libraries read when they load.
    """

    def __init__(self, environment: Mapping[str, str]):
        self._socket, other = socket.socketpair()
        code = f"from {__name__} import serve; serve({other.fileno()}, {PRELOADED!r})"
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**environment, "PYTHONPATH": _python_path(environment)},
                pass_fds=(other.fileno(),),
            )

    def start(
        self, words: Sequence[str], environment: Mapping[str, str], output: int, kept: Sequence[int]
    ) -> ForkedProcess:
        """Start `python PROGRAM ...` in the current folder, in a session of its own.

        Args:
            output: file descriptor of what it prints.
            kept: further ones that it keeps open.

        Raises:
            OSError: the program does not exist, or the server is gone.
        """
        Path(words[1]).stat()
        ours, theirs = os.pipe()
        content = {"words": list(words), "environment": dict(environment), "folder": os.getcwd()}
        message = json.dumps(content).encode()
        try:
            descriptors = [theirs, output, *kept]
            socket.send_fds(self._socket, [f"{len(message):08d}".encode()], descriptors)
            self._socket.sendall(message)
        finally:
            os.close(theirs)
        return ForkedProcess(ours)

    def close(self) -> None:
        """End the server. Trials that still run go on."""
        self._socket.close()
        self._process.wait()


def _python_path(environment: Mapping[str, str]) -> str:
    return os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))


def serve(place: int, modules: Sequence[str]) -> None:
    """The work of a `ForkServer`: import, then fork a process for each request until the socket
    closes; in that process, run its program. `place` is the file descriptor of the socket."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    for name in modules:
        with contextlib.suppress(ImportError):  # the trial that needs it says so
            importlib.import_module(name)
    gc.freeze()  # what was imported is not looked through again, and stays shared
    words = _fork_trials(socket.socket(fileno=place))
    if words is not None:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        sys.argv = words[1:]
        sys.path[0] = str(Path(words[1]).resolve().parent)
        runpy.run_path(words[1], run_name="__main__")


def _fork_trials(requests: socket.socket) -> list[str] | None:
    """Returns the words of its program in a process that was forked, None in the server's own when
    nobody is left to ask."""
    running: dict[int, int] = {}  # process -> where to tell how it ended
    while True:
        asked = select.select([requests], [], [], 0.05)[0]
        if asked:
            size, descriptors = _receive(requests)
            if not size:
                return None
            message = b""
            while len(message) < size and (part := requests.recv(size - len(message))):
                message += part
            status, output, *kept = descriptors
            # A signal to the new process waits until it has handlers: it begins without, and would
            # ignore what the server ignores.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of threads: those of libraries sleep
                child = os.fork()
            if child == 0:
                requests.close()
                for other in (status, *running.values()):
                    os.close(other)
                return _become(json.loads(message), output)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            running[child] = status
            with contextlib.suppress(BrokenPipeError):  # the sweep was killed
                os.write(status, f"{child}\n".encode())
            for descriptor in (output, *kept):
                os.close(descriptor)
        while running:
            child, code = os.waitpid(-1, os.WNOHANG)
            if not child:
                break
            with contextlib.suppress(BrokenPipeError):
                os.write(running[child], f"{os.waitstatus_to_exitcode(code)}\n".encode())
            os.close(running.pop(child))


def _receive(requests: socket.socket) -> tuple[int, list[int]]:
    """The length of the next request, 0 at the end, and the file descriptors that come with it."""
    word, descriptors, _, _ = socket.recv_fds(requests, 8, 16)
    return int(word or b"0"), list(descriptors)


def _become(request: Mapping[str, Any], output: int) -> list[str]:
    """Make this process what `subprocess.Popen` would have made it. Returns the words to run."""
    os.setsid()
    for place in (1, 2):
        os.dup2(output, place)
    os.close(output)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    return request["words"]


# Claims

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
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # flock's error and that of Windows
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
