"""JSON annotations in layouts other than COCO's, rewritten as COCO video: Label Studio's own, those
of YouTube-VIS and OVIS, and of BURST; and which layout a file has, CVAT's XML included."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from sam2train.data_coco import CocoVideos, read_coco
from sam2train.data_coco_files import TASKS, name_videos, path_spellings
from sam2train.data_coco_index import read_large_coco
from sam2train.data_cvat import cvat_file, cvat_to_coco
from sam2train.data_rle import decode_brush, encode_mask
from sam2train.data_source import listed
from sam2train.data_videos import FILM_SUFFIXES, PICTURE_SUFFIXES
from sam2train.errors import UserError
from sam2train.machine import watched

# Label Studio

_TASKS_WANTED = "expected Label Studio's export JSON: a list of tasks with `data` and `annotations`"
_DRAW = "draw brush masks or polygons on pictures of the frames and export as JSON again"
_REGIONS = ("brush", "brushlabels", "polygon", "polygonlabels")
# Results that are no region: they belong to a task, or to a region that has a result of its own.
_NO_REGIONS = {"choices", "textarea", "number", "rating", "labels", "relation", "taxonomy"}
_NO_REGIONS |= {"datetime", "pairwise", "ranker"}
# Names of fields of a region that say which object it is, without `_`, `-`, spaces and capitals.
_IDENTITY = {"trackid", "track", "trackingid", "instanceid", "instance", "objectid", "object"}
_IDENTITY |= {"objid", "id"}


def is_label_studio(content: Mapping[str, Any]) -> bool:
    """Whether there are tasks with `data` and lists of annotations or predictions."""
    tasks = content.get(TASKS)
    return isinstance(tasks, list) and any(
        isinstance(task, dict) and ("data" in task or _is_minimal(task)) for task in tasks
    )


def _is_minimal(task: Mapping[str, Any]) -> bool:
    """Whether it is a task of the export JSON-MIN."""
    return "annotation_id" in task and "annotations" not in task


def label_studio_to_coco(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The same pictures and masks as COCO has them; `notes` says what was concluded.

    A picture whose task nobody annotated is unlabelled. Objects are told apart by a field of their
    region such as `track_id` or `instance`, else by the text that a region has as its meta, else by
    label. See `name_videos` for what a video is.

    Raises:
        UserError: no such tasks, nothing in them has a mask, or it is not clear whose annotation
            counts.
    """
    tasks = content.get(TASKS)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise UserError(f"{path}: {_TASKS_WANTED}")
    if any(map(_is_minimal, tasks)):
        raise UserError(
            f"{path}: is Label Studio's JSON-MIN, which does not say which frames were looked at; "
            "export as JSON"
        )
    images, annotations, notes = [], [], []
    labels: dict[str, int] = {}
    kinds: Counter[str] = Counter()
    num_predictions = 0
    for place, task in enumerate(watched(tasks, "tasks", len(tasks))):
        where = f"{path}: task {task.get('id', place)!r}"
        counted = _counted(task, where)
        num_predictions += bool(task.get("predictions"))
        results = [] if counted is None else counted
        kinds.update(str(one.get("type")) for one in results)
        name = _picture_of(task, where, kinds)
        image = {"id": place, "file_name": name, "is_annotated": counted is not None}
        for region in _regions(results):
            image |= dict(zip(("height", "width"), region["size"], strict=True))
            label = ", ".join(region["labels"]) or "object"
            annotation = {
                "id": len(annotations),
                "image_id": place,
                "category_id": labels.setdefault(label, len(labels) + 1),
                "attributes": region["fields"],
            }
            if region["meta"]:
                annotation["attributes"] = {"track_id": f"{label} {region['meta']}"} | (
                    annotation["attributes"]
                )
            try:
                annotation["segmentation"] = _mask_of_region(region)
            except ValueError as problem:
                raise UserError(f"{where}: region {region['id']!r} ({label}): {problem}") from None
            annotations.append(annotation)
        *_, (plain, _) = path_spellings(name)
        images.append(image | {"name": plain})
    regions = {kind: n for kind, n in kinds.items() if kind not in {*_REGIONS, *_NO_REGIONS}}
    others = ", ".join(f"{number} {kind}" for kind, number in regions.items())
    if not annotations:
        raise UserError(
            f"{path}: Label Studio's tasks have no brush mask and no polygon"
            f"{f', only {others}, which train nothing here' if others else ''}; {_DRAW}"
        )
    if others:
        notes.append(f"{others} left out: no masks")
    if num_predictions:
        notes.append(f"predictions of {num_predictions} tasks are not read; annotations are")
    if all(image["is_annotated"] for image in images):
        for image in images:
            del image["is_annotated"]
    images, told = name_videos(images, annotations)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in labels.items()],
        "notes": notes + told,
    }


