"""The gradient audit: what each trained module got, why a listed one got nothing, and which
temporal rows stay untrained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from sam2train.clips import BatchedVideoDatapoint, is_empty
from sam2train.errors import UserError
from sam2train.experiment import Experiment, read_rows, untrained_rows
from sam2train.model import SAM2Model
from sam2train.pretrained import MEMORY, MODULES, match_parameters, selects
from sam2train.prompts import PROMPTS

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
        norms = [gradient.norm() for gradient in gradients if gradient is not None]
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


def has_tracked_frame(batch: BatchedVideoDatapoint) -> bool:
    """Whether an object of the batch has a real frame after one of its prompts."""
    lengths = batch.frame_valid.sum(0).tolist()
    return any(
        prompt["frame_index"] + 1 < length and not is_empty(prompt)
        for prompts, length in zip(batch.prompts, lengths, strict=True)
        for prompt in prompts
    )
