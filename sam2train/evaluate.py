"""Whole videos, frame by frame with a streaming memory -> J and F at the videos' own size.

Scores come in three layers: `metrics.measure` compares masks (`Measures`), `track_videos` here
follows the objects of a video (`TrackedVideo`), `scores.score` makes a table of them (`Scores`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sam2train.clips import Prompt
from sam2train.data_clips import ClipDataset
from sam2train.data_source import FRAME_TIMEOUT, Video, only_prompts
from sam2train.machine import Aside
from sam2train.memory import FrameOutput, ImageFeatures, track_clip
from sam2train.metrics import (
    EvaluationConfig,
    FramePolicy,
    Measures,
    MemoryAdmission,
    VideoScores,
    VoidRule,
    join,
    measure,
    score_measures,
)
from sam2train.model import SAM2Model
from sam2train.prompts import PromptGenerator
from sam2train.transforms import image_keys, normalise, stack_frames

# Keeps the random numbers of evaluation prompts apart from those of training clips.
_PROMPT_STREAM = (1,)
# Frames that are encoded at once where none is kept, as large products are faster. A guess.
_ENCODED_TOGETHER = 4
# Pieces of `_ENCODED_TOGETHER` frames, or single ones, that are decoded while others are tracked,
# and frames that wait to be measured. More would not help where one of these is the slowest.
_AHEAD, _BEHIND = 2, 2


@dataclass(frozen=True)
class TrackedFrame:
    """The objects of one frame as a model sees them, by object id; before its prompt an object has
    no entry."""

    masks: Mapping[int | str, np.ndarray]  # (H, W) bool
    # logits of being visible; empty if the tracker gives none
    object_scores: Mapping[int | str, float]
    # the IoU that the model predicts of its masks; empty if the tracker gives none
    iou_predictions: Mapping[int | str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SeenFrame:
    """One frame of a video with what the model made of it; every object has its masks."""

    video: Video
    prompts: list[Prompt]  # `frame_index` counts in the video, coordinates in the model's input
    frame_idx: int
    prediction: dict[int | str, np.ndarray]  # object id -> (H, W) bool
    ground_truth: dict[int | str, np.ndarray]
    # (H, W) bool: pixels that no score counts; None: there are none
    ignore: np.ndarray | None = None


@dataclass(frozen=True)
class TrackedVideo:
    """One video with how well it was tracked. It holds no masks: see `SeenFrame`."""

    video: Video
    prompts: list[Prompt]  # as in `SeenFrame`
    measures: dict[int | str, Measures]  # object id -> on the L labelled frames
    scores: VideoScores
    # (T,) float32 logits of being visible, NaN before the prompt; empty if the tracker gives none
    object_scores: dict[int | str, np.ndarray]


# All frames of a video in order.
Track = Callable[[ClipDataset, Video, list[Prompt]], Iterator[TrackedFrame]]
DrawPrompts = Callable[[ClipDataset, Video, np.random.Generator], list[Prompt]]
# Their first argument counts the videos.
OnFrame = Callable[[int, SeenFrame], None]
OnVideo = Callable[[int, TrackedVideo], None]


def track_videos(
    track: Track,
    dataset: ClipDataset,
    config: EvaluationConfig,
    *,
    seed: int,
    draw_prompts: DrawPrompts | None = None,
    on_frame: OnFrame | None = None,
    only: Collection[int] | None = None,
) -> Iterator[TrackedVideo]:
    """The videos of a data set, tracked and measured, one after the other.

    Each object is prompted once, on the first frame that shows it, and tracked to the end. Each
    frame is measured when it comes and then dropped, so that a video may be of any length.

    Args:
        track: the model, or a baseline such as `copy_first_mask`.
        seed: draws the prompts; the same seed gives every model the same ones.
        draw_prompts: None takes `first_prompts` of the types in `config`.
        on_frame: sees each frame, for pictures.
        only: places of the videos to track; None tracks all.
    """
    draw_prompts = draw_prompts or partial(first_prompts, prompt_types=config.prompt_types)
    videos = [
        replace(video, frames=video.frames[: _end(video, config.max_frames)])
        for video in dataset.videos[: config.max_videos]
    ]
    for index, video in enumerate(videos):
        if only is not None and index not in only:
            continue
        rng = np.random.default_rng(np.random.SeedSequence([seed, index], spawn_key=_PROMPT_STREAM))
        prompts = draw_prompts(dataset, video, rng)
        measures: dict[int | str, list[Measures]] = {o: [] for o in video.object_ids}
        object_scores: dict[int | str, np.ndarray] = {}
        see = None if on_frame is None else partial(on_frame, index)
        labelled = set(video.labelled)
        look = partial(_look, dataset, video, prompts, config.void, labelled, measures, see)
        with Aside(_BEHIND, FRAME_TIMEOUT) as scorer:
            for t, frame in enumerate(track(dataset, video, prompts)):
                scorer.do(partial(look, t, frame))
                for object_id, value in frame.object_scores.items():
                    if object_id not in object_scores:
                        object_scores[object_id] = np.full(len(video.frames), np.nan, np.float32)
                    object_scores[object_id][t] = value
                while scorer.is_full:
                    scorer.next_result()
            while scorer.waiting:
                scorer.next_result()
        joined = {o: join(parts) for o, parts in measures.items()}
        scored = score_labelled(video, joined, config.frame_policy)
        yield TrackedVideo(video, prompts, joined, scored, object_scores)


def _look(
    dataset: ClipDataset,
    video: Video,
    prompts: list[Prompt],
    void: VoidRule,
    labelled: Collection[int],
    measures: Mapping[int | str, list[Measures]],
    see: Callable[[SeenFrame], None] | None,
    t: int,
    frame: TrackedFrame,
) -> None:
    """Measure a frame if it is labelled, and show it."""
    seen = _see(dataset, video, prompts, t, frame, void)
    ignore = None if seen.ignore is None else seen.ignore[None]
    for object_id, of_object in measures.items() if t in labelled else ():
        pair = seen.prediction[object_id][None], seen.ground_truth[object_id][None]
        of_object.append(measure(*pair, ignore=ignore))
    if see is not None:
        see(seen)


def _end(video: Video, max_frames: int | None) -> int:
    """How many frames of a video there are up to the last labelled one that counts."""
    if max_frames is None or len(video.labelled) < max_frames:
        return len(video.frames)
    return video.labelled[max_frames - 1] + 1


def _see(
    dataset: ClipDataset,
    video: Video,
    prompts: list[Prompt],
    frame_idx: int,
    frame: TrackedFrame,
    void: VoidRule,
) -> SeenFrame:
    empty = np.zeros(video.size, bool)
    return SeenFrame(
        video,
        prompts,
        frame_idx,
        {o: frame.masks.get(o, empty) for o in video.object_ids},
        {o: dataset.read_mask(video, frame_idx, o) for o in video.object_ids},
        dataset.read_ignore(video, frame_idx) if void == "ignore" else None,
    )


def score_labelled(
    video: Video, measures: Mapping[int | str, Measures], policy: FramePolicy
) -> VideoScores:
    """The scores of a video from the measures of its labelled frames; `frames` counts in the
    video."""
    labelled = np.array(video.labelled, np.int64)
    scored = score_measures(measures, policy)
    return replace(
        scored, objects=tuple(replace(s, frames=labelled[s.frames]) for s in scored.objects)
    )


def why_not_scored(videos: Sequence[Video], policy: FramePolicy) -> str | None:
    """What is said of videos that have prompts and no ground truth; None where they can be scored:
    all others, and under the policy `all` those with one labelled frame each."""
    if not only_prompts(videos):
        return None
    if policy == "all" and all(len(video.labelled) < 2 for video in videos):
        return None
    return (
        "each object has a mask on one frame only, its prompt, as in a test set: nothing can be "
        "scored here"
    )


def first_prompts(
    dataset: ClipDataset,
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


def first_views(dataset: ClipDataset, video: Video) -> Iterator[tuple[int | str, int, np.ndarray]]:
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
    dataset: ClipDataset,
    video: Video,
    prompts: list[Prompt],
    *,
    bf16: bool = False,
    rules: EvaluationConfig | None = None,
) -> Iterator[TrackedFrame]:
    """Masks at the video's own size, frame by frame; where objects overlap, the one of the highest
    logit has the pixel, unless `rules.overlap` says otherwise.

    Image features are kept for one frame, memories as long as memory attention can read them.
    """
    begin = min((prompt["frame_index"] for prompt in prompts), default=len(video.frames))
    yield from itertools.repeat(TrackedFrame({}, {}), begin)
    for _, object_ids, current in track_frames(
        model, dataset, video, prompts, bf16=bf16, rules=rules
    ):
        logits = current["low_res_logits"][:, None]
        resized = F.interpolate(logits, video.size, mode="bilinear", align_corners=False)
        if rules is not None and rules.overlap:
            masks = list((resized[:, 0] > 0).cpu().numpy())
        else:
            surest, winner = resized[:, 0].max(dim=0)  # (H, W)
            winner = winner.where(surest > 0, -1).to(torch.int16).cpu().numpy()
            masks = [winner == place for place in range(len(object_ids))]
        scores = current["object_score_logits"][:, 0].tolist()
        ious = current["iou_predictions"].tolist()
        yield TrackedFrame(
            dict(zip(object_ids, masks, strict=True)),
            dict(zip(object_ids, scores, strict=True)),
            dict(zip(object_ids, ious, strict=True)),
        )


def copy_first_mask(
    dataset: ClipDataset, video: Video, prompts: list[Prompt], *, overlap: bool = False
) -> Iterator[TrackedFrame]:
    """The baseline without a model: an object stays where the ground truth has it on its prompted
    frame, whatever the prompt. Where objects overlap, the one prompted last has the pixel, or each
    of them."""
    masks: dict[int | str, np.ndarray] = {}
    for t in range(len(video.frames)):
        for object_id in [p["object_id"] for p in prompts if p["frame_index"] == t]:
            mask = dataset.read_mask(video, t, object_id)
            if not overlap:
                masks = {other: of_other & ~mask for other, of_other in masks.items()}
            masks = {**masks, object_id: mask}
        yield TrackedFrame(masks, {})


# What a frame's tensors are called; the memory stays in the tracker.
_STREAMED = ("low_res_logits", "object_score_logits", "iou_predictions")


# What `build_sam2_video_predictor` turns on, and training never has: a clicked mask enters the
# memory as a binary one, and where the decoder's single mask is not stable the best of three
# replaces it. It also fills holes of up to 8 pixels, with an extension that is compiled for CUDA:
# left out here.
_PREDICTOR_DEFAULTS = {
    "binarize_mask_from_pts_for_mem_enc": True,
    "sam_mask_decoder.dynamic_multimask_via_stability": True,
    "sam_mask_decoder.dynamic_multimask_stability_delta": 0.05,
    "sam_mask_decoder.dynamic_multimask_stability_thresh": 0.98,
}


@contextmanager
def evaluating(model: SAM2Model, rules: EvaluationConfig | None = None) -> Iterator[None]:
    """The model in eval mode, with the predictor's defaults where the rules ask for them; all as
    before at the end."""
    was_training, before = model.training, []
    model.eval()
    try:
        if rules is not None and rules.predictor_defaults:
            for path, value in _PREDICTOR_DEFAULTS.items():
                parent, _, name = path.rpartition(".")
                module = model.sam2.get_submodule(parent)
                before.append((module, name, getattr(module, name)))
                setattr(module, name, value)
        yield
    finally:
        model.train(was_training)
        for module, name, value in before:
            setattr(module, name, value)


@torch.inference_mode()
def track_frames(
    model: SAM2Model,
    dataset: ClipDataset,
    video: Video,
    prompts: list[Prompt],
    *,
    bf16: bool = False,
    rules: EvaluationConfig | None = None,
) -> Iterator[tuple[int, list[int | str], dict[str, Any]]]:
    """Stream a video: frame, the n objects prompted so far, and of them `low_res_logits`
    (n, H / 4, W / 4), `object_score_logits` (n, 1) and `iou_predictions` (n,), float32.

    An object may be prompted on several frames. As in SAM 2's predictor, every other frame reads
    the memories of all of these, later ones too. Such a later frame is encoded twice.

    Args:
        rules: `memory_admission` and `predictor_defaults` of these count here; None has neither.
            With limits on what enters the memory, objects have a memory each and are tracked one by
            one, which takes longer.
    """
    rules = rules or EvaluationConfig()
    admission = rules.memory_admission
    limited = admission.name != MemoryAdmission().name
    num_frames = len(video.frames)
    trackers: list[tuple[list[int | str], Iterator[FrameOutput]]] = []
    current: tuple[int, ImageFeatures | None] = (-1, None)

    def features_of(t: int, num_objects: int) -> ImageFeatures:
        features = current[1]
        if t != current[0]:  # a frame that is prompted later
            _, features = next(_encode_frames(model, dataset, video, range(t, t + 1), bf16))
        everyone = torch.zeros(num_objects, dtype=torch.long, device=model.device)
        return features.select(everyone)

    def admits(output: FrameOutput) -> bool:
        return admission.admits(output.object_score_logits.item(), output.iou_predictions.item())

    def follow(group: Mapping[int, list[Prompt]]) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of objects that are prompted on the same frames, in the order of time."""
        begin = min(group)
        num_objects = len(group[begin])
        outputs = track_clip(
            model.sam2,
            lambda t: features_of(t, num_objects),
            num_frames,
            group,
            admits=admits if limited else None,
        )
        early: dict[int, dict[str, torch.Tensor]] = {}  # of the frames that are prompted later
        for t in range(begin, num_frames):
            while t not in early:
                output = next(outputs)
                early[output.frame_idx] = {name: getattr(output, name) for name in _STREAMED}
            yield early.pop(t)

    with evaluating(model, rules):
        groups = _same_frames(prompts, together=not limited)
        first = min((t for group in groups for t in group), default=num_frames)
        # All groups of objects advance together.
        for current in _encode_frames(model, dataset, video, range(first, num_frames), bf16):
            t = current[0]
            for group in groups:
                if min(group) == t:
                    trackers.append(([p["object_id"] for p in group[t]], follow(group)))
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                outputs = [next(tracker) for _, tracker in trackers]
            yield (
                t,
                [o for object_ids, _ in trackers for o in object_ids],
                {name: torch.cat([out[name].float() for out in outputs]) for name in _STREAMED},
            )


