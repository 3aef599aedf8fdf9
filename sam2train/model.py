"""SAM 2 for fine-tuning: load it, freeze what is not trained, track the objects of clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from sam2train.clips import (
    BatchedVideoDatapoint,
    FramePrediction,
    Prompt,
    is_empty,
    make_object_index,
)
from sam2train.config import Section
from sam2train.errors import UserError
from sam2train.pretrained import (
    MODULES,
    build_sam2,
    load_weights,
    match_parameters,
    resolve_config,
)

# SAM 2's logits for "no object here": what a frame before the object's first prompt gets.
NO_OBJECT_LOGIT = -1024.0
NO_OBJECT_SCORE = -10.0


class ModelConfig(Section):
    """The `model:` section of an experiment."""

    checkpoint_path: str | None = Field(
        None, description="SAM 2 weights to start from; null starts from random ones"
    )
    config_path: str = Field("configs/sam2.1_hiera_t.yaml", description="SAM 2 model config")
    trainable_modules: tuple[str, ...] = Field(
        ("memory_attention", "memory_encoder"),
        description="modules, parameters or patterns to train; all else is frozen",
    )
    image_size: int = Field(512, ge=32, multiple_of=32, description="side of the square input")
    num_maskmem: int = Field(7, ge=0, description="memories: the conditioning one and past frames")
    max_obj_ptrs_in_encoder: int = Field(
        16, ge=0, description="object pointers in memory attention; 0 uses none"
    )
    memory_gradient: Literal["full", "detached"] | Annotated[int, Field(ge=1)] = Field(
        "full", description="frames a gradient travels back through the memory"
    )


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


class SAM2Model(nn.Module):
    """SAM 2 with its memory trainable over clips. Call `load()` before the first use.

    Args:
        checkpoint_path: a file with `{"model": state_dict}`; None starts from random weights.
        config_path: a file, a name inside the `sam2` package, or `configs/sam2.1_hiera_t.yaml`.
        trainable_modules: module names, parameter names or patterns; see `configure_for_training`.
        device: where `load()` puts the model.
        image_size: side of the square input in pixels, a multiple of 32.
        num_maskmem: memories that attention reads: the conditioning frames and num_maskmem - 1
            past frames. Another number than the checkpoint's is handled on loading.
        max_obj_ptrs_in_encoder: object pointers that attention reads; 0 uses none.
        memory_gradient: `full`, `detached`, or the number of frames a gradient travels back
            through the memory (truncated back-propagation through time).
        **kwargs: further keys of the SAM 2 config's `model:` node.
    """

    def __init__(
        self,
        checkpoint_path: str | Path | None = None,
        config_path: str | Path = "configs/sam2.1_hiera_t.yaml",
        trainable_modules: Sequence[str] = ("memory_attention", "memory_encoder"),
        device: str | torch.device = "cuda",
        image_size: int = 512,
        num_maskmem: int = 7,
        *,
        max_obj_ptrs_in_encoder: int = 16,
        memory_gradient: Literal["full", "detached"] | int = "full",
        **kwargs: Any,
    ):
        super().__init__()
        if image_size % 32 or image_size <= 0:
            raise UserError(
                f"model.image_size: {image_size} must be a multiple of 32, "
                f"for example {max(32, round(image_size / 32) * 32)}"
            )
        if num_maskmem < 0:
            raise UserError(f"model.num_maskmem: {num_maskmem} must be 0 (no memory) or more")
        if max_obj_ptrs_in_encoder < 0 or max_obj_ptrs_in_encoder == 1:
            # SAM 2 divides the time code of a pointer by max_obj_ptrs_in_encoder - 1.
            raise UserError(
                f"model.max_obj_ptrs_in_encoder: {max_obj_ptrs_in_encoder} must be 0 (none) or at "
                "least 2; 1 makes SAM 2 divide by zero"
            )
        if memory_gradient not in ("full", "detached") and not (
            isinstance(memory_gradient, int) and memory_gradient >= 1
        ):
            raise UserError(
                f"model.memory_gradient: {memory_gradient!r} must be `full`, `detached` or a "
                "number of frames, at least 1"
            )
        self.checkpoint_path = checkpoint_path
        self.config_path = config_path
        self.trainable_modules = tuple(trainable_modules)
        self.device = torch.device(device)
        self.image_size = image_size
        self.num_maskmem = num_maskmem
        self.max_obj_ptrs_in_encoder = max_obj_ptrs_in_encoder
        self.memory_gradient = memory_gradient
        self.sam2_options = kwargs
        self.sam2: nn.Module | None = None

    @property
    def image_encoder(self) -> nn.Module:
        return self._loaded().image_encoder

    @property
    def memory_attention(self) -> nn.Module:
        return self._loaded().memory_attention

    @property
    def memory_encoder(self) -> nn.Module:
        return self._loaded().memory_encoder

    def _loaded(self) -> nn.Module:
        if self.sam2 is None:
            raise RuntimeError("SAM2Model: call load() before using the model")
        return self.sam2

    def load(self, device: str | torch.device | None = None) -> SAM2Model:
        """Build the model, load its weights strictly, move it, freeze what is not trained.

        Random weights (no `checkpoint_path`) come from torch's global generator.

        Raises:
            UserError: a file that is missing or does not fit, an unknown config or module name.
        """
        self.device = torch.device(device if device is not None else self.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "device: cuda is not available here; use `cpu` (or `auto` in an experiment)"
            )
        sam2 = build_sam2(
            resolve_config(self.config_path),
            image_size=self.image_size,
            num_maskmem=self.num_maskmem,
            max_obj_ptrs_in_encoder=self.max_obj_ptrs_in_encoder,
            **self.sam2_options,
        )
        if self.checkpoint_path is not None:
            load_weights(sam2, Path(self.checkpoint_path))
        if self.max_obj_ptrs_in_encoder == 0:
            # SAM 2 reads the pointers of conditioning frames whatever the limit: switch them off.
            sam2.use_obj_ptrs_in_encoder = False
        self.sam2 = sam2.to(self.device)
        self.configure_for_training(self.trainable_modules)
        return self

    # -- what is trained ---------------------------------------------------------------------

    def configure_for_training(
        self, trainable_modules: Sequence[str]
    ) -> dict[str, tuple[int, int]]:
        """Freeze everything, unfreeze what is listed, and report (trainable, total) per module.

        Args:
            trainable_modules: names of modules (`memory_attention`, `memory_encoder`,
                `mask_decoder`, `prompt_encoder`, `image_encoder`, or any dotted submodule), of
                parameters (`maskmem_tpos_enc`), or shell patterns over parameter names.

        Raises:
            UserError: a name that matches nothing, with the near ones.
        """
        sam2 = self._loaded()
        trained = match_parameters(sam2, trainable_modules, MODULES)
        for name, parameter in sam2.named_parameters():
            parameter.requires_grad_(name in trained)
        self.trainable_modules = tuple(trainable_modules)
        self.train(self.training)
        return self.parameter_report()

    def parameter_report(self) -> dict[str, tuple[int, int]]:
        """(trainable, total) parameters of each module and of each parameter outside of them."""
        short = {theirs: ours for ours, theirs in MODULES.items()}
        report: dict[str, tuple[int, int]] = {}
        for name, parameter in self._loaded().named_parameters():
            module = name.split(".")[0]
            module = short.get(module, module)
            trained, total = report.get(module, (0, 0))
            count = parameter.numel()
            report[module] = (trained + count * parameter.requires_grad, total + count)
        return report

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained, by SAM 2's name."""
        return {n: p for n, p in self._loaded().named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> SAM2Model:
        """Training mode for what is trained. Frozen modules stay in eval mode: no dropout there."""
        super().train(mode)
        if mode and self.sam2 is not None:
            for module in self.sam2.modules():
                parameters = list(module.parameters())
                # A module without parameters (a dropout) does as the one that holds it.
                if parameters and not any(parameter.requires_grad for parameter in parameters):
                    module.eval()
        return self

    # -- the forward pass ---------------------------------------------------------------------

    def forward(
        self,
        images: torch.Tensor | BatchedVideoDatapoint | None = None,
        masks: torch.Tensor | None = None,
        prompts: list[Prompt] | list[list[Prompt]] | None = None,
        batched_video_datapoint: Any = None,
    ) -> dict[str, Any]:
        """Track every object through its clip, from its first prompt on.

        Either `images`, `prompts` (and `masks`, which only tell the number of objects), or a
        batched datapoint, ours or SAM 2's own. Prompts given beside a datapoint replace its own.
        SAM 2's carries none: each object then gets its mask on frame 0.

        Args:
            images: (B, T, C, H, W) float32, normalised.
            masks: (B, T, N, H, W) bool.
            prompts: for each clip a list of prompts; a flat list where B is 1. The first prompt
                of an object sets its place among the N objects.
            batched_video_datapoint: used instead of the above where given.

        Returns:
            `pred_masks` (B, T, N, H, W) float32 logits at the image size, `iou_predictions`
            (B, T, N) and `object_score_logits` (B, T, N) of the mask that enters the memory, and
            `frames`: for each of the T frames a list of `FramePrediction`, for the loss. Frames
            before an object's first prompt hold -1024, -10 for the object score, and no prediction.

        Raises:
            UserError: layouts that do not fit each other or the model.
        """
        batch = batched_video_datapoint
        if batch is None and hasattr(images, "img_batch"):
            batch = images
        if batch is None and (images is None or prompts is None):
            raise UserError("SAM2Model.forward: give images and prompts, or a batched datapoint")
        if batch is not None:
            num_frames, num_clips = batch.img_batch.shape[:2]
            if prompts is None:
                prompts = getattr(batch, "prompts", None)
            if prompts is None:
                prompts = mask_prompts(batch)
            clip_prompts = _check_prompts(prompts, num_clips, self.image_size)
            flat_images, image_index = batch.flat_img_batch, batch.flat_obj_to_img_idx.long()
            object_valid = getattr(batch, "object_valid", None)
            if object_valid is None:
                object_valid = _object_slots(batch.obj_to_frame_idx[0, :, 1], num_clips)
            _check_objects(clip_prompts, object_valid.sum(1).tolist())
            frame_valid = getattr(batch, "frame_valid", None)
        else:
            _check_layout(images, masks)
            num_clips, num_frames = images.shape[:2]
            clip_prompts = _check_prompts(prompts, num_clips, self.image_size)
            flat_images, object_valid = images.flatten(0, 1), _valid_objects(clip_prompts, masks)
            object_index = make_object_index(object_valid, num_frames)
            frame_idx, clip_idx = object_index.long().unbind(-1)
            image_index = clip_idx * num_frames + frame_idx
            frame_valid = None
        if flat_images.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"images of {tuple(flat_images.shape[-2:])} pixels do not fit a model built for "
                f"{self.image_size}; set model.image_size and dataset.image_size to the same side"
            )
        # Padding comes after the real frames of a clip: nobody looks at it, not even SAM 2's time
        # code, so a clip gets the same answer in every batch.
        lengths = [num_frames] * num_clips if frame_valid is None else frame_valid.sum(0).tolist()
        groups = group_objects(clip_prompts, lengths)
        features = self.encode_images(flat_images.to(self.device))
        return self._track(
            features, image_index.to(self.device), groups, object_valid.to(self.device)
        )

    def encode_images(self, images: torch.Tensor) -> ImageFeatures:
        """Features of (images, 3, H, W), without a graph through a frozen image encoder."""
        sam2 = self._loaded()
        trained = any(p.requires_grad for p in sam2.image_encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            backbone = sam2.image_encoder(images)
        if sam2.use_high_res_features_in_sam:
            # These two belong to the mask decoder, which may be trained where the encoder is not.
            maps = backbone["backbone_fpn"]
            maps[0] = sam2.sam_mask_decoder.conv_s0(maps[0])
            maps[1] = sam2.sam_mask_decoder.conv_s1(maps[1])
        _, levels, positions, sizes = sam2._prepare_backbone_features(backbone)
        return ImageFeatures(levels, positions, sizes)

    def _track(
        self,
        features: ImageFeatures,
        image_index: torch.Tensor,
        groups: Sequence[ObjectGroup],
        object_valid: torch.Tensor,
    ) -> dict[str, Any]:
        """The forward pass after the image encoder: groups of objects, one after the other.

        Args:
            image_index: (T, O) image of each object on each frame.
        """
        num_frames = len(image_index)
        clip_of_object, slot_of_object = object_valid.nonzero().unbind(1)  # (O,)
        frames: list[list[FramePrediction]] = [[] for _ in range(num_frames)]
        places, tracked = [], []
        for group in groups:
            objects = torch.tensor(group.objects, device=self.device)
            for frame_idx, current, passes in self.track_clip(
                features, image_index[: group.num_frames, objects], group.prompts
            ):
                frame = torch.full_like(objects, frame_idx)
                places.append(
                    torch.stack([clip_of_object[objects], frame, slot_of_object[objects]])
                )
                tracked.append(current)
                frames[frame_idx] += [
                    FramePrediction(objects[rows], *outputs) for rows, *outputs in passes
                ]

        def gather(name: str, fill: float, *size: int) -> torch.Tensor:
            shape = (object_valid.shape[0], num_frames, object_valid.shape[1], *size)
            result = torch.full(shape, fill, device=self.device)
            if tracked:
                # One write for all frames: each would cost a copy of the whole in the backward.
                values = torch.cat([current[name] for current in tracked]).float()
                result[tuple(torch.cat(places, dim=1))] = values.view(-1, *size)
            return result  # (B, T, N, ...)

        return {
            "pred_masks": gather("mask_logits", NO_OBJECT_LOGIT, self.image_size, self.image_size),
            "iou_predictions": gather("iou_predictions", 0.0),
            "object_score_logits": gather("object_score_logits", NO_OBJECT_SCORE),
            "frames": frames,
        }

    def track_clip(
        self,
        features: ImageFeatures,
        image_index: torch.Tensor,
        prompts: Mapping[int, Sequence[Prompt]],
    ) -> Iterator[tuple[int, dict[str, Any], list[tuple]]]:
        """Track objects with common conditioning frames: those first, then the others in order.

        Args:
            image_index: (T, n) image of each object on each frame.
            prompts: conditioning frame -> one prompt for each of the n objects.

        Yields:
            frame_idx, what the memory keeps of the frame, and the decoder passes of the frame.
        """
        num_frames = len(image_index)
        tracked = [t for t in range(min(prompts), num_frames) if t not in prompts]
        order = sorted(prompts) + tracked
        bank = MemoryBank()
        for position, frame_idx in enumerate(order):
            # Conditioning frames read no memory: together they are the first link of the chain.
            if self._cuts_graph(position - len(prompts) + 1):
                bank.detach()
            yield (
                frame_idx,
                *self.track_frame(
                    frame_idx,
                    features.select(image_index[frame_idx]),
                    bank,
                    num_frames,
                    prompts.get(frame_idx),
                    # Nobody reads the memory of the last frame.
                    encode_memory=position + 1 < len(order),
                ),
            )

    def _cuts_graph(self, link: int) -> bool:
        """Whether the memory is cut before this link: a gradient then passes `memory_gradient`
        links at most, as in truncated back-propagation through time."""
        if self.memory_gradient == "full" or link < 1:
            return False
        span = 0 if self.memory_gradient == "detached" else self.memory_gradient
        return link % (span + 1) == 0

    def track_frame(
        self,
        frame_idx: int,
        features: ImageFeatures,
        bank: MemoryBank,
        num_frames: int,
        prompts: Sequence[Prompt] | None = None,
        *,
        encode_memory: bool = True,
    ) -> tuple[dict[str, Any], list[tuple]]:
        """Segment n objects on one frame and put the frame into their memory bank.

        Args:
            features: of the frame, one entry for each of the n objects.
            bank: read on a tracked frame; written on every frame.
            num_frames: length of the clip or video; SAM 2 limits the object pointers by it.
            prompts: one for each object on a conditioning frame, else None.

        Returns:
            A dict with `mask_logits` (n, H, W), `low_res_logits` (n, H / 4, W / 4),
            `iou_predictions` (n,), `object_score_logits` (n, 1), `obj_ptr` (n, C) and the memory;
            and the decoder passes as tuples (rows, mask_logits (n, M, H, W), iou_predictions
            (n, M), object_score_logits (n, 1)).
        """
        if prompts is None:
            everyone = torch.arange(features.levels[-1].shape[1], device=self.device)
            current, decoder_pass = self._run_sam2(
                frame_idx, features, bank, num_frames, None, None, encode_memory
            )
            bank.tracked[frame_idx] = current
            return current, [(everyone, *decoder_pass)]

        # The decoder takes one kind of prompt and one number of points at a time: padding points
        # would change both the answer and SAM 2's choice between one and three candidates.
        parts, passes = [], []
        for rows, points, masks in split_by_kind(prompts, self.device):
            current, decoder_pass = self._run_sam2(
                frame_idx, features.select(rows), bank, num_frames, points, masks, encode_memory
            )
            parts.append((rows, current))
            passes.append((rows, *decoder_pass))
        bank.conditioning[frame_idx] = merge_objects(parts)
        return bank.conditioning[frame_idx], passes

    def _run_sam2(self, frame_idx, features, bank, num_frames, points, masks, encode_memory):
        """One pass through SAM 2's memory attention, decoder and memory encoder."""
        sam2 = self._loaded()
        prompted = points is not None or masks is not None
        _, outputs, _, _ = sam2._track_step(
            frame_idx=frame_idx,
            is_init_cond_frame=prompted,
            current_vision_feats=features.levels,
            current_vision_pos_embeds=features.positions,
            feat_sizes=features.sizes,
            point_inputs=points,
            mask_inputs=masks,
            output_dict=bank.for_sam2(),
            num_frames=num_frames,
            track_in_reverse=False,
            prev_sam_mask_logits=None,
        )
        _, candidates, ious, low_res_logits, mask_logits, obj_ptr, object_score_logits = outputs
        current = {
            "mask_logits": mask_logits[:, 0],
            "low_res_logits": low_res_logits[:, 0],
            "iou_predictions": ious.max(dim=1).values.float(),
            "object_score_logits": object_score_logits,
            "obj_ptr": obj_ptr,
        }
        sam2._encode_memory_in_output(
            features.levels,
            features.sizes,
            points,
            encode_memory,
            mask_logits,
            object_score_logits,
            current,
        )
        return current, (candidates, ious, object_score_logits)


@dataclass(frozen=True)
class ObjectGroup:
    """Objects that share conditioning frames and clip length: one memory bank, one batch."""

    objects: list[int]  # n positions on the O axis
    prompts: dict[int, list[Prompt]]  # conditioning frame -> one prompt for each of the n objects
    num_frames: int  # real frames of their clips


def group_objects(
    clip_prompts: Sequence[Sequence[Prompt]], lengths: Sequence[int]
) -> list[ObjectGroup]:
    """Groups of the objects of a batch; one whose prompts are all empty is in none.

    Args:
        clip_prompts: of each clip; the objects of the batch are counted in their order.
        lengths: real frames of each clip.

    Raises:
        UserError: a prompt outside its clip, or two for one object on one frame.
    """
    groups: dict[tuple[int, ...], list[tuple[int, dict[int, Prompt]]]] = {}
    index = 0
    for prompts, length in zip(clip_prompts, lengths, strict=True):
        for object_id, own in by_object(prompts).items():
            on_frame: dict[int, Prompt] = {}
            for prompt in own:
                if is_empty(prompt):
                    continue
                frame_idx = int(prompt["frame_index"])
                if not 0 <= frame_idx < length:
                    raise UserError(
                        f"object {object_id} has a prompt on frame {frame_idx} of a clip with "
                        f"{length} frames; expected 0 to {length - 1}"
                    )
                if frame_idx in on_frame:
                    raise UserError(
                        f"object {object_id} has two prompts on frame {frame_idx} of one clip; "
                        "give one, with all its points"
                    )
                on_frame[frame_idx] = prompt
            if on_frame:
                groups.setdefault((length, *sorted(on_frame)), []).append((index, on_frame))
            index += 1
    return [
        ObjectGroup(
            [index for index, _ in members],
            {t: [on_frame[t] for _, on_frame in members] for t in conditioning},
            length,
        )
        for (length, *conditioning), members in groups.items()
    ]


def by_object(prompts: Sequence[Prompt]) -> dict[int | str, list[Prompt]]:
    """Object id -> its prompts; objects in the order of their first prompt."""
    objects: dict[int | str, list[Prompt]] = {}
    for prompt in prompts:
        objects.setdefault(prompt["object_id"], []).append(prompt)
    return objects


def split_by_kind(prompts: Sequence[Prompt], device: torch.device):
    """Prompts that SAM 2 can take together: ((n,) rows, point inputs or None, masks or None)."""
    kinds: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        num_points = 0 if prompt["mask"] is not None else len(prompt["points"])
        kinds.setdefault(num_points, []).append(row)
    for num_points, rows in sorted(kinds.items()):
        index = torch.tensor(rows, device=device)
        if num_points == 0:
            masks = torch.stack([torch.as_tensor(prompts[row]["mask"]) for row in rows])
            yield index, None, masks[:, None].to(device)
        else:
            points = torch.stack([torch.as_tensor(prompts[row]["points"]) for row in rows])
            labels = torch.stack([torch.as_tensor(prompts[row]["labels"]) for row in rows])
            yield (
                index,
                {"point_coords": points.float().to(device), "point_labels": labels.to(device)},
                None,
            )


def merge_objects(parts: Sequence[tuple[torch.Tensor, dict[str, Any]]]) -> dict[str, Any]:
    """Outputs of several passes over one frame as those of one, objects back in order."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.argsort(torch.cat([rows for rows, _ in parts]))

    def join(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values)[order]
        return [join(list(level)) for level in zip(*values, strict=True)]

    return {name: join([current[name] for _, current in parts]) for name in parts[0][1]}


def mask_prompts(batch: Any) -> list[list[Prompt]]:
    """A mask prompt on frame 0 for each object: what SAM 2's own datapoint is understood to say."""
    prompts: list[list[Prompt]] = [[] for _ in range(batch.num_videos)]
    for index, clip in enumerate(batch.obj_to_frame_idx[0, :, 1].tolist()):
        prompts[clip].append(
            Prompt(
                object_id=index,
                frame_index=0,
                type="mask",
                points=torch.zeros(0, 2),
                labels=torch.zeros(0, dtype=torch.int32),
                box=None,
                mask=batch.masks[0, index],
            )
        )
    return prompts


def _object_slots(clip_of_object: torch.Tensor, num_clips: int) -> torch.Tensor:
    """(B, N) bool `object_valid` of a datapoint that does not carry it."""
    if (clip_of_object.diff() < 0).any():
        raise UserError(
            "SAM2Model.forward: obj_to_frame_idx mixes the objects of different clips; "
            "order them clip by clip, as SAM 2's collate_fn does"
        )
    counts = torch.bincount(clip_of_object.long(), minlength=num_clips)
    return torch.arange(int(counts.max()), device=counts.device) < counts[:, None]


def _valid_objects(
    clip_prompts: Sequence[Sequence[Prompt]], masks: torch.Tensor | None
) -> torch.Tensor:
    """(B, N) bool: as many objects of a clip as its prompts name; N as wide as the masks."""
    counts = torch.tensor([len(by_object(prompts)) for prompts in clip_prompts])
    num_objects = int(counts.max()) if masks is None else masks.shape[2]
    if int(counts.max()) > num_objects:
        raise UserError(
            f"SAM2Model.forward: prompts name {int(counts.max())} objects in a clip, masks have "
            f"{num_objects}"
        )
    return torch.arange(num_objects) < counts[:, None]


def _check_layout(images: torch.Tensor, masks: torch.Tensor | None) -> None:
    if images.ndim != 5:
        raise UserError(
            f"SAM2Model.forward: images of shape {tuple(images.shape)}; expected (B, T, C, H, W)"
        )
    if masks is not None and (masks.ndim != 5 or masks.shape[:2] != images.shape[:2]):
        raise UserError(
            f"SAM2Model.forward: masks of shape {tuple(masks.shape)} do not fit images of shape "
            f"{tuple(images.shape)}; expected (B, T, N, H, W)"
        )


def _check_prompts(
    prompts: Sequence[Prompt] | Sequence[Sequence[Prompt]], num_clips: int, image_size: int
) -> Sequence[Sequence[Prompt]]:
    """One list for each clip, also where B is 1 and the prompts came flat."""
    flat = all(isinstance(prompt, Mapping) for prompt in prompts)
    clip_prompts = [prompts] if flat and num_clips == 1 else prompts
    if (flat and num_clips > 1) or len(clip_prompts) != num_clips:
        raise UserError(
            f"SAM2Model.forward: {'one flat list' if flat else len(clip_prompts)} of prompts for "
            f"{num_clips} clips; expected a list of prompts for each clip"
        )
    for prompt in (prompt for clip in clip_prompts for prompt in clip):
        mask = prompt["mask"]
        if mask is not None and tuple(mask.shape) != (image_size, image_size):
            raise UserError(
                f"object {prompt['object_id']}: a mask prompt of {tuple(mask.shape)} pixels does "
                f"not fit a model built for {image_size}; resize it with the frames"
            )
    return clip_prompts


def _check_objects(clip_prompts: Sequence[Sequence[Prompt]], counts: Sequence[int]) -> None:
    for clip, (prompts, count) in enumerate(zip(clip_prompts, counts, strict=True)):
        named = len(by_object(prompts))
        if named != count:
            raise UserError(
                f"SAM2Model.forward: prompts name {named} objects in clip {clip}, the datapoint "
                f"has {count}; give every object a prompt, an empty one where it is not prompted"
            )
