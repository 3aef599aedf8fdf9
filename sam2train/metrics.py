"""J, F, J&F and mIoU of video object segmentation, on numpy masks.

J is the Jaccard index of a frame, F the F-measure of the mask's outline with a tolerance of a few
pixels (Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation", CVPR 2016). The values are those of the DAVIS 2017 evaluation code and of SAM 2's
SA-V evaluator, which agree on a frame and differ in the frames they count: see `FramePolicy`.
Letters are those of `clips`: T frames, H W pixels. Pixels that nobody labelled (void) are left out
where `measure` is told of them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from sam2train.config import Section
from sam2train.errors import UserError
from sam2train.prompts import TypeName

# Which frames count for an object; a score is complete only with the name of its rule.
#   all           every frame.
#   davis         all but the first and the last (DAVIS semi-supervised). The DAVIS program never
#                 scores ids above the largest on frame 0; here they are scored by the same rule.
#   sav           as davis, but not before the object is first seen in either stack (the SA-V
#                 evaluator); an object that the ground truth never shows on these is not scored.
#   after_prompt  all frames after the first on which the ground truth shows the object, the last
#                 included: for an evaluation that prompts each object on the frame it enters.
FramePolicy = Literal["all", "davis", "sav", "after_prompt"]

# Pixels that the annotators left undecided.
#   ignore      left out of both masks, as VOST and the panoptic programs do.
#   background  of no object, as the DAVIS program has it: predicting them costs.
VoidRule = Literal["ignore", "background"]


class MemoryAdmission(Section):
    """The `evaluation.memory_admission` section: which tracked frames may enter the memory.

    Both limits are of SAMURAI, SAM2Long and DAM4SAM, which track without training. A frame that
    may not is not read later, neither its memory nor its object pointer.
    """

    min_object_score: float | None = Field(
        None, description="least logit of the object being there; null: any"
    )
    min_predicted_iou: float | None = Field(
        None, ge=0, le=1, description="least IoU that the model predicts of its mask; null: any"
    )

    @property
    def name(self) -> str:
        """For tables and files: `all`, or the limits."""
        limits = (("score", self.min_object_score), ("iou", self.min_predicted_iou))
        return " ".join(f"{key}>={limit:g}" for key, limit in limits if limit is not None) or "all"

    def admits(self, object_score: float, predicted_iou: float) -> bool:
        """Whether a frame of one object may enter."""
        least_score, least_iou = self.min_object_score, self.min_predicted_iou
        return (least_score is None or object_score >= least_score) and (
            least_iou is None or predicted_iou >= least_iou
        )


class EvaluationConfig(Section):
    """The `evaluation:` section."""

    prompt_types: tuple[TypeName, ...] | None = Field(
        None,
        min_length=1,
        description="prompts of the objects; null takes those of the training data",
    )
    seed: int | None = Field(
        0,
        ge=0,
        lt=2**63,
        description="draws the prompts, the same ones in every run; null: trainer.seed, so that "
        "each run has its own",
    )
    frame_policy: FramePolicy = Field("after_prompt", description="frames that count")
    void: VoidRule = Field(
        "ignore",
        description="pixels that the annotators left undecided (void, crowds): ignore leaves them "
        "out of J and F; background counts them as such, as the DAVIS program does",
    )
    memory_admission: MemoryAdmission = Field(
        default_factory=MemoryAdmission,
        description="which tracked frames may enter the memory; all, as in SAM 2, by default",
    )
    overlap: bool = Field(
        False,
        description="objects may share pixels, as in SAM 2's evaluation on SA-V; false: the pixel "
        "is of the object with the highest logit",
    )
    max_videos: int | None = Field(None, ge=1, description="the first so many; null scores all")
    max_frames: int | None = Field(
        None, ge=2, description="labelled ones of each video, the first so many"
    )
    predictor_defaults: bool = Field(
        False,
        description="score with what SAM 2's deployed predictor turns on and training never has: "
        "clicked masks enter the memory binarised, and the best of three masks replaces one that "
        "is not stable",
    )
    attributes: str | None = Field(
        None,
        description="a CSV of video, object, attribute, by which --evaluate prints J&F as well; "
        "null: attributes.csv beside the data, where it is",
    )
    num_overlays: int = Field(3, ge=0, description="videos drawn: best, median and worst change")


# Whose masks are scored, in the column `model` of the files.
TRAINED, BASE, COPY = "trained", "base", "copy_first_mask"
JANDF = "J&F"  # how people write `J_and_F`


def jaccard(prediction: np.ndarray, ground_truth: np.ndarray) -> np.ndarray:
    """J of every frame: (T,) float64 in [0, 1]; 1 where both masks are empty, 0 where one is.

    Takes (T, H, W) bool stacks; ValueError for anything else or for different shapes.
    """
    return _ratio(*_overlap(prediction, ground_truth))


def iou(prediction: np.ndarray, ground_truth: np.ndarray) -> float:
    """Intersection over union of a whole stack, pixels of all frames together; both empty 1.

    Large frames weigh more than in the mean of `jaccard`. Takes (T, H, W) bool stacks.
    """
    intersection, union = _overlap(prediction, ground_truth)
    return float(_ratio(intersection.sum(), union.sum()))


def boundary_f(
    prediction: np.ndarray, ground_truth: np.ndarray, tolerance: float = 0.008
) -> np.ndarray:
    """F of every frame: (T,) float64 in [0, 1]; 1 where neither mask has an outline, 0 where one.

    A mask that fills the frame has no outline, as in the DAVIS code: against an empty mask F is 1
    where J is 0.

    Args:
        prediction, ground_truth: (T, H, W) bool stacks.
        tolerance: how far apart outlines still match, as a fraction of the frame's diagonal above
            0 and below 1, rounded up to whole pixels.

    Raises:
        ValueError: stacks or a tolerance unlike these.
    """
    _check(prediction, ground_truth)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance {tolerance}; expected a fraction of the diagonal in (0, 1)")
    # np.linalg.norm as DAVIS has it: another computation may round to another whole pixel.
    radius = int(np.ceil(tolerance * np.linalg.norm(prediction.shape[1:])))
    pairs = zip(prediction, ground_truth, strict=True)
    return np.array([_boundary_f(*pair, radius) for pair in pairs], dtype=np.float64)


def recall(scores: np.ndarray) -> float:
    """Share of the frames with a score above 0.5, from (T,) scores of at least one frame."""
    return float(np.mean(scores > 0.5))


def decay(scores: np.ndarray) -> float:
    """Mean of the first quarter of (T,) scores minus mean of the last; positive = getting worse.

    The edges are those of DAVIS, whose quarters share the frame between them. Its code keeps them
    in 8 bits and so goes wrong above 256 frames; these are right for any T >= 1.
    """
    # 1e-10 rounds halves up: np.round alone rounds them to the even neighbour.
    edges = np.round(np.linspace(1, len(scores), 5) + 1e-10).astype(np.int64) - 1
    return float(np.mean(scores[: edges[1] + 1]) - np.mean(scores[edges[3] :]))


@dataclass(frozen=True, eq=False)
class ObjectScores:
    """One object in one video, on the n >= 1 frames that count for it."""

    object_id: int
    frames: np.ndarray  # (n,) int64, positions in the stacks, ascending
    J: np.ndarray  # (n,) float64
    F: np.ndarray  # (n,) float64
    iou: float  # over the pixels of all n frames

    def __post_init__(self) -> None:
        assert len(self.frames) == len(self.J) == len(self.F) > 0, "an object without frames"

    @property
    def J_mean(self) -> float:
        return float(self.J.mean())

    @property
    def F_mean(self) -> float:
        return float(self.F.mean())

    @property
    def J_and_F(self) -> float:
        return (self.J_mean + self.F_mean) / 2

    @property
    def J_recall(self) -> float:
        return recall(self.J)

    @property
    def F_recall(self) -> float:
        return recall(self.F)

    @property
    def J_decay(self) -> float:
        return decay(self.J)

    @property
    def F_decay(self) -> float:
        return decay(self.F)


@dataclass(frozen=True)
class VideoScores:
    """The objects of one video: those with scores, and the ids without a frame to score."""

    objects: tuple[ObjectScores, ...]
    not_scored: tuple[int, ...]


class Measures(NamedTuple):
    """All that the scores of one object need of T frames: its masks need not be kept."""

    intersection: np.ndarray  # (T,) int64, pixels in both masks
    predicted: np.ndarray  # (T,) int64, pixels of the prediction
    present: np.ndarray  # (T,) int64, pixels of the ground truth
    F: np.ndarray  # (T,) float64

    @property
    def union(self) -> np.ndarray:
        return self.predicted + self.present - self.intersection

    @property
    def J(self) -> np.ndarray:
        return _ratio(self.intersection, self.union)

    def select(self, frames: np.ndarray | slice) -> "Measures":
        return Measures(*(values[frames] for values in self))


def measure(
    prediction: np.ndarray,
    ground_truth: np.ndarray,
    tolerance: float = 0.008,
    ignore: np.ndarray | None = None,
) -> Measures:
    """The measures of (T, H, W) bool stacks; see `boundary_f` for the other arguments and errors.

    Args:
        ignore: (T, H, W) bool, pixels that are left out of both masks; None leaves out none.
    """
    if ignore is not None:
        _check(ignore, ground_truth)
        prediction, ground_truth = prediction & ~ignore, ground_truth & ~ignore
    F = boundary_f(prediction, ground_truth, tolerance)
    return Measures(*_counts(prediction, ground_truth), F)


def join(parts: Iterable[Measures]) -> Measures:
    """One after the other: the measures of the frames of all parts."""
    none = np.zeros((3, 0), np.int64)
    return Measures(*map(np.concatenate, zip(Measures(*none, np.zeros(0)), *parts, strict=True)))


def score_video(
    prediction: Mapping[int, np.ndarray],
    ground_truth: Mapping[int, np.ndarray],
    policy: FramePolicy,
    tolerance: float = 0.008,
) -> VideoScores:
    """Score every object of a video, ids ascending.

    Args:
        prediction, ground_truth: object_id -> (T, H, W) bool, the same ids in both. T holds
            annotated frames only. Each value is read once, so that a mapping which decodes on
            access keeps one object in memory.
        policy: which frames count, see `FramePolicy`.
        tolerance: see `boundary_f`.

    Raises:
        ValueError: the ids differ, a policy that does not exist, or stacks as in `jaccard`.
    """
    if prediction.keys() != ground_truth.keys():
        raise ValueError(
            f"objects {sorted(prediction)} were predicted and {sorted(ground_truth)} are in the "
            "ground truth; give an empty stack for an object without masks"
        )
    return score_measures(
        {o: measure(prediction[o], ground_truth[o], tolerance) for o in ground_truth}, policy
    )


def score_measures(measures: Mapping[int, Measures], policy: FramePolicy) -> VideoScores:
    """Score every object of a video, ids ascending, from its measures on the annotated frames.

    Raises:
        ValueError: a policy that does not exist.
    """
    objects, not_scored = [], []
    for object_id in sorted(measures):
        frames = counted_frames(measures[object_id], policy)
        if len(frames) == 0:
            not_scored.append(object_id)
            continue
        counted = measures[object_id].select(frames)
        objects.append(
            ObjectScores(
                object_id=object_id,
                frames=frames,
                J=counted.J,
                F=counted.F,
                iou=float(_ratio(counted.intersection.sum(), counted.union.sum())),
            )
        )
    return VideoScores(tuple(objects), tuple(not_scored))


def counted_frames(measures: Measures, policy: FramePolicy) -> np.ndarray:
    """The frames that count for an object: (n,) int64, consecutive, empty if it is not scored."""
    in_truth = measures.present > 0
    frames = np.arange(len(in_truth))
    if policy == "all":
        return frames
    if policy == "davis":
        return frames[1:-1]
    if policy == "after_prompt":
        return frames[np.argmax(in_truth) + 1 :] if in_truth.any() else frames[:0]
    if policy == "sav":
        in_truth = in_truth[1:-1]
        seen = in_truth | (measures.predicted[1:-1] > 0)
        return frames[1:-1][np.argmax(seen) :] if in_truth.any() else frames[:0]
    raise ValueError(f"frame policy {policy!r}; it is one of {', '.join(FramePolicy.__args__)}")


def mean_scores(videos: Iterable[VideoScores]) -> dict[str, float]:
    """Means over all scored objects of all videos, as DAVIS and SA-V report them; never NaN.

    An object counts once, however long its video and however many objects share it.

    Returns:
        J, F, J_and_F, J_recall, J_decay, F_recall, F_decay; mIoU, the mean of `ObjectScores.iou`;
        num_objects that are in the means and num_not_scored that are not.

    Raises:
        UserError: no object has a frame to score.
    """
    videos = list(videos)
    objects = [scores for video in videos for scores in video.objects]
    num_not_scored = sum(len(video.not_scored) for video in videos)
    if not objects:
        raise UserError(
            f"evaluation: {len(videos)} videos with {num_not_scored} objects and no frame to "
            "score; expected an object with a frame besides those that the frame policy leaves "
            "out; take longer videos, or ones whose objects enter before the last frame"
        )
    columns = {"J": "J_mean", "F": "F_mean", "mIoU": "iou"}
    names = ("J", "F", "J_and_F", "J_recall", "J_decay", "F_recall", "F_decay", "mIoU")
    means = {
        name: float(np.mean([getattr(scores, columns.get(name, name)) for scores in objects]))
        for name in names
    }
    return means | {"num_objects": len(objects), "num_not_scored": num_not_scored}


def _check(prediction: np.ndarray, ground_truth: np.ndarray) -> None:
    for name, masks in (("prediction", prediction), ("ground truth", ground_truth)):
        if masks.dtype != bool or masks.ndim != 3:
            raise ValueError(f"{name}: {masks.dtype} {masks.shape}; expected bool (T, H, W)")
    if prediction.shape != ground_truth.shape:
        raise ValueError(
            f"prediction {prediction.shape} and ground truth {ground_truth.shape} differ in shape"
        )


def _counts(
    prediction: np.ndarray, ground_truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels in both masks, in the first, in the second, three (T,) int64, from bool stacks."""
    _check(prediction, ground_truth)
    # Frame by frame: with an `axis`, count_nonzero is slower.
    counts = [
        (np.count_nonzero(p & g), np.count_nonzero(p), np.count_nonzero(g))
        for p, g in zip(prediction, ground_truth, strict=True)
    ]
    both, predicted, present = np.array(counts, np.int64).reshape(-1, 3).T
    return both, predicted, present