@torch.inference_mode()
def segment_frame(
    model: SAM2Model, dataset: ClipDataset, video: Video, prompt: Prompt, *, bf16: bool = False
) -> np.ndarray:
    """(H, W) bool at the model's input size: its answer on the prompted frame."""
    with evaluating(model):
        t = prompt["frame_index"]
        frame = dataset.read_frame(video, t, dataset.image_size)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            features = model.encode_images(normalise(frame[None]), image_keys(frame[None]))
            # A video that ends on the prompted frame.
            (output,) = track_clip(model.sam2, lambda _: features, t + 1, {t: [prompt]})
        return (output.mask_logits[0] > 0).cpu().numpy()


def _same_frames(
    prompts: Sequence[Prompt], *, together: bool = True
) -> list[dict[int, list[Prompt]]]:
    """The objects in groups that are prompted on the same frames: frame -> a prompt for each; or
    each object in a group of its own."""
    by_object: dict[int | str, dict[int, Prompt]] = {}
    for prompt in prompts:
        by_object.setdefault(prompt["object_id"], {})[prompt["frame_index"]] = prompt
    groups: dict[Hashable, dict[int, list[Prompt]]] = {}
    for object_id, own in by_object.items():
        key = tuple(sorted(own)) if together else object_id
        group = groups.setdefault(key, {t: [] for t in sorted(own)})
        for t, prompt in own.items():
            group[t].append(prompt)
    return list(groups.values())


def _encode_frames(
    model: SAM2Model, dataset: ClipDataset, video: Video, frames: range, bf16: bool
) -> Iterator[tuple[int, ImageFeatures]]:
    """Frames with their features: some encoded together, or each as the feature cache has it."""
    together = 1 if model.caches_features else _ENCODED_TOGETHER
    pieces = [frames[k : k + together] for k in range(0, len(frames), together)]

    def read(places: range) -> tuple[torch.Tensor, list[str]]:
        images = stack_frames([dataset.read_frame(video, t, dataset.image_size) for t in places])
        return normalise(images), image_keys(images)

    with Aside(_AHEAD, FRAME_TIMEOUT) as reader:
        given = iter(pieces)
        for places in pieces:
            while not reader.is_full and (following := next(given, None)) is not None:
                reader.do(partial(read, following))
            images, keys = reader.next_result()
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                features = model.encode_images(images, keys)
            for place, t in enumerate(places):
                yield t, features.select(torch.tensor([place], device=model.device))
