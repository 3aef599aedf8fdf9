"""Clips in batches, in a fixed order, loaded in line or by other processes; an error there is
raised here unchanged."""

from __future__ import annotations

import pickle
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sam2train import distributed
from sam2train.clips import BatchedVideoDatapoint, Clip, Prompt, collate_fn
from sam2train.data_clips import ClipDataset
from sam2train.datasets import DatasetConfig
from sam2train.errors import MachineFault, UserError, add_note, worker_ended
from sam2train.machine import leave_group, num_cores, time_limit

# Seconds. A clip is a few pictures, which even a slow network disk gives in some seconds.
CLIP_TIMEOUT = 300.0


_TRIES = 20  # clips that are drawn, one after the other, in the place of one that cannot be read


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
        _Clips(data, config.on_bad_sample == "skip"),
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


class LeftOut:
    """Counts the clips that could not be read, under `on_bad_sample: skip`.

    Args:
        counts: what was wrong -> how often, of the steps before those that `add` is told of.
        say: gets a line on each kind of fault when it comes first.
    """

    def __init__(self, counts: Mapping[str, int], say: Callable[[str], None]):
        self.counts, self.say = Counter(counts), say

    def add(self, problems: Sequence[str], num_clips: int, config: DatasetConfig) -> None:
        """Count the faults of a step.

        Args:
            num_clips: that were used so far, or that an epoch has if these are more: a share of
                the first few says little.

        Raises:
            UserError: the share of clips that were left out is above `max_bad_fraction`.
        """
        for problem in problems:
            if problem not in self.counts:
                self.say(f"left out, and another clip drawn: {problem}")
            self.counts[problem] += 1
        total = self.counts.total()
        if total > config.max_bad_fraction * num_clips:
            shown = "\n  - ".join(list(self.counts)[:_NUM_NAMED])
            more = (
                f"\n  and {len(self.counts) - _NUM_NAMED} more"
                if len(self.counts) > _NUM_NAMED
                else ""
            )
            raise UserError(
                f"{total} of {num_clips} clips could not be read, more than "
                f"dataset.max_bad_fraction={config.max_bad_fraction:g} allows; mend the files, or "
                f"raise it\n  - {shown}{more}"
            )


_NUM_NAMED = 12  # faults in a message


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
    if told := worker_ended(problem, lambda: {"dataset.num_workers": workers}):
        return MachineFault(told)
    return None


@dataclass(frozen=True)
class _Failure:
    """An exception that a worker hands to the run as it is: torch would turn it into text."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        if get_worker_info() is not None:
            add_note(error, "in a process that loads data:\n" + traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # such an exception would not reach the run, which would wait for it
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(error)


class _Clips(Dataset):
    """The clips of a data set, or what went wrong with them."""

    def __init__(self, dataset: ClipDataset, may_skip: bool):
        self.dataset, self.may_skip = dataset, may_skip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> Clip | _Failure:
        try:
            with time_limit(CLIP_TIMEOUT, lambda: self._late(place)):
                return self._load(place)
        except Exception as error:
            return _Failure.of(error)

    def _late(self, place: tuple[int, int]) -> str:
        video = self.dataset.video_of(*place)
        return (
            f"a clip of video {video.video_id} was not loaded after {CLIP_TIMEOUT:g} s; does the "
            f"disk with {video.frames[0].path.parent} answer?"
        )

    def _load(self, place: tuple[int, int]) -> Clip:
        """The clip, or in the place of one that cannot be read another one, which depends on the
        seed and the place alone."""
        epoch, index = place
        rng = np.random.default_rng([self.dataset.settings.seed, epoch, index, 1])
        left_out: list[str] = []
        while True:
            try:
                clip = self.dataset.load_clip(place)
            except UserError as problem:
                if not self.may_skip or len(left_out) == _TRIES:
                    raise
                left_out.append(str(problem))
                place = epoch, int(rng.integers(len(self.dataset)))
                continue
            return replace(clip, left_out=tuple(left_out)) if left_out else clip


def _collate(
    clips: Sequence[Clip | _Failure],
) -> BatchedVideoDatapoint | _Failure | _Packed | bytes:
    try:
        if failed := [clip for clip in clips if isinstance(clip, _Failure)]:
            return failed[0]
        left_out = tuple(problem for clip in clips for problem in clip.left_out)
        batch = replace(collate_fn(clips), left_out=left_out)
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
