"""The JSON of YouTube-VIS and OVIS, rewritten as COCO video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam2train.errors import UserError


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
