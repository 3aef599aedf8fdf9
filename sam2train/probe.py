"""`--probe`: the peak memory of a training step, measured for growing settings, and which fit here.

Each setting is one step on made-up pixels in a process of its own: what one leaves behind cannot
count for the next, and one that runs out of memory ends alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sam2train.clips import BatchedVideoDatapoint, Clip, collate_fn
from sam2train.config import to_yaml
from sam2train.config_yaml import read_yaml
from sam2train.corrections import SimulatedUser
from sam2train.errors import MachineFault
from sam2train.experiment import Experiment, build_model, uses_bf16
from sam2train.files import REPOSITORY
from sam2train.losses import divide_losses, sum_losses
from sam2train.machine import check_available, choose_device, say
from sam2train.model import SAM2Model
from sam2train.optimizer import build_optimizer
from sam2train.prompts import PromptGenerator

OBJECTS = 3  # of a clip, where dataset.max_objects does not say
# A setting fits that leaves this share of the memory free: other clips need a bit more.
RESERVE = 0.1
TIME_LIMIT = 600.0  # seconds for one setting
_CODE = "import sys; from sam2train.probe import run_child; run_child(sys.stdin.read())"


@dataclass(frozen=True)
class Setting:
    """What the memory of a step depends on most."""

    frames: int
    objects: int
    size: int
    checkpointing: bool

    def apply(self, experiment: Experiment) -> Experiment:
        """The experiment with it, without the feature cache: a clip may always be a new one."""
        dataset = {"image_size": (self.size, self.size), "video_clip_length": self.frames}
        trainer = {"activation_checkpointing": self.checkpointing}
        return experiment.model_copy(
            update={
                "dataset": experiment.dataset.model_copy(update=dataset),
                "model": experiment.model.model_copy(update={"image_size": self.size}),
                "trainer": experiment.trainer.model_copy(update=trainer),
                "features": experiment.features.model_copy(update={"cache": False}),
            }
        )


@dataclass(frozen=True)
class Found:
    """What a step took. `peak` is None where it did not end, and `problem` then says why."""

    setting: Setting
    peak: int | None  # bytes: of CUDA's allocator, else of the process
    seconds: float | None
    problem: str = ""


def settings_of(experiment: Experiment) -> list[list[Setting]]:
    """The settings to measure: the experiment's own, then one thing at a time grown by 2. Where one
    of a list does not fit, those after it do not, either."""
    own = Setting(
        experiment.dataset.video_clip_length,
        experiment.dataset.max_objects or OBJECTS,
        experiment.model.image_size,
        experiment.trainer.activation_checkpointing,
    )
    changed = asdict(own)
    grown = [
        [Setting(**{**changed, name: changed[name] * factor}) for factor in (2, 4)]
        for name in ("frames", "objects", "size")
    ]
    half = [Setting(**{**changed, "size": own.size // 64 * 32})] if own.size >= 64 else []
    other = [Setting(**{**changed, "checkpointing": not own.checkpointing})]
    return [half, [own], other, *grown]


def probe(experiment: Experiment, console: Console) -> list[Found]:
    """Measure the settings, and print a table of them. Returns what was found."""
    limit, device = memory_here(experiment)
    say(console, f"one step each on {device}, {limit / 1e9:.1f} GB; made-up pixels")
    rows = [
        found
        for settings in settings_of(experiment)
        for found in _grow(experiment, settings, limit)
    ]
    table = Table("frames", "objects", "image size", "again", title="Memory of a step")
    for heading in ("peak GB", "s/step", "fits here"):
        table.add_column(heading, justify="right")
    for row in rows:
        peak = "" if row.peak is None else f"{row.peak / 1e9:.2f}"
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        given = asdict(row.setting).values()
        cells = [
            "yes" if value is True else "no" if value is False else str(value) for value in given
        ]
        table.add_row(*cells, peak, seconds, row.problem or ("yes" if fits(row, limit) else "no"))
    console.print(table)
    say(
        console,
        "the columns are dataset.video_clip_length, dataset.max_objects, model.image_size with "
        "dataset.image_size, and whether trainer.activation_checkpointing computes again in the "
        "backward; dataset.batch_size multiplies what a clip takes. s/step is that of the "
        "first step of a process, later ones are faster",
    )
    return rows


def estimate_step(experiment: Experiment, model: SAM2Model) -> int:
    """Bytes that a training step takes, roughly: in float32 on a CPU 0.98 to 1.28 times what was
    measured of the demo, tiny and base plus models (experiments/LOG.md). That bfloat16 takes 0.6 of
    the activations is a guess."""
    sam2, dataset, user = model.sam2, experiment.dataset, experiment.interaction
    frames, objects = dataset.video_clip_length, dataset.max_objects or OBJECTS
    trained = sum(p.numel() for p in model.trainable_parameters().values())
    # Weights; gradients and the two moments of AdamW.
    fixed = 0.8e9 + 4 * sum(p.numel() for p in sam2.parameters()) + 12 * trained
    # All below is of images of 256 px, and grows with their pixels.
    memories = sum(min(t, model.num_maskmem) for t in range(frames))
    narrow = sam2.hidden_dim / 256
    of_objects = objects * ((frames - 1) * 45e6 + memories * 6e6) * narrow
    if user.enabled:
        clicks = user.num_frames_to_correct * user.num_correction_pt_per_frame
        of_objects += objects * clicks * 9e6 * narrow
    of_frames = 100e6 * narrow
    if model.trains_encoder:
        trunk = sam2.image_encoder.trunk
        of_frames += frames * 0.12e6 * trunk.channel_list[-1] * len(trunk.blocks)
    if experiment.trainer.activation_checkpointing:
        of_objects, of_frames = of_objects / 2, of_frames / 2
    if uses_bf16(experiment, model.device):
        of_objects, of_frames = 0.6 * of_objects, 0.6 * of_frames
    scale = dataset.batch_size * (model.image_size / 256) ** 2
    return int(fixed + scale * (of_objects + of_frames))


def free_memory(experiment: Experiment) -> int | None:
    """Bytes that a run may use; None where the system does not say."""
    try:
        return memory_here(experiment)[0]
    except (MachineFault, OSError):
        return None


def memory_warning(experiment: Experiment, model: SAM2Model, free: int | None) -> str | None:
    """What to do where a step seems to need more than the memory that was free before the model was
    built; None where it does not."""
    needed = estimate_step(experiment, model)
    if free is None or needed <= free:
        return None
    return (
        f"a step is estimated to take {needed / 1e9:.0f} GB, and {free / 1e9:.1f} GB of memory are "
        "free; lower dataset.batch_size, model.image_size with dataset.image_size, "
        "dataset.video_clip_length or dataset.max_objects, or set "
        "trainer.activation_checkpointing=true; --probe measures what fits"
    )


def fits(found: Found, limit: int) -> bool:
    """Whether a step leaves RESERVE of the memory free."""
    return found.peak is not None and found.peak <= (1 - RESERVE) * limit


def _grow(experiment: Experiment, settings: Sequence[Setting], limit: int) -> Iterator[Found]:
    for setting in settings:
        found = measure_setting(experiment, setting, limit)
        yield found
        if not fits(found, limit):
            return


def memory_here(experiment: Experiment) -> tuple[int, str]:
    """Bytes that a run may use, and of what: free memory of the GPU, else that of this machine."""
    device = choose_device(experiment.trainer.device)
    check_available(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # macOS and Windows have no such file
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024, "this machine's CPU"
    raise MachineFault(
        "/proc/meminfo does not say how much memory is free; --probe needs it, or a CUDA device"
    )


def measure_setting(experiment: Experiment, setting: Setting, limit: int) -> Found:
    """The peak of one step, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CODE],
            input=json.dumps(
                {
                    "experiment": to_yaml(setting.apply(experiment)),
                    "objects": setting.objects,
                    "limit": limit,
                }
            ),
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return Found(setting, None, None, f"not after {TIME_LIMIT:g} s")
    if done.returncode == 0:
        answer = json.loads(done.stdout.splitlines()[-1])
        return Found(setting, answer["peak"], answer["seconds"])
    words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    no_memory = done.returncode == -9 or any("memory" in word.lower() for word in words)
    return Found(setting, None, None, "no: out of memory" if no_memory else words[-1][:60])


