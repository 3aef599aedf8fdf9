"""`python -m sam2train.speed [PART ...]`: how fast this is beside SAM 2's own code, in one run.

Every part measures ours and the other side in turn (A B A B) in one process, or in processes of
their own where it is about memory or whole runs, after a check that both compute the same. What is
printed are medians of this machine at this hour: compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam2train.errors import MachineFault, UserError
from sam2train.files import write_text

# Part -> what it measures, in the order in which they run.
PARTS = {
    "step": "a training step, with operations and the share of the machine's own rate",
    "memory": "the peak memory of a step, and of a frame more",
    "evaluation": "following whole videos, against SAM2VideoPredictor",
    "loader": "clips from 1080p JPEGs and from a film, and the bytes of a batch",
    "index": "reading a COCO JSON of 200,000 annotations, against pycocotools",
    "sweep": "8 trials over one frozen encoder, against separate runs",
    "start": "from the command to the first step, and what a line of the log costs",
}


def measure_words(words: Sequence[str]) -> int:
    """Measure, print, and write all values where that is asked for. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sam2train.speed",
        description="How fast this is beside SAM 2's own code from the installed sam2 package.",
        epilog="parts: " + "; ".join(f"{name}: {about}" for name, about in PARTS.items()),
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all where none is named"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there, too")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; auto by default")
    given = parser.parse_args(words)
    try:
        measure_parts(given.parts or list(PARTS), given.device, given.json)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except MachineFault as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def measure_parts(names: Sequence[str], device_name: str, json_file: Path | None) -> None:
    """Run parts by name, in the order of `PARTS`; each is printed when it is done.

    Raises:
        UserError: an unknown part or device, or SAM 2's own code is not there.
    """
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"unknown part {unknown[0]!r}; expected {', '.join(PARTS)}")

    from sam2train.machine import check_available, choose_device, describe_environment

    device = choose_device(device_name)
    check_available(device)
    environment = describe_environment(device)
    content: dict[str, Any] = {"environment": environment, "rows": [], "seconds": {}}
    print(_describe(environment))
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in PARTS if name in names]:
            start = time.perf_counter()
            rows = _measure(name, device, Path(folder) / name)
            content["seconds"][name] = time.perf_counter() - start
            content["rows"] += [row.as_json() for row in rows]
            print(f"{name}: {PARTS[name]} ({content['seconds'][name]:.0f} s)")
            print(*map(_line, rows), sep="\n", flush=True)
            if json_file is not None:  # after each part: a later one may fail
                write_text(json_file, json.dumps(content, indent=1) + "\n")


def _measure(name: str, device: Any, folder: Path) -> list[Any]:
    """The rows of one part; only what it needs is imported."""
    if name in ("step", "memory"):
        from sam2train.speed_step import measure_memory, measure_steps

        measure = measure_steps if name == "step" else measure_memory
        return measure(device, folder)
    if name == "evaluation":
        from sam2train.speed_video import measure_evaluation

        return measure_evaluation(device, folder)
    if name in ("loader", "index"):
        from sam2train.speed_data import measure_index, measure_loader

        return measure_loader(folder) if name == "loader" else measure_index(folder)
    from sam2train.speed_runs import measure_log, measure_start, measure_sweep

    if name == "sweep":
        return measure_sweep(device, folder)
    return [*measure_start(folder), *measure_log(device, folder / "log")]


def _describe(environment: dict[str, Any]) -> str:
    versions = environment["packages"]
    commit = (environment["code"]["commit"] or "unknown")[:7]
    changed = ", with changes" if environment["code"]["changed"] else ""
    return (
        f"{environment['device']}, {environment['threads']} threads, torch {versions['torch']}, "
        f"sam2 {versions['sam2']}, commit {commit}{changed}"
    )


def _line(row: Any) -> str:
    ours, other = _show(row.ours, row.unit), _show(row.other, row.unit)
    text = f"  {row.what} ({row.at}): {ours}; {row.beside} {other}, {row.ratio:.2f} times ours"
    return text if "operations" not in row.details else f"{text}\n{_rates(row.details)}"


def _show(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 1e6:,.1f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _rates(details: dict[str, Any]) -> str:
    """Operations a step and the share that they are of the machine's rate, ours and theirs."""
    shares = [
        f"{whose} {part['operations'] / 1e9:,.0f} GFLOP at {part['share_of_gemm']:.0%}"
        for whose, part in (("ours", details), ("SAM 2", details["other"]))
    ]
    rates = [f"{name} {rate / 1e9:,.0f}" for name, rate in details["gemm_rates"].items()]
    return f"    {', '.join(shares)} of the rate of GEMM ({', '.join(rates)} GFLOP/s)"


if __name__ == "__main__":
    sys.exit(measure_words(sys.argv[1:]))
