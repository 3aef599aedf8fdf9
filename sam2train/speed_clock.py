"""How speeds are measured, and what is measured with: SAM 2's own code and a made-up video.

Variants run in turn in one process, the rate of the machine's own matrix multiplication beside
them; operations are counted, the peak memory is that of a process of its own. SAM 2's training
model with its loss, and its video predictor, are those of the installed `sam2` package, with our
weights and prompts. The video lies on disk as every reader wants it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as rle
from torch import nn

from sam2train.clips import BatchedVideoDatapoint
from sam2train.demo import JPEG_QUALITY
from sam2train.errors import MachineFault, UserError
from sam2train.files import REPOSITORY
from sam2train.model import SAM2Model
from sam2train.model_inputs import split_by_kind
from sam2train.pretrained import resolve_config

# Side of the square matrices whose product gives the rate of a machine: large enough to be limited
# by arithmetic, small enough to cost less than the step beside it.
_GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
CPU = torch.device("cpu")  # of what runs beside no other device, such as loading clips
_GEMM = "GEMM "  # with the precision: a variant of `alternate`


class Mismatch(MachineFault):
    """Ours and the other side do not compute the same: their speeds say nothing."""


@dataclass(frozen=True)
class Row:
    """One line of the table: ours beside something else, both measured in this run."""

    part: str
    what: str
    at: str  # the sizes that it was measured at
    ours: float  # a median where it is a time
    other: float
    unit: str
    beside: str = "SAM 2"  # what `other` is
    details: dict[str, Any] = field(default_factory=dict)  # all single values, operations, shares

    @property
    def ratio(self) -> float:
        """How many times less ours takes than the other: 2 is half of its time or memory."""
        return self.other / self.ours

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def synchronise(device: torch.device) -> None:
    """Wait for what was started on a device, so that a clock counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each variant: `rounds` of them, taken in turn (A B C A B C), since a machine is
    not the same twice.

    Args:
        warm_up: a round before, which does not count: the first use of a shape costs more.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1 if warm_up else 0, rounds):
        gc.collect()
        for name, run in variants.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def gemms(device: torch.device) -> dict[str, Callable[[], object]]:
    """Variants that multiply square matrices in float32 and bfloat16; see `gemm_rates`."""
    side = _GEMM_SIDE.get(device.type, 2048)
    variants = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.rand(2, side, side, device=device).to(dtype)
        variants[_GEMM + str(dtype).removeprefix("torch.")] = lambda a=a, b=b: a @ b
    return variants


def gemm_rates(seconds: Mapping[str, Sequence[float]], device: torch.device) -> dict[str, float]:
    """Precision -> operations a second, from what `alternate` has measured of `gemms`."""
    operations = 2 * _GEMM_SIDE.get(device.type, 2048) ** 3
    return {
        name.removeprefix(_GEMM): operations / statistics.median(taken)
        for name, taken in seconds.items()
        if name.startswith(_GEMM)
    }


