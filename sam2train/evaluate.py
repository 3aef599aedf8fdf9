"""Whole videos, frame by frame with a streaming memory -> J, F and J&F at the videos' own size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from sam2train.clips import Prompt
from sam2train.config import Section
from sam2train.datasets import VideoDataset
from sam2train.metrics import FramePolicy, VideoScores, mean_scores, score_video
from sam2train.model import MemoryBank, SAM2Model
from sam2train.prompts import PromptGenerator
from sam2train.sampling import AnnotatedVideos
from sam2train.transforms import normalise, resize_image
from sam2train.videos import Video

# Keeps the random numbers of evaluation prompts apart from those of training clips.
_PROMPT_STREAM = (1,)


class EvaluationConfig(Section):
    """The `evaluation:` section."""

    prompt_types: tuple[Literal["point", "bbox", "mask"], ...] | None = Field(
        None, description="prompts of the objects; null takes those of the training data"
    )
    frame_policy: FramePolicy = Field("after_prompt", description="frames that count")
    max_videos: int | None = Field(None, ge=1, description="the first so many; null scores all")
    max_frames: int | None = Field(None, ge=2, description="of each video, the first so many")
    num_overlays: int = Field(3, ge=0, description="videos drawn at each evaluation")


@dataclass(frozen=True)
class Tracks:
    """The objects of one video as a model sees them, by object id."""

    masks: dict[int | str, np.ndarray]  # (T, H, W) bool
    # (T,) float32 logits of being visible, NaN before the prompt; empty if nobody gives any
    object_scores: dict[int | str, np.ndarray]


@dataclass(frozen=True)
class TrackedVideo:
    """One video with what the model made of it."""

    video: Video
    prompts: list[Prompt]  # `frame_index` counts in the video, coordinates in the model's input
    prediction: dict[int | str, np.ndarray]  # object id -> (T, H, W) bool
    ground_truth: dict[int | str, np.ndarray]
    scores: VideoScores
    object_scores: dict[int | str, np.ndarray]  # as in `Tracks`


Videos = AnnotatedVideos | VideoDataset
Track = Callable[[Videos, Video, list[Prompt]], Tracks]
DrawPrompts = Callable[[Videos, Video, np.random.Generator], list[Prompt]]


def evaluate(
    model: SAM2Model,
    dataset: Videos,
    config: EvaluationConfig,
    *,
    seed: int,
    bf16: bool = False,
    on_video: Callable[[int, TrackedVideo], None] | None = None,
) -> dict[str, float]:
    """`score_tracks` of a model."""
    track = partial(track_video, model, bf16=bf16)
    return score_tracks(track, dataset, config, seed=seed, on_video=on_video)


def score_tracks(
    track: Track,
    dataset: Videos,
    config: EvaluationConfig,
    *,
    seed: int,
    draw_prompts: DrawPrompts | None = None,
    on_video: Callable[[int, TrackedVideo], None] | None = None,
) -> dict[str, float]:
    """`J`, `F`, `J_and_F` and their companions over all objects of a data set.

    Each object is prompted once, on the first frame that shows it, and tracked to the end.

    Args:
        track: the model, or a baseline such as `copy_first_mask`.
        seed: draws the prompts; the same seed gives every model the same ones.
        draw_prompts: None takes `first_prompts` of the types in `config`.
        on_video: sees each video as it is done, for pictures and tables.

    Raises:
        UserError: no object has a frame to score.
    """
    draw_prompts = draw_prompts or partial(first_prompts, prompt_types=config.prompt_types)
    videos = [
        replace(video, frames=video.frames[: config.max_frames])
        for video in dataset.videos[: config.max_videos]
    ]
    scores = []
    for index, video in enumerate(videos):
        rng = np.random.default_rng(np.random.SeedSequence([seed, index], spawn_key=_PROMPT_STREAM))
        prompts = draw_prompts(dataset, video, rng)
        tracks = track(dataset, video, prompts)
        truth = {
            object_id: np.stack(
                [dataset.read_mask(video, t, object_id) for t in range(len(video.frames))]
            )
            for object_id in video.object_ids
        }
        scored = score_labelled(video, tracks.masks, truth, config.frame_policy)
        scores.append(scored)
        if on_video is not None:
            on_video(
                index,
                TrackedVideo(video, prompts, tracks.masks, truth, scored, tracks.object_scores),
            )
    return mean_scores(scores)


def score_labelled(
    video: Video,
    prediction: dict[int | str, np.ndarray],
    ground_truth: dict[int | str, np.ndarray],
    policy: FramePolicy,
) -> VideoScores:
    """The scores of a video on its labelled frames; `frames` counts in the video."""
    labelled = np.array(video.labelled, np.int64)
    scored = score_video(
        {o: masks[labelled] for o, masks in prediction.items()},
        {o: masks[labelled] for o, masks in ground_truth.items()},
        policy,
    )
    return replace(
        scored, objects=tuple(replace(s, frames=labelled[s.frames]) for s in scored.objects)
    )


def first_prompts(
    dataset: Videos,
    video: Video,
    rng: np.random.Generator,
    prompt_types: tuple[str, ...] | None = None,
) -> list[Prompt]:
    """One prompt for each object, on the first frame that shows it at the model's input size."""
    generator = dataset.prompts
    if prompt_types is not None:
        generator = PromptGenerator(
            prompt_types,
            generator.num_of_pos_points,
            generator.include_center,
            generator.num_of_neg_points,
        )
    return [
        generator.generate(mask, rng, object_id=object_id, frame_index=t)
        for object_id, t, mask in first_views(dataset, video)
    ]


