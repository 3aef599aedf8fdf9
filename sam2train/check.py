"""`--check-data`: every frame and every mask of an experiment read once, and all that is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sam2train.build import build_dataset
from sam2train.errors import UserError
from sam2train.experiment import Experiment
from sam2train.images import read_image
from sam2train.machine import num_cores
from sam2train.sav import Film
from sam2train.videos import DataError, Video, listed

_QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
_SHOWN = 40  # lines of one kind on the console; the JSON has all


@dataclass
class SplitReport:
    """What was found in the data of one path."""

    path: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataReport:
    """What was found, by split, and between the splits."""

    splits: dict[str, SplitReport]
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """error, warning or ok: the worst that was found."""
        everything = [self, *self.splits.values()]
        if any(part.errors for part in everything):
            return "error"
        return "warning" if any(part.warnings for part in everything) else "ok"

    @property
    def exit_code(self) -> int:
        return 2 if self.verdict == "error" else 0

    def to_json(self) -> str:
        """One JSON document: `verdict`, `splits`, and `errors` and `warnings` between them."""
        return json.dumps({"verdict": self.verdict, **asdict(self)}, indent=1, ensure_ascii=False)

    def show(self, console: Console) -> None:
        """The report for people."""

        def say(text: str, style: str = "") -> None:
            console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

        table = Table("", *self.splits, title="Data", title_justify="left")
        for name in next(iter(self.splits.values())).statistics:
            table.add_row(
                name.replace("_", " "),
                *(_as_text(split.statistics[name]) for split in self.splits.values()),
            )
        console.print(table)
        for name, part in [*self.splits.items(), ("between the splits", self)]:
            if part.errors or part.warnings:
                say(f"\n{name}: {part.path}" if part is not self else f"\n{name}")
            for kind, style in (("error", "red"), ("warning", "yellow")):
                lines = getattr(part, f"{kind}s")
                for line in lines[:_SHOWN]:
                    say(f"  {kind}: {line}", style)
                if more := len(lines[_SHOWN:]):
                    say(f"  ... and {more} more of these; --json lists all", style)
        ends = {
            "ok": "all frames and masks can be read",
            "warning": "all frames and masks can be read; see the warnings",
            "error": "this data needs a repair",
        }
        say(f"\n{ends[self.verdict]}")


def check_data(experiment: Experiment, console: Console | None = None) -> DataReport:
    """Read all training, validation and test data of an experiment; nothing is raised for it.

    Masks are read whole where videos are indexed; frames are decoded here, in as many threads as
    there are cores: Pillow decodes outside Python's lock.

    Args:
        console: shows how far it is.
    """
    config = experiment.dataset
    paths = {"training": config.data_path, "validation": config.val_path, "test": config.test_path}
    splits: dict[str, SplitReport] = {}
    videos: dict[str, list[Video]] = {}
    pictures: dict[str, dict[bytes, Path]] = {}
    for name, path in paths.items():
        if path is None:
            continue
        report = SplitReport(path)
        videos[name] = _index(experiment, path, name == "training", report)
        pictures[name] = _decode_frames(videos[name], name, report, console)
        clip_length = config.video_clip_length if name == "training" else None
        _look_for_oddities(videos[name], clip_length, report)
        report.statistics = _statistics(videos[name], config.video_clip_length)
        splits[name] = report

    whole = DataReport(splits)
    for first, second in combinations(splits, 2):
        shared = pictures[first].keys() & pictures[second].keys()
        if shared:
            pairs = sorted(f"{pictures[second][key]} = {pictures[first][key]}" for key in shared)
            whole.errors.append(
                f"{len(shared)} pictures of {second} are also in {first}: {listed(pairs)}"
            )
            continue
        # Numbers start anew in every file; names mean something.
        names = [{v.video_id for v in videos[split]} for split in (first, second)]
        same = sorted(n for n in names[0] & names[1] if isinstance(n, str) and not n.isdecimal())
        if same:
            whole.warnings.append(
                f"{first} and {second} have videos of the same names ({listed(same)}), though no "
                "picture is the same"
            )
    return whole


def _index(experiment: Experiment, path: str, training: bool, report: SplitReport) -> list[Video]:
    """The videos that can be read at all; what is wrong with the others goes into the report."""
    try:
        dataset = build_dataset(experiment, path, training=training, say=lambda text: None)
    except DataError as problem:
        report.errors += problem.problems
        report.warnings += problem.warnings
        return problem.videos
    except UserError as problem:
        report.errors.append(str(problem))
        return []
    report.warnings += dataset.warnings
    return dataset.videos


def _decode_frames(
    videos: list[Video], name: str, report: SplitReport, console: Console | None
) -> dict[bytes, Path]:
    """Digest -> file of all frames; broken and doubled ones go into the report."""
    sizes = {frame.path: video.size for video in videos for frame in video.frames}
    num_frames = {video.frames[0].path: len(video.frames) for video in videos}
    with ThreadPoolExecutor(num_cores()) as pool:
        found: Iterable[bytes | str] = pool.map(
            lambda path: _decode_file(path, sizes[path], num_frames.get(path, 1)), sizes
        )
        if console is not None and console.is_terminal:
            found = track(found, f"reading {name}", len(sizes), console=console, transient=True)
        found = list(found)
    files: dict[bytes, Path] = {}
    copies = []
    for path, digest in zip(sizes, found, strict=True):
        if isinstance(digest, str):
            report.errors.append(digest)
        elif (other := files.setdefault(digest, path)) != path:
            copies.append(f"{path} = {other}")
    if copies:
        report.warnings.append(f"{len(copies)} frames are copies of others: {listed(copies)}")
    uses = sum(len(video.frames) for video in videos if video.frames[0].path.suffix != ".mp4")
    again = uses - sum(path.suffix != ".mp4" for path in sizes)
    if again:
        report.warnings.append(f"{again} frames are files that are used more than once")
    return files


def _decode_file(path: Path, size: tuple[int, int], num_frames: int) -> bytes | str:
    """The digest of a file that can be read to its end, or what is wrong with it."""
    try:
        if path.suffix == ".mp4":
            film = Film()
            for t in range(num_frames):
                film.read(path, t)
        else:
            read_image(path, size)
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except UserError as problem:
        return str(problem)


def _look_for_oddities(videos: list[Video], clip_length: int | None, report: SplitReport) -> None:
    """`clip_length` is None where whole videos are scored and no clip is drawn."""
    once, never = [], []
    for video in videos:
        shown = [o for t in video.labelled for o in video.visible(t)]
        annotated = {o for frame in video.frames for o in frame.annotations}
        for object_id in video.object_ids:
            name = f"object {object_id!r} of video {video.video_id!r}"
            if object_id in annotated and shown.count(object_id) < 2:
                (once if object_id in shown else never).append(name)
    least = clip_length or 2  # a prompted frame and one to score
    short = [f"video {v.video_id!r}" for v in videos if len(v.labelled) < least]
    told = {
        "on a single frame: nothing to track": once,
        "annotated, but never with a pixel": never,
        f"fewer labelled frames than dataset.video_clip_length ({clip_length}), padded"
        if clip_length
        else "a single labelled frame: nothing to score": short,
    }
    report.warnings += [
        f"{len(names)} x {what}: {listed(names)}" for what, names in told.items() if names
    ]


def _statistics(videos: list[Video], clip_length: int) -> dict[str, Any]:
    """Counts and quantiles; null where there is nothing to count."""
    shares, num_pairs, num_objects = [], 0, 0
    for video in videos:
        annotated = {o for frame in video.frames for o in frame.annotations}
        num_objects += len(annotated)
        num_pairs += len(annotated) * len(video.labelled)
        pixels = video.size[0] * video.size[1]
        shares += [
            video.frames[t].annotations[o].area / pixels
            for t in video.labelled
            for o in video.visible(t)
        ]
    lengths = [len(video.labelled) for video in videos]
    return {
        "videos": len(videos),
        "frames": sum(len(video.frames) for video in videos),
        "labelled_frames": sum(lengths),
        "labelled_frames_of_a_video": _quantiles(lengths, 0),
        "videos_shorter_than_a_clip": sum(length < clip_length for length in lengths),
        "frame_sizes": [f"{w}x{h}" for h, w in sorted({video.size for video in videos})],
        "objects": num_objects,
        "masks": len(shares),
        "share_of_absent_frames": round(1 - len(shares) / num_pairs, 4) if num_pairs else None,
        "mask_area_as_share_of_frame": _quantiles(shares, 6),
    }


def _quantiles(values: list[float], digits: int) -> dict[str, float] | None:
    if not values:
        return None
    found = np.quantile(values, list(_QUANTILES.values()), method="nearest")
    return {
        name: round(value, digits) if digits else int(value)
        for name, value in zip(_QUANTILES, found.tolist(), strict=True)
    }


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:,.4g}" for name, number in value.items())
    if isinstance(value, list):
        return listed(value)
    return "" if value is None else f"{value:,}"
