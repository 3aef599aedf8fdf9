"""An experiment's settings -> data set and model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from sam2train import checkpoint, demo
from sam2train.datasets import COCODataset, VideoDataset
from sam2train.devices import choose_device
from sam2train.errors import UserError
from sam2train.experiment import Experiment
from sam2train.model import SAM2Model
from sam2train.pretrained import REPOSITORY, load_weights, resolve_path
from sam2train.sampling import AnnotatedVideos
from sam2train.sav import SAVDataset
from sam2train.vos import VOSDataset, find_masks

_SHOWN_WARNINGS = 5


def build_dataset(
    experiment: Experiment, path: str, *, training: bool, say: Callable[[str], None] = print
) -> AnnotatedVideos | VideoDataset:
    """The data set at one of the experiment's paths; augmented where it is for training.

    Args:
        path: where the demo data belongs, it is drawn if it is not there.
        say: gets a line for what takes a while and for what looks odd in the data.

    Raises:
        UserError: what is wrong with the data, all of it.
    """
    config = experiment.dataset
    path = draw_demo(path, say)
    guide = (path, config.image_size, config.video_clip_length, config.prompt_types)
    guide += (config.num_of_pos_points, config.include_center, config.num_of_neg_points)
    shared = {
        "box_jitter": config.box_jitter if training else 0.0,
        "prompt_weights": config.prompt_weights,
        "max_objects": config.max_objects,
        "max_frame_stride": config.max_frame_stride,
        "max_conditioning_frames": config.max_conditioning_frames,
        "augment": experiment.augment if training else None,
        "mask_cache_mb": config.mask_cache_mb,
        "seed": experiment.trainer.seed,
    }
    # A JSON has real masks: what trains on anything else can be validated on them.
    if config.dataset_type == "coco" or (path.suffix == ".json" and not training):
        dataset = COCODataset(*guide, image_root=config.image_root, **shared)
    elif config.dataset_type == "video":
        dataset = VideoDataset(*guide, synthetic=config.synthetic, **shared)
    # SA-V's validation and test sets are folders of PNGs.
    elif config.dataset_type == "vos" or find_masks(path) is not None:
        dataset = VOSDataset(*guide, **shared)
    else:
        dataset = SAVDataset(*guide, **shared)
    for warning in dataset.warnings[:_SHOWN_WARNINGS]:
        say(f"{path}: {warning}")
    if more := len(dataset.warnings[_SHOWN_WARNINGS:]):
        say(f"{path}: ... and {more} more of these")
    return dataset


def draw_demo(path: str, say: Callable[[str], None] = print) -> Path:
    """A data set's path, resolved; the demo data is drawn if it belongs there and is missing."""
    path = resolve_path(path)
    drawn = path.with_name("annotations.json")  # beside the folder of frames, too
    if demo.is_demo_path(drawn) and path.name in ("annotations.json", "video_data"):
        if not path.is_absolute():
            path, drawn = REPOSITORY / path, REPOSITORY / drawn
        if not drawn.exists():
            say(f"drawing the demo data in {drawn.parent}/, this once")
        demo.ensure(drawn)
        if not demo.matches_recorded(drawn):
            say(f"{path.parent}/ was drawn by another OpenCV: scores may differ in the last digits")
    return path


def build_model(experiment: Experiment) -> SAM2Model:
    """The experiment's model, loaded and frozen as it says; random weights come from its seed."""
    config, trainer = experiment.model, experiment.trainer
    torch.manual_seed(trainer.seed)
    return SAM2Model(
        config.checkpoint_path,
        config.config_path,
        config.trainable_modules,
        choose_device(trainer.device),
        config.image_size,
        config.num_maskmem,
        max_obj_ptrs_in_encoder=config.max_obj_ptrs_in_encoder,
        memory_gradient=config.memory_gradient,
        drop_path_rate=config.drop_path_rate,
    ).load()


def base_hash(experiment: Experiment) -> str | None:
    """sha256 of the weights that the experiment starts from, None for random ones."""
    base = experiment.model.checkpoint_path
    return None if base is None else checkpoint.file_hash(resolve_path(base))


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose weights a model now has."""

    path: str
    sha256: str
    step: int | None  # of the run; None for a file that does not say
    notes: tuple[str, ...]  # where the run's settings and the experiment's differ
    untrained_rows: tuple[int, ...]  # temporal rows that no training has reached, as far as known


# What a run may have changed in the model without changing the shape of most weights.
_SHAPING = ("image_size", "num_maskmem", "max_obj_ptrs_in_encoder")


def as_trained(experiment: Experiment, source: Path) -> Experiment:
    """The experiment with the model as the run of a checkpoint had it; as it is for other files."""
    if not checkpoint.is_checkpoint(source):
        return experiment
    trained = yaml.safe_load(checkpoint.load(source)["config"])["model"]
    model = experiment.model.model_copy(update={name: trained[name] for name in _SHAPING})
    return experiment.model_copy(update={"model": model})


def load_checkpoint(model: SAM2Model, experiment: Experiment, source: Path) -> Loaded:
    """Put a run's checkpoint, or a file `{"model": state_dict}` such as `--export` writes, into a
    model that holds the experiment's base weights.

    Raises:
        UserError: a missing or damaged file, another base, another architecture.
    """
    if not checkpoint.is_checkpoint(source):
        try:
            untrained = load_weights(model.sam2, source)
        except UserError as problem:
            raise UserError(str(problem).removeprefix("model.checkpoint_path: ")) from None
        return Loaded(str(source), checkpoint.file_hash(source), None, (), tuple(untrained))
    content = checkpoint.load(source)
    checkpoint.apply_weights(model.sam2, content, base_hash(experiment), source)
    trained = yaml.safe_load(content["config"])["model"]
    now = experiment.model.model_dump(mode="json")
    notes = [
        f"model.{name} is {now[name]!r}; {source} was trained with {trained[name]!r}"
        for name in _SHAPING
        if trained[name] != now[name]
    ]
    # Checkpoints from before this key: rows that were trained lie in them, others are the base's.
    untrained = [] if "maskmem_tpos_enc" in content["model"] else list(model.untrained_rows)
    if trained["num_maskmem"] == model.num_maskmem:
        untrained = content.get("untrained_rows", untrained)
    return Loaded(
        str(source),
        checkpoint.file_hash(source),
        content["step"],
        tuple(notes),
        tuple(untrained),
    )


def uses_bf16(experiment: Experiment, device: torch.device) -> bool:
    """Whether to compute in bfloat16 autocast: as the experiment says, else where CUDA can."""
    if experiment.trainer.bf16 is not None:
        return experiment.trainer.bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
