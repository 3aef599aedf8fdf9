"""Label Studio's own JSON, rewritten as COCO video."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from sam2train.data_coco_files import name_videos, path_spellings
from sam2train.data_rle import encode_mask
from sam2train.data_source import listed
from sam2train.data_videos import FILM_SUFFIXES, PICTURE_SUFFIXES
from sam2train.errors import UserError
from sam2train.machine import watched

TASKS = "tasks"  # where `read_json` puts the list that the file is
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


def decode_brush(code: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool from the run lengths of Label Studio's brush: the pixels that are not
    transparent.

    The code is a stream of bits: 32 of the number of values, 5 of the bits of a value less 1, and
    4 times 4 of the bits of a run length less 1. Then, until all values are there: a bit that is 1
    for a run of one value and 0 for single values, 2 bits that choose one of the four lengths, the
    number of values less 1 in so many bits, and the value or values. Values are the R, G, B, A of
    each pixel, row by row. (thi.ng's rle-pack, which Label Studio's editor uses.)

    Raises:
        ValueError: damaged, or not of this size.
    """
    if not isinstance(code, list) or not all(type(b) is int and 0 <= b <= 255 for b in code):
        raise ValueError("`rle` is no list of bytes")
    bits = np.unpackbits(np.array(code, np.uint8))
    place = 0

    def read(count: int) -> int:
        nonlocal place
        if place + count > len(bits):
            raise ValueError(f"`rle` ends after {len(bits)} bits, before its mask does")
        chunk = bits[place : place + count]
        place += count
        return int.from_bytes(np.packbits(chunk).tobytes(), "big") >> (-count % 8)

    number, word = read(32), read(5) + 1
    lengths = [read(4) + 1 for _ in range(4)]
    height, width = size
    if number != 4 * height * width or word != 8:
        raise ValueError(
            f"`rle` has {number} values of {word} bits; expected {4 * height * width} of 8, four "
            f"for each pixel of {width}x{height} (width x height)"
        )
    values = np.zeros(number, np.uint8)
    filled = 0
    while filled < number:
        is_run = read(1)
        count = read(lengths[read(2)]) + 1
        if filled + count > number:
            raise ValueError("`rle` has more values than the picture")
        if is_run:
            values[filled : filled + count] = read(8)
        else:
            chunk = bits[place : place + 8 * count]
            if len(chunk) < 8 * count:
                raise ValueError(f"`rle` ends after {len(bits)} bits, before its mask does")
            values[filled : filled + count] = np.packbits(chunk)
            place += 8 * count
        filled += count
    return values.reshape(height, width, 4)[:, :, 3] > 0
