"""The method: how SAM 2 tracks objects through a clip with its memory.

`track_clip` is the whole of it: on each frame it reads the memory bank, decodes masks, and writes
the result into the bank. The functions below are its steps. Training and the evaluation of whole
videos call the same function. The paper is https://arxiv.org/abs/2408.00714, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from sam2train.clips import FramePrediction, Prompt
from sam2train.corrections import Correction, DecoderPass
from sam2train.model_inputs import split_by_kind

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

MemoryGradient = Literal["full", "detached"] | int


def track_clip(
    sam2: SAM2Base,
    features_of: Callable[[int], ImageFeatures],
    num_frames: int,
    prompts: Mapping[int, Sequence[Prompt]],
    *,
    corrections: Mapping[int, Correction] | None = None,
    memory_gradient: MemoryGradient = "full",
    recompute: bool = False,
    admits: Callable[[FrameOutput], bool] | None = None,
    noise: float = 0.0,
) -> Iterator[FrameOutput]:
    """Track n objects that are prompted on the same frames.

    Args:
        features_of: frame_idx -> features of the image, an entry for each of the n objects; called
            once for each frame, when its turn comes.
        num_frames: length of the clip or video; SAM 2 limits the object pointers by it.
        prompts: conditioning frame -> one prompt for each of the n objects.
        corrections: frame_idx -> the correction clicks on that frame.
        memory_gradient: how far a gradient travels back through the memory; see `cuts_gradient`.
        recompute: the backward computes each of the three steps again instead of keeping what is
            inside of them: less memory, more time, the same values.
        admits: whether the memory of a tracked frame enters the bank, for n = 1. The ones that did
            are then read by rank: the last one as SAM 2 reads that of the frame before, and so on.
            None admits all.
        noise: chance that a tracked frame's mask enters an object's memory perturbed.

    Yields:
        One output for each frame from the first conditioning frame on: the conditioning frames
        first, then the others in time order.
    """
    corrections = corrections or {}
    conditioning = sorted(prompts)
    tracked = [t for t in range(conditioning[0], num_frames) if t not in prompts]
    order = conditioning + tracked
    bank = MemoryBank()
    run = partial(checkpoint, use_reentrant=False) if recompute else _call
    for position, frame_idx in enumerate(order):
        # Conditioning frames read no memory: together they are link 0 of the chain.
        if cuts_gradient(memory_gradient, link=position - len(conditioning) + 1):
            bank.detach()
        correction = corrections.get(frame_idx)
        parts = []
        for part in split_frame(features_of(frame_idx), prompts.get(frame_idx), correction):
            # Read: a tracked frame attends to the memories in the bank.
            seen = bank.snapshot() if admits is None else bank.by_rank(frame_idx)
            fused = run(read_memory, sam2, part, seen, frame_idx, num_frames)
            # Decode: once, and once more after each correction click.
            decode = partial(run, decode_masks, sam2, part, fused)
            points, passes = part.points, [decode(part.points, part.masks)]
            if part.correction is not None:
                points, passes = part.correction.run(points, passes[0], decode)
            # Write: the mask of the last pass enters the memory; no frame reads the last memory.
            read_later = position + 1 < len(order)
            last = passes[-1]
            if noise and not part.prompted:
                last = perturb_masks(last, noise)
            memory = run(encode_memory, sam2, part, points, last, read_later)
            parts.append(FrameOutput.of_part(frame_idx, part, passes, memory))
        output = FrameOutput.join(parts)
        if frame_idx in prompts or (correction is not None and correction.becomes_conditioning):
            bank.conditioning[frame_idx] = output.memory
        elif admits is None or admits(output):
            bank.tracked[frame_idx] = output.memory
        if admits is None:
            bank.forget_before(frame_idx + 1 - frames_in_reach(sam2))
        else:
            bank.keep_last(frames_in_reach(sam2))
        yield output


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@dataclass(frozen=True)
class Memory:
    """What one frame leaves in the memory bank, for n objects: what later frames can read of it."""

    # Of the image with the decoded mask; None where no frame reads them: on the last frame, and at
    # num_maskmem 0.
    features: torch.Tensor | None  # (n, C of the memory, H / 16, W / 16)
    positions: torch.Tensor | None  # position encoding of the features, of the same shape
    obj_ptr: torch.Tensor  # (n, C) object pointer

    def detach(self) -> Memory:
        features = None if self.features is None else self.features.detach()
        return replace(self, features=features, obj_ptr=self.obj_ptr.detach())

    def for_sam2(self) -> dict[str, Any]:
        """The names that SAM 2's memory attention reads. It reads one level of positions only."""
        return {
            "maskmem_features": self.features,
            "maskmem_pos_enc": [self.positions],
            "obj_ptr": self.obj_ptr,
        }


