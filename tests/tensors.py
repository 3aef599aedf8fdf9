"""A function for a process of its own, in a module that imports little."""

import torch

from sam2train.speed_clock import peak_of


def peak_of_tensors(megabytes: int) -> int:
    """Peak bytes of a run that fills this much, frees it, and keeps a tenth more."""
    kept = []

    def run() -> None:
        torch.ones(megabytes * 250_000)
        kept.append(torch.ones(megabytes * 25_000))

    return peak_of(run, torch.device("cpu"))
