"""What the trainers of several processes have in common: gradients and scalars of a step, random
numbers, and the same files to begin with. With one process all of it is that process's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam2train import checkpoint, distributed
from sam2train.config_yaml import read_yaml
from sam2train.corrections import SimulatedUser
from sam2train.errors import UserError
from sam2train.losses import LossConfig, divide_losses


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


def dropout_seed(seed: int, step: int) -> int:
    """The seed of dropout and dropped paths, another one in each process; the main one takes that
    of the experiment, as one process does."""
    number = distributed.rank()
    if number == 0:
        return seed
    return int(np.random.SeedSequence([seed, number, step]).generate_state(1)[0])


def rng_of_all(states: Mapping[str, Any]) -> dict[str, Any]:
    """The states of torch's generators of the main process, and `of_others`, where there are any,
    those of the others."""
    first, *others = distributed.gather(dict(states))
    return {**first, "of_others": others} if others else first


def restore_rng_of_all(content: Mapping[str, Any], seed: int, path: Path) -> None:
    """Give this process its generators' states back; where there were fewer processes before, new
    ones."""
    states = [content["rng"], *content["rng"].get("of_others", ())]
    if distributed.rank() < len(states):
        checkpoint.restore_rng(states[distributed.rank()], path)
    else:
        torch.manual_seed(dropout_seed(seed, content["step"]))


def check_same_everywhere(seen: Mapping[str, Any]) -> None:
    """Raise UserError where another process has other settings, weights or data to begin with."""
    for number, other in enumerate(distributed.gather(dict(seen))):
        if wrong := [name for name in seen if seen[name] != other.get(name)]:
            raise UserError(
                f"process {number} has another content of {', '.join(wrong)} than process "
                f"{distributed.rank()}; give all nodes the same files and the same command"
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
