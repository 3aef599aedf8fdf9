"""One experiment: all sections of its YAML, and the rules that cross them."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from sam2train.config import (
    Section,
    apply_overrides,
    build,
    described_keys,
    flatten,
    sweep_parameters,
)
from sam2train.config_yaml import load_yaml
from sam2train.corrections import InteractionConfig
from sam2train.datasets import FORMATS, DatasetConfig, data_paths
from sam2train.demo import is_demo_path
from sam2train.errors import UserError
from sam2train.features import FeaturesConfig
from sam2train.files import file_hash, resolve_path
from sam2train.losses import LossConfig
from sam2train.machine import check_available, choose_device
from sam2train.metrics import EvaluationConfig
from sam2train.optimizer import OptimizerConfig
from sam2train.pretrained import selects
from sam2train.prompts import PROMPTS, check_prompts
from sam2train.runlog_wandb import TrackingConfig
from sam2train.transforms import AugmentConfig

if TYPE_CHECKING:
    import torch

    from sam2train.model import SAM2Model

# What --smoke changes: two steps of anything, in seconds. `smoke_settings` shrinks more.
SMOKE = {
    "trainer.num_steps": 2,
    "trainer.log_every": 1,
    "trainer.val_every": 2,
    "trainer.save_every": 2,
    "trainer.grad_accumulation": 1,
    "dataset.batch_size": 1,
    "dataset.num_workers": 0,
    "evaluation.max_videos": 1,
    "evaluation.max_frames": 4,
    "evaluation.num_overlays": 1,
}


class LoraConfig(Section):
    """The `model.lora:` section. Weights that it stands beside stay frozen."""

    rank: int = Field(8, ge=1, description="of the product that is added to a weight")
    modules: tuple[str, ...] = Field(
        ("memory_attention",), min_length=1, description="whose attention layers get one"
    )


class ModelConfig(Section):
    """The `model:` section of an experiment."""

    checkpoint_path: str | None = Field(
        None, description="SAM 2 weights to start from; null starts from random ones"
    )
    config_path: str = Field("configs/sam2.1_hiera_t.yaml", description="SAM 2 model config")
    trainable_modules: tuple[str, ...] = Field(
        ("memory_attention", "memory_encoder"),
        description="modules, `memory`, parameters or patterns to train; all else is frozen",
    )
    image_size: int = Field(512, ge=32, multiple_of=32, description="side of the square input")
    num_maskmem: int = Field(7, ge=0, description="memories: the conditioning one and past frames")
    max_obj_ptrs_in_encoder: int = Field(
        16, ge=0, description="object pointers in memory attention; 0 uses none"
    )
    memory_gradient: Literal["full", "detached"] | Annotated[int, Field(ge=1)] = Field(
        "full", description="frames a gradient travels back through the memory"
    )
    drop_path_rate: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="chance to skip a block of a trained image encoder; null: as config_path says",
    )
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="of the memory attention; null: as config_path says, 0.1 in SAM 2's. 0 is "
        "faster: attention with dropout has no fused code",
    )
    memory_noise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="in training: chance that a memory is made from a wrong mask (moved, another "
        "object's, empty), so that the model learns to distrust its memories",
    )
    lora: LoraConfig | None = Field(
        None,
        description="train small matrices beside frozen attention weights (LoRA), merged on export",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="of random initial weights; null: trainer.seed"
    )


# What takes memory and time, and the most that --smoke leaves of it.
SMOKE_MOST = {
    "dataset.video_clip_length": 4,
    "dataset.max_objects": 2,
    "interaction.num_correction_pt_per_frame": 1,
}
SMOKE_SIDE = 256  # of the image


class TrainerConfig(Section):
    """The `trainer:` section. Periods count optimiser steps."""

    num_steps: int = Field(1000, ge=0, description="optimiser steps of the run")
    val_every: int = Field(
        200,
        ge=1,
        description="steps between validations; also before the first step and after the last",
    )
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1, description="steps whose means are one line of the log")
    grad_accumulation: int = Field(1, ge=1, description="batches of one optimiser step")
    max_grad_norm: float = Field(0.1, gt=0, description="longer gradients are scaled to this norm")
    audit: Literal["stop", "warn"] = Field(
        "stop", description="what a trainable module without gradient at the first step does"
    )
    activation_checkpointing: bool = Field(
        False,
        description="the backward computes each frame again: about half of the memory of a step, "
        "a third more time",
    )
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="fsdp: each process of torchrun keeps a part of a trained image encoder, its "
        "gradients and AdamW's moments",
    )
    bf16: bool | None = Field(None, description="bfloat16 autocast; null: where CUDA supports it")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="of dropout; and of initial weights and of clips, where model.seed and "
        "dataset.seed say nothing else",
    )


class Experiment(Section):
    """All settings of a run, checked; the disk is not touched."""

    dataset: DatasetConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)
    interaction: InteractionConfig = Field(default_factory=InteractionConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _sizes_agree(self) -> Experiment:
        side = self.model.image_size
        if self.dataset.image_size != (side, side):
            height, width = self.dataset.image_size
            raise ValueError(
                f"dataset.image_size is [{height}, {width}] and model.image_size {side}; SAM 2 "
                f"takes squares: set dataset.image_size to [{side}, {side}]"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_can_draw_its_prompts(self) -> Experiment:
        try:
            check_prompts(self.dataset, self.evaluation.prompt_types or ())
        except ValueError as problem:
            raise ValueError(
                f"evaluation.prompt_types uses the numbers of points in dataset: {problem}"
            ) from None
        return self

    @model_validator(mode="after")
    def _somebody_can_be_corrected(self) -> Experiment:
        interaction, dataset = self.interaction, self.dataset
        if not interaction.enabled:
            return self
        if all(PROMPTS[name].gives_mask for name in dataset.prompt_types):
            raise ValueError(
                "interaction corrects objects prompted by points and boxes, and "
                "dataset.prompt_types has masks only; add one of them, or set "
                "interaction.num_correction_pt_per_frame to 0"
            )
        if interaction.num_frames_to_correct < dataset.max_conditioning_frames:
            raise ValueError(
                f"interaction.num_frames_to_correct is {interaction.num_frames_to_correct} and "
                f"dataset.max_conditioning_frames {dataset.max_conditioning_frames}; every "
                "conditioning frame is corrected: allow at least as many"
            )
        return self

    @property
    def weights_seed(self) -> int:
        """Of random initial weights."""
        return self.trainer.seed if self.model.seed is None else self.model.seed

    @property
    def clips_seed(self) -> int:
        """Of the order of clips and of all that is drawn for them."""
        return self.trainer.seed if self.dataset.seed is None else self.dataset.seed

    @property
    def prompts_seed(self) -> int:
        """Of the prompts that evaluation gives."""
        return self.trainer.seed if self.evaluation.seed is None else self.evaluation.seed


def load_experiment(path: Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment in a YAML file, with `dotted.key -> value` overrides applied.

    Raises:
        UserError: everything that is wrong with it, in one message.
    """
    return build(
        Experiment, apply_overrides(load_yaml(path), overrides or {}, Experiment), str(path)
    )


