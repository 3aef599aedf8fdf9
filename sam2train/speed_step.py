"""Training steps and whole videos beside SAM 2's own code.

Of a step: seconds, operations, the share of the machine's own rate of matrix multiplication, and
peak memory. Of whole videos: seconds a frame, of the evaluation and of SAM 2's predictor.
"""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam2train.clips import BatchedVideoDatapoint, Clip, Prompt, collate_fn, empty_prompt
from sam2train.data_clips import ClipDataset
from sam2train.datasets import COCODataset
from sam2train.evaluate import first_prompts, track_video
from sam2train.features import FeaturesConfig
from sam2train.losses import LossConfig, compute_losses
from sam2train.machine import choose_device, has_fast_bf16
from sam2train.model import SAM2Model
from sam2train.optimizer import OptimizerConfig, build_optimizer
from sam2train.speed_clock import (
    Mismatch,
    Row,
    TheirTraining,
    alternate,
    build_predictor,
    count_operations,
    gemm_rates,
    gemms,
    in_process,
    peak_of,
    set_dropout,
    write_video,
)

DROPOUT = 0.1  # of memory attention, in SAM 2's configs
# Of the loss, ours against theirs: sums in another order, and TF32 on CUDA.
_SAME_LOSS = {"cpu": 1e-4, "cuda": 2e-2}
# Share of pixels on which our masks and the predictor's agree, at least: it stores memories in
# bfloat16, and takes the masks of a prompted frame through a quarter of the size.
_SAME_MASKS = 0.97


@dataclass(frozen=True)
class StepSize:
    """What a step works on: one clip of a model that trains its memory only."""

    num_objects: int
    config_path: str = "configs/sam2.1_hiera_t.yaml"
    image_size: int = 512
    num_frames: int = 5

    def __str__(self) -> str:
        name = self.config_path.rsplit("/", 1)[-1].removesuffix(".yaml")
        objects = "1 object" if self.num_objects == 1 else f"{self.num_objects} objects"
        return f"{name}, {self.image_size} px, T = {self.num_frames}, {objects}"


def measure_steps(
    device: torch.device,
    folder: Path,
    sizes: Sequence[StepSize] = (StepSize(1), StepSize(3)),
    rounds: int = 3,
) -> list[Row]:
    """Seconds of a step, ours against SAM 2's, at each of the sizes.

    Args:
        folder: gets cached features.
    """
    rows = []
    for size in sizes:
        rows += _measure_step(size, device, folder, rounds)
    return rows


def _measure_step(size: StepSize, device: torch.device, folder: Path, rounds: int) -> list[Row]:
    batch = make_batch(size).to(device)
    cached = with_keys(batch)
    ours, theirs = OurStep(size, device, folder), TheirStep(size, device)
    loss = check_same_loss(ours, theirs, batch)
    variants: dict[str, tuple[Callable[[], object], str]] = {
        "theirs": (partial(theirs, batch), "float32"),
        "step, no cache, dropout as SAM 2's": (partial(ours, batch, dropout=DROPOUT), "float32"),
        "step, features cached, no dropout": (partial(ours, cached), "float32"),
    }
    ours.fill_cache(cached)
    recomputed = partial(ours, cached, recompute=True)
    variants["step, cached, activation checkpointing"] = (recomputed, "float32")
    if has_fast_bf16(device):
        ours.fill_cache(cached, bf16=True)
        run = partial(ours, cached, bf16=True)
        variants["step, features cached, no dropout, bf16"] = (run, "bfloat16")
    runs = {name: run for name, (run, _) in variants.items()}
    operations = {name: count_operations(run) for name, run in runs.items()}  # the warm-up, too
    seconds = alternate(runs | gemms(device), rounds, device, warm_up=False)
    rates = gemm_rates(seconds, device)

    def details(name: str) -> dict[str, object]:
        median, precision = statistics.median(seconds[name]), variants[name][1]
        return {
            "seconds": seconds[name],
            "operations": operations[name],
            "share_of_gemm": operations[name] / median / rates[precision],
        }

    return [
        Row(
            "step",
            name,
            str(size),
            statistics.median(seconds[name]),
            statistics.median(seconds["theirs"]),
            "s",
            details={
                **details(name),
                "other": details("theirs"),
                "gemm_rates": rates,
                "loss": loss,
            },
        )
        for name in runs
        if name != "theirs"
    ]


def make_batch(size: StepSize, seed: int = 0) -> BatchedVideoDatapoint:
    """A clip of discs that move over noise, each with a click on its centre on frame 0."""
    rng = np.random.default_rng(seed)
    side, frames, objects = size.image_size, size.num_frames, size.num_objects
    rows, columns = np.mgrid[:side, :side]
    images = rng.normal(size=(frames, 3, side, side)).astype(np.float32)
    masks = np.zeros((frames, objects, side, side), bool)
    prompts = []
    for k in range(objects):
        for t in range(frames):
            x = side * (0.25 + 0.4 * t / frames)
            y = side * (k + 0.5) / objects
            radius = side * 0.3 / objects
            masks[t, k] = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
            images[t, :, masks[t, k]] += np.array([k + 1, -k, 1], np.float32)
        click = np.array([[side * 0.25, side * (k + 0.5) / objects]], np.float32)
        told = {"points": click, "labels": np.ones(1, np.int32)}
        prompts.append({**empty_prompt(k + 1, 0, "point"), **told})
    clip = Clip(
        images=torch.from_numpy(images),
        masks=torch.from_numpy(masks),
        prompts=prompts,
        video_id="noise",
        frame_indices=list(range(frames)),
        object_ids=list(range(1, objects + 1)),
        frame_valid=torch.ones(frames, dtype=torch.bool),
        frame_size=(side, side),
    )
    return collate_fn([clip])


