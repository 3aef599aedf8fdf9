"""What SAM 2 reads on a frame: features of the images, and the memories of past frames."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class MemoryBank:
    """Memories of one group of objects: what memory attention may read, by frame."""

    conditioning: dict[int, dict[str, Any]] = field(default_factory=dict)
    tracked: dict[int, dict[str, Any]] = field(default_factory=dict)

    def for_sam2(self) -> dict[str, dict[int, dict[str, Any]]]:
        return {"cond_frame_outputs": self.conditioning, "non_cond_frame_outputs": self.tracked}

    def detach(self) -> None:
        """Cut the graph: later frames read the memories, no gradient flows into them."""
        for memories in (self.conditioning, self.tracked):
            for frame_idx, memory in memories.items():
                memories[frame_idx] = {
                    name: value.detach() if isinstance(value, torch.Tensor) else value
                    for name, value in memory.items()
                }

    def forget_before(self, frame_idx: int) -> None:
        """Drop tracked memories of frames before `frame_idx`: bounded memory on long videos."""
        for old in [t for t in self.tracked if t < frame_idx]:
            del self.tracked[old]


@dataclass(frozen=True)
class ImageFeatures:
    """Features of a stack of images, as SAM 2's heads want them."""

    levels: list[torch.Tensor]  # each (H_l * W_l, images, C_l), finest first
    positions: list[torch.Tensor]  # position encodings of the same shapes
    sizes: list[tuple[int, int]]  # (H_l, W_l)

    def select(self, images: torch.Tensor) -> ImageFeatures:
        """The features of `images`, an (n,) index; repeats are fine (one for each object)."""
        return ImageFeatures(
            [level[:, images] for level in self.levels],
            [position[:, images] for position in self.positions],
            self.sizes,
        )
