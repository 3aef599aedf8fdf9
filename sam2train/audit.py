"""The gradient audit: what each trained module got, and why a listed one got nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sam2train.clips import BatchedVideoDatapoint, is_empty
from sam2train.experiment import Experiment
from sam2train.model import SAM2Model
from sam2train.pretrained import MODULES, match_parameters
from sam2train.prompts import PROMPTS

# Parameters that SAM 2 reads at times only; see its `SAM2Base`.
_RESTING = {
    "no_mem_pos_enc": "SAM 2 never reads it",
    "no_mem_embed": "it is read on frames that are prompted by points or boxes only",
    "mask_downsample": "it is read for prompts that are masks only",
    "no_obj_ptr": "it is read where the object score says that the object is absent only",
    "no_obj_embed_spatial": "it is read where the object score says that the object is absent only",
}
_AT_THE_PROMPT = {"no_mem_pos_enc", "no_mem_embed", "mask_downsample"}  # no part of the memory
_POINTERS = {"obj_ptr_proj", "obj_ptr_tpos_proj", "no_obj_ptr"}


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


class Idle(NamedTuple):
    """An entry of `model.trainable_modules` that got no gradient at all."""

    text: str  # what to say of it
    may_come: bool  # another step of this experiment may give it one


def idle_modules(model: SAM2Model, experiment: Experiment) -> list[Idle]:
    """The entries of `model.trainable_modules` without any gradient, and why.

    A single tensor may rest for a step (the embedding of absence does while nothing is absent);
    what the experiment lists may not, unless it hangs on what is drawn.
    """
    parameters = model.trainable_parameters()
    idle = []
    for entry in model.trainable_modules:
        names = match_parameters(model.sam2, [entry], MODULES)
        if all(parameters[name].grad is None for name in names):
            tops = {name.split(".")[0] for name in names}
            text = f"{entry} got no gradient: {'; '.join(_reasons(tops, experiment))}"
            idle.append(Idle(text, not tops.isdisjoint(_drawn(experiment))))
    return idle


def _drawn(experiment: Experiment) -> set[str]:
    """The parameters that are read in some steps of an experiment, by what is drawn."""
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
        return list(dict.fromkeys(_RESTING[top] for top in sorted(tops)))
    if experiment.dataset.video_clip_length < 2:
        found.append(
            "dataset.video_clip_length is 1, and the memory is learnt through later frames"
        )
    if config.num_maskmem == 0:
        found.append("model.num_maskmem is 0, which leaves no memory")
    if tops <= _POINTERS and config.max_obj_ptrs_in_encoder == 0:
        found.append("model.max_obj_ptrs_in_encoder is 0, which leaves no object pointers")
    if config.memory_gradient == "detached" and "memory_attention" not in tops:
        found.append("model.memory_gradient is `detached`, so that what writes it learns nothing")
    found += dict.fromkeys(_RESTING[top] for top in sorted(tops & _RESTING.keys()))
    return found or ["no frame after a prompt was there to learn from"]


def has_tracked_frame(batch: BatchedVideoDatapoint) -> bool:
    """Whether an object of the batch has a real frame after one of its prompts."""
    lengths = batch.frame_valid.sum(0).tolist()
    return any(
        prompt["frame_index"] + 1 < length and not is_empty(prompt)
        for prompts, length in zip(batch.prompts, lengths, strict=True)
        for prompt in prompts
    )
