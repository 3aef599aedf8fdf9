"""What can be said of data: `--check-data`, the tables of `--dry-run`, when objects show."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sam2train.clips import BatchedVideoDatapoint
from sam2train.data_clips import ClipDataset
from sam2train.data_source import DataError, Video, VideoSource, listed
from sam2train.datasets import DataPart, DatasetConfig, build_dataset, data_paths
from sam2train.errors import UserError
from sam2train.files import natural_key, resolve_path
from sam2train.machine import cell, num_cores, say, watched, watching
from sam2train.transforms import AugmentConfig

if TYPE_CHECKING:
    import pandas as pd

_QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
_SHOWN = 40  # lines of one kind on the console; the JSON has all


@dataclass
class SplitReport:
    """What was found in the data of one path."""

    path: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was concluded from the files, and why
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataReport:
    """What was found, by split, and between the splits."""

    splits: dict[str, SplitReport]
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """error, warning or ok: the most serious kind that was found."""
        everything = [self, *self.splits.values()]
        if any(part.errors for part in everything):
            return "error"
        return "warning" if any(part.warnings for part in everything) else "ok"

    @property
    def exit_code(self) -> int:
        return 2 if self.verdict == "error" else 0

    def to_json(self) -> str:
        """One JSON document: `verdict`, `splits`, and `errors` and `warnings` between them."""
        return json.dumps({"verdict": self.verdict, **asdict(self)}, indent=1)

    def show(self, console: Console) -> None:
        """The report for people."""
        table = Table("", *self.splits, title="Data", title_justify="left")
        for name in next(iter(self.splits.values())).statistics:
            table.add_row(
                name.replace("_", " "),
                *(_as_text(split.statistics[name]) for split in self.splits.values()),
            )
        console.print(table)
        for name, part in [*self.splits.items(), ("between the splits", self)]:
            notes = [] if part is self else part.notes
            if part.errors or part.warnings or notes:
                say(console, f"\n{name}: {part.path}" if part is not self else f"\n{name}")
            for kind, lines, style in (
                ("note", notes, ""),
                ("error", part.errors, "red"),
                ("warning", part.warnings, "yellow"),
            ):
                for line in lines[:_SHOWN]:
                    say(console, f"  {kind}: {line}", style)
                if more := len(lines[_SHOWN:]):
                    say(console, f"  and {more} more of these; --json lists all", style)
        ends = {
            "ok": "all frames and masks can be read",
            "warning": "all frames and masks can be read; see the warnings",
            "error": "this data needs a repair",
        }
        say(console, f"\n{ends[self.verdict]}")


def check_data(config: DatasetConfig, console: Console | None = None) -> DataReport:
    """Read all training, validation and test data of a section; problems go into the report, none
    is raised.

    Masks are read whole where videos are indexed; frames are decoded here, in as many threads as
    there are cores: Pillow decodes outside Python's lock.

    Args:
        console: shows the progress.
    """
    paths = {"training": config.data_path, "validation": config.val_path, "test": config.test_path}
    splits: dict[str, SplitReport] = {}
    videos: dict[str, list[Video]] = {}
    pictures: dict[str, dict[bytes, Path]] = {}
    known: dict[tuple[str, str], VideoSource] = {}
    decoded: dict[int, tuple[dict[bytes, Path], list[str], list[str]]] = {}  # by source
    for name, path in paths.items():
        if path is None:
            continue
        report = SplitReport(" + ".join(data_paths(path)))
        with watching(console, f"indexing {name}"):
            source = _index(config, path, name == "training", report, known)
        videos[name] = [] if source is None else source.videos
        if source is not None and id(source) not in decoded:
            with watching(console, f"reading {name}"):
                decoded[id(source)] = _decode_frames(source)
        pictures[name], errors, warnings = decoded[id(source)] if source else ({}, [], [])
        report.errors += errors
        report.warnings += warnings
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
        # Only names are compared: numbers start anew in every file.
        names = [{v.video_id for v in videos[split]} for split in (first, second)]
        same = sorted(n for n in names[0] & names[1] if isinstance(n, str) and not n.isdecimal())
        if same:
            whole.warnings.append(
                f"{first} and {second} have videos of the same names ({listed(same)}), though no "
                "picture is the same"
            )
    return whole


def _index(
    config: DatasetConfig,
    path: str | Sequence[DataPart],
    training: bool,
    report: SplitReport,
    known: dict[tuple[str, str], VideoSource],
) -> VideoSource | None:
    """The videos that can be read at all; what is wrong with the others goes into the report."""
    try:
        # Neither the augmentation nor the seed matters: no clip is drawn.
        dataset = build_dataset(
            config, AugmentConfig(), 0, path, training=training, say=lambda text: None, known=known
        )
    except DataError as problem:
        report.errors += problem.problems
        report.warnings += problem.source.warnings
        report.notes += problem.source.notes
        return problem.source
    except UserError as problem:
        report.errors.append(str(problem))
        return None
    report.warnings += dataset.warnings
    report.notes += dataset.source.notes
    return dataset.source


def _decode_frames(
    source: VideoSource,
) -> tuple[dict[bytes, Path], list[str], list[str]]:
    """Digest -> file of all frames, with the errors of broken files and warnings of copies."""
    errors, warnings = [], []
    # File -> its pages, each with a frame that uses it.
    uses: dict[Path, dict[int | None, tuple[Video, int]]] = {}
    for video in source.videos:
        for t, frame in enumerate(video.frames):
            uses.setdefault(frame.path, {})[frame.page] = (video, t)
    with ThreadPoolExecutor(num_cores()) as pool:
        digests = pool.map(lambda path: _decode_file(source, path, uses[path].values()), uses)
        found = list(watched(digests, "files", len(uses)))
    files: dict[bytes, Path] = {}
    copies = []
    for path, digest in zip(uses, found, strict=True):
        if isinstance(digest, str):
            errors.append(digest)
        elif (other := files.setdefault(digest, path)) != path:
            copies.append(f"{path} = {other}")
    if copies:
        warnings.append(f"{len(copies)} frames are copies of others: {listed(copies)}")
    num_frames = sum(len(video.frames) for video in source.videos)
    if again := num_frames - sum(len(pages) for pages in uses.values()):
        warnings.append(f"{again} frames are files that are used more than once")
    return files, errors, warnings


def _decode_file(
    source: VideoSource, path: Path, frames: Iterable[tuple[Video, int]]
) -> bytes | str:
    """The digest of a file whose frames can all be read, or what is wrong with it."""
    try:
        for video, t in frames:
            source.read_picture(video, t)
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


def data_table(datasets: Mapping[str, ClipDataset]) -> Table:
    """A row for each split: what its data set holds."""
    table = Table(title="Data", title_justify="left")
    table.add_column("split")
    for heading in ("videos", "frames", "objects", "masks", "frame sizes (H, W)"):
        table.add_column(heading, justify="right")
    for split, dataset in datasets.items():
        videos = dataset.videos
        sizes = sorted({video.size for video in videos})
        masks = sum(len(video.visible(t)) for video in videos for t in range(len(video.frames)))
        table.add_row(
            split,
            f"{len(videos):,}",
            f"{sum(len(video.frames) for video in videos):,}",
            f"{sum(len(video.object_ids) for video in videos):,}",
            "made up" if dataset.source.makes_objects else f"{masks:,}",
            ", ".join(map(str, sizes[:3])) + (f" and {len(sizes) - 3} more" if sizes[3:] else ""),
        )
    return table


def batch_table(batch: BatchedVideoDatapoint) -> Table:
    """The shapes of a batch and the prompts of its clips."""
    table = Table("field", "value", title="First batch", title_justify="left")
    for name in ("img_batch", "masks", "images", "object_masks", "frame_valid", "object_valid"):
        value = getattr(batch, name)
        table.add_row(name, f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
    for clip, prompts in zip(batch.names, batch.prompts, strict=True):
        for prompt in prompts:
            table.add_row(
                cell(clip),
                cell(
                    f"object {prompt['object_id']}: {prompt['type']} on frame "
                    f"{prompt['frame_index']} {prompt['points'].round(1).tolist() or ''}"
                ),
            )
    return table


def mask_table(videos: Sequence[Video]) -> pd.DataFrame:
    """When objects show and how large they are; no mask is decoded.

    Returns:
        A row for each object on each labelled frame: video_id, object_id, frame, and area, the
        share of the frame that its mask covers, 0 where it does not show.
    """
    import pandas as pd

    rows = []
    for video in videos:
        pixels = video.size[0] * video.size[1]
        for t in video.labelled:
            found = video.frames[t].annotations
            for o in video.object_ids:
                area = found[o].area / pixels if o in found else 0.0
                rows.append((video.video_id, str(o), t, area))
    return pd.DataFrame(rows, columns=["video_id", "object_id", "frame", "area"])


def presence_counts(masks: pd.DataFrame) -> dict[str, int]:
    """How many objects of `mask_table` there are, appear late, vanish, and come back.

    An object appears late if it does not show on the first frame; it vanishes if it does not show
    on a frame after one that shows it, and comes back if it shows again after that.
    """
    counts = dict.fromkeys(("objects", "late", "vanish", "return"), 0)
    for _, part in masks.groupby(["video_id", "object_id"], sort=False):
        shows = (part.sort_values("frame")["area"] > 0).astype(int)
        change = shows.diff()
        counts["objects"] += 1
        counts["late"] += int(shows.iloc[0] == 0)
        counts["vanish"] += int((change == -1).any())
        counts["return"] += int((change == 1).sum() > (shows.iloc[0] == 0))
    return counts


def presence_text(masks: pd.DataFrame) -> str:
    """The `presence_counts` and the size of the masks, in sentences."""
    counts, area = presence_counts(masks), masks.loc[masks["area"] > 0, "area"]
    return (
        f"Of {counts['objects']} objects, {counts['late']} appear after the first frame, "
        f"{counts['vanish']} vanish, and {counts['return']} of these come back. Half of the "
        f"masks cover less than {area.median():.1%} of their frame, one in twenty less than "
        f"{area.quantile(0.05):.2%}."
    )


def shared_split_warning(config: DatasetConfig) -> str | None:
    """What to say where one path both chooses the best checkpoint and reports the result."""
    if config.val_path is None or config.test_path is None:
        return None
    paths = [resolve_path(path).resolve() for path in (config.val_path, config.test_path)]
    if paths[0] != paths[1]:
        return None
    return f"dataset.val_path and dataset.test_path are the same ({config.val_path}): {_TOO_HIGH}"


_TOO_HIGH = (
    "the best checkpoint was chosen on the videos it is reported on, so that its test score is too "
    "high"
)


def shared_video_warnings(splits: Mapping[str, ClipDataset]) -> list[str]:
    """What to say where two of the data sets, by the names train, val and test, share frames."""
    resolve = cache(Path.resolve)  # of folders: the disk is asked once for each
    places = {
        name: {
            resolve(frame.path.parent) / frame.path.name: video.video_id
            for video in data.videos
            for frame in video.frames
        }
        for name, data in splits.items()
    }
    trained = "was trained on, so that its score says little about other videos"
    consequences = {
        ("val", "test"): _TOO_HIGH,
        ("train", "val"): f"what chooses the best checkpoint {trained}",
        ("train", "test"): f"what the result is reported on {trained}",
    }
    warnings = []
    for (one, other), consequence in consequences.items():
        shared = places.get(one, {}).keys() & places.get(other, {}).keys()
        videos = sorted({str(places[other][place]) for place in shared}, key=natural_key)
        if videos:
            keys = {"train": "data_path", "val": "val_path", "test": "test_path"}
            warnings.append(
                f"dataset.{keys[one]} and dataset.{keys[other]} share frames (video "
                f"{listed(videos)}): {consequence}"
            )
    return warnings
