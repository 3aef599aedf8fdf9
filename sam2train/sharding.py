"""`trainer.sharding: fsdp`: a trained image encoder divided over the processes of a job.

Each process keeps its part of the encoder's weights, gradients and AdamW's moments. FSDP2
(`torch.distributed.fsdp.fully_shard`) brings a block together when it is computed, and sums its
gradients in the backward. All processes have to do this equally often. So only modules are sharded
that each batch calls once in each process, whatever its clips hold: the blocks of the encoder's
trunk, and, as one more part, what else the encoder has (patch and position embeddings, neck).

The others stay whole in each process. How often they are called depends on the objects, prompts and
clicks of a process: the layers of memory attention, the mask decoder, the prompt encoder,
`obj_ptr_proj` and `obj_ptr_tpos_proj`. SAM 2 reads some outside of a forward that could bring
them together: `maskmem_tpos_enc`, `no_mem_embed`, `no_mem_pos_enc`, `no_obj_ptr`,
`no_obj_embed_spatial`, and the decoder's `conv_s0` and `conv_s1`; `_encode_new_memory` calls the
memory encoder. Together they are 11.7 M of the large model's 224 M parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sam2train import distributed


def shard(model: Any, say: Callable[[str], None]) -> None:
    """Divide the image encoder's weights over the processes, in place: its parameters are other
    objects afterwards. Gradients of sharded parameters are sums over the processes.

    Args:
        model: a `SAM2Model`, with the weights to begin with in each process.
        say: gets a line where there is nothing to divide.
    """
    if distributed.num_processes() == 1:
        say("trainer.sharding: nothing to divide with one process; torchrun starts several")
        return
    if not model.trains_encoder:
        say("trainer.sharding: nothing to divide, as no part of the image encoder is trained")
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    encoder = model.image_encoder
    mesh = init_device_mesh(model.device.type, (distributed.num_processes(),))
    for part in (*encoder.trunk.blocks, encoder):
        fully_shard(part, mesh=mesh)
        # By default it averages. Losses are divided by the objects of all processes already.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each process has a part of it (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the parts of all processes, each of which has to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_state(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A state dict with whole tensors; all processes have to call this. Those beside the main one
    get no values of the sharded ones."""
    found: dict[Any, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            found[name] = whole_state(value)
        elif isinstance(value, torch.Tensor) and is_sharded(value):
            # One after the other, so that no device holds more than one whole.
            joint = whole(value.detach())
            found[name] = joint.cpu() if distributed.is_main() else None
        else:
            found[name] = value
    return found


def whole_weights_of(
    sam2: nn.Module, only: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Weights by name, on the CPU, for the main process; all have to call this.

    Args:
        only: what is trained, which is then enough unless it is all; None: all weights.
    """
    weights = sam2.state_dict()
    if only is not None and len(only) < len(list(sam2.parameters())):
        weights = {name: weights[name] for name in only}
    joint = whole_state(weights)
    return {n: v.detach().cpu() for n, v in joint.items()} if distributed.is_main() else {}


def shard_moments(optimizer: torch.optim.Optimizer) -> None:
    """Divide whole moments, the same in all processes, as their parameters are divided."""
    from torch.distributed.tensor import distribute_tensor

    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if is_sharded(parameter) and value.dim():
                state[name] = distribute_tensor(
                    value, parameter.device_mesh, parameter.placements, src_data_rank=None
                )


def copy_into(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Overwrite parameters by name."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Each process has all weights while the block runs, and what is written into them is gone
    after it. Processes score other videos, so that none can wait for another in a forward."""
    if distributed.num_processes() == 1:  # nothing is sharded
        yield
        return
    parts = [module for module in model.modules() if hasattr(module, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            # The encoder as a whole comes first; its own part is kept until the backward.
            part.set_reshard_after_forward(part is not parts[0], recurse=False)


def zero_of(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """0, with a graph through all features of the encoder: its backward then runs in each process,
    also in one whose clips show no object."""
    return sum(0 * of_level.flatten()[:1].float().sum() for of_level in maps)


def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients that are longer than `max_norm` together. Returns their norm before."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [gradient.to_local() for gradient in gradients if is_sharded(gradient)]
    if not parts:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    others = [gradient for gradient in gradients if not is_sharded(gradient)]
    norm_of = torch.nn.utils.get_total_norm
    squares = distributed.sum_tensor(norm_of(parts).square()) + norm_of(others).square()
    norm = squares.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch does
    for gradient in (*parts, *others):
        gradient.mul_(factor)
    return norm


def bad_shards(model: nn.Module) -> tuple[str | None, str | None]:
    """The first sharded parameter, and the first gradient of one, that is not finite in some
    process; all have to call this."""
    parts = [(name, p) for name, p in model.named_parameters() if is_sharded(p)]
    weights = [(f"the parameter {name}", p.detach()) for name, p in parts]
    gradients = [(f"the gradient of {name}", p.grad) for name, p in parts if p.grad is not None]
    return _first_bad(weights), _first_bad(gradients)


def _first_bad(found: Sequence[tuple[str, Any]]) -> str | None:
    if not found:
        return None
    counts = torch.stack([(~torch.isfinite(value.to_local())).sum() for _, value in found])
    for (text, value), count in zip(found, distributed.sum_tensor(counts).tolist(), strict=True):
        if count:
            return f"{text}, {count:,} of {value.numel():,} values"
    return None