@dataclass
class MemoryBank:
    """The memories of n objects by frame. They hold their graph: gradients pass through them."""

    conditioning: dict[int, Memory] = field(default_factory=dict)
    tracked: dict[int, Memory] = field(default_factory=dict)

    def for_sam2(self) -> dict[str, dict[int, dict[str, Any]]]:
        return {
            "cond_frame_outputs": {t: m.for_sam2() for t, m in self.conditioning.items()},
            "non_cond_frame_outputs": {t: m.for_sam2() for t, m in self.tracked.items()},
        }

    def snapshot(self) -> MemoryBank:
        """The bank as it is now: a step that is computed again must read what it read."""
        return MemoryBank(dict(self.conditioning), dict(self.tracked))

    def by_rank(self, frame_idx: int) -> MemoryBank:
        """The bank as if its memories of earlier frames were of those just before `frame_idx`; a
        conditioning frame among them keeps its place, as nothing else is read there."""
        earlier = [t for t in (*self.conditioning, *self.tracked) if t < frame_idx]
        place = {t: frame_idx - 1 - k for k, t in enumerate(sorted(earlier, reverse=True))}
        return MemoryBank(dict(self.conditioning), {place[t]: m for t, m in self.tracked.items()})

    def detach(self) -> None:
        """Cut the graph: later frames read the memories, no gradient flows into them."""
        self.conditioning = {t: memory.detach() for t, memory in self.conditioning.items()}
        self.tracked = {t: memory.detach() for t, memory in self.tracked.items()}

    def forget_before(self, frame_idx: int) -> None:
        """Drop tracked memories of frames before `frame_idx`: bounded memory on long videos."""
        self.tracked = {t: memory for t, memory in self.tracked.items() if t >= frame_idx}

    def keep_last(self, num: int) -> None:
        """Drop all but the `num` newest tracked memories."""
        self.tracked = {t: self.tracked[t] for t in sorted(self.tracked)[-num:]}


def cuts_gradient(memory_gradient: MemoryGradient, link: int) -> bool:
    """Whether the memory bank is detached before this link of the chain of frames.

    A gradient then passes `memory_gradient` links at most, as in truncated back-propagation through
    time; at `detached` none, at `full` all.
    """
    if memory_gradient == "full" or link < 1:
        return False
    span = 0 if memory_gradient == "detached" else memory_gradient
    return link % (span + 1) == 0


def frames_in_reach(sam2: SAM2Base) -> int:
    """How many frames back a tracked frame reads tracked memories, or a few more."""
    return max(
        sam2.num_maskmem * sam2.memory_temporal_stride_for_eval, sam2.max_obj_ptrs_in_encoder
    )


@dataclass(frozen=True)
class ImageFeatures:
    """Features of a stack of images, in the form that SAM 2's heads take."""

    levels: list[torch.Tensor]  # each (H_l * W_l, images, C_l), finest first
    positions: torch.Tensor  # (H_l * W_l, 1, C_l) position encoding of the last level
    sizes: list[tuple[int, int]]  # (H_l, W_l)

    def select(self, images: torch.Tensor) -> ImageFeatures:
        """The features of `images`, an (n,) index; repeats are fine (one for each object)."""
        return ImageFeatures(
            [level[:, images] for level in self.levels], self.positions, self.sizes
        )

    def maps(self) -> list[torch.Tensor]:
        """The levels as maps (images, C_l, H_l, W_l)."""
        return [
            level.permute(1, 2, 0).view(level.size(1), level.size(2), *size)
            for level, size in zip(self.levels, self.sizes, strict=True)
        ]