def first_views(dataset: Videos, video: Video) -> Iterator[tuple[int | str, int, np.ndarray]]:
    """Each object with the first frame that shows it and its (H, W) bool mask, both at the size of
    the model's input; objects too small for that size are left out."""
    for object_id in video.object_ids:
        for t in range(len(video.frames)):
            mask = dataset.read_mask(video, t, object_id, dataset.image_size)
            if mask.any():
                yield object_id, t, mask
                break


def track_video(
    model: SAM2Model,
    dataset: Videos,
    video: Video,
    prompts: list[Prompt],
    *,
    bf16: bool = False,
) -> Tracks:
    """Masks at the video's own size; where objects overlap the surer wins.

    An object is empty before its prompt. Image features live for one frame, memories as long as
    memory attention can reach them.
    """
    num_frames = len(video.frames)
    tracks = _empty_tracks(video)
    tracks.object_scores.update(
        {o: np.full(num_frames, np.nan, np.float32) for o in video.object_ids}
    )
    for t, object_ids, current in track_frames(model, dataset, video, prompts, bf16=bf16):
        logits = current["low_res_logits"][:, None]
        resized = F.interpolate(logits, video.size, mode="bilinear", align_corners=False)
        surest, winner = resized[:, 0].max(dim=0)  # (H, W)
        for place, object_id in enumerate(object_ids):
            tracks.masks[object_id][t] = ((winner == place) & (surest > 0)).cpu().numpy()
            tracks.object_scores[object_id][t] = current["object_score_logits"][place].item()
    return tracks


def copy_first_mask(dataset: Videos, video: Video, prompts: list[Prompt]) -> Tracks:
    """The baseline without a model: an object stays where the ground truth has it on its prompted
    frame, whatever the prompt. Where objects overlap, the one prompted last wins."""
    tracks = _empty_tracks(video)
    for prompt in sorted(prompts, key=lambda prompt: prompt["frame_index"]):
        t, object_id = prompt["frame_index"], prompt["object_id"]
        mask = dataset.read_mask(video, t, object_id)
        for other in tracks.masks.values():
            other[t:] &= ~mask
        tracks.masks[object_id][t:] = mask
    return tracks


def _empty_tracks(video: Video) -> Tracks:
    shape = len(video.frames), *video.size
    return Tracks({o: np.zeros(shape, bool) for o in video.object_ids}, {})


@torch.inference_mode()
def track_frames(
    model: SAM2Model,
    dataset: Videos,
    video: Video,
    prompts: list[Prompt],
    *,
    bf16: bool = False,
) -> Iterator[tuple[int, list[int | str], dict[str, Any]]]:
    """Stream a video: frame, the n objects prompted so far, and of them `low_res_logits`
    (n, H / 4, W / 4) and `object_score_logits` (n, 1), float32."""
    was_training = model.training
    model.eval()
    num_frames = len(video.frames)
    reach = max(model.num_maskmem, model.max_obj_ptrs_in_encoder)
    groups: list[tuple[list[int | str], MemoryBank]] = []
    try:
        for t in range(num_frames):
            starting = [prompt for prompt in prompts if prompt["frame_index"] == t]
            if starting:
                groups.append(([prompt["object_id"] for prompt in starting], MemoryBank()))
            if not groups:
                continue
            frame = resize_image(dataset.read_frame(video, t), dataset.image_size)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                features = model.encode_images(normalise(frame[None]).to(model.device))
                outputs = []
                for place, (object_ids, bank) in enumerate(groups):
                    begins = bool(starting) and place == len(groups) - 1
                    everyone = torch.zeros(len(object_ids), dtype=torch.long, device=model.device)
                    current, _ = model.track_frame(
                        t,
                        features.select(everyone),
                        bank,
                        num_frames,
                        starting if begins else None,
                        encode_memory=t + 1 < num_frames,
                    )
                    bank.forget_before(t + 1 - reach)
                    outputs.append(current)
            yield (
                t,
                [o for object_ids, _ in groups for o in object_ids],
                {
                    name: torch.cat([current[name].float() for current in outputs])
                    for name in ("low_res_logits", "object_score_logits")
                },
            )
    finally:
        model.train(was_training)
