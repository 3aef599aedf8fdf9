"""The processes of one job, as `torchrun` starts them: who this one is, what all do together.

Where there is one process, each function answers for it alone and sends nothing. Counts, texts and
rows travel between the CPUs (gloo), so that no device waits for them; gradients and losses where
they are (nccl on CUDA).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sam2train.errors import MachineFault, UserError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

# Elements of gradients that travel at once: 128 MB in float32.
BUCKET = 1 << 25
# A process may wait for another that scores a long video. One that died is noticed at once: its
# connections close, or `_Watch` misses it.
TIMEOUT = timedelta(hours=6)
BEAT = 1.0  # seconds between signs of life
# Seconds without one. A guess: reading a large JSON keeps a process from giving any for some.
SILENCE = 60.0
# Seconds that a process has to end by itself after another one failed.
GRACE = 10.0


def is_launched() -> bool:
    """Whether `torchrun` started this process."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys()


def is_restarted() -> bool:
    """Whether `torchrun` has started the processes of this job before."""
    return _attempt > 0


def rank() -> int:
    """The number of this process, from 0, over all nodes."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int | None:
    """The number of this process on its node, from 0; None without `torchrun`."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else None


def num_local() -> int:
    """How many processes of the job are on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_launched() else 1


def is_main() -> bool:
    """Whether this is the process that writes files, prints and asks W&B."""
    return rank() == 0


def num_processes() -> int:
    """How many processes work together: 1 until they have met (`joined`)."""
    group = _group()
    return group.get_world_size() if group else 1


def _group() -> Any:
    """`torch.distributed` where the processes have met and are several."""
    found = sys.modules.get("torch.distributed")
    if found is None or not found.is_available() or not found.is_initialized():
        return None
    return found if found.get_world_size() > 1 else None


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Let the processes that `torchrun` started work together; nothing without it."""
    if not is_launched():
        yield
        return
    import torch
    import torch.distributed as dist

    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(_meet(store, number, count), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _lost_process():
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=number,
            world_size=count,
            timeout=TIMEOUT,
        )
    watch = _Watch(dist.PrefixStore("watch", store.clone()), number, count)
    try:
        yield
        wait_for_all()
    except BaseException as error:
        # The group is left as it is: what it waits for may never come.
        watch.close(failed=not isinstance(error, SystemExit))
        raise
    watch.close(failed=False)
    dist.destroy_process_group()


_attempt = 0


def _meet(store: Any, number: int, count: int) -> str:
    """A name of its own for this attempt of the job, the same in all processes.

    The store outlives the processes that `torchrun` starts again, and so do addresses of dead ones
    in it. TORCHELASTIC_RESTART_COUNT is no name: it counts the restarts of one node. So each
    process asks by a word that nobody used before, and the main process answers.
    """
    global _attempt
    if number:
        word = secrets.token_hex(8)
        store.set(f"asks/{number}", word)
        name = store.get(f"answer/{word}").decode()
        store.set(f"{name}/heard/{number}", "1")
    else:
        name = f"attempt_{store.add('attempts', 1) - 1}"
        waiting = set(range(1, count))
        while waiting:
            for other in sorted(waiting):
                if store.check([f"asks/{other}"]):
                    store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
                if store.check([f"{name}/heard/{other}"]):
                    waiting.discard(other)
            time.sleep(0.02)
    _attempt = int(name.removeprefix("attempt_"))
    return name


# -- what all processes know together -------------------------------------------------------------


@contextlib.contextmanager
def _lost_process() -> Iterator[None]:
    """Name the usual reason where the others cannot be reached."""
    try:
        yield
    except RuntimeError as problem:
        first = (str(problem).splitlines() or [""])[0]
        raise MachineFault(
            f"process {rank()} lost the others ({first:.200}): one of them ended, and its message "
            "says why"
        ) from problem


def sum_over_processes(values: Sequence[int]) -> list[int]:
    """Whole numbers, each added up over all processes."""
    return _reduce(values, "SUM")


