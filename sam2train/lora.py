"""LoRA on attention layers: small matrices beside frozen weights are trained, and merged on export.

The method is that of https://arxiv.org/abs/2106.09685; the factor alpha / rank is 1 here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from sam2train.errors import UserError
from sam2train.pretrained import MODULES, selects


class LoraLinear(nn.Linear):
    """A linear layer with `lora_b @ lora_a` added to its weight, 0 at first.

    Names and values of the weight and the bias stay those of the layer it is made of.
    """

    def __init__(self, layer: nn.Linear, rank: int):
        nn.Module.__init__(self)  # without weights of its own: it takes those of the layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + added

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the sum as its weight."""
        options = {"device": self.weight.device, "dtype": self.weight.dtype}
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, **options)
        layer.weight.copy_(self.weight + self.lora_b @ self.lora_a)
        if self.bias is not None:
            layer.bias.copy_(self.bias)
        return layer


def add_lora(sam2: nn.Module, rank: int, modules: Sequence[str]) -> None:
    """Give the attention layers of the listed modules their matrices, of this rank.

    Args:
        modules: names as in `model.trainable_modules`.

    Raises:
        UserError: an entry without an attention layer.
    """
    found: set[str] = set()
    for name, module in list(sam2.named_modules()):
        if not type(module).__name__.endswith("Attention"):
            continue
        entries = {e for e in modules if selects(e, f"{name}.weight", MODULES)}
        found |= entries
        layers = [(n, m) for n, m in module.named_children() if type(m) is nn.Linear]
        for child, layer in layers if entries else ():
            setattr(module, child, LoraLinear(layer, rank))
    if missing := [entry for entry in modules if entry not in found]:
        raise UserError(
            f"model.lora.modules: {missing[0]!r} has no attention layer; expected "
            "memory_attention, mask_decoder, image_encoder, or a part such as "
            "memory_attention.layers.0"
        )


def lora_layers(sam2: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The layers that have such matrices, by name."""
    return ((n, m) for n, m in sam2.named_modules() if isinstance(m, LoraLinear))


def merge_lora(sam2: nn.Module) -> None:
    """Put plain layers in their places, which give the same but for rounding."""
    for name, layer in list(lora_layers(sam2)):
        parent, _, child = name.rpartition(".")
        setattr(sam2.get_submodule(parent), child, layer.merged())


def is_lora(parameter: str) -> bool:
    """Whether a name of SAM 2's parameters is that of a matrix beside a weight."""
    return parameter.rpartition(".")[2] in ("lora_a", "lora_b")


def beside_lora(sam2: nn.Module) -> Iterable[str]:
    """Names of the weights and biases that such matrices stand beside: these stay frozen."""
    for name, layer in lora_layers(sam2):
        yield from (f"{name}.{own}" for own, _ in layer.named_parameters() if not is_lora(own))