def build_ours(
    config_path: str, image_size: int, device: torch.device, *, seed: int = 0
) -> SAM2Model:
    """Our model with random weights that call every object visible, so that masks learn."""
    torch.manual_seed(seed)
    model = SAM2Model(None, config_path, device=device, image_size=image_size).load()
    with torch.no_grad():
        model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 4
    return model


def with_keys(batch: BatchedVideoDatapoint) -> BatchedVideoDatapoint:
    """The same batch for the feature cache: our model then reads what it has encoded before."""
    return replace(batch, image_keys=[f"frame-{k}" for k in range(len(batch.flat_img_batch))])


class OurStep:
    """Forward, loss, backward, clipping and optimiser step as `Trainer.train_step` has them.

    Args:
        folder: gets the features of batches that come with keys.
    """

    def __init__(self, size: StepSize, device: torch.device, folder: Path):
        self.model = build_ours(size.config_path, size.image_size, device).train()
        self.model.use_feature_cache(FeaturesConfig(folder=str(folder)))
        self.parameters = self.model.trainable_parameters()
        config = OptimizerConfig()
        self.optimizer = build_optimizer(self.parameters, config, self.model.sam2)

    @torch.no_grad()
    def fill_cache(self, batch: BatchedVideoDatapoint, *, bf16: bool = False) -> None:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=bf16):
            self.model.encode_images(batch.flat_img_batch, batch.image_keys)

    def loss(self, batch: BatchedVideoDatapoint, *, bf16: bool = False) -> torch.Tensor:
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            frames = self.model(batch, only_frames=True)["frames"]
        valid = batch.object_frame_valid
        return compute_losses(frames, batch.masks, LossConfig(), valid)["loss"]

    def __call__(
        self,
        batch: BatchedVideoDatapoint,
        *,
        dropout: float = 0.0,
        bf16: bool = False,
        recompute: bool = False,
    ) -> None:
        set_dropout(self.model.sam2, dropout)
        self.model.activation_checkpointing = recompute
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch, bf16=bf16)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 0.1)
        if torch.isfinite(loss.detach() + norm):
            self.optimizer.step()


class TheirStep:
    """The same with SAM 2's model and loss, in the order of its trainer."""

    def __init__(self, size: StepSize, device: torch.device):
        ours = build_ours(size.config_path, size.image_size, device)
        self.training = TheirTraining(ours)
        self.parameters = [p for p in self.training.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=5e-6, weight_decay=0.1)

    def loss(self, batch: BatchedVideoDatapoint) -> torch.Tensor:
        return self.training.loss(batch)

    def __call__(self, batch: BatchedVideoDatapoint) -> None:
        set_dropout(self.training.model, DROPOUT)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        if not torch.isfinite(loss):
            raise FloatingPointError("SAM 2's loss is not finite")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()


def check_same_loss(ours: OurStep, theirs: TheirStep, batch: BatchedVideoDatapoint) -> float:
    """The loss of both on the same weights and batch, without dropout.

    Raises:
        Mismatch: they differ by more than rounding: two different things would be compared.
    """
    for sam2 in (ours.model.sam2, theirs.training.model):
        set_dropout(sam2, 0.0)
    with torch.no_grad():
        found, expected = ours.loss(batch).item(), theirs.loss(batch).item()
    if abs(found - expected) > _SAME_LOSS[ours.model.device.type] * abs(expected):
        raise Mismatch(f"our loss is {found:.6g}, SAM 2's {expected:.6g}: nothing is compared")
    return found


# -- memory ---------------------------------------------------------------------------------------


def measure_memory(
    device: torch.device,
    folder: Path,
    size: StepSize = StepSize(3),
    small: StepSize = StepSize(1, image_size=256),
) -> list[Row]:
    """Peak bytes of a step beyond weights and batch, each in a process of its own; and what a frame
    more costs, from T and 2 T frames at the `small` size."""

    def peak(of: StepSize, whose: str) -> int:
        values = [of.num_objects, of.config_path, of.image_size, of.num_frames]
        return in_process(step_peak, whose, str(device), str(folder), values)

    theirs = peak(size, "theirs")
    names = {"equal": "peak of a step, dropout as SAM 2's", "ours": "peak, no dropout"}
    names["cached"] = "peak, features cached, no dropout"
    names["recomputed"] = "peak, cached, activation checkpointing"
    rows = [
        Row("memory", what, str(size), peak(size, whose), theirs, "B")
        for whose, what in names.items()
    ]
    double = replace(small, num_frames=2 * small.num_frames)
    a_frame = [
        (peak(double, whose) - peak(small, whose)) / small.num_frames
        for whose in ("ours", "theirs")
    ]
    return [*rows, Row("memory", "a frame more, no dropout", str(small), *a_frame, "B")]