def _counted(task: Mapping[str, Any], where: str) -> list[Mapping[str, Any]] | None:
    """The results of the annotation that counts; None where nobody annotated the task."""
    annotations = task.get("annotations", task.get("completions", []))
    good = isinstance(annotations, list) and all(isinstance(one, dict) for one in annotations)
    if not good:
        raise UserError(f"{where}: `annotations` is no list of mappings; {_TASKS_WANTED}")
    done = [one for one in annotations if not one.get("was_cancelled")]
    chosen = [one for one in done if one.get("ground_truth")] or done
    if len(chosen) > 1:
        ids = listed([repr(one.get("id")) for one in chosen])
        raise UserError(
            f"{where}: has {len(chosen)} annotations ({ids}), which may be of several people; mark "
            "one as ground truth in Label Studio, or delete the others"
        )
    if not chosen:
        return None
    results = chosen[0].get("result")
    if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
        raise UserError(f"{where}: `result` is no list of mappings; {_TASKS_WANTED}")
    return results


def _picture_of(task: Mapping[str, Any], where: str, kinds: Mapping[str, int]) -> str:
    """The path of the picture of a task, as Label Studio has it."""
    data = task.get("data")
    texts = [v for v in data.values() if isinstance(v, str)] if isinstance(data, dict) else []

    def ends_in(suffixes: set[str]) -> list[str]:
        return [
            text
            for text in texts
            if any(PurePath(p).suffix.lower() in suffixes for p, _ in path_spellings(text))
        ]

    pictures = ends_in(PICTURE_SUFFIXES)
    if isinstance(data, dict) and data.get("image") in pictures:  # the usual name of the field
        return data["image"]
    if len(pictures) == 1:
        return pictures[0]
    if not pictures and ends_in(FILM_SUFFIXES):
        shown = ", ".join(sorted(kind for kind in kinds if kind not in _NO_REGIONS))
        raise UserError(
            f"{where}: is a video{f' with {shown}' if shown else ''}: Label Studio draws boxes and "
            f"time spans in videos and no masks, and boxes train nothing here; {_DRAW}"
        )
    raise UserError(
        f"{where}: `data` names {len(pictures)} pictures; expected one, the frame that the masks "
        "are of"
    )


