"""The JSON of BURST, rewritten as COCO video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from sam2train.errors import UserError

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