def step_peak(whose: str, device: str, folder: str, size: list) -> int:
    """Peak bytes of the first step of a process.

    Args:
        whose: ours, equal (ours with the dropout of SAM 2), cached (ours with the features in the
            cache), recomputed (the same with activation checkpointing) or theirs.
    """
    place, size = choose_device(device), StepSize(*size)
    batch = make_batch(size).to(place)
    if whose == "theirs":
        return peak_of(partial(TheirStep(size, place), batch), place)
    step = OurStep(size, place, Path(folder))
    if whose in ("cached", "recomputed"):
        batch = with_keys(batch)
        step.fill_cache(batch)
    dropout = DROPOUT if whose == "equal" else 0.0
    recompute = whose == "recomputed"
    return peak_of(partial(step, batch, dropout=dropout, recompute=recompute), place)


# Whole videos


def measure_evaluation(
    device: torch.device,
    folder: Path,
    *,
    objects: tuple[int, ...] = (1, 3),
    config_path: str = "configs/sam2.1_hiera_t.yaml",
    image_size: int = 512,
    size: tuple[int, int] = (480, 854),
    num_frames: int = 8,
    rounds: int = 2,
) -> list[Row]:
    """Seconds of a whole video, from the JPEGs to masks of its own size, ours against
    `SAM2VideoPredictor`."""
    model = build_ours(config_path, image_size, device).eval()
    caching = build_ours(config_path, image_size, device).eval()
    caching.use_feature_cache(FeaturesConfig(folder=str(folder / "features")))
    predictor = build_predictor(model)
    rows = []
    for num_objects in objects:
        files = write_video(folder / str(num_objects), size, num_frames, num_objects)
        data = COCODataset(files.coco, (image_size, image_size), prompt_types=["bbox"])
        (video,) = data.videos
        prompts = first_prompts(data, video, np.random.default_rng(0))
        runs = {
            "a frame": partial(_track, model, data, prompts),
            "a frame, features cached": partial(_track, caching, data, prompts),
            "theirs": partial(_predict, predictor, files.frames / "video", prompts, image_size),
        }
        theirs = runs["theirs"]()
        own = ("a frame", "a frame, features cached")
        agreement = min(_agreement(runs[what](), theirs) for what in own)
        if agreement < _SAME_MASKS:
            raise Mismatch(
                f"our masks agree with the predictor's on {agreement:.4f} of the pixels only: "
                "nothing is compared"
            )
        seconds = alternate(runs | gemms(device), rounds, device, warm_up=False)
        details = {"agreement": agreement, "gemm_rates": gemm_rates(seconds, device)}
        name = Path(config_path).stem
        at = f"{name}, {image_size} px, {num_frames} frames of {size[0]}p, {num_objects} object"
        at += "s" * (num_objects > 1)
        medians = {name: statistics.median(taken) / num_frames for name, taken in seconds.items()}
        rows += [
            Row(
                "evaluation",
                what,
                at,
                medians[what],
                medians["theirs"],
                "s",
                "SAM2VideoPredictor",
                {**details, "ours": seconds[what], "other": seconds["theirs"]},
            )
            for what in own
        ]
    return rows


def _track(
    model: SAM2Model, data: ClipDataset, prompts: list[Prompt]
) -> list[dict[Any, np.ndarray]]:
    """The masks of each frame by object id, as the evaluation gets them."""
    return [frame.masks for frame in track_video(model, data, data.videos[0], prompts)]


@torch.inference_mode()
def _predict(
    predictor: torch.nn.Module, frames: Path, prompts: list[Prompt], image_size: int
) -> list[dict[Any, np.ndarray]]:
    """The same, as a user of the predictor gets them."""
    with contextlib.redirect_stderr(io.StringIO()):  # its bars
        state = predictor.init_state(str(frames))
        for prompt in prompts:
            predictor.add_new_points_or_box(
                state,
                prompt["frame_index"],
                prompt["object_id"],
                torch.from_numpy(prompt["points"]) / image_size,
                torch.from_numpy(prompt["labels"]),
                normalize_coords=False,
            )
        return [
            dict(zip(ids, (logits[:, 0] > 0).cpu().numpy(), strict=True))
            for _, ids, logits in predictor.propagate_in_video(state)
        ]


def _agreement(ours: list[dict[Any, np.ndarray]], theirs: list[dict[Any, np.ndarray]]) -> float:
    """Share of equal pixels over frames and objects; of pixels that one object at most has in the
    predictor's masks, which may overlap where ours do not."""
    equal = total = 0
    for found, expected in zip(ours, theirs, strict=True):
        alone = sum(mask.astype(np.uint8) for mask in expected.values()) <= 1
        for object_id, mask in expected.items():
            equal += int((mask == found[object_id])[alone].sum())
            total += int(alone.sum())
    return equal / total