def _regions(results: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each region with a mask: its value, size, labels, fields and meta, from all results that have
    its id."""
    by_id: dict[Any, list[Mapping[str, Any]]] = {}
    for place, one in enumerate(results):
        by_id.setdefault(str(one.get("id", f"at position {place}")), []).append(one)
    for region_id, parts in by_id.items():
        mask = next((one for one in parts if one.get("type") in _REGIONS), None)
        if mask is None:
            continue
        labels: list[str] = []
        fields: dict[str, int | str] = {}
        meta = ""
        for one in parts:
            value = one.get("value") if isinstance(one.get("value"), dict) else {}
            for key in ("brushlabels", "polygonlabels", "labels"):
                found = value.get(key)
                found = found if isinstance(found, list) else []
                labels += [str(label) for label in found if str(label) not in labels]
            name = str(one.get("from_name"))
            plain = name.lower().replace("_", "").replace("-", "").replace(" ", "")
            if plain in _IDENTITY and (text := _field(value)) is not None:
                fields["track_id"] = text
            given = one.get("meta")
            text = given.get("text") if isinstance(given, dict) else None
            if text:
                meta = " ".join(map(str, text)) if isinstance(text, list) else str(text)
        size = [mask.get(f"original_{side}") for side in ("height", "width")]
        yield {"id": region_id, "mask": mask, "size": size, "labels": labels, "fields": fields} | {
            "meta": meta.strip()
        }


def _field(value: Mapping[str, Any]) -> int | str | None:
    """What somebody filled into a field of a region; whole numbers as such."""
    for key in ("number", "text", "choices"):
        found = value.get(key)
        found = found[0] if isinstance(found, list) and len(found) == 1 else found
        if isinstance(found, str) and found.strip():
            text = found.strip()
            return int(text) if text.isdecimal() else text
        if isinstance(found, int | float) and float(found).is_integer():
            return int(found)
    return None


def _mask_of_region(region: Mapping[str, Any]) -> Any:
    """An RLE or polygons in pixels. Raises ValueError: what is wrong with it."""
    mask, (height, width) = region["mask"], region["size"]
    value = mask.get("value") if isinstance(mask.get("value"), dict) else {}
    if not all(type(side) is int and 0 < side <= 1 << 16 for side in (height, width)):
        raise ValueError(
            f"`original_height` and `original_width` are {height!r} and {width!r}; expected pixels"
        )
    if mask.get("image_rotation"):
        raise ValueError(
            f"the picture is turned by {mask['image_rotation']} degrees in Label Studio, so it is "
            "not clear which way its masks lie; turn the picture itself, or export as COCO"
        )
    if mask["type"].startswith("brush"):
        return encode_mask(decode_brush(value.get("rle"), (height, width)))
    points = value.get("points")
    pairs = isinstance(points, list) and all(
        isinstance(p, list) and len(p) == 2 and all(type(v) in (int, float) for v in p)
        for p in points
    )
    if not pairs or len(points) < 3:
        raise ValueError("`points` is no list of three corners [x, y] or more, in percent")
    return [[v * side / 100 for p in points for v, side in zip(p, (width, height), strict=True)]]


# YouTube-VIS and OVIS


def is_youtube_vis(content: Mapping[str, Any]) -> bool:
    """Whether tracks are annotations, each with `segmentations`, one for each frame."""
    tracks = content.get("annotations")
    return isinstance(tracks, list) and any(
        isinstance(track, dict) and "segmentations" in track for track in tracks
    )


def youtube_vis_to_coco(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The same videos with an image for each frame and an annotation for each mask.

    Raises:
        UserError: no videos, or tracks that do not fit them.
    """
    wanted = (
        "expected YouTube-VIS: `videos` with `file_names`, and `annotations` with `segmentations`, "
        "one or null for each frame"
    )
    videos, tracks = content.get("videos"), content.get("annotations")
    for key, entries in (("videos", videos), ("annotations", tracks)):
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: `{key}` is missing or no list of mappings; {wanted}")
    images, annotations, lengths = [], [], {}
    for video in videos:
        names, video_id = video.get("file_names"), video.get("id")
        if not isinstance(names, list) or not names or not isinstance(video_id, int | str):
            raise UserError(f"{path}: video {video_id!r} has no `file_names` or no id; {wanted}")
        lengths[video_id] = len(names)
        for t, name in enumerate(names):
            image = {"id": f"{video_id}[{t}]", "video_id": video_id, "order_in_video": t}
            image |= {"file_name": name}
            images.append(image | {key: video[key] for key in ("height", "width") if key in video})
    for track in tracks:
        masks, video_id = track.get("segmentations"), track.get("video_id")
        where = f"{path}: annotation {track.get('id')!r}"
        if not isinstance(video_id, int | str) or video_id not in lengths:
            raise UserError(f"{where}: video_id {video_id!r} is no video of the file; {wanted}")
        if not isinstance(masks, list) or len(masks) != lengths[video_id]:
            found = len(masks) if isinstance(masks, list) else "no list of"
            raise UserError(
                f"{where}: {found} `segmentations` for the {lengths[video_id]} frames of video "
                f"{video_id!r}; {wanted}"
            )
        same = {key: track[key] for key in ("category_id", "iscrowd") if key in track}
        annotations += [
            same
            | {
                "id": f"{track.get('id')}[{t}]",
                "image_id": f"{video_id}[{t}]",
                "track_id": track.get("id"),
                "segmentation": mask,
            }
            for t, mask in enumerate(masks)
            if mask is not None
        ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": content.get("categories", []),
    }


# BURST

_LISTS = ("all_image_paths", "annotated_image_paths", "segmentations")


def is_burst(content: Mapping[str, Any]) -> bool:
    """Whether there are `sequences` with masks by track for some of their frames."""
    sequences = content.get("sequences")
    return isinstance(sequences, list) and any(
        isinstance(sequence, dict) and "annotated_image_paths" in sequence for sequence in sequences
    )


def burst_to_coco(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The same videos with an image for each frame and an annotation for each mask.

    The frames of a sequence are in `<dataset>/<seq_name>`.

    Raises:
        UserError: a sequence without what it needs.
    """
    wanted = (
        "expected BURST: `sequences` with `seq_name`, `width`, `height`, `all_image_paths`, "
        "`annotated_image_paths` and as many `segmentations`"
    )
    sequences = content.get("sequences")
    if not isinstance(sequences, list) or not all(isinstance(one, dict) for one in sequences):
        raise UserError(f"{path}: `sequences` is missing or no list of mappings; {wanted}")
    images, annotations = [], []
    for sequence in sequences:
        name = sequence.get("seq_name")
        lists = [sequence.get(key) for key in _LISTS]
        sizes = [sequence.get(key) for key in ("height", "width")]
        good = all(isinstance(part, list) for part in lists) and len(lists[1]) == len(lists[2])
        good &= all(type(side) is int for side in sizes) and isinstance(name, str)
        if not good or not all(isinstance(part, str) for part in lists[0] + lists[1]):
            raise UserError(f"{path}: sequence {name!r}; {wanted}")
        everything, annotated, masks = lists
        looked_at = set(annotated)
        if unknown := looked_at - set(everything):
            raise UserError(
                f"{path}: sequence {name!r}: {sorted(unknown)[0]} is annotated, but not in "
                f"`all_image_paths`; {wanted}"
            )
        video_id = str(PurePath(str(sequence.get("dataset") or ""), name))
        for t, picture in enumerate(everything):
            images.append(
                {
                    "id": f"{video_id}/{picture}",
                    "video_id": video_id,
                    "order_in_video": t,
                    "file_name": f"{video_id}/{picture}",
                    "height": sizes[0],
                    "width": sizes[1],
                    "is_annotated": picture in looked_at,
                }
            )
        categories = sequence.get("track_category_ids")
        categories = categories if isinstance(categories, dict) else {}  # names only
        for picture, of_frame in zip(annotated, masks, strict=True):
            if not isinstance(of_frame, dict):
                raise UserError(f"{path}: sequence {name!r}: {picture} has no mapping; {wanted}")
            for track, mask in of_frame.items():
                rle = mask.get("rle") if isinstance(mask, dict) else mask
                annotations.append(
                    {
                        "id": f"{video_id}/{picture}/{track}",
                        "image_id": f"{video_id}/{picture}",
                        "track_id": int(track) if track.isdecimal() else track,
                        "category_id": categories.get(track),
                        "segmentation": rle
                        if isinstance(rle, dict) or rle is None
                        else {"size": sizes, "counts": rle},
                    }
                )
    return {
        "images": images,
        "annotations": annotations,
        "categories": content.get("categories", []),
    }


# Which layout a file has

# Layouts of JSON files: how one is known, and what rewrites it as COCO.
_LAYOUTS = {
    "youtube_vis": (is_youtube_vis, youtube_vis_to_coco),
    "burst": (is_burst, burst_to_coco),
    "label_studio": (is_label_studio, label_studio_to_coco),
}
_CVAT = "cvat"


def read_layout(
    path: Path, image_root: str | Path | None, layout: str | None = None, **settings: Any
) -> CocoVideos:
    """The videos of a file in the given layout, or in the one that its name and content show.

    Args:
        layout: youtube_vis, burst, label_studio or cvat; None: one of these or COCO.
        settings: of `CocoVideos`.

    Raises:
        UserError: what is wrong with the file, all of it.
    """
    if layout == _CVAT or (layout is None and cvat_file(path) is not None):
        path = cvat_file(path) or path
        content, notes = cvat_to_coco(path, image_root)
        return CocoVideos(path, image_root, content=content, notes=notes, **settings)
    warnings: list[str] = []
    content = functools.cache(lambda: read_coco(path, warnings))

    def as_coco() -> Mapping[str, Any]:
        """Nothing where it has another layout, or something to tell."""
        known = layout or any(is_it(content()) for is_it, _ in _LAYOUTS.values())
        return {} if known or warnings else content()

    def read() -> CocoVideos:
        kind, notes = layout, []
        if kind is None:
            kind = next((name for name, (is_it, _) in _LAYOUTS.items() if is_it(content())), None)
            if kind is not None:
                notes.append(f"the file has the layout of {kind}, and is read as such")
        found = content() if kind is None else _LAYOUTS[kind][1](path, content())
        notes += found.get("notes", []) if kind is not None else []
        told = {"warnings": warnings, "notes": notes}
        return CocoVideos(path, image_root, content=found, **told, **settings)

    return read_large_coco(path, image_root, {"layout": layout, **settings}, read, as_coco)
