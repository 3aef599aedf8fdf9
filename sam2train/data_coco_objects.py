"""Which object each annotation of a COCO file belongs to, and the mask it gives; which annotations
are no object: crowds and regions to ignore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Any, Literal

import numpy as np

from sam2train.data_coco_files import (
    CATEGORY,
    ID_WANTED,
    NO_ID,
    Findings,
    Image,
    as_id,
    has_identity,
    identity,
)
from sam2train.data_rle import (
    Parts,
    bounding_box,
    polygon_corners,
    run_lengths,
    scaled_polygons,
    segmentation_area,
)
from sam2train.data_source import Annotation, listed
from sam2train.machine import watched

_ANNOTATION = "annotation"  # the key of an object that is on one image only
_SAME_PLACE = 0.3  # IoU of the boxes of one object on neighbouring frames, a guess

Box = tuple[int, int, int, int]  # x1, y1, x2, y2, the last column and row included


@dataclass
class _Entry:
    """One annotation of the file."""

    name: int | str
    image_id: int | str
    image: Image
    raw: Mapping[str, Any]
    key: str = NO_ID
    object_id: int | str | None = 1  # None: what the file has cannot be an id
    segmentation: Any = None
    area: int = 0

    @cached_property
    def box(self) -> Box | None:
        runs = run_lengths(self.segmentation, self.image.size)
        return bounding_box(runs, self.image.size[0])

    @property
    def where(self) -> str:
        return f"annotation {self.name} (image {self.image_id!r})"


def read_annotations(
    content: Mapping[str, Any],
    images: Mapping[int | str, Image],
    broken: set,
    found: Findings,
    *,
    alone: bool = False,
    unite: bool = True,
) -> dict[int | str, dict[int | str, Annotation]]:
    """The annotations of each image by object id.

    Args:
        content: of the file: `annotations` and, for names, `categories`.
        broken: ids of images that are reported already.
        alone: images are no frames, so each annotation is an object.
        unite: several annotations of one object on one frame are its parts; False: an error.
    """
    entries = _read_entries(content["annotations"], images, broken, found)
    by_video: dict[int | str, list[_Entry]] = {}
    for entry in entries:
        by_video.setdefault(entry.image.video_id, []).append(entry)
    told: dict[str, list[int | str]] = {}  # where identity is from -> videos
    for video_id, members in by_video.items():
        if alone:
            for place, entry in enumerate(members):
                entry.key, entry.object_id = _ANNOTATION, place + 1
        else:
            _identify(video_id, members, told, found)
    _tell_identity(told, found)
    entries = _read_masks([entry for entry in entries if entry.object_id is not None], found)
    names = _category_names(content)
    annotations: dict[int | str, dict[int | str, Annotation]] = {i: {} for i in images}
    united: list[str] = []
    for video_id, members in _by_video(entries).items():
        _part_restarted(video_id, members, names, found)
        on_frame: dict[tuple[int | str, int | str], list[_Entry]] = {}
        for entry in members:
            on_frame.setdefault((entry.image_id, entry.object_id), []).append(entry)
        for (image_id, object_id), parts in on_frame.items():
            if len(parts) > 1:
                if problem := _why_not_united(parts, unite):
                    found.problems.append(problem)
                    continue
                united.append(f"object {object_id!r} on image {image_id!r}")
            annotations[image_id][object_id] = _join(parts)
        _refuse_jumps(video_id, members, names, found)
    if united:
        found.warnings.append(
            f"{listed(united)}: several annotations of one object on one frame, united; "
            "dataset.same_object_twice: error refuses them"
        )
    if num_empty := sum(entry.area == 0 for entry in entries):
        found.warnings.append(
            f"{num_empty} annotations have no pixel: the object counts as absent there"
        )
    return annotations


def _read_entries(
    annotations: Sequence[Mapping[str, Any]],
    images: Mapping[int | str, Image],
    broken: set,
    found: Findings,
) -> list[_Entry]:
    """The annotations whose image is there and labelled."""
    names: set[int | str] = set()
    used_twice: list[str] = []
    num_left_out = 0
    entries = []
    for place, raw in enumerate(annotations):
        name = as_id(raw.get("id"))
        if name is None:
            name = f"at position {place}"
        elif name in names:
            used_twice.append(f"annotation {name}")
        names.add(name)
        image_id = as_id(raw.get("image_id"))
        if image_id is None:
            found.problems.append(
                f"annotation {name}: `image_id` is {raw.get('image_id')!r}; {ID_WANTED}"
            )
        elif image_id not in images:
            if image_id not in broken:
                found.problems.append(
                    f"annotation {name}: image_id {image_id!r} is no image of the file"
                )
        elif images[image_id].is_labelled is False:
            num_left_out += 1
        else:
            entries.append(_Entry(name, image_id, images[image_id], raw))
    if used_twice:
        found.warnings.append(f"{listed(used_twice)}: the id is used twice")
    if num_left_out:
        found.warnings.append(
            f"{num_left_out} annotations are on frames that the file calls unlabelled, and left "
            "out; dataset.unlabelled_frames: absent takes them"
        )
    return entries


# Identity


def _identify(
    video_id: int | str, members: list[_Entry], told: dict[str, list], found: Findings
) -> None:
    """Give the entries of a video their objects."""
    kinds: dict[tuple[str, str], str] = {}  # where the id is and its type -> an annotation with it
    for entry in members:
        key, value = identity(entry.raw)
        entry.key, entry.object_id = key, as_id(value)
        if entry.object_id is None:
            found.problems.append(f"{entry.where}: `{key}` is {value!r}; {ID_WANTED}")
            continue
        kind = "text" if isinstance(entry.object_id, str) else "a number"
        kinds.setdefault((key, kind), entry.where)
    if len(kinds) > 1:
        shown = ", ".join(f"{where} has {key} ({kind})" for (key, kind), where in kinds.items())
        found.problems.append(
            f"video {video_id!r}: {shown}; tell all objects of a video apart in one way, best by a "
            "`track_id`"
        )
    for key, _ in kinds:
        told.setdefault(key, []).append(video_id)


def _tell_identity(told: Mapping[str, list], found: Findings) -> None:
    for key, videos in told.items():
        if key == "track_id":
            continue
        what = f"object identity from {key}"
        if key == CATEGORY:
            what += ", as there is no `track_id`: one object of each category"
        elif key == NO_ID:
            what = "no `track_id` and no category: one object"
        if len(told) > 1:
            what = f"{listed([f'video {v!r}' for v in videos])}: {what}"
        found.notes.append(what)


def _category_names(content: Mapping[str, Any]) -> dict[Any, str]:
    categories = content.get("categories")
    known = categories if isinstance(categories, list) else []
    return {
        as_id(one.get("id")): str(one.get("name", one.get("id")))
        for one in known
        if isinstance(one, dict)
    }


def _by_video(entries: Iterable[_Entry]) -> dict[int | str, list[_Entry]]:
    videos: dict[int | str, list[_Entry]] = {}
    for entry in entries:
        videos.setdefault(entry.image.video_id, []).append(entry)
    return videos


def _entries_by_object(members: Iterable[_Entry]) -> dict[int | str, list[_Entry]]:
    """The entries of each object, in the order of its frames."""
    objects: dict[int | str, list[_Entry]] = {}
    for entry in sorted(members, key=lambda entry: entry.image.place):
        objects.setdefault(entry.object_id, []).append(entry)
    return objects


def _part_restarted(
    video_id: int | str, members: list[_Entry], names: Mapping[Any, str], found: Findings
) -> None:
    """Where ids start anew in each category, make the category a part of them.

    An id with several categories is one object all the same if its boxes go on in the same place
    when the category changes.
    """
    restarted, changed = [], []
    for object_id, entries in _entries_by_object(members).items():
        switches = [
            (one, two)
            for one, two in pairwise(entries)
            if entries[0].key != CATEGORY and _category(one) != _category(two)
        ]
        if not switches:
            continue
        goes_on = all(
            two.image.place - one.image.place == 1
            and one.box
            and two.box
            and _box_iou(one.box, two.box) >= _SAME_PLACE
            for one, two in switches
        )
        (changed if goes_on else restarted).append(f"{entries[0].key} {object_id!r}")
    if changed:
        found.notes.append(
            f"video {video_id!r}: {listed(changed)} changes its category in place: one object"
        )
    if restarted:
        for entry in members:
            category = _category(entry)
            entry.object_id = f"{names.get(category, category)} {entry.object_id}"
        found.notes.append(
            f"video {video_id!r}: {listed(restarted)} has several categories, so ids are unique "
            "within a category: object identity from category and id"
        )


def _category(entry: _Entry) -> int | str | None:
    return as_id(entry.raw.get(CATEGORY))


def _box_iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(width, 0) * max(height, 0)
    areas = [(x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in (a, b)]
    return shared / (sum(areas) - shared)


def _refuse_jumps(
    video_id: int | str, members: list[_Entry], names: Mapping[Any, str], found: Findings
) -> None:
    """A category whose mask leaps from one place to another is no single object.

    A leap is a step between neighbouring frames that ends clear of where it began, by more than
    three usual steps of this object and most of its diagonal; both bounds are guesses. After an
    absence, an object may be anywhere.
    """
    for object_id, entries in _entries_by_object(members).items():
        shown = [entry for entry in entries if entry.key in (CATEGORY, NO_ID) and entry.box]
        steps = [
            (_center_distance(one.box, two.box), one, two)
            for one, two in pairwise(shown)
            if two.image.place - one.image.place == 1
        ]
        for place, (distance, one, two) in enumerate(steps):
            others = [step[0] for k, step in enumerate(steps) if k != place]
            diagonal = max(np.hypot(b[2] - b[0] + 1, b[3] - b[1] + 1) for b in (one.box, two.box))
            usual = 3 * max(median(others), 1) if others else 2 * diagonal
            if _box_iou(one.box, two.box) == 0 and distance > max(usual, 0.75 * diagonal):
                found.problems.append(
                    f"video {video_id!r}: {names.get(object_id, object_id)!r} leaps from "
                    f"{one.box[:2]} on image {one.image_id!r} to {two.box[:2]} on image "
                    f"{two.image_id!r}, so the category does not tell its objects apart; give each "
                    "object its own `track_id`"
                )
                break


def _center_distance(a: Box, b: Box) -> float:
    return float(np.hypot(a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]) / 2)


def _why_not_united(parts: list[_Entry], unite: bool) -> str | None:
    first, second = parts[:2]
    by_id = first.key not in (CATEGORY, NO_ID)
    if by_id and unite:
        return None
    key = first.key if first.key != NO_ID else "no id"
    advice = "or merge the parts of one object into one segmentation"
    if by_id:
        advice = "or let dataset.same_object_twice: unite make them one"
    return (
        f"annotations {first.name} and {second.name} (image {first.image_id!r}) are the same "
        f"object ({key} {first.object_id!r}); give each object its own `track_id`, {advice}"
    )


def _join(parts: list[_Entry]) -> Annotation:
    if len(parts) == 1:
        return Annotation(parts[0].name, parts[0].segmentation, parts[0].area)
    union = Parts(tuple(part.segmentation for part in parts))
    return Annotation(parts[0].name, union, segmentation_area(union, parts[0].image.size))


# Masks


def _read_masks(entries: list[_Entry], found: Findings) -> list[_Entry]:
    """The entries whose masks are good, with area and box."""
    in_shares = _are_shares(entries)
    if in_shares:
        found.notes.append(
            "polygons lie in 0..1: shares of width and height, scaled to the picture"
        )
    told: dict[str, list[str]] = {}  # remark -> the annotations it is about
    good = []
    for entry in watched(entries, "masks", len(entries)):
        raw = entry.raw.get("segmentation")
        try:
            if in_shares and polygon_corners(raw):
                run_lengths(raw, entry.image.size)  # checks sizes before anything is multiplied
                raw = scaled_polygons(raw, entry.image.size)
            remarks: set[str] = set()
            runs = run_lengths(raw, entry.image.size, remarks)
        except ValueError as problem:
            found.problems.append(f"{entry.where}: segmentation: {problem}")
            continue
        entry.segmentation, entry.area = raw, int(runs[1::2].sum())
        for remark in remarks:
            told.setdefault(remark, []).append(f"annotation {entry.name}")
        polygons = bool(raw) and "counts" not in raw and not in_shares
        if polygons and entry.area <= 1 and _within_one_pixel(raw):
            found.problems.append(
                f"{entry.where}: segmentation: its polygons lie in 0..1, those of others do not; "
                "write all corners in pixels"
            )
            continue
        if polygons and entry.area and entry.image.stated != entry.image.size:
            (height, width), (h, w) = entry.image.stated, entry.image.size
            found.problems.append(
                f"{entry.where}: polygons count in pixels of a picture of {width}x{height} as the "
                f"file says or of {w}x{h} as it is (width x height): correct `width` and `height`, "
                "or give an RLE"
            )
            continue
        good.append(entry)
    for remark, wheres in told.items():
        where = found.warnings if "left out" in remark else found.notes
        where.append(f"{listed(wheres)}: {remark}")
    return good


def _are_shares(entries: Iterable[_Entry]) -> bool:
    """Whether all polygons of the file lie in 0..1, and some have an extent."""
    extent = False
    for entry in entries:
        for ring in polygon_corners(entry.raw.get("segmentation")):
            if not all(type(v) in (int, float) and 0 <= v <= 1 for v in ring):
                return False
            extent |= _has_extent(ring)
    return extent


def _within_one_pixel(segmentation: Any) -> bool:
    rings = polygon_corners(segmentation)
    return any(map(_has_extent, rings)) and all(0 <= v <= 1 for ring in rings for v in ring)


def _has_extent(ring: list) -> bool:
    """Whether the corners are apart and not those of one pixel, as where an empty mask is one."""
    return all(max(part) > min(part) for part in (ring[::2], ring[1::2])) and any(
        0 < value < 1 for value in ring
    )


# Crowds and regions to ignore

# What annotations with `iscrowd` are.
#   auto     regions to ignore, unless `iscrowd` only says that a mask is an RLE, as CVAT writes it.
#   ignore   regions to ignore, always.
#   objects  objects like all others.
Crowds = Literal["auto", "ignore", "objects"]


def split_crowds(
    annotations: Sequence[Mapping[str, Any]], how: Crowds, found: Findings
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The annotations of objects, and those of regions to ignore (`iscrowd`, `ignore`)."""
    flagged = [raw for raw in annotations if _is_set(raw, "iscrowd")]
    crowds = {id(raw) for raw in annotations if _is_set(raw, "ignore")}
    if how == "ignore":
        crowds |= set(map(id, flagged))
    elif how == "auto" and flagged:
        # COCO's polygons have iscrowd 0 and its RLEs iscrowd 1; some programs take that for a rule
        # of the format and flag whatever they write as RLE.
        encoding = all(_is_set(raw, "iscrowd") for raw in annotations if _is_rle(raw))
        everything = len(flagged) == len(annotations)
        of_kind = [raw for raw in flagged if not (encoding and (everything or has_identity(raw)))]
        crowds |= set(map(id, of_kind))
        if len(of_kind) < len(flagged):
            found.notes.append(
                f"{len(flagged) - len(of_kind)} annotations have `iscrowd`, as all RLEs do, "
                "and are objects; dataset.crowds: ignore if they are crowds"
            )
    if crowds:
        found.notes.append(
            f"{len(crowds)} annotations are regions to ignore (`iscrowd`, `ignore`): left out of "
            "the loss, and of scores unless evaluation.void is background; dataset.crowds: objects "
            "takes those with `iscrowd` for objects"
        )
    return (
        [raw for raw in annotations if id(raw) not in crowds],
        [raw for raw in annotations if id(raw) in crowds],
    )


def read_crowds(
    crowds: Sequence[Mapping[str, Any]], images: Mapping[int | str, Image], found: Findings
) -> dict[int | str, Parts]:
    """The regions to ignore of each image that has some."""
    parts: dict[int | str, list[Any]] = {}
    for raw in crowds:
        image_id = as_id(raw.get("image_id"))
        if image_id not in images:
            continue  # of a broken image, or of none: as with a hole in the file, nothing to ignore
        segmentation = raw.get("segmentation")
        try:
            area = segmentation_area(segmentation, images[image_id].size)
        except ValueError as problem:
            found.problems.append(
                f"annotation {raw.get('id')} (image {image_id!r}): segmentation: {problem}"
            )
            continue
        if area:
            parts.setdefault(image_id, []).append(segmentation)
    return {image_id: Parts(tuple(of_image)) for image_id, of_image in parts.items()}


def _is_set(raw: Mapping[str, Any], key: str) -> bool:
    return raw.get(key) in (1, True, "1", "true", "True")


def _is_rle(raw: Mapping[str, Any]) -> bool:
    return isinstance(raw.get("segmentation"), dict) and "counts" in raw["segmentation"]
