"""Files of annotations in layouts other than COCO's, recognised and read as COCO."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam2train.data_burst import burst_to_coco, is_burst
from sam2train.data_coco import CocoVideos, read_coco
from sam2train.data_coco_index import read_large_coco
from sam2train.data_cvat import cvat_file, cvat_to_coco
from sam2train.data_label_studio import is_label_studio, label_studio_to_coco
from sam2train.data_youtube_vis import is_youtube_vis, youtube_vis_to_coco

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
