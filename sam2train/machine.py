"""The machine that a run is on: devices, processor cores, versions, signals, the terminal."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from contextvars import ContextVar
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from sam2train import distributed
from sam2train.errors import MachineFault, UserError
from sam2train.files import printable

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress, Task
    from rich.text import Text

Item = TypeVar("Item")
_PACKAGES = ("torch", "torchvision", "sam2", "numpy", "opencv-python", "pycocotools", "wandb")


def choose_device(name: str) -> torch.device:
    """The device an experiment names; `auto` is CUDA where there is one, else the CPU. Under
    `torchrun` each process of a node has the GPU of its number."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = read_device(name)
    if device.type != "cuda" or distributed.local_rank() is None:
        return device
    if device.index is not None and distributed.num_local() > 1:
        raise UserError(
            f"trainer.device: {name} is one GPU, and torchrun started {distributed.num_local()} "
            "processes here; with `cuda` or `auto` each has its own"
        )
    return torch.device("cuda", distributed.local_rank() if device.index is None else device.index)


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


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32 ones, in hardware: of CPUs
    those with AMX or AVX512-BF16."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # another system than Linux
        return False
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(text.split())


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
        "processes": distributed.num_processes(),
        "code": code,
    }


class Interrupted(SystemExit):
    """The run was asked to stop and has saved; the code is the shell's for the signal."""


# What asks a process to end: job schedulers, Ctrl-C, a terminal that is closed, and what SLURM
# sends with --signal=USR1@60, a minute before the time is up.
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)
# Seconds: `timeout` sends its signal to the process and to its group, which is one request.
_ONE_REQUEST = 0.3


class StopRequests:
    """While open, a signal that asks for an end is kept in `received`; the second ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._when = 0.0
        self._waiting = False
        self._own = False  # whether this process got a signal
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        self._before = _handle(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._before)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if not self._own:
            self._own, self._when = True, time.monotonic()
            self.heed(number)
            if distributed.is_main():
                name = signal.Signals(number).name
                with contextlib.suppress(OSError):
                    os.write(2, f"{name}: saving first; a second signal ends at once\n".encode())
        elif time.monotonic() - self._when > _ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self._waiting:
            raise self.interrupted()

    def heed(self, number: int) -> None:
        """Take over a signal that another process of the job got, unless there is one already."""
        if self.received is None:
            self.received = number

    @contextlib.contextmanager
    def while_waiting(self) -> Iterator[None]:
        """For a block that only waits: a signal, also one from before, ends it with Interrupted."""
        try:
            self._waiting = True
            if self.received is not None:
                raise self.interrupted()
            yield
        finally:
            self._waiting = False

    def interrupted(self) -> Interrupted:
        """What to raise once all is saved."""
        return Interrupted(128 + self.received)


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Let the signals that ask for an end raise Interrupted, and Ctrl-C KeyboardInterrupt.

    Yields the signals that came: they are raised in the middle of anything, and a library may make
    another error of them.
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(128 + number)

    before = _handle(stop)
    try:
        yield came
    finally:
        _restore(before)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, object]:
    """Let the handler have the signals that ask for an end; returns those of before. None outside
    the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # `nohup` lets a process ignore the end of its terminal, and that stays so.
    hung_up = getattr(signal, "SIGHUP", None)
    ignored = hung_up is not None and signal.getsignal(hung_up) == signal.SIG_IGN
    numbers = [n for n in STOP_SIGNALS if n != hung_up or not ignored]
    return {number: signal.signal(number, handler) for number in numbers}


