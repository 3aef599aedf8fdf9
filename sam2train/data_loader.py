"""In which order clips are drawn, and that they come in batches without end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from sam2train.clips import BatchedVideoDatapoint, collate_fn
from sam2train.data_clips import ClipDataset
from sam2train.datasets import DatasetConfig
from sam2train.machine import leave_group, num_cores


class ClipSampler:
    """Endless (epoch, index) pairs for a DataLoader; each epoch visits every clip once.

    The pair at position p depends on the seed and p alone, so a resumed run sees the same clips.

    Args:
        num_clips: clips of an epoch.
        start: first position; a resumed run has used those before it.
    """

    def __init__(self, num_clips: int, *, shuffle: bool, seed: int, start: int = 0):
        self.num_clips = num_clips
        self.shuffle = shuffle
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
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
    data: ClipDataset, config: DatasetConfig, seed: int, *, start: int, pin_memory: bool
) -> Iterator[BatchedVideoDatapoint]:
    """Batches of clips without end, in an order that the seed gives.

    Args:
        start: clips that were used before, which a resumed run leaves out.
    """
    return iter(
        DataLoader(
            data,
            batch_size=config.batch_size,
            sampler=ClipSampler(len(data), shuffle=config.shuffle, seed=seed, start=start),
            # More processes than cores only wait for each other; the clips are the same.
            num_workers=min(config.num_workers, num_cores()),
            collate_fn=collate_fn,
            worker_init_fn=leave_group,
            pin_memory=pin_memory,
            # Its own generator: the loader must not draw from the one that dropout uses.
            generator=torch.Generator().manual_seed(seed),
        )
    )
