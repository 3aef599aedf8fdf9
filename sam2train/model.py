"""SAM 2 for fine-tuning: load it, freeze what is not trained, track the objects of clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam2train.clips import (
    NO_OBJECT_LOGIT,
    NO_OBJECT_SCORE,
    BatchedVideoDatapoint,
    FramePrediction,
    Prompt,
)
from sam2train.corrections import SimulatedUser
from sam2train.errors import UserError
from sam2train.features import FeatureCaches, FeaturesConfig
from sam2train.lora import add_lora, beside_lora, is_lora
from sam2train.machine import check_available, read_device
from sam2train.memory import FrameOutput, ImageFeatures, MemoryGradient, track_clip
from sam2train.model_inputs import (
    ObjectGroup,
    TrackingInput,
    group_objects,
    read_datapoint,
    read_tensors,
)
from sam2train.pretrained import (
    MODULES,
    build_sam2,
    check_names,
    load_weights,
    match_parameters,
    resolve_config,
)
from sam2train.sharding import is_sharded, zero_of


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
        drop_path_rate: chance to skip the deepest block of the image encoder's trunk where that is
            trained, growing with depth; None as the config says.
        dropout: of the memory attention; None as the config says.
        memory_noise: in training, the chance that a memory is made from a wrong mask; see
            `memory.perturb_masks`.
        activation_checkpointing: the backward computes the steps of each frame again, which takes
            less memory and more time.
        lora: rank, and the modules whose attention layers are trained by LoRA; see `add_lora`.
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
        memory_gradient: MemoryGradient = "full",
        drop_path_rate: float | None = None,
        dropout: float | None = None,
        memory_noise: float = 0.0,
        activation_checkpointing: bool = False,
        lora: tuple[int, Sequence[str]] | None = None,
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
        self.trainable_modules = check_names(trainable_modules)
        self.device = read_device(device)
        self.image_size = image_size
        self.num_maskmem = num_maskmem
        self.max_obj_ptrs_in_encoder = max_obj_ptrs_in_encoder
        self.memory_gradient = memory_gradient
        self.drop_path_rate = drop_path_rate
        self.dropout = dropout
        self.memory_noise = memory_noise
        self.activation_checkpointing = activation_checkpointing
        self.lora = lora
        self.sam2_options = kwargs
        self.sam2: nn.Module | None = None
        # Temporal rows that hold what no training has reached -> where their values come from.
        self.untrained_rows: dict[int, str] = {}
        self._features: FeatureCaches | None = None
        self._known_positions: dict[torch.dtype, torch.Tensor] = {}

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
        self.device = read_device(device if device is not None else self.device)
        check_available(self.device)
        sam2 = build_sam2(
            resolve_config(self.config_path),
            image_size=self.image_size,
            num_maskmem=self.num_maskmem,
            max_obj_ptrs_in_encoder=self.max_obj_ptrs_in_encoder,
            drop_path_rate=self.drop_path_rate,
            dropout=self.dropout,
            **self.sam2_options,
        )
        self.untrained_rows = dict.fromkeys(range(self.num_maskmem), "random values")
        if self.checkpoint_path is not None:
            self.untrained_rows = load_weights(sam2, Path(self.checkpoint_path))
        if self.max_obj_ptrs_in_encoder == 0:
            # SAM 2 reads the pointers of conditioning frames whatever the limit: switch them off.
            sam2.use_obj_ptrs_in_encoder = False
        if self.lora is not None:
            add_lora(sam2, *self.lora)
        self.sam2 = sam2.to(self.device)
        self.configure_for_training(self.trainable_modules)
        return self

    # -- what is trained ---------------------------------------------------------------------

    def configure_for_training(
        self, trainable_modules: Sequence[str]
    ) -> dict[str, tuple[int, int]]:
        """Freeze everything, unfreeze what is listed, and report (trainable, total) per module.

        Weights with LoRA stay frozen, and its matrices are trained, whatever is listed.

        Args:
            trainable_modules: names of modules (`memory_attention`, `memory_encoder`,
                `mask_decoder`, `prompt_encoder`, `image_encoder`, or any dotted submodule), of
                parameters (`maskmem_tpos_enc`), `memory` for all parts of the memory that the
                config has (`pretrained.MEMORY`), or shell patterns over parameter names.

        Raises:
            UserError: a name that matches nothing, with the near ones.
        """
        sam2 = self._loaded()
        trainable_modules = check_names(trainable_modules)
        trained = match_parameters(sam2, trainable_modules, MODULES)
        trained -= {*beside_lora(sam2)}
        for name, parameter in sam2.named_parameters():
            parameter.requires_grad_(name in trained or is_lora(name))
        self.trainable_modules = trainable_modules
        self.train(self.training)
        return self.parameter_report()

    def parameter_report(self) -> dict[str, tuple[int, int]]:
        """(trainable, total) parameters of each module and of each parameter outside of them."""
        short = {theirs: ours for ours, theirs in MODULES.items()}
        report: dict[str, tuple[int, int]] = {}
        for name, parameter in self._loaded().named_parameters():
            module = name.split(".")[0]
            module = short.get(module, module) + (" (LoRA)" if is_lora(name) else "")
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
        *,
        interaction: SimulatedUser | None = None,
        only_frames: bool = False,
    ) -> dict[str, Any]:
        """Track every object through its clip, from its first prompt on.

        Either `images`, `prompts` (and `masks`, which only tell the number of objects and what an
        interaction corrects towards), or a batched datapoint, ours or SAM 2's own. Prompts given
        beside a datapoint replace its own. SAM 2's carries none: each object then gets its mask on
        frame 0.

        Args:
            images: (B, T, C, H, W) float32, normalised.
            masks: (B, T, N, H, W) bool.
            prompts: for each clip a list of prompts; a flat list where B is 1. The first prompt
                of an object sets its place among the N objects.
            batched_video_datapoint: used instead of the above where given.
            interaction: a simulated user who corrects what comes out, knowing the masks, and counts
                the clips. The frames then have a prediction for each of its clicks.
            only_frames: return `frames` alone, which is all that the loss needs.

        Returns:
            `pred_masks` (B, T, N, H, W) float32 logits at the image size, `iou_predictions`
            (B, T, N) and `object_score_logits` (B, T, N) of the mask that enters the memory, and
            `frames`: for each of the T frames a list of `FramePrediction`, for the loss. Frames
            before an object's first prompt hold -1024, -10 for the object score, and no prediction.
            With a sharded encoder also `zero`, to be added to the loss; see `sharding.zero_of`.

        Raises:
            UserError: layouts that do not fit each other or the model.
        """
        batch = batched_video_datapoint
        if batch is None and hasattr(images, "img_batch"):
            batch = images
        if batch is not None:
            inputs = read_datapoint(batch, prompts, self.image_size)
        elif images is not None and prompts is not None:
            inputs = read_tensors(images, masks, prompts, self.image_size)
        else:
            raise UserError("SAM2Model.forward: give images and prompts, or a batched datapoint")
        if inputs.images.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"images of {tuple(inputs.images.shape[-2:])} pixels do not fit a model built for "
                f"{self.image_size}; set model.image_size and dataset.image_size to the same side"
            )
        if interaction is not None and inputs.masks is None:
            raise UserError(
                "SAM2Model.forward: correction clicks need the masks; give them as well"
            )
        groups = group_objects(
            inputs.prompts, inputs.lengths, interaction and interaction.sample_frames
        )
        features = self.encode_images(inputs.images, inputs.image_keys)
        outputs = self._track_groups(inputs, groups, features, interaction, only_frames)
        if any(map(is_sharded, self.image_encoder.parameters())):
            outputs["zero"] = zero_of(features.levels)
        if interaction is not None:
            interaction.num_clips += len(inputs.prompts)
        return outputs

    def encode_images(
        self, images: torch.Tensor, keys: Sequence[str] | None = None
    ) -> ImageFeatures:
        """Features of (images, 3, H, W), without a graph through a frozen image encoder.

        Args:
            images: on any device.
            keys: of `transforms.image_keys`, for the feature cache; None encodes all images anew.
        """
        if keys is None or not self.caches_features:
            maps, positions = self._encode(images.to(self.device))
        else:
            modules = [self.image_encoder, *self._projections(trained=False)]
            cache = self._features.of_encoder(modules, resolve_config(self.config_path))
            maps = cache.maps(keys, lambda i: self._encode(images[i : i + 1].to(self.device))[0])
            positions = self._positions(maps[-1])
        # The decoder's own part where it is trained: an entry of the cache outlives its weights.
        maps = self._project(maps, trained=True)
        return ImageFeatures(
            [of_level.flatten(2).permute(2, 0, 1) for of_level in maps],
            positions.flatten(2).permute(2, 0, 1),
            [tuple(of_level.shape[-2:]) for of_level in maps],
        )

    @property
    def trains_encoder(self) -> bool:
        return any(p.requires_grad for p in self.image_encoder.parameters())

    @property
    def trains_decoder_convolutions(self) -> bool:
        """Whether the two convolutions that fine levels pass are trained: they are then no part of
        what the feature cache keeps."""
        return bool(self._projections(trained=True))

    def use_feature_cache(self, config: FeaturesConfig, say: Callable[[str], None] = print) -> None:
        """Keep what the frozen image encoder makes of images that come with their keys."""
        self._features = FeatureCaches(config, self.device, say) if config.cache else None

    @property
    def caches_features(self) -> bool:
        """Whether the feature cache is on; features of a trained encoder change at each step."""
        return self._features is not None and not self.trains_encoder

    @property
    def feature_counts(self) -> tuple[int, int]:
        """Images that the feature cache had, and all that were asked for, so far."""
        return (0, 0) if self._features is None else self._features.counts

    def _encode(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Maps (images, C_l, H_l, W_l), finest first, and the position encoding of the last level,
        (1, C, H, W): memory attention reads no other."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_encoder):
            backbone = self.image_encoder(images)
            num_levels = self._loaded().num_feature_levels
            maps = list(backbone["backbone_fpn"][-num_levels:])
            return self._project(maps, trained=False), backbone["vision_pos_enc"][-1][:1]

    def _positions(self, of_level: torch.Tensor) -> torch.Tensor:
        """Of the last level, (1, C, H, W): they do not depend on the image."""
        if of_level.dtype not in self._known_positions:
            # An evaluation may ask first, in inference mode; training goes on with these.
            with torch.inference_mode(False), torch.no_grad():
                image = torch.zeros(1, 3, self.image_size, self.image_size, device=self.device)
                self._known_positions[of_level.dtype] = self._encode(image)[1]
        return self._known_positions[of_level.dtype]

    def _projections(self, *, trained: bool) -> list[nn.Module]:
        """The two convolutions of the mask decoder that fine levels pass, where they are trained or
        where they are not."""
        sam2 = self._loaded()
        if not sam2.use_high_res_features_in_sam:
            return []
        decoder = sam2.sam_mask_decoder
        is_trained = any(
            p.requires_grad
            for conv in (decoder.conv_s0, decoder.conv_s1)
            for p in conv.parameters()
        )
        return [decoder.conv_s0, decoder.conv_s1] if is_trained == trained else []

    def _project(self, maps: list[torch.Tensor], *, trained: bool) -> list[torch.Tensor]:
        projections = self._projections(trained=trained)
        fine = [conv(of_level) for conv, of_level in zip(projections, maps, strict=False)]
        return fine + maps[len(fine) :]

    def _track_groups(
        self,
        inputs: TrackingInput,
        groups: Sequence[ObjectGroup],
        features: ImageFeatures,
        interaction: SimulatedUser | None,
        only_frames: bool,
    ) -> dict[str, Any]:
        """The forward pass after the image encoder: groups of objects, one after the other."""
        image_index = inputs.image_index.to(self.device)
        object_valid = inputs.object_valid
        num_frames = len(image_index)
        if not only_frames:
            clip_of_object, slot_of_object = (
                object_valid.nonzero().to(self.device).unbind(1)
            )  # (O,)
        frames: list[list[FramePrediction]] = [[] for _ in range(num_frames)]
        places: list[torch.Tensor] = []  # each (3, n): where the objects of an output belong
        outputs: list[FrameOutput] = []
        for group in groups:
            objects = torch.tensor(group.objects, device=self.device)
            corrections = None
            if group.corrected:
                truth = inputs.masks.to(self.device)[:, objects]  # (T, n, H, W)
                void = inputs.ignore
                void = None if void is None else void.to(self.device)[:, objects]
                corrections = {
                    t: interaction.correct(
                        t, group.places, truth[t], None if void is None else void[t]
                    )
                    for t in group.corrected
                }
            for output in track_clip(
                self._loaded(),
                partial(_features_of_objects, features, image_index[:, objects]),
                group.num_frames,
                group.prompts,
                corrections=corrections,
                memory_gradient=self.memory_gradient,
                recompute=self.activation_checkpointing and torch.is_grad_enabled(),
                noise=self.memory_noise if self.training else 0.0,
            ):
                if not only_frames:
                    frame = torch.full_like(objects, output.frame_idx)
                    places.append(
                        torch.stack([clip_of_object[objects], frame, slot_of_object[objects]])
                    )
                    outputs.append(output)
                frames[output.frame_idx] += [
                    replace(step, objects=objects[step.objects]) for step in output.passes
                ]

        if only_frames:
            return {"frames": frames}

        def gather(name: str, fill: float, *size: int) -> torch.Tensor:
            shape = (object_valid.shape[0], num_frames, object_valid.shape[1], *size)
            result = torch.full(shape, fill, device=self.device)
            if outputs:
                # One write for all frames: each costs a copy of the whole tensor in the backward
                # pass.
                values = torch.cat([getattr(output, name) for output in outputs]).float()
                result[tuple(torch.cat(places, dim=1))] = values.view(-1, *size)
            return result  # (B, T, N, ...)

        return {
            "pred_masks": gather("mask_logits", NO_OBJECT_LOGIT, self.image_size, self.image_size),
            "iou_predictions": gather("iou_predictions", 0.0),
            "object_score_logits": gather("object_score_logits", NO_OBJECT_SCORE),
            "frames": frames,
        }


def _features_of_objects(
    features: ImageFeatures, image_index: torch.Tensor, frame_idx: int
) -> ImageFeatures:
    """Features of one frame, an entry for each object; `image_index` is (T, n)."""
    return features.select(image_index[frame_idx])