def _reduce(values: Sequence[int], how: str) -> list[int]:
    group = _group()
    if group is None:
        return list(values)
    import torch

    tensor = torch.tensor(values, dtype=torch.int64)
    with _lost_process():
        group.all_reduce(tensor, getattr(group.ReduceOp, how))
    return tensor.tolist()


def wait_for_all() -> None:
    """Return once all processes are here."""
    _reduce([0], "SUM")


def gather(value: Value) -> list[Value]:
    """What each process has, in their order, for all of them."""
    group = _group()
    if group is None:
        return [value]
    values: list[Any] = [None] * group.get_world_size()
    with _lost_process():
        group.all_gather_object(values, value)
    return values


def share(value: Value) -> Value:
    """The value that the main process has, for all of them."""
    group = _group()
    if group is None:
        return value
    values = [value if is_main() else None]
    with _lost_process():
        group.broadcast_object_list(values, src=0)
    return values[0]


def from_main(function: Callable[[], Value]) -> Value:
    """What a function gives that the main process alone runs. Where it raises there, the others end
    without a word, with the exit code of a user's mistake."""
    if _group() is None:
        return function()
    result = None
    if is_main():
        try:
            result = function()
        except BaseException:
            share((False, None))
            raise
    succeeded, result = share((True, result))
    if not succeeded:
        raise SystemExit(2)
    return result


def sum_tensor(value: torch.Tensor) -> torch.Tensor:
    """The tensor, summed over all processes, in place; on CUDA without waiting for it."""
    if group := _group():
        with _lost_process():
            group.all_reduce(value)
    return value


def sum_gradients(parameters: Sequence[torch.nn.Parameter], counts: Sequence[int]) -> list[int]:
    """Give each parameter the sum of its gradients in all processes. Returns the counts, added up.

    A parameter without gradient here counts as zeros, and one without gradient everywhere keeps
    none, as in one process: the optimiser leaves it alone. Torch's own DistributedDataParallel
    averages, waits for ever where a process has no gradient at all, and walks the whole graph in
    each step to find parameters without gradient. The gradients travel after the backward, not
    beside it: those of the memory are 28 MB.
    """
    group = _group()
    if group is None:
        return list(counts)
    import torch

    has = [parameter.grad is not None for parameter in parameters]
    num_with = sum_over_processes([*has, *counts])
    counts = num_with[len(has) :]
    shared = [p for p, num in zip(parameters, num_with, strict=False) if num]
    for parameter in shared:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in shared]):
        flat = sum_tensor(torch.cat([gradient.reshape(-1) for gradient in bucket]))
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    return counts


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in their order, in lists of up to BUCKET elements."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def own_part(costs: Sequence[float], num_of_main: int = 0) -> list[int]:
    """Which of these pieces of work this process does, ascending.

    The dearest go first, each to the process with the least to do; all processes come to the same.

    Args:
        num_of_main: the first so many belong to the main process.
    """
    count = num_processes()
    loads = [0.0] * count
    parts: list[list[int]] = [[] for _ in range(count)]
    order = sorted(range(len(costs)), key=lambda k: (k >= num_of_main, -costs[k], k))
    for place in order:
        owner = 0 if place < num_of_main else loads.index(min(loads))
        parts[owner].append(place)
        loads[owner] += costs[place]
    return sorted(parts[rank() if count > 1 else 0])


# -- what each process draws from ------------------------------------------------------------------


def rng_states() -> dict[str, Any]:
    """Of torch's generators: what dropout draws from."""
    import torch

    cuda = []
    if torch.cuda.is_available():
        # Of several processes each has one GPU, and makes no context on those of the others.
        one = is_launched()
        cuda = [torch.cuda.get_rng_state()] if one else torch.cuda.get_rng_state_all()
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def restore_rng(states: Mapping[str, Any], path: Path) -> None:
    """Set torch's generators to `rng_states` of the checkpoint at `path`; UserError if they are
    not."""
    import torch

    try:
        torch.set_rng_state(states["torch"])
        if torch.cuda.is_available() and states["cuda"] and is_launched():
            torch.cuda.set_rng_state(states["cuda"][0])
        elif torch.cuda.is_available():  # another machine may have fewer devices
            torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
    except (RuntimeError, TypeError) as problem:
        raise UserError(
            f"{path}: rng is not the state of torch's generators ({problem}); take another "
            "checkpoint of the run"
        ) from None