def settings_page() -> str:
    """experiments/SETTINGS.md: each key of each section, from the code."""
    lines = [
        "# Settings",
        "",
        "Every key of an experiment, with what it takes, its default and its meaning. Written from",
        "the code by `python run.py --settings --write`, as is `settings.schema.json` for editors.",
    ]
    for section in Experiment.model_fields:
        lines += [
            "",
            f"## {section}",
            "",
            "| key | takes | default | meaning |",
            "|---|---|---|---|",
        ]
        for name, *texts in settings_of_section(section):
            taken, default, meaning = (text.replace("|", "\\|") for text in texts)
            lines.append(f"| `{name}` | {taken} | `{default}` | {meaning} |")
    return "\n".join([*lines, ""])


def settings_of_section(name: str) -> list[tuple[str, str, str, str]]:
    """`described_keys` of one section of an experiment.

    Raises:
        UserError: there is no such section.
    """
    if name not in Experiment.model_fields:
        raise UserError(f"--settings {name}: expected one of {', '.join(Experiment.model_fields)}")
    return list(described_keys(Experiment.model_fields[name].annotation, f"{name}."))


def settings_text(name: str | None) -> str:
    """The keys of a section, or of all, for a terminal: name and default, values, meaning."""
    lines = []
    for section in [name] if name else Experiment.model_fields:
        for key, taken, default, meaning in settings_of_section(section):
            lines += [f"{key}: {default}", f"    {taken}"]
            lines += [f"    {line}" for line in textwrap.wrap(meaning, 92)]
    return "\n".join(lines)