@dataclass(frozen=True)
class FramePart:
    """Objects of one frame that SAM 2 takes together: the same kind of prompt, or none."""

    rows: torch.Tensor  # (m,) int64: which of the n objects
    features: ImageFeatures  # of the m objects
    points: dict[str, torch.Tensor] | None  # SAM 2's point inputs, a box as two of them
    masks: torch.Tensor | None  # (m, 1, H, W) bool
    correction: Correction | None

    @property
    def prompted(self) -> bool:
        return self.points is not None or self.masks is not None


def split_frame(
    features: ImageFeatures, prompts: Sequence[Prompt] | None, correction: Correction | None
) -> Iterator[FramePart]:
    """The n objects of a tracked frame in one part, those of a conditioning frame by their prompts.

    The decoder takes one kind of prompt and one number of points at a time: padding points would
    change both the answer and SAM 2's choice between one and three candidates.
    """
    level = features.levels[-1]
    if prompts is None:
        everyone = torch.arange(level.shape[1], device=level.device)
        yield FramePart(everyone, features, None, None, correction)
        return
    for rows, points, masks in split_by_kind(prompts, level.device):
        of_rows = None if correction is None else correction.select(rows)
        yield FramePart(rows, features.select(rows), points, masks, of_rows)


def read_memory(
    sam2: SAM2Base, part: FramePart, bank: MemoryBank, frame_idx: int, num_frames: int
) -> torch.Tensor:
    """(m, C, H / 16, W / 16) what the decoder sees of the image.

    On a tracked frame memory attention has fused it with the memories. On a conditioning frame
    SAM 2 adds `no_mem_embed` instead; where a mask is the prompt, the image stays as it is.
    """
    features = part.features
    if part.masks is not None and sam2.use_mask_input_as_output_without_sam:
        return features.maps()[-1]
    return sam2._prepare_memory_conditioned_features(
        frame_idx=frame_idx,
        is_init_cond_frame=part.prompted,
        current_vision_feats=features.levels[-1:],
        current_vision_pos_embeds=[features.positions.expand_as(features.levels[-1])],
        feat_sizes=features.sizes[-1:],
        output_dict=bank.for_sam2(),
        num_frames=num_frames,
    )


def decode_masks(
    sam2: SAM2Base,
    part: FramePart,
    fused: torch.Tensor,
    points: dict[str, torch.Tensor] | None,
    masks: torch.Tensor | None,
) -> DecoderPass:
    """One decoder pass. A mask prompt alone is also the output: SAM 2 returns it as logits of +-10.

    Args:
        fused: of `read_memory`.
        points: the points of the prompt and the correction clicks so far.
        masks: the mask prompt; after a click the low resolution logits of the pass before.
    """
    # SAM 2 takes None where the config has one level only.
    high_res = part.features.maps()[:-1] or None
    if points is None and masks is not None and sam2.use_mask_input_as_output_without_sam:
        return DecoderPass(*sam2._use_mask_as_output(fused, high_res, masks))
    return DecoderPass(
        *sam2._forward_sam_heads(
            backbone_features=fused,
            point_inputs=points,
            mask_inputs=masks,
            high_res_features=high_res,
            multimask_output=sam2._use_multimask(part.prompted, points),
        )
    )