def dropout_seed(seed: int, step: int) -> int:
    """The seed of dropout and dropped paths, another one in each process; the main one takes that
    of the experiment, as one process does."""
    import numpy as np

    number = rank()
    if number == 0:
        return seed
    return int(np.random.SeedSequence([seed, number, step]).generate_state(1)[0])


def rng_of_all(states: Mapping[str, Any]) -> dict[str, Any]:
    """The states of torch's generators of the main process, and `of_others`, where there are any,
    those of the others."""
    first, *others = gather(dict(states))
    return {**first, "of_others": others} if others else first


def restore_rng_of_all(content: Mapping[str, Any], seed: int, path: Path) -> None:
    """Give this process its generators' states back; where there were fewer processes before, new
    ones."""
    import torch

    states = [content["rng"], *content["rng"].get("of_others", ())]
    if rank() < len(states):
        restore_rng(states[rank()], path)
    else:
        torch.manual_seed(dropout_seed(seed, content["step"]))


# -- how they end together ------------------------------------------------------------------------


class Stoppable(Protocol):
    """What keeps the signal that asks for an end."""

    received: int | None

    def heed(self, number: int) -> None:
        """Take over a signal that another process got."""


def agree_to_stop(stop: Stoppable) -> bool:
    """Whether a process was asked to stop; all of them then know, at the same place."""
    (number,) = _reduce([stop.received or 0], "MAX")
    if number:
        stop.heed(number)
    return number > 0


@contextlib.contextmanager
def stopping_together(stop: Stoppable) -> Iterator[None]:
    """Meanwhile, a signal that one process gets reaches the others within a second or two."""
    if _watch is not None:
        _watch.stop = stop
    try:
        yield
    finally:
        if _watch is not None:
            _watch.stop = None


_watch: _Watch | None = None


class _Watch:
    """A thread that tells the others of this process, and ends it where another one failed.

    A process may wait in CUDA for one that is gone, and hears no signal there. Each process looks
    after the next one, so that the cost of a second does not grow with their number.
    """

    def __init__(self, store: Any, number: int, count: int):
        global _watch
        _watch = self
        self.stop: Stoppable | None = None
        self._store, self._number, self._next = store, number, (number + 1) % count
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        if count > 1:
            self._thread.start()

    def close(self, *, failed: bool) -> None:
        """Tell the others that this process is done, or failed."""
        global _watch
        _watch = None
        if not self._thread.is_alive():
            return
        self._closed.set()
        self._thread.join(GRACE)
        with contextlib.suppress(RuntimeError):  # the store may be gone with another process
            self._store.set(f"done/{self._number}", "1")
            if failed:
                self._store.set("failed", str(self._number))

    def _run(self) -> None:
        seen, since, announced = -1, time.monotonic(), False
        while not self._closed.wait(BEAT):
            try:
                self._store.add(f"beat/{self._number}", 1)
                beats = self._store.add(f"beat/{self._next}", 0)
                if beats != seen or self._store.check([f"done/{self._next}"]):
                    seen, since = beats, time.monotonic()
                elif time.monotonic() - since > SILENCE:
                    self._store.set("failed", str(self._next))
                if self._store.check(["failed"]):
                    self._end(f"process {self._store.get('failed').decode()} of the job ended")
                announced = self._pass_on(announced)
            except RuntimeError:
                self._end("the process that keeps the job together is gone")

    def _pass_on(self, announced: bool) -> bool:
        """Tell of a signal, or hear of one. Returns whether it has been told."""
        stop = self.stop
        if stop is None:
            return announced
        if stop.received is not None:
            if not announced:
                self._store.set("stop", str(stop.received))
            return True
        if self._store.check(["stop"]):
            stop.heed(int(self._store.get("stop")))
        return announced

    def _end(self, why: str) -> None:
        if not self._closed.wait(GRACE):
            os.write(2, f"error: {why}; process {self._number} ends, too\n".encode())
            os._exit(1)
