"""How speeds are measured: variants in turn in one process, the rate of the machine's own matrix
multiplication beside them, operations counted, and the peak memory of a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sam2train.errors import MachineFault
from sam2train.files import REPOSITORY

# Side of the square matrices whose product gives the rate of a machine: large enough to be limited
# by arithmetic, small enough to cost less than the step beside it.
_GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
CPU = torch.device("cpu")  # of what runs beside no other device, such as loading clips
_GEMM = "GEMM "  # with the precision: a variant of `alternate`


class Mismatch(MachineFault):
    """Ours and the other side do not compute the same: their speeds say nothing."""


@dataclass(frozen=True)
class Row:
    """One line of the table: ours beside something else, both measured in this run."""

    part: str
    what: str
    at: str  # the sizes that it was measured at
    ours: float  # a median where it is a time
    other: float
    unit: str
    beside: str = "SAM 2"  # what `other` is
    details: dict[str, Any] = field(default_factory=dict)  # all single values, operations, shares

    @property
    def ratio(self) -> float:
        """How many times less ours takes than the other: 2 is half of its time or memory."""
        return self.other / self.ours

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def synchronise(device: torch.device) -> None:
    """Wait for what was started on a device, so that a clock counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each variant: `rounds` of them, taken in turn (A B C A B C), since a machine is
    not the same twice.

    Args:
        warm_up: a round before, which does not count: the first use of a shape costs more.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1 if warm_up else 0, rounds):
        gc.collect()
        for name, run in variants.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def gemms(device: torch.device) -> dict[str, Callable[[], object]]:
    """Variants that multiply square matrices in float32 and bfloat16; see `gemm_rates`."""
    side = _GEMM_SIDE.get(device.type, 2048)
    variants = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.rand(2, side, side, device=device).to(dtype)
        variants[_GEMM + str(dtype).removeprefix("torch.")] = lambda a=a, b=b: a @ b
    return variants


def gemm_rates(seconds: Mapping[str, Sequence[float]], device: torch.device) -> dict[str, float]:
    """Precision -> operations a second, from what `alternate` has measured of `gemms`."""
    operations = 2 * _GEMM_SIDE.get(device.type, 2048) ** 3
    return {
        name.removeprefix(_GEMM): operations / statistics.median(taken)
        for name, taken in seconds.items()
        if name.startswith(_GEMM)
    }


def count_operations(run: Callable[[], object]) -> int:
    """Floating point operations of matrix products, convolutions and attention in a run, forward
    and backward. Fused attention computes its scores again in the backward pass: that counts."""
    from torch.utils import flop_counter

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(grad, query, key, value)

    # torch's counter has formulas for CUDA's fused attention, and none for the CPU's.
    aten = torch.ops.aten
    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        run()
    return counter.get_total_flops()


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a run holds at its peak beyond those from before it begins.

    On CUDA by torch's allocator, to the byte. On CPU by the resident memory of the process, where
    scratch memory counts as well: call it in a process of its own (`in_process`), where little was
    freed before that a run could take again.

    Raises:
        MachineFault: a system without /proc, such as macOS.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):  # of glibc: memory that was freed goes back
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError as problem:
        raise MachineFault(
            f"the peak memory of a process is read on Linux only: {problem}"
        ) from None
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Bytes of one of the lines of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_process(function: Callable[..., Any], *values: Any, timeout: float = 300.0) -> Any:
    """What a public function of this package returns in a fresh Python; values must fit JSON.

    Raises:
        MachineFault: the process has failed; with the last line that it said.
    """
    code = (
        f"import json, sys; from {function.__module__} import {function.__name__} as run\n"
        "print('\\n' + json.dumps(run(*json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"code {done.returncode}, without a word"]
        raise MachineFault(f"a process that measures has failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