def _restore(before: Mapping[int, object]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def time_limit(seconds: float, text: Callable[[], str]) -> Iterator[None]:
    """Raise MachineFault with the text where the block takes longer, such as on a network disk that
    does not answer. Inside another such block, that one's limit holds; outside the main thread and
    on Windows there is none."""
    here = hasattr(signal, "setitimer")
    here = here and threading.current_thread() is threading.main_thread()
    if not here or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def give_up(number: int, frame: FrameType | None) -> None:
        raise MachineFault(text())

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Aside:
    """A thread that does one piece of work after the other while this one goes on: it decodes the
    next frames, and measures those before. Results come in order, errors with them.

    Args:
        most: pieces that may wait, so that a video of any length takes no more memory.
        seconds: that a piece may take.
    """

    def __init__(self, most: int, seconds: float):
        self.waiting: deque[futures.Future] = deque()
        self._most, self._seconds, self._tasks = most, seconds, SimpleQueue()
        # Not one that Python waits for at its end: a disk that does not answer would hold it up.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Aside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for task in self.waiting:
            task.cancel()
        self._tasks.put(None)
        self._thread.join(self._seconds)

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= self._most

    def do(self, work: Callable[[], Any]) -> None:
        task: futures.Future = futures.Future()
        self.waiting.append(task)
        self._tasks.put((task, work))

    def next_result(self) -> Any:
        """Of the work that was given first; MachineFault where that takes too long."""
        try:
            return self.waiting.popleft().result(self._seconds)
        except futures.TimeoutError:
            raise MachineFault(
                f"a frame was not read or measured after {self._seconds:g} s; does the disk with "
                "the data answer?"
            ) from None

    def _run(self) -> None:
        while (given := self._tasks.get()) is not None:
            task, work = given
            if task.set_running_or_notify_cancel():
                try:
                    task.set_result(work())
                except BaseException as error:
                    task.set_exception(error)


def leave_group(worker: int) -> None:
    """For processes that load data: a signal to the whole group (Ctrl-C, `timeout`, a scheduler)
    must not end them before the run has saved. SIGTERM to them alone does, as at exit; the others,
    which a scheduler may send to each process of a job, do not."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


_PIPED_WIDTH = 200  # columns: nothing that is searched for is broken, as in rich's 80


def plain_console(*, quiet: bool) -> Console:
    """A console that raises where its pipe is closed: rich would end the program."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    told = (sys.stdout is not None and sys.stdout.isatty()) or "COLUMNS" in os.environ
    return PlainConsole(quiet=quiet, width=None if told else _PIPED_WIDTH)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a message of one line or more: nothing in it is read as markup or cut. On a terminal
    its lines break between words."""
    from rich.text import Text  # not at the top: --help answers at once

    text = printable(text, lines=True)
    if console.is_terminal:
        text = wrap_lines(text, console.width)
    console.print(Text(text, style), soft_wrap=True)


def wrap_lines(text: str, width: int) -> str:
    """The text with its lines broken between words where they are longer than `width`. Indented
    lines stay whole: they are commands and paths, which are copied."""

    def wrap(line: str) -> str:
        if not line.strip() or line[0].isspace():
            return line
        return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)

    return "\n".join(wrap(line) for line in text.split("\n"))


def cell(text: object, style: str = "") -> Text:
    """What a table shows of a name or value that comes from a file."""
    from rich.text import Text

    return Text(printable(text), style)


_BETWEEN_LINES = 30.0  # seconds between two lines of progress in a file


def count_bar(console: Console) -> Progress:
    """A bar with how many are done of how many, which goes away at its end; on a console that is no
    terminal a line now and then."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    class CountBar(Progress):
        told = time.monotonic()

        def update(self, task_id: Any, **changes: Any) -> None:
            super().update(task_id, **changes)
            self._tell(task_id)

        def advance(self, task_id: Any, advance: float = 1) -> None:
            super().advance(task_id, advance)
            self._tell(task_id)

        def _tell(self, task_id: Any) -> None:
            """A line of the task, where no bar shows it and enough time has passed."""
            if self.disable and time.monotonic() - self.told >= _BETWEEN_LINES:
                self.told = time.monotonic()
                say(console, count_text(next(t for t in self.tasks if t.id == task_id)))

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None))
    columns += (MofNCompleteColumn(), TimeRemainingColumn())
    return CountBar(*columns, console=console, transient=True, disable=not console.is_terminal)


def count_text(task: Task) -> str:
    """What is counted, how many are done of how many, and the time left where it is known."""
    text = f"{task.description}: {task.completed:.0f}"
    text += "" if task.total is None else f"/{task.total:.0f}"
    left = task.time_remaining
    return text if left is None else f"{text}  {timedelta(seconds=round(left))} left"


_watcher: ContextVar[tuple[Progress, str] | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watching(console: Console | None, what: str) -> Iterator[None]:
    """Show a bar for each `watched` in the block, under the name `what`; None shows nothing."""
    if console is None:
        yield
        return
    with count_bar(console) as bar:
        task = bar.add_task(what, total=None)
        before = _watcher.set((bar, what))
        try:
            yield
        finally:
            _watcher.reset(before)
            bar.remove_task(task)


def watched(items: Iterable[Item], what: str, number: int) -> Iterator[Item]:
    """The items, counted on the bar of the block of `watching` that this is in, if there is one.

    A reader of data does not know who waits for it, and how its items are counted is no part of its
    result: so the bar comes from around it and not as an argument.
    """
    watcher = _watcher.get()
    if watcher is None:
        yield from items
        return
    bar, name = watcher
    task = bar.add_task(f"{name}: {what}", total=number)
    try:
        for item in items:
            yield item
            bar.advance(task)
    finally:
        bar.remove_task(task)
