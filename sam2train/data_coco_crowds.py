"""Annotations of a COCO file that are no object: crowds and regions to ignore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sam2train.data_coco_objects import Findings, Image, as_id, has_identity
from sam2train.data_rle import Parts, segmentation_area

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
