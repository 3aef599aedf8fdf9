"""Clips in batches, in a fixed order, loaded in line or by other processes; an error there is
raised here unchanged."""

from __future__ import annotations

import contextlib
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sam2train import distributed
from sam2train.clips import BatchedVideoDatapoint, Clip, Prompt, collate_fn
from sam2train.data_clips import ClipDataset
from sam2train.datasets import DatasetConfig
from sam2train.errors import MachineFault
from sam2train.machine import leave_group, num_cores

# Seconds. A clip is a few pictures, which even a slow network disk gives in some seconds.
CLIP_TIMEOUT = 300.0


class ClipSampler:
    """Endless (epoch, index) pairs for a DataLoader; each epoch visits every clip once.

    The pair at position p depends on the seed and p alone, so a resumed run sees the same clips.

    Args:
        num_clips: clips of an epoch.
        start: first position; a resumed run has used those before it.
        block: from `start` on, positions come in blocks of so many clips.
        share: (k, n): of n processes the k-th, from 0, has every n-th block from the k-th on.
    """

    def __init__(
        self,
        num_clips: int,
        *,
        shuffle: bool,
        seed: int,
        start: int = 0,
        block: int = 1,
        share: tuple[int, int] = (0, 1),
    ):
        self.num_clips = num_clips
        self.shuffle = shuffle
        self.seed = seed
        self.start = start
        self.block, self.share = block, share

    def __iter__(self) -> Iterator[tuple[int, int]]:
        which, count = self.share
        for place, clip in enumerate(self._all_clips()):
            if place // self.block % count == which:
                yield clip

    def _all_clips(self) -> Iterator[tuple[int, int]]:
        """Those of all processes."""
        epoch, first = divmod(self.start, self.num_clips)
        while True:
            order = np.arange(self.num_clips)
            if self.shuffle:
                # `num_clips` is not the index of a clip, so no clip uses these random numbers.
                np.random.default_rng([self.seed, epoch, self.num_clips]).shuffle(order)
            for index in order[first:]:
                yield epoch, int(index)
            epoch, first = epoch + 1, 0