def count_operations(run: Callable[[], object]) -> int:
    """Floating point operations of matrix products, convolutions and attention in a run, forward
    and backward. Fused attention computes its scores again in the backward pass: that counts."""
    from torch.utils import flop_counter

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(grad, query, key, value)

    # torch's counter has formulas for CUDA's fused attention, and none for the CPU's.
    aten = torch.ops.aten
    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        run()
    return counter.get_total_flops()


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a run holds at its peak beyond those from before it begins.

    On CUDA by torch's allocator, to the byte. On CPU by the resident memory of the process, where
    scratch memory counts as well: call it in a process of its own (`in_process`), where little was
    freed before that a run could take again.

    Raises:
        MachineFault: a system without /proc, such as macOS.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):  # of glibc: memory that was freed goes back
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError as problem:
        raise MachineFault(
            f"the peak memory of a process is read on Linux only: {problem}"
        ) from None
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Bytes of one of the lines of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_process(function: Callable[..., Any], *values: Any, timeout: float = 300.0) -> Any:
    """What a public function of this package returns in a fresh Python; values must fit JSON.

    Raises:
        MachineFault: the process has failed; with the last line that it said.
    """
    code = (
        f"import json, sys; from {function.__module__} import {function.__name__} as run\n"
        "print('\\n' + json.dumps(run(*json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"code {done.returncode}, without a word"]
        raise MachineFault(f"a process that measures has failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# SAM 2's own code

# The official recipe's weights of the loss; ours are the same by default.
_LOSS_WEIGHTS = {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1}
# What `build_sam2_video_predictor` sets otherwise, and what changes no more than its speed.
_AS_IN_TRAINING = {
    "binarize_mask_from_pts_for_mem_enc": False,
    "fill_hole_area": 0,
    "sam_mask_decoder_extra_args.dynamic_multimask_via_stability": False,
    "sam_mask_decoder_extra_args.dynamic_multimask_stability_delta": 0.05,
    "sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh": 0.98,
}


def import_training(module: str) -> types.ModuleType:
    """A module of `training`, SAM 2's own trainer, which the `sam2` package installs as well.

    Raises:
        UserError: it is not there, or the packages that it imports are not.
    """
    try:
        return import_module(f"training.{module}")
    except ImportError as problem:
        raise UserError(
            f"SAM 2's own training code cannot be imported ({problem}); to compare with it: "
            "pip install sam2==1.1.0 tensordict fvcore submitit tensorboard"
        ) from None


def build_theirs(target: str, ours: SAM2Model, settings: Mapping[str, Any]) -> nn.Module:
    """A model of SAM 2's from the config of ours, with the weights of ours, on its device.

    Args:
        target: what the config's `model:` node is built as.
        settings: keys of that node to set, by dotted name.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    node = OmegaConf.load(resolve_config(ours.config_path)).model
    tokens = [ours.image_size // 16] * 2
    settings = {
        "_target_": target,
        "image_size": ours.image_size,
        "num_maskmem": ours.num_maskmem,
        "memory_attention.layer.self_attention.feat_sizes": tokens,
        "memory_attention.layer.cross_attention.feat_sizes": tokens,
        **settings,
    }
    for name, value in settings.items():
        OmegaConf.update(node, name, value, force_add=True)
    theirs = instantiate(node)
    theirs.load_state_dict(ours.sam2.state_dict())
    return theirs.to(ours.device)


class TheirTraining:
    """`SAM2Train` with `MultiStepMultiMasksAndIous`, training what ours trains.

    Only its choice of prompts is replaced: it would draw other clicks than ours.
    """

    def __init__(self, ours: SAM2Model):
        import_training("model.sam2")
        loss = import_training("loss_fns")
        target = "training.model.sam2.SAM2Train"
        self.model = build_theirs(target, ours, {"freeze_image_encoder": True})
        trained = ours.trainable_parameters()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.model.prepare_prompt_inputs = types.MethodType(_given_prompts, self.model)
        self.model.train()
        self._loss = loss.MultiStepMultiMasksAndIous(
            dict(_LOSS_WEIGHTS), supervise_all_iou=True, iou_use_l1_loss=True, pred_obj_scores=True
        )
        self._total = loss.CORE_LOSS_KEY

    def loss(self, batch: BatchedVideoDatapoint) -> torch.Tensor:
        """Its total on a batch, as its trainer computes it."""
        return self._loss(self.model(batch), batch.masks)[self._total]


def _given_prompts(
    model: nn.Module, backbone: dict[str, Any], batch: BatchedVideoDatapoint, start: int = 0
) -> dict[str, Any]:
    """`SAM2Train.prepare_prompt_inputs` for a batch whose objects have a prompt of one kind each,
    all on frame 0, and get no correction clicks."""
    prompts = [prompt for clip in batch.prompts for prompt in clip]
    ((_, points, masks),) = split_by_kind(prompts, batch.masks.device)
    return backbone | {
        "gt_masks_per_frame": {t: masks[:, None] for t, masks in enumerate(batch.masks)},
        "num_frames": batch.num_frames,
        "use_pt_input": points is not None,
        "init_cond_frames": [0],
        "frames_not_in_init_cond": list(range(1, batch.num_frames)),
        "mask_inputs_per_frame": {} if masks is None else {0: masks},
        "point_inputs_per_frame": {} if points is None else {0: points},
        "frames_to_add_correction_pt": [],
    }


def build_predictor(ours: SAM2Model) -> nn.Module:
    """`SAM2VideoPredictor` with the weights of ours, its switches as they are in training."""
    target = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    return build_theirs(target, ours, _AS_IN_TRAINING).eval()


def set_dropout(sam2: nn.Module, prob: float) -> None:
    """Let memory attention drop this share, in its attention and after it."""
    for module in sam2.memory_attention.modules():
        if isinstance(module, nn.Dropout):
            module.p = prob
        if hasattr(module, "dropout_p"):
            module.dropout_p = prob


# A made-up video


@dataclass(frozen=True)
class VideoFiles:
    """One video on disk, in the layouts of ours and of SAM 2's readers."""

    folder: Path

    @property
    def frames(self) -> Path:
        """A folder with one folder of JPEGs, %05d.jpg."""
        return self.folder / "frames"

    @property
    def coco(self) -> Path:
        return self.folder / "annotations.json"

    @property
    def masklets(self) -> Path:
        """A folder with SA-V's JSON of the video."""
        return self.folder / "masklets"


def write_video(
    folder: Path, size: tuple[int, int], num_frames: int, num_objects: int
) -> VideoFiles:
    """Ellipses that move over smooth noise, as JPEGs with RLE masks of every frame.

    Args:
        size: (H, W) of the frames.
    """
    files = VideoFiles(folder)
    for place in (files.frames / "video", files.masklets):
        place.mkdir(parents=True)
    rows: list[list[dict[str, Any]]] = []
    for t, (picture, masks) in enumerate(made_up_frames(size, num_frames, num_objects)):
        jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        (files.frames / "video" / f"{t:05d}.jpg").write_bytes(jpeg.tobytes())
        encoded = [rle.encode(np.asfortranarray(mask)) for mask in masks]
        rows.append([{"size": list(size), "counts": e["counts"].decode()} for e in encoded])
    images = [
        {
            "id": t + 1,
            "video_id": "video",
            "order_in_video": t,
            "path": f"frames/video/{t:05d}.jpg",
            "height": size[0],
            "width": size[1],
        }
        for t in range(num_frames)
    ]
    annotations = [
        {
            "id": t * num_objects + k + 1,
            "image_id": t + 1,
            "category_id": 1,
            "track_id": k + 1,
            "segmentation": segmentation,
        }
        for t, row in enumerate(rows)
        for k, segmentation in enumerate(row)
    ]
    categories = [{"id": 1, "name": "ellipse"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    files.coco.write_text(json.dumps(content))
    (files.masklets / "video_manual.json").write_text(json.dumps({"masklet": rows}))
    return files


def made_up_frames(
    size: tuple[int, int], num_frames: int, num_objects: int
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Frames (H, W, 3) uint8, BGR, each with the (H, W) uint8 masks of its objects."""
    rng = np.random.default_rng(0)
    height, width = size
    coarse = rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8)
    background = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = rng.integers(0, 12, (height, width, 3), np.uint8)  # else a JPEG has little to decode
    for t in range(num_frames):
        picture = cv2.add(np.roll(background, 3 * t, axis=1), grain)
        masks = []
        for k in range(num_objects):
            mask = np.zeros(size, np.uint8)
            x, y = width * (0.25 + 0.5 * t / num_frames), height * (k + 0.5) / num_objects
            centre = int(x), int(y)
            axes = width // 10, height // (3 * num_objects)
            cv2.ellipse(mask, centre, axes, 10.0 * k, 0, 360, 1, -1)
            picture[mask > 0] = (20 * k, 200 - 20 * k, 255 - 20 * k)
            masks.append(mask)
        yield picture, masks
