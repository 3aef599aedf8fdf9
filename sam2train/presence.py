"""Which objects of a data set show when, and how large: from its annotations, no mask decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from sam2train.videos import Video


def mask_table(videos: Sequence[Video]) -> pd.DataFrame:
    """A row for each object on each labelled frame: video_id, object_id, frame, and area, the share
    of the frame that its mask covers, 0 where it does not show. No mask is decoded."""
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
    """`presence_counts` and the usual size of a mask, as a sentence or two."""
    counts, area = presence_counts(masks), masks.loc[masks["area"] > 0, "area"]
    return (
        f"Of {counts['objects']} objects, {counts['late']} appear after the first frame, "
        f"{counts['vanish']} vanish, and {counts['return']} of these come back. Half of the "
        f"masks cover less than {area.median():.1%} of their frame, one in twenty less than "
        f"{area.quantile(0.05):.2%}."
    )