def _overlap(prediction: np.ndarray, ground_truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in both masks and in either of them, two (T,) int64, from (T, H, W) bool stacks."""
    both, predicted, present = _counts(prediction, ground_truth)
    return both, predicted + present - both


def _ratio(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))


def _boundary_f(prediction: np.ndarray, ground_truth: np.ndarray, radius: int) -> float:
    """F of one frame from (H, W) bool masks, outlines matched up to `radius` pixels."""
    either = prediction | ground_truth
    rows = np.flatnonzero(either.any(axis=1))
    if len(rows) == 0:
        return 1.0
    # One pixel around both masks keeps every outline: `radius` only says how far to look from one
    # outline pixel to another. At the border of the frame nothing is added, and the crop ends as
    # the frame does.
    vertical = slice(max(rows[0] - 1, 0), rows[-1] + 2)
    columns = np.flatnonzero(either[vertical].any(axis=0))
    crop = vertical, slice(max(columns[0] - 1, 0), columns[-1] + 2)
    prediction, ground_truth = prediction[crop].view(np.uint8), ground_truth[crop].view(np.uint8)
    if np.array_equal(prediction, ground_truth):
        return 1.0

    outlines = _outlines(prediction, ground_truth, margin=radius)
    at = np.flatnonzero(outlines != 0)  # a few thousand pixels: what follows them is cheap
    bits = outlines.ravel()[at]
    predicted, truth = (bits & 1) != 0, (bits & 2) != 0
    num_predicted, num_truth = np.count_nonzero(predicted), np.count_nonzero(truth)
    if num_predicted == 0 or num_truth == 0:
        return float(num_predicted == num_truth)
    reach = _dilate(outlines, radius).ravel()[at]
    hit_predicted = np.count_nonzero(reach[predicted] & 2)
    hit_truth = np.count_nonzero(reach[truth] & 1)
    precision, recall = hit_predicted / num_predicted, hit_truth / num_truth
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _outlines(prediction: np.ndarray, ground_truth: np.ndarray, margin: int) -> np.ndarray:
    """Outlines of two (H, W) uint8 masks, in bits 0 and 1 of one (H, W + margin) array.

    A pixel is on the outline if the one to the right, below or diagonally below differs: `seg2bmap`
    of the DAVIS code, after D. Martin's of the Berkeley benchmark. Neighbours outside do not count.
    The margin (at least 1 pixel) is zero.
    """
    height, width = prediction.shape
    # Neighbours outside repeat the border, so that they never differ. On the flat array, whose
    # rows lie end to end, a neighbour is an offset and one operation runs over all rows.
    stride = width + margin
    masks = np.empty((height + 1, stride), dtype=np.uint8)
    np.add(ground_truth, ground_truth, out=masks[:-1, :width])  # bit 1; a shift is far slower
    masks[:-1, :width] |= prediction
    masks[:-1, width:] = masks[:-1, width - 1 : width]
    masks[-1] = masks[-2]
    flat, size = masks.ravel(), height * stride
    here, below = flat[:size], flat[stride:]
    outlines = here ^ below
    outlines[:-1] |= here[:-1] ^ flat[1:size]
    outlines[:-1] |= here[:-1] ^ below[1:]
    outlines = outlines.reshape(height, stride)
    outlines[:, width:] = 0
    return outlines


def _dilate(pixels: np.ndarray, radius: int) -> np.ndarray:
    """Dilate every bit of an (H, stride) uint8 array with a disk; the last `radius` columns are 0.

    A disk is a pile of rows. From its tip to its middle they get wider, so one run of pixels grows
    sideways and is put down above and below: 4 x radius whole-array operations, for both masks at
    once, where a mask kernel takes pi x radius^2 per pixel. The zero columns catch what wraps
    around the end of a row.
    """
    flat, stride = pixels.ravel(), pixels.shape[1]
    run, out, half_width = flat.copy(), np.zeros_like(flat), 0
    for dy in range(radius, -1, -1):
        while half_width < math.isqrt(radius**2 - dy**2):
            half_width += 1
            run[half_width:] |= flat[:-half_width]
            run[:-half_width] |= flat[half_width:]
        shift = min(dy * stride, len(run))  # a crop may be lower than the disk
        out[shift:] |= run[: len(run) - shift]
        out[: len(run) - shift] |= run[shift:]
    return out.reshape(pixels.shape)
