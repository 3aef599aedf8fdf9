"""What belongs to a training step beside the step itself.

With several processes: sums of gradients and scalars, random numbers, and the same files to begin
with; with one process all of it is that process's own. The gradient audit: what each trained module
got, why a listed one got nothing, and which temporal rows stay untrained. A step that is not
finite: what was bad first, and a file with all that it was made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from sam2train import distributed
from sam2train.clips import BatchedVideoDatapoint, is_empty
from sam2train.config_yaml import read_yaml
from sam2train.corrections import SimulatedUser
from sam2train.data_clips import ClipDataset
from sam2train.errors import UserError
from sam2train.evaluate import why_not_scored
from sam2train.experiment import Experiment, read_rows, untrained_rows
from sam2train.files import replacing
from sam2train.losses import LossConfig, divide_losses
from sam2train.machine import has_fast_bf16
from sam2train.model import SAM2Model
from sam2train.pretrained import MEMORY, MODULES, match_parameters, selects
from sam2train.prompts import PROMPTS
from sam2train.run_folder import RunFolder
from sam2train.sharding import is_sharded, whole

# Several processes


def sum_step(
    parameters: Sequence[torch.nn.Parameter],
    sums: Mapping[str, torch.Tensor],
    config: LossConfig,
    user: SimulatedUser | None,
    *,
    num_objects: int,
    num_batches: tuple[int, int],
    num_images: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """Give the parameters the gradients of all processes. Returns the scalars of all.

    Args:
        sums: of the losses of this process, of `sum_losses`, without a graph.
        num_objects: of the step, in all processes.
        num_batches: of this process: those with a gradient, and all.
        num_images: of this process: those found in the feature cache, and all looked for.
    """
    device = next(iter(sums.values())).device
    clicked, num_clicked = torch.zeros(3, device=device), 0
    if user is not None:
        clicked, num_clicked = user.take_sums(device)
    num_clicked, num_learning, all_batches, num_found, all_images = distributed.sum_gradients(
        parameters, [num_clicked, *num_batches, *num_images]
    )
    if distributed.num_processes() > 1:
        values = torch.stack([value.float() for value in sums.values()])
        joint = distributed.sum_tensor(torch.cat([values, clicked]))
        sums, clicked = dict(zip(sums, joint, strict=False)), joint[len(sums) :]
    scalars = divide_losses(sums, num_objects, config)
    scalars["audit/batches_with_gradient"] = torch.tensor(num_learning / all_batches)
    if num_clicked:
        scalars |= SimulatedUser.scalars(clicked)
    if all_images:
        scalars["features/hit_rate"] = torch.tensor(num_found / all_images)
    return scalars


def check_same_everywhere(seen: Mapping[str, Any]) -> None:
    """Raise UserError where another process has other settings, weights or data to begin with."""
    for number, other in enumerate(distributed.gather(dict(seen))):
        if wrong := [name for name in seen if seen[name] != other.get(name)]:
            raise UserError(
                f"process {number} has another content of {', '.join(wrong)} than process "
                f"{distributed.rank()}; give all nodes the same files and the same command"
            )


def check_can_be_scored(experiment: Experiment, splits: Mapping[str, ClipDataset | None]) -> None:
    """Raise UserError where videos of `val` or `test` have not the masks that scores need."""
    for name, part in splits.items():
        fault = part and why_not_scored(part.videos, experiment.evaluation.frame_policy)
        if fault:
            raise UserError(
                f"dataset.{name}_path: {fault}; name videos with all masks, or null, and track "
                "these with --evaluate RUN --save-masks MASKS.zip"
            )


def clips_before(
    content: Mapping[str, Any], batches: tuple[int, int], path: Path
) -> tuple[int, list[str]]:
    """How many clips the run of a checkpoint has used, and what to warn of: another number of
    processes makes steps of more or fewer clips, unless the settings make up for it.

    Args:
        batches: clips of a batch and batches of a step, of one process, as they are now.

    Raises:
        UserError: other settings make steps of more or fewer clips than before.
    """
    settings = read_yaml(content["config"], f"{path}, its settings")
    then = settings["dataset"]["batch_size"], settings["trainer"]["grad_accumulation"]
    # Checkpoints from before these keys are of one process.
    before = content.get("clips_per_step", then[0] * then[1])
    clips = content.get("clips", content["step"] * before)
    now = batches[0] * batches[1] * distributed.num_processes()
    if before == now:
        return clips, []
    text = (
        f"a step had {before} clips until now, and has {now} from here: dataset.batch_size "
        f"{batches[0]} x trainer.grad_accumulation {batches[1]} x "
        f"{distributed.num_processes()} processes"
    )
    if then != batches:
        raise UserError(f"--resume {path}: {text}; keep {before}, or start a new run")
    return clips, [f"{text}. These two settings may change to keep {before}"]


# The gradient audit

# Parameters that SAM 2 reads in some cases only; see its `SAM2Base`.
_READ_WHEN = {
    "no_mem_pos_enc": "SAM 2 never reads it",
    "no_mem_embed": "only frames that are prompted by points or boxes read it",
    "mask_downsample": "only mask prompts read it",
    "no_obj_ptr": "only frames whose object score says that the object is absent read it",
    "no_obj_embed_spatial": "only frames whose object score says that the object is absent read it",
}
_AT_THE_PROMPT = {"no_mem_pos_enc", "no_mem_embed", "mask_downsample"}  # no part of the memory
_POINTERS = {"obj_ptr_proj", "obj_ptr_tpos_proj", "no_obj_ptr"}


def audit_step(
    model: SAM2Model,
    experiment: Experiment,
    tracked: bool,
    say: Callable[[str], None],
    *,
    may_wait: bool,
) -> dict[str, float]:
    """`audit_gradients` of a step; {} where a later step decides.

    Args:
        tracked: whether a batch of the step has a frame after a prompt.
        say: gets a warning for each listed module without gradient that does not stop the run.
        may_wait: whether later steps have other clips. Clips whose objects show on the last frame
            alone give the memory no gradient, and then say nothing.

    Raises:
        UserError: a module of `model.trainable_modules` without gradient, where `trainer.audit`
            is `stop`.
    """
    if may_wait and experiment.dataset.video_clip_length > 1 and not tracked:
        return {}
    found = modules_without_gradient(model, experiment)
    if experiment.trainer.audit == "stop" and not all(entry.may_come for entry in found):
        text = ". ".join(entry.text for entry in found if not entry.may_come)
        raise UserError(f"model.trainable_modules: {text}. trainer.audit=warn goes on without")
    for entry in found:
        say(f"warning: model.trainable_modules: {entry.text}")
    return audit_gradients(model)


def audit_gradients(model: SAM2Model) -> dict[str, float]:
    """`audit/<module>/tensors`, `.../with_gradient` and `.../norm` of each trained module."""
    tensors: dict[str, list[torch.Tensor | None]] = {}
    for name, parameter in model.trainable_parameters().items():
        tensors.setdefault(name.split(".")[0], []).append(parameter.grad)
    record = {}
    for module, gradients in tensors.items():
        norms = [whole(gradient.norm()) for gradient in gradients if gradient is not None]
        record[f"audit/{module}/tensors"] = len(gradients)
        record[f"audit/{module}/with_gradient"] = len(norms)
        record[f"audit/{module}/norm"] = float(torch.stack(norms).norm()) if norms else 0.0
    return record


class WithoutGradient(NamedTuple):
    """An entry of `model.trainable_modules`, or a part of `memory`, that got no gradient at all."""

    text: str  # what to say of it
    may_come: bool  # another step of this experiment may give it one


def modules_without_gradient(model: SAM2Model, experiment: Experiment) -> list[WithoutGradient]:
    """The entries of `model.trainable_modules` without any gradient, and why.

    A single tensor of a module may be without gradient in a step: the embedding of absent objects
    is, while no object is absent. A whole module that the experiment lists may be only where the
    settings let some steps not use it. The name `memory` is checked part by part: a part that some
    steps do not use is not reported, and one that the settings switch off does not stop the run.
    """
    parameters = model.trainable_parameters()
    drawn = _drawn(experiment)
    found = []
    for entry in model.trainable_modules:
        names = match_parameters(model.sam2, [entry], MODULES)
        parts = {entry: names}
        if entry == "memory":
            parts = {part: {n for n in names if selects(part, n)} for part in MEMORY}
        for part, of_part in parts.items():
            if not of_part or any(parameters[name].grad is not None for name in of_part):
                continue
            tops = {name.split(".")[0] for name in of_part}
            may_come = not tops.isdisjoint(drawn)
            if part != entry:
                if may_come:
                    continue
                may_come = tops <= _POINTERS and experiment.model.max_obj_ptrs_in_encoder == 0
                part = f"{part} (of `{entry}`)"
            text = f"{part} got no gradient: {'; '.join(_reasons(tops, experiment))}"
            found.append(WithoutGradient(text, may_come))
    return found


def _drawn(experiment: Experiment) -> set[str]:
    """The parameters that only some steps of an experiment read, which depends on the prompts and
    the objects that are drawn."""
    model = experiment.model
    drawn = {
        "mask_downsample" if PROMPTS[name].gives_mask else "no_mem_embed"
        for name in experiment.dataset.prompt_types
    }
    # What absent objects leave in the memory is read on later frames, like all of it.
    if experiment.dataset.video_clip_length > 1 and model.num_maskmem > 0:
        if model.max_obj_ptrs_in_encoder > 0 and model.memory_gradient != "detached":
            drawn.add("no_obj_ptr")
        if model.memory_gradient != "detached":
            drawn.add("no_obj_embed_spatial")
    return drawn


def _reasons(tops: set[str], experiment: Experiment) -> Sequence[str]:
    """What keeps gradients from these modules or parameters of SAM 2, by the settings at fault."""
    config = experiment.model
    found = []
    if tops <= _AT_THE_PROMPT:
        return list(dict.fromkeys(_READ_WHEN[top] for top in sorted(tops)))
    if experiment.dataset.video_clip_length < 2:
        found.append("dataset.video_clip_length is 1, and only later frames teach the memory")
    if config.num_maskmem == 0:
        found.append("model.num_maskmem is 0, which leaves no memory")
    if tops <= _POINTERS and config.max_obj_ptrs_in_encoder == 0:
        found.append("model.max_obj_ptrs_in_encoder is 0, which leaves no object pointers")
    if config.memory_gradient == "detached" and "memory_attention" not in tops:
        found.append("model.memory_gradient is `detached`, so that what writes it learns nothing")
    found += dict.fromkeys(_READ_WHEN[top] for top in sorted(tops & _READ_WHEN.keys()))
    return found or ["no frame after a prompt was there to learn from"]


def row_warnings(model: SAM2Model, experiment: Experiment) -> list[str]:
    """What to say of the temporal rows before a training: those that its clips never read, and
    those that stay at values which no training has reached."""
    texts = []
    length, rows = experiment.dataset.video_clip_length, model.num_maskmem
    if unread := [row for row in range(rows - 1) if row not in read_rows(experiment)]:
        cure = f"dataset.video_clip_length={rows + 1} reaches all"
        if length > rows:
            cure = "All are corrected; interaction.rand_frames_to_correct=true leaves some alone"
        texts.append(
            f"clips of {length} frames never reach {_listed_rows(unread)} of maskmem_tpos_enc: "
            f"nothing is trained on memories so far back. {cure}"
        )
    left = [row for row in untrained_rows(experiment) if row in model.untrained_rows]
    trained = model.trainable_parameters()
    if left and any(selects("memory", name) for name in trained):
        reasons = _joined(model.untrained_rows[row] for row in left)
        text = (
            f"maskmem_tpos_enc keeps {reasons} in {_listed_rows(left)}, while the memory that is "
            "read with them is trained"
        )
        if "maskmem_tpos_enc" not in trained:
            text += "; `memory` in model.trainable_modules trains the rows as well"
        texts.append(text)
    return texts


def rows_left(model: SAM2Model, optimizer: torch.optim.Optimizer) -> list[int]:
    """The temporal rows that no training has reached, this one with AdamW up to now included: a row
    whose mean squared gradient is 0 never got one."""
    parameter = model.trainable_parameters().get("maskmem_tpos_enc")
    state = {} if parameter is None else optimizer.state.get(parameter, {})
    if not state:
        return list(model.untrained_rows)
    reached = state["exp_avg_sq"].flatten(1).any(1).tolist()
    return [row for row in model.untrained_rows if not reached[row]]


def _listed_rows(rows: Sequence[int]) -> str:
    """row 3, rows 1 to 5, rows 0 to 2 and 6"""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][-1] == row - 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    texts = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"row{'s' * (len(rows) > 1)} {_joined(texts)}"


def _joined(texts: Iterable[str]) -> str:
    *most, last = dict.fromkeys(texts)
    return f"{', '.join(most)} and {last}" if most else last


def feature_cache_note(experiment: Experiment, model: SAM2Model) -> str | None:
    """Why the feature cache is off although it is wanted, for all images or for training clips."""
    if not experiment.features.cache:
        return None
    if model.trains_encoder:
        return "feature cache: off, as the image encoder is trained and its features change"
    if not experiment.augment.repeats_images:
        return (
            "feature cache: not for training clips, whose pixels are changed anew each time; "
            "augment.num_views=8 changes each video in 8 ways only, which the cache can keep"
        )
    return None


def bf16_note(experiment: Experiment, device: torch.device) -> str | None:
    """That bfloat16 is faster here, where it was measured to be: on such a processor, from 512 px
    on. float32 stays the default on CPUs."""
    asked = experiment.trainer.bf16 is not None or experiment.trainer.num_steps == 0
    measured = device.type == "cpu" and experiment.model.image_size >= 512
    if asked or not measured or not has_fast_bf16(device):
        return None
    return "trainer.bf16=true is faster on this processor: a step took 0.7 of the time at 512 px"


def has_tracked_frame(batch: BatchedVideoDatapoint) -> bool:
    """Whether an object of the batch has a real frame after one of its prompts."""
    lengths = batch.lengths or batch.frame_valid.sum(0).tolist()
    return any(
        prompt["frame_index"] + 1 < length and not is_empty(prompt)
        for prompts, length in zip(batch.prompts, lengths, strict=True)
        for prompt in prompts
    )


# A step that is not finite


def not_finite(
    folder: RunFolder,
    step: int,
    batches: Sequence[BatchedVideoDatapoint],
    scalars: Mapping[str, torch.Tensor],
    model: nn.Module,
    save: Callable[[], None],
    of_shards: Sequence[str | None] = (None, None),
) -> FloatingPointError:
    """What to raise after a step that is not finite: names the step, its clips, what was bad first,
    and the two files that keep the batches and the state before the step.

    Args:
        step, batches, model: see `save_bad_batch`.
        scalars: `loss` and `loss/<term>` of the step, and `grad_norm`.
        save: writes the state before the step as the last checkpoint.
        of_shards: of `bad_shards`.
    """
    path = folder.bad_batch(step)
    names = [name for batch in batches for name in batch.names]
    text = (
        f"step {step}: loss {scalars['loss'].item():.3g} or gradient norm "
        f"{scalars['grad_norm'].item():.3g} is not finite, on {'; '.join(names)}. "
    )
    try:
        losses = {n: v for n, v in scalars.items() if n.startswith("loss")}
        found = save_bad_batch(path, step, batches, losses, model, of_shards)
        text += f"The first bad value: {found}; {path} has the clips. "
        save()
        text += f"{folder.last} is the state before this step. "
    except OSError as problem:  # the error of the step matters more than this one
        text += f"It could not be kept ({problem}). "
    return FloatingPointError(text + "Lower optimizer.learning_rate or look at these clips")


def save_bad_batch(
    path: Path,
    step: int,
    batches: Sequence[BatchedVideoDatapoint],
    losses: Mapping[str, torch.Tensor],
    model: nn.Module,
    of_shards: Sequence[str | None] = (None, None),
) -> str:
    """What was bad first, in words: a parameter, an input, a loss or a gradient, by name.

    The file at `path` gets plain tensors, texts and numbers, which `torch.load` reads: `step`,
    `first_bad`, `clips` (their names), `losses` by term, and `batches`, each with `images`
    (T, B, 3, H, W), `masks` (T, O, H, W), `frame_valid` (T, B) and the clips' `prompts`.

    Args:
        step: the one that was not finite, counted from 1.
        batches: of that step, on the CPU.
        model: with the gradients of the step; its parameters are those before it.
    """
    batches = [batch.to("cpu") for batch in batches]  # normalised
    found = next(_bad(batches, losses, model, of_shards), "no single part; a sum overflows")
    content = {
        "step": step,
        "first_bad": found,
        "clips": [name for batch in batches for name in batch.names],
        "losses": {name: value.detach().float().cpu() for name, value in losses.items()},
        "batches": [
            {
                "images": batch.img_batch.cpu(),
                "masks": batch.masks.cpu(),
                "frame_valid": batch.frame_valid.cpu(),
                "prompts": _plain(batch.prompts),
            }
            for batch in batches
        ],
    }
    with replacing(path) as partial, open(partial, "wb") as file:
        torch.save(content, file)
    return found


def _bad(
    batches: Sequence[BatchedVideoDatapoint],
    losses: Mapping[str, torch.Tensor],
    model: nn.Module,
    of_shards: Sequence[str | None],
) -> Iterator[str]:
    """What is not finite, causes before their effects."""
    parameter_of_shards, gradient_of_shards = of_shards
    if parameter_of_shards:
        yield parameter_of_shards
    for kind, tensors in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, value in tensors:
            if not is_sharded(value) and not torch.isfinite(value.detach()).all():
                yield f"the {kind} {name}, {_described(value)}"
    for batch in batches:
        for clip, name in enumerate(batch.names):
            images = batch.img_batch[:, clip]
            if not torch.isfinite(images).all():
                yield f"the input, the frames of {name}, {_described(images)}"
    for name, value in losses.items():
        if name != "loss" and not torch.isfinite(value.detach()).all():
            yield f"the loss {name}, {float(value):.3g}"
    for name, parameter in model.named_parameters():
        if parameter.grad is None or is_sharded(parameter):
            continue
        if not torch.isfinite(parameter.grad).all():
            yield f"the gradient of {name}, {_described(parameter.grad)}"
    if gradient_of_shards:
        yield gradient_of_shards


def _described(value: torch.Tensor) -> str:
    bad = int((~torch.isfinite(value.detach())).sum())
    return f"{bad:,} of {value.numel():,} values"


def _plain(value: Any) -> Any:
    """The value with tensors for arrays and Python numbers for NumPy's, at any depth."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