def load_batches(
    data: ClipDataset,
    config: DatasetConfig,
    seed: int,
    *,
    start: int,
    pin_memory: bool,
    say: Callable[[str], None] = print,
) -> Iterator[BatchedVideoDatapoint]:
    """Batches of clips without end, in an order that the seed gives. Of several processes each has
    its share of the batches.

    Frames are uint8 in them: `batch.to(device)` normalises. They come through shared memory, or,
    where /dev/shm is full, through pipes, which is told.

    Args:
        start: clips that all processes used before, which a resumed run leaves out.

    Raises:
        UserError: as it was raised where the clip was loaded.
        MachineFault: a process that ended, or a clip that does not come.
    """
    # More processes than cores only wait for each other; the clips are the same.
    workers = min(config.num_workers, max(num_cores() // distributed.num_local(), 1))
    share = distributed.rank(), distributed.num_processes()
    loader = DataLoader(
        _Clips(data),
        batch_size=config.batch_size,
        sampler=ClipSampler(
            len(data),
            shuffle=config.shuffle,
            seed=seed,
            start=start,
            block=config.batch_size,
            share=share if share[1] > 1 else (0, 1),
        ),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_begin_worker,
        pin_memory=pin_memory,
        # Its own generator: the loader must not draw from the one that dropout uses.
        generator=torch.Generator().manual_seed(seed),
        # For a process that does not even report that it waits too long.
        timeout=2 * CLIP_TIMEOUT * config.batch_size if workers else 0,
    )
    return _unwrap(iter(loader), workers, say)


def _begin_worker(number: int) -> None:
    """In a process that loads data: leave signals to the run, and end without a message."""
    leave_group(number)

    def show(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        # The run may end while a thread of this process hands a batch over.
        if not issubclass(kind, OSError | EOFError):
            sys.__excepthook__(kind, error, where)

    sys.excepthook = show


def _unwrap(
    batches: Iterator[Any], workers: int, say: Callable[[str], None]
) -> Iterator[BatchedVideoDatapoint]:
    told = False
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as problem:  # torch's own words on a worker
            raise _explain(problem, workers) or problem from None
        if isinstance(batch, _Failure):
            raise batch.error
        if isinstance(batch, bytes):
            if not told:
                say(
                    "/dev/shm is full: batches come through pipes, which is slower. Give it more "
                    "memory (docker run --shm-size), or set dataset.num_workers=0"
                )
                told = True
            batch = pickle.loads(batch)  # of a process of our own
        yield batch.unpack() if isinstance(batch, _Packed) else batch


def _explain(problem: RuntimeError, workers: int) -> MachineFault | None:
    text = str(problem)
    if "timed out" in text:
        return MachineFault(
            f"the processes that load data give no batch and no error ({text}): a disk that does "
            "not answer? dataset.num_workers=0 loads in line"
        )
    if "DataLoader worker" in text:
        first = text.splitlines()[0]
        return MachineFault(
            f"a process that loads data ended ({first.rstrip('. ')}). Out of memory is the usual "
            f"cause: fewer of them (dataset.num_workers={workers} now), or a smaller "
            "dataset.mask_cache_mb or dataset.batch_size, take less"
        )
    return None


@dataclass(frozen=True)
class _Failure:
    """An exception that a worker hands to the run as it is: torch would turn it into text."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        if get_worker_info() is not None:
            error.add_note("in a process that loads data:\n" + traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # such an exception would not reach the run, which would wait for it
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(error)


class _Clips(Dataset):
    """The clips of a data set, or what went wrong with them."""

    def __init__(self, dataset: ClipDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> Clip | _Failure:
        try:
            with _time_limit(self.dataset, place):
                return self.dataset.load_clip(place)
        except Exception as error:
            return _Failure.of(error)


@contextlib.contextmanager
def _time_limit(dataset: ClipDataset, place: tuple[int, int]) -> Iterator[None]:
    """Raise MachineFault with the video's id where a clip takes too long, such as on a network
    disk that does not answer."""
    if not hasattr(signal, "setitimer") or threading.current_thread() != threading.main_thread():
        yield
        return

    def give_up(number: int, frame: FrameType | None) -> None:
        video = dataset.video_of(*place)
        raise MachineFault(
            f"a clip of video {video.video_id} was not loaded after {CLIP_TIMEOUT:g} s; does the "
            f"disk with {video.frames[0].path.parent} answer?"
        )

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, CLIP_TIMEOUT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _collate(
    clips: Sequence[Clip | _Failure],
) -> BatchedVideoDatapoint | _Failure | _Packed | bytes:
    try:
        if failed := [clip for clip in clips if isinstance(clip, _Failure)]:
            return failed[0]
        batch = collate_fn(clips)
        return batch if get_worker_info() is None else _share(_Packed.of(batch))
    except Exception as error:
        return _Failure.of(error)


@dataclass(frozen=True)
class _Packed:
    """A batch on its way out of a worker: frames as uint8, masks as bits."""

    batch: BatchedVideoDatapoint
    shapes: dict[str, torch.Size]  # of the tensors of bits
    prompt_size: tuple[int, int]  # (H, W) of the masks of prompts

    @classmethod
    def of(cls, batch: BatchedVideoDatapoint) -> _Packed:
        masks = {name: getattr(batch, name) for name in ("masks", "ignore")}
        masks = {name: mask for name, mask in masks.items() if mask is not None}
        bits = {name: torch.from_numpy(np.packbits(mask)) for name, mask in masks.items()}
        prompts = _with_masks(batch.prompts, np.packbits)
        shapes = {name: mask.shape for name, mask in masks.items()}
        return cls(replace(batch, prompts=prompts, **bits), shapes, tuple(batch.masks.shape[-2:]))

    def unpack(self) -> BatchedVideoDatapoint:
        masks = {
            name: torch.from_numpy(_unpacked(getattr(self.batch, name).numpy(), shape))
            for name, shape in self.shapes.items()
        }
        prompts = _with_masks(self.batch.prompts, lambda bits: _unpacked(bits, self.prompt_size))
        return replace(self.batch, prompts=prompts, **masks)

    def pin_memory(self) -> BatchedVideoDatapoint:
        """Called by torch, in a thread of its own."""
        return self.unpack().pin_memory()


def _with_masks(
    prompts: list[list[Prompt]], change: Callable[[np.ndarray], np.ndarray]
) -> list[list[Prompt]]:
    """The prompts with other masks."""
    return [
        [
            prompt if prompt["mask"] is None else {**prompt, "mask": change(prompt["mask"])}
            for prompt in of_clip
        ]
        for of_clip in prompts
    ]


def _unpacked(bits: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return np.unpackbits(bits, count=int(np.prod(shape))).view(bool).reshape(shape)


def _share(packed: _Packed) -> _Packed | bytes:
    """The batch with its tensors in shared memory, pickled where there is no room: torch would try
    the same later in a thread whose error is lost, and the run would wait for ever."""
    try:
        for field in fields(packed.batch):
            if isinstance(value := getattr(packed.batch, field.name), torch.Tensor):
                value.share_memory_()
    except (RuntimeError, OSError):
        return pickle.dumps(packed)
    return packed