def run_child(text: str) -> None:
    """Measure one setting in this process, and print it as JSON."""
    given = json.loads(text)
    experiment = Experiment.model_validate(read_yaml(given["experiment"], "the experiment"))
    if choose_device(experiment.trainer.device).type == "cpu":
        import resource  # not on Windows, where `memory_here` has refused

        # Else a machine starts to swap, or ends the largest of all processes.
        resource.setrlimit(resource.RLIMIT_DATA, (given["limit"], given["limit"]))
    print(json.dumps(run_step(experiment, given["objects"])))


def run_step(experiment: Experiment, num_objects: int) -> dict[str, Any]:
    """One training step on made-up pixels: `peak` in bytes, `seconds`."""
    model = build_model(experiment, say=lambda line: None)
    device, parameters = model.device, model.trainable_parameters()
    optimizer = build_optimizer(parameters, experiment.optimizer, model.sam2)
    user = None
    if experiment.interaction.enabled:
        user = SimulatedUser(experiment.interaction, experiment.clips_seed)
    batch = made_up_batch(experiment, num_objects).to(device)
    model.train()
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(experiment, device)):
        outputs = model(batch, interaction=user, only_frames=True)
    sums = sum_losses(outputs["frames"], batch.masks, experiment.loss)
    divide_losses(sums, batch.masks.shape[1], experiment.loss)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), experiment.trainer.max_grad_norm)
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_reserved(device)
    else:
        peak = _peak_here()
    return {"peak": peak, "seconds": time.perf_counter() - began}


def _peak_here() -> int:
    """Bytes that this process held at most."""
    try:  # getrusage begins with what the process that started this one held
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def made_up_batch(experiment: Experiment, num_objects: int) -> BatchedVideoDatapoint:
    """A batch of made-up clips: noise, and squares that every frame shows."""
    dataset, side = experiment.dataset, experiment.model.image_size
    rng = np.random.default_rng(0)
    prompts = PromptGenerator(
        dataset.prompt_types, dataset.num_of_pos_points, dataset.include_center
    )
    clips = []
    for _ in range(dataset.batch_size):
        masks = np.zeros((dataset.video_clip_length, num_objects, side, side), bool)
        for k in range(num_objects):
            left = (side // 2) * k // num_objects
            masks[:, k, left : left + side // 4, left : left + side // 4] = True
        shape = dataset.video_clip_length, 3, side, side
        clips.append(
            Clip(
                images=torch.from_numpy(rng.integers(0, 256, shape, np.uint8)),
                masks=torch.from_numpy(masks),
                prompts=[
                    prompts.generate(masks[0, k], rng, object_id=k + 1, frame_index=0)
                    for k in range(num_objects)
                ],
                frame_valid=torch.ones(dataset.video_clip_length, dtype=torch.bool),
                video_id="made up",
                frame_indices=list(range(dataset.video_clip_length)),
                object_ids=list(range(1, num_objects + 1)),
                frame_size=(side, side),
            )
        )
    return collate_fn(clips)