def settings_schema() -> str:
    """experiments/settings.schema.json: for editors, which check and complete YAML files by it. It
    has the types, ranges and choices of keys, not the rules across them."""
    schema = Experiment.model_json_schema(by_alias=False)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    choices = {"prompt_types": list(PROMPTS), "dataset_type": list(FORMATS)}
    for part in (schema, *schema["$defs"].values()):
        known = part["properties"]
        for key, names in choices.items():
            for text in _texts(known.get(key, {})):
                text["enum"] = names
        for of_key in known.values():
            if of_key.get("type") == "object":  # dotted names, which may be nested, too
                of_key["additionalProperties"] = {
                    "anyOf": [of_key["additionalProperties"], {"type": "object"}]
                }
        if "num_of_pos_points" in known:  # of both spellings one may be given
            known["number_of_points"] = known["num_of_pos_points"]
            known["include_center_point"] = known["include_center"]
    return json.dumps(schema, indent=1) + "\n"


def _texts(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a schema that allow a text."""
    parts = [schema, *schema.get("anyOf", ())]
    parts += [part["items"] for part in parts if isinstance(part.get("items"), dict)]
    return [part for part in parts if part.get("type") == "string"]


def smoke_settings(path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides with what --smoke changes of an experiment; what they name stays as it is."""
    wanted = {**SMOKE, **overrides}
    now = flatten(load_experiment(path, wanted).model_dump())
    named = flatten(overrides)
    for key, most in SMOKE_MOST.items():
        if key not in named and (now[key] is None or now[key] > most):
            wanted[key] = most
    sides = "model.image_size", "dataset.image_size"
    if now[sides[0]] > SMOKE_SIDE and named.keys().isdisjoint(sides):
        wanted |= {sides[0]: SMOKE_SIDE, sides[1]: [SMOKE_SIDE, SMOKE_SIDE]}
    return wanted


def as_begun(experiment: Experiment, config: Mapping[str, Any]) -> Experiment:
    """The experiment as a run goes on with it that began with `config`, nested.

    A run from before `evaluation.seed` was scored with prompts of its trainer.seed. It keeps them,
    as `evaluation.seed: null`, unless the experiment names a seed.
    """
    named = "seed" in experiment.evaluation.model_fields_set
    if named or (config.get("evaluation") or {}).get("seed") is not None:
        return experiment
    evaluation = experiment.evaluation.model_copy(update={"seed": None})
    return experiment.model_copy(update={"evaluation": evaluation})


def prepare_experiment(
    path: Path,
    overrides: Mapping[str, Any],
    *,
    smoke: bool = False,
    say: Callable[[str], None] = print,
) -> Experiment:
    """The experiment that a command works on: the file, with what changes it from outside.

    A W&B agent's typed values win over the words it typed, and everything wins over `smoke`. Splits
    of the demo data beside data of the user's own are told, and its test split is left out.

    Raises:
        UserError: as `load_experiment`.
    """
    if typed := os.environ.get("WANDB_SWEEP_PARAM_PATH"):
        # The agent's words have no types; the values in this file have.
        overrides = {**overrides, **sweep_parameters(Path(typed))}
    if smoke:
        overrides = smoke_settings(path, overrides)
    experiment = load_experiment(path, overrides)
    demo = demo_beside_own(experiment, overrides)
    if "dataset.test_path" in demo:
        experiment = load_experiment(path, {**overrides, "dataset.test_path": None})
    for key in demo:
        done = "left out" if key == "dataset.test_path" else "used all the same"
        say(f"{key} is the demo's, beside data of your own: {done}; name yours")
    return experiment


def demo_beside_own(experiment: Experiment, overrides: Mapping[str, Any]) -> list[str]:
    """The keys of the splits that an experiment still has from the demo where the user gave data of
    their own: a result must not be reported on demo videos that have nothing to do with that
    data."""
    dataset = experiment.dataset
    keys = ("data_path", "val_path", "test_path")
    paths = {f"dataset.{key}": getattr(dataset, key) for key in keys}
    own = [
        key
        for key, path in paths.items()
        if key in overrides and not all(map(is_demo_path, data_paths(path)))
    ]
    if "dataset.data_path" not in own and "dataset.val_path" not in own:
        return []
    return [
        key
        for key, path in paths.items()
        if key != "dataset.data_path" and key not in overrides and path and is_demo_path(path)
    ]


def read_rows(experiment: Experiment) -> list[int]:
    """Rows of the temporal encoding that training clips read.

    Row r belongs to the memory of the tracked frame r + 1 frames back, the last row to that of
    every conditioning frame. The frame farthest from its memory is the last of a clip, T - 2 frames
    after the first tracked one. Further conditioning frames are drawn at random, and some clips
    have none, so they leave no row unread. Corrections leave rows unread where they make every
    frame a conditioning frame.
    """
    length, rows = experiment.dataset.video_clip_length, experiment.model.num_maskmem
    if length < 2 or rows == 0:
        return []
    user = experiment.interaction
    nothing_tracked = (
        user.enabled
        and user.add_all_frames_to_correct_as_cond
        and not user.rand_frames_to_correct
        and user.num_frames_to_correct >= length
        and "mask" not in experiment.dataset.prompt_types  # such objects are not corrected
    )
    reached = 0 if nothing_tracked else length - 2
    return [*range(min(reached, rows - 1)), rows - 1]


def untrained_rows(experiment: Experiment) -> list[int]:
    """Rows of the temporal encoding that the experiment leaves as they are: no training clip reads
    them, or `model.trainable_modules` does not list their parameter."""
    listed = any(selects(name, "maskmem_tpos_enc") for name in experiment.model.trainable_modules)
    trained = read_rows(experiment) if listed else []
    return [row for row in range(experiment.model.num_maskmem) if row not in trained]


def build_model(experiment: Experiment, say: Callable[[str], None] = print) -> SAM2Model:
    """The experiment's model, loaded and frozen as it says; random weights come from its seed.

    Args:
        say: gets what the feature cache has to tell.
    """
    import torch

    from sam2train.model import SAM2Model

    config = experiment.model
    torch.manual_seed(experiment.weights_seed)
    device = choose_device(experiment.trainer.device)
    if device.type == "cuda" and device.index is not None:
        check_available(device)
        torch.cuda.set_device(device)  # what torch measures and draws from by default
    if device.type == "cuda" and experiment.trainer.bf16 is not False:
        # TF32 has more digits than bfloat16. `trainer.bf16: false` asks for float32, which stays.
        torch.set_float32_matmul_precision("high")
    model = SAM2Model(
        config.checkpoint_path,
        config.config_path,
        config.trainable_modules,
        device,
        config.image_size,
        config.num_maskmem,
        max_obj_ptrs_in_encoder=config.max_obj_ptrs_in_encoder,
        memory_gradient=config.memory_gradient,
        drop_path_rate=config.drop_path_rate,
        dropout=config.dropout,
        memory_noise=config.memory_noise,
        activation_checkpointing=experiment.trainer.activation_checkpointing,
        lora=config.lora and (config.lora.rank, config.lora.modules),
    ).load()
    model.use_feature_cache(experiment.features, say)
    return model


def base_hash(experiment: Experiment) -> str | None:
    """sha256 of the weights that the experiment starts from, None for random ones."""
    base = experiment.model.checkpoint_path
    return None if base is None else file_hash(resolve_path(base))


def uses_bf16(experiment: Experiment, device: torch.device) -> bool:
    """Whether to compute in bfloat16 autocast: as the experiment says, else where CUDA can."""
    import torch

    if experiment.trainer.bf16 is not None:
        return experiment.trainer.bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