def encode_memory(
    sam2: SAM2Base,
    part: FramePart,
    points: dict[str, torch.Tensor] | None,
    decoded: DecoderPass,
    read_later: bool,
) -> Memory:
    """What enters the memory bank: the mask of highest predicted IoU, encoded with the image, and
    the object pointer of that mask.

    Args:
        points: all points that led to the mask; in eval mode SAM 2 can binarise such masks.
        read_later: False skips the memory encoder.
    """
    if not read_later or sam2.num_maskmem == 0:
        return Memory(None, None, decoded.obj_ptr)
    features, positions = sam2._encode_new_memory(
        current_vision_feats=part.features.levels,
        feat_sizes=part.features.sizes,
        pred_masks_high_res=decoded.mask_logits,
        object_score_logits=decoded.object_score_logits,
        is_mask_from_pts=points is not None,
    )
    return Memory(features, positions[-1], decoded.obj_ptr)


def perturb_masks(decoded: DecoderPass, chance: float) -> DecoderPass:
    """The decoder pass with some masks wrong, as a tracker's may be: moved by up to a quarter of
    the image, that of another object, or empty, each of these equally often.

    Random numbers come from torch, as those of dropout do.

    Args:
        chance: of each object.
    """
    logits = decoded.mask_logits  # (n, 1, H, W)
    num_objects, _, height, width = logits.shape
    down, right = (int(torch.randint(-side // 4, side // 4 + 1, ())) for side in (height, width))
    moved = logits.roll((down, right), (2, 3))
    # A single object has no other one: it is moved instead.
    other = logits.roll(int(torch.randint(1, num_objects, ())), 0) if num_objects > 1 else moved
    empty = torch.full_like(logits, -10.0)  # the probability that the encoder reads is then 0
    kind = torch.randint(3, (num_objects, 1, 1, 1)).to(logits.device, non_blocking=True)
    drawn = (torch.rand(num_objects, 1, 1, 1) < chance).to(logits.device, non_blocking=True)
    wrong = torch.where(kind == 0, moved, torch.where(kind == 1, other, empty))
    return decoded._replace(mask_logits=torch.where(drawn, wrong, logits))


@dataclass(frozen=True)
class FrameOutput:
    """What is known of n objects on one frame after its last decoder pass."""

    frame_idx: int
    rows: torch.Tensor  # (n,) int64: which of the objects of the clip
    mask_logits: torch.Tensor  # (n, H, W) of the mask of highest predicted IoU
    low_res_logits: torch.Tensor  # (n, H / 4, W / 4) of the same mask
    iou_predictions: torch.Tensor  # (n,) of the same mask, float32
    object_score_logits: torch.Tensor  # (n, 1)
    memory: Memory
    passes: list[FramePrediction]  # all decoder passes, for the loss; their `objects` are rows

    @classmethod
    def of_part(
        cls, frame_idx: int, part: FramePart, passes: Sequence[DecoderPass], memory: Memory
    ) -> FrameOutput:
        last = passes[-1]
        return cls(
            frame_idx=frame_idx,
            rows=part.rows,
            mask_logits=last.mask_logits[:, 0],
            low_res_logits=last.low_res_logits[:, 0],
            iou_predictions=last.iou_predictions.max(dim=1).values.float(),
            object_score_logits=last.object_score_logits,
            memory=memory,
            passes=[
                FramePrediction(
                    part.rows, step.candidates, step.iou_predictions, step.object_score_logits
                )
                for step in passes
            ],
        )

    @classmethod
    def join(cls, parts: Sequence[FrameOutput]) -> FrameOutput:
        """The parts of one frame as one output, objects back in their order."""
        if len(parts) == 1:
            return parts[0]
        rows = torch.cat([part.rows for part in parts])
        order = torch.argsort(rows)

        def join(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
            return None if values[0] is None else torch.cat(values)[order]

        return cls(
            frame_idx=parts[0].frame_idx,
            rows=rows[order],
            mask_logits=join([part.mask_logits for part in parts]),
            low_res_logits=join([part.low_res_logits for part in parts]),
            iou_predictions=join([part.iou_predictions for part in parts]),
            object_score_logits=join([part.object_score_logits for part in parts]),
            memory=Memory(
                join([part.memory.features for part in parts]),
                join([part.memory.positions for part in parts]),
                join([part.memory.obj_ptr for part in parts]),
            ),
            passes=[step for part in parts for step in part.passes],
        )
